"""What serving costs with vLLM: reading a prompt, and each token after it.

    python examples/benchmarks/serve.py --models smollm2-135m --lengths 64 256 1024 --json out.json

All engines are in one process and take turns: in each round every contender is asked for one token behind `--rows`
random prompts (`prefill`), and for `--tokens` more behind others (`per_token`, from the difference). A ratio is the
median over the rounds of what one contender took to what `merged` took in the same round.

* `base`: the model without an adapter.
* `merged`: LoRA, merged into the weights.
* `lora`: LoRA by vLLM's own `--enable-lora`.
* `bitune`: decoding is to cost at most 1.03 times what it costs with `merged`, a prompt at most 2.2 times.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

# In place of this file's own folder, whose `lm_eval.py` would pass for lm-eval.
sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, for each engine
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # or all engines would get the same core

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from bitune_plugin import BituneConfig
from bitune_plugin.integrations.vllm import engine_args
from pretrained import load_model

Result = dict[str, Any]

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


def engine(contender: str, folder: Path, arguments: argparse.Namespace) -> LLM:
    longest = max(arguments.lengths) + arguments.tokens + 1
    options: dict[str, Any] = {
        "dtype": arguments.dtype,
        "max_model_len": longest,
        "max_num_batched_tokens": max(longest * arguments.rows, 2048),
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "distributed_executor_backend": "uni",
        "enforce_eager": arguments.eager,
    }
    if contender == "bitune":
        return LLM(**engine_args(folder / "bitune", **options))
    if contender == "lora":
        options |= {"enable_lora": True, "max_lora_rank": 8}
    return LLM(model=str(folder / ("merged" if contender == "merged" else "base")), **options)


def measure(model: str, folder: Path, arguments: argparse.Namespace) -> list[Result]:
    save(model, folder)
    engines = {contender: engine(contender, folder, arguments) for contender in arguments.contenders}
    request = LoRARequest("lora", 1, str(folder / "lora"))

    def seconds(contender: str, length: int, new: int) -> float:
        llm = engines[contender]
        vocabulary = llm.llm_engine.model_config.get_vocab_size()
        prompts = torch.randint(5, vocabulary - 5, (arguments.rows, length)).tolist()
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        lora = request if contender == "lora" else None
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": p} for p in prompts], params, lora_request=lora, use_tqdm=False)
        return time.perf_counter() - start

    results = []
    for length in arguments.lengths:
        prefill: dict[str, list[float]] = {contender: [] for contender in engines}
        per_token: dict[str, list[float]] = {contender: [] for contender in engines}
        for turn in range(arguments.rounds + 1):
            for contender in engines:
                first = seconds(contender, length, 1)
                rest = seconds(contender, length, 1 + arguments.tokens) - first
                if turn:  # the first warms up
                    prefill[contender].append(first)
                    per_token[contender].append(rest / arguments.tokens)
        results += [
            {
                **{"model": model, "rows": arguments.rows, "dtype": arguments.dtype, "eager": arguments.eager},
                **{"length": length, "contender": contender},
                **{"prefill": median(prefill[contender]), "prefill_ratio": ratio(prefill, contender)},
                **{"per_token": median(per_token[contender]), "per_token_ratio": ratio(per_token, contender)},
            }
            for contender in engines
        ]
    return results


def ratio(seconds: dict[str, list[float]], contender: str) -> float | None:
    """Median over the rounds of what a contender took to what `merged` took, if both took part."""
    if "merged" not in seconds:
        return None
    return median(a / b for a, b in zip(seconds[contender], seconds["merged"], strict=True))


def table(results: list[Result]) -> str:
    """In Markdown."""
    lines = ["| model | prompt | contender | prompts per second | over merged | tokens per second | over merged |"]
    lines.append("|---|---|---|---|---|---|---|")
    for result in results:
        cells = [str(result[name]) for name in ("model", "length", "contender")]
        for name in ("prefill", "per_token"):
            over = result[f"{name}_ratio"]
            cells += [f"{result['rows'] / result[name]:.3g}", "" if over is None else f"{over:.2f}"]
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
            results += measure(model, Path(folder), arguments)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{table(results)}", flush=True)


if __name__ == "__main__":
    main()
