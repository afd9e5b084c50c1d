"""What the benchmarks share: contenders run in one process, in turn; peak memory is that of a process of its own."""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from tqdm import tqdm

MIB = 2**20

# glibc hands large blocks back to the kernel at every free, and page faults then drown what is to be measured.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "68719476736"}


def restart_with_malloc_settings() -> None:
    """Starts the script again with the environment that it needs. glibc reads it when a process begins."""
    if not MALLOC.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})


def parser_for(description: str, contenders: Sequence[str], rounds: int) -> argparse.ArgumentParser:
    """The arguments that all benchmarks take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["gemma-3-270m", "smollm2-135m"], help="names, hub ids or paths")
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds that count")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--only-memory", choices=contenders, help=argparse.SUPPRESS)
    return parser


def run_benchmark(
    arguments: argparse.Namespace,
    measure: Callable[[argparse.Namespace, str, str], list[dict[str, object]]],
    print_table: Callable[[list[dict[str, object]]], None],
    print_own_peak_memory: Callable[[argparse.Namespace], None],
) -> None:
    """Measures every model and shape; or, in a process started for that, one contender's memory."""
    restart_with_malloc_settings()
    if arguments.only_memory:
        print_own_peak_memory(arguments)
        return
    results: list[dict[str, object]] = []
    for model in arguments.models:
        for shape in arguments.shapes:
            results += measure(arguments, model, shape)
            write_json(arguments.json, results)  # after each shape: it takes long, and may be stopped
    print_table(results)


def lora_config() -> LoraConfig:
    """The adapter of every contender: rank 8 on all linear layers."""
    return LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")


def time_in_turn(
    runs: dict[str, Callable[[], object]], rounds: int, label: str, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after one round to warm up; every round runs all contenders."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in tqdm(range(rounds + 1), desc=label):
        for name, run in runs.items():
            gc.collect()
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    return {"seconds": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds)}


def ratio(seconds: list[float], reference: list[float]) -> float:
    """Median over the rounds of what one contender took to what the other took in the same round."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


def in_own_process(script: str, *arguments: str) -> float:
    """The number that a script prints last."""
    command = [sys.executable, script, *arguments]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def peak_memory_of(run: Callable[[], object], device: torch.device) -> float:
    """MiB that a run adds to this process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / MIB
        run()
        return torch.cuda.max_memory_allocated() / MIB - before
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again from here
    before = _status_of_this_process("VmRSS")
    run()
    return _status_of_this_process("VmHWM") - before


def write_json(path: Path | None, results: list[dict[str, object]]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n")


def _status_of_this_process(field: str) -> float:
    """A field of `/proc/self/status` that counts memory, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024
