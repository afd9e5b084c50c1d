"""Prompts and completions made of other columns, by Jinja templates such as lm-eval's `doc_to_text`.

    dataset = apply_templates(dataset, "Question: {{question}}\n\nAnswer:", " {{answer}}")

A completion begins with its separator from the prompt, usually a space; TRL puts the end-of-sequence token behind it.
"""

from __future__ import annotations

import functools
from typing import Any

from datasets import Dataset, Features, Value
from jinja2 import StrictUndefined, Template, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from trl.data_utils import get_dataset_column_names

from bitune_plugin.integrations.trl.filters import Samples, filtered
from bitune_plugin.integrations.trl.host import main_process_first

FEATURES = Features({"prompt": Value("string"), "completion": Value("string")})


_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
"""Renders exactly as lm-eval's template."""


_EMPTY = "samples come out of `prompt_template` or `completion_template` empty."


def apply_templates(
    dataset: Samples, prompt_template: str, completion_template: str, num_proc: int | None = None
) -> Samples:
    """Makes columns `prompt` and `completion` of all others.

    Args:
        dataset: with the columns that the templates name.
        prompt_template: Jinja, over the columns of a sample.
        completion_template: the same. A sample whose prompt or completion comes out empty is left out; a warning
            says how many.
        num_proc: processes to render with; not for streams.

    Returns:
        A dataset or stream of `prompt` and `completion`, both text.

    Raises:
        ValueError: a template is not valid Jinja, it fails on a sample, as without a column, or no sample is left.
    """
    templates = {"prompt": prompt_template, "completion": completion_template}
    for column, template in templates.items():
        _compiled(column, template)
    workers = {"num_proc": num_proc, "desc": "Rendering prompts"} if isinstance(dataset, Dataset) else {}
    with main_process_first():  # one process fills the cache for all
        rendered = dataset.map(
            _render,
            fn_kwargs={"templates": templates},
            remove_columns=get_dataset_column_names(dataset),
            features=FEATURES,
            **workers,
        )
        return filtered(rendered, _is_whole, _EMPTY, workers)


def _render(sample: dict[str, Any], templates: dict[str, str]) -> dict[str, str]:
    columns = dict(sample)
    rendered = {}
    for column, template in templates.items():
        try:
            rendered[column] = _compiled(column, template).render(columns)
        except Exception as error:  # whatever the user's expressions come to
            raise ValueError(
                f"`{column}_template` fails on a sample: {str(error).rstrip('.')}. The columns are {sorted(columns)}."
            ) from error
    return rendered


@functools.cache
def _compiled(column: str, template: str) -> Template:
    try:
        return _ENVIRONMENT.from_string(template)
    except TemplateSyntaxError as error:
        raise ValueError(
            f"`{column}_template` is not a valid Jinja template: {error.message} (line {error.lineno})."
        ) from error


def _is_whole(sample: dict[str, str]) -> bool:
    return all(sample[column].strip() for column in FEATURES)
