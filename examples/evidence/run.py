"""Trains and scores everything that `experiment.py` lists and that has no result yet.

    python examples/evidence/run.py                  # nearly all; stop it whenever you like, and start it again
    python examples/evidence/run.py rates table      # some of it: rates, table, curves, ablations, rivals
    python examples/evidence/run.py comparison-rates comparison    # days on a CPU, so only if they are named
    python examples/evidence/run.py comparison --tasks "paths, question last"    # of some tasks alone
    python examples/evidence/run.py --jobs 1 --device cuda

Every run leaves one JSON file in `results/`: scores question by question, losses, alpha by layer, and what it took. A
run that was interrupted starts again. `report.py` makes tables and plots of them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

# In place of this file's own folder, so that the examples beside it are found.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import lm_eval
import peft
import torch
import transformers
import trl
from datasets import Dataset
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager, get_task_dict
from peft import PeftModel
from rich.progress import Progress
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTTrainer

from bitune_plugin import BituneConfig, BituneLM, BituneSFTConfig, BituneSFTTrainer
from evidence.choosing import choose
from evidence.comparison import as_read, comparison_rate_runs, comparison_runs, is_compared, tokens_per_sample
from evidence.comparison import samples_and_splits as compared_samples
from evidence.experiment import (
    METHODS,
    RESULTS,
    Method,
    Run,
    ablation_runs,
    curve_runs,
    rate_runs,
    rival_runs,
    table_runs,
)
from evidence.questions import TASKS as COMPARED_TASKS
from evidence.rivals import SegmentEnds, SegmentsLM, additive, check_masks_reach, mas_mask
from pretrained import resolve
from tasks import held_out, training

STAGES: dict[str, Callable[[], Iterator[Run]]] = {
    "rates": rate_runs,
    "table": table_runs,
    "curves": curve_runs,
    "ablations": ablation_runs,
    "rivals": rival_runs,
    "comparison-rates": comparison_rate_runs,
    "comparison": comparison_runs,
}
"""Later ones need the learning rates that `rates` finds, and `comparison` those of `comparison-rates`."""

DAYS = ("comparison-rates", "comparison")
"""Stages that take days on a CPU, and run only if they are named."""

VALIDATION, TEST = 100, 150
"""Questions; no training question is among them."""

BATCH_SIZE = 4
WARM_UP = 10
"""Steps. Then the learning rate stays, so that a run has, on its way, the scores of shorter ones."""

ROOM = 2
"""Tokens to generate beyond the longest answer."""


class AnswersOnlyTrainer(SFTTrainer):
    """TRL's trainer, with the LM head on answers only, as Bitune's has it: the same loss, in a fraction of the time
    where the vocabulary is large."""

    def compute_loss(
        self,
        model: PeftModel,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        causal_lm = model.get_base_model()
        hidden = causal_lm.model(inputs["input_ids"], attention_mask=self.mask_of(causal_lm, inputs)).last_hidden_state
        labels = inputs["labels"][:, 1:]
        answers = labels != -100
        logits = causal_lm.lm_head(hidden[:, :-1][answers]).float()
        loss = nn.functional.cross_entropy(logits, labels[answers], reduction="sum")
        return loss / (answers.sum() if num_items_in_batch is None else num_items_in_batch)

    def mask_of(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        """The `attention_mask` of a batch."""
        return inputs["attention_mask"]


class SegmentsTrainer(AnswersOnlyTrainer):
    """MAS: the same, with full attention within each segment of a prompt."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ends = SegmentEnds(self.processing_class)

    def mask_of(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        tokens, attended = inputs["input_ids"], inputs["attention_mask"].bool()
        check_masks_reach(model, tokens.shape[1])
        segments = self.ends.segments(tokens.cpu()).to(tokens.device)
        return additive(mas_mask(segments, attended & (inputs["labels"] == -100), attended), model.dtype)


class ScoreAt(TrainerCallback):
    """Scores the model on its way."""

    def __init__(self, samples: tuple[int, ...], score: Callable[[], dict[str, Any]]) -> None:
        self.samples, self.score = samples, score
        self.points: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        seen = state.global_step * BATCH_SIZE
        if seen in self.samples:
            model.eval()
            self.points.append({"samples": seen, **self.score()})
            model.train()


def execute(run: Run, device: str, threads: int) -> dict[str, Any]:
    """Trains and scores; returns all that is to be kept."""
    start = time.perf_counter()
    torch.set_num_threads(threads)
    transformers.set_seed(run.seed)
    method, answered = METHODS[run.method], choose if is_compared(run) else score
    samples, splits = compared_samples(run) if is_compared(run) else samples_and_splits(run)
    tokenizer = AutoTokenizer.from_pretrained(resolve(run.model))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(run, samples, tokenizer, device, folder)
        model = trainer.model
        scoring = ScoreAt(
            run.samples, lambda: {name: answered(model, tokenizer, asked, method) for name, asked in splits.items()}
        )
        trainer.add_callback(scoring)
        trainer.train()
    trained, _ = model.get_nb_trainable_parameters()
    return {
        "points": scoring.points,
        "losses": [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry],
        "alphas": alphas(model),
        "trained_parameters": trained,
        "tokens_per_sample": tokens_per_sample(samples, method, tokenizer),
        "seconds": round(time.perf_counter() - start),
        "device": device_name(device),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft, trl, lm_eval)},
    }


def samples_and_splits(run: Run) -> tuple[Dataset, dict[str, Dataset]]:
    """What a run trains on, and the questions that it is scored on, with prompts as it reads them."""
    questions = held_out(run.task, VALIDATION + TEST)
    method = METHODS[run.method]
    samples = as_read(training(run.task, run.samples[-1], run.seed, questions), method)
    questions = as_read(questions, method)
    splits = {"test": questions.select(range(VALIDATION, VALIDATION + TEST))}
    if run in rate_runs():  # whose scores choose the learning rate
        splits["validation"] = questions.select(range(VALIDATION))
    return samples, splits


def make_trainer(
    run: Run,
    samples: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    device: str,
    folder: str,
    stock: type[SFTTrainer] | None = None,
) -> SFTTrainer:
    """The trainer of a run; `stock` is that of what is not Bitune, by default the one for how its method reads."""
    method = METHODS[run.method]
    stock = stock or (SegmentsTrainer if method.reading == "by segments" else AnswersOnlyTrainer)
    is_bitune = isinstance(method.adapter, BituneConfig)
    # Weights in bfloat16, as in the paper; adapters and theta stay float32. Eager attention is the fastest on a CPU.
    model = AutoModelForCausalLM.from_pretrained(
        resolve(run.model), dtype=torch.bfloat16, attn_implementation="eager" if device == "cpu" else "sdpa"
    )
    # Of states that are not contiguous, torch makes a copy of the whole weight for every row, in bfloat16 on a CPU.
    model.lm_head.register_forward_pre_hook(lambda _, states: (states[0].contiguous(),))
    settings = BituneSFTConfig(
        output_dir=folder,
        num_train_epochs=1,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=run.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=WARM_UP,
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_length=None,
        train_sampling_strategy="sequential",  # the samples are drawn at random already
        bf16=False,
        activation_checkpointing=False,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=run.seed,
        **method.training,
    )
    return (BituneSFTTrainer if is_bitune else stock)(
        model,
        args=settings,
        train_dataset=samples.select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
        peft_config=method.new_config(),
    )


def lm_class_of(method: Method) -> type[HFLM]:
    if isinstance(method.adapter, BituneConfig):
        return BituneLM
    return SegmentsLM if method.reading == "by segments" else HFLM


def score(model: PeftModel, tokenizer: PreTrainedTokenizerBase, questions: Dataset, method: Method) -> str:
    """Exact match of the first line of greedy answers by lm-eval, question by question: `1` for a right one.

    Args:
        questions: with prompts as the method reads them.
    """
    lm_class = lm_class_of(method)
    lm = lm_class(pretrained=model, tokenizer=tokenizer, batch_size=50)
    longest = max(map(len, tokenizer(questions["completion"][:], add_special_tokens=False)["input_ids"]))
    with tempfile.TemporaryDirectory() as folder:
        questions.to_json(f"{folder}/questions.jsonl")
        task = {
            "task": "evidence",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": f"{folder}/questions.jsonl"}, "cache_dir": folder},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": longest + ROOM, "do_sample": False},
            "filter_list": [
                {"name": "answer", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
            ],
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
        # Without lm-eval's own tasks, and its look around the machine, which take longer than the answers.
        tasks = get_task_dict([task], TaskManager(include_defaults=False))
        scored = lm_eval.evaluate(lm, tasks, log_samples=True, bootstrap_iters=0)
    in_order = sorted(scored["samples"]["evidence"], key=lambda sample: sample["doc_id"])
    return "".join(str(int(sample["exact_match"])) for sample in in_order)


def alphas(model: PeftModel) -> dict[str, list[list[float]]] | None:
    """By kind and layer, one or one per head; `None` for LoRA."""
    if not isinstance(model.peft_config["default"], BituneConfig):
        return None
    return {
        kind: [[round(alpha, 4) for alpha in layer.tolist()] for layer in layers]
        for kind, layers in model.base_model.alphas().items()
    }


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def in_worker(run: Run, device: str, threads: int) -> None:
    run.save(execute(run, device, threads))


def missing(stage: str, tasks: Sequence[str] = ()) -> list[Run]:
    """Runs of a stage that have no result yet, of all tasks or of some."""
    return [run for run in STAGES[stage]() if run.result() is None and (not tasks or run.task in tasks)]


def run_all(stage: str, arguments: argparse.Namespace) -> None:
    """Runs what a stage still lacks, until what came out asks for no more."""
    while runs := missing(stage, arguments.tasks):
        run_each(stage, runs, arguments)


def run_each(stage: str, runs: Sequence[Run], arguments: argparse.Namespace) -> None:
    """Runs all of `runs`, `--jobs` at a time."""
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with Progress() as progress, ProcessPoolExecutor(arguments.jobs, spawn) as workers:
        futures = {workers.submit(in_worker, run, arguments.device, threads): run for run in runs}
        bar = progress.add_task(stage, total=len(futures))
        try:
            for future in as_completed(futures):
                future.result()
                progress.print(f"done: {futures[future].file.relative_to(RESULTS)}")
                progress.advance(bar)
        except BaseException:  # the executor would first run all that still waits
            workers.shutdown(cancel_futures=True)
            raise


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", default=(), help="of these tasks alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time; one per core by default")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    unknown = set(arguments.stages) - set(STAGES)
    if unknown:
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    known = {run.task for stage in STAGES.values() for run in stage()} | set(COMPARED_TASKS)
    if not known.issuperset(arguments.tasks):
        parser.error(f"unknown task in {arguments.tasks}; there are {', '.join(map(repr, sorted(known)))}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    for stage in arguments.stages or [stage for stage in STAGES if stage not in DAYS]:
        run_all(stage, arguments)


if __name__ == "__main__":
    main()
