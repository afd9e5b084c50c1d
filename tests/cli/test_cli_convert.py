"""`bitune convert`, on a folder of the reference implementation. Its variants are in `checkpoints/test_authors.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from bitune_plugin import BituneConfig
from bitune_plugin.cli import main
from reference import DATA, assert_same_logits, case

FOLDER = DATA / "llama-checkpoint"


def test_the_logits_stay_the_same(tmp_path: Path) -> None:
    assert main(["convert", str(FOLDER), str(tmp_path / "ours")]) == 0
    assert_same_logits(tmp_path / "ours", case("llama"))


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    main(["convert", str(FOLDER), str(tmp_path / "ours")])
    theirs, second, ours = (
        load_file(folder / "adapter_model.safetensors") for folder in (FOLDER, FOLDER / "prefill", tmp_path / "ours")
    )
    kept = {key: value for key, value in theirs.items() if "pass_scale" not in key}
    kept |= {key.replace(".weight", ".bidirectional.weight"): value for key, value in second.items() if key in kept}
    for kind in ("key", "value"):
        for layer, theta in enumerate(theirs[f"base_model.model.pass_scale_{kind[0]}.weight"]):
            kept[f"base_model.model.model.layers.{layer}.self_attn.bitune_mixing.theta_{kind}"] = theta[None]
    assert ours.keys() == kept.keys()
    assert all(ours[key].equal(value) for key, value in kept.items())


@pytest.mark.parametrize("second_pass", ["causal", "anticausal"])
def test_it_says_the_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str], second_pass: str) -> None:
    main(["convert", str(FOLDER), str(tmp_path / "ours"), "--second-pass-attention", second_pass])
    assert f"mixing=abs mixing_granularity=layer second_pass_attention={second_pass}" in capsys.readouterr().out
    assert BituneConfig.from_pretrained(str(tmp_path / "ours")).second_pass_attention == second_pass


def test_it_reads_conversations_as_the_option_says(tmp_path: Path) -> None:
    for option, expected in (([], "reread"), (["--multi-turn", "alternate"], "alternate")):
        main(["convert", str(FOLDER), str(tmp_path / expected), *option])
        assert BituneConfig.from_pretrained(str(tmp_path / expected)).multi_turn == expected


@pytest.mark.parametrize("option", ["--share-adapter", "--no-share-adapter"])
def test_the_adapter_is_shared_as_the_option_says(tmp_path: Path, option: str) -> None:
    main(["convert", str(FOLDER), str(tmp_path / "ours"), option])
    assert BituneConfig.from_pretrained(str(tmp_path / "ours")).share_adapter == (option == "--share-adapter")


@pytest.mark.parametrize(
    "option", [["--mixing", "relu"], ["--mixing", "none"], ["--theta-init", "-1"], ["--theta-init", "nan"]]
)
def test_settings_that_do_not_fit_are_an_error_and_nothing_is_written(tmp_path: Path, capsys, option: list) -> None:
    assert main(["convert", str(FOLDER), str(tmp_path / "ours"), *option]) == 1
    assert capsys.readouterr().err.startswith("bitune convert: error: ")
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_not_empty_unless_it_is_to_be_replaced(tmp_path: Path, capsys) -> None:
    arguments = ["convert", str(FOLDER), str(tmp_path / "ours")]
    assert [main(arguments), main(arguments), main([*arguments, "--force"])] == [0, 1, 0]
    assert "--force" in capsys.readouterr().err
