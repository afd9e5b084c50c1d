"""The warm-up experiment: it trains the bidirectional adapter and nothing else, on what its losses say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn.functional import cross_entropy

from models import randomise_adapters, tiny, word_tokenizer

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

from evidence import experiment, run, warm_up  # noqa: E402
from evidence.experiment import CURVE, Run, bitune, lora  # noqa: E402

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16], [17, 18, 19]]


def plain() -> PeftModel:
    model = get_peft_model(tiny("llama", attention="eager"), lora(8))
    randomise_adapters(model)
    return model


def test_full_attention_sees_what_comes_and_no_padding() -> None:
    model = plain()
    alone = warm_up.hidden_states(model, torch.tensor([[5, 6, 7]]), torch.ones(1, 3).bool(), full=True)
    changed = warm_up.hidden_states(model, torch.tensor([[5, 6, 8]]), torch.ones(1, 3).bool(), full=True)
    assert not torch.allclose(alone[0, 0], changed[0, 0], atol=1e-3)
    attended = torch.tensor([[1, 1, 1, 0]]).bool()
    padded = warm_up.hidden_states(model, torch.tensor([[5, 6, 7, 0]]), attended, full=True)
    assert torch.allclose(padded[0, :3], alone[0], atol=1e-5)


def test_distillation_is_0_where_full_attention_is_causal() -> None:
    model = get_peft_model(tiny("llama", attention="eager"), lora(8))  # an adapter that adds nothing yet
    one_token, everywhere = torch.tensor([[5], [6]]), torch.ones(2, 1).bool()
    assert warm_up.distillation(model, one_token, everywhere).item() == pytest.approx(0, abs=1e-10)
    assert warm_up.distillation(model, torch.tensor([[5, 6, 7]]), torch.ones(1, 3).bool()).item() > 1e-3


def test_masked_tokens_are_predicted_from_the_token_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain()
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    attended = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    replaced = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 0]]).bool()
    monkeypatch.setattr(warm_up, "choose_tokens", lambda _: replaced)
    found = warm_up.masked_prediction(replacement=90)(model, tokens, attended)
    expected = []
    for row, length in ((0, 4), (1, 3)):
        read = [90 if replaced[row, place] else int(tokens[row, place]) for place in range(length)]
        states = warm_up.hidden_states(model, torch.tensor([read]), torch.ones(1, length).bool(), full=True)
        logits = model.get_base_model().lm_head(states)[0]
        expected += [cross_entropy(logits[p - 1], tokens[row, p]) for p in range(length) if replaced[row, p]]
    assert found.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_tokens_to_predict_are_neither_first_nor_padding() -> None:
    torch.manual_seed(0)
    attended = torch.ones(50, 20).bool()
    attended[:, 15:] = False
    chosen = warm_up.choose_tokens(attended)
    assert not chosen[:, 0].any()
    assert not chosen[:, 15:].any()
    assert 0.1 < chosen[:, 1:15].float().mean() < 0.3
    assert warm_up.choose_tokens(torch.ones(1, 2).bool()).tolist() == [[False, True]]
    assert not warm_up.choose_tokens(torch.ones(3, 1).bool()).any()


@pytest.mark.parametrize("loss", [warm_up.distillation, warm_up.masked_prediction(90)], ids=["distil", "mntp"])
def test_a_warm_up_trains_the_bidirectional_adapter_alone(loss: warm_up.Loss) -> None:
    trained, losses = warm_up.warm_up(tiny("llama", attention="eager"), PROMPTS, loss, batch_size=2)
    assert len(losses) == 2
    model = get_peft_model(tiny(), bitune())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    warm_up.move_to_bidirectional(trained, model)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if ".bidirectional." in name}
    theirs = dict(trained.named_parameters())
    for name, parameter in model.named_parameters():
        if name in changed:
            assert torch.equal(parameter, theirs[name.replace(".bidirectional.default.", ".default.")])


def test_adapters_of_different_shape_are_not_mixed_up() -> None:
    other = get_peft_model(tiny(), lora(8))
    model = get_peft_model(tiny(num_hidden_layers=1), bitune())
    with pytest.raises(ValueError, match=r"The adapters differ in .*Use one LoRA config"):
        warm_up.move_to_bidirectional(other, model)


@pytest.fixture
def tiny_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny(max_position_embeddings=512).save_pretrained(tmp_path / "tiny")
    word_tokenizer().save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(run, "VALIDATION", 2)
    monkeypatch.setattr(run, "TEST", 3)
    monkeypatch.setattr(warm_up, "RESULTS", tmp_path / "results")
    return tmp_path / "tiny"


def test_the_experiment_keeps_a_result_for_each_kind_and_does_none_twice(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--model", tiny_checkpoint, "--tasks", "syllogism", "--seeds", 0, "--samples", 4]
    monkeypatch.setattr(sys, "argv", ["warm_up.py", *map(str, settings)])
    warm_up.main()
    files = sorted((warm_up.RESULTS / "tiny" / "syllogism").glob("*.json"))
    assert [file.name.split("_")[0] for file in files] == ["distil", "mntp", "none"]
    assert [len(json.loads(file.read_text())["warm_up_losses"]) for file in files] == [1, 1, 0]
    assert capsys.readouterr().out.count("| syllogism |") == 3
    monkeypatch.setattr(warm_up, "execute", lambda *_: pytest.fail("it was done already"))
    warm_up.main()


def test_without_a_warm_up_scores_are_those_of_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "RESULTS", tmp_path / "curves")
    monkeypatch.setattr(warm_up, "RESULTS", tmp_path / "warm_up")
    one = Run("tiny", "syllogism", warm_up.METHOD, warm_up.RATE, 0, (256, 512))
    assert warm_up.points_of(one, "none") is None
    points = [{"samples": size, "test": "01"} for size in CURVE]
    Run("tiny", "syllogism", warm_up.METHOD, warm_up.RATE, 0, CURVE).save({"points": points})
    assert warm_up.points_of(one, "none") == points[:2]
    assert warm_up.points_of(one, "distil") is None
