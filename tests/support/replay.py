"""The loss of a training step once more: that of the stock trainer, on hidden states by three passes."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from bitune_plugin.modeling.prompts import active_call


class Replay:
    """Records the calls of the method of a trainer that returns its loss, and repeats the latest.

    Args:
        trainer: the trainer.
        method: "compute_loss", or "training_step" for a trainer that does without.
    """

    def __init__(self, trainer: Any, method: str) -> None:
        self.trainer, self.calls = trainer, []
        mine = getattr(trainer, method)
        stock = next(each for each in type(trainer).__mro__ if each.__module__.startswith("trl."))
        self.stock = getattr(stock, method)

        def recording(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            random, given = torch.get_rng_state(), copy.copy(inputs)
            loss = mine(model, inputs, *args, **kwargs)
            if isinstance(loss, Tensor):  # and not, as in evaluation, with outputs
                self.calls.append((random, (model, given, *args), kwargs, loss.detach()))
            return loss

        setattr(trainer, method, recording)

    def check(self, backbone: nn.Module, expected: list[tuple[Tensor, Any]]) -> None:
        """Fails unless the losses of the step are those of the stock trainer, if `backbone` returned what is expected.

        Args:
            backbone: the trained one.
            expected: for each of its calls with gradients, the tokens `[B, T]` and the outputs.
        """
        product = backbone.forward

        def literal(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():  # a reference, a teacher, a rollout
                return product(*args, **kwargs)
            tokens = kwargs.get("input_ids", args[0] if args else None)
            if active_call.value is not None:
                active_call.value.reached_backbone = True
            return next(outputs for given, outputs in expected if torch.equal(given, tokens))

        assert self.calls
        with patch.object(backbone, "forward", literal), patch.object(self.trainer.accelerator, "backward"):
            for random, args, kwargs, loss in self.calls:
                torch.set_rng_state(random)
                again = self.stock(self.trainer, *args, **kwargs).detach()
                assert again.item() == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
        self.calls.clear()
