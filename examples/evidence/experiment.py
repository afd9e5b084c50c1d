"""What is compared: models, tasks, methods, and the runs that each question takes.

A run trains one method on one task once. It is named by its settings, so that it is known whether it is done.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig

from bitune_plugin import BituneConfig

RESULTS = Path(__file__).resolve().parent / "results"

MODELS = ("gemma-3-270m", "smollm2-135m")
TASKS = ("larger_families", "syllogism", "path_star")
"""Relations, premises that come before the question, and paths in a graph whose goal comes last."""

LEARNING_RATES = (3e-4, 1e-3)
"""The paper's."""

SEEDS = (0, 1, 2)
SAMPLES = 256
"""Of a run in the table. Each is seen once."""

CURVE = (256, 512, 1024)
"""Numbers of training samples at which a run of a curve is scored."""

LONG_CURVE = (*CURVE, 2048)
"""For Gemma, which finds no path with fewer, nor with these."""

CURVE_MODEL = "smollm2-135m"
"""Where all that goes beyond the table is measured: the cheaper one."""

FAMILIES, PATHS = "larger_families", "short_path_star"
"""The tasks of curves and ablations. The second is paths of two edges along one of three arms: unlike `path_star`, it
can be learnt from as few samples."""

ABLATED = {FAMILIES: (256,), PATHS: (256, 512)}
"""Where ablations are scored."""

MOVED = {FAMILIES: CURVE, PATHS: (256, 512)}
"""Where the `MOVERS` are scored: as long as it is open who is ahead."""


def lora(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")


def bitune(rank: int = 8, **settings: Any) -> BituneConfig:
    return BituneConfig(adapter=lora(rank), **settings)


READINGS = ("once", "twice", "by segments")
"""As it is, repeated, or with full attention within each segment (`rivals.py`); Bitune has its own way to read once."""


@dataclass(frozen=True)
class Method:
    """What a run trains.

    Attributes:
        adapter: a PEFT config; Bitune trains with `BituneSFTTrainer`, all else with TRL's own trainer.
        training: settings of `BituneSFTConfig` that differ from all others'.
        reading: how it reads a prompt, one of `READINGS`.
    """

    adapter: PeftConfig
    training: dict[str, Any] = field(default_factory=dict)
    reading: str = "once"

    def new_config(self) -> PeftConfig:
        """A copy of the PEFT config for one model, because PEFT writes the names of the model's layers into it."""
        return deepcopy(self.adapter)


COMPARED = {"LoRA r=8": Method(lora(8)), "LoRA r=16": Method(lora(16)), "Bitune r=8": Method(bitune())}

ABLATIONS = {
    "simplified mixing": Method(bitune(mixing="relu")),
    "no mixing": Method(bitune(mixing="none")),
    "mixing by head": Method(bitune(mixing_granularity="head")),
    "only causal": Method(bitune(second_pass_attention="causal")),
    "shared weights": Method(bitune(share_adapter=True)),
    "naive bidirectional": Method(bitune(mixing="none", share_adapter=True)),
}
"""The paper's."""

MOVERS = {
    "Bitune, theta's rate 1e-4": Method(bitune(), {"theta_learning_rate": 1e-4}),
    "Bitune, theta clipped apart": Method(bitune(), {"theta_max_grad_norm": 1.0}),
    "Bitune r=16": Method(bitune(16)),
}
"""What might move the number of samples from which Bitune is ahead."""

RIVALS = {
    "prompt repetition": Method(lora(16), reading="twice"),
    "MAS": Method(lora(16), reading="by segments"),
}
"""Of as many parameters as Bitune. Prefix-LM is among the ablations, as naive bidirectional."""

WARMED_UP = {"Bitune r=8, warmed up": Method(bitune(), {"warmup_prompts": 1_000_000})}
"""On the prompts of all samples of a run, once, before it."""

METHODS = COMPARED | ABLATIONS | MOVERS | RIVALS | WARMED_UP

CROSSING = ("LoRA r=16", "Bitune r=8")
"""Whose curves may cross: of as many parameters."""


@dataclass(frozen=True)
class Run:
    """One training. `samples` are the numbers of training samples after which it is scored; the last ends it."""

    model: str
    task: str
    method: str
    learning_rate: float
    seed: int
    samples: tuple[int, ...] = (SAMPLES,)

    @property
    def file(self) -> Path:
        """Where its result is, once it is done."""
        task, method = (re.sub("[=,']", "", name).replace(" ", "-") for name in (self.task, self.method))
        sizes = "-".join(map(str, self.samples))
        name = f"{method}_{self.learning_rate:g}_{sizes}_seed{self.seed}.json"
        return RESULTS / Path(self.model).name / task / name

    def result(self) -> dict[str, Any] | None:
        """What came out, or `None` if it has not run."""
        return json.loads(self.file.read_text()) if self.file.exists() else None

    def save(self, result: dict[str, Any]) -> None:
        """Writes `result` beside the settings, whole or not at all."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({**asdict(self), **result}, indent=1) + "\n")
        unfinished.rename(self.file)


def rate_runs() -> Iterator[Run]:
    """Every method of the table at every learning rate, on one task, once."""
    for model in MODELS:
        for method in COMPARED:
            for rate in LEARNING_RATES:
                yield Run(model, TASKS[0], method, rate, SEEDS[0])


def best_rate(model: str, method: str) -> float | None:
    """The learning rate with the best score on the validation split, the lower of two that are equal; `None` if they
    have not all run. What is no method of the table takes that of Bitune."""
    method = method if method in COMPARED else "Bitune r=8"
    results = {rate: Run(model, TASKS[0], method, rate, SEEDS[0]).result() for rate in LEARNING_RATES}
    if None in results.values():
        return None
    return max(LEARNING_RATES, key=lambda rate: (share(results[rate]["points"][-1]["validation"]), -rate))


def share(right: str) -> float:
    """Of questions that are right: a score is kept question by question, as a text of zeros and ones."""
    return right.count("1") / len(right)


def table_runs() -> Iterator[Run]:
    """The table: each method at its best learning rate, with every seed."""
    for seed in SEEDS:
        for model in MODELS:
            yield from at_best_rate(model, TASKS, COMPARED, seed)


def ablation_runs() -> Iterator[Run]:
    """Bitune without one of its parts; the whole is in the table and the curves."""
    for seed in SEEDS:
        for task, samples in ABLATED.items():
            yield from at_best_rate(CURVE_MODEL, [task], ABLATIONS, seed, samples)


def rival_runs() -> Iterator[Run]:
    """Rivals beside Bitune, where the table, the curves and the ablations have run for the others."""
    for seed in SEEDS:
        for task, samples in ABLATED.items():
            yield from at_best_rate(CURVE_MODEL, [task], RIVALS | WARMED_UP, seed, samples)
        yield from at_best_rate(CURVE_MODEL, [PATHS], ["LoRA r=8"], seed, ABLATED[PATHS])


def curve_runs() -> Iterator[Run]:
    """Score against the number of training samples."""
    for seed in SEEDS:
        yield from at_best_rate(CURVE_MODEL, [FAMILIES], CROSSING, seed, CURVE)
        for model in MODELS:
            samples = CURVE if model == CURVE_MODEL else LONG_CURVE
            yield from at_best_rate(model, [PATHS], CROSSING, seed, samples)
            yield from at_other_rates(model, PATHS, CROSSING, seed, samples)
        for task, samples in MOVED.items():
            yield from at_best_rate(CURVE_MODEL, [task], MOVERS, seed, samples)


def at_best_rate(
    model: str, tasks: Iterable[str], methods: Iterable[str], seed: int, samples: tuple[int, ...] = (SAMPLES,)
) -> Iterator[Run]:
    """Nothing for a method whose learning rate is not known yet."""
    for task in tasks:
        for method in methods:
            rate = best_rate(model, method)
            if rate is not None:
                yield Run(model, task, method, rate, seed, samples)


def at_other_rates(model: str, task: str, methods: Iterable[str], seed: int, samples: tuple[int, ...]) -> Iterator[Run]:
    """What the learning rate that was chosen, on another task, is to be compared with."""
    for one in at_best_rate(model, [task], methods, seed, samples):
        for rate in LEARNING_RATES:
            if rate != one.learning_rate:
                yield replace(one, learning_rate=rate)
