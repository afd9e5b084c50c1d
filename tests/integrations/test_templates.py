"""Prompts and completions rendered from other columns."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from lm_eval.utils import apply_template

from bitune_plugin.integrations.trl.templates import apply_templates

ROWS = [
    {"question": "one?", "answers": ["a", "b"], "best": 1},
    {"question": "two?", "answers": ["c"], "best": 0},
    {"question": "three?", "answers": [], "best": -1},
]
PROMPT = "Q: {{question}}\n\nA:"
COMPLETION = "{% if answers %} {{answers[best]}}{% endif %}"


def streamed(rows: list[dict[str, Any]]) -> IterableDataset:
    return Dataset.from_list(rows).to_iterable_dataset()


@pytest.mark.parametrize("make", [Dataset.from_list, streamed], ids=["dataset", "stream"])
class TestSamples:
    def test_are_rendered_and_those_that_come_out_empty_left_out(
        self, make: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING):
            rendered = list(apply_templates(make(ROWS), PROMPT, COMPLETION))
        assert rendered == [
            {"prompt": "Q: one?\n\nA:", "completion": " b"},
            {"prompt": "Q: two?\n\nA:", "completion": " c"},
        ]
        assert "1 of 3 samples come out of `prompt_template` or `completion_template` empty." in caplog.text

    def test_may_have_columns_of_the_names_that_are_made(self, make: Any) -> None:
        rows = [{"prompt": [1, 2], "completion": 3, "messages": "x"}]
        rendered = apply_templates(make(rows), "{{prompt | sum}}", " {{prompt | length}}{{completion}}")
        assert list(rendered) == [{"prompt": "3", "completion": " 23"}]

    def test_without_a_column_that_a_template_names_are_refused(self, make: Any) -> None:
        message = r"`completion_template`.*'answer' is undefined.*columns are \['answers', 'best', 'question'\]"
        with pytest.raises(ValueError, match=message):
            list(apply_templates(make(ROWS), PROMPT, "{{answer}}"))


@pytest.mark.parametrize("text", ["plain", 'a "quote"\n', "{{ braces }} {% and %}", "ünï\tcode ", "<b>&amp;</b>"])
@pytest.mark.parametrize("template", ["Q: {{text}}\n", "  {{text}}\n\n", "{{text | upper}}{{[text] | join('\n')}}"])
def test_templates_render_what_lm_eval_renders(template: str, text: str) -> None:
    [sample] = apply_templates(Dataset.from_list([{"text": text}]), template, "x")
    assert sample["prompt"] == apply_template(template, {"text": text})


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ("{{answers[best]", "`completion_template` is not a valid Jinja template: .*line 1"),
        ("{{answers.index('z')}}", "`completion_template` fails on a sample: 'z' is not in list"),
        ("{{answers.append('z')}}", r"`completion_template` fails on a sample: .*unsafe\."),
        ("{{''}}", "3 of 3 samples come out"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(completion: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_templates(Dataset.from_list(ROWS), PROMPT, completion)
