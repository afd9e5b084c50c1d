"""lm-eval's model `bitune`: `lm_eval --model bitune --model_args pretrained=...,peft=...`.

`model.py` loads that model, from what `adapter.py` finds and `arguments.py` checks. `batches.py` scores requests and
generates; `scoring.py` makes rows of requests, and scores of logits. `tasks/` has the multiple-choice tasks of the
paper; `python -m bitune_plugin.integrations.lm_eval` prints their folder, for `--include_path`.

The harness finds both through the entry points `lm_eval.models` and `lm_eval.tasks`; 0.4.13 does not look for them, so
`bitune_autoload` enters the model.
"""

from __future__ import annotations

from pathlib import Path

TASKS = Path(__file__).parent / "tasks"
"""Folder of the task files."""
