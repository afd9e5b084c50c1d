"""An experiment: does Bitune learn from fewer samples if its bidirectional adapter is warmed up without labels?

    python examples/evidence/warm_up.py                    # all that has no result yet; stop and start it at any time
    python examples/evidence/warm_up.py --tasks short_path_star --seeds 0 --samples 256

Bitune starts behind LoRA, because half of the keys and values come from full attention, which the model was never
trained for. Before the usual training, the bidirectional adapter is trained on the prompts of the same samples, alone:

* `none`: no warm-up, what Bitune does; taken from the curves of `run.py` where they have run;
* `distil`: the last hidden states under full attention are to be those of the base model under causal attention;
* `mntp`: masked next-token prediction, as in LLM2Vec (arXiv 2404.05961): some tokens are replaced by one that says
  nothing, and each is predicted from the state of the token before it.

Causal adapter and theta stay as they are. It does not count as training samples, but it takes about as long as they do.
`mntp` helped on two tasks over three seeds, so it is a setting of the trainer: `BituneSFTConfig(warmup_prompts=...)`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

# In place of this file's own folder, so that the examples beside it are found.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.report import markdown
from evidence import run
from evidence.experiment import CURVE, CURVE_MODEL, FAMILIES, METHODS, PATHS, Run, lora, share
from evidence.rivals import additive
from pretrained import resolve

RESULTS = Path(__file__).parent / "warm_up"

METHOD = "Bitune r=8"
RATE = 1e-3
"""Bitune's, of the warm-up too."""

MASKED = 0.2
"""Share of the tokens that `mntp` predicts, as in LLM2Vec."""

Loss = Callable[[PeftModel, Tensor, Tensor], Tensor]
"""Of a batch: the model with one plain adapter, tokens `[B, T]`, and bool `[B, T]`, False for padding."""


def hidden_states(model: PeftModel, tokens: Tensor, attended: Tensor, full: bool) -> Tensor:
    """The last hidden states with full or with causal attention: `[B, T]` to `[B, T, H]`."""
    causal_lm = model.get_base_model()
    mask = attended.long()
    if full:
        itself = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)  # for padding
        mask = additive((attended[:, None, :] | itself)[:, None], causal_lm.dtype)
    return causal_lm.model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state


def distillation(model: PeftModel, tokens: Tensor, attended: Tensor) -> Tensor:
    """Squared distance of the states under full attention from the base model's under causal attention, as a share of
    the latter's square: 0 if they are the same, 1 if all are 0."""
    with torch.no_grad(), model.disable_adapter():
        target = hidden_states(model, tokens, attended, full=False)[attended].float()
    found = hidden_states(model, tokens, attended, full=True)[attended].float()
    return (found - target).square().mean() / target.square().mean()


def masked_prediction(replacement: int) -> Loss:
    """Cross-entropy of the tokens that were replaced, each from the state of the token before it."""

    def loss(model: PeftModel, tokens: Tensor, attended: Tensor) -> Tensor:
        replaced = choose_tokens(attended)
        states = hidden_states(model, tokens.masked_fill(replaced, replacement), attended, full=True)
        logits = model.get_base_model().lm_head(states[:, :-1][replaced[:, 1:]]).float()
        return cross_entropy(logits, tokens[replaced])

    return loss


def choose_tokens(attended: Tensor) -> Tensor:
    """A share of `MASKED` of the tokens, at random, one at least; never the first of a row, which has none before it,
    nor padding. bool `[B, T]` to `[B, T]`."""
    fit = attended.clone()
    fit[:, 0] = False
    scores = torch.rand(attended.shape, device=attended.device).masked_fill(~fit, 2.0)
    chosen = scores < MASKED
    chosen.view(-1)[scores.argmin()] |= fit.any()
    return chosen


def warm_up(
    base: PreTrainedModel, prompts: Sequence[list[int]], loss_of: Loss, batch_size: int = run.BATCH_SIZE
) -> tuple[PeftModel, list[float]]:
    """Trains a plain adapter like one of Bitune's streams, each prompt once.

    Returns:
        The model with the adapter, and the loss of each step.
    """
    model = get_peft_model(base, lora(8)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    losses = []
    for start in range(0, len(prompts), batch_size):
        rows = [torch.tensor(prompt, device=base.device) for prompt in prompts[start : start + batch_size]]
        attended = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).bool()
        loss = loss_of(model, pad_sequence(rows, batch_first=True), attended)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


@torch.no_grad()
def move_to_bidirectional(plain: PeftModel, bitune: PeftModel) -> None:
    """Copies a plain adapter into the bidirectional stream of a Bitune model.

    Raises:
        ValueError: the two have not the same weights.
    """
    theirs = {n.replace(".default.", ".bidirectional.default."): p for n, p in plain.named_parameters() if "lora_" in n}
    ours = {n: p for n, p in bitune.named_parameters() if ".bidirectional." in n}
    if theirs.keys() != ours.keys():
        raise ValueError(
            f"The adapters differ in {sorted(theirs.keys() ^ ours.keys())[:3]}. Use one LoRA config for both."
        )
    for name, parameter in ours.items():
        parameter.copy_(theirs[name])


def losses_by_kind(tokenizer: PreTrainedTokenizerBase) -> dict[str, Loss | None]:
    """What each kind of warm-up minimises. LLM2Vec uses `_` where a tokenizer has no mask token, and so does this."""
    [replacement, *_] = tokenizer("_", add_special_tokens=False).input_ids
    return {"none": None, "distil": distillation, "mntp": masked_prediction(replacement)}


KINDS = ("none", "distil", "mntp")


def execute(one: Run, kind: str, device: str) -> dict[str, Any]:
    """Warms up, trains and scores, as `run.execute` does without the first."""
    transformers.set_seed(one.seed)
    tokenizer = AutoTokenizer.from_pretrained(resolve(one.model))
    samples, splits = run.samples_and_splits(one)
    loss_of = losses_by_kind(tokenizer)[kind]
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = run.make_trainer(one, samples, tokenizer, device, folder)
        if loss_of is not None:
            base = AutoModelForCausalLM.from_pretrained(
                resolve(one.model), dtype=torch.bfloat16, attn_implementation="eager" if device == "cpu" else "sdpa"
            ).to(device)
            plain, losses = warm_up(base, [tokenizer(prompt).input_ids for prompt in samples["prompt"]], loss_of)
            move_to_bidirectional(plain, trainer.model)
            del base, plain
        transformers.set_seed(one.seed)  # so that training is the same with every kind
        method = METHODS[one.method]
        scoring = run.ScoreAt(
            one.samples, lambda: {n: run.score(trainer.model, tokenizer, asked, method) for n, asked in splits.items()}
        )
        trainer.add_callback(scoring)
        trainer.train()
    return {"points": scoring.points, "warm_up_losses": [round(loss, 4) for loss in losses]}


def file_of(one: Run, kind: str) -> Path:
    sizes = "-".join(map(str, one.samples))
    return RESULTS / Path(one.model).name / one.task / f"{kind}_{sizes}_seed{one.seed}.json"


def points_of(one: Run, kind: str) -> list[dict[str, Any]] | None:
    """The scores of a run on its way, `None` if it has not run. Without a warm-up, a run is one of Bitune's curves."""
    file = file_of(one, kind)
    if file.exists():
        return json.loads(file.read_text())["points"]
    curve = replace(one, samples=CURVE).result() if kind == "none" else None
    return curve and [point for point in curve["points"] if point["samples"] in one.samples]


def wanted(arguments: argparse.Namespace) -> Iterator[tuple[Run, str]]:
    for seed, task, kind in product(arguments.seeds, arguments.tasks, arguments.kinds):
        yield Run(arguments.model, task, METHOD, RATE, seed, tuple(arguments.samples)), kind


def table(arguments: argparse.Namespace) -> str:
    """Right answers in percent, seed by seed, after each number of samples."""
    rows = []
    for one, kind in wanted(arguments):
        points = points_of(one, kind)
        if points is not None:
            rows.append([one.task, kind, str(one.seed), *(f"{100 * share(point['test']):.1f}" for point in points)])
    return markdown(["task", "warm-up", "seed", *map(str, arguments.samples)], sorted(rows))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=CURVE_MODEL)
    parser.add_argument("--tasks", nargs="+", default=[FAMILIES, PATHS])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--samples", nargs="+", type=int, default=[256, 512], help="after which to score; all are trained on"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    for one, kind in wanted(arguments):
        if points_of(one, kind) is None:
            file = file_of(one, kind)
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(execute(one, kind, arguments.device), indent=1) + "\n")
            unfinished.rename(file)
            print(f"done: {file.relative_to(RESULTS)}")
    print(table(arguments))


if __name__ == "__main__":
    main()
