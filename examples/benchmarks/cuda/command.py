"""The cases of `gpu.py` in their order, and what becomes of their results."""

from __future__ import annotations

import argparse
import gc
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import peft
import torch
import transformers
from transformers import PreTrainedModel

from benchmarks.cuda import exactness, generation, profiles, steps
from benchmarks.cuda.models import make_model
from benchmarks.cuda.tables import TABLES, tables
from benchmarks.cuda.timing import Budget, BudgetSpentError, attempt
from benchmarks.measuring import write_json
from benchmarks.report import Result

MODELS = ("llama-1b", "gemma-1b", "llama-3b", "gemma-3b")

LARGE = ("llama-3b", "gemma-3b")
"""Measured in fewer cases, and not compared with the three passes."""

EXACT_LAYERS = 6
"""Layers to compare with the three passes: the fewest in which Gemma has one with full attention."""


@dataclass(frozen=True)
class Case:
    """Contenders that are measured side by side.

    Attributes:
        section: the table that it belongs to.
        shape: its name in that table.
        measure: for the seconds that it may take, a result for each contender.
    """

    section: str
    model: str
    shape: str
    measure: Callable[[float], list[Result]]

    def described(self, results: Sequence[Result]) -> list[Result]:
        names = {"section": self.section, "model": self.model, "shape": self.shape}
        return [{**names, **result} for result in results]

    def without_results(self, reason: str) -> list[Result]:
        return self.described([{"contender": "all", "failure": reason}])


class Models:
    """Keeps the model that was made last, because the cases of a model follow each other."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.made: dict[str, PreTrainedModel] = {}

    def get(self, name: str) -> PreTrainedModel:
        if name not in self.made:
            self.clear()
            self.made[name] = make_model(name, self.dtype, self.device)
        return self.made[name]

    def clear(self) -> None:
        """Makes room for other models."""
        self.made.clear()
        gc.collect()


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """All cases, model by model, the most important ones first. A model is made when its first case is measured."""
    models = Models(torch.device(arguments.device), getattr(torch, arguments.dtype))
    for name in arguments.models:
        large = name in LARGE
        lengths = arguments.lengths[len(arguments.lengths) // 2 :][:1] if large else arguments.lengths
        if not large:
            yield from exactness_cases(models, name, arguments)
        for length in lengths:
            yield training_case(models, name, length, arguments)
            yield training_case(models, name, length, arguments, checkpointing=True)
        yield unequal_case(models, name, max(lengths), arguments)
        yield from generation_cases(models, name, arguments, ["dynamic"] if large else list(generation.CACHES))
        yield profile_case(models, name, lengths[len(lengths) // 2], arguments)


def exactness_cases(models: Models, name: str, arguments: argparse.Namespace) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):

        def measure(_: float, dtype: torch.dtype = dtype) -> list[Result]:
            models.clear()  # these cases make smaller models of their own
            return exactness.exactness(name, dtype, models.device, arguments.attention, EXACT_LAYERS)

        yield Case("exactness", name, str(dtype).removeprefix("torch."), measure)


def training_case(
    models: Models, name: str, length: int, arguments: argparse.Namespace, checkpointing: bool = False
) -> Case:
    def measure(allowance: float) -> list[Result]:
        base = models.get(name)
        documents = steps.equal_documents(base, length, arguments.tokens)
        return steps.training_steps(base, documents, steps.EQUAL, checkpointing, arguments.rounds, allowance)

    return Case("training", name, f"T {length}" + (", checkpointing" if checkpointing else ""), measure)


def unequal_case(models: Models, name: str, longest: int, arguments: argparse.Namespace) -> Case:
    def measure(allowance: float) -> list[Result]:
        base = models.get(name)
        documents = steps.unequal_documents(base, longest, arguments.tokens)
        return steps.training_steps(base, documents, steps.UNEQUAL, False, arguments.rounds, allowance)

    return Case("training", name, f"T up to {longest}", measure)


def generation_cases(models: Models, name: str, arguments: argparse.Namespace, caches: Sequence[str]) -> Iterator[Case]:
    prompt, tokens, rounds = arguments.prompt, arguments.new_tokens, arguments.rounds

    def prefill(allowance: float) -> list[Result]:
        return generation.prefill(models.get(name), prompt, rounds, allowance)

    yield Case("prefill", name, f"{prompt} tokens", prefill)
    for cache in caches:

        def decoding(allowance: float, cache: str = cache) -> list[Result]:
            return generation.decoding(models.get(name), cache, prompt, tokens, rounds, allowance)

        yield Case("decoding", name, f"{cache} cache", decoding)


def profile_case(models: Models, name: str, length: int, arguments: argparse.Namespace) -> Case:
    def measure(_: float) -> list[Result]:
        base = models.get(name)
        return profiles.profiles(base, steps.equal_documents(base, length, arguments.tokens))

    return Case("profile", name, f"T {length}", measure)


def run_all(planned: Sequence[Case], budget: Budget, keep: Callable[[list[Result]], None]) -> list[Result]:
    """Measures the cases in their order, and hands all results to `keep` after each. The budget may end any of them."""
    results: list[Result] = []
    for number, case in enumerate(planned):
        print(f"{budget.left:4.0f} s left  {case.section}, {case.model}, {case.shape}", file=sys.stderr)
        allowance = budget.left / (len(planned) - number)
        try:
            budget.check()
            with budget.enforced():
                found, failure = attempt(lambda case=case, allowance=allowance: case.measure(allowance))
            results += case.without_results(failure) if found is None else case.described(found)
        except BudgetSpentError:
            results += case.without_results("not measured: the budget is spent")
        keep(results)
    return results


def machine(arguments: argparse.Namespace) -> Result:
    """What the results are to be read with."""
    on_cuda = torch.device(arguments.device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_cuda else f"CPU ({platform.machine()})",
        "cuda": torch.version.cuda if on_cuda else None,
        "dtype": arguments.dtype,
        "tokens": arguments.tokens,
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
        "attention": arguments.attention,
    }


def headline(about: Result) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"{about['device']}, {about['dtype']}, about {about['tokens']} tokens in a step; {versions}"


def write(arguments: argparse.Namespace, results: list[Result]) -> None:
    """Writes the JSON, and the tables beside it."""
    about = machine(arguments)
    write_json(arguments.json, [{"machine": about, "results": results}])
    arguments.json.with_suffix(".md").write_text(f"# {headline(about)}\n\n{tables(results)}\n")


def parse_arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="shapes of `cuda/models.py`, names or paths")
    parser.add_argument("--sections", nargs="+", choices=TABLES, default=list(TABLES), help="tables to fill")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the frozen weights")
    parser.add_argument("--attention", nargs="+", help="implementations to compare; all that are installed by default")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="tokens of a row")
    parser.add_argument("--tokens", type=int, default=4096, help="of a training step, about")
    parser.add_argument("--prompt", type=int, default=2000, help="tokens of the prompt that is read and gone on with")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to decode in a round")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count, at most")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all of it")
    parser.add_argument("--json", type=Path, default=Path("outputs/gpu.json"), help="the results; tables beside it")
    arguments = parser.parse_args()
    if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available; `--device cpu --models llama-toy` tries the command on a CPU")
    arguments.attention = arguments.attention or exactness.implementations()
    return arguments


def main(description: str) -> None:
    """Measures, prints and writes everything that the command line asks for."""
    arguments = parse_arguments(description)
    budget = Budget(arguments.budget)
    planned = [case for case in cases(arguments) if case.section in arguments.sections]
    results = run_all(planned, budget, partial(write, arguments))
    print(f"\n{headline(machine(arguments))}\n\n{tables(results)}\n\nwritten: {arguments.json}")
