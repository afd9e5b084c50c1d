"""Tasks of lm-eval over `WORDS`, one of each kind, and what a model of lm-eval answers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from models import WORDS

CHOICE, GENERATE, ROLLING = "words_choice", "words_generate", "words_rolling"
STOP, STEPS = "w7", 6


def words(source: random.Random, fewest: int, most: int) -> str:
    return " ".join(source.choices(WORDS, k=source.randint(fewest, most)))


def write_tasks(folder: Path) -> Path:
    """A folder with a task of each kind. Seven documents, so that they divide into neither batches nor processes."""
    source = random.Random(1)
    for split, size in (("train", 4), ("validation", 7)):
        documents = [
            {
                "question": words(source, 1, 9),
                "choices": [words(source, 1, 4) for _ in range(3)],
                "gold": source.randrange(3),
                "text": words(source, 3, 30),
            }
            for _ in range(size)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, documents)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")},
            "cache_dir": str(folder / "cache"),
        },
        "validation_split": "validation",
    }
    # The same examples for every document: drawn at random, they would depend on the number of processes.
    of_questions = {"training_split": "train", "doc_to_text": "question", "fewshot_config": {"sampler": "first_n"}}
    kinds = {
        CHOICE: {
            **of_questions,
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}],
        },
        GENERATE: {
            **of_questions,
            "output_type": "generate_until",
            "doc_to_target": "{{choices[gold]}}",
            "generation_kwargs": {"until": [STOP], "max_gen_toks": STEPS},
            "metric_list": [{"metric": "exact_match"}],
        },
        ROLLING: {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    }
    for name, settings in kinds.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **settings}))
    return folder


def responses(folder: Path, task: str, model: str, model_args: dict[str, Any], **settings: Any) -> list[list[str]]:
    """The words that a model of lm-eval answers to each document of a task.

    Args:
        folder: that of `write_tasks`.
        settings: of `simple_evaluate`.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=model, model_args=model_args, tasks=[task], task_manager=manager, bootstrap_iters=0, **settings
    )
    return words_of(results["samples"][task])


def words_of(samples: list[dict[str, Any]]) -> list[list[str]]:
    """The answers in samples, by document. Of words, tokenizers do not say whether the first has a space before it."""
    return [each["resps"][0][0].split() for each in sorted(samples, key=lambda each: each["doc_id"])]
