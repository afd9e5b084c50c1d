"""`bitune export`: one stream of a Bitune adapter as a plain PEFT adapter."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bitune_plugin.checkpoints.saved import SavedAdapter, local_folder
from bitune_plugin.checkpoints.writing import write_adapter
from bitune_plugin.cli.terminal import busy, parser, say

DESCRIPTION = """\
Writes one stream of a Bitune adapter as an adapter of its inner method (LoRA, IA3, ...), for programs that know PEFT
but not Bitune. The coefficients of the mixing stay behind: such an adapter reads prompts in one way only, so that its
answers are not those of the Bitune adapter. The base model is not loaded.

Fully trained modules serve both streams and go into either; so do tokenizer files beside the adapter.
"""

EXAMPLES = """\
  bitune export adapter plain --stream causal
  bitune export out/checkpoint-100 second --stream bidirectional
"""


def main(argv: Sequence[str]) -> None:
    options = _parser().parse_args(argv)
    adapter = SavedAdapter.read(local_folder(options.adapter))
    config, weights = adapter.plain(options.stream)
    with busy(f"Writing {options.destination}"):
        write_adapter(options.destination, config, weights, adapter.folder, options.force)
    say(f"The {options.stream} stream of {options.adapter} is in {options.destination}, a {adapter.method} adapter.")


def _parser() -> argparse.ArgumentParser:
    arguments = parser("export", DESCRIPTION, EXAMPLES)
    arguments.add_argument("adapter", metavar="ADAPTER", help="folder of a Bitune adapter, or hub id")
    arguments.add_argument("destination", metavar="DST", type=Path, help="folder to write, empty or not there yet")
    arguments.add_argument("--stream", choices=("causal", "bidirectional"), required=True, help="which adapter to take")
    arguments.add_argument("--force", action="store_true", help="replace the adapter folder DST and all that is in it")
    return arguments
