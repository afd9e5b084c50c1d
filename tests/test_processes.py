"""Several processes: the configs of `examples/accelerate` train what one process trains.

Every launch is two processes on the CPU, with gloo; each takes half of the batch of one process. FSDP2 is checked with
the config for GPUs, which `processes.py` makes accelerate take on a CPU. DeepSpeed is not among the test dependencies.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from peft import PeftModel
from safetensors.torch import load_file

from models import tiny
from processes import logits, train

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "accelerate"

CHECKPOINTS = {"save_strategy": "steps", "save_steps": 2}

SHORT = {"short_for": 1, "train_sampling_strategy": "sequential"}
"""The second process only ever gets prompts of one token, which are not read twice."""

ALONE: dict[str, dict[str, Any]] = {
    "ours": CHECKPOINTS,
    "stock": {"stock": True},
    "theta clipped apart": {"theta_max_grad_norm": 0.5},
    "samples dropped": {"max_length": 8, "max_steps": 3},  # what is left fills three batches
    "short prompts": SHORT,
}

ON_DDP: dict[str, dict[str, Any]] = {
    **ALONE,
    "checkpointing": {"gradient_checkpointing": True},
    "no search for unused parameters": {"ddp_find_unused_parameters": False},
    "resumed": {**CHECKPOINTS, "resume": "ours/run/checkpoint-2"},
    "resumed from one process": {**CHECKPOINTS, "resume": "../alone/ours/run/checkpoint-2"},
    "bf16": {"bf16": True},
    "short prompts, no search for unused parameters": {**SHORT, "ddp_find_unused_parameters": False},
    "short prompts, warmed up": {**SHORT, "warmup_prompts": 16, "warmup_learning_rate": 0.0},
}

FSDP1 = {
    "FSDP_VERSION": "1",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_SYNC_MODULE_STATES": "false",
    "FSDP_BACKWARD_PREFETCH": "NO_PREFETCH",
}
"""What accelerate's config would set."""

ON_FSDP2: dict[str, dict[str, Any]] = {
    "ours": CHECKPOINTS,
    "stock": {"stock": True},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing by torch": {"environment": {"FSDP_ACTIVATION_CHECKPOINTING": "true"}},
    "resumed": {**CHECKPOINTS, "resume": "ours/run/checkpoint-2"},
    "bf16": {"bf16": True},
    "bf16, read by one process": {"bf16": True, "environment": {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}},
    "bf16 model": {"dtype": "bfloat16"},
    "short prompts": SHORT,
    # Not saved, because torch 2.13 crashes when it gathers the weights of FSDP1 on a CPU, of plain LoRA too.
    "FSDP1": {"saves": False, "environment": FSDP1},
}

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Results:
    return {name: train(folder / "alone" / name, processes=1, **run) for name, run in ALONE.items()}


@pytest.fixture(scope="module")
def launch(folder: Path, alone: Results) -> Callable[[str, Results], Results]:
    """Runs a plan under a config of `examples/accelerate`, in two processes."""

    def run(config: str, plan: Results) -> Results:
        output = folder / config
        output.mkdir()
        for settings in plan.values():
            if "resume" in settings:
                settings["resume"] = str(output / settings["resume"])
        (output / "plan.json").write_text(json.dumps(plan))
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
        # Any free port, as other tests may launch at the same time.
        command += ["--num_processes", "2", "--main_process_port", "0", "--mixed_precision", "no"]
        command += [str(Path(__file__).with_name("support") / "processes.py"), str(output / "plan.json"), str(output)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        results = output / "results.json"
        done_before = json.loads(results.read_text()) if results.exists() else {}
        return {name: done_before.get(name, {"error": done.stderr[-3000:]}) for name in plan}

    return run


@pytest.fixture(scope="module")
def ddp(launch: Callable[..., Results]) -> Results:
    return launch("ddp_cpu", {name: dict(run) for name, run in ON_DDP.items()})


@pytest.fixture(scope="module")
def fsdp2(launch: Callable[..., Results]) -> Results:
    return launch("fsdp2", {name: dict(run) for name, run in ON_FSDP2.items()})


def check_same_run(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same numbers at every step, up to the order of sums."""
    assert "error" not in found, found["error"]
    assert found["processes"] == 2
    assert found["samples"] == expected["samples"]
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], abs=1e-4)
    assert found["alphas"] == pytest.approx(expected["alphas"], abs=1e-4)


def check_saved(adapter: Path, run: dict[str, Any]) -> None:
    """The adapter loads in one process, and gives the logits of the model that was trained in several."""
    loaded = logits(PeftModel.from_pretrained(tiny(), adapter))
    torch.testing.assert_close(loaded, torch.tensor(run["logits"]), atol=1e-5, rtol=0)


def saved_theta_dtypes(adapter: Path) -> set[torch.dtype]:
    return {value.dtype for key, value in load_file(adapter / "adapter_model.safetensors").items() if "theta_" in key}


class TestDDP:
    @pytest.mark.parametrize("name", ["ours", "stock", "theta clipped apart", "samples dropped", "short prompts"])
    def test_trains_as_one_process(self, ddp: Results, alone: Results, name: str) -> None:
        assert ddp[name]["kind"] == "MULTI_CPU"
        check_same_run(ddp[name], alone[name])

    @pytest.mark.parametrize(
        "name", ["checkpointing", "no search for unused parameters", "resumed", "resumed from one process"]
    )
    def test_changes_nothing_when(self, ddp: Results, alone: Results, name: str) -> None:
        check_same_run(ddp[name], alone["ours"])

    def test_needs_no_search_for_unused_parameters_when_a_process_has_nothing_to_read_twice(
        self, ddp: Results, alone: Results
    ) -> None:
        check_same_run(ddp["short prompts, no search for unused parameters"], alone["short prompts"])

    def test_a_warm_up_ends_when_a_process_has_no_token_to_predict(self, ddp: Results, alone: Results) -> None:
        """At a rate of 0 it changes nothing."""
        check_same_run(ddp["short prompts, warmed up"], alone["short prompts"])

    def test_resumed_continues_exactly(self, ddp: Results) -> None:
        assert ddp["resumed"]["losses"] == ddp["ours"]["losses"]

    def test_one_process_goes_on_from_a_checkpoint_of_two(
        self, ddp: Results, alone: Results, folder: Path, tmp_path: Path
    ) -> None:
        checkpoint = folder / "ddp_cpu" / "ours" / "run" / "checkpoint-2"
        resumed = train(tmp_path, processes=1, resume=str(checkpoint))
        assert resumed["losses"] == pytest.approx(alone["ours"]["losses"], abs=1e-5)

    @pytest.mark.parametrize("name", ["ours", "stock"])
    def test_saves_one_adapter(self, ddp: Results, folder: Path, name: str) -> None:
        check_saved(folder / "ddp_cpu" / name, ddp[name])

    def test_keeps_theta_in_float32_beside_bfloat16(self, ddp: Results, folder: Path) -> None:
        assert ddp["bf16"]["theta dtypes"] == ["torch.float32"]
        assert saved_theta_dtypes(folder / "ddp_cpu" / "bf16") == {torch.float32}


class TestFSDP2:
    @pytest.mark.parametrize("name", ["ours", "stock"])
    def test_trains_as_one_process(self, fsdp2: Results, alone: Results, name: str) -> None:
        assert fsdp2[name]["kind"] == "FSDP"
        check_same_run(fsdp2[name], alone[name])

    @pytest.mark.parametrize("name", ["checkpointing", "checkpointing by torch", "resumed", "FSDP1"])
    def test_changes_nothing_when(self, fsdp2: Results, alone: Results, name: str) -> None:
        check_same_run(fsdp2[name], alone["ours"])

    def test_trains_when_a_process_has_nothing_to_read_twice(self, fsdp2: Results, alone: Results) -> None:
        check_same_run(fsdp2["short prompts"], alone["short prompts"])

    def test_resumed_continues_exactly(self, fsdp2: Results) -> None:
        assert fsdp2["resumed"]["losses"] == fsdp2["ours"]["losses"]

    @pytest.mark.parametrize("name", ["ours", "stock", "checkpointing by torch"])
    def test_saves_one_adapter(self, fsdp2: Results, folder: Path, name: str) -> None:
        check_saved(folder / "fsdp2" / name, fsdp2[name])

    @pytest.mark.parametrize("name", ["bf16", "bf16, read by one process", "bf16 model"])
    def test_keeps_theta_in_float32_beside_bfloat16(
        self, fsdp2: Results, alone: Results, folder: Path, name: str
    ) -> None:
        run = fsdp2[name]
        assert run["theta dtypes"] == ["torch.float32"]
        assert saved_theta_dtypes(folder / "fsdp2" / name) == {torch.float32}
        assert run["losses"] == pytest.approx(alone["ours"]["losses"], rel=0.01)

    def test_every_process_has_the_same_theta_beside_bfloat16(self, fsdp2: Results) -> None:
        first, second = fsdp2["bf16"]["thetas"]
        assert first == second
        assert len(first) == 6


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_configs_are_understood_by_accelerate(name: str) -> None:
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}
    assert config.distributed_type == kinds.get(name, "DEEPSPEED")
