"""`bitune convert`: a folder that the reference implementation saved as a Bitune adapter."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bitune_plugin.checkpoints.authors import convert
from bitune_plugin.checkpoints.saved import local_folder
from bitune_plugin.checkpoints.writing import write_adapter
from bitune_plugin.cli.terminal import busy, parser, say
from bitune_plugin.core.masks import SECOND_PASSES
from bitune_plugin.core.turns import MULTI_TURN
from bitune_plugin.saved_format.settings import NO_MIXING
from bitune_plugin.tuner.config import SETTINGS

DESCRIPTION = """\
Reads an adapter that the code of the paper's authors saved, its folder `prefill` included, and writes it as a Bitune
adapter, which `PeftModel.from_pretrained` loads. The answers stay the same.

What the folder tells (in the authors' `config.json`, and by what weights there are) need not be said. The rest is as in
the paper, or as the options say. An option that contradicts the folder is an error.
"""

EXAMPLES = """\
  bitune convert authors-folder adapter
  bitune convert authors-folder adapter --mixing relu               the simplified mixing (the authors' type 801)
  bitune convert authors-folder adapter --second-pass-attention causal      their ablation 1
"""


def main(argv: Sequence[str]) -> None:
    options = vars(_parser().parse_args(argv))
    source, destination, force = (options.pop(name) for name in ("source", "destination", "force"))
    folder = local_folder(source)
    with busy(f"Converting {source}"):
        config, weights = convert(folder, {name: value for name, value in options.items() if value is not None})
        write_adapter(destination, config, weights, folder, force)
    say(f"{destination}: " + " ".join(f"{name}={getattr(config, name)}" for name in SETTINGS))


def _parser() -> argparse.ArgumentParser:
    arguments = parser("convert", DESCRIPTION, EXAMPLES)
    arguments.add_argument("source", metavar="SRC", help="folder saved by the reference implementation, or hub id")
    arguments.add_argument("destination", metavar="DST", type=Path, help="folder to write, empty or not there yet")
    arguments.add_argument("--force", action="store_true", help="replace the adapter folder DST and all that is in it")
    settings = arguments.add_argument_group("settings it was trained with, where the folder does not tell")
    settings.add_argument("--theta-init", type=float, metavar="NUMBER", help="start of theta (the paper's: 0.01)")
    settings.add_argument("--mixing", choices=("abs", "relu", NO_MIXING), help="from theta to alpha (the paper's: abs)")
    settings.add_argument(
        "--second-pass-attention",
        choices=SECOND_PASSES,
        help="of the second pass (the paper's: bidirectional)",
    )
    settings.add_argument(
        "--multi-turn", choices=MULTI_TURN, help="how conversations are read (default: reread, all of it every time)"
    )
    settings.add_argument(
        "--share-adapter",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="both streams use the causal adapter (without the option: if `prefill` was never trained)",
    )
    return arguments
