"""Tables and plots of the evidence, from the results that `run.py` leaves.

    python examples/evidence/report.py            # prints the tables, and draws the plots beside the results
    python examples/evidence/report.py --write    # also puts the tables into README.md beside this script

What has not run yet is left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

# In place of this file's own folder, so that the examples beside it are found.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from matplotlib.figure import Figure
from scipy.stats import ttest_rel

from benchmarks.report import markdown, save, with_tables
from evidence import comparison_report, warm_up
from evidence.experiment import (
    ABLATED,
    ABLATIONS,
    COMPARED,
    CURVE_MODEL,
    FAMILIES,
    LEARNING_RATES,
    LONG_CURVE,
    MODELS,
    PATHS,
    RESULTS,
    SEEDS,
    TASKS,
    Run,
    ablation_runs,
    best_rate,
    curve_runs,
    rival_runs,
    share,
    table_runs,
)
from evidence.paired_tests import mean_gain, p_over_questions

README = Path(__file__).with_name("README.md")

Result = dict[str, Any]

BASELINE, OURS = "LoRA r=16", "Bitune r=8"
"""Of as many parameters."""


def results(runs: Iterable[Run]) -> list[Result]:
    """Of those that have run."""
    return [result for run in runs if (result := run.result()) is not None]


def of(found: Sequence[Result], **settings: Any) -> list[Result]:
    return [result for result in found if all(result[name] == value for name, value in settings.items())]


def answers(result: Result, point: int = -1, split: str = "test") -> str:
    """Question by question, `1` for a right one."""
    return result["points"][point][split]


def score(result: Result, point: int = -1, split: str = "test") -> float:
    """Share of the questions that are right."""
    return share(answers(result, point, split))


def scores(found: Sequence[Result], point: int = -1) -> list[float]:
    return [score(result, point) for result in found]


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds, in percent."""
    if not values:
        return ""
    return f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def paired(one: Sequence[Result], other: Sequence[Result]) -> Iterator[tuple[Result, Result]]:
    """Results of the same model, task and seed: of the same training samples and the same questions."""
    for result in one:
        for counterpart in of(other, model=result["model"], task=result["task"], seed=result["seed"]):
            yield result, counterpart


def p_of_questions(one: Sequence[Result], other: Sequence[Result], point: int = -1) -> float:
    """`p_over_questions` of results of one model and task."""
    by_seed = [{result["seed"]: answers(result, point) for result in side} for side in (one, other)]
    return p_over_questions(*by_seed)


def table() -> str:
    """Held-out exact match of every method, and Bitune against LoRA of as many parameters."""
    found = results(table_runs())
    rows = []
    for model in MODELS:
        for task in TASKS:
            cell = of(found, model=model, task=task)
            by_method = {method: of(cell, method=method) for method in COMPARED}
            ours, baseline = by_method[OURS], by_method[BASELINE]
            gains = [score(a) - score(b) for a, b in paired(ours, baseline)]
            rows.append(
                [model, task, str(len(gains)), *(spread(scores(own)) for own in by_method.values())]
                + ([f"{100 * mean(gains):+.1f}", f"{p_of_questions(ours, baseline):.2g}"] if gains else ["", ""])
            )
    return markdown(["model", "task", "seeds", *COMPARED, f"{OURS} over {BASELINE}", "p (questions)"], rows)


def overall() -> str:
    """The paired t-test over all pairs of runs."""
    found = results(table_runs())
    rows = []
    for method in COMPARED:
        pairs = list(paired(of(found, method=OURS), of(found, method=method)))
        if method != OURS and len(pairs) > 1:
            ours, theirs = (scores(side) for side in zip(*pairs, strict=True))
            gain = mean(a - b for a, b in zip(ours, theirs, strict=True))
            rows.append([method, str(len(pairs)), f"{100 * gain:+.1f}", f"{ttest_rel(ours, theirs).pvalue:.2g}"])
    return markdown([f"{OURS} against", "pairs of runs", "mean difference", "p (paired t-test)"], rows)


def rates() -> str:
    """What the learning rates were chosen by."""
    rows = []
    for model in MODELS:
        for method in COMPARED:
            tried = [Run(model, TASKS[0], method, rate, SEEDS[0]).result() for rate in LEARNING_RATES]
            shown = ["" if result is None else f"{100 * score(result, split='validation'):.0f}" for result in tried]
            chosen = best_rate(model, method)
            rows.append([model, method, *shown, "" if chosen is None else f"{chosen:g}"])
    return markdown(["model", "method", *(f"at {rate:g}" for rate in LEARNING_RATES), "chosen"], rows)


def answers_at(found: Sequence[Result], size: int) -> dict[int, str]:
    """Answers after `size` training samples, by seed: a run's are the same whether it ends there or goes on."""
    return {result["seed"]: point["test"] for result in found for point in result["points"] if point["samples"] == size}


def at(found: Sequence[Result], size: int) -> dict[int, float]:
    """The shares of right answers among those."""
    return {seed: share(right) for seed, right in answers_at(found, size).items()}


def ablations() -> str:
    """Bitune without one of its parts."""
    runs = [*table_runs(), *curve_runs(), *ablation_runs()]
    rate = best_rate(CURVE_MODEL, OURS)
    found = results(run for run in runs if (run.model, run.learning_rate) == (CURVE_MODEL, rate))
    columns = [(task, size) for task, sizes in ABLATED.items() for size in sizes]
    rows = []
    for method in (OURS, *ABLATIONS):
        cells = [at(of(found, task=task, method=method), size) for task, size in columns]
        rows.append([method, *(f"{spread(list(cell.values()))} ({len(cell)})" if cell else "" for cell in cells)])
    return markdown(["", *(f"{task}, {size}" for task, size in columns)], rows)


BESIDE = {
    "LoRA r=8": "LoRA r=8",
    "LoRA r=16": "LoRA r=16",
    "prompt repetition": "prompt repetition (LoRA r=16)",
    "MAS": "MAS (LoRA r=16)",
    "naive bidirectional": "prefix-LM (naive bidirectional)",
    "only causal": "only causal",
    OURS: OURS,
    "Bitune r=8, warmed up": "Bitune r=8, warmed up",
}
"""The rivals, and their names in the table."""


def rivals() -> str:
    """Bitune beside its rivals, at the chosen learning rates, and its gain over each where the seeds are the same."""
    runs = [*table_runs(), *curve_runs(), *ablation_runs(), *rival_runs()]
    found = results(run for run in runs if run.model == CURVE_MODEL)
    found = [result for result in found if result["learning_rate"] == best_rate(CURVE_MODEL, result["method"])]
    columns = [(task, size) for task, sizes in ABLATED.items() for size in sizes]
    rows = []
    for method, name in BESIDE.items():
        cells = []
        for task, size in columns:
            theirs, ours = (answers_at(of(found, task=task, method=each), size) for each in (method, OURS))
            gain = None if method == OURS else mean_gain(ours, theirs)
            p = "" if gain is None else f", {100 * gain:+.1f} (p {p_over_questions(ours, theirs):.2g})"
            shown = spread([share(right) for right in theirs.values()])
            cells.append(f"{shown} ({len(theirs)}){p}" if theirs else "")
        rows.append([name, *cells])
    return markdown(["", *(f"{task}, {size}" for task, size in columns)], rows)


def warm_ups() -> str:
    """Bitune with and without a warm-up of its bidirectional adapter, by its kind."""
    sizes, rows = (256, 512), []
    for task in (FAMILIES, PATHS):
        for kind in warm_up.KINDS:
            runs = [Run(CURVE_MODEL, task, OURS, warm_up.RATE, seed, sizes) for seed in SEEDS]
            found = [points for points in (warm_up.points_of(run, kind) for run in runs) if points]
            scored = [[share(points[place]["test"]) for points in found] for place in range(len(sizes))]
            rows.append([task, kind, *(f"{spread(each)} ({len(each)})" if each else "" for each in scored)])
    return markdown(["", "warm-up", *map(str, sizes)], rows)


def curve_groups() -> dict[tuple[str, str], dict[str, list[Result]]]:
    """By model and task, then by method, and its learning rate where that is not the chosen one."""
    groups: dict[tuple[str, str], dict[str, list[Result]]] = {}
    for result in results(curve_runs()):
        model, method, rate = result["model"], result["method"], result["learning_rate"]
        name = method if rate == best_rate(model, method) else f"{method} at {rate:g}"
        groups.setdefault((model, result["task"]), {}).setdefault(name, []).append(result)
    return groups


def curves() -> str:
    """Score against the number of training samples."""
    rows = [
        [model, task, method, str(len(own)), *(spread(list(at(own, size).values())) for size in LONG_CURVE)]
        for (model, task), by_method in curve_groups().items()
        for method, own in by_method.items()
    ]
    return markdown(["model", "task", "", "seeds", *map(str, LONG_CURVE)], rows)


def crossing() -> str:
    """Bitune against LoRA of as many parameters, along the curves."""
    rows = []
    for (model, task), by_method in curve_groups().items():
        ours, baseline = by_method.get(OURS, []), by_method.get(BASELINE, [])
        cells = []
        for place, size in enumerate(LONG_CURVE):
            gains = [score(a, place) - score(b, place) for a, b in paired(ours, baseline) if size in a["samples"]]
            cells.append(f"{100 * mean(gains):+.1f} (p {p_of_questions(ours, baseline, place):.2g})" if gains else "")
        rows.append([model, task, *cells])
    return markdown(["model", "task", *map(str, LONG_CURVE)], rows)


TABLES = {
    "table": table,
    "overall": overall,
    "rates": rates,
    "ablations": ablations,
    "curves": curves,
    "crossing": crossing,
    "rivals": rivals,
    "warm-up": warm_ups,
    **comparison_report.TABLES,
}


def draw_scores(figure: Figure) -> None:
    """A bar for each method, with the standard deviation over the seeds."""
    found = results(table_runs())
    for axes, model in zip(figure.subplots(1, len(MODELS), sharey=True), MODELS, strict=True):
        for place, method in enumerate(COMPARED):
            own = [scores(of(found, model=model, task=task, method=method)) for task in TASKS]
            x = [task + (place - (len(COMPARED) - 1) / 2) * 0.27 for task in range(len(TASKS))]
            errors = [stdev(values) if len(values) > 1 else 0 for values in own]
            axes.bar(x, [mean(values or [0]) for values in own], 0.25, yerr=errors, capsize=2, label=method)
        axes.set_xticks(range(len(TASKS)), TASKS, fontsize="small")
        axes.set_title(model)
    figure.axes[0].set_ylabel("exact match")
    figure.axes[-1].legend(fontsize="small")


def draw_alphas(figure: Figure) -> None:
    """Alpha by layer after training, mean over the seeds."""
    found = of(results(table_runs()), method=OURS)
    for row, model in zip(figure.subplots(len(MODELS), 2, sharey=True), MODELS, strict=True):
        for axes, kind in zip(row, ("key", "value"), strict=True):
            for task in TASKS:
                by_seed = [result["alphas"][kind] for result in of(found, model=model, task=task)]
                axes.plot([mean(alpha for [alpha] in layer) for layer in zip(*by_seed, strict=True)], label=task)
            axes.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
            axes.set(title=f"{model}, {kind}s", xlabel="layer", ylabel="alpha")
    figure.axes[0].legend(fontsize="small")


def draw_curves(figure: Figure) -> None:
    """Score against the number of training samples, mean, least and greatest of the seeds."""
    groups = curve_groups()
    panels = figure.subplots(1, max(1, len(groups)), sharey=True, squeeze=False)[0]
    for axes, ((model, task), by_method) in zip(panels, groups.items(), strict=False):
        for method, own in by_method.items():
            sizes = own[0]["samples"]
            by_size = [scores(own, place) for place in range(len(sizes))]
            axes.plot(sizes, [mean(values) for values in by_size], "o-", label=f"{method} ({len(own)})")
            axes.fill_between(sizes, list(map(min, by_size)), list(map(max, by_size)), alpha=0.15)
        axes.set(xscale="log", xlabel="training samples", title=f"{model}, {task}")
        axes.set_xticks(LONG_CURVE, map(str, LONG_CURVE))
        axes.minorticks_off()
        axes.legend(fontsize="x-small")
    panels[0].set_ylabel("exact match")


PLOTS = {"scores": (draw_scores, (9, 3.5)), "alphas": (draw_alphas, (9, 6)), "curves": (draw_curves, (13, 4.5))}
"""How each is drawn, and its size in inches."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into README.md beside this script")
    arguments = parser.parse_args()
    tables = {name: make() for name, make in TABLES.items()}
    for name, made in tables.items():
        print(f"{name}\n\n{made}\n")
    for name, (draw, size) in PLOTS.items():
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        save(figure, RESULTS / name)
    if arguments.write:
        README.write_text(with_tables(README.read_text(), tables, "evidence"))


if __name__ == "__main__":
    main()
