"""A conversation, literally: a loop over its turns on a stock PEFT model; and conversations as batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from agreement import NOISE, assert_agrees
from helpers import bitune, lora, tokens
from models import tiny
from three_pass import ThreePass, attention_of

Turn = tuple[Tensor, Tensor]
"""A prompt and its completion, tokens each. Neither has special tokens; a prompt has one token at least."""


class Alternating(ThreePass):
    """The three passes, turn by turn, over the cache of the turns before."""

    def answers(self, turns: Sequence[Turn]) -> list[Tensor]:
        """The logits of the answer of every turn: of the last prompt token and the completion."""
        cache = self._cache()
        return [self._turn(prompt, completion, cache) for prompt, completion in turns]

    def chat(self, prompts: Sequence[Tensor], steps: int) -> list[Tensor]:
        """Greedy completions of `steps` tokens, one for each prompt."""
        cache, completions = self._cache(), []
        for prompt in prompts:
            token = self._turn(prompt, prompt[:0], cache)[-1].argmax()
            said = [token]
            for step in range(steps):
                logits = self._run("causal", token[None, None], cache, cache.get_seq_length()).logits[0, -1]
                token = logits.argmax()
                said += [token] if step < steps - 1 else []  # the last one is read, and what follows is not said
            completions.append(torch.stack(said))
        return completions

    def _turn(self, prompt: Tensor, completion: Tensor, cache: DynamicCache) -> Tensor:
        """Reads a turn and appends it to the cache; the logits of its answer."""
        encoded = prompt[None, :-1]
        before, size = cache.get_seq_length(), encoded.shape[1]
        if size > 0:
            causal, second = self._copy(cache), self._copy(cache)
            self._run("causal", encoded, causal, before)
            with attention_of(self.second_pass_attention, self.model.get_base_model(), before):
                self._run("causal" if self.share_adapter else "bidirectional", encoded, second, before)
            for index, (c, s) in enumerate(zip(causal.layers, second.layers, strict=True)):
                key = self._mix(c.keys[:, :, -size:], s.keys[:, :, -size:], self.theta_key, index)
                value = self._mix(c.values[:, :, -size:], s.values[:, :, -size:], self.theta_value, index)
                cache.update(key, value, index)
        return self._run("causal", torch.cat([prompt[-1:], completion])[None], cache, before + size).logits[0]

    def _copy(self, cache: DynamicCache) -> DynamicCache:
        """A cache with the same keys and values, which can be appended to alone."""
        copied = self._cache()
        for index, layer in enumerate(cache.layers):
            copied.update(layer.keys, layer.values, index)
        return copied


def alternating(
    base: PreTrainedModel | str = "llama", adapter: PeftConfig | None = None, **settings: object
) -> tuple[PeftModel, Alternating]:
    """A model that reads conversations turn by turn, and the loop with the same weights."""
    base = tiny(base) if isinstance(base, str) else base
    granularity = settings.get("mixing_granularity", "layer")
    others = {name: value for name, value in settings.items() if name != "mixing_granularity"}
    heads = base.config.num_key_value_heads if granularity == "head" else 1
    oracle = Alternating(base, adapter or lora(), granularity=granularity, heads=heads, **others)
    model = bitune(base, adapter, multi_turn="alternate", **settings)
    oracle.load_product(model)
    return model, oracle.eval()


def conversation(*sizes: tuple[int, int], seed: int = 0) -> list[Turn]:
    """Random turns of the given (prompt tokens, completion tokens)."""
    return [(tokens(p, 100 * seed + 2 * i), tokens(c, 100 * seed + 2 * i + 1)) for i, (p, c) in enumerate(sizes)]


SIZES = (
    ((6, 3), (4, 2), (5, 3)),
    ((1, 2), (3, 1), (1, 4), (2, 1)),  # prompts of one token
    ((7, 2),),
    ((3, 4), (9, 0)),  # the last prompt waits for its answer
)

CONVERSATIONS = [conversation(*sizes, seed=seed) for seed, sizes in enumerate(SIZES)]


def ids_of(turns: Sequence[Turn]) -> Tensor:
    return torch.cat([part for turn in turns for part in turn])


def mask_of(turns: Sequence[Turn]) -> Tensor:
    return torch.cat([torch.full((len(part),), part is turn[0]) for turn in turns for part in turn])


@dataclass(frozen=True)
class Rows:
    """Conversations in a batch.

    Attributes:
        inputs: arguments of the model.
        first: row and column of the first token of each conversation.
    """

    inputs: dict[str, Tensor]
    first: list[tuple[int, int]]
    conversations: list[list[Turn]]

    def answers(self, logits: Tensor) -> list[list[Tensor]]:
        """The logits of every answer of every conversation."""
        found = []
        for (row, column), turns in zip(self.first, self.conversations, strict=True):
            answers = []
            for prompt, completion in turns:
                end = column + len(prompt) + len(completion)
                answers.append(logits[row, column + len(prompt) - 1 : end])
                column = end
            found.append(answers)
        return found

    @property
    def labels(self) -> Tensor:
        ignored = self.inputs["prompt_mask"]
        if "attention_mask" in self.inputs:
            ignored = ignored | ~self.inputs["attention_mask"].bool()
        return self.inputs["input_ids"].masked_fill(ignored, -100)


def padded(conversations: list[list[Turn]], side: str = "right") -> Rows:
    """A conversation per row."""
    length = max(len(ids_of(turns)) for turns in conversations)
    rows, first = [], []
    for row, turns in enumerate(conversations):
        ids, mask = ids_of(turns), mask_of(turns)
        room = length - len(ids)
        first.append((row, room if side == "left" else 0))
        pad = torch.zeros(room, dtype=torch.long)
        parts = (ids, torch.ones_like(ids), mask.long())
        rows.append([torch.cat([pad, x] if side == "left" else [x, pad]) for x in parts])
    input_ids, attention_mask, prompt_mask = (torch.stack(x) for x in zip(*rows, strict=True))
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "prompt_mask": prompt_mask.bool()}
    return Rows(inputs, first, conversations)


def packed(conversations: list[list[Turn]]) -> Rows:
    """All conversations in one row; positions start again with each."""
    ids = [ids_of(turns) for turns in conversations]
    first = [(0, sum(map(len, ids[:index]))) for index in range(len(ids))]
    inputs = {
        "input_ids": torch.cat(ids)[None],
        "prompt_mask": torch.cat([mask_of(turns) for turns in conversations])[None],
        "position_ids": torch.cat([torch.arange(len(each)) for each in ids])[None],
    }
    return Rows(inputs, first, conversations)


def loss_of(answers: Sequence[Sequence[Tensor]], conversations: Sequence[Sequence[Turn]]) -> Tensor:
    """The mean cross-entropy of all tokens of all completions."""
    turns = [turn for turns in conversations for turn in turns]
    logits = torch.cat([answer[: len(answer) - 1] for each in answers for answer in each])
    return cross_entropy(logits.float(), torch.cat([completion for _, completion in turns]))


def assert_answers_agree(model: PeftModel, oracle: Alternating, rows: Rows) -> tuple[list[list[Tensor]], ...]:
    """The logits of all answers, of the model and of the oracle."""
    got = rows.answers(model(**rows.inputs, use_cache=False).logits)
    expected = [oracle.answers(turns) for turns in rows.conversations]
    for mine, theirs in zip(got, expected, strict=True):
        for answer, right in zip(mine, theirs, strict=True):
            assert_agrees(answer, right)
    return got, expected


def assert_all_agree(model: PeftModel, oracle: Alternating, rows: Rows) -> None:
    """Logits, loss, and all gradients: those of a prompt's adapters come from later turns too, through its mixture."""
    _, expected = assert_answers_agree(model, oracle, rows)
    right = loss_of(expected, rows.conversations)
    right.backward()
    given = {name: value for name, value in rows.inputs.items() if name != "prompt_mask"}
    loss = model(**given, labels=rows.labels, use_cache=False).loss
    assert_agrees(loss, right)
    loss.backward()
    for theirs, mine in oracle.pairs(model):
        if theirs.grad is None:
            assert mine.grad is None or not mine.grad.any()
        else:
            assert_agrees(mine.grad, theirs.grad, NOISE)
