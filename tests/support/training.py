"""What the tests of `BituneSFTTrainer` share: datasets, trainers of tiny models, and what training must come to."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from bitune_plugin import BituneConfig, BituneSFTConfig, BituneSFTTrainer
from helpers import assert_close
from models import WORDS, randomise_adapters, tiny, word_tokenizer
from three_pass import ThreePass

gc.freeze()  # accelerate collects garbage after every training run, and would look through all that is imported

LORA = LoraConfig(r=4, target_modules="all-linear")

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool['function']['name'] }} {% endfor %}"
    "{% for m in messages %}{{ m['role'] }} "
    "{% if m['role'] == 'assistant' %}{% generation %}"
    "{% for call in m['tool_calls'] or [] %}{{ call['function']['name'] }} {% endfor %}"
    "{{ m['content'] or '' }} <eos>{% endgeneration %}"
    "{% else %}{{ m['content'] }} <eos>{% endif %}"
    " {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
"""A chat template that knows tools and marks what the assistant writes."""


def pairs(count: int = 24) -> list[dict[str, str]]:
    """Prompts of 2 to 12 words; the completion is their first words, reversed."""
    source = random.Random(0)
    prompts = [source.choices(WORDS, k=source.randint(2, 12)) for _ in range(count)]
    return [{"prompt": " ".join(p), "completion": " " + " ".join([*p[:4][::-1], "<eos>"])} for p in prompts]


def chat(count: int = 24) -> list[dict[str, list[dict[str, str]]]]:
    """The same as messages."""
    return [
        {
            "prompt": [{"role": "user", "content": pair["prompt"]}],
            "completion": [{"role": "assistant", "content": pair["completion"].removesuffix(" <eos>").strip()}],
        }
        for pair in pairs(count)
    ]


def conversation(*roles: str, seed: int = 0) -> list[dict[str, str]]:
    """Messages of these roles, of one to four words."""
    source = random.Random(seed)
    return [{"role": role, "content": " ".join(source.choices(WORDS, k=source.randint(1, 4)))} for role in roles]


def conversations(count: int = 8) -> list[dict[str, list[dict[str, str]]]]:
    """Of two turns each."""
    roles = ("system", "user", "assistant", "user", "assistant")
    return [{"messages": conversation(*roles, seed=seed)} for seed in range(count)]


SHORT_RUN = {
    "max_steps": 4,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}
"""Settings of a trainer's config."""


def build(folder: Path, cls: type = BituneSFTTrainer, **settings: Any) -> Any:
    """A trainer of a tiny model; keywords that a config knows go there, the others to the trainer."""
    config = BituneSFTConfig if cls is BituneSFTTrainer else SFTConfig
    fields = {name: settings.pop(name) for name in list(settings) if name in config.__dataclass_fields__}
    args = config(
        **{
            **SHORT_RUN,
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            **fields,
        }
    )
    defaults = {
        "model": None if "model" in settings else tiny(),
        "train_dataset": Dataset.from_list(pairs()),
        "processing_class": None if "processing_class" in settings else word_tokenizer(),
        "peft_config": BituneConfig(adapter=copy.deepcopy(LORA)),  # TRL writes into it
    }
    return cls(args=args, **{**defaults, **settings})


WITH_LOGITS = {} if SFTConfig.__dataclass_fields__["loss_type"].default == "nll" else {"loss_type": "nll"}
"""Settings of a run that needs the logits of all tokens. TRL 1.15 computes none unless it is told to."""


def losses(trainer: SFTTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def batch_of(trainer: SFTTrainer) -> dict[str, Tensor]:
    return next(iter(trainer.get_train_dataloader()))


Document = tuple[Tensor, Tensor, int]
"""Tokens `[T]`, labels `[T]`, and the length of the prompt."""


def documents(batch: dict[str, Tensor]) -> Iterator[Document]:
    """The documents of a batch, padded or flattened; without `prompt_mask` their leading -100 labels are the prompt."""
    attended = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    prompts = batch.get("prompt_mask")
    for row, kept in enumerate(attended):
        ids, labels = batch["input_ids"][row, kept], batch["labels"][row, kept]
        positions = batch["position_ids"][row] if "position_ids" in batch else torch.arange(len(ids))
        for start, stop in pairwise([*(positions == 0).nonzero().flatten().tolist(), len(ids)]):
            unread = (labels[start:stop] != -100).cumsum(0) == 0
            prompt = unread if prompts is None else prompts[row, kept][start:stop]
            yield ids[start:stop], labels[start:stop], int(prompt.sum())


def plain(batch: dict[str, Tensor]) -> list[tuple[list[int], int]]:
    """Tokens and prompt lengths of the documents of a batch, sorted."""
    return sorted((ids.tolist(), prompt) for ids, _, prompt in documents(batch))


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, reduction="sum")


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    """Under `label_smoothing_factor=0.1`."""
    return cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1)


def of_the_user(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """A `compute_loss_func`, which comes to `doubled`."""
    return 2 * nll(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) / num_items_in_batch


def doubled(logits: Tensor, labels: Tensor) -> Tensor:
    return 2 * nll(logits, labels)


TokenLoss = Callable[[Tensor, Tensor], Tensor]
"""Sum over the tokens that count, of logits `[T, vocabulary]` and labels `[T]`."""


def literal_logits(oracle: ThreePass, ids: Tensor, prompt_length: int) -> Tensor:
    """Logits of all tokens of a document, `[T, vocabulary]`; without a prompt it is read plainly causally."""
    answer = oracle(ids, max(prompt_length, 1))
    if prompt_length < 2:
        return answer
    encoded = ids[None, : prompt_length - 1]
    return torch.cat([oracle._run("causal", encoded, oracle._cache(), 0).logits[0], answer])


def oracle_of(trainer: SFTTrainer) -> ThreePass:
    oracle = ThreePass(tiny(), LORA)
    oracle.load_product(trainer.model)
    return oracle


def literal_loss(oracle: ThreePass, batches: Sequence[dict[str, Tensor]], token_loss: TokenLoss = nll) -> Tensor:
    """Mean loss by three passes, document by document."""
    total, count = torch.zeros(()), 0
    for batch in batches:
        for ids, labels, prompt_length in documents(batch):
            total = total + token_loss(literal_logits(oracle, ids, prompt_length)[:-1], labels[1:])
            count += int((labels[1:] != -100).sum())
    return total / count


def assert_exact(
    trainer: SFTTrainer, token_loss: TokenLoss = nll, oracle: ThreePass | None = None
) -> list[dict[str, Tensor]]:
    """Trains for one step, and compares its loss and gradients with those of three passes.

    Args:
        trainer: one with `**ONE_STEP`.
        token_loss: what its loss is to be.
        oracle: three passes of a model like the trainer's; with its weights by default.

    Returns:
        The batches that it was trained on.
    """
    randomise_adapters(trainer.model)
    if oracle is None:
        oracle = oracle_of(trainer)
    else:
        oracle.load_product(trainer.model)
    recorder = _Recorder(trainer, [theirs for _, theirs in oracle.pairs(trainer.model)])
    trainer.train()
    expected = literal_loss(oracle, recorder.batches, token_loss)
    expected.backward()
    assert losses(trainer) == pytest.approx([expected.item()], abs=1e-5)
    gradients = [
        (gradient, parameter.grad)
        for (parameter, _), gradient in zip(oracle.pairs(trainer.model), recorder.gradients, strict=True)
        if parameter.grad is not None
    ]
    assert len(gradients) > 20
    largest = max(expected.abs().max() for _, expected in gradients if expected.numel() == 1)
    for gradient, expected in gradients:  # those of theta are sums of large numbers that cancel out
        assert_close(gradient, expected, tolerance=1e-5 * max(1, largest if expected.numel() == 1 else 1))
    return recorder.batches


ONE_STEP = {"max_steps": 1, "max_grad_norm": 0.0}
"""Settings for `assert_exact`: gradients are not clipped."""


class _Recorder(TrainerCallback):
    """Keeps the batches of a training run, and its last gradients in the order of `parameters`."""

    def __init__(self, trainer: SFTTrainer, parameters: Sequence[Tensor]) -> None:
        self.batches: list[dict[str, Tensor]] = []
        self.gradients: list[Tensor] = []
        self.parameters = parameters
        compute_loss = trainer.compute_loss

        def recording(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.batches.append(dict(inputs))
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = recording
        trainer.add_callback(self)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.gradients = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
