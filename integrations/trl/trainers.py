"""TRL's trainers of preferences, rewards and distillation for Bitune: `from bitune_plugin import BituneDPOTrainer`.

Each is the stock trainer behind `KnowsPrompts`. Which of them hand the model `labels` themselves was read in TRL 1.16.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from trl import DistillationTrainer, DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer

from bitune_plugin.integrations.trl.prompts import KnowsPrompts
from bitune_plugin.integrations.trl.tools import CallsTools
from bitune_plugin.modeling.boundaries import prompts_before_last, prompts_by_completions, prompts_known_by

VLLM = (
    "vLLM would generate with the weights of one stream, from prompts that it reads causally, and not from the policy "
    "that is trained. Set `use_vllm=False`."
)
BATCHING = "it reads prompts in pieces, and Bitune reads a prompt in one piece. Leave it out."
OF_SAMPLING = {"use_vllm": VLLM, "use_transformers_continuous_batching": BATCHING}


class HasCompletionMask(KnowsPrompts):
    """A trainer that has a `completion_mask` in its batches, and calls the model in `_compute_loss`."""

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        names = ("input_ids", "completion_mask", "attention_mask")
        with prompts_known_by(prompts_by_completions(*(inputs[name] for name in names))):
            return super()._compute_loss(model, inputs, *args, **kwargs)


class BituneDPOTrainer(HasCompletionMask, DPOTrainer):
    """Direct preference optimization with Bitune. Takes the arguments of `trl.DPOTrainer`; see `KnowsPrompts`.

    The loss is the stock trainer's, which hands the model labels. Here the logits for `compute_metrics` are right too.
    """


class BituneKTOTrainer(HasCompletionMask, KTOTrainer):
    """Kahneman-Tversky optimization with Bitune. Takes the arguments of `trl.KTOTrainer`; see `KnowsPrompts`."""


class BituneGRPOTrainer(CallsTools, GRPOTrainer):
    """Group relative policy optimization with Bitune. Takes the arguments of `trl.GRPOTrainer`; see `KnowsPrompts`.

    The stock trainer hands the model labels, so without tools it is exact as it is. With tools and environments, this
    one generates every turn from the first prompt. It refuses what makes rollouts differ from training.
    """

    refused_settings = OF_SAMPLING
    refused_arguments = {"rollout_func": "Bitune cannot see what it generates from. Leave it out."}  # noqa: RUF012


class BituneRLOOTrainer(KnowsPrompts, RLOOTrainer):
    """REINFORCE leave-one-out with Bitune. Takes the arguments of `trl.RLOOTrainer`; see `BituneGRPOTrainer`."""

    refused_settings = OF_SAMPLING


class BituneDistillationTrainer(CallsTools, DistillationTrainer):
    """Distillation into a student with Bitune. Takes the arguments of `trl.DistillationTrainer`; see `KnowsPrompts`."""

    refused_settings = OF_SAMPLING

    def _get_last_hidden_state(
        self,
        unwrapped_model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        with prompts_known_by(prompts_before_last(logits_to_keep)):
            return super()._get_last_hidden_state(
                unwrapped_model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
