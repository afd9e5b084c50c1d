"""Tables of the results, one for each section."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.report import Cell, Result, markdown, number, spread, text

CASE = {"model": text("model"), "case": text("shape"), "": text("contender")}


def _failure(result: Result) -> str:
    return str(result["failure"]) if result.get("failure") else ""


def _against_target(name: str, digits: int) -> Cell:
    """A number, and whether it is within its target."""

    def cell(result: Result) -> str:
        value, target = result.get(name), result.get("target")
        if value is None or target is None:
            return number(name, digits)(result)
        verdict = "within" if value <= target else "over"
        return f"{value:.{digits}f} ({verdict} {target:g})"

    return cell


def _unless_failed(cell: Cell) -> Cell:
    return lambda result: "" if result.get("failure") else cell(result)


def _error(kind: str) -> Cell:
    def cell(result: Result) -> str:
        floor = result.get("floor")
        return f"{result['errors'][kind]:.1e}" + (f" (floor {floor[kind]:.1e})" if floor else "")

    return cell


def _share(kind: str) -> Cell:
    return lambda result: f"{result['shares'][kind]:.0%}"


MILLISECONDS: Callable[[Result], str] = lambda result: spread(result, 1, 1000)  # noqa: E731

TABLES: dict[str, dict[str, Cell]] = {
    "exactness": {kind: _error(kind) for kind in ("logits", "adapters", "theta")}
    | {"exact": lambda result: "yes" if result["exact"] else "NO"},
    "training": {
        "ms (min-max)": MILLISECONDS,
        "rounds": number("rounds", 0),
        "to LoRA": number("ratio"),
        "tokens": number("tokens"),
        "over": _against_target("over", 2),
        "activations MiB": number("activations", 0),
        "to LoRA ": number("activations_ratio"),
        "with weights": number("with_weights_ratio"),
    },
    "prefill": {"ms (min-max)": MILLISECONDS, "rounds": number("rounds", 0), "to LoRA": _against_target("ratio", 2)},
    "decoding": {
        "ms per token (min-max)": MILLISECONDS,
        "rounds": number("rounds", 0),
        "compiled": lambda result: "yes" if result["compiled"] else "no",
        "to LoRA": _against_target("ratio", 3),
    },
    "profile": {
        "ms": lambda result: f"{result['seconds'] * 1000:.1f}",
        **{kind: _share(kind) for kind in ("matmul", "attention", "copies", "other")},
        "kernels": number("kernels", 0),
        "busy": number("busy"),
    },
}
"""Columns of each section, beside those of `CASE` and the reason of a failure."""


def tables(results: Sequence[Result]) -> str:
    """All of them, in Markdown, those left out that have no results."""
    parts = []
    for section, columns in TABLES.items():
        own = [result for result in results if result["section"] == section]
        cells = CASE | {name: _unless_failed(cell) for name, cell in columns.items()} | {"failure": _failure}
        if own:
            rows = [[cell(result) for cell in cells.values()] for result in own]
            # A space tells two columns of one name apart.
            parts.append(f"## {section}\n\n{markdown([name.strip() for name in cells], rows)}")
    return "\n\n".join(parts)
