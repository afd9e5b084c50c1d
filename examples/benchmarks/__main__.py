"""Runs one of the benchmarks beside this file, by the name of its module.

python examples/benchmarks train_step --shapes 128x64 --rounds 3
python examples/benchmarks train_step --help
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

NAMES = ("train_step", "ragged", "lengths", "authors", "generate", "chat", "lm_eval", "serve")

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    # In place of this folder, whose `lm_eval.py` Python would import instead of lm-eval.
    sys.path[:1] = [str(ROOT / "examples"), str(ROOT / "tests" / "support")]
    name = "".join(sys.argv[1:2])
    if name not in NAMES:
        sys.exit(f"Name a benchmark, one of: {', '.join(NAMES)}.")
    measuring = import_module("benchmarks.measuring")
    measuring.run_benchmark(name, import_module(f"benchmarks.{name}").BENCHMARK, sys.argv[2:])


if __name__ == "__main__":
    main()
