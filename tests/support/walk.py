"""Runs TRL's trainers on rows whose prompts and completions have no word in common, and judges them by three passes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from replay import Replay
from torch import Tensor, nn
from transformers import TrainerCallback

from bitune_plugin.modeling import prompts
from helpers import assert_close
from models import WORDS, randomise_adapters, tiny, word_tokenizer
from three_pass import ThreePass
from training import LORA, SHORT_RUN

ASKING, ANSWERING = WORDS[:45], WORDS[45:]
FIRST_WORD = 6
"""Number of the first of `WORDS` in the vocabulary."""

OF_PROMPTS = range(FIRST_WORD, FIRST_WORD + len(ASKING))
OF_COMPLETIONS = range(FIRST_WORD + len(ASKING), FIRST_WORD + len(WORDS))

TWO_STEPS = {
    **SHORT_RUN,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 4,
}


def triples(count: int = 12) -> list[dict[str, str]]:
    """Prompts of 2 to 9 words, and two completions of 1 to 6 others."""
    source = random.Random(0)

    def text(words: list[str], shortest: int, longest: int) -> str:
        return " ".join(source.choices(words, k=source.randint(shortest, longest)))

    return [
        {
            "prompt": text(ASKING, 2, 9),
            "chosen": " " + text(ANSWERING, 1, 6),
            "rejected": " " + text(ANSWERING, 1, 6),
            "reference": " " + text(ANSWERING, 1, 6),
        }
        for _ in range(count)
    ]


def columns(*names: str) -> Dataset:
    return Dataset.from_list([{name: row[name] for name in names} for row in triples()])


def settings_of(config: type, folder: Path, **more: Any) -> Any:
    return config(output_dir=str(folder), **{**TWO_STEPS, **more})


class Witness(TrainerCallback):
    """Compares every training step with three passes: hidden states; the loss, which is that of the stock trainer on
    these; and with the loss's gradient with respect to them, every gradient.

    Args:
        trainer: of a model from `tiny`, with an adapter from `LORA`.
        monkeypatch: pytest's.
        loss: the trainer's method that returns the loss.

    Attributes:
        masks: for each call, its tokens and what of them was taken for the prompt.
        steps: how many steps were compared.
    """

    def __init__(self, trainer: Any, monkeypatch: pytest.MonkeyPatch, loss: str = "compute_loss") -> None:
        self.trainer, self.steps = trainer, 0
        self.masks: list[tuple[Tensor, Tensor]] = []
        self.calls: list[tuple[Tensor, Tensor, Tensor, Any]] = []
        randomise_adapters(trainer.model)
        plan = prompts.plan

        def recording(prompt_mask: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any) -> Any:
            self.latest = prompt_mask
            return plan(prompt_mask, attention_mask, *args, **kwargs)

        monkeypatch.setattr(prompts, "plan", recording)
        self.backbone = trainer.model.get_base_model().base_model
        self.hook = self.backbone.register_forward_hook(self.note, with_kwargs=True)
        self.replay = Replay(trainer, loss)
        trainer.add_callback(self)

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None or tokens.shape[1] < 2 or tokens.shape != self.latest.shape:
            return
        self.masks.append((tokens, self.latest))
        if torch.is_grad_enabled() and module.training:
            outputs.last_hidden_state.retain_grad()
            attended = kwargs.get("attention_mask")
            attended = torch.ones_like(tokens) if attended is None else attended
            self.calls.append((tokens, attended.bool(), self.latest, outputs))

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        assert self.calls
        self.hook.remove()  # not for the replay, in which nothing is new
        oracle = ThreePass(tiny(), LORA)
        oracle.load_product(self.trainer.model)
        total, expected = torch.zeros(()), []
        for tokens, attended, mask, outputs in self.calls:
            hidden = literal_states(oracle, tokens, attended, mask)
            found = outputs.last_hidden_state
            everywhere = found.shape[:2] == tokens.shape
            compared = attended if everywhere else answers(attended, mask)  # `BituneSFTTrainer` asks for answers alone
            gradient = found.grad[attended] if everywhere else found.grad[0]
            assert_close(found[attended] if everywhere else found[0], hidden[compared], 1e-4)
            total = total + (hidden[compared] * gradient).sum()
            expected.append((tokens, type(outputs)(last_hidden_state=hidden.detach())))
        total.backward()
        for mine, theirs in oracle.pairs(self.trainer.model):
            wanted = torch.zeros_like(mine) if mine.grad is None else mine.grad
            got = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
            assert_close(got, wanted, 1e-4 * max(1.0, wanted.abs().max().item()))
        self.replay.check(self.backbone, expected)
        self.calls.clear()
        self.steps += 1
        self.hook = self.backbone.register_forward_hook(self.note, with_kwargs=True)

    def wrong_tokens(self) -> Iterator[str]:
        """Tokens that were taken for what they are not. (The marks of a chat template between prompt and completion
        are in neither list.)"""
        assert self.masks
        for tokens, mask in self.masks:
            for token, is_prompt in zip(tokens.flatten().tolist(), mask.flatten().tolist(), strict=True):
                if token in OF_PROMPTS and not is_prompt:
                    yield f"prompt token {token} as completion"
                if token in OF_COMPLETIONS and is_prompt:
                    yield f"completion token {token} as prompt"


def literal_states(oracle: ThreePass, tokens: Tensor, attended: Tensor, mask: Tensor) -> Tensor:
    """Hidden states `[B, T, H]` of a batch, row by row by three passes; 0 on padding."""
    states: list[Tensor] = []
    backbone = oracle.model.get_base_model().model
    hook = backbone.register_forward_hook(lambda *x: states.append(x[2].last_hidden_state[0]))
    rows = []
    for row, here, prompt in zip(tokens, attended, mask, strict=True):
        states.clear()
        oracle(row[here], int(prompt.sum()))
        read = torch.cat([states[0], states[-1]]) if len(states) > 1 else states[0]
        rows.append(torch.zeros(len(row), read.shape[-1]).masked_scatter(here[:, None], read))
    hook.remove()
    return torch.stack(rows)


def answers(attended: Tensor, mask: Tensor) -> Tensor:
    """bool `[B, T]`: each row from its last prompt token on."""
    places = attended.long().cumsum(1)
    return attended & (places >= mask.sum(1, keepdim=True))


def only_completion_words() -> dict[str, Any]:
    """Settings of `generate`, so that completions have the words of completions alone."""
    tokenizer = word_tokenizer()
    return {"suppress_tokens": [token for token in range(len(tokenizer)) if token not in OF_COMPLETIONS]}
