"""`examples/benchmarks/gpu.py`: at toy sizes on a CPU, and its clock and memory on a CUDA device made of fakes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models import tiny
from three_pass import _eager_mask

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

from benchmarks.cuda import exactness, timing  # noqa: E402
from benchmarks.cuda.command import Case, main, run_all  # noqa: E402
from benchmarks.cuda.models import make_model, sharing_weights  # noqa: E402
from benchmarks.cuda.profiles import kind_of  # noqa: E402
from benchmarks.cuda.steps import unequal_documents  # noqa: E402
from benchmarks.cuda.tables import tables  # noqa: E402
from benchmarks.cuda.timing import Budget, BudgetSpentError, alternate, memory_of, seconds_of  # noqa: E402

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

TOY = ["--device", "cpu", "--models", "llama-toy", "--attention", "sdpa", "--lengths", "16", "--tokens", "32"]
TOY += ["--prompt", "8", "--new-tokens", "3", "--rounds", "1"]


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, "-W", "ignore", str(ROOT / "examples" / "benchmarks" / "gpu.py"), *map(str, arguments)]
    return subprocess.run(script, capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_fills_all_tables(tmp_path: Path) -> None:
    done = command(*TOY, "--json", tmp_path / "new folder" / "gpu.json")
    assert done.returncode == 0, done.stderr[-3000:]
    [written] = json.loads((tmp_path / "new folder" / "gpu.json").read_text())
    rows = written["results"]
    assert [row["failure"] for row in rows] == [None] * len(rows)
    by_case: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        by_case.setdefault((row["section"], row["shape"]), []).append(row)
    contenders = {case: [row["contender"] for row in own] for case, own in by_case.items()}
    assert contenders == {
        ("exactness", "float32"): ["sdpa"],
        ("exactness", "bfloat16"): ["sdpa"],
        ("training", "T 16"): ["lora", "bitune", "three-pass"],
        ("training", "T 16, checkpointing"): ["lora", "bitune"],
        ("training", "T up to 16"): ["lora", "bitune", "lora packed", "bitune packed", "three-pass"],
        ("prefill", "8 tokens"): ["lora", "bitune"],
        **{("decoding", f"{cache} cache"): ["lora", "bitune"] for cache in ("dynamic", "static", "compiled")},
        ("profile", "T 16"): ["lora", "bitune"],
    }
    assert all(row["exact"] for row in by_case["exactness", "float32"])
    assert [row["tokens"] for row in by_case["training", "T 16"]] == [1, 23 / 16, 23 / 16]
    assert all(sum(row["shares"].values()) == pytest.approx(1) for row in by_case["profile", "T 16"])
    table = (tmp_path / "new folder" / "gpu.md").read_text()
    assert table.split("\n\n", 1)[1].strip() in done.stdout


def test_a_spent_budget_leaves_a_row_for_each_case_that_it_did_not_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--budget", "0", "--sections", "exactness", "profile", "--json", str(tmp_path / "gpu.json")]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *TOY, *options])
    main("")
    [written] = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["section"] for row in written["results"]] == ["exactness", "exactness", "profile"]
    assert {row["failure"] for row in written["results"]} == {"not measured: the budget is spent"}


def test_a_spent_budget_starts_no_case() -> None:
    case = Case("profile", "llama-toy", "T 8", lambda _: pytest.fail("it was started"))
    kept: list[int] = []
    [row] = run_all([case], Budget(0), lambda results: kept.append(len(results)))
    assert (row["contender"], row["failure"], kept) == ("all", "not measured: the budget is spent", [1])


def test_a_case_that_fails_as_a_whole_is_a_row_and_the_next_is_measured() -> None:
    failing = Case("profile", "llama-toy", "T 8", lambda _: [][0])
    whole = Case("profile", "llama-toy", "T 9", lambda allowance: [{"contender": "lora", "failure": None}])
    first, second = run_all([failing, whole], Budget(100), lambda _: None)
    assert first["failure"] == "IndexError: list index out of range"
    assert (second["shape"], second["contender"]) == ("T 9", "lora")


def test_the_budget_ends_what_does_not_end_by_itself() -> None:
    def endless() -> None:
        while True:
            pass

    budget = Budget(0.05)
    with pytest.raises(BudgetSpentError, match=r"0\.05 s"), budget.enforced():
        alternate({"endless": lambda: endless}, 3, 100, CPU)


def test_contenders_run_by_turns_after_warming_up() -> None:
    order: list[str] = []
    makers = {name: lambda name=name: lambda: order.append(name) for name in ("a", "b")}
    outcomes = alternate(makers, 3, 100, CPU)
    assert order[: 2 * timing.WARM_UP] == ["a"] * timing.WARM_UP + ["b"] * timing.WARM_UP
    assert order[2 * timing.WARM_UP :] == ["a", "b", "b", "a", "a", "b"]
    assert [len(outcome.values) for outcome in outcomes.values()] == [3, 3]


def test_rounds_beyond_the_least_need_time() -> None:
    outcomes = alternate({"a": lambda: lambda: None}, 50, 0.0, CPU)
    assert len(outcomes["a"].values) == timing.LEAST_ROUNDS


def broken(at: int, error: Exception) -> Callable[[], None]:
    """Fails in its run number `at`."""
    runs = iter(range(at))

    def run() -> None:
        if next(runs, None) is None:
            raise error

    return run


@pytest.mark.parametrize("at", [0, timing.WARM_UP - 1, timing.WARM_UP + 1])
def test_a_failure_is_a_result_and_the_others_go_on(at: int, capsys: pytest.CaptureFixture[str]) -> None:
    makers = {"broken": lambda: broken(at, ValueError("no such kernel\nmore")), "whole": lambda: lambda: None}
    outcomes = alternate(makers, 3, 100, CPU)
    assert (outcomes["broken"].failure, outcomes["broken"].values) == ("ValueError: no such kernel", [])
    assert (outcomes["whole"].failure, len(outcomes["whole"].values)) == (None, 3)
    assert timing.values_of(outcomes).keys() == {"whole"}
    assert "Traceback" in capsys.readouterr().err


def test_a_contender_without_room_says_so() -> None:
    outcomes = alternate({"large": lambda: broken(0, torch.OutOfMemoryError("CUDA out of memory. Tried"))}, 1, 1, CPU)
    assert outcomes["large"].failure == "out of memory"


class FakeCuda:
    """A device whose every call is written down; a run takes 3 ms and 100 MiB."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.now = 0.0
        self.held, self.peak = 50 * 2**20, 999 * 2**20  # the peak of a contender before
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                fake.calls.append("record")
                self.at = fake.now

            def elapsed_time(self, end: Event) -> float:
                assert fake.calls[-1] == "synchronize"
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: self.calls.append("synchronize"))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: self.held)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: self.peak)

    def reset(self, *_: object) -> None:
        self.calls.append("reset")
        self.peak = self.held

    def run(self) -> None:
        self.calls.append("run")
        self.now += 3.0
        self.peak = max(self.peak, self.held + 100 * 2**20)


def test_times_are_those_of_events_around_a_run_that_begins_on_an_idle_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    assert seconds_of(cuda.run, CUDA) == pytest.approx(0.003)
    assert cuda.calls == ["synchronize", "record", "run", "record", "synchronize"]


def test_memory_is_what_a_run_adds_and_not_the_peak_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    assert memory_of(cuda.run, CUDA) == 100
    assert cuda.calls == ["synchronize", "reset", "run", "synchronize"]


def test_an_implementation_is_exact_within_its_limits() -> None:
    kinds = ("logits", "adapters", "theta")

    def exact(error: float, floor: float | None) -> bool:
        found, of_rounding = dict.fromkeys(kinds, 1e-6) | {"theta": error}, floor and dict.fromkeys(kinds, floor)
        return exactness.judged(found, of_rounding or None)["exact"]

    assert exact(1e-6, None)
    assert not exact(1e-3, None)
    assert not exact(float("nan"), None)
    assert exact(2e-2, 1e-2)
    assert not exact(4e-2, 1e-2)


def test_a_stream_that_is_computed_wrongly_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> list[dict[str, Any]]:
        return exactness.exactness("llama-toy", torch.float32, CPU, ["sdpa", "no such one"], 2)

    right, unknown = rows()
    assert right["exact"]
    assert "no such one" in unknown["failure"]
    shuffled = exactness.product

    def reversed_prompts(base: Any, attention: str, documents: Any) -> Any:
        return shuffled(base, attention, [exactness.Document(d.tokens.flip(0), d.prompt_length) for d in documents])

    monkeypatch.setattr(exactness, "product", reversed_prompts)
    assert not rows()[0]["exact"]


def test_contenders_share_weights_and_no_modules() -> None:
    base = make_model("gemma-toy", torch.bfloat16, CPU)
    copied = sharing_weights(base)
    assert [p.data_ptr() for p in copied.parameters()] == [p.data_ptr() for p in base.parameters()]
    assert not set(map(id, copied.modules())) & set(map(id, base.modules()))
    assert copied.config is not base.config


def test_documents_of_unequal_length_fill_a_step() -> None:
    lengths = [len(document.tokens) for document in unequal_documents(tiny(), 64, 256)]
    assert max(lengths) == lengths[0] == 64
    assert 256 <= sum(lengths) < 256 + 64
    assert len(set(lengths)) > 3


def test_masks_of_the_three_passes_are_where_the_model_is_and_in_its_dtype() -> None:
    embeds = torch.empty(1, 4, 8, device="meta", dtype=torch.bfloat16)
    mask = _eager_mask(lambda i, j: i >= j, past=2, inputs_embeds=embeds)
    assert (mask.device.type, mask.dtype, mask.shape) == ("meta", torch.bfloat16, (1, 1, 4, 6))


@pytest.mark.parametrize(
    ("name", "kind"),
    {
        "nvjet_tst_128x256_64x4_2x1_v_bz_TNT": "matmul",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": "matmul",
        "aten::mm": "matmul",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>": "attention",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy": "copies",
        "void at::native::index_elementwise_kernel<128, 4>": "copies",
        "Memcpy DtoD (Device -> Device)": "copies",
        "void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor>": "other",
    }.items(),
)
def test_kernels_are_told_apart_by_their_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_a_table_shows_targets_and_failures() -> None:
    names = {"section": "prefill", "model": "m", "shape": "8 tokens"}
    timed = {"seconds": 0.1, "fastest": 0.1, "slowest": 0.2, "rounds": 2, "failure": None}
    rows = [
        {**names, **timed, "contender": "lora", "ratio": 1.0, "target": None},
        {**names, **timed, "contender": "bitune", "ratio": 2.5, "target": 2.0},
        {**names, "contender": "other", "failure": "out of memory"},
    ]
    assert tables(rows).splitlines()[4:] == [
        "| m | 8 tokens | lora | 100.0 (100.0-200.0) | 2 | 1.00 |  |",
        "| m | 8 tokens | bitune | 100.0 (100.0-200.0) | 2 | 2.50 (over 2) |  |",
        "| m | 8 tokens | other |  |  |  | out of memory |",
    ]
