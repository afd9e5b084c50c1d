"""Answers prompts with a model and, if given, a saved adapter. Plain transformers and PEFT: nothing here knows Bitune.

python examples/generate.py MODEL --adapter outputs/quickstart --prompt "Question: Who wrote Faust?" --prompt "..."
python examples/generate.py MODEL --adapter outputs/quickstart --prompts prompts.jsonl --output answers.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer


def answer(
    model: torch.nn.Module, tokenizer: AutoTokenizer, prompts: list[str], max_new_tokens: int, batch_size: int
) -> list[str]:
    """Greedy answers, in the order of `prompts`."""
    answers = []
    with tqdm(total=len(prompts), desc="Answering", unit="prompt") as progress:
        for start in range(0, len(prompts), batch_size):
            batch = tokenizer(prompts[start : start + batch_size], return_tensors="pt", padding=True).to(model.device)
            tokens = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
            new_tokens = tokens[:, batch["input_ids"].shape[1] :]
            answers += tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
            progress.update(len(new_tokens))
    return answers


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id or path of the base model")
    parser.add_argument("--adapter", help="folder of a saved adapter; without one, the base model answers")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", help="a prompt; may be given several times")
    prompts.add_argument("--prompts", type=Path, help="JSONL file with a 'prompt' in each line")
    parser.add_argument("--output", type=Path, help="JSONL file for the answers; printed by default")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).to(device)
    if arguments.adapter:
        model = PeftModel.from_pretrained(model, arguments.adapter)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    prompts = arguments.prompt or [json.loads(line)["prompt"] for line in arguments.prompts.open()]
    answers = answer(model, tokenizer, prompts, arguments.max_new_tokens, arguments.batch_size)
    if arguments.output is None:
        print("\n".join(prompt + text for prompt, text in zip(prompts, answers, strict=True)))
        return
    with arguments.output.open("w") as file:
        file.writelines(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in zip(prompts, answers, strict=True))


if __name__ == "__main__":
    main()
