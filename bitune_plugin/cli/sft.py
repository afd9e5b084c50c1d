"""`bitune sft`: `trl sft` with Bitune.

Like `trl sft`, the command reads its settings and calls `accelerate launch` with its own, which starts the training
processes; each of them is `python -m bitune_plugin.cli.sft` with the same arguments.
"""

from __future__ import annotations

import shlex
import sys
from typing import Any

from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.logging import get_logger
from datasets import DatasetDict, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset, get_quantization_config
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from bitune_plugin.cli import printable, run
from bitune_plugin.cli.sft_settings import USAGE, Settings, read_settings, unknown_setting
from bitune_plugin.integrations.trl.filters import Samples
from bitune_plugin.integrations.trl.templates import apply_templates
from bitune_plugin.integrations.trl.trainer import BituneSFTTrainer

logger = get_logger(__name__)

MODULE = "bitune_plugin.cli.sft"


def main(argv: list[str]) -> None:
    """Reads the settings, and starts the processes that train.

    Args:
        argv: all arguments behind `bitune sft`.

    Raises:
        ValueError: settings that are unknown or do not fit.
        OSError: a file that cannot be read.
    """
    unknown = read_settings(argv).for_accelerate
    parser = launch_command_parser()
    parser.usage = USAGE
    command = ["--quiet", "--module", *resolve_accelerate_config_argument(unknown), MODULE, *argv]
    launch, unknown = parser.parse_known_args(command)
    if unknown or launch.training_script != MODULE:
        raise ValueError(unknown_setting([*unknown, launch.training_script][0]))
    try:
        launch_command(launch)
    except ChildFailedError:  # of several processes, each of which has said why
        sys.exit(1)
    except SignalException as error:  # as of Ctrl-C, which they have said, too
        sys.exit(128 + error.sigval)


def train(argv: list[str]) -> BituneSFTTrainer:
    """Trains, and saves the adapter to `output_dir`; each process calls it.

    Args:
        argv: all arguments behind `bitune sft`; those of `accelerate launch` have no effect here.

    Returns:
        The trainer, after training.
    """
    settings = read_settings(argv)
    training, script, model = settings.training, settings.script, settings.model
    _check_processes(settings)
    training.model_init_kwargs = model_init_kwargs(settings)
    dataset = load(script, settings.mixture)
    evaluates = training.eval_strategy != "no"
    trainer = BituneSFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=split(dataset, "dataset_train_split", settings),
        eval_dataset=split(dataset, "dataset_test_split", settings) if evaluates else None,
        quantization_config=get_quantization_config(model),
        peft_config=settings.bitune,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    trainer.accelerator.print(printable(_farewell(model.model_name_or_path, training.output_dir)))
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
        at = printable(trainer.hub_model_id)
        trainer.accelerator.print(f"It is on the hub, too: https://huggingface.co/{at}")
    trainer.accelerator.end_training()  # `trainer.end()` does no more, and transformers 5.17 does not have it
    return trainer


def model_init_kwargs(settings: Settings) -> dict[str, Any]:
    """The keywords with which the model is loaded."""
    training, model = settings.training, settings.model
    return {
        "revision": model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }


def _check_processes(settings: Settings) -> None:
    """Raises ValueError if several processes were asked for, and accelerate has silently started one."""
    asked = launch_command_parser().parse_known_args([*settings.for_accelerate, MODULE])[0].num_processes or 1
    if asked > 1 and settings.training.world_size == 1:
        raise ValueError(
            f"`num_processes={asked}`, and accelerate has started one, as it does where there is one GPU or none. "
            "Leave it out. On CPUs, `--accelerate_config FILE` starts several, with `distributed_type: MULTI_GPU` and "
            "`use_cpu: true` in it."
        )


def load(script: ScriptArguments, mixture: DatasetMixtureConfig) -> DatasetDict | IterableDatasetDict:
    """The dataset of the settings. Raises ValueError if there is none, or it cannot be read."""
    if mixture.datasets:
        if script.dataset_name is not None:
            logger.warning(f"`dataset_name={script.dataset_name}` is ignored: there are `datasets`, too.")
        if mixture.streaming and mixture.test_split_size is not None:
            raise ValueError("`test_split_size` cannot part a stream. Leave it out, or set `streaming: false`.")
        return get_dataset(mixture)
    if script.dataset_name is None:
        raise ValueError("There is no dataset: set `dataset_name`, or `datasets` in the YAML file.")
    try:
        return load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
    except (DatasetGenerationError, ValueError) as error:  # the former leaves it to its cause to say why
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        raise ValueError(f"`dataset_name={script.dataset_name}` cannot be read: {reason}.") from error


def split(dataset: DatasetDict | IterableDatasetDict, name: str, settings: Settings) -> Samples:
    """The split that the setting `name` names, rendered by the templates, if there are any."""
    chosen = getattr(settings.script, name)
    if chosen not in dataset:
        raise ValueError(f"`{name}={chosen!r}` is no split of the dataset. Choose one of {list(dataset)}.")
    samples = dataset[chosen]
    if settings.templates is None:
        return samples
    return apply_templates(samples, *settings.templates, num_proc=settings.training.dataset_num_proc)


def _farewell(model: str | None, adapter: str) -> str:
    arguments = shlex.quote(f"pretrained={model},peft={adapter}")
    return (
        f"The adapter is in {adapter}. To evaluate it:\nlm_eval --model bitune --model_args {arguments} --tasks TASKS"
    )


if __name__ == "__main__":
    sys.exit(run("sft", lambda: train(sys.argv[1:])))
