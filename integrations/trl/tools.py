"""Trainers that call tools: the first prompt stays the prompt, in every turn that is generated.

TRL generates a turn, runs the tools that it calls, puts their results behind it, and generates the next turn from all
of that. In training only the first prompt is a prompt, and turns and results are the completion. So they are in
generation: each later turn continues the completion.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bitune_plugin.integrations.trl.prompts import KnowsPrompts
from bitune_plugin.modeling.boundaries import prompts_known_by, prompts_of_lengths


class _Conversation(list[int]):
    """Tokens that begin with a prompt. TRL adds those of turns and of results to them, and the length of the prompt
    stays known."""

    def __init__(self, tokens: Iterable[int], prompt_length: int) -> None:
        super().__init__(tokens)
        self.prompt_length = prompt_length

    def __add__(self, more: list[int]) -> _Conversation:  # type: ignore[override]
        return _Conversation([*self, *more], self.prompt_length)


class CallsTools(KnowsPrompts):
    """A trainer with TRL's loop of tool calls."""

    def _tool_call_loop(self, prompts: Any, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        prompt_ids = [_Conversation(ids, len(ids)) for ids in prompt_ids]
        return super()._tool_call_loop(prompts, prompt_ids, *args, **kwargs)

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        lengths = [ids.prompt_length if isinstance(ids, _Conversation) else len(ids) for ids in prompt_ids]
        with prompts_known_by(prompts_of_lengths(lengths)):
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
