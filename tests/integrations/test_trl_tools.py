"""Tools: every turn is generated from the first prompt, as it is trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import DistillationConfig, GRPOConfig

from bitune_plugin import BituneConfig, BituneDistillationTrainer, BituneGRPOTrainer
from models import tiny, word_tokenizer
from training import LORA
from walk import Witness, only_completion_words, settings_of, triples

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} "
    "{% for call in m['tool_calls'] or [] %}{{ call['function']['name'] }} {{ call['function']['arguments'] }} "
    "{% endfor %}<eos> {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)

RESULT = "w80 w81 w82"
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"number": 1}}}
SAMPLING = {"max_completion_length": 12, "generation_kwargs": {**only_completion_words(), "max_new_tokens": 4}}


def look_up(number: int) -> str:
    """Looks a number up.

    Args:
        number: any.
    """
    return RESULT


class Library:
    """An environment with one tool."""

    def reset(self, **_: Any) -> None:
        pass

    def look_up(self, number: int) -> str:
        """Looks a number up.

        Args:
            number: any.
        """
        return RESULT

    def get_reward(self) -> float:
        return float(torch.rand(()))


def calling() -> PreTrainedTokenizerFast:
    """A tokenizer that reads a tool call out of every first turn, and none out of later ones."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.response_template = {}
    result = tokenizer(RESULT)["input_ids"]

    def parse(ids: list[int], prefix: list[int], **_: Any) -> dict[str, Any]:
        later = any(prefix[i : i + len(result)] == result for i in range(len(prefix)))
        content = tokenizer.decode(ids, skip_special_tokens=True)
        return {"role": "assistant", "content": content, **({} if later else {"tool_calls": [copy.deepcopy(CALL)]})}

    tokenizer.parse_response = parse
    return tokenizer


def reward(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(set(messages[-1]["content"].split()))) for messages in completions]


CASES: dict[str, Any] = {
    "GRPO": (BituneGRPOTrainer, GRPOConfig, {"reward_funcs": reward, "tools": [look_up]}),
    "GRPO's environments": (BituneGRPOTrainer, GRPOConfig, {"environment_factory": Library}),
    "distillation": (BituneDistillationTrainer, DistillationConfig, {"tools": [look_up]}),
}


@pytest.mark.parametrize("multi_turn", ["reread", "alternate"])
@pytest.mark.parametrize("name", CASES)
def test_turns_and_results_are_completion_in_training_and_in_generation(
    name: str, multi_turn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls, config, arguments = CASES[name]
    fields = {"num_generations": 2, "beta": 0.1} if config is GRPOConfig else {}
    if cls is BituneDistillationTrainer:
        arguments = {**arguments, "teacher_model": tiny(seed=1)}
    prompts = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in triples()]
    trainer = cls(
        model=tiny(),
        args=settings_of(config, tmp_path, **SAMPLING, **fields),
        train_dataset=Dataset.from_list(prompts),
        processing_class=calling(),
        peft_config=BituneConfig(adapter=copy.deepcopy(LORA), multi_turn=multi_turn),
        **arguments,
    )
    witness = Witness(trainer, monkeypatch)

    trainer.train()

    assert witness.steps == 2
    assert [*witness.wrong_tokens()] == []
    result = torch.tensor(word_tokenizer()(RESULT)["input_ids"])
    assert any((tokens.unfold(1, 3, 1) == result).all(-1).any() for tokens, _ in witness.masks)
    assert trainer.state.log_history[0]["tools/call_frequency"] == 1.0
