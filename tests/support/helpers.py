"""What several test files need: models with Bitune beside their oracle, and batches of samples."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from bitune_plugin import BituneConfig
from models import randomise_adapters, tiny
from three_pass import ThreePass

Sample = tuple[Tensor, int]
"""Tokens `[T]`, and the length of the prompt."""


def lora(**changes: object) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **changes})


def bitune(base: nn.Module | str = "llama", adapter: PeftConfig | None = None, **settings: object) -> PeftModel:
    """A tiny model with a Bitune adapter whose weights show."""
    base = tiny(base) if isinstance(base, str) else base
    model = get_peft_model(base, BituneConfig(adapter=adapter or lora(), **settings)).eval()
    randomise_adapters(model)
    return model


def with_oracle(
    base: nn.Module | str = "llama", adapter: PeftConfig | None = None, **settings: object
) -> tuple[PeftModel, ThreePass]:
    """A model with Bitune, and the three literal passes with the same weights."""
    base = tiny(base) if isinstance(base, str) else base
    names = {"mixing_granularity": "granularity"}
    heads = 1
    if settings.get("mixing_granularity") == "head":
        heads = getattr(base.config, "num_key_value_heads", None) or base.config.num_attention_heads
    oracle = ThreePass(base, adapter or lora(), heads=heads, **{names.get(k, k): v for k, v in settings.items()})
    model = bitune(base, adapter, **settings)
    oracle.load_product(model)
    return model, oracle.eval()


def tokens(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(seed))


def samples(*shapes: tuple[int, int]) -> list[Sample]:
    """Random samples of the given (tokens, prompt length)."""
    return [(tokens(length, seed), prompt) for seed, (length, prompt) in enumerate(shapes)]


SHAPES = ((13, 8), (9, 9), (7, 1), (10, 2), (11, 6))
"""Unequal; among them an empty completion and a prompt of one token."""


@dataclass(frozen=True)
class Batch:
    """Samples in rows of one length, padded on one side."""

    input_ids: Tensor
    attention_mask: Tensor
    prompt_mask: Tensor
    starts: list[int]
    samples: list[Sample]

    @property
    def labels(self) -> Tensor:
        return self.input_ids.masked_fill(self.prompt_mask | ~self.attention_mask.bool(), -100)

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "prompt_mask": self.prompt_mask}

    def answers(self, logits: Iterable[Tensor]) -> list[Tensor]:
        """Logits of positions `P-1 .. T-1` of each sample."""
        return [
            row[start + prompt - 1 : start + len(ids)]
            for row, start, (ids, prompt) in zip(logits, self.starts, self.samples, strict=True)
        ]


def batch(rows: Sequence[Sample], side: str = "right") -> Batch:
    length = max(len(ids) for ids, _ in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    prompt_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    starts = [0 if side == "right" else length - len(ids) for ids, _ in rows]
    for row, (start, (ids, prompt)) in enumerate(zip(starts, rows, strict=True)):
        input_ids[row, start : start + len(ids)] = ids
        attention_mask[row, start : start + len(ids)] = 1
        prompt_mask[row, start : start + prompt] = True
    return Batch(input_ids, attention_mask, prompt_mask, starts, list(rows))


@dataclass(frozen=True)
class Packed(Batch):
    """Samples one behind the other in a few rows; their positions start again with each."""

    position_ids: Tensor
    rows: list[int]

    @property
    def inputs(self) -> dict[str, Tensor]:
        padding = {} if self.attention_mask.all() else {"attention_mask": self.attention_mask}
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "prompt_mask": self.prompt_mask,
            **padding,
        }

    def answers(self, logits: Tensor) -> list[Tensor]:
        return super().answers([logits[row] for row in self.rows])


def packed(documents: Sequence[Sample], rows: int = 1) -> Packed:
    """Puts every `rows`-th document into the same row; padded on the right where rows come out unequal."""
    in_rows = [batch_row(documents[row::rows]) for row in range(rows)]
    whole = batch([(ids, 0) for ids, _, _ in in_rows])
    prompt_mask, position_ids = torch.zeros_like(whole.prompt_mask), torch.zeros_like(whole.input_ids)
    for row, (ids, prompt, positions) in enumerate(in_rows):
        prompt_mask[row, : len(ids)], position_ids[row, : len(ids)] = prompt, positions
    row_of = [number % rows for number in range(len(documents))]
    starts = [sum(len(ids) for ids, _ in documents[number % rows : number : rows]) for number in range(len(documents))]
    return Packed(whole.input_ids, whole.attention_mask, prompt_mask, starts, list(documents), position_ids, row_of)


def batch_row(documents: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, prompt mask and positions of documents one behind the other."""
    places = [torch.arange(len(ids)) for ids, _ in documents]
    prompts = [place < prompt for place, (_, prompt) in zip(places, documents, strict=True)]
    return torch.cat([ids for ids, _ in documents]), torch.cat(prompts), torch.cat(places)


def one(ids: Tensor, prompt: int) -> dict[str, Tensor]:
    """Inputs of the model for one sample alone."""
    return batch([(ids, prompt)]).inputs


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def unharmed(model: nn.Module) -> Iterator[None]:
    """Fails if the block changes anything about `model` that its owner could see."""
    before = observe(model)
    yield
    after = observe(model)
    for what, value in before.items():
        assert after[what] == value, f"{what} changed"


def observe(model: nn.Module) -> dict[str, object]:
    """All that a caller can see of a model, comparable."""
    return {
        "output": _output(model),
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {name: _hooks(module) for name, module in model.named_modules()},
        "parameters": {
            name: (p.requires_grad, p.dtype, tuple(p.shape), p.device.type)
            for name, p in model.named_parameters(remove_duplicate=False)
        },
        "attention": model.config._attn_implementation,
        "active": getattr(model, "active_adapters", None) if isinstance(model, PeftModel) else None,
        "training": {name: module.training for name, module in model.named_modules()},
    }


def _hooks(module: nn.Module) -> dict[str, int]:
    return {name: len(value) for name, value in vars(module).items() if "_hooks" in name and hasattr(value, "__len__")}


def _output(model: nn.Module) -> bytes:
    """Logits to the bit."""
    training = {module: module.training for module in model.modules()}
    ids = tokens(9, seed=5)[None]
    with torch.no_grad():
        model.eval()
        mask = {"prompt_mask": torch.arange(9)[None] < 5} if isinstance(model, PeftModel) else {}
        logits = model(input_ids=ids, **mask).logits
    for module, mode in training.items():
        module.training = mode
    return logits.numpy().tobytes()


def fresh(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
