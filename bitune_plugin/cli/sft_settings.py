"""The settings of `bitune sft`: its own, those of TRL, and those of `accelerate launch`, from YAML and command line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser, get_peft_config

from bitune_plugin.integrations.trl.config import BituneSFTConfig
from bitune_plugin.kinds import check_kinds
from bitune_plugin.tuner.config import BituneConfig
from bitune_plugin.tuner.full import FullConfig

USAGE = "bitune sft [--config FILE] [--SETTING VALUE ...]"

DESCRIPTION = """\
Fine-tune a causal language model with Bitune, from a YAML file, from settings on the command line, or both; a setting
on the command line wins. It takes all that `trl sft` takes, and what is listed under "Bitune". In a YAML file a setting
is its name without the dashes, and `env:` holds environment variables.

Bitune needs datasets that tell the prompt from the completion: columns `prompt` and `completion`, or `messages`, or any
columns with a `prompt_template` and a `completion_template`.
"""

EPILOG = """\
examples:

  LoRA of rank 8, from columns `prompt` and `completion` of a dataset on the hub:

    bitune sft --model_name_or_path google/gemma-3-270m --dataset_name USER/DATASET \\
        --use_peft --lora_r 8 --lora_target_modules all-linear --learning_rate 1e-3 --output_dir out

  From columns `question` and `answer`, with any PEFT method; in FILE.yaml:

    model_name_or_path: google/gemma-3-270m
    dataset_name: openai/gsm8k
    dataset_config: main
    prompt_template: "Question: {{question}}\\n\\nAnswer:"
    completion_template: " {{answer}}"
    adapter: {peft_type: IA3, target_modules: [k_proj, v_proj, down_proj], feedforward_modules: [down_proj]}
    output_dir: out

    bitune sft --config FILE.yaml

  In several processes: settings of `accelerate launch` are handed on, and --accelerate_config takes a file or the name
  of one of TRL's (fsdp2, zero3, ...):

    bitune sft --config FILE.yaml --num_processes 4
    bitune sft --config FILE.yaml --accelerate_config examples/accelerate/fsdp2.yaml

  What was trained is evaluated by

    lm_eval --model bitune --model_args pretrained=google/gemma-3-270m,peft=out --tasks gsm8k
"""


def _as_in_bitune_config(name: str) -> Any:
    theirs = BituneConfig.__dataclass_fields__[name]
    return field(default=theirs.default, metadata=theirs.metadata)


@dataclass
class BituneArguments:
    """Settings of `BituneConfig`, and the templates of the datasets.

    Raises:
        ValueError: settings that contradict each other, or no valid JSON.
    """

    adapter: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "PEFT config of both streams with its `peft_type`: a mapping in YAML, JSON on the command line. "
            "Otherwise --use_peft and --lora_... make a LoRA; without either, the whole model is trained."
        },
    )
    theta_init: float = _as_in_bitune_config("theta_init")
    mixing: str = _as_in_bitune_config("mixing")
    mixing_granularity: str = _as_in_bitune_config("mixing_granularity")
    second_pass_attention: str = _as_in_bitune_config("second_pass_attention")
    share_adapter: bool = _as_in_bitune_config("share_adapter")
    multi_turn: str = _as_in_bitune_config("multi_turn")
    prompt_template: str | None = field(
        default=None,
        metadata={"help": "Jinja template of the prompt over the columns of the dataset, as 'Question: {{question}}'."},
    )
    completion_template: str | None = field(
        default=None,
        metadata={"help": "The same of the completion; where it comes out empty, the sample is left out."},
    )

    def __post_init__(self) -> None:
        if (self.prompt_template is None) != (self.completion_template is None):
            raise ValueError("Of `prompt_template` and `completion_template` only one is set. Set both, or neither.")
        if isinstance(self.adapter, str) and self.adapter.startswith("{"):
            try:
                self.adapter = json.loads(self.adapter)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"`adapter={self.adapter}` is not valid JSON: {error}.") from error

    def bitune_config(self, model_arguments: ModelConfig) -> BituneConfig:
        """Raises ValueError for an adapter that is given twice, or whose settings do not fit."""
        if self.adapter is not None and model_arguments.use_peft:
            raise ValueError("`adapter` and `use_peft` both say what the adapter is. Leave one of them out.")
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if "template" not in f.name}
        of_trl = get_peft_config(model_arguments) or FullConfig(target_modules="all")
        adapter = of_trl if self.adapter is None else self.adapter
        try:
            config = BituneConfig(**{**given, "adapter": adapter})
        except TypeError as error:
            raise ValueError(f"`adapter={adapter!r}`: {error}") from error
        unknown = sorted(set(adapter) - set(config.inner.to_dict())) if isinstance(adapter, dict) else []
        if unknown:  # which PEFT would only warn of
            raise ValueError(f"`adapter` has settings that {type(config.inner).__name__} does not know: {unknown}.")
        return config


DATACLASSES: Any = (BituneArguments, BituneSFTConfig, ScriptArguments, ModelConfig, DatasetMixtureConfig)

_OF_TRL = {f.name for theirs in (SFTConfig, *DATACLASSES[2:]) for f in dataclasses.fields(theirs)}


class Parser(TrlParser):
    """A parser whose help lists the settings of Bitune before those of TRL."""

    def __init__(self, **settings: Any) -> None:
        self._groups: dict[str, Any] = {}
        super().__init__(dataclass_types=DATACLASSES, **settings)

    def add_argument(self, *names: str, **settings: Any) -> Any:
        """As in argparse, in the group that the setting belongs to."""
        if names[0] == "-h":
            return super().add_argument(*names, **settings)
        theirs = settings.get("dest", names[0].lstrip("-")) in _OF_TRL
        title = "TRL, as `trl sft --help` lists them" if theirs else "Bitune"
        if title not in self._groups:
            self._groups[title] = self.add_argument_group(title)
        return self._groups[title].add_argument(*names, **settings)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A formatter that adds the defaults, and leaves the examples as they are."""


def make_parser() -> Parser:
    return Parser(
        prog="bitune sft",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=_Help,
    )


class Settings(NamedTuple):
    """The settings of the command; `for_accelerate` are those that the training processes do not take."""

    training: BituneSFTConfig
    script: ScriptArguments
    model: ModelConfig
    mixture: DatasetMixtureConfig
    templates: tuple[str, str] | None
    bitune: BituneConfig
    for_accelerate: list[str]


def read_settings(argv: list[str]) -> Settings:
    """Raises ValueError or OSError for settings that do not fit, or a file that cannot be read."""
    argv = _checked_config(argv) or ["--help"]
    try:
        parsed = make_parser().parse_args_and_config(argv, return_remaining_strings=True)
    except TypeError as error:  # of a dataclass that is made of something in the file
        raise ValueError(f"A setting does not fit: {error}.") from error
    bitune, training, script, model, mixture, unknown = parsed
    if model.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is missing: the model to train, an id on the hub or a folder.")
    templates = None if bitune.prompt_template is None else (bitune.prompt_template, bitune.completion_template)
    return Settings(training, script, model, mixture, templates, bitune.bitune_config(model), unknown)


def _checked_config(argv: list[str]) -> list[str]:
    """The arguments as TRL wants them. Raises ValueError unless all are settings, with one YAML file at most."""
    if argv and not argv[0].startswith("-"):
        raise ValueError(f"{argv[0]!r} is no setting. A YAML file goes behind `--config`.")
    argv = [part for argument in argv for part in _split_config(argument)]
    if argv.count("--config") > 1:
        raise ValueError("`--config` is given twice. Put all settings into one file, or some on the command line.")
    if "--config" in argv:
        file = argv[argv.index("--config") + 1 :][:1]
        if not file:
            raise ValueError("`--config` wants a YAML file behind it.")
        try:
            content = yaml.safe_load(Path(file[0]).read_text())
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{file[0]} is not valid YAML: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{file[0]} must contain a YAML mapping, lines like `max_steps: 100`.")
        _check_settings(file[0], content)
    return argv


def _check_settings(file: str, content: dict[Any, Any]) -> None:
    """Raises ValueError for settings of a wrong kind. Text is left to argparse, which makes numbers of it: for YAML,
    `1e-4` is text. What is wrong with `adapter`, the config says."""
    given = {name: value for name, value in content.items() if not isinstance(value, str | None) and name != "adapter"}
    try:
        for theirs in DATACLASSES:
            check_kinds(theirs, given)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _split_config(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def unknown_setting(argument: str) -> str:
    """A message about a setting that no parser takes."""
    names = [f"--{f.name}" for theirs in DATACLASSES for f in dataclasses.fields(theirs)]
    similar = difflib.get_close_matches(argument, names, n=1)
    advice = f"Did you mean {similar[0]}?" if similar else "`bitune sft --help` lists all settings."
    return f"{argument!r} is a setting neither of Bitune nor of TRL nor of `accelerate launch`. {advice}"
