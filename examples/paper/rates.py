"""Chooses a learning rate as the paper does: on plain LoRA, to be used again for Bitune.

    python examples/paper/rates.py --config examples/paper/gsm8k.yaml --model_name_or_path google/gemma-2b \
        --output_dir outputs/gsm8k

Takes the settings of `bitune sft`, and trains their adapter without Bitune, once for each rate. The best rate is that
with the lowest loss on the last samples, which are held out. Prints the command that trains Bitune with it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTTrainer, get_quantization_config

from bitune_plugin import FullConfig
from bitune_plugin.cli.sft import load, model_init_kwargs, split
from bitune_plugin.cli.sft_settings import Settings, read_settings

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
"""The paper's grid."""


def main(argv: list[str]) -> dict[float, float]:
    """Returns the held-out loss of every rate.

    Raises:
        ValueError: settings or a dataset that do not fit.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates to try")
    parser.add_argument("--held_out", type=int, default=1000, help="samples to evaluate on, the last ones")
    own, others = parser.parse_known_args(argv)
    settings = read_settings(others)
    learnt, held_out = parted(fitting(samples_of(settings), settings), own.held_out)
    losses = {rate: loss_of(rate, settings, learnt, held_out) for rate in sorted(own.rates)}
    folder = Path(settings.training.output_dir + "-rates")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rates.json").write_text(json.dumps(losses, indent=2))
    print("\n".join(report(losses, others)))
    return losses


def samples_of(settings: Settings) -> Dataset:
    """All training samples. Raises ValueError for a stream, of which nothing can be held out."""
    samples = split(load(settings.script, settings.mixture), "dataset_train_split", settings)
    if not isinstance(samples, Dataset):
        raise ValueError("`dataset_streaming=True`: no samples can be held out of a stream. Leave it out.")
    return samples


def fitting(samples: Dataset, settings: Settings) -> Dataset:
    """The samples that `bitune sft` would learn under `drop_overlong`, which is not a setting of TRL."""
    training = settings.training
    if not training.drop_overlong:
        return samples
    if {"prompt", "completion"} - {*samples.column_names} or not isinstance(samples[0]["prompt"], str):
        raise ValueError(
            "`drop_overlong=True` needs columns 'prompt' and 'completion' of text here. Set `prompt_template` and "
            "`completion_template`, or leave it out."
        )
    init = model_init_kwargs(settings)
    of_files = {name: init[name] for name in ("revision", "trust_remote_code")}
    tokenizer: Any = AutoTokenizer.from_pretrained(settings.model.model_name_or_path, **of_files)

    def fits(sample: dict[str, str]) -> bool:
        tokens = tokenizer(sample["prompt"] + sample["completion"])["input_ids"]
        return len(tokens) + 1 <= training.max_length  # TRL puts the end-of-sequence token behind them

    return samples.filter(fits)


def parted(samples: Dataset, held_out: int) -> tuple[Dataset, Dataset]:
    """The samples to learn, and those that are held out. Raises ValueError if one of them would be empty."""
    if not 0 < held_out < len(samples):
        raise ValueError(
            f"`held_out={held_out}` of {len(samples)} samples leaves none to learn or none to evaluate on. Set it "
            "between the two."
        )
    first = len(samples) - held_out
    return samples.select(range(first)), samples.select(range(first, len(samples)))


def loss_of(rate: float, settings: Settings, learnt: Dataset, held_out: Dataset) -> float:
    """The loss of the held-out completions after training at a rate."""
    training, inner = copy.copy(settings.training), settings.bitune.inner
    training.learning_rate, training.output_dir = rate, f"{training.output_dir}-rates/{rate:g}"
    training.eval_strategy = training.save_strategy = "no"
    training.model_init_kwargs = model_init_kwargs(settings)
    trainer = SFTTrainer(
        model=settings.model.model_name_or_path,
        args=training,
        train_dataset=learnt,
        eval_dataset=held_out,
        quantization_config=get_quantization_config(settings.model),
        peft_config=None if isinstance(inner, FullConfig) else copy.deepcopy(inner),
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    return loss if math.isfinite(loss) else math.inf


def report(losses: dict[float, float], argv: Sequence[str]) -> list[str]:
    """A table of the losses, and the command that trains Bitune at the best rate; a warning if it is at the edge.

    Raises:
        ValueError: no training came to a finite loss.
    """
    best = min(losses, key=lambda rate: losses[rate])
    if losses[best] == math.inf:
        raise ValueError("No rate came to a finite loss. Try lower ones: `--rates`.")
    lines = ["", "| learning rate | held-out loss |", "|---|---|"]
    lines += [f"| {rate:g} | {loss:.4f}{' (best)' if rate == best else ''} |" for rate, loss in losses.items()]
    for edge, word, beyond in ((min(losses), "lowest", best * 0.3), (max(losses), "highest", best * 3)):
        if best == edge:
            lines += ["", f"Warning: the best rate is the {word} one; a better one may lie beyond. Try {beyond:g} too."]
    return [*lines, "", shlex.join(["bitune", "sft", *argv, "--learning_rate", f"{best:g}"])]


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
