"""The warm-up of the bidirectional adapter: masked next-token prediction on prompts, before training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import settings as of_hypothesis
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, TorchAoConfig, TrainerCallback

from bitune_plugin import BituneConfig
from bitune_plugin.integrations.trl import warm_up
from bitune_plugin.integrations.trl.warm_up import PromptTrainer, choose_tokens
from bitune_plugin.tuner.optimizers import is_of_bidirectional
from models import randomise_adapters, tiny, word_tokenizer
from three_pass import ThreePass, attention_of
from training import LORA, build, documents, losses, oracle_of, pairs


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Any]:
    return lambda **settings: build(tmp_path, **{"warmup_prompts": 8, "max_steps": 1, **settings})


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def literal_loss(oracle: ThreePass, batch: dict[str, Any], replaced: torch.Tensor, token: int) -> torch.Tensor:
    """Mean cross-entropy of the replaced tokens by the bidirectional adapter with full attention, prompt by prompt."""
    given = {**batch, "input_ids": batch["input_ids"].masked_fill(replaced, token)}
    losses = []
    for (ids, _, prompt), (shown, _, _), (chosen, _, _) in zip(
        documents(batch), documents(given), documents({**batch, "input_ids": replaced.long()}), strict=True
    ):
        if prompt < 2:
            continue
        with attention_of("bidirectional", oracle.model.get_base_model()):
            logits = oracle._run("bidirectional", shown[None, : prompt - 1], oracle._cache(), 0).logits[0]
        hit = chosen[1:prompt].bool()
        losses.append(cross_entropy(logits[hit], ids[1:prompt][hit], reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"packing": True, "max_length": 64},
        {"padding_free": True, "max_length": None},
        {"gradient_checkpointing": True},
    ],
    ids=["padded", "packed", "padding free", "checkpointed"],
)
def test_loss_and_gradients_are_those_of_one_adapter_with_full_attention(
    trainer: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    t = trainer(**settings)
    randomise_adapters(t.model)
    oracle = oracle_of(t)
    phase = PromptTrainer(t, 8)
    batch = next(iter(phase.get_train_dataloader()))
    torch.manual_seed(0)
    replaced = choose_tokens(batch["prompt_mask"], batch.get("position_ids"))
    assert 0 < replaced.sum() < batch["prompt_mask"].sum()
    monkeypatch.setattr(warm_up, "choose_tokens", lambda *_: replaced)
    t.model.train()
    loss = phase.compute_loss(t.model, dict(batch))
    expected = literal_loss(oracle, batch, replaced, phase.replacement)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    loss.backward()
    expected.backward()
    compared = 0
    for mine, theirs in oracle.pairs(t.model):
        if mine.grad is not None:
            torch.testing.assert_close(theirs.grad, mine.grad, atol=1e-5, rtol=1e-4)
            compared += 1
    assert compared > 20
    with_gradient = {n for n, p in t.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient
    assert all(map(is_of_bidirectional, with_gradient))


def test_only_the_bidirectional_adapter_is_warmed_up(trainer: Any) -> None:
    t = trainer()
    before = weights(t.model)
    losses = warm_up.warm_up(t, 8)
    assert len(losses) == 2  # batches of four
    after = weights(t.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(map(is_of_bidirectional, changed))
    assert before.keys() == after.keys()  # all that was trained can be trained again


def test_it_learns_what_prompts_have_in_common(trainer: Any) -> None:
    t = trainer(train_dataset=Dataset.from_list(pairs(2) * 40), warmup_learning_rate=0.03, lr_scheduler_type="constant")
    losses = warm_up.warm_up(t, 80)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_training_comes_after_it_once(trainer: Any) -> None:
    t = trainer(max_steps=2)
    t.train()
    first = t.warm_up_losses
    assert len(first) == 2
    assert t.state.global_step == 2
    t.train()
    assert t.warm_up_losses is first


def test_a_resumed_training_is_not_warmed_up(trainer: Any, tmp_path: Path) -> None:
    trainer(max_steps=1, save_strategy="steps", save_steps=1).train()
    t = trainer(max_steps=2)
    t.train(resume_from_checkpoint=True)
    assert t.warm_up_losses == []
    assert t.state.global_step == 2


def test_the_adapter_may_have_any_name(trainer: Any) -> None:
    model = get_peft_model(tiny(), BituneConfig(adapter=copy.deepcopy(LORA)), adapter_name="mine")
    t = trainer(model=model, peft_config=None)
    assert len(warm_up.warm_up(t, 8)) == 2
    shared = BituneConfig(adapter=copy.deepcopy(LORA), share_adapter=True)
    with pytest.raises(ValueError, match="`share_adapter=True` leaves none"):
        trainer(model=get_peft_model(tiny(), shared, adapter_name="mine"), peft_config=None)


def test_an_interrupted_warm_up_leaves_the_model_as_it_was(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def state(model: torch.nn.Module) -> Any:
        hooks = [hook.__name__ for module in model.modules() for hook in module._forward_hooks.values()]
        return [name for name in hooks if "neftune" in name], [
            (name, p.requires_grad) for name, p in model.named_parameters()
        ]

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    t = trainer(neftune_noise_alpha=5)
    before = state(t.model)
    with monkeypatch.context() as patch:
        patch.setattr(PromptTrainer, "compute_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            t.train()
    assert state(t.model) == before
    t.train()
    assert len(t.warm_up_losses) == 2


def test_without_the_setting_training_is_as_before(trainer: Any) -> None:
    plain, none = trainer(warmup_prompts=0), trainer(warmup_prompts=0, warmup_learning_rate=0.1)
    for t in (plain, none):
        t.train()
        assert t.warm_up_losses == []
    for name, value in weights(plain.model).items():
        assert torch.equal(value, weights(none.model)[name])


def test_a_stream_and_more_prompts_than_there_are(trainer: Any) -> None:
    stream = trainer(train_dataset=Dataset.from_list(pairs()).to_iterable_dataset())
    stream.train()
    assert len(stream.warm_up_losses) == 2
    all_of_them = trainer(warmup_prompts=1000)
    all_of_them.train()
    assert len(all_of_them.warm_up_losses) == 6  # 24 samples


def test_a_stream_that_ends_early_is_read_once(trainer: Any) -> None:
    t = trainer(warmup_prompts=40, train_dataset=Dataset.from_list(pairs(8)).to_iterable_dataset())
    assert len(warm_up.warm_up(t, 40)) == 2


@pytest.mark.parametrize(("prompts", "steps"), [(3, 1), (6, 2)])
def test_each_prompt_is_read_once_whatever_is_left_of_a_batch(trainer: Any, prompts: int, steps: int) -> None:
    t = trainer(dataloader_drop_last=True)
    read = []
    collate = t.data_collator
    t.data_collator = lambda rows: read.extend(rows) or collate(rows)
    assert len(warm_up.warm_up(t, prompts)) == steps
    assert len(read) == prompts
    assert t.args.dataloader_drop_last


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"warmup_prompts": -1}, "`warmup_prompts=-1` must be a whole number"),
        ({"warmup_prompts": True}, "`warmup_prompts=True` must be"),
        ({"warmup_prompts": 0.5}, "`warmup_prompts=0.5` must be"),
        ({"warmup_learning_rate": -1.0}, "`warmup_learning_rate=-1.0` must be a finite number"),
        ({"peft_config": {"share_adapter": True}}, "`share_adapter=True` leaves none"),
        ({"peft_config": {"second_pass_attention": "causal"}}, "`second_pass_attention='causal'` leaves none"),
    ],
)
def test_what_means_nothing_is_refused(trainer: Any, given: dict[str, Any], message: str) -> None:
    if "peft_config" in given:
        given = {"peft_config": BituneConfig(adapter=LORA, **given["peft_config"])}
    with pytest.raises(ValueError, match=message):
        trainer(**given)


def test_the_token_that_replaces_others() -> None:
    tokenizer = word_tokenizer()
    underscore = tokenizer("_", add_special_tokens=False).input_ids[-1]
    assert warm_up.replacement_of(tokenizer, 97) == underscore
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    assert warm_up.replacement_of(tokenizer, 97) == tokenizer.mask_token_id
    assert warm_up.replacement_of(tokenizer, tokenizer.mask_token_id) == underscore  # the model has no embedding of it


class TestWhatTheTrainerWasGiven:
    """The warm-up leaves the rest of a training run to training."""

    def test_callbacks_and_optimizers_are_those_of_training(self, trainer: Any) -> None:
        steps: list[str] = []

        class Counts(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                steps.append("callback")

        model = get_peft_model(tiny(), BituneConfig(adapter=copy.deepcopy(LORA)))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.125)
        optimizer.register_step_post_hook(lambda *_: steps.append("optimizer"))
        given = (optimizer, LambdaLR(optimizer, lambda step: 1.0))
        t = trainer(model=model, peft_config=None, optimizers=given, callbacks=[Counts()])

        t.train()

        assert len(t.warm_up_losses) == 2
        assert steps == ["optimizer", "callback"]

    def test_its_learning_rate_goes_before_that_of_a_given_class(self, trainer: Any) -> None:
        built: list[Any] = []

        class Noted(torch.optim.SGD):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                built.append(kwargs)
                super().__init__(*args, **kwargs)

        given = (Noted, {"lr": 0.125, "momentum": 0.5})
        trainer(optimizer_cls_and_kwargs=given, warmup_learning_rate=0.25).train()
        trainer(optimizer_cls_and_kwargs=given).train()
        assert [kwargs["lr"] for kwargs in built] == [0.25, 0.125, 0.125, 0.125]
        assert {kwargs["momentum"] for kwargs in built} == {0.5}

    def test_nothing_is_evaluated_or_saved(self, trainer: Any, tmp_path: Path) -> None:
        rows = Dataset.from_list(pairs(4))
        evaluation = {"eval_dataset": rows, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
        saving = {"save_strategy": "steps", "save_steps": 1, "enable_jit_checkpoint": True}
        t = trainer(**evaluation, **saving)
        phase = PromptTrainer(t, 8)
        assert not any("Checkpoint" in type(callback).__name__ for callback in phase.callback_handler.callbacks)
        assert len(warm_up.warm_up(t, 8)) == 2
        assert list(tmp_path.glob("checkpoint-*")) == []
        t.train()
        assert len([entry for entry in t.state.log_history if "eval_loss" in entry]) == 2

    def test_activations_are_offloaded(self, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        offloaded: list[torch.Tensor] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: offloaded.append(t) or t, lambda t: t)
        monkeypatch.setattr("trl.trainer.sft_trainer.get_act_offloading_ctx_manager", lambda model: hooks)
        warm_up.warm_up(trainer(activation_offloading=True), 8)
        assert offloaded

    def test_a_smaller_batch_that_fits_into_memory_reads_all_prompts(self, trainer: Any) -> None:
        t, read = trainer(auto_find_batch_size=True), []
        collate = t.data_collator

        def failing(rows: Any) -> Any:
            if len(rows) > 2:
                raise RuntimeError("CUDA out of memory.")
            read.extend(rows)
            return collate(rows)

        t.data_collator = failing
        warm_up.warm_up(t, 8)
        assert len(read) == 8

    @pytest.mark.parametrize(
        "settings",
        [{"bf16": True}, {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}],
        ids=["bf16", "accumulated"],
    )
    def test_at_a_rate_of_0_training_is_as_without_it(self, trainer: Any, settings: dict[str, Any]) -> None:
        settings = {**settings, "train_sampling_strategy": "sequential", "warmup_learning_rate": 0.0, "max_steps": 3}
        with_it, without = trainer(**settings), trainer(**settings, warmup_prompts=0)
        for t in (with_it, without):
            t.train()
        assert len(with_it.warm_up_losses) == 2
        assert losses(with_it) == losses(without)

    def test_a_seed_gives_the_same_numbers(self, trainer: Any) -> None:
        runs = []
        for other in (1, 2):
            torch.manual_seed(other)
            t = trainer(neftune_noise_alpha=5)
            t.train()
            runs.append([t.warm_up_losses, losses(t)])
        assert runs[0] == runs[1]


class TestPrompts:
    @pytest.mark.parametrize(
        "settings", [{}, {"padding_free": True, "max_length": None}], ids=["padded", "padding free"]
    )
    def test_are_told_by_labels_alone(self, trainer: Any, settings: dict[str, Any]) -> None:
        prepared = trainer(**settings)
        rows = prepared.train_dataset.select_columns(["input_ids", "labels"])
        unprepared = trainer(**settings, train_dataset=rows, dataset_kwargs={"skip_prepare_dataset": True})
        assert "prompt_mask" not in next(iter(unprepared.get_train_dataloader()))
        assert warm_up.warm_up(unprepared, 8) == warm_up.warm_up(prepared, 8)

    def test_of_one_token_each_are_refused(self, trainer: Any) -> None:
        short = [{"prompt": "w1", "completion": " w2 w3"}] * 4
        t = trainer(train_dataset=Dataset.from_list(short + pairs(4)), train_sampling_strategy="sequential")
        first, second = warm_up.warm_up(t, 8)
        assert (first, second > 0) == (0, True)
        with pytest.raises(ValueError, match=r"`warmup_prompts=8`: none of these prompts.*Set `warmup_prompts=0`"):
            trainer(train_dataset=Dataset.from_list(short)).train()


class TestModels:
    def test_with_two_adapters_the_active_one_alone_is_warmed_up(self, trainer: Any) -> None:
        model = get_peft_model(tiny(), BituneConfig(adapter=copy.deepcopy(LORA)), adapter_name="first")
        model.add_adapter("second", BituneConfig(adapter=copy.deepcopy(LORA)))
        model.set_adapter("second")
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        warm_up.warm_up(trainer(model=model, peft_config=None), 8)
        changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
        assert changed
        assert all(is_of_bidirectional(name) and ".second." in name for name in changed)
        assert not any(p.requires_grad for name, p in model.named_parameters() if ".first." in name)

    def test_of_which_nothing_is_trained_are_refused(self, trainer: Any) -> None:
        model = get_peft_model(tiny(), BituneConfig(adapter=copy.deepcopy(LORA)))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and not is_of_bidirectional(name))
        with pytest.raises(ValueError, match="No parameter of the model would be trained"):
            trainer(model=model, peft_config=None).train()

    @pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
    def test_with_experts_are_not_balanced(self, trainer: Any, architecture: str) -> None:
        """The balancing loss counts tokens as routed in the causal stream."""
        adapter = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        found = [
            warm_up.warm_up(
                trainer(model=tiny(architecture), peft_config=copy.deepcopy(adapter), router_aux_loss_coef=coef), 8
            )
            for coef in (0.0, 0.5)
        ]
        assert found[0] == found[1]

    def test_compiled_have_the_same_losses(self, trainer: Any) -> None:
        torch._dynamo.reset()
        compiled = trainer(model=tiny(num_hidden_layers=1), torch_compile=True, torch_compile_backend="aot_eager")
        compiled.train()
        torch._dynamo.reset()
        assert isinstance(compiled.model_wrapped, torch._dynamo.OptimizedModule)
        eager = trainer(model=tiny(num_hidden_layers=1))  # accelerate has one setting of this for all trainers
        eager.train()
        assert compiled.warm_up_losses == pytest.approx(eager.warm_up_losses, abs=1e-4)
        assert losses(compiled) == pytest.approx(losses(eager), abs=1e-4)

    def test_are_left_as_they_were(self, trainer: Any) -> None:
        t = trainer(bf16=True)
        before = dict(vars(t.model))
        warm_up.warm_up(t, 8)
        assert vars(t.model) == before

    def test_that_are_quantised(self, trainer: Any, tmp_path: Path) -> None:
        quantisation = TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())
        tiny(hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(tmp_path / "base")
        options = {"quantization_config": quantisation, "device_map": "cpu", "dtype": torch.float32}
        t = trainer(model=AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options))
        before = weights(t.model)
        t.train()
        assert len(t.warm_up_losses) == 2
        assert all(not torch.equal(p, before[name]) for name, p in weights(t.model).items() if "lora_B.bi" in name)


@of_hypothesis(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(0, 100))
def test_tokens_are_chosen_in_prompts_behind_others(rows: list[list[bool]], seed: int) -> None:
    torch.manual_seed(seed)
    prompt = torch.tensor(rows)
    positions = torch.tensor([0, 1, 2, 0, 1, 2]).expand(prompt.shape)
    chosen = choose_tokens(prompt, positions)
    assert not (chosen & ~prompt).any()
    assert not chosen[:, [0, 3]].any()
    assert not (chosen[:, 1:] & ~prompt[:, :-1]).any()
