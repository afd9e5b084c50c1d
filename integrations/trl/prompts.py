"""Prompts, adapters and refusals of TRL's trainers of preferences, rewards and distillation.

Most of these trainers hand the model `labels` that are -100 on the prompt, or compute their loss from logits and give
it nothing. `KnowsPrompts` is a mixin in front of such a trainer. A method of the trainer in which the model is called
is run inside `prompts_known_by`, so that what the trainer knows of the boundary becomes the `prompt_mask` of the call.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, ClassVar

from datasets import IterableDataset

from bitune_plugin.core.turns import ALTERNATE
from bitune_plugin.integrations.theta import TrainsTheta, check_theta_settings
from bitune_plugin.integrations.trl.adapters import bitune_config, check_head
from bitune_plugin.integrations.trl.conversations import assistant_turns
from bitune_plugin.tuner.containers import whole_reference_copies
from bitune_plugin.tuner.model import BituneModel


class KnowsPrompts(TrainsTheta):
    """A mixin in front of a trainer of TRL: `class BituneDPOTrainer(KnowsPrompts, DPOTrainer)`.

    `peft_config` may be a `BituneConfig` or any other PEFT config, which then is the adapter of both streams. Without
    it, a model that already carries Bitune is trained on, and of a bare one all weights are trained, one set for each
    stream (`FullConfig(target_modules="all")`).

    Attributes:
        refused_settings: fields of the config that hide what is prompt, and why.
        refused_arguments: arguments of the trainer that do.

    Raises:
        ValueError: `model` carries another adapter, or one of these is set; the message says what to change.
    """

    refused_settings: ClassVar[dict[str, str]] = {}
    refused_arguments: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" not in vars(cls):
            setattr(cls, "__init__", _prepared(cls))  # noqa: B010


def _prepared(cls: type[KnowsPrompts]) -> Any:
    """The `__init__` of a trainer that looks at its arguments first. It has the signature of TRL's, which users and the
    command line read."""
    stock = next(base for base in cls.__mro__[1:] if not issubclass(base, KnowsPrompts) and "__init__" in vars(base))
    signature = inspect.signature(stock.__init__)
    takes_config = bool({"peft_config", "kwargs"} & {*signature.parameters})

    @functools.wraps(stock.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        arguments = dict(signature.bind(self, *args, **kwargs).arguments)
        del arguments["self"]
        arguments |= arguments.pop("kwargs", {})
        check_settings(cls, arguments)
        check_theta_settings(arguments.get("args"))
        if takes_config:
            arguments["peft_config"] = bitune_config(arguments.get("model"), arguments.get("peft_config"))
        else:
            check_carries_bitune(cls, arguments.get("model"))
        refuse_several_turns(cls, arguments)
        with whole_reference_copies():
            stock.__init__(self, **arguments)
        check_head(self)
        self.check_theta_clip()
        if arguments.get("peft_config") is not None:
            self.start_theta_in_float32()

    return __init__


def check_settings(trainer: type[KnowsPrompts], arguments: dict[str, Any]) -> None:
    """Raises ValueError for arguments of a trainer, or fields of its config, under which prompts would not be read in
    training as in generation."""
    args = arguments.get("args")
    given = {name: arguments.get(name) for name in trainer.refused_arguments}
    given |= {name: getattr(args, name, None) for name in trainer.refused_settings}
    for name, reason in {**trainer.refused_arguments, **trainer.refused_settings}.items():
        if given[name]:
            raise ValueError(f"`{name}={given[name]!r}`: {reason}")


def refuse_several_turns(trainer: type[KnowsPrompts], arguments: dict[str, Any]) -> None:
    """Puts a check in front of the datasets of a trainer, if the adapter reads conversations turn by turn.

    These trainers read all of a conversation before its completion as one prompt, and a chat would not.

    Raises:
        ValueError: a prompt holds an assistant turn; of a stream, once such a sample is read.
    """
    model, config = arguments.get("model"), arguments.get("peft_config")
    tuner = getattr(model, "base_model", None)
    if isinstance(tuner, BituneModel):
        config = next((tuner.peft_config[name] for name in tuner.active_adapters), None)
    if getattr(config, "multi_turn", None) != ALTERNATE:
        return
    for name in ("train_dataset", "eval_dataset"):
        given = arguments.get(name)
        if isinstance(given, dict):
            arguments[name] = {key: _without_several_turns(each, trainer) for key, each in given.items()}
        elif given is not None:
            arguments[name] = _without_several_turns(given, trainer)


def _without_several_turns(dataset: Any, trainer: type[KnowsPrompts]) -> Any:
    """The dataset, checked; a stream is checked as it is read."""
    if isinstance(dataset, IterableDataset):
        return dataset.map(_check_turns, fn_kwargs={"trainer": trainer.__name__})
    for sample in dataset:
        _check_turns(sample, trainer.__name__)
    return dataset


def _check_turns(sample: dict[str, Any], trainer: str) -> dict[str, Any]:
    """Returns the sample. Raises ValueError if its prompt holds an assistant turn."""
    whole = [sample.get(name) for name in ("messages", "chosen")]
    prompt = sample.get("prompt") or next((each[:-1] for each in whole if isinstance(each, list)), None)
    if isinstance(prompt, list) and assistant_turns(prompt):
        raise ValueError(
            f"{trainer} was given a conversation of several turns and an adapter with `multi_turn='alternate'`, which "
            "reads a conversation turn by turn; the trainer reads all before the completion as one prompt. Use "
            "prompts of one turn, an adapter with `multi_turn='reread'`, or BituneSFTTrainer."
        )
    return sample


def check_carries_bitune(trainer: type[KnowsPrompts], model: Any) -> None:
    """Raises ValueError for a model without Bitune, for trainers that do not take a `peft_config`."""
    if not isinstance(getattr(model, "base_model", None), BituneModel):
        raise ValueError(
            f"{trainer.__name__} takes no `peft_config`, as TRL's. Pass a model that carries the adapter: "
            "`model=get_peft_model(model, BituneConfig())`."
        )
