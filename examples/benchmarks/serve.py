"""What serving costs with vLLM: reading a prompt, and each token after it, in an engine of its own for each contender.

    python examples/benchmarks/serve.py --models smollm2-135m --lengths 64 256 1024 --json out.json

All engines are in one process, one after another, because two of them would share the cores; every length is asked in
several rounds. A prompt of random tokens is asked for one token (`prefill`) and for `--tokens` more (`per_token`, their
difference for each). `--rows` such prompts are asked at once.

* `base`: the model without an adapter.
* `merged`: LoRA, merged into the weights.
* `lora`: LoRA by vLLM's own `--enable-lora`.
* `bitune`: decoding is to cost at most 1.03 times what it costs with `merged`, a prompt at most 2.2 times.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# In place of this file's own folder, whose `lm_eval.py` would pass for lm-eval.
sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

from bitune_plugin import BituneConfig
from bitune_plugin.integrations.vllm import engine_args
from pretrained import load_model

CONTENDERS = ("base", "merged", "lora", "bitune")


def adapter_config() -> LoraConfig:
    """The adapter of every contender: rank 8 on all linear layers."""
    return LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")


def save(model: str, folder: Path) -> None:
    """Saves the base, LoRA, the base with LoRA in it, and Bitune."""
    load_model(model).save_pretrained(folder / "base")
    for name, config in (("lora", adapter_config()), ("bitune", BituneConfig(adapter=adapter_config()))):
        base = load_model(str(folder / "base"))
        base.name_or_path = str(folder / "base")
        get_peft_model(base, config).save_pretrained(str(folder / name))
    lora = PeftModel.from_pretrained(load_model(str(folder / "base")), str(folder / "lora"))
    lora.merge_and_unload().save_pretrained(folder / "merged")


@contextmanager
def engine(contender: str, folder: Path, arguments: argparse.Namespace) -> Iterator[LLM]:
    longest = max(arguments.lengths) + arguments.tokens + 1
    common: dict[str, Any] = {
        "dtype": arguments.dtype,
        "max_model_len": longest,
        "max_num_batched_tokens": max(longest, 2048),
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "distributed_executor_backend": "uni",
        "enforce_eager": arguments.eager,
    }
    if contender == "bitune":
        common = engine_args(folder / "bitune", **common)
    else:
        common["model"] = str(folder / ("merged" if contender == "merged" else "base"))
        common |= {"enable_lora": True, "max_lora_rank": 8} if contender == "lora" else {}
    llm = LLM(**common)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def measure(contender: str, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    request = LoRARequest("lora", 1, str(folder / "lora")) if contender == "lora" else None
    results = []
    with engine(contender, folder, arguments) as llm:
        vocabulary = llm.llm_engine.model_config.get_vocab_size()

        def seconds(length: int, new: int) -> float:
            prompts = torch.randint(5, vocabulary - 5, (arguments.rows, length)).tolist()
            params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
            start = time.perf_counter()
            llm.generate([{"prompt_token_ids": p} for p in prompts], params, lora_request=request, use_tqdm=False)
            return time.perf_counter() - start

        for length in arguments.lengths:
            seconds(length, 2)  # warms up
            rounds = [(seconds(length, 1), seconds(length, 1 + arguments.tokens)) for _ in range(arguments.rounds)]
            prefill = statistics.median(first for first, _ in rounds)
            per_token = statistics.median(both - first for first, both in rounds) / arguments.tokens
            results.append({"contender": contender, "length": length, "prefill": prefill, "per_token": per_token})
    return results


def table(results: list[dict[str, Any]], rows: int) -> str:
    """In Markdown, with ratios to `merged`."""
    lines = ["| prompt | contender | prompts per second | over merged | tokens per second | over merged |"]
    lines.append("|---|---|---|---|---|---|")
    reference = {r["length"]: r for r in results if r["contender"] == "merged"}
    for result in sorted(results, key=lambda r: (r["length"], CONTENDERS.index(r["contender"]))):
        cells = [str(result["length"]), result["contender"]]
        for name in ("prefill", "per_token"):
            base = reference.get(result["length"])
            ratio = f"{result[name] / base[name]:.2f}" if base else ""
            cells += [f"{rows / result[name]:.3g}", ratio]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"], help="names, hub ids or paths")
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 256, 1024], help="tokens of a prompt")
    parser.add_argument("--rows", type=int, default=1, help="prompts at once")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--eager", action="store_true", help="without compilation")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--json", type=Path, help="write the results here")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    results = []
    for model in arguments.models:
        with tempfile.TemporaryDirectory(prefix="bitune-serve-") as folder:
            save(model, Path(folder))
            found = [r for c in arguments.contenders for r in measure(c, Path(folder), arguments)]
        results += [{"model": model, "rows": arguments.rows, "dtype": arguments.dtype, **r} for r in found]
        print(f"\n{model}\n{table(found, arguments.rows)}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
