"""Tasks of reasoning-gym as datasets: free answers or multiple choice; and how free answers are scored."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator

import reasoning_gym
from datasets import Dataset

TEMPLATE = "Question: {question}\n\nAnswer:"
"""The paper's prompt for instructions. Completions begin with a space; TRL ends them with the end-of-sequence token."""

CHOICE_TEMPLATE = "Question: {question}\n\nChoices:\n{choices}\n\nAnswer:"
"""The paper's prompt for multiple choice, one choice per line."""

CHOICES = 4

TASKS: dict[str, tuple[str, dict[str, object]]] = {
    "family_relationships": ("family_relationships", {"max_family_size": 4, "min_family_size": 3}),
    "larger_families": ("family_relationships", {"max_family_size": 6, "min_family_size": 4}),
    "syllogism": ("syllogism", {"invalid_ratio": 0.5}),
    "path_star": ("path_star", {"degree": 2, "node_range": 10, "min_path_length": 3, "max_path_length": 3}),
    "short_path_star": ("path_star", {"degree": 3, "node_range": 10, "min_path_length": 2, "max_path_length": 2}),
}
"""Tasks that are not just generators of reasoning-gym with its own settings: small families and graphs, whose prompts
are short enough for a CPU, and syllogisms that hold less often."""

PREAMBLES = dict.fromkeys(("path_star", "short_path_star"), "Solve the following task:\n")
"""How the instructions end that a task gives with every question, if they are longer than the question: what is trained
on a task need not be told."""

SEED_STRIDE = 1_000_000
"""reasoning-gym draws question `i` from `seed + i`: neighbouring seeds give the same questions, shifted by one."""

ATTEMPTS = 10
"""Questions to draw for every one that is wanted, before giving up."""


def held_out(task: str, size: int) -> Dataset:
    """`size` different questions of a task, to measure on: the same ones whatever the seed of the training samples.

    Returns:
        Columns `question`, `answer`, `prompt` and `completion`.
    """
    return _dataset(task, size, seed=0)


def training(task: str, size: int, seed: int, held_out: Dataset) -> Dataset:
    """`size` different questions of a task, none of them in `held_out`.

    Args:
        task: one of `TASKS`, or the name of a reasoning-gym dataset.
        seed: of the questions; 0 or more.
    """
    return _dataset(task, size, (seed + 1) * SEED_STRIDE, excluded=held_out["question"])


def with_choices(questions: Dataset, seed: int = 0) -> Dataset:
    """Makes questions multiple choice: the right answer among others that are right elsewhere.

    Returns:
        `questions` with the prompt to match, and the columns `choices` and `gold`, the place of the right one.

    Raises:
        ValueError: all questions have the same answer.
    """
    generator = random.Random(seed)
    answers = sorted(set(questions["answer"]))
    if len(answers) < 2:
        raise ValueError(f"All answers are {answers[0]!r}: there is nothing to choose from. Take another task.")

    def choose(row: dict[str, str]) -> dict[str, object]:
        others = [answer for answer in answers if answer != row["answer"]]
        choices = [row["answer"], *generator.sample(others, min(CHOICES - 1, len(others)))]
        generator.shuffle(choices)
        prompt = CHOICE_TEMPLATE.format(question=row["question"], choices="\n".join(choices))
        return {**row, "prompt": prompt, "choices": choices, "gold": choices.index(row["answer"])}

    return Dataset.from_list([choose(row) for row in questions])


def exact_match(answers: Iterable[str], completions: Iterable[str]) -> int:
    """How many answers are right. Only the first line counts: not knowing when to stop is not held against a model."""
    return sum(
        _first_line(answer) == _first_line(completion) for answer, completion in zip(answers, completions, strict=True)
    )


def most_frequent(completions: Iterable[str]) -> int:
    """How many answers are right if all are the same, at best."""
    return Counter(completions).most_common(1)[0][1]


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].rstrip(" .")


def _dataset(task: str, size: int, seed: int, excluded: Iterable[str] = ()) -> Dataset:
    """No question twice.

    Raises:
        ValueError: the task has not enough different questions.
    """
    seen = set(excluded)
    rows = []
    for question, answer in _samples(task, size * ATTEMPTS, seed):
        if question not in seen:
            seen.add(question)
            prompt = TEMPLATE.format(question=question)
            rows.append({"question": question, "answer": answer, "prompt": prompt, "completion": f" {answer}"})
        if len(rows) == size:
            return Dataset.from_list(rows)
    raise ValueError(
        f"Task {task!r} has only {len(rows)} different questions with an answer. Ask for fewer than {size}."
    )


def _samples(task: str, size: int, seed: int) -> Iterator[tuple[str, str]]:
    generator, settings = TASKS.get(task, (task, {}))
    for entry in reasoning_gym.create_dataset(generator, size=size, seed=seed, **settings):
        if entry["answer"] is not None:  # tasks with many right answers give none
            yield _without_preamble(task, entry["question"]), str(entry["answer"])


def _without_preamble(task: str, question: str) -> str:
    return question.rpartition(PREAMBLES[task])[2].strip() if task in PREAMBLES else question.strip()
