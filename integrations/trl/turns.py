"""Conversations that are read turn by turn (`multi_turn="alternate"`): one sample with a prompt for every turn.

Training and chatting must agree token by token, so a prompt here is what a chat appends to the cache: the messages
since the last completion and the opening of the next, as the chat template renders them. A completion ends with an
end-of-sequence token, as in generation; the tokens that the template puts behind it belong to the next prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase
from trl import SFTConfig
from trl.data_utils import get_dataset_column_names

from bitune_plugin.core.prompts import IGNORED
from bitune_plugin.integrations.trl.conversations import (
    ASSISTANT_TURNS,
    assistant_turns,
    chatml,
    has_assistant_turn,
    template_settings,
)
from bitune_plugin.integrations.trl.filters import filtered
from bitune_plugin.integrations.trl.host import main_process_first
from bitune_plugin.integrations.trl.preparation import NO_TURN, workers_of
from bitune_plugin.integrations.trl.samples import PROMPT_MASK

CHANGED = (
    "conversations of the {} dataset: the chat template renders their first turns differently once later ones follow, "
    "so that no cache could keep them, as `multi_turn='alternate'` does. Use a template that only appends, or "
    "`multi_turn='reread'`."
)
"""Why a conversation is left out."""


def ends_of_turns(model: Any, settings: dict[str, Any] | None = None) -> set[int]:
    """The tokens with which `generate` ends a completion, as the model says.

    Args:
        model: a model, or its hub id or path.
        settings: the keywords with which it is loaded from there.
    """
    if isinstance(model, str):
        of_files = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "code_revision")
        settings = {name: value for name, value in (settings or {}).items() if name in of_files}
        try:
            config: Any = GenerationConfig.from_pretrained(model, **settings)
        except OSError:  # without a file of its own, as `from_pretrained` of a model does
            config = AutoConfig.from_pretrained(model, **settings).get_text_config()
    else:
        config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    return set() if ends is None else set(ends) if isinstance(ends, Iterable) else {ends}


def tokenized_by_turns(
    dataset: Any,
    args: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    ends: set[int],
    name: str,
) -> Any:
    """Samples of tokens of conversations: `input_ids`, `labels` and `prompt_mask`; see `by_turns`. `ends` are those of
    the model; that of the tokenizer is another."""
    workers = workers_of(dataset, args)
    settings = {
        "tokenizer": tokenizer,
        "chat_template": chat_template,
        "ends": sorted(ends | {tokenizer.eos_token_id} - {None}),
        "which": getattr(args, "assistant_turns", ASSISTANT_TURNS[0]),
        "completion_only": args.completion_only_loss is not False,
    }
    with main_process_first():
        if "conversations" in get_dataset_column_names(dataset):
            dataset = chatml(dataset, workers)
        dataset = filtered(dataset, has_assistant_turn, NO_TURN.format(name), workers)
        columns = get_dataset_column_names(dataset)
        dataset = dataset.map(by_turns, remove_columns=columns, fn_kwargs=settings, **workers)
        return filtered(dataset, _is_kept, CHANGED.format(name), workers)


def by_turns(
    sample: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    ends: list[int],
    which: str,
    completion_only: bool,
) -> dict[str, list[Any]]:
    """The tokens of a conversation up to its last assistant turn, and which of them are prompt.

    Args:
        sample: `messages`, and optionally `tools` and `chat_template_kwargs`.
        tokenizer: has the chat template.
        chat_template: to be used instead, or `None`.
        ends: the tokens that end a completion.
        which: the assistant turns that count for the loss, one of `ASSISTANT_TURNS`.
        completion_only: prompts do not count for the loss.

    Returns:
        `input_ids`, `labels` and `prompt_mask`; empty ones if the template changes what it has already rendered.
    """
    messages, settings = sample["messages"], template_settings(sample, chat_template)
    turns = assistant_turns(messages)
    ids: list[int] = []
    prompt_mask: list[bool] = []
    labels: list[int] = []

    def rendered(end: int, add_generation_prompt: bool) -> list[int]:
        encoded: Any = tokenizer.apply_chat_template(
            messages[:end], tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt, **settings
        )
        tokens: list[int] = encoded["input_ids"]
        return tokens

    for turn in turns:
        prompt, whole = rendered(turn.start, True), rendered(turn.stop, False)
        if prompt[: len(ids)] != ids or whole[: len(prompt)] != prompt:
            return {"input_ids": [], "labels": [], PROMPT_MASK: []}
        is_prompt = [True] * (len(prompt) - len(ids)) + _behind_the_end(whole[len(prompt) :], ends)
        learnt = which != ASSISTANT_TURNS[0] or turn is turns[-1]
        new = zip(whole[len(ids) :], is_prompt, strict=True)
        labels += [token if (learnt and not prompt) or not completion_only else IGNORED for token, prompt in new]
        prompt_mask += is_prompt
        ids = whole
    return {"input_ids": ids, "labels": labels, PROMPT_MASK: prompt_mask}


def _behind_the_end(completion: list[int], ends: list[int]) -> list[bool]:
    """Of each token of a rendered completion, whether it comes after its last end-of-sequence token."""
    at = [index for index, token in enumerate(completion) if token in ends]
    said = at[-1] + 1 if at else len(completion)
    return [False] * said + [True] * (len(completion) - said)


def _is_kept(sample: dict[str, Any]) -> bool:
    return len(sample["input_ids"]) > 0
