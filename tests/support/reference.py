"""The numbers of the authors' own code, and product models built from them. See `tests/data/README.md`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from bitune_plugin import BituneConfig
from helpers import batch

DATA = Path(__file__).parents[1] / "data"
TOLERANCE = 2e-5
"""Of logits and losses."""

CASES = sorted(path.stem for path in DATA.glob("*.safetensors"))

SETTINGS: dict[str, dict[str, object]] = {
    "llama-head": {"mixing_granularity": "head"},
    "llama-model": {"mixing_granularity": "model"},
    "llama-relu": {"mixing": "relu"},
    "llama-no-mixing": {"mixing": "none"},
    "llama-only-causal": {"second_pass_attention": "causal"},
    "llama-shared-weights": {"share_adapter": True},
    "llama-naive-bidirectional": {"share_adapter": True, "mixing": "none"},
}
"""What each case changes about the paper's method."""


@dataclass(frozen=True)
class Sample:
    input_ids: Tensor
    prompt_length: int
    logits: Tensor
    loss: Tensor


@dataclass(frozen=True)
class Case:
    name: str
    description: dict
    tensors: dict[str, Tensor]

    @property
    def samples(self) -> list[Sample]:
        count = len({key.split(".")[0] for key in self.tensors if key.startswith("sample")})
        return [self._sample(f"sample{i}") for i in range(count)]

    def _sample(self, name: str) -> Sample:
        field = {key: self.tensors[f"{name}.{key}"] for key in ("input_ids", "prompt_length", "logits", "loss")}
        return Sample(field["input_ids"], int(field["prompt_length"]), field["logits"], field["loss"])

    @property
    def greedy(self) -> Tensor:
        return self.tensors["sample0.greedy"]

    def base(self, attention: str = "sdpa") -> PreTrainedModel:
        config = dict(self.description["config"], pad_token_id=0, attention_dropout=0.0)
        if self.description["architecture"] == "gemma":
            config["hidden_act"] = "gelu_pytorch_tanh"
        model = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING[self.description["architecture"]](**config), attn_implementation=attention
        )
        weights = {key.removeprefix("base."): value for key, value in self.tensors.items() if key.startswith("base.")}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}  # tied
        return model.eval()

    def adapter(self) -> PeftConfig:
        targets = sorted({_target(key) for key in self.tensors if key.startswith("causal.")})
        if self.description["adapter"] == "ia3":
            # The down projection scales its input, all others their output.
            shapes = {key.split(".ia3_l")[0]: v.shape for key, v in self.tensors.items() if key.startswith("causal.")}
            feedforward = sorted({_target(key) for key, shape in shapes.items() if shape[0] == 1})
            return IA3Config(target_modules=targets, feedforward_modules=feedforward)
        return LoraConfig(
            r=self.description["adapter_r"], lora_alpha=self.description["adapter_alpha"], target_modules=targets
        )

    def config(self) -> BituneConfig:
        return BituneConfig(
            adapter=self.adapter(), theta_init=self.description["theta_init"], **SETTINGS.get(self.name, {})
        )

    def product(self, attention: str = "sdpa") -> PeftModel:
        """A model with Bitune, its weights those of the reference."""
        model = get_peft_model(self.base(attention), self.config())
        parameters = dict(model.named_parameters())
        for prefix, counterparts in self.counterparts(parameters).items():
            for key, parameter in counterparts.items():
                parameter.data.copy_(self.tensors[key].view(parameter.shape))
            assert counterparts or prefix != "causal"
        return model

    def _second(self) -> str:
        """The bidirectional adapter in parameter names. IA3's weights are bare parameters in dicts of PEFT's."""
        return "default__bidirectional" if self.name.endswith("ia3") else "bidirectional.default"

    def counterparts(self, parameters: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """For adapters: reference key -> parameter of the product."""
        found: dict[str, dict[str, Tensor]] = {}
        for prefix, name in (("causal", "default"), ("bidirectional", self._second())):
            found[prefix] = {
                key: parameters[_product_key(key.removeprefix(f"{prefix}."), name)]
                for key in self.tensors
                if key.startswith(f"{prefix}.") and _product_key(key.removeprefix(f"{prefix}."), name) in parameters
            }
        return found


def _target(key: str) -> str:
    return key.split(".lora_")[0].split(".ia3_l")[0].split(".")[-1]


def _product_key(key: str, adapter_name: str) -> str:
    key = key.replace("lora_A.weight", f"lora_A.{adapter_name}.weight")
    key = key.replace("lora_B.weight", f"lora_B.{adapter_name}.weight")
    key = key.replace("ia3_l", f"ia3_l.{adapter_name}")
    return f"base_model.model.{key}"


def thetas(model: PeftModel) -> dict[str, list[Tensor]]:
    """Parameters theta of a product model, by layer."""
    named = list(model.named_parameters())
    return {kind: [p for name, p in named if f".theta_{kind}.default" in name] for kind in ("key", "value")}


@cache
def case(name: str) -> Case:
    return Case(name, json.loads((DATA / f"{name}.json").read_text()), load_file(DATA / f"{name}.safetensors"))


def assert_same_logits(adapter: Path, reference: Case) -> None:
    """The reference's base model with the Bitune adapter in a folder gives the reference's logits."""
    model = PeftModel.from_pretrained(reference.base(), adapter)
    for sample in reference.samples:
        row = batch([(sample.input_ids, sample.prompt_length)])
        logits = model(input_ids=row.input_ids, labels=row.labels).logits
        torch.testing.assert_close(logits[0, sample.prompt_length - 1 :], sample.logits, rtol=0, atol=TOLERANCE)
