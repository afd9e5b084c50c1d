"""A script for `accelerate launch`: trains tiny models, one after another, in however many processes it was started in.

    accelerate launch --config_file examples/accelerate/ddp_cpu.yaml tests/support/processes.py PLAN FOLDER

PLAN is a JSON file, settings of runs by name. The main process writes what came of them to `FOLDER/results.json`, up to
the first that failed, and the adapter of each run lies in a folder of its name.
"""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from torch.distributed.fsdp import _init_utils
from torch.distributed.tensor import DTensor
from trl import SFTConfig, SFTTrainer

from bitune_plugin import BituneConfig, BituneSFTConfig, BituneSFTTrainer
from bitune_plugin.tuner.mixing_layer import Thetas
from models import WORDS, tiny, word_tokenizer
from training import SHORT_RUN

ROWS = 4
"""Rows in a batch of all processes together."""


def rows(count: int = 24, short_for: int | None = None) -> list[dict[str, str]]:
    """Prompts of 2 to 12 words; the completion is their first words, reversed.

    Args:
        short_for: of every batch in order, the prompts that this one of two processes gets have a single word.
    """
    source = random.Random(0)
    prompts = [source.choices(WORDS, k=source.randint(2, 12)) for _ in range(count)]
    if short_for is not None:
        prompts = [p[:1] if i // (ROWS // 2) % 2 == short_for else p for i, p in enumerate(prompts)]
    return [{"prompt": " ".join(p), "completion": " " + " ".join([*p[:4][::-1], "<eos>"])} for p in prompts]


def train(folder: Path, processes: int, **run: Any) -> dict[str, Any]:
    """Trains and saves one adapter, with a batch of `ROWS` rows over all processes.

    Args:
        run: settings of the trainer's config, and of this script: `stock` for TRL's own trainer, `dtype` of the model,
            `short_for` of `rows`, `resume` from a checkpoint, `saves` for the adapter in `folder`.

    Returns:
        What the trainer logged at each step, logits of the trained model, theta in each process, and the data types
        in which theta was used.
    """
    stock, dtype, resume = run.pop("stock", False), run.pop("dtype", "float32"), run.pop("resume", None)
    saves = run.pop("saves", True)
    data = Dataset.from_list(rows(short_for=run.pop("short_for", None)))
    settings = {
        **SHORT_RUN,
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": ROWS // processes,
        "gradient_checkpointing": False,
        **run,
    }
    trainer = (SFTTrainer if stock else BituneSFTTrainer)(
        model=tiny().to(getattr(torch, dtype)),
        args=(SFTConfig if stock else BituneSFTConfig)(**settings),
        train_dataset=data,
        processing_class=word_tokenizer(),
        peft_config=BituneConfig(adapter=LoraConfig(r=4, target_modules="all-linear")),
    )
    used: set[str] = set()
    for module in trainer.model.modules():
        if isinstance(module, Thetas):
            module.register_forward_hook(lambda module, args, theta: used.add(str(theta.dtype)))
    trainer.train(resume_from_checkpoint=resume)
    if saves:
        trainer.save_model(str(folder))
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "processes": trainer.accelerator.num_processes,
        "kind": trainer.accelerator.distributed_type.value,
        "samples": len(trainer.train_dataset),
        "losses": [entry["loss"] for entry in history],
        "norms": [float(entry["grad_norm"]) for entry in history],
        "alphas": [entry.get("alpha_value_mean") for entry in history],
        "logits": logits(trainer.model_wrapped).tolist() if saves else None,
        "thetas": gather_object([thetas(trainer.model)]),
        "theta dtypes": sorted(used),
    }


def logits(model: nn.Module) -> torch.Tensor:
    """Of the last of a few tokens, behind a prompt: float32 `[vocabulary]`."""
    tokens = torch.arange(5, 15)[None]
    with torch.no_grad():
        return model.eval()(input_ids=tokens, prompt_mask=tokens < 12).logits[0, -1].float()


def thetas(model: nn.Module) -> list[float]:
    """What this process has of them."""
    local = [p.to_local() if isinstance(p, DTensor) else p for name, p in model.named_parameters() if "theta_" in name]
    return [value for theta in local for value in theta.tolist()]


@contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    """What differs from the config that accelerate was launched with."""
    before = dict(os.environ)
    os.environ.update(changes)
    AcceleratorState._reset_state()
    GradientState._reset_state()
    yield
    os.environ.clear()
    os.environ.update(before)


def take_fsdp_on_cpu() -> None:
    """accelerate 1.15 takes several processes on a CPU for DDP, whatever its config says (`AcceleratorState`). torch
    can do FSDP2 there, so accelerate is told that its processes are of another kind, once each has the CPU."""
    initialise = AcceleratorState.__init__

    def as_if_on_gpus(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        state = PartialState(cpu=True)._shared_state
        if state["distributed_type"] is DistributedType.MULTI_CPU:
            state["distributed_type"] = DistributedType.MULTI_GPU
        initialise(self, *args, **kwargs)

    AcceleratorState.__init__ = as_if_on_gpus
    # FSDP1 takes the device that accelerate names, "cpu", for "cpu:0", and that for another than the parameters'.
    _init_utils._get_device_from_device_id = lambda *_: None


def main(plan: str, folder: str) -> None:
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        take_fsdp_on_cpu()
    # The timeout ends the waiting of a process whose gradients another has none of.
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=30))
    results = {}
    for name, run in json.loads(Path(plan).read_text()).items():
        with environment(run.pop("environment", {})):
            results[name] = train(Path(folder, name), int(os.environ["WORLD_SIZE"]), **run)
        if os.environ["RANK"] == "0":
            Path(folder, "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception:
        traceback.print_exc()
        os._exit(1)  # at once, for the other process may be waiting for this one
