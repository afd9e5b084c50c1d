"""Exactness: logits and gradients of each attention implementation beside the literal three passes.

The reference is `three-pass` with eager attention in float32, on the same weights. In float32 an implementation may
differ from it by `TOLERANCE`. In bfloat16 rounding alone makes a difference: that of `three-pass` in bfloat16 is the
*floor*, and an implementation may differ by `SLACK` times as much.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import transformers.utils
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from benchmarks.cuda.models import make_model, sharing_weights
from benchmarks.cuda.timing import attempt
from benchmarks.measuring import lora_config
from benchmarks.report import Result
from benchmarks.training import Document, padded
from bitune_plugin import BituneConfig
from bitune_plugin.checks.exactness import difference
from bitune_plugin.modeling.backends import FLASH
from three_pass import ThreePass

TOLERANCE = 1e-4
"""In float32, as a share of the largest entry: sums of another order."""

SLACK = 3.0
"""In bfloat16: the kernels round at other places."""

LENGTHS = ((48, 32), (37, 9), (64, 63), (21, 1))
"""Tokens and prompt of each document; unequal, so that masks matter."""

Numbers = dict[str, Tensor]
"""`logits` of all answers `[n, vocabulary]`, and gradients of `adapters` and of `theta`, each in one row."""


def implementations() -> list[str]:
    """`sdpa`, `flex_attention` and whichever flash attention is installed for this machine."""
    return ["sdpa", "flex_attention", *(name for name in FLASH if _is_installed(name))]


def _is_installed(flash: str) -> bool:
    check = getattr(transformers.utils, f"is_{flash.replace('attention', 'attn')}_available", None)
    return check is not None and check()


def exactness(
    name: str, dtype: torch.dtype, device: torch.device, attentions: Sequence[str], layers: int
) -> list[Result]:
    """A result for each implementation; flash attention is left out in float32, which it does not compute in."""
    base = make_model(name, dtype, device, layers)
    documents = random_documents(base, LENGTHS)
    weights = with_random_adapters(base, "sdpa")
    expected = literal(copy.deepcopy(base).float(), weights, documents)
    floor = None if dtype == torch.float32 else errors(literal(base, weights, documents), expected)
    results = []
    for attention in attentions:
        if "flash" in attention and dtype == torch.float32:
            continue
        found, failure = attempt(lambda attention=attention: errors(product(base, attention, documents), expected))
        results.append({"contender": attention, "failure": failure, **(judged(found, floor) if found else {})})
    return results


def judged(found: dict[str, float], floor: dict[str, float] | None) -> Result:
    """The errors of an implementation, their floor, and whether they are within the limits."""
    allowed = {kind: TOLERANCE if floor is None else max(SLACK * floor[kind], TOLERANCE) for kind in found}
    within = all(error <= allowed[kind] for kind, error in found.items())  # False where an error is NaN
    return {"errors": found, "floor": floor, "exact": within}


def errors(found: Numbers, expected: Numbers) -> dict[str, float]:
    return {kind: difference(found[kind], expected[kind]) for kind in expected}


def product(base: PreTrainedModel, attention: str, documents: Sequence[Document]) -> Numbers:
    """Of Bitune, in one padded batch."""
    model = with_random_adapters(base, attention).train()
    batch = padded(documents)
    logits = model(**batch.inputs, prompt_mask=batch.prompt_mask, use_cache=False).logits
    rows = zip(logits, documents, strict=True)
    answers = [row[d.prompt_length - 1 : len(d.tokens)] for row, d in rows]
    summed_loss(answers, documents).backward()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return numbers(answers, [(name, p, p) for name, p in sorted(trained)])


def literal(base: PreTrainedModel, weights: PeftModel, documents: Sequence[Document]) -> Numbers:
    """Of the three literal passes with eager attention, document by document."""
    model = ThreePass(base, lora_config(), attention="eager").to(base.device)
    model.load_product(weights)
    answers = [model(d.tokens, d.prompt_length) for d in documents]
    summed_loss(answers, documents).backward()
    counterpart = {id(theirs): mine for mine, theirs in model.pairs(weights)}
    trained = [(name, p) for name, p in weights.named_parameters() if p.requires_grad]
    return numbers(answers, [(name, p, counterpart[id(p)]) for name, p in sorted(trained)])


def summed_loss(answers: Sequence[Tensor], documents: Sequence[Document]) -> Tensor:
    """Cross-entropy of all completion tokens, from the logits of each answer."""
    pairs = zip(answers, documents, strict=True)
    return sum(cross_entropy(logits[:-1].float(), d.completion, reduction="sum") for logits, d in pairs)


def numbers(answers: Sequence[Tensor], trained: Sequence[tuple[str, Tensor, Tensor]]) -> Numbers:
    """From the logits of each answer, and for each trained parameter its name, itself, and what holds its gradient."""
    gradients: dict[str, list[Tensor]] = {"adapters": [], "theta": []}
    for name, parameter, holder in trained:
        # What comes last in the bidirectional stream makes no difference, and has a gradient of 0 or none.
        gradient = torch.zeros_like(parameter) if holder.grad is None else holder.grad
        # Theta apart, because its gradients are far larger and would hide the others.
        gradients["theta" if "theta_" in name else "adapters"].append(gradient.float().flatten())
    logits = torch.cat([answer.detach().float() for answer in answers])
    return {"logits": logits, **{kind: torch.cat(parts) for kind, parts in gradients.items()}}


def with_random_adapters(base: PreTrainedModel, attention: str) -> PeftModel:
    """A Bitune model whose two streams differ, always with the same weights."""
    model = sharing_weights(base)
    model.set_attn_implementation(attention)
    adapted = get_peft_model(model, BituneConfig(adapter=lora_config()))
    randomise(adapted)
    return adapted


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name or "theta_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            start, scale = (0.01, 0.005) if "theta_" in name else (0.0, parameter.shape[-1] ** -0.5)
            parameter.data.copy_(start + scale * (noise if "lora_B" not in name else 0.1 * noise))


def random_documents(base: PreTrainedModel, lengths: Sequence[tuple[int, int]]) -> list[Document]:
    """Documents of random tokens with the given numbers of tokens and of prompt tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, base.config.vocab_size - 5, (length,), generator=generator) for length, _ in lengths]
    return [Document(row.to(base.device), prompt) for row, (_, prompt) in zip(rows, lengths, strict=True)]
