"""What the training benchmarks share: a training step of each contender, on documents of any length.

A step is what TRL's trainer does: backbone, LM head on the hidden states that predict the completion and on no others,
mean cross-entropy of the completion's tokens, backward pass, optimizer step. All contenders do it in the same way, but
for `three-pass`, which goes through its documents one by one and sums up their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from benchmarks.measuring import lora_config
from bitune_plugin import BituneConfig
from bitune_plugin.modeling.host import enable_checkpointing
from three_pass import ThreePass

Forward = Callable[[], AbstractContextManager]
"""Makes the context of a forward pass."""


@dataclass(frozen=True)
class Document:
    """A prompt and its completion.

    Attributes:
        tokens: `[T]`.
        prompt_length: how many of them are prompt.
    """

    tokens: Tensor
    prompt_length: int

    @property
    def positions(self) -> Tensor:
        return torch.arange(len(self.tokens), device=self.tokens.device)

    @property
    def is_prompt(self) -> Tensor:
        return self.positions < self.prompt_length

    @property
    def predicts(self) -> Tensor:
        """True where the next token is one of the completion."""
        return (self.positions >= self.prompt_length - 1) & (self.positions < len(self.tokens) - 1)

    @property
    def completion(self) -> Tensor:
        return self.tokens[self.prompt_length :]


@dataclass(frozen=True)
class Batch:
    """Documents as a model takes them.

    Attributes:
        inputs: arguments of the backbone.
        prompt_mask, predicts: bool `[rows, tokens]`.
        targets: the tokens to predict, in the order of `predicts`.
    """

    inputs: dict[str, Tensor]
    prompt_mask: Tensor
    predicts: Tensor
    targets: Tensor


def padded(documents: Sequence[Document]) -> Batch:
    """A row for each document, padded on the right."""
    inputs = {
        "input_ids": _rows([d.tokens for d in documents]),
        "attention_mask": _rows([torch.ones_like(d.tokens) for d in documents]),
    }
    masks = _rows([d.is_prompt for d in documents]), _rows([d.predicts for d in documents])
    return Batch(inputs, *masks, torch.cat([d.completion for d in documents]))


def packed(documents: Sequence[Document]) -> Batch:
    """One row for all documents; the positions start again with each."""
    inputs = {"input_ids": _row([d.tokens for d in documents]), "position_ids": _row([d.positions for d in documents])}
    masks = _row([d.is_prompt for d in documents]), _row([d.predicts for d in documents])
    return Batch(inputs, *masks, torch.cat([d.completion for d in documents]))


def make_run(
    contender: str,
    base: PreTrainedModel,
    batches: Sequence[Sequence[Document]],
    checkpointing: bool = False,
    autocast: bool = False,
) -> Callable[[], list[float]]:
    """Training steps of a contender, one for each batch.

    Args:
        contender: `lora` or `bitune`, followed by ` packed` for one row per batch; or `three-pass`.
        checkpointing: activation checkpointing; not for `three-pass`, whose cache must carry gradients.
        autocast: compute the losses in bfloat16, as TRL's trainer does by default.

    Returns:
        A function that does the steps and returns their losses.
    """
    method, _, form = contender.partition(" ")
    model: torch.nn.Module
    if method == "three-pass":
        model = ThreePass(base, lora_config(), attention="sdpa").to(base.device)
    else:
        model = get_peft_model(base, BituneConfig(adapter=lora_config()) if method == "bitune" else lora_config())
        if checkpointing:
            model.enable_input_require_grads()
            enable_checkpointing(base, {"use_reentrant": False})
    model.train()
    # By name: `ThreePass` switches gradients on and off as it goes.
    trained = [p for name, p in model.named_parameters() if "lora_" in name or "theta_" in name]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    formed = [packed(batch) if form else padded(batch) for batch in batches]
    forward = partial(torch.autocast, base.device.type, torch.bfloat16, enabled=autocast)

    def step(number: int) -> float:
        if isinstance(model, ThreePass):
            loss = _three_passes_each(model, batches[number], forward)
        else:
            loss = _in_one_pass(model, formed[number], method == "bitune", forward)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return lambda: [step(number) for number in range(len(batches))]


def _in_one_pass(model: PeftModel, batch: Batch, knows_prompt: bool, forward: Forward) -> float:
    causal_model = model.get_base_model()
    prompt = {"prompt_mask": batch.prompt_mask} if knows_prompt else {}
    with forward():
        hidden_states = causal_model.get_decoder()(**batch.inputs, **prompt, use_cache=False).last_hidden_state
        logits = causal_model.get_output_embeddings()(hidden_states[batch.predicts])
        loss = cross_entropy(logits.float(), batch.targets)
    loss.backward()
    return loss.item()


def _three_passes_each(model: ThreePass, documents: Sequence[Document], forward: Forward) -> float:
    targets = sum(len(document.completion) for document in documents)
    total = 0.0
    for document in documents:
        with forward():
            loss = model.loss(document.tokens, document.prompt_length) * len(document.completion) / targets
        loss.backward()
        total += loss.item()
    return total


def tokens_read(contender: str, batches: Sequence[Sequence[Document]]) -> int:
    """Tokens that a contender needs to read in its forward passes, padding included."""
    if contender == "lora":
        return sum(len(batch) * max(len(document.tokens) for document in batch) for batch in batches)
    documents = [document for batch in batches for document in batch]
    read_twice = 0 if contender == "lora packed" else sum(document.prompt_length - 1 for document in documents)
    return sum(len(document.tokens) for document in documents) + read_twice


def random_documents(base: PreTrainedModel, count: int, length: int, prompt_length: int) -> list[Document]:
    """Documents of random tokens, all of one length."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, base.config.vocab_size - 5, (count, length), generator=generator).to(base.device)
    return [Document(row, prompt_length) for row in tokens]


def _rows(parts: Sequence[Tensor]) -> Tensor:
    return pad_sequence(list(parts), batch_first=True)


def _row(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts))[None]
