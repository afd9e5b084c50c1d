"""lm-eval's model `bitune`: its `hf` model with a Bitune adapter. The context is the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import eval_logger
from peft import PeftModel

import bitune_plugin
from bitune_plugin.errors import UnsupportedModelError
from bitune_plugin.modeling.architectures import active_adapter
from bitune_plugin.modeling.causal_lm import reads_turns_apart
from bitune_plugin.tuner.model import BituneModel

from .adapter import (
    adapter_config,
    base_of,
    rows_of_embedding,
    sha256_of,
    tokenizer_of,
    warn_about_other_base,
    weights_file,
)
from .arguments import check_arguments, unknown_named
from .batches import ScoresRows


class BituneLM(ScoresRows):
    """`lm_eval --model bitune`: scores and generates with a Bitune adapter (arXiv 2405.14862).

    A request's context is the prompt; the scored or generated text after it is the completion.
    Rolling likelihoods and empty contexts have no prompt, and are scored with the causal adapter alone.

    Takes the arguments of lm-eval's `hf` model, with the same meaning, except `delta` and `tp_plan`, which it
    refuses. `batch_size` counts contexts, each with all of its continuations; with `logits_cache=False` no two
    requests share anything.

    Args:
        pretrained: base model, hub id or path; or an adapter, which names its base itself; or a ready `PeftModel`.
        peft: the Bitune adapter, hub id or path; not with a ready model.
        revision: of base and adapter; of the adapter, when that names its base.
        tokenizer: by default that of the base; of the adapter, when that names its base and brings one.
        arguments: all others of lm-eval's `HFLM`.

    Raises:
        ValueError: no adapter, one that is not Bitune or does not fit the base, or an argument that is unknown, of a
            wrong kind, or something that Bitune cannot do.
    """

    # Any, because lm-eval has no types.
    _model: Any

    def __init__(
        self,
        pretrained: str | PeftModel,
        peft: str | None = None,
        revision: str = "main",
        tokenizer: Any = None,
        **arguments: Any,
    ) -> None:
        check_arguments({"peft": peft, "tokenizer": tokenizer, **arguments})
        self.peft, self._adapter_revision = peft, str(revision)
        if isinstance(pretrained, str):
            self._load(pretrained, revision, tokenizer, arguments)
        else:
            _check_ready(pretrained, peft)
            with _tied_as_it_is(pretrained), unknown_named(arguments):
                super().__init__(pretrained, revision=revision, tokenizer=tokenizer, **arguments)

    def _load(self, pretrained: str, revision: str, tokenizer: Any, arguments: dict[str, Any]) -> None:
        if self.peft is None:
            self.peft = pretrained
            config = adapter_config(pretrained, revision, missing=_PEFT_MISSING.format(pretrained=pretrained))
            pretrained, revision = base_of(config, pretrained), config.revision or "main"
            tokenizer = tokenizer or tokenizer_of(self.peft, self._adapter_revision)
        else:
            config = adapter_config(self.peft, revision, missing=f"`peft={self.peft}` holds no adapter_config.json")
            warn_about_other_base(config, pretrained)
        with unknown_named(arguments):
            super().__init__(pretrained, peft=self.peft, revision=revision, tokenizer=tokenizer, **arguments)
        self._put_on(self.peft)
        if hasattr(self, "accelerator"):
            # The stock model divides the work only where it finds several GPUs (lm-eval 0.4.13).
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    def _get_backend(self, *args: Any, **kwargs: Any) -> None:
        super()._get_backend(*args, **kwargs)
        if self.backend != "causal":
            raise ValueError(
                f"`pretrained` is a {self.config.model_type} model with an encoder (backend {self.backend!r}), and "
                "Bitune is for decoders. Use `--model hf` for it."
            )

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, revision: str = "main", **arguments: Any) -> None:
        revision = self._adapter_revision if isinstance(tokenizer, str) and tokenizer == self.peft else revision
        super()._create_tokenizer(pretrained, tokenizer, revision=revision, **arguments)

    def _create_model(self, pretrained: str, peft: str | None = None, **arguments: Any) -> None:
        # The base alone: the stock model ties its weights afterwards, which would undo trained embeddings.
        super()._create_model(pretrained, **arguments)

    def _put_on(self, peft: str) -> None:
        if "disk" in getattr(self._model, "hf_device_map", {}).values():
            raise ValueError(
                f"Not all of `pretrained={self.pretrained}` fits into memory, and to keep the rest on disk, PEFT would "
                "write the adapter into the model's own files. Raise `max_memory_per_gpu` or `max_cpu_memory`, or "
                "leave `parallelize` out."
            )
        self._resize_vocabulary(peft)
        try:
            self._model = PeftModel.from_pretrained(self._model, peft, revision=self._adapter_revision).eval()
        except UnsupportedModelError:
            raise
        except ValueError as error:
            raise ValueError(
                f"The adapter `peft={peft}` does not fit the base model `pretrained={self.pretrained}`: {error}"
            ) from error

    def _resize_vocabulary(self, peft: str) -> None:
        """Resizes the embeddings for an adapter that was trained with added tokens. The stock model
        resizes to the length of the tokenizer for every adapter, which changes the softmax of models whose vocabulary
        is padded."""
        embedding = self._model.get_input_embeddings()
        rows = rows_of_embedding(weights_file(peft, self._adapter_revision), self._model)
        if rows is None or rows == embedding.weight.shape[0]:
            return
        self._model.resize_token_embeddings(rows, mean_resizing=False)
        if len(self.tokenizer) < rows:
            eval_logger.warning(
                f"The adapter was trained with a vocabulary of {rows}, and the tokenizer has {len(self.tokenizer)} "
                f"tokens. If tokens were added, pass their tokenizer: `tokenizer={peft}`."
            )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As in lm-eval.

        Raises:
            ValueError: completed turns in a conversation, which an adapter with `multi_turn="alternate"` does not read
                as the one prompt that lm-eval makes of them.
        """
        if any(message["role"] == "assistant" for message in chat_history[:-1]) and reads_turns_apart(self.model):
            raise ValueError(
                "The adapter reads conversations turn by turn (`multi_turn='alternate'`), and lm-eval passes the "
                "examples of `num_fewshot` as a conversation in one text, which would be read as one prompt. Set "
                "`--fewshot_as_multiturn false`, which puts them into one message, or `--num_fewshot 0`."
            )
        templated: str = super().apply_chat_template(chat_history, add_generation_prompt)
        return templated

    def get_model_info(self) -> dict[str, Any]:
        """As lm-eval's `hf` model; adds adapter, config and alpha under `"bitune"`, to trace a result."""
        tuner: BituneModel = self.model.base_model
        name: Any = active_adapter(tuner.architecture)
        weights = None if self.peft is None else weights_file(self.peft, self._adapter_revision)
        info = super().get_model_info()
        if "peft_sha" in info and self.revision != self._adapter_revision:
            del info["peft_sha"]  # of another revision
        info["bitune"] = {
            "version": bitune_plugin.__version__,
            "adapter": self.peft or name,
            "adapter_revision": None if self.peft is None or Path(self.peft).is_dir() else self._adapter_revision,
            "adapter_sha256": None if weights is None else sha256_of(weights),
            "config": tuner.peft_config[name].to_dict(),
            "alpha": {kind: [alpha.tolist() for alpha in layers] for kind, layers in tuner.alphas(name).items()},
        }
        return info


_PEFT_MISSING = (
    "`peft=` is missing, and `pretrained={pretrained}` is not an adapter. Pass `pretrained=BASE,peft=ADAPTER`, or the "
    "adapter alone as `pretrained=ADAPTER`; use `--model hf` for a model without a Bitune adapter"
)


def _check_ready(model: Any, peft: str | None) -> None:
    """Raises ValueError unless `model` is ready: a PeftModel with an enabled Bitune adapter."""
    if peft is not None:
        raise ValueError(
            f"`peft={peft}` came with a ready model as `pretrained`. Load the adapter first, "
            "`PeftModel.from_pretrained(model, peft)`, and pass that alone; or pass the base model's path."
        )
    tuner = getattr(model, "base_model", None)
    if not isinstance(model, PeftModel) or not isinstance(tuner, BituneModel):
        raise ValueError(
            f"`pretrained` is a {type(model).__name__} without a Bitune adapter. Pass what "
            "`PeftModel.from_pretrained(base, adapter)` returns; lm-eval's `HFLM` takes other models."
        )
    if active_adapter(tuner.architecture) is None:
        raise ValueError(
            "The Bitune adapter of `pretrained` is disabled. Enable it with `model.set_adapter(name)` or leave "
            "`disable_adapter()`, or evaluate the base model with lm-eval's `HFLM`."
        )


@contextmanager
def _tied_as_it_is(model: Any) -> Iterator[None]:
    """The stock model ties the weights of a model once more, which would undo embeddings that an adapter trained."""
    model.tie_weights = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del model.tie_weights
