"""How many samples per second Bitune trains on, against the authors' algorithm.

    python examples/benchmarks authors --models gemma-3-270m smollm2-135m --shapes 128x64 --rows 1 2 4 8

The authors' code runs the model three times for each sample, one sample at a time, whatever the batch size. Here it is
`three-pass`, on the same stack as the product: same libraries, same attention, same optimizer. It takes a step of one
sample; more of them between two optimizer steps take as long each. Bitune takes steps of each of the batch sizes, the
fastest of which is its best. All in one process, in turn, float32; a shape `TxP` is a row of T tokens whose first P
are prompt. `ratio` is Bitune's samples per second to the authors'.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks import training
from benchmarks.measuring import (
    Benchmark,
    Run,
    described,
    load,
    parser_for,
    ratio,
    summary,
    time_in_turn,
)
from benchmarks.report import Result

CONTENDERS = ("three-pass", "bitune")


def make_run(arguments: argparse.Namespace, model: str, shape: str, contender: str, rows: int) -> Run:
    base = load(arguments, model)
    documents = training.random_documents(base, rows, *map(int, shape.split("x")))
    return training.make_run(contender, base, [documents])


def measure(arguments: argparse.Namespace, model: str, shape: str) -> list[Result]:
    rows = {"three-pass": 1} | {f"bitune, batch of {rows}": rows for rows in arguments.rows}
    runs = {name: make_run(arguments, model, shape, name.partition(",")[0], rows[name]) for name in rows}
    seconds = time_in_turn(runs, arguments.rounds, f"{model} {shape}", torch.device(arguments.device))
    per_sample = {name: [s / rows[name] for s in seconds[name]] for name in rows}
    results = [
        {
            **described(arguments, model, shape, name),
            "rows": rows[name],
            **summary(per_sample[name]),
            "samples_per_second": 1 / summary(per_sample[name])["seconds"],
            "ratio": ratio(per_sample, "three-pass", name),
        }
        for name in rows
    ]
    best = max(results[1:], key=lambda result: result["samples_per_second"])
    return [{**result, "best": result is best} for result in results]


def parser() -> argparse.ArgumentParser:
    arguments = parser_for(__doc__, ("128x64",), "TxP, tokens and prompt", CONTENDERS, rounds=3)
    arguments.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8], help="batch sizes for Bitune")
    return arguments


BENCHMARK = Benchmark(parser, measure)
