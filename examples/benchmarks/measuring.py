"""What the benchmarks share: contenders run in one process, in turn; peak memory is that of a process of its own."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig
from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks.report import Result, draw, table
from pretrained import load_model

MIB = 2**20

# glibc hands large blocks back to the kernel at every free, and page faults then drown what is to be measured.
FAST_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "68719476736"}
# Where memory is measured it is to do just that, or what was freed counts too.
EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}

Run = Callable[[], object]
"""What is measured: a training step, a batch of questions, a prompt."""


@dataclass(frozen=True)
class Benchmark:
    """What there is to measure.

    Attributes:
        parser: the arguments that it takes.
        measure: the results of all contenders for a model and a shape.
        make_run: for a model, a shape and a contender, a run to take the memory of.
    """

    parser: Callable[[], argparse.ArgumentParser]
    measure: Callable[[argparse.Namespace, str, str], list[Result]]
    make_run: Callable[[argparse.Namespace, str, str, str], Run] | None = None


def parser_for(
    description: str, shapes: Sequence[str], shape_help: str, contenders: Sequence[str], rounds: int
) -> argparse.ArgumentParser:
    """The arguments that all benchmarks take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["gemma-3-270m", "smollm2-135m"], help="names, hub ids or paths")
    parser.add_argument("--shapes", nargs="+", default=list(shapes), help=shape_help)
    parser.add_argument("--contenders", nargs="+", choices=contenders, default=list(contenders))
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds that count")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen weights")
    parser.add_argument("--json", type=Path, help="write the results here after each shape, and the plots beside them")
    parser.add_argument("--resume", action="store_true", help="keep what is in the JSON file, measure only the rest")
    parser.add_argument("--plots", type=Path, help="folder for the plots, if not that of the JSON file")
    parser.add_argument("--only-memory", choices=contenders, help=argparse.SUPPRESS)
    return parser


def run_benchmark(name: str, benchmark: Benchmark, argv: Sequence[str]) -> None:
    """Measures every model and shape, prints the table and draws the plots; or, in a process started for that, prints
    the memory of one contender.

    Args:
        name: of its module, and of its entry in `report.py`.
        argv: its own arguments.
    """
    arguments = benchmark.parser().parse_args(argv)
    if arguments.only_memory:
        contender = arguments.only_memory
        make_run = partial(benchmark.make_run, arguments, arguments.models[0], arguments.shapes[0], contender)
        print(json.dumps(_own_memory(make_run, torch.device(arguments.device))))
        return
    restart_with_fast_malloc()
    results: list[Result] = json.loads(arguments.json.read_text()) if _resumes(arguments) else []
    same = [r for r in results if (r["device"], r["dtype"]) == (arguments.device, arguments.dtype)]
    done = {(result["model"], result["shape"]) for result in same}
    for model in arguments.models:
        for shape in arguments.shapes:
            if (model, shape) not in done:
                results += benchmark.measure(arguments, model, shape)
                write_json(arguments.json, results)  # after each shape: it takes long, and may be stopped
    print(f"\n{table(name, results)}")
    folder = arguments.plots or (arguments.json and arguments.json.parent)
    if folder:
        draw(name, results, folder / (arguments.json.stem if arguments.json else name))


def restart_with_fast_malloc() -> None:
    """Starts the script again with the environment that it needs. glibc reads it when a process begins."""
    if not FAST_MALLOC.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **FAST_MALLOC})


def load(arguments: argparse.Namespace, model: str) -> PreTrainedModel:
    return load_model(model).to(arguments.device, getattr(torch, arguments.dtype))


def lora_config() -> LoraConfig:
    """The adapter of every contender: rank 8 on all linear layers."""
    return LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")


def described(arguments: argparse.Namespace, model: str, shape: str, contender: str) -> Result:
    """What was measured: the first entries of a result."""
    names = {"model": model, "shape": shape, "contender": contender}
    return {**names, "device": arguments.device, "dtype": arguments.dtype}


def time_contenders(
    arguments: argparse.Namespace,
    model: str,
    shape: str,
    make_run: Callable[[argparse.Namespace, str, str, str], Run],
) -> dict[str, list[float]]:
    """`time_in_turn` for the contenders asked for. Their models are freed before it returns, for what measures memory
    afterwards."""
    runs = {contender: make_run(arguments, model, shape, contender) for contender in arguments.contenders}
    return time_in_turn(runs, arguments.rounds, f"{model} {shape}", torch.device(arguments.device))


def time_in_turn(runs: dict[str, Run], rounds: int, label: str, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after one round to warm up; every round runs all contenders."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.freeze()  # what is there by now need not be looked through again each time
    for turn in tqdm(range(rounds + 1), desc=label):
        for name, run in runs.items():
            gc.collect()
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    gc.unfreeze()
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    return {"seconds": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds)}


def ratio(seconds: dict[str, list[float]], contender: str, reference: str) -> float | None:
    """Median over the rounds of what one contender took to what another took in the same round, if both took part."""
    if reference not in seconds or contender not in seconds:
        return None
    return statistics.median(a / b for a, b in zip(seconds[contender], seconds[reference], strict=True))


def memory_in_own_process(model: str, shape: str, contender: str) -> dict[str, float]:
    """Peak memory in MiB, of this script with the same arguments: `activations`, what a run adds to what was there
    before it, and `total`, with the model, the adapter and the optimizer's states."""
    command = [sys.executable, *sys.argv, "--models", model, "--shapes", shape, "--only-memory", contender]
    environment = {**os.environ, **EXACT_MALLOC}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def _own_memory(make_run: Callable[[], Run], device: torch.device) -> dict[str, float]:
    if device.type == "cuda":
        torch.cuda.init()
    empty = _held(device)
    run = make_run()
    run()  # what is made once is no activation: optimizer states, weights that are read from their file when needed
    _give_back_what_is_free()
    before = _held(device)
    _start_peak(device)
    run()
    peak = _peak(device)
    return {"activations": peak - before, "total": peak - empty}


def _give_back_what_is_free() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _held(device: torch.device) -> float:
    return torch.cuda.memory_allocated() / MIB if device.type == "cuda" else _status_of_this_process("VmRSS")


def _start_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again from here


def _peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / MIB if device.type == "cuda" else _status_of_this_process("VmHWM")


def write_json(path: Path | None, results: list[Result]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n")


def _resumes(arguments: argparse.Namespace) -> bool:
    return arguments.resume and arguments.json is not None and arguments.json.exists()


def _status_of_this_process(field: str) -> float:
    """A field of `/proc/self/status` that counts memory, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024
