"""The questions of the comparison: the same facts with the question last and first, each with choices to score.

Relations, syllogisms and paths are those of `tasks.py`. *Missing words* is natural prose that comes with Python: the
sentences of its docstrings and its reference, one word of each left out, to be chosen among four of the same length.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from zlib import crc32

from datasets import Dataset

import tasks
from tasks import CHOICES, TEMPLATE

LAST, FIRST = "question last", "question first"

NOT_PROSE = {"test", "tests", "idlelib", "site-packages", "lib2to3", "turtledemo", "ensurepip"}
"""Folders of the standard library without docstrings of users' interest."""

BLANK = "____"

WORDS = range(8, 31)
"""Words of a sentence."""

LETTERS = 5
"""Of a word that may be missing, at least: shorter ones are seldom in doubt."""


@dataclass(frozen=True)
class Parts:
    """A question in two parts, which stand in either order.

    Attributes:
        facts: to be known for the answer.
        question: the question itself.
        choices: the answers to choose from, or how they begin.
        right: the right one.
        answer: what is trained: it begins with `right`.
    """

    facts: str
    question: str
    choices: tuple[str, ...]
    right: str
    answer: str

    def row(self, order: str) -> dict[str, object]:
        """A row of a dataset, as those of `tasks.py`, with `choices` and `gold`, the place of the right one."""
        halves = (self.facts, self.question) if order == LAST else (self.question, self.facts)
        text = "\n\n".join(halves)
        return {
            "question": text,
            "answer": self.answer,
            "prompt": TEMPLATE.format(question=text),
            "completion": f" {self.answer}",
            "choices": list(self.choices),
            "gold": self.choices.index(self.right),
        }


def relation(row: dict[str, str], answers: list[str]) -> Parts:
    """Families: four relations, the right one among others that are right elsewhere."""
    facts, question = _halves(row["question"])
    return Parts(facts, question, _with_others(row, answers), row["answer"], row["answer"])


def syllogism(row: dict[str, str], answers: list[str]) -> Parts:
    """Two premises, and whether a third statement follows."""
    return Parts(*_halves(row["question"]), tuple(answers), row["answer"], row["answer"])


def path(row: dict[str, str], answers: list[str]) -> Parts:
    """Edges of a graph, `|5 9|0 4|6 0|6 5`, and a start with a goal, `6 4`: the choices are the first edges of all
    arms, `6 0` and `6 5`. Not whole arms, because only the right one ends with the goal, so that a model which guesses
    the first edge, all there is to find, would know it among them."""
    edges, _, ends = row["question"].rpartition("/")
    start, goal = ends.replace("=", "").split()
    first_edges = {" ".join(arm): " ".join(arm[:2]) for arm in arms(edges, start)}
    if row["answer"] not in first_edges:
        raise ValueError(f"The path {row['answer']!r} is not an arm from {start} in {edges!r}.")
    choices = tuple(sorted(set(first_edges.values())))
    return Parts(edges, f"{start} {goal} =", choices, first_edges[row["answer"]], row["answer"])


def arms(edges: str, start: str) -> Iterator[list[str]]:
    """The nodes of every path from the start to an end of the graph."""
    after: dict[str, list[str]] = defaultdict(list)
    for edge in filter(None, edges.strip().split("|")):
        source, target = edge.split()
        after[source].append(target)

    def walk(so_far: list[str]) -> Iterator[list[str]]:
        if not after[so_far[-1]]:
            yield so_far
        for node in after[so_far[-1]]:
            yield from walk([*so_far, node])

    return walk([start])


def _halves(question: str) -> tuple[str, str]:
    facts, _, asked = question.rpartition("\n\n")
    if not facts:
        raise ValueError(f"There is no blank line between the facts and the question in {question!r}.")
    return facts, asked


def _with_others(row: dict[str, str], answers: list[str]) -> tuple[str, ...]:
    generator = random.Random(crc32(row["question"].encode()))
    others = [answer for answer in answers if answer != row["answer"]]
    choices = [row["answer"], *generator.sample(others, min(CHOICES - 1, len(others)))]
    generator.shuffle(choices)
    return tuple(choices)


SOURCES: dict[str, tuple[str, Callable[[dict[str, str], list[str]], Parts]]] = {
    "relations": ("larger_families", relation),
    "syllogisms": ("syllogism", syllogism),
    "paths": ("short_path_star", path),
}
"""The task of `tasks.py`, and how its rows become parts."""

MISSING_WORDS = "missing words"

TASKS = tuple(f"{name}, {order}" for name in (*SOURCES, MISSING_WORDS) for order in (LAST, FIRST))
"""Names of the tasks of the comparison."""


def held_out(task: str, size: int) -> Dataset:
    """`size` different questions to measure on, the same ones whatever the seed of the training samples.

    Args:
        task: one of `TASKS`.

    Returns:
        Columns `question`, `answer`, `prompt`, `completion`, `choices` and `gold`.
    """
    name, order = task.split(", ")
    if name == MISSING_WORDS:
        return _rows(_missing_words(for_training=False, size=size, seed=0), order)
    source, parts_of = SOURCES[name]
    rows = tasks.held_out(source, size)
    answers = sorted(set(rows["answer"]))
    return _rows((parts_of(row, answers) for row in rows), order)


def training(task: str, size: int, seed: int) -> Dataset:
    """`size` different questions to train on, none of which `held_out` gives for 1,500 or fewer.

    Args:
        task: one of `TASKS`.
        seed: of the questions; 0 or more.
    """
    name, order = task.split(", ")
    if name == MISSING_WORDS:
        return _rows(_missing_words(for_training=True, size=size, seed=seed), order)
    source, parts_of = SOURCES[name]
    rows = tasks.training(source, size, seed, tasks.held_out(source, MOST_HELD_OUT))
    answers = sorted(set(rows["answer"]))
    return _rows((parts_of(row, answers) for row in rows), order)


MOST_HELD_OUT = 1500
"""Questions of a task that no training sample may be among."""


def _rows(parts: Iterable[Parts], order: str) -> Dataset:
    return Dataset.from_list([each.row(order) for each in parts])


def _missing_words(for_training: bool, size: int, seed: int) -> list[Parts]:
    """Sentences in a random order, those for training apart from the others by their text."""
    own = [sentence for sentence in sentences() if (crc32(sentence.encode()) % 2 == 0) == for_training]
    generator = random.Random(seed)
    generator.shuffle(own)
    found = []
    for sentence in own:
        parts = without_a_word(sentence, generator)
        if parts is not None:
            found.append(parts)
        if len(found) == size:
            return found
    raise ValueError(f"Python's docstrings have only {len(found)} sentences of this kind. Ask for fewer than {size}.")


def without_a_word(sentence: str, generator: random.Random) -> Parts | None:
    """The sentence with one of its words missing, and four words to choose from; `None` if no word is fit."""
    fit = [match for match in re.finditer(r"\b[a-z]+\b", sentence) if len(match.group()) >= LETTERS]
    fit = [match for match in fit if match.end() < len(sentence) - 1]  # the last word has nothing behind it
    if not fit:
        return None
    match = generator.choice(fit)
    word = match.group()
    others = [other for other in vocabulary()[len(word)] if other not in sentence.lower().split()]
    if len(others) < CHOICES - 1:
        return None
    choices = [word, *generator.sample(others, CHOICES - 1)]
    generator.shuffle(choices)
    asked = f"Which word is missing: {', '.join(choices[:-1])} or {choices[-1]}?"
    return Parts(f"{sentence[: match.start()]}{BLANK}{sentence[match.end() :]}", asked, tuple(choices), word, word)


@cache
def sentences() -> tuple[str, ...]:
    """Sentences of plain prose in the docstrings and the reference of this Python, each once."""
    found: set[str] = set()
    for text in (*topics.values(), *_docstrings()):
        for paragraph in re.split(r"\n\s*\n", text):
            found.update(filter(_is_prose, re.split(r"(?<=[.])\s+(?=[A-Z])", " ".join(paragraph.split()))))
    return tuple(sorted(found))


@cache
def vocabulary() -> dict[int, tuple[str, ...]]:
    """The words that occur in three sentences or more, by their number of letters."""
    count: dict[str, int] = defaultdict(int)
    for sentence in sentences():
        for word in set(re.findall(r"\b[a-z]+\b", sentence)):
            count[word] += 1
    by_length: dict[int, list[str]] = defaultdict(list)
    for word in sorted(word for word, times in count.items() if times >= 3):
        by_length[len(word)].append(word)
    return {length: tuple(words) for length, words in by_length.items()} | dict.fromkeys(
        set(map(len, count)) - set(by_length), ()
    )


def _docstrings() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        if NOT_PROSE & set(file.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""


def _is_prose(sentence: str) -> bool:
    return len(sentence.split()) in WORDS and re.fullmatch(r"[A-Z][A-Za-z ,'\"()`-]+\.", sentence) is not None
