"""What the benchmarks share: contenders run in one process, in turn; peak memory is that of a process of its own."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
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
