"""Checks of Bitune together with its hosts. Each takes an empty folder to work in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitune_plugin.modeling.host import CHECKPOINTING
from bitune_plugin.self_check import release
from bitune_plugin.versions import TESTED

from .exactness import completion_loss, difference, padded
from .result import NotRun
from .subject import Subject, bitune_config, fill, tiny_model
from .words import END, text, word_tokenizer

SECONDS = 120
"""How long a process may take."""

VLLM_SECONDS = 600
"""The same of one that starts an engine of vLLM."""


def installed(host: str) -> str | None:
    """The version of a distribution that is installed, if it is."""
    try:
        return version(host)
    except PackageNotFoundError:
        return None


def none_too_old(_: Path) -> None:
    """Raises RuntimeError if a host is older than the tested range."""
    for host, tested in TESTED.items():
        found = installed(host)
        if found is not None and release(found) < release(tested.lowest):
            raise RuntimeError(
                f"{host} {found} is older than {tested.lowest}, the oldest that Bitune is tested with. Install a newer "
                f"one: pip install '{host}>={tested.lowest}'"
            )


def registration(_: Path) -> None:
    """Raises RuntimeError if PEFT's tables have another BITUNE."""
    from peft import mapping

    from bitune_plugin.saved_format.settings import PEFT_TYPE
    from bitune_plugin.tuner.config import BituneConfig
    from bitune_plugin.tuner.model import BituneModel

    tables = {"PEFT_TYPE_TO_CONFIG_MAPPING": BituneConfig, "PEFT_TYPE_TO_TUNER_MAPPING": BituneModel}
    for table, expected in tables.items():
        found = getattr(mapping, table).get(PEFT_TYPE)
        if found is not expected:
            raise RuntimeError(f"peft.{table}[{PEFT_TYPE!r}] is {found}. Another package may use the name: remove it.")


def autoload(folder: Path) -> None:
    """Raises RuntimeError if a new process that imports PEFT, and not Bitune, does not know BITUNE."""
    if _autoload_is_off():
        raise NotRun("disabled by BITUNE_AUTOLOAD=0")
    printed = run_python("import peft; print('BITUNE' in peft.PEFT_TYPE_TO_CONFIG_MAPPING)", folder)
    if printed.split()[-1:] != ["True"]:
        raise RuntimeError("`import peft` in a new process does not know BITUNE. Reinstall bitune-plugin.")


LOADING = """
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
model = PeftModel.from_pretrained(base, "adapter").eval()
with torch.no_grad():
    save_file({"logits": model(**load_file("inputs.safetensors")).logits}, "outputs.safetensors")
"""


def saving_and_loading(folder: Path) -> float:
    """The logits of a saved adapter in a process that never imports Bitune."""
    subject = Subject()
    ids, prompt = subject.samples[0]
    subject.base.save_pretrained(folder / "base")
    subject.model.save_pretrained(str(folder / "adapter"))
    batch = padded([(ids, prompt)])
    save_file({name: batch[name] for name in ("input_ids", "prompt_mask")}, folder / "inputs.safetensors")
    run_python(f"import bitune_plugin\n{LOADING}" if _autoload_is_off() else LOADING, folder)
    logits = load_file(folder / "outputs.safetensors")["logits"]
    return difference(logits[0, prompt - 1 :], subject.expected[0])


def bitune_trainer(folder: Path) -> float:
    """The loss of the first step of `BituneSFTTrainer`."""
    _need("trl", "TRL")
    from bitune_plugin import BituneSFTConfig, BituneSFTTrainer

    return _first_loss(BituneSFTTrainer, BituneSFTConfig, folder)


def stock_trainer(folder: Path) -> float:
    """The loss of the first step of TRL's own trainer, with a `BituneConfig`."""
    _need("trl", "TRL")
    from trl import SFTConfig, SFTTrainer

    return _first_loss(SFTTrainer, SFTConfig, folder)


def lm_eval_scores(_: Path) -> float:
    """The log-likelihoods of completions by lm-eval's model `bitune`."""
    _need("lm_eval", "lm-eval")
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from bitune_plugin import BituneLM

    if not _autoload_is_off() and get_model("bitune") is not BituneLM:
        raise RuntimeError(f"lm-eval's model 'bitune' is {get_model('bitune')}. Another package may use the name.")
    subject = Subject()
    model = BituneLM(pretrained=subject.model, tokenizer=word_tokenizer(), device="cpu", batch_size=2)
    pairs = [(text(ids[:prompt]), " " + text(ids[prompt:])) for ids, prompt in subject.samples]
    requests = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]
    scores = [score for score, _ in model.loglikelihood(requests, disable_tqdm=True)]
    return difference(torch.tensor(scores), _log_likelihoods(subject))


SERVING = """
import json, os
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
from vllm import LLM, SamplingParams
from bitune_plugin.integrations.vllm import engine_args

small = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 4, "enforce_eager": True, "skip_tokenizer_init": True}
llm = LLM(**engine_args("adapter", model="base", distributed_executor_backend="uni", **small))
found = []
for tokens, prompt in json.load(open("samples.json")):
    end = {"extra_args": {"bitune_prompt_length": prompt}}
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False, **end)
    (output,) = llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
    steps = zip(output.prompt_logprobs[prompt:], tokens[prompt:])
    found.append(sum(step[token].logprob for step, token in steps))
json.dump(found, open("found.json", "w"))
"""


def vllm_likelihoods(folder: Path) -> float:
    """The log-likelihoods of completions by an engine of vLLM that serves a saved adapter, in a new process."""
    _need("vllm", "vLLM")
    subject = Subject(head_dim=32)  # vLLM's attention on CPUs has none smaller
    subject.base.save_pretrained(folder / "base")
    subject.model.save_pretrained(str(folder / "adapter"))
    samples = [(ids.tolist(), prompt) for ids, prompt in subject.samples]
    (folder / "samples.json").write_text(json.dumps(samples))
    run_python(SERVING, folder, VLLM_SECONDS)
    return difference(torch.tensor(json.loads((folder / "found.json").read_text())), _log_likelihoods(subject))


def run_python(code: str, folder: Path, seconds: float = SECONDS) -> str:
    """The output of a new process with this interpreter and the working directory `folder`.

    Raises:
        RuntimeError: it failed; the message is the last line of its stderr, and the cause has all of it.
    """
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"in a new process: {lines[-1]}") from RuntimeError(done.stderr)
    return done.stdout


def _need(module: str, name: str) -> None:
    if find_spec(module) is None:
        raise NotRun(f"{name} is not installed")


def _autoload_is_off() -> bool:
    return os.environ.get("BITUNE_AUTOLOAD") == "0"


def _first_loss(trainer_class: type, config_class: type, folder: Path) -> float:
    from datasets import Dataset

    subject = Subject()
    samples = [(torch.cat([ids, torch.tensor([END])]), prompt) for ids, prompt in subject.samples]
    rows = [{"prompt": text(ids[:prompt]), "completion": " " + text(ids[prompt:])} for ids, prompt in samples]
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": len(rows),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        CHECKPOINTING: True,  # as by default, but under the name of which transformers does not warn
    }
    trainer = trainer_class(
        model=tiny_model(),
        args=config_class(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer(),
        peft_config=bitune_config(),
    )
    fill(trainer.model)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    expected = completion_loss([subject.literal.logits(*sample) for sample in samples], samples)
    return difference(torch.tensor(losses[0]), expected)


def _log_likelihoods(subject: Subject) -> Tensor:
    """The literal log-likelihoods of the samples' completions, `[samples]`."""
    found = []
    for logits, (ids, prompt) in zip(subject.expected, subject.samples, strict=True):
        found.append(logits[:-1].log_softmax(dim=-1).gather(1, ids[prompt:, None]).sum())
    return torch.stack(found)
