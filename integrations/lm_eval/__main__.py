"""Prints the folder of Bitune's tasks: `lm_eval --include_path "$(python -m bitune_plugin.integrations.lm_eval)"`."""

from . import TASKS

print(TASKS)
