"""lm-eval's model `bitune`: its scores are those of `LiteralScorer`, whatever way they are asked for."""

from __future__ import annotations

import json
import random
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from statistics import mean
from tempfile import mkdtemp
from typing import Any

import lm_eval
import pytest
import torch
import transformers
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from bitune_plugin import BituneLM
from bitune_plugin.integrations.lm_eval import TASKS
from bitune_plugin.integrations.lm_eval.scoring import Request, Score, batch_of, rows_of, scores_of
from helpers import bitune, lora, one, with_oracle
from literal_scorer import LiteralScorer
from models import ARCHITECTURES, WORDS, tiny, word_tokenizer
from word_tasks import CHOICE, GENERATE, ROLLING, STEPS, STOP, words, write_tasks
from zoo import tiny_of

Pair = tuple[str, str]
"""Context and continuation."""

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Saved:
    """A base model and an adapter in folders, with the scorer that tells their scores."""

    base: str
    adapter: str
    scorer: LiteralScorer

    def model(self, **arguments: Any) -> BituneLM:
        return BituneLM(**{"pretrained": self.base, "peft": self.adapter, "device": "cpu", **arguments})

    @property
    def arguments(self) -> dict[str, str]:
        return {"pretrained": self.base, "peft": self.adapter}


def save(folder: Path, base: transformers.PreTrainedModel | None = None, **settings: Any) -> Saved:
    (base or tiny()).save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    # Read again, so that the adapter knows where its base is.
    model, oracle = with_oracle(AutoModelForCausalLM.from_pretrained(folder / "base"), **settings)
    model.save_pretrained(folder / "adapter")
    return Saved(str(folder / "base"), str(folder / "adapter"), LiteralScorer(oracle, word_tokenizer()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(tmp_path_factory.mktemp("saved"))


def ready(
    architecture: str | transformers.PreTrainedModel = "llama", **settings: Any
) -> tuple[PeftModel, LiteralScorer]:
    model, oracle = with_oracle(architecture, **settings)
    return model, LiteralScorer(oracle, word_tokenizer())


# Words, so that a test names tokens: `text(3, 4)` is "w3 w4".


def text(*numbers: int) -> str:
    return " ".join(WORDS[number] for number in numbers)


def pairs(contexts: int = 5, continuations: int = 4, seed: int = 0, fewest: int = 1) -> list[Pair]:
    """Contexts of `fewest` to 12 words, each with continuations of 1 to 6, all in no order."""
    source = random.Random(seed)
    pairs = []
    for _ in range(contexts):
        context = words(source, fewest, 12)
        pairs += [(context, " " + words(source, 1, 6)) for _ in range(continuations)]
    source.shuffle(pairs)
    return pairs


def instances(kind: str, arguments: Sequence[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=0) for args in arguments]


def loglikelihood(lm: Any, requests: Sequence[Pair]) -> list[Score]:
    return lm.loglikelihood(instances("loglikelihood", requests))


def rolling(lm: Any, texts: Sequence[str]) -> list[float]:
    return lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in texts]))


def generate(lm: Any, contexts: Sequence[str], **settings: Any) -> list[str]:
    return lm.generate_until(instances("generate_until", [(context, dict(settings)) for context in contexts]))


def assert_scores(got: Sequence[Score], expected: Sequence[Score], tolerance: float = TOLERANCE) -> None:
    assert [value for value, _ in got] == pytest.approx([value for value, _ in expected], abs=tolerance)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]


def assert_right(lm: Any, scorer: LiteralScorer, requests: Sequence[Pair]) -> None:
    assert_scores(loglikelihood(lm, requests), [scorer.loglikelihood(*request) for request in requests])


# --- Tasks, as the harness runs them ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def evaluate(saved: Saved, tasks: Path) -> Callable[..., dict[str, Any]]:
    def run(model_args: Any = None, model: Any = "bitune", **settings: Any) -> dict[str, Any]:
        return lm_eval.simple_evaluate(
            model=model,
            model_args=saved.arguments if model_args is None else model_args,
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            **{"tasks": [CHOICE, GENERATE, ROLLING], "device": "cpu", "bootstrap_iters": 0, **settings},
        )

    return run


@pytest.fixture(scope="module")
def evaluated(evaluate: Callable[..., dict[str, Any]]) -> Callable[[str, int | str], dict[str, Any]]:
    """Results of one of `WAYS`, made once for each batch size."""
    return cache(lambda way, batch_size: evaluate(batch_size=batch_size, **WAYS[way]))


def assert_every_sample_right(results: dict[str, Any], scorer: LiteralScorer) -> None:
    """Each response is the literal one, and the metrics follow from them."""
    correct = []
    for sample in results["samples"][CHOICE]:
        expected = [scorer.loglikelihood(*pair) for pair in sample["arguments"]]
        assert_scores([response for [response] in sample["resps"]], expected)
        correct.append(max(range(3), key=lambda i, scores=expected: scores[i][0]) == sample["doc"]["gold"])
    assert results["results"][CHOICE]["acc,none"] == pytest.approx(mean(correct))
    for sample in results["samples"].get(GENERATE, []):
        [(context, _)], [[response]] = sample["arguments"], sample["resps"]
        assert response == scorer.generate(context, [STOP], STEPS)
    for sample in results["samples"].get(ROLLING, []):
        [(document,)], [[response]] = sample["arguments"], sample["resps"]
        assert response == pytest.approx(scorer.rolling(document), abs=10 * TOLERANCE)


WAYS = {
    "plain": {},
    "few-shot": {"num_fewshot": 2},
    "chat template": {"apply_chat_template": True},
}


@pytest.mark.parametrize("batch_size", [1, 3, 8, "auto"])
@pytest.mark.parametrize("way", WAYS)
def test_every_score_is_the_literal_one(evaluated: Callable, saved: Saved, way: str, batch_size: int | str) -> None:
    results = evaluated(way, batch_size)

    assert all(len(results["samples"][task]) == 7 for task in (CHOICE, GENERATE, ROLLING))
    assert_every_sample_right(results, saved.scorer)


@pytest.mark.parametrize("multiturn", [True, False])
def test_examples_and_system_instruction_are_part_of_the_prompt(
    evaluate: Callable, saved: Saved, multiturn: bool
) -> None:
    results = evaluate(
        batch_size=3,
        tasks=[CHOICE, GENERATE],
        num_fewshot=2,
        apply_chat_template=True,
        fewshot_as_multiturn=multiturn,
        system_instruction=text(5, 6),
    )

    assert_every_sample_right(results, saved.scorer)
    for sample in results["samples"][GENERATE]:
        [(context, _)] = sample["arguments"]
        assert context.startswith("system w5 w6 <eos> user ")
        assert context.endswith(f"{sample['doc']['question']} <eos> assistant ")
        assert context.count("assistant") == (3 if multiturn else 1)


def test_examples_are_no_turns_of_an_adapter_that_reads_turns_apart(evaluate: Callable) -> None:
    """lm-eval passes a conversation as one text. In one message they are part of the prompt."""
    model, (_, scorer) = bitune(multi_turn="alternate"), ready()  # of the same weights
    settings = {"batch_size": 3, "tasks": [CHOICE, GENERATE], "num_fewshot": 2, "apply_chat_template": True}
    lm = BituneLM(model, tokenizer=word_tokenizer(), device="cpu")
    with pytest.raises(ValueError, match=r"turn by turn.*`--fewshot_as_multiturn false`.*`--num_fewshot 0`"):
        evaluate(model=lm, **settings)
    assert_every_sample_right(evaluate(model=lm, **settings, fewshot_as_multiturn=False), scorer)


def test_examples_and_templates_change_the_scores(evaluated: Callable) -> None:
    """The tests above would show little otherwise."""
    seen = {str([sample["resps"] for sample in evaluated(way, 1)["samples"][CHOICE]]) for way in WAYS}
    assert len(seen) == len(WAYS)


def test_the_scores_are_neither_those_of_one_causal_reading_nor_of_the_base_model(
    evaluate: Callable, evaluated: Callable, saved: Saved
) -> None:
    def scores(sample: dict[str, Any], prompt_tokens: int | None) -> list[float]:
        encode = saved.scorer.tokenizer.encode
        given = [(encode(context), encode(continuation)) for context, continuation in sample["arguments"]]
        return [
            saved.scorer.loglikelihood_of_tokens(c[:prompt_tokens], c[prompt_tokens:] + a)[0]
            - saved.scorer.loglikelihood_of_tokens(c[:prompt_tokens], c[prompt_tokens:])[0]
            for c, a in given
            if len(c) > prompt_tokens
        ]

    sample = max(evaluated("plain", 1)["samples"][CHOICE], key=lambda s: len(s["arguments"][0][0]))
    got = [response[0] for [response] in sample["resps"]]
    causal = scores(sample, prompt_tokens=1)
    base = evaluate({"pretrained": saved.base}, model="hf", tasks=[CHOICE])["samples"][CHOICE]
    of_base = next(s for s in base if s["doc"] == sample["doc"])
    assert min(abs(a - b) for a, b in zip(got, causal, strict=True)) > 0.01
    assert min(abs(a - b[0]) for a, [b] in zip(got, of_base["resps"], strict=True)) > 0.01


def test_a_ready_model_object_is_evaluated(evaluate: Callable, saved: Saved) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved.base), saved.adapter)
    results = evaluate(model=BituneLM(model, tokenizer=word_tokenizer(), batch_size=3))
    assert_every_sample_right(results, saved.scorer)


def test_a_part_of_the_documents_is_evaluated(evaluate: Callable, saved: Saved) -> None:
    few = evaluate(limit=2, batch_size="auto:3")
    assert [len(samples) for samples in few["samples"].values()] == [2, 2, 2]
    assert_every_sample_right(few, saved.scorer)

    chosen = evaluate(tasks=[CHOICE], samples={CHOICE: [5, 1]})
    assert sorted(sample["doc_id"] for sample in chosen["samples"][CHOICE]) == [1, 5]
    assert_every_sample_right(chosen, saved.scorer)


def test_without_samples_the_metrics_are_the_same(evaluate: Callable, evaluated: Callable) -> None:
    assert evaluate(log_samples=False)["results"] == evaluated("plain", 1)["results"]


# --- The command line -------------------------------------------------------------------------------------------------


def run(launcher: list[str], saved: Saved, tasks: Path, output: Path, *settings: str) -> Path:
    """The real command, in a process that imports nothing of Bitune's; the folder of its results."""
    command = [*launcher, "-m", "lm_eval", "--model", "bitune", "--device", "cpu", "--log_samples"]
    command += ["--model_args", f"pretrained={saved.base},peft={saved.adapter}", "--include_path", str(tasks)]
    command += ["--tasks", f"{CHOICE},{GENERATE},{ROLLING}", "--output_path", str(output), *settings]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    [file] = output.rglob("results_*.json")
    (file.parent / "log").write_text(result.stderr)
    return file.parent


def read_results(folder: Path) -> dict[str, Any]:
    [file] = folder.glob("results_*.json")
    return json.loads(file.read_text())


def read_samples(folder: Path, task: str) -> list[dict[str, Any]]:
    """Each with its arguments as tuples and its responses, in the order of the documents."""
    [file] = folder.glob(f"samples_{task}_*.jsonl")
    samples = map(json.loads, file.read_text().splitlines())
    for sample in (samples := sorted(samples, key=lambda sample: sample["doc_id"])):
        sample["arguments"] = [tuple(given.values()) for given in sample["arguments"].values()]
    return samples


FEW_SHOT_CHAT = ("--num_fewshot", "1", "--apply_chat_template", "--batch_size", "3")


@pytest.fixture(scope="module")
def from_command_line(saved: Saved, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run([sys.executable], saved, tasks, tmp_path_factory.mktemp("alone"), *FEW_SHOT_CHAT)


@pytest.mark.slow
def test_every_score_of_the_command_line_is_the_literal_one(from_command_line: Path, saved: Saved) -> None:
    results = read_results(from_command_line)
    results["samples"] = {task: read_samples(from_command_line, task) for task in (CHOICE, GENERATE, ROLLING)}
    for sample in [*results["samples"][CHOICE], *results["samples"][ROLLING]]:
        sample["resps"] = [[_unquoted(response)] for [response] in sample["resps"]]

    assert_every_sample_right(results, saved.scorer)


def _unquoted(response: Any) -> Any:
    """lm-eval writes numbers in responses as strings."""
    if isinstance(response, list):
        return float(response[0]), response[1] in (True, "True")
    return float(response)


def _number(response: Any) -> float:
    """The likelihood in a response."""
    return float(response[0] if isinstance(response, list) else response)


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(
    from_command_line: Path, saved: Saved, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `accelerate launch --cpu --num_processes 2` starts a single process (accelerate 1.15).
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    folder = run(launcher, saved, tasks, tmp_path, *FEW_SHOT_CHAT)

    one, two = read_results(from_command_line), read_results(folder)
    for task in (CHOICE, GENERATE, ROLLING):
        numbers = {name: value for name, value in one["results"][task].items() if isinstance(value, float)}
        assert {name: two["results"][task][name] for name in numbers} == pytest.approx(numbers, rel=1e-4)
        here, there = read_samples(from_command_line, task), read_samples(folder, task)
        assert [sample["arguments"] for sample in here] == [sample["arguments"] for sample in there]
        # Not `resps`: to keep the processes in step, the harness asks the last request of one again.
        answers = [[sample["filtered_resps"] for sample in samples] for samples in (here, there)]
        if task == GENERATE:
            assert answers[0] == answers[1]
        else:
            flat = [torch.tensor([_number(x) for sample in samples for x in sample]) for samples in answers]
            torch.testing.assert_close(flat[1], flat[0], atol=TOLERANCE, rtol=TOLERANCE)
    assert one["n-samples"] == two["n-samples"]
    # Three choices of seven documents; in the first of two processes, of four.
    assert [requests_of_first_process(folder) for folder in (from_command_line, folder)] == [21, 12]


def requests_of_first_process(folder: Path) -> int:
    """As its progress bar counted them."""
    log = (folder / "log").read_text()
    return max(int(total) for total in re.findall(r"Running loglikelihood requests: 100%.*?/(\d+) \[", log))


def test_the_results_record_adapter_config_and_alpha(from_command_line: Path, saved: Saved) -> None:
    record = read_results(from_command_line)["config"]["bitune"]

    assert record["adapter"] == saved.adapter
    assert record["config"]["mixing"] == "abs"
    assert record["config"]["adapter"]["r"] == 4
    for kind in ("key", "value"):
        thetas = getattr(saved.scorer.model, f"theta_{kind}")
        expected = [[(abs(t) / (abs(t) + 0.01)).item() for t in theta] for theta in thetas]
        assert record["alpha"][kind] == [pytest.approx(layer, abs=1e-6) for layer in expected]


def test_the_record_tells_adapters_apart(saved: Saved, tmp_path: Path) -> None:
    other = shutil.copytree(saved.adapter, tmp_path / "other")
    weights = load_file(other / "adapter_model.safetensors")
    name = next(name for name in weights if name.endswith("theta_key"))
    weights[name] += 1e-3
    model = saved.model().model
    model.load_state_dict({name.replace("theta_key", "theta_key.default.weight"): weights[name]}, strict=False)
    model.save_pretrained(other)

    records = [saved.model(peft=peft).get_model_info()["bitune"] for peft in (saved.adapter, str(other))]
    assert records[0]["adapter_sha256"] != records[1]["adapter_sha256"]
    assert records[0]["alpha"] != records[1]["alpha"]


def test_the_record_of_a_ready_model_names_its_adapter() -> None:
    model, _ = ready(mixing_granularity="head")
    record = BituneLM(model, tokenizer=word_tokenizer()).get_model_info()["bitune"]
    assert record["adapter"] == "default"
    assert json.loads(json.dumps(record)) == record
    assert [len(alpha) for alpha in record["alpha"]["key"]] == [2, 2, 2]


# --- What is prompt ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm(saved: Saved) -> BituneLM:
    return saved.model(batch_size=4)


def test_the_same_tokens_score_differently_where_the_boundary_differs_and_both_right(
    lm: BituneLM, saved: Saved
) -> None:
    short, long = (text(1), " " + text(2, 3)), (text(1, 2), " " + text(3))
    both = loglikelihood(lm, [short, long])

    assert_scores(both, [saved.scorer.loglikelihood(*short), saved.scorer.loglikelihood(*long)])
    # The probability of w3 after w1 w2, with w2 in the answer and in the prompt.
    within_answer = both[0][0] - saved.scorer.loglikelihood(text(1), text(2))[0]
    assert abs(within_answer - both[1][0]) > 0.01


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_text_is_scored_right_wherever_its_prompt_ends(lm: BituneLM, saved: Saved, cut: int) -> None:
    numbers = range(20, 28)
    everywhere = [(text(*numbers[:end]), " " + text(*numbers[end:])) for end in range(1, 8)]
    assert_right(lm, saved.scorer, [*everywhere[cut:], *everywhere[:cut]])


def test_continuations_of_all_lengths_and_repeated_requests_are_scored_right(lm: BituneLM, saved: Saved) -> None:
    requests = pairs()
    assert_right(lm, saved.scorer, [*requests, *requests[::-1], requests[0]])


def test_continuations_that_begin_alike_do_not_see_each_other(lm: BituneLM, saved: Saved) -> None:
    continuations = [(), (5,), (5, 6), (6, 5), (5, 6, 7), (7, 7, 7)]
    assert_right(lm, saved.scorer, [(text(1, 2, 3), " " + text(4, *rest)) for rest in continuations])


def test_an_empty_context_is_plainly_causal(lm: BituneLM, saved: Saved) -> None:
    requests = [("", text(4, 5, 6)), ("", text(4)), ("", "<bos> " + text(4, 5)), (text(4), " " + text(5))]
    got = loglikelihood(lm, requests)
    assert_scores(got[:2], [saved.scorer.loglikelihood("", continuation) for _, continuation in requests[:2]])
    assert got[0][0] == pytest.approx(rolling(lm, [text(4, 5, 6)])[0], abs=TOLERANCE)
    assert got[2][0] == pytest.approx(rolling(lm, [text(4, 5)])[0], abs=TOLERANCE)


def test_an_empty_context_begins_with_the_token_asked_for(saved: Saved) -> None:
    [got] = loglikelihood(saved.model(prefix_token_id=9), [("", text(4, 5))])
    assert_scores([got], [saved.scorer.loglikelihood_of_tokens([9], saved.scorer.tokenizer.encode(text(4, 5)))])


def test_rolling_texts_are_scored_with_the_causal_adapter_alone(lm: BituneLM, saved: Saved) -> None:
    texts = [words(random.Random(i), 1, 40) for i in range(6)]
    expected = [saved.scorer.rolling(document) for document in texts]
    assert rolling(lm, [*texts, ""]) == pytest.approx([*expected, 0], abs=TOLERANCE)


@pytest.mark.parametrize("length", [1, 6, 7, 8, 14, 15, 20])
def test_a_rolling_text_longer_than_the_model_takes_is_read_in_windows(saved: Saved, length: int) -> None:
    document = words(random.Random(length), length, length)
    scorer = LiteralScorer(saved.scorer.model, saved.scorer.tokenizer, max_length=7)
    for batch_size in (1, 3):
        lm = saved.model(max_length=7, batch_size=batch_size)
        assert rolling(lm, [document, text(1)])[0] == pytest.approx(scorer.rolling(document), abs=TOLERANCE)


@pytest.mark.parametrize("max_length", [4, 7, 9, 10])
def test_what_is_too_long_is_cut_on_the_left_and_the_boundary_stays(saved: Saved, max_length: int) -> None:
    requests = [(text(*range(10, 10 + prompt)), " " + text(*range(40, 44))) for prompt in range(1, 9)]
    requests += [(text(*range(10, 18)), " " + text(40))]
    scorer = LiteralScorer(saved.scorer.model, saved.scorer.tokenizer, max_length)
    assert_right(saved.model(max_length=max_length, batch_size=4), scorer, requests)


def test_contexts_that_differ_only_in_what_is_cut_are_scored_alike(saved: Saved) -> None:
    long = [(text(first, *range(10, 18)), " " + text(40, 41)) for first in (1, 2)]
    one, other = loglikelihood(saved.model(max_length=6), long)
    assert one == other


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(lm: BituneLM, saved: Saved) -> None:
    assert_right(lm, saved.scorer, [(text(1, 2) + "  ", text(3)), (text(1, 2) + "\n", text(3, 4))])


@pytest.mark.parametrize("add_bos_token", [None, False])
def test_a_tokenizer_that_begins_texts_with_a_token_puts_it_into_the_prompt(
    saved: Saved, add_bos_token: bool | None
) -> None:
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    lm = saved.model(tokenizer=tokenizer, add_bos_token=add_bos_token, batch_size=3)
    begin = [] if add_bos_token is False else [tokenizer.bos_token_id]
    encode = saved.scorer.tokenizer.encode
    requests = pairs(contexts=3)

    expected = [saved.scorer.loglikelihood_of_tokens(begin + encode(c), encode(a)) for c, a in requests]
    assert_scores(loglikelihood(lm, requests), expected)
    beginning = "<bos> " if begin else ""
    contexts = [context for context, _ in requests]
    answers = [saved.scorer.generate(beginning + context, [], 4) for context in contexts]
    assert generate(lm, contexts, max_gen_toks=4) == answers


def test_order_and_batch_size_do_not_matter(saved: Saved) -> None:
    requests = pairs(contexts=6, seed=3)
    expected = dict(zip(requests, loglikelihood(saved.model(batch_size=1), requests), strict=True))
    for batch_size in (2, 5, "auto", "auto:3"):
        random.Random(str(batch_size)).shuffle(requests)
        got = loglikelihood(saved.model(batch_size=batch_size), requests)
        assert_scores(got, [expected[request] for request in requests])


# --- Generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_generated_answers_are_those_of_each_prompt_alone(saved: Saved, batch_size: int | str) -> None:
    contexts = [words(random.Random(i), 1, 12) for i in range(7)]
    got = generate(saved.model(batch_size=batch_size), contexts, until=["w5", "w8"], max_gen_toks=9)
    assert got == [saved.scorer.generate(context, ["w5", "w8"], 9) for context in contexts]


def test_a_generation_that_is_too_long_loses_the_left_of_its_prompt(saved: Saved) -> None:
    scorer = LiteralScorer(saved.scorer.model, saved.scorer.tokenizer, max_length=10)
    contexts = [text(*range(10, 10 + length)) for length in (3, 6, 9, 12)]
    lm = saved.model(max_length=10, batch_size=4)
    assert generate(lm, contexts, until=[], max_gen_toks=5) == [scorer.generate(c, [], 5) for c in contexts]


def test_requests_with_different_settings_are_generated_as_asked(lm: BituneLM, saved: Saved) -> None:
    context = text(1, 2, 3)
    requests = [(context, {"until": [], "max_gen_toks": n}) for n in (1, 4, 2)]
    got = lm.generate_until(instances("generate_until", requests))
    assert got == [saved.scorer.generate(context, [], n) for n in (1, 4, 2)]


# --- How often a context is read --------------------------------------------------------------------------------------


@contextmanager
def rows_seen(lm: BituneLM) -> Iterator[list[tuple[int, ...]]]:
    """Collects the prompts that go into the backbone, by their tokens."""
    seen: list[tuple[int, ...]] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        for ids, prompt in zip(kwargs["input_ids"], kwargs["prompt_mask"], strict=True):
            seen.append(tuple(ids[prompt].tolist()))

    handle = lm.model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_each_context_goes_through_the_backbone_once(saved: Saved, batch_size: int) -> None:
    requests = pairs(fewest=2)
    lm = saved.model(batch_size=batch_size)
    with rows_seen(lm) as seen:
        loglikelihood(lm, [*requests, *requests[:7]])
    contexts = {tuple(saved.scorer.tokenizer.encode(context)) for context, _ in requests}
    assert Counter(seen) == Counter(contexts)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_batch_size_counts_contexts(saved: Saved, batch_size: int) -> None:
    lm = saved.model(batch_size=batch_size)
    with memory_for(lm) as sizes:
        loglikelihood(lm, pairs(contexts=6, fewest=2))
    assert sizes == [batch_size] * (6 // batch_size)


def test_a_context_counts_twice_and_each_continuation_its_own_tokens(saved: Saved) -> None:
    lm = saved.model()
    tokens = []
    layer = lm.model.get_base_model().model.layers[0]
    layer.register_forward_pre_hook(lambda module, args, kwargs: tokens.append(args[0].shape[:2]), with_kwargs=True)
    loglikelihood(lm, [(text(*range(9)), " " + text(*range(n))) for n in (1, 3, 5)])
    assert tokens == [(1, 9 + 8 + 0 + 2 + 4)]


def test_contexts_of_several_tasks_are_read_once(evaluate: Callable, saved: Saved, tasks: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load((tasks / f"{CHOICE}.yaml").read_text())
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**settings, "task": name}))
    lm = saved.model(batch_size=3)
    with rows_seen(lm) as seen:
        lm_eval.simple_evaluate(
            lm,
            tasks=["one", "two"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            bootstrap_iters=0,
        )
    assert max(Counter(seen).values()) == 1


def test_without_logits_cache_every_request_is_read_by_itself(saved: Saved) -> None:
    requests = pairs(contexts=3)
    lm = saved.model(logits_cache=False, batch_size=3)
    with rows_seen(lm) as seen:
        assert_right(lm, saved.scorer, [*requests, requests[0]])
    assert len(seen) == len(requests) + 1


def test_the_cache_of_the_harness_is_filled_with_the_same_answers(
    evaluate: Callable, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "cache")
    first = evaluate(use_cache=path, batch_size=3)
    assert_every_sample_right(first, saved.scorer)

    monkeypatch.setattr(BituneLM, "_loglikelihood_tokens", None)
    monkeypatch.setattr(BituneLM, "_model_generate", None)
    again = evaluate(use_cache=path, batch_size=3)
    assert again["results"] == first["results"]
    assert_every_sample_right(again, saved.scorer)


def test_an_interrupted_run_leaves_what_it_scored_in_the_cache(saved: Saved, tmp_path: Path) -> None:
    requests = pairs(contexts=4, fewest=2)
    lm = saved.model(batch_size=1)
    cached = CachingLM(lm, str(tmp_path / "cache.db"))
    calls = []

    def interrupt(module: Any, args: Any, kwargs: Any) -> None:
        calls.append(kwargs)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = lm.model.get_base_model().model.register_forward_pre_hook(interrupt, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        loglikelihood(cached, requests)
    handle.remove()

    with rows_seen(lm) as seen:
        got = loglikelihood(cached, requests)
    assert len(seen) == 2
    assert_scores([tuple(score) for score in got], [saved.scorer.loglikelihood(*pair) for pair in requests])


# --- Rows and batches, by themselves ----------------------------------------------------------------------------------

VOCABULARY = 6


@cache
def imagined(encoded: int, seen: tuple[int, ...]) -> tuple[float, ...]:
    """Logits of a model of which nothing is known but what they may depend on: the tokens seen, and how many of them
    were read both ways."""
    source = random.Random(hash((encoded, seen)))
    return tuple(source.uniform(-2, 2) for _ in range(VOCABULARY))


def imagined_model(
    input_ids: Tensor, attention_mask: Tensor, prompt_mask: Tensor, completion_index: Tensor | None = None
) -> Tensor:
    """Logits of the answers, one row behind the other, as of a model called with `answers_only=True`."""
    completion_index = torch.zeros_like(input_ids) if completion_index is None else completion_index
    answers = []
    for ids, attended, prompt, index in zip(input_ids, attention_mask, prompt_mask, completion_index, strict=True):
        tokens, parts = ids[attended.bool()].tolist(), index[attended.bool()].tolist()
        encoded = max(int(prompt.sum()) - 1, 0)
        assert prompt.tolist() == [i < prompt.sum() for i in range(len(prompt))]
        assert not any(parts[: encoded + 1])
        for last in range(encoded, len(tokens)):
            seen = [token for token, part in zip(tokens[: last + 1], parts, strict=False) if part in (0, parts[last])]
            answers.append(imagined(encoded, tuple(seen)))
    return torch.tensor([answers], dtype=torch.float64)


def score_in_rows(requests: list[Request], max_length: int, share: bool, batch_size: int) -> list[Score]:
    rows = rows_of(requests, max_length, share=share)
    scores: dict[int, Score] = {}
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        asked = [indices for row in batch for indices in row.requests.values()]
        for indices, score in zip(asked, scores_of(batch, imagined_model(**batch_of(batch, "cpu"))), strict=True):
            for index in indices:
                assert index not in scores
                scores[index] = score
    return [scores[index] for index in range(len(requests))]


def score_literally(request: Request, max_length: int) -> Score:
    texts, context, continuation = request
    tokens = (context + continuation)[-(max_length + 1) :]
    boundary = len(tokens) - len(continuation)
    encoded = 0 if texts is None else boundary - 1
    total, greedy = 0.0, True
    for place in range(boundary, len(tokens)):
        logits = torch.tensor(imagined(encoded, tuple(tokens[:place])), dtype=torch.float64)
        total += logits.log_softmax(dim=0)[tokens[place]].item()
        greedy = greedy and logits.argmax() == tokens[place]
    return total, bool(greedy)


def token_lists(most: int) -> st.SearchStrategy[list[int]]:
    # Few tokens, so that contexts agree, and agree in part with continuations.
    return st.lists(st.integers(0, 2), min_size=1, max_size=most)


requests_of_all_kinds = st.lists(
    st.tuples(st.sampled_from([("context", "continuation"), None]), token_lists(6), token_lists(5)), max_size=12
)


@given(requests_of_all_kinds, st.integers(5, 12), st.booleans(), st.integers(1, 5))
def test_every_request_is_scored_once_and_as_if_alone(
    requests: list[Request], max_length: int, share: bool, batch_size: int
) -> None:
    expected = [score_literally(request, max_length) for request in requests]
    assert_scores(score_in_rows(requests, max_length, share, batch_size), expected, tolerance=1e-9)


@given(requests_of_all_kinds, st.integers(5, 12), st.randoms())
def test_the_order_of_requests_does_not_matter(requests: list[Request], max_length: int, source: random.Random) -> None:
    order = list(range(len(requests)))
    source.shuffle(order)
    one = score_in_rows(requests, max_length, share=True, batch_size=2)
    other = score_in_rows([requests[i] for i in order], max_length, share=True, batch_size=3)
    assert_scores(other, [one[i] for i in order], tolerance=1e-9)


@given(requests_of_all_kinds)
def test_a_context_has_one_row_and_a_rolling_window_one_of_its_own(requests: list[Request]) -> None:
    rows = rows_of(requests, max_length=100)
    prompts = [row.context for row in rows if row.context_is_prompt]
    assert Counter(prompts) == Counter({tuple(c) for texts, c, _ in requests if texts is not None and len(c) > 1})
    for row in rows:
        if not row.context_is_prompt:
            assert [len(places) for places in row.requests.values()] == [1]


@given(requests_of_all_kinds, st.integers(5, 9))
def test_no_row_has_more_tokens_than_the_model_takes_twice_over(requests: list[Request], max_length: int) -> None:
    for row in rows_of(requests, max_length):
        assert len(row.context) <= max_length
        assert row.continuation_tokens <= max_length


def test_a_request_made_again_is_scored_once_however_long() -> None:
    requests = [(("c", "a"), [1, 2, 3], [1, 2, 3, 4, 5, 1, 2])] * 3
    [row] = rows_of(requests, max_length=12)
    assert list(row.requests.values()) == [[0, 1, 2]]


def test_rows_that_need_most_come_first() -> None:
    requests = [(("c", "a"), [1] * length, [2]) for length in (2, 5, 3)]
    assert [len(row.context) for row in rows_of(requests, max_length=12)] == [5, 3, 2]


# --- Batch sizes that are found out -----------------------------------------------------------------------------------


@contextmanager
def memory_for(lm: BituneLM, rows: int = 64, tokens: int = 10_000) -> Iterator[list[int]]:
    """Lets the backbone run out of memory on more than `rows`, or `tokens`; the numbers of rows that fitted are
    collected."""
    sizes: list[int] = []

    def allocate(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        size = kwargs["input_ids"].shape[0]
        if size > rows or kwargs["input_ids"].numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        sizes.append(size)

    handle = lm.model.get_base_model().model.register_forward_pre_hook(allocate, with_kwargs=True)
    try:
        yield sizes
    finally:
        handle.remove()


@pytest.mark.parametrize("batch_size", ["auto", "auto:2"])
@pytest.mark.slow
def test_auto_finds_how_many_contexts_fit(saved: Saved, batch_size: str) -> None:
    lm = saved.model(batch_size=batch_size, max_batch_size=5)
    with memory_for(lm, rows=3) as sizes:
        assert_right(lm, saved.scorer, pairs(contexts=8, continuations=2))
        documents = [words(random.Random(i), 3, 9) for i in range(8)]
        assert rolling(lm, documents) == pytest.approx([saved.scorer.rolling(d) for d in documents], abs=TOLERANCE)
        assert generate(lm, documents, max_gen_toks=3) == [saved.scorer.generate(d, [], 3) for d in documents]
    assert max(sizes) == 3


def test_auto_measures_with_the_longest_request(saved: Saved) -> None:
    lm = saved.model(batch_size="auto", max_batch_size=5)
    documents = [text(*range(length)) for length in (2, 9, 5, 9, 9, 9, 9)]
    with memory_for(lm, tokens=40):
        assert_right(lm, saved.scorer, [(document, " " + text(5)) for document in documents])
        assert rolling(lm, documents) == pytest.approx([saved.scorer.rolling(d) for d in documents], abs=TOLERANCE)
        assert generate(lm, documents, max_gen_toks=3) == [saved.scorer.generate(d, [], 3) for d in documents]


def test_auto_does_not_exceed_the_given_maximum(saved: Saved) -> None:
    lm = saved.model(batch_size="auto", max_batch_size=2)
    with memory_for(lm) as sizes:
        assert_right(lm, saved.scorer, pairs(contexts=5, continuations=2))
    assert max(sizes) == 2


@pytest.mark.parametrize("count", [1, 2, 4, 40])
def test_auto_may_be_found_out_again_and_again(saved: Saved, count: int) -> None:
    """`auto:10` asks ten times, however many contexts there are and however many fit."""
    lm = saved.model(batch_size="auto:10", max_batch_size=8)
    requests = [(text(i, i + 1), " " + text(5)) for i in range(count)]
    assert_right(lm, saved.scorer, requests)


def test_auto_leaves_room_for_the_answers_of_every_batch(saved: Saved) -> None:
    """The row that costs most has a long context and short answers; others have the answers, and the head works on
    answers only."""
    lm = saved.model(batch_size="auto", max_batch_size=8)
    head = lm.model.get_base_model().lm_head

    def allocate(module: Any, args: tuple[Tensor]) -> None:
        if args[0].shape[0] * args[0].shape[1] > 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    requests = [(text(*range(40)), " " + text(1))]
    requests += [(text(first, 1), " " + text(*range(n, n + 6))) for first in range(8) for n in range(3)]
    head.register_forward_pre_hook(allocate)
    assert_right(lm, saved.scorer, requests)


@pytest.mark.parametrize("batch_size", [2, "auto"])
def test_nothing_asked_is_nothing_answered(saved: Saved, batch_size: int | str) -> None:
    lm = saved.model(batch_size=batch_size)
    assert loglikelihood(lm, []) == rolling(lm, []) == generate(lm, []) == []


# --- Arguments of the stock model -------------------------------------------------------------------------------------


QUIRKY = ("bloom", "deepseek_v3", "gemma4_text", "llama4_text", "mpt", "opt")


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *QUIRKY])
def test_architectures_score_like_three_passes(architecture: str) -> None:
    """Among them models with sliding windows of 5 tokens, in all layers and in some; and one, MPT, whose rows take one
    completion each."""
    adapter = lora(exclude_modules=["router"]) if architecture == "llama4_text" else None
    base = tiny_of(architecture) if architecture in QUIRKY else tiny(architecture)
    model, scorer = ready(base, adapter=adapter)
    lm = BituneLM(model, tokenizer=word_tokenizer(), batch_size=3)
    assert_right(lm, scorer, pairs(contexts=4))
    contexts = [words(random.Random(i), 1, 12) for i in range(4)]
    assert generate(lm, contexts, max_gen_toks=5) == [scorer.generate(context, [], 5) for context in contexts]
    assert rolling(lm, contexts) == pytest.approx([scorer.rolling(context) for context in contexts], abs=TOLERANCE)


@pytest.mark.parametrize(
    "settings",
    [
        {"mixing": "none"},
        {"mixing": "relu"},
        {"share_adapter": True},
        {"second_pass_attention": "causal"},
        {"second_pass_attention": "anticausal"},
        {"mixing_granularity": "head"},
        {"mixing_granularity": "model"},
    ],
    ids=str,
)
def test_ablations_score_like_three_passes(settings: dict[str, Any]) -> None:
    model, scorer = ready(**settings)
    lm = BituneLM(model, tokenizer=word_tokenizer(), batch_size=3)
    assert_right(lm, scorer, pairs(contexts=3))
    assert json.dumps(lm.get_model_info()["bitune"]["alpha"])


def skip_where_the_stock_model_fails(saved: Saved, arguments: dict[str, Any]) -> None:
    """lm-eval 0.4.10 and accelerate 1.10 put all of a model on the disk where there is no GPU, and then refuse it."""
    if "parallelize" in arguments:
        try:
            HFLM(pretrained=str(saved.base), device="cpu", **{"offload_folder": mkdtemp(), **arguments})
        except ValueError as error:
            pytest.skip(f"The stock model fails: {error}")


@pytest.mark.parametrize(
    ("arguments", "tolerance"),
    [
        ({"softmax_dtype": "float64"}, TOLERANCE),
        ({"dtype": "float32"}, TOLERANCE),
        ({"dtype": "bfloat16"}, 0.6),
        ({"dtype": "bfloat16", "softmax_dtype": "float32"}, 0.6),
        ({"mixed_precision_dtype": "bfloat16"}, 0.6),
        ({"attn_implementation": "eager"}, TOLERANCE),
        ({"trust_remote_code": True, "use_fast_tokenizer": False}, TOLERANCE),
        ({"parallelize": True, "max_cpu_memory": "5GiB"}, TOLERANCE),
        ({"device_map": "cpu"}, TOLERANCE),
        ({"revision": "v2"}, TOLERANCE),
        ({"backend": "causal"}, TOLERANCE),
    ],
    ids=str,
)
def test_arguments_of_the_stock_model_are_taken(saved: Saved, arguments: dict[str, Any], tolerance: float) -> None:
    skip_where_the_stock_model_fails(saved, arguments)
    lm = saved.model(**arguments, batch_size=3)
    requests = pairs(contexts=3)
    got = [value for value, _ in loglikelihood(lm, requests)]
    assert got == pytest.approx([saved.scorer.loglikelihood(*pair)[0] for pair in requests], abs=tolerance)
    assert isinstance(generate(lm, [text(1, 2)], max_gen_toks=2)[0], str)


def test_dtypes_reach_the_model_and_its_scores(saved: Saved) -> None:
    half = saved.model(dtype="bfloat16")
    assert half.model.get_input_embeddings().weight.dtype == torch.bfloat16
    [(value, _)] = loglikelihood(half, [(text(1, 2), " " + text(3))])
    assert torch.tensor(value).bfloat16().item() == value
    [(fine, _)] = loglikelihood(saved.model(softmax_dtype="float64"), [(text(1, 2), " " + text(3))])
    assert torch.tensor(fine, dtype=torch.float64).float().item() != fine
    mixed = saved.model(mixed_precision_dtype="bfloat16")
    assert mixed.model.get_input_embeddings().weight.dtype == torch.float32
    [(value, _)] = loglikelihood(mixed, [(text(1, 2), " " + text(3))])
    assert abs(value - fine) > TOLERANCE


def test_arguments_may_come_as_a_string(evaluate: Callable, saved: Saved) -> None:
    results = evaluate(f"pretrained={saved.base},peft={saved.adapter},max_length=64,dtype=float32", tasks=[CHOICE])
    assert_every_sample_right(results, saved.scorer)


def test_arguments_of_the_chat_template_reach_it(saved: Saved) -> None:
    lm = saved.model(
        chat_template_args={"add_generation_prompt_word": "w9", "enable_thinking": False}, enable_thinking=False
    )
    lm.tokenizer.chat_template = "{{ add_generation_prompt_word }} {{ enable_thinking }} {{ messages[0]['content'] }}"
    assert lm.apply_chat_template([{"role": "user", "content": "w1"}]) == "w9 False w1"


# --- Where base, adapter and tokenizer are ----------------------------------------------------------------------------


def test_an_adapter_alone_finds_its_base(evaluate: Callable, saved: Saved) -> None:
    results = evaluate({"pretrained": saved.adapter}, batch_size=3)
    assert_every_sample_right(results, saved.scorer)
    assert results["config"]["bitune"]["adapter"] == saved.adapter


def test_an_adapter_alone_comes_with_its_tokenizer_if_it_has_one(saved: Saved, tmp_path: Path) -> None:
    own = word_tokenizer()
    own.chat_template = "own {{ messages[0]['content'] }}"
    adapter = shutil.copytree(saved.adapter, tmp_path / "adapter")
    own.save_pretrained(adapter)

    alone = BituneLM(str(adapter), device="cpu")
    with_base = saved.model(peft=str(adapter))
    chosen = BituneLM(str(adapter), tokenizer=saved.base, device="cpu")
    templates = [lm.tokenizer.chat_template for lm in (alone, with_base, chosen)]
    assert templates == [own.chat_template, word_tokenizer().chat_template, word_tokenizer().chat_template]


def test_the_tokenizer_of_an_adapter_is_read_at_the_revision_of_the_adapter(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = shutil.copytree(saved.adapter, tmp_path / "adapter")
    word_tokenizer().save_pretrained(adapter)
    change_config(adapter, revision="of-the-base")
    read = []
    load = transformers.AutoTokenizer.from_pretrained

    def spy(name: str, *args: Any, **kwargs: Any) -> Any:
        read.append((str(name), kwargs.get("revision")))
        return load(name, *args, **kwargs)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", spy)
    BituneLM(str(adapter), revision="of-the-adapter", device="cpu")
    assert read == [(str(adapter), "of-the-adapter")]


def test_base_and_adapter_may_be_elsewhere_than_when_it_was_trained(saved: Saved, tmp_path: Path, caplog: Any) -> None:
    moved = shutil.copytree(saved.base, tmp_path / "base")
    assert_right(saved.model(pretrained=str(moved)), saved.scorer, pairs(contexts=2))
    assert "was trained on" not in caplog.text

    renamed = shutil.copytree(saved.base, tmp_path / "another")
    assert_right(saved.model(pretrained=str(renamed)), saved.scorer, pairs(contexts=2))
    assert f"The adapter was trained on {saved.base}" in caplog.text


# --- Embeddings that were trained, tokens that were added -------------------------------------------------------------


def train_embeddings(folder: Path, adapter: dict[str, Any], tied: bool, rows: int | None = None) -> PeftModel:
    """A model with embeddings trained in some way, after they grew to `rows`; its base and its adapter are saved."""
    tiny(tie_word_embeddings=tied).save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    if rows is not None:
        base.resize_token_embeddings(rows)
    model = bitune(base, lora(**adapter))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("modules_to_save" in name or "trainable_tokens" in name):
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "adapter")
    return model


def forward_score(model: PeftModel, prompt: list[int], answer: list[int]) -> Score:
    """One request in a forward pass of its own."""
    with torch.no_grad():
        logits = model(**one(torch.tensor(prompt + answer), len(prompt))).logits[0, len(prompt) - 1 : -1]
    predicted = logits.log_softmax(dim=-1)
    total = sum(row[token].item() for row, token in zip(predicted, answer, strict=True))
    return total, predicted.argmax(dim=-1).tolist() == answer


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "adapter",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"trainable_token_indices": [7, 8]},
    ],
    ids=["fully trained", "LoRA", "LoRA of the head", "single tokens"],
)
def test_trained_embeddings_count(adapter: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    model = train_embeddings(tmp_path, adapter, tied)
    expected = [forward_score(model, [6, 7, 8], [9, 10]), forward_score(model, [7, 8], [8])]
    requests = [(text(0, 1, 2), " " + text(3, 4)), (text(1, 2), " " + text(2))]

    loaded = BituneLM(str(tmp_path / "base"), peft=str(tmp_path / "adapter"), device="cpu")
    assert_scores(loglikelihood(loaded, requests), expected)
    assert_scores(loglikelihood(BituneLM(model, tokenizer=word_tokenizer()), requests), expected)
    assert_scores([forward_score(model, [6, 7, 8], [9, 10])], expected[:1])


@pytest.mark.parametrize(
    ("adapter", "tied"),
    [
        ({}, False),
        ({}, True),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, True),
        ({"trainable_token_indices": [96, 97, 98]}, False),
        ({"trainable_token_indices": [96, 97, 98]}, True),
    ],
    ids=str,
)
def test_the_vocabulary_grows_with_the_embeddings_of_the_adapter(
    adapter: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    model = train_embeddings(tmp_path, adapter, tied, rows=101)
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["x1", "x2", "x3"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    expected = [forward_score(model, [7, 96, 8], [97, 9]), forward_score(model, [7, 8], [98])]

    for arguments in (
        {"pretrained": str(tmp_path / "adapter")},
        {"pretrained": str(tmp_path / "base"), "peft": str(tmp_path / "adapter"), "tokenizer": tokenizer},
    ):
        lm = BituneLM(**arguments, device="cpu")
        assert lm.model.get_input_embeddings().weight.shape[0] == 101
        assert_scores(loglikelihood(lm, [("w1 x1 w2", " x2 w3"), ("w1 w2", " x3")]), expected)


def test_the_vocabulary_stays_when_the_adapter_brings_no_embeddings(saved: Saved) -> None:
    """The base has 97 rows, its tokenizer 96 tokens; the stock model would drop the last row."""
    lm = saved.model()
    assert len(lm.tokenizer) == 96
    assert lm.model.get_input_embeddings().weight.shape[0] == lm.model.get_output_embeddings().weight.shape[0] == 97


def test_the_vocabulary_stays_when_the_embeddings_of_the_adapter_have_its_size(tmp_path: Path) -> None:
    saved = save(tmp_path, adapter=lora(modules_to_save=["embed_tokens"]))
    lm = saved.model()
    assert lm.model.get_input_embeddings().weight.shape[0] == 97


# --- Refusals ---------------------------------------------------------------------------------------------------------


def change_config(adapter: Path, **fields: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.fixture
def other_adapter(saved: Saved, tmp_path: Path) -> Path:
    return shutil.copytree(saved.adapter, tmp_path / "other")


def test_a_missing_adapter_is_refused_with_the_model_to_use(saved: Saved) -> None:
    with pytest.raises(ValueError, match=r"`peft=` is missing.*pretrained=BASE,peft=ADAPTER.*--model hf"):
        BituneLM(saved.base, device="cpu")
    with pytest.raises(ValueError, match=r"`peft=.*base` holds no adapter_config.json"):
        saved.model(peft=saved.base)


def test_another_kind_of_adapter_is_refused_with_the_model_to_use(saved: Saved, tmp_path: Path) -> None:
    get_peft_model(AutoModelForCausalLM.from_pretrained(saved.base), lora()).save_pretrained(tmp_path)
    message = rf"LORA adapter, not a Bitune adapter.*--model hf --model_args pretrained={saved.base},peft={tmp_path}"
    for arguments in ({"peft": str(tmp_path)}, {"pretrained": str(tmp_path), "peft": None}):
        with pytest.raises(ValueError, match=message):
            saved.model(**arguments)


def test_an_adapter_that_does_not_name_its_base_is_refused_alone(other_adapter: Path, saved: Saved) -> None:
    change_config(other_adapter, base_model_name_or_path=None)
    with pytest.raises(ValueError, match=r"does not name its base model\. Pass both"):
        BituneLM(str(other_adapter), device="cpu")
    assert_right(saved.model(peft=str(other_adapter)), saved.scorer, pairs(contexts=1))


@pytest.mark.parametrize("alone", [True, False])
def test_what_is_wrong_with_a_config_is_said(other_adapter: Path, saved: Saved, alone: bool) -> None:
    change_config(other_adapter, mixing="tanh")
    arguments = {"pretrained": str(other_adapter), "peft": None} if alone else {"peft": str(other_adapter)}
    with pytest.raises(ValueError, match="mixing") as error:
        saved.model(**arguments)
    assert "tanh" in str(error.value)


def test_damaged_weights_are_refused(other_adapter: Path, saved: Saved) -> None:
    weights = other_adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ValueError, match=rf"adapter {other_adapter} cannot be read: .*damaged"):
        saved.model(peft=str(other_adapter))


def test_an_adapter_of_an_unknown_kind_is_refused(other_adapter: Path, saved: Saved) -> None:
    change_config(other_adapter, peft_type="NEW")
    with pytest.raises(ValueError, match=rf"adapter {other_adapter} cannot be read: .*NEW"):
        saved.model(peft=str(other_adapter))


def test_a_base_that_is_partly_on_disk_is_refused_and_left_alone(saved: Saved, tmp_path: Path) -> None:
    """PEFT would write the adapter into the files of the base."""
    base = shutil.copytree(saved.base, tmp_path / "base")
    weights = base / "model.safetensors"
    before = weights.read_bytes()
    settings = {"parallelize": True, "max_cpu_memory": "100KB", "offload_folder": str(tmp_path / "offload")}
    skip_where_the_stock_model_fails(saved, settings)
    with pytest.raises(ValueError, match=rf"`pretrained={base}` fits into memory.*`max_cpu_memory`"):
        saved.model(pretrained=str(base), **settings)
    assert weights.read_bytes() == before


@pytest.mark.parametrize(
    "base",
    [{"hidden_size": 16, "head_dim": 4}, {"num_hidden_layers": 2}, {"num_hidden_layers": 4}],
    ids=["width", "fewer layers", "more layers"],
)
def test_a_base_that_the_adapter_does_not_fit_is_refused(base: dict[str, int], saved: Saved, tmp_path: Path) -> None:
    tiny(**base).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    message = rf"adapter `peft={saved.adapter}` does not fit the base model `pretrained={tmp_path}`"
    with pytest.raises(ValueError, match=message):
        saved.model(pretrained=str(tmp_path))


def test_a_base_of_another_architecture_is_refused(saved: Saved, tmp_path: Path) -> None:
    tiny("gpt_neox").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not fit the base model"):
        saved.model(pretrained=str(tmp_path), tokenizer=word_tokenizer())


def test_models_with_an_encoder_are_refused(saved: Saved, tmp_path: Path) -> None:
    T5ForConditionalGeneration(
        T5Config(vocab_size=97, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"t5 model with an encoder.*--model hf"):
        saved.model(pretrained=str(tmp_path), tokenizer=word_tokenizer())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"delta": "somewhere"}, r"`delta=somewhere`.*cannot be put on together"),
        ({"tp_plan": "auto"}, r"`tp_plan=auto`.*tensor parallelism.*parallelize=True"),
        ({"backend": "seq2seq"}, "is for decoders"),
    ],
    ids=str,
)
def test_what_bitune_cannot_do_is_refused(saved: Saved, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        saved.model(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"peft": 5}, "`peft=5` must be text"),
        ({"dtype": "foo"}, "`dtype='foo'` is no dtype"),
        ({"dtype": 16}, "`dtype=16` is no dtype"),
        ({"softmax_dtype": "nn"}, "`softmax_dtype='nn'` is no dtype"),
        ({"batch_size": "abc"}, "`batch_size='abc'` must be a whole number"),
        ({"batch_size": 0}, "`batch_size=0` must be"),
        ({"batch_size": -2}, "`batch_size=-2` must be"),
        ({"batch_size": 1.5}, "`batch_size=1.5` must be"),
        ({"batch_size": "auto:x"}, "`batch_size='auto:x'` must be"),
        ({"max_batch_size": "many"}, "`max_batch_size='many'` must be a number"),
        ({"max_length": -1}, "`max_length=-1` must be a whole number"),
        ({"max_length": float("nan")}, "`max_length=nan` must be"),
        ({"trust_remote_code": "maybe"}, "`trust_remote_code='maybe'` must be true or false"),
        ({"logits_cache": [1]}, "`logits_cache=.* must be true or false"),
        ({"chat_template_args": "x"}, "`chat_template_args='x'` must be a mapping"),
        ({"max_lenght": 5}, "`max_lenght=5` is an argument neither.*Did you mean `max_length`"),
        ({"zzz": None}, "`zzz=None` is an argument neither.*Leave it out"),
    ],
    ids=str,
)
def test_arguments_of_a_wrong_kind_or_name_are_named(saved: Saved, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        saved.model(**arguments)
    assert "\n" not in str(error.value)


def test_an_adapter_whose_config_is_nested_too_deeply_is_refused(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": ' + "[" * 100_000)
    with pytest.raises(ValueError, match="cannot be read"):
        saved.model(peft=str(tmp_path))


def test_a_ready_model_is_refused_with_a_second_adapter(saved: Saved) -> None:
    with pytest.raises(ValueError, match=r"`peft=.*` came with a ready model"):
        BituneLM(bitune(), peft=saved.adapter, tokenizer=word_tokenizer())


@pytest.mark.parametrize("model", [lambda: tiny(), lambda: get_peft_model(tiny(), lora())], ids=["bare", "LoRA"])
def test_a_ready_model_without_bitune_is_refused(model: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"without a Bitune adapter.*HFLM"):
        BituneLM(model(), tokenizer=word_tokenizer())


def test_a_ready_model_whose_adapter_is_switched_off_is_refused() -> None:
    model = bitune()
    with model.disable_adapter(), pytest.raises(ValueError, match=r"disabled.*set_adapter"):
        BituneLM(model, tokenizer=word_tokenizer())
    BituneLM(model, tokenizer=word_tokenizer())


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ((text(1, 2), ""), r"The continuation of \('w1 w2', ''\) has no tokens"),
        ((" ", text(1)), "The context of .* has no tokens"),
        ((text(1), " " + text(*range(9))), r"has 9 tokens, and the model takes 8.*max_length"),
    ],
    ids=["no continuation", "no context", "too long"],
)
def test_requests_that_cannot_be_scored_are_refused(saved: Saved, request_: Pair, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loglikelihood(saved.model(max_length=8), [(text(1), " " + text(2)), request_])


# --- Tasks of the paper -----------------------------------------------------------------------------------------------


def own_task(name: str, documents: list[dict[str, Any]], folder: Path) -> ConfigurableTask:
    """One of our tasks, on a local file in place of its dataset."""
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    settings = yaml.safe_load((TASKS / f"{name}.yaml").read_text())
    settings.pop("dataset_name", None)
    files = {settings[f"{split}_split"]: "documents.jsonl" for split in ("training", "validation")}
    if "test_split" in settings:
        files[settings["test_split"]] = "documents.jsonl"
    settings |= {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {split: str(folder / file) for split, file in files.items()},
            "cache_dir": str(folder / "cache"),
        },
    }
    return ConfigurableTask(config=settings)


def manager_of(task: ConfigurableTask) -> TaskManager:
    """One that knows a task that was made by hand: lm-eval 0.4.10 looks for its file to print where it lies."""
    manager = TaskManager(include_defaults=False)
    if not hasattr(manager, "load"):
        manager.task_index[task.config.task] = {"yaml_path": str(TASKS / f"{task.config.task}.yaml")}
    return manager


AWKWARD = 'it\'s a "quote", {{ a brace }} \\ and ünïcode '
"""Text that a template could stumble over."""

ARC = {
    "id": "Mercury_1",
    "question": "Which one melts?",
    "choices": {"text": ["ice", AWKWARD, "iron", "salt"], "label": ["A", "B", "C", "D"]},
    "answerKey": "C",
}
CSQA = {
    "id": "1",
    "question": "Where do fish swim?",
    "question_concept": "fish",
    "choices": {"label": ["A", "B", "C", "D", "E"], "text": ["sea", "tree", "sky", AWKWARD, "sand"]},
    "answerKey": "A",
}
SIQA = {
    "context": "Sasha left.",
    "question": "Why did Sasha do this?",
    "answerA": "to sleep",
    "answerB": AWKWARD,
    "answerC": "to eat",
    "label": "2",
}
PIQA = {"goal": "Open a jar.", "sol1": "Twist the lid.", "sol2": AWKWARD, "label": 1}

EXPECTED = {
    "piqa_full": [
        (
            PIQA,
            f"Question: Open a jar.\n\nChoices:\nTwist the lid.\n{AWKWARD}\n\nAnswer:",
            ["Twist the lid.", AWKWARD],
            1,
        ),
        ({**PIQA, "label": 0}, None, None, 0),
    ],
    "arc_full": [
        (
            ARC,
            f"Question: Which one melts?\n\nChoices:\nice\n{AWKWARD}\niron\nsalt\n\nAnswer:",
            ["ice", AWKWARD, "iron", "salt"],
            2,
        ),
        (
            {**ARC, "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "1"},
            "Question: Which one melts?\n\nChoices:\nx\ny\nz\n\nAnswer:",
            ["x", "y", "z"],
            0,
        ),
    ],
    "csqa_full": [
        (
            CSQA,
            f"Question: Where do fish swim?\n\nChoices:\nsea\ntree\nsky\n{AWKWARD}\nsand\n\nAnswer:",
            ["sea", "tree", "sky", AWKWARD, "sand"],
            0,
        ),
        ({**CSQA, "answerKey": "E"}, None, None, 4),
    ],
    "siqa_full": [
        (
            SIQA,
            "Question: Given the context, answer correctly the question.\nContext: Sasha left.\nQuestion: Why did "
            f"Sasha do this?\n\nChoices:\n(0) to sleep\n(1) {AWKWARD}\n(2) to eat\n\nAnswer:",
            ["(0)", "(1)", "(2)"],
            1,
        ),
        ({**SIQA, "label": "1"}, None, None, 0),
        ({**SIQA, "label": "3"}, None, None, 2),
    ],
}
"""Documents, the prompt, the choices and the right one; `None` for the prompt and choices of the document before."""


@pytest.mark.parametrize("name", EXPECTED)
def test_prompt_choices_and_answer_of_the_papers_tasks(name: str, tmp_path: Path) -> None:
    task = own_task(name, [document for document, *_ in EXPECTED[name]], tmp_path)
    documents = list(task.validation_docs())
    prompt, choices = None, None
    for document, (_, expected_prompt, expected_choices, gold) in zip(documents, EXPECTED[name], strict=True):
        prompt, choices = expected_prompt or prompt, expected_choices or choices
        assert task.doc_to_text(document) == prompt
        assert task.doc_to_choice(document) == choices
        assert task.doc_to_target(document) == gold
        requests = task.construct_requests(document, task.fewshot_context(document, 0))
        asked = requests if isinstance(requests, list) else [requests]
        assert [instance.args for instance in asked] == [(prompt, f" {choice}") for choice in choices]


@pytest.mark.parametrize("name", EXPECTED)
def test_the_papers_tasks_are_scored(name: str, tmp_path: Path, saved: Saved) -> None:
    task = own_task(name, [document for document, *_ in EXPECTED[name]], tmp_path)
    lm = saved.model(batch_size=3)
    results = lm_eval.simple_evaluate(lm, tasks=[task], num_fewshot=1, bootstrap_iters=0, task_manager=manager_of(task))

    golds = [gold for *_, gold in EXPECTED[name]]
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    correct = []
    for sample, gold in zip(samples, golds, strict=True):
        scores = [response[0] for [response] in sample["resps"]]
        correct.append(scores.index(max(scores)) == gold)
        assert sample["arguments"][0][0].count("Answer:") == 2
    assert results["results"][name]["acc,none"] == pytest.approx(mean(correct))


def test_the_papers_tasks_are_found_in_the_folder_that_is_printed(capsys: pytest.CaptureFixture) -> None:
    runpy.run_module("bitune_plugin.integrations.lm_eval", run_name="__main__")
    [folder] = capsys.readouterr().out.splitlines()
    manager = TaskManager(include_path=folder, include_defaults=False)
    assert sorted(manager.all_tasks) == sorted([*EXPECTED, "gsm8k_full"])


def test_the_papers_tasks_are_found_by_entry_point() -> None:
    [entry] = entry_points(group="lm_eval.tasks", name="bitune")
    [folder] = entry.load().__path__
    assert sorted(path.stem for path in Path(folder).glob("*.yaml")) == sorted([*EXPECTED, "gsm8k_full"])


def test_the_model_is_found_by_entry_point() -> None:
    [entry] = entry_points(group="lm_eval.models", name="bitune")
    assert entry.load() is BituneLM
    assert lm_eval.api.registry.get_model("bitune") is BituneLM
