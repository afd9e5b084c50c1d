"""The share of matrix products, attention and copies in one training step, by torch's profiler."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from benchmarks.cuda.steps import step_run
from benchmarks.cuda.timing import WARM_UP, attempt, seconds_of
from benchmarks.measuring import Run
from benchmarks.report import Result
from benchmarks.training import Document

CONTENDERS = ("lora", "bitune")

KINDS = {
    "attention": r"flash|fmha|attention|softmax_(?:for|back)ward|flex",
    "matmul": r"gemm|gemv|cutlass|nvjet|cublas|xmma|splitk|aten::(?:mm|bmm|addmm|matmul|linear)$|mkldnn",
    "copies": r"memcpy|memset|copy|catarray|aten::cat$|index|gather|scatter|fill",
}
"""Names of CUDA kernels, and on a CPU of operators, in this order. Eager attention's products count as `matmul`; all
else is `other`: norms, activations, rotary embedding, mixing, the loss, the optimizer."""


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), "other")


def profiles(base: PreTrainedModel, documents: Sequence[Document]) -> list[Result]:
    """A result for each contender: shares of the time of all kernels."""
    results = []
    for contender in CONTENDERS:
        found, failure = attempt(lambda c=contender: profiled(step_run(c, base, documents, False), base.device))
        results.append({"contender": contender, "failure": failure, **(found or {})})
    return results


def profiled(run: Run, device: torch.device) -> Result:
    """Shares of one step. `busy` is the part of its time, without the profiler, in which kernels run: far below 1, the
    device waits for Python to launch them."""
    for _ in range(WARM_UP):
        run()
    seconds = seconds_of(run, device)
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as trace:
        run()
        if on_cuda:
            torch.cuda.synchronize(device)
    by_kind = Counter(dict.fromkeys((*KINDS, "other"), 0.0))
    count = 0
    for event in trace.events():
        if not _counts(event, on_cuda):
            continue
        by_kind[kind_of(event.name)] += event.time_range.elapsed_us() if on_cuda else event.self_cpu_time_total
        count += 1
    total = sum(by_kind.values())
    return {
        "seconds": seconds,
        "shares": {kind: time / total for kind, time in by_kind.items()},
        "kernels": count,
        "busy": total / 1e6 / seconds if on_cuda else None,
    }


def _counts(event: torch.autograd.profiler_util.FunctionEvent, on_cuda: bool) -> bool:
    """Kernels on CUDA, operators on a CPU; no annotations, because they hold kernels that count themselves."""
    if getattr(event, "is_user_annotation", False) or event.name.startswith(("Optimizer.", "ProfilerStep")):
        return False
    return (event.device_type == DeviceType.CUDA) == on_cuda
