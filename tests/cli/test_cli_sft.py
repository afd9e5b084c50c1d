"""`bitune sft`."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import trl.scripts.sft
import yaml
from peft import IA3Config, LoraConfig, PeftModel
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from bitune_plugin.cli import sft
from bitune_plugin.cli.sft import MODULE, main, train
from bitune_plugin.cli.sft_settings import make_parser, read_settings
from models import WORDS, tiny, word_tokenizer

ROWS = [{"question": " ".join(WORDS[i : i + 4]), "answer": " ".join(WORDS[i : i + 2])} for i in range(12)]

TEMPLATES = {"prompt_template": "user {{question}} assistant", "completion_template": " {{answer}}"}

LORA = {"use_peft": True, "lora_r": 2, "lora_target_modules": "all-linear"}

IA3 = {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a dataset of columns that Bitune does not know."""
    folder = tmp_path_factory.mktemp("sft")
    tiny().save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return folder


@pytest.fixture
def config(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a YAML file, and returns the arguments that name it. A setting that is `None` is left out."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    usual = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "data"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "bf16": False,
        **TEMPLATES,
        **LORA,
    }

    def write(**settings: Any) -> list[str]:
        file = tmp_path / "config.yaml"
        kept = {name: value for name, value in {**usual, **settings}.items() if value is not None}
        file.write_text(yaml.safe_dump(kept))
        return ["--config", str(file)]

    return write


class TestSettings:
    def test_of_bitune_are_taken_from_file_and_command_line(self, config: Any) -> None:
        written = config(mixing="relu", theta_init=0.5, share_adapter=True, assistant_turns="each")
        settings = read_settings([*written, "--mixing", "abs", "--mixing_granularity", "head"])
        bitune = settings.bitune
        assert (bitune.mixing, bitune.mixing_granularity, bitune.theta_init) == ("abs", "head", 0.5)
        assert (bitune.share_adapter, bitune.second_pass_attention) == (True, "bidirectional")
        assert settings.training.assistant_turns == "each"
        assert settings.templates == tuple(TEMPLATES.values())

    def test_are_all_that_trl_sft_takes(self) -> None:
        def options(parser: Any) -> set[str]:
            return {option for action in parser._actions for option in action.option_strings}

        assert options(make_parser()) > options(trl.scripts.sft.make_parser())

    def test_use_peft_makes_a_lora(self, config: Any) -> None:
        adapter = read_settings(config(use_dora=True)).bitune.adapter
        assert isinstance(adapter, LoraConfig)
        assert (adapter.r, adapter.use_dora) == (2, True)

    @pytest.mark.parametrize(("in_file", "behind"), [(IA3, []), (None, ["--adapter", json.dumps(IA3)])])
    def test_adapter_is_any_peft_config(self, config: Any, in_file: Any, behind: list[str]) -> None:
        adapter = read_settings([*config(use_peft=None, adapter=in_file), *behind]).bitune.adapter
        assert isinstance(adapter, IA3Config)
        assert adapter.target_modules == set(IA3["target_modules"])

    def test_env_is_set(self, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BITUNE_OF_THE_TEST", "before")
        read_settings(config(env={"BITUNE_OF_THE_TEST": "after"}))
        assert os.environ["BITUNE_OF_THE_TEST"] == "after"

    def test_the_file_may_follow_an_equals_sign(self, config: Any) -> None:
        name, file = config(mixing="relu")
        assert read_settings([f"{name}={file}"]).bitune.mixing == "relu"

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"completion_template": None}, "only one is set. Set both, or neither"),
            ({"prompt_template": 5}, "`prompt_template=5` must be text"),
            ({"theta_init": [0.1]}, r"config\.yaml: `theta_init=\[0\.1\]` must be a number"),
            ({"theta_init": float("nan")}, "`theta_init=nan` must be a finite number"),
            ({"theta_init": -1}, "`theta_init=-1` must be a number between"),
            ({"mixing": {"abs": {"relu": 1}}}, "`mixing=.* must be text"),
            ({"mixing_granularity": 1}, "`mixing_granularity=1` must be text"),
            ({"share_adapter": [True]}, "`share_adapter=.* must be true or false"),
            ({"second_pass_attention": True}, "`second_pass_attention=True` must be text"),
            ({"completion_template": {"answer": 1}}, "`completion_template=.* must be text"),
            ({"assistant_turns": "abc"}, "`assistant_turns='abc'` is unknown"),
            ({"assistant_turns": ["last"]}, "`assistant_turns=.* must be text"),
            ({"theta_learning_rate": {"a": 1}}, "`theta_learning_rate=.* must be a number"),
            ({"theta_learning_rate": -1.0}, "`theta_learning_rate=-1.0` must be a finite number"),
            ({"theta_max_grad_norm": float("inf")}, "`theta_max_grad_norm=inf` must be positive"),
            ({"drop_overlong": 7}, "`drop_overlong=7` must be true or false"),
            ({"max_length": -3}, "`max_length=-3` leaves no token"),
            ({"lora_r": float("inf")}, "`lora_r=inf` must be a finite number"),
            ({"lora_target_modules": {"q": 1}}, "`lora_target_modules=.* must be .*a list"),
            ({"use_peft": None, "adapter": {"peft_type": "LORA", "r": "8"}}, "`r='8'` must be a number"),
            ({"use_peft": None, "adapter": {"peft_type": ["LORA"]}}, r"`peft_type=\['LORA'\]`"),
            ({"use_peft": None, "adapter": '{"peft_type": ' + "[" * 9000}, "is not valid JSON"),
            ({"adapter": IA3}, "`adapter` and `use_peft` both"),
            ({"use_peft": None, "adapter": {"peft_type": "LORAX"}}, "`peft_type='LORAX'`"),
            ({"use_peft": None, "adapter": {"peft_type": "LORA", "rank": 8}}, r"LoraConfig does not know: \['rank'\]"),
            ({"use_peft": None, "adapter": {}}, "`peft_type=None`"),
            ({"use_peft": None, "adapter": ["LORA"]}, "`adapter` must be a PEFT config"),
            ({"use_peft": None, "adapter": "{'peft_type': 1}"}, "is not valid JSON"),
            ({"mixing": "abss"}, "`mixing='abss'` is unknown"),
            ({"model_name_or_path": None}, "`model_name_or_path` is missing"),
            ({"datasets": [{"pth": "x"}]}, "unexpected keyword argument 'pth'"),
        ],
        ids=lambda case: "-".join(case) if isinstance(case, dict) else "",
    )
    def test_that_do_not_fit_are_refused(self, config: Any, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_settings(config(**settings))

    def test_numbers_that_yaml_takes_for_text_are_numbers(self, config: Any) -> None:
        settings = read_settings(config(theta_init="1e-3", theta_learning_rate="5e-4", learning_rate="1e-4"))
        numbers = (settings.bitune.theta_init, settings.training.theta_learning_rate, settings.training.learning_rate)
        assert numbers == (1e-3, 5e-4, 1e-4)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a: [1", "not valid YAML"),
            ("a: " + "[" * 3000, "not valid YAML"),
            ("", "must contain a YAML mapping"),
            ("\xff", "must contain|not valid YAML"),
        ],
    )
    def test_files_that_hold_none_are_refused(self, tmp_path: Path, text: str, message: str) -> None:
        file = tmp_path / "broken.yaml"
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_settings(["--config", str(file)])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["recipe.yaml"], "'recipe.yaml' is no setting. A YAML file goes behind `--config`"),
            (["--config"], "wants a YAML file"),
            (["--config", "a.yaml", "--config", "b.yaml"], "given twice"),
        ],
    )
    def test_a_file_is_named_once(self, arguments: list[str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_settings(arguments)


class TestHelp:
    def test_lists_the_settings_of_bitune_first_and_ends_with_examples(self, capsys: pytest.CaptureFixture) -> None:
        with pytest.raises(SystemExit) as left:
            main(["--help"])
        assert left.value.code == 0
        ours, theirs = capsys.readouterr().out.split("\nTRL, as `trl sft --help` lists them:\n")
        for name in ("adapter", "mixing", "prompt_template", "completion_template", "theta_learning_rate"):
            assert f"--{name}" in ours
        assert "--learning_rate" not in ours.split("\nBitune:\n")[1]
        assert "bitune sft --config FILE.yaml" in theirs.split("\nexamples:\n")[1]

    def test_is_what_the_command_alone_prints(self, capsys: pytest.CaptureFixture) -> None:
        with pytest.raises(SystemExit):
            main([])
        assert "usage: bitune sft" in capsys.readouterr().out


class TestLaunch:
    @pytest.fixture
    def launched(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        launched: list[Any] = []
        monkeypatch.setattr(sft, "launch_command", launched.append)
        return launched

    def test_hands_the_settings_of_accelerate_on(self, config: Any, launched: list[Any]) -> None:
        arguments = [*config(num_machines=2), "--num_processes", "3", "--accelerate_config", "zero2", "--lora_r", "3"]
        main(arguments)
        [launch] = launched
        assert (launch.module, launch.training_script, launch.training_script_args) == (True, MODULE, arguments)
        assert (launch.num_machines, launch.num_processes) == (2, 3)
        assert Path(launch.config_file).name == "zero2.yaml"

    @pytest.mark.parametrize(
        ("settings", "arguments", "message"),
        [
            (
                {},
                ["--lerning_rate", "1"],
                "'--lerning_rate' .* nor of `accelerate launch`. Did you mean --learning_rate",
            ),
            ({"mixng": "abs"}, [], "'--mixng' .* Did you mean --mixing"),
            ({}, ["other.yaml"], "'other.yaml' is a setting neither"),
            ({}, ["--accelerate_config", "fsdp9"], "fsdp9 is neither a file nor"),
        ],
    )
    def test_refuses_settings_that_nobody_knows(
        self, config: Any, launched: list[Any], settings: dict[str, Any], arguments: list[str], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            main([*config(**settings), *arguments])
        assert launched == []

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (ChildFailedError("sft", {0: ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file="none")}), 1),
            (SignalException("interrupted", signal.SIGINT), 130),
            (SignalException("terminated", signal.SIGTERM), 143),
        ],
        ids=["failed", "interrupted", "terminated"],
    )
    def test_leaves_it_to_several_processes_to_say_why_they_ended(
        self, config: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
    ) -> None:
        def fail(_: Any) -> None:
            raise error

        monkeypatch.setattr(sft, "launch_command", fail)
        with pytest.raises(SystemExit) as left:
            main(config())
        assert left.value.code == code

    def test_one_process_where_several_were_asked_for_is_refused(self, config: Any) -> None:
        with pytest.raises(ValueError, match=r"`num_processes=2`, and accelerate has started one.*--accelerate_config"):
            train([*config(), "--num_processes", "2"])

    def test_trains_in_a_process_of_its_own(
        self, config: Any, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
    ) -> None:
        main([*config(), "--num_processes", "1"])
        printed = capfd.readouterr().out
        evaluation = f"lm_eval --model bitune --model_args pretrained={folder / 'model'},peft={tmp_path / 'out'}"
        assert f"The adapter is in {tmp_path / 'out'}" in printed
        assert evaluation in printed
        PeftModel.from_pretrained(tiny(), tmp_path / "out")

    def test_a_process_says_in_one_line_what_went_wrong(
        self, config: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["sft", *config(dataset_train_split="trian")])
        monkeypatch.delitem(sys.modules, MODULE)
        with pytest.raises(SystemExit) as left:
            runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
        message = str(left.value.code) + capsys.readouterr().err
        assert "`dataset_train_split='trian'` is no split of the dataset. Choose one of ['train']" in message


def texts(trainer: Any) -> list[tuple[str, str]]:
    """Prompt and completion of each sample that is learnt."""
    decode = trainer.processing_class.decode
    parted = [(s["input_ids"], sum(s["prompt_mask"])) for s in trainer.train_dataset]
    return [(decode(ids[:boundary]), decode(ids[boundary:])) for ids, boundary in parted]


class TestTraining:
    expected = [(f"user {row['question']} assistant", f"{row['answer']} <eos>") for row in ROWS]  # noqa: RUF012

    @pytest.fixture
    def spaced(self, config: Any) -> Any:
        """The tokenizer of the tests knows whole words alone."""
        return lambda **settings: config(**{"completion_template": " {{answer}} <eos>", **settings})

    @pytest.mark.parametrize("streaming", [False, True])
    def test_renders_the_templates(self, spaced: Any, streaming: bool) -> None:
        trainer = train(spaced(dataset_streaming=streaming))
        assert texts(trainer) == self.expected
        assert trainer.state.global_step == 1

    def test_of_a_mixture_with_evaluation(self, spaced: Any, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        mixture = [{"path": str(folder / "data")}] * 2
        evaluation = {"test_split_size": 0.25, "eval_strategy": "steps", "eval_steps": 1}
        with caplog.at_level("WARNING"):
            trainer = train(spaced(dataset_name="other", datasets=mixture, **evaluation))
        assert "`dataset_name=other` is ignored" in caplog.text
        assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (18, 6)
        assert set(texts(trainer)) <= set(self.expected)
        assert any("eval_loss" in entry for entry in trainer.state.log_history)

    def test_packs(self, spaced: Any) -> None:
        trainer = train(spaced(packing=True, max_length=40))
        assert len(trainer.train_dataset) < len(ROWS)

    def test_warms_the_bidirectional_adapter_up(self, spaced: Any) -> None:
        written = spaced(warmup_prompts=8, warmup_learning_rate="1e-3")  # which YAML takes for text
        trainer = train([*written, "--warmup_prompts", "4"])
        assert trainer.args.warmup_learning_rate == 1e-3
        assert len(trainer.warm_up_losses) == 1

    def test_trains_the_adapter_that_was_asked_for(self, spaced: Any, tmp_path: Path) -> None:
        train(spaced(use_peft=None, adapter=IA3, mixing="relu"))
        saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert (saved["peft_type"], saved["adapter"]["peft_type"], saved["mixing"]) == ("BITUNE", "IA3", "relu")

    def test_trains_the_whole_model_if_nothing_else_was_asked_for(self, spaced: Any, tmp_path: Path) -> None:
        train(spaced(use_peft=None))
        saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["adapter"]
        assert (saved["peft_type"], saved["modules_to_save"]) == ("BITUNE_FULL", ["lm_head", "model.embed_tokens"])

    def test_of_a_damaged_file_is_refused(self, spaced: Any, tmp_path: Path) -> None:
        (tmp_path / "damaged").mkdir()
        (tmp_path / "damaged" / "train.jsonl").write_text('{"question": ')
        with pytest.raises(
            ValueError, match=r"`dataset_name=.*damaged` cannot be read: (JSON parse error|Expected object)"
        ):
            train(spaced(dataset_name=str(tmp_path / "damaged")))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"prompt_template": "{{quesion}}"}, r"'quesion' is undefined. The columns are \['answer', 'question'\]"),
            ({"prompt_template": None, "completion_template": None}, "set `prompt_template` and `completion_template`"),
            ({"eval_strategy": "steps"}, r"`dataset_test_split='test'` is no split .* \['train'\]"),
            ({"dataset_name": None}, "There is no dataset"),
            (
                {"datasets": [{"path": "x"}], "streaming": True, "test_split_size": 0.5},
                "`test_split_size` cannot part a stream",
            ),
        ],
        ids=["column", "no templates", "split", "no dataset", "parted stream"],
    )
    def test_of_datasets_that_do_not_fit_is_refused(self, spaced: Any, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            train(spaced(**settings))
