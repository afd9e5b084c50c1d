"""lm-eval's model `bitune`: its `hf` model with a Bitune adapter. The context is the prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import find_executable_batch_size
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM, eval_logger
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.models.utils_hf import clear_torch_cache
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import cached_file

import bitune_plugin
from bitune_plugin.errors import UnsupportedModelError
from bitune_plugin.modeling.architectures import active_adapter, takes_several_completions
from bitune_plugin.tuner.config import BituneConfig
from bitune_plugin.tuner.keys import ROOT
from bitune_plugin.tuner.model import BituneModel

from .arguments import check_arguments, unknown_named
from .scoring import Request, Row, Score, batch_of, largest_row, rows_of, scores_of


class BituneLM(HFLM):
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
    batch_size_per_gpu: Any

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
            config = _adapter_config(pretrained, revision, missing=_PEFT_MISSING.format(pretrained=pretrained))
            pretrained, revision = _base_of(config, pretrained), config.revision or "main"
            tokenizer = tokenizer or _tokenizer_of(self.peft, self._adapter_revision)
        else:
            config = _adapter_config(self.peft, revision, missing=f"`peft={self.peft}` holds no adapter_config.json")
            _warn_about_other_base(config, pretrained)
        with unknown_named(arguments):
            super().__init__(pretrained, peft=self.peft, revision=revision, tokenizer=tokenizer, **arguments)
        self._put_on(self.peft)
        if hasattr(self, "accelerator"):
            # The stock model divides the work only where it finds several GPUs (lm-eval 0.4.13).
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    # The model.

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
        rows = _rows_of_embedding(_weights_file(peft, self._adapter_revision), self._model)
        if rows is None or rows == embedding.weight.shape[0]:
            return
        self._model.resize_token_embeddings(rows, mean_resizing=False)
        if len(self.tokenizer) < rows:
            eval_logger.warning(
                f"The adapter was trained with a vocabulary of {rows}, and the tokenizer has {len(self.tokenizer)} "
                f"tokens. If tokens were added, pass their tokenizer: `tokenizer={peft}`."
            )

    def get_model_info(self) -> dict[str, Any]:
        """As lm-eval's `hf` model; adds adapter, config and alpha under `"bitune"`, to trace a result."""
        tuner: BituneModel = self.model.base_model
        name: Any = active_adapter(tuner.architecture)
        weights = None if self.peft is None else _weights_file(self.peft, self._adapter_revision)
        info = super().get_model_info()
        if "peft_sha" in info and self.revision != self._adapter_revision:
            del info["peft_sha"]  # of another revision
        info["bitune"] = {
            "version": bitune_plugin.__version__,
            "adapter": self.peft or name,
            "adapter_revision": None if self.peft is None or Path(self.peft).is_dir() else self._adapter_revision,
            "adapter_sha256": None if weights is None else _sha256(weights),
            "config": tuner.peft_config[name].to_dict(),
            "alpha": {kind: [alpha.tolist() for alpha in layers] for kind, layers in tuner.alphas(name).items()},
        }
        return info

    # Scoring.

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Score]:
        share = self.logits_cache and takes_several_completions(self.model.base_model.architecture)
        rows = rows_of(requests, self.max_length, share=share)
        scores: list[Any] = [None] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        with bar:
            for batch in self._batches(rows, override_bs):
                asked = [indices for row in batch for indices in row.requests.values()]
                for indices, score in zip(asked, self._score(batch), strict=True):
                    for index in indices:
                        scores[index] = score
                        if requests[index][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[index][0], score)
                    bar.update(len(indices))
        return scores

    def _batches(self, rows: list[Row], size: int | None) -> Iterator[list[Row]]:
        self.batch_sizes: dict[Any, Any] = {}
        start = 0
        while start < len(rows):
            step = size or (self._batch_scheduler(start, rows) if self.batch_size == "auto" else self.batch_size)
            yield rows[start : start + step]
            start += step

    def _score(self, rows: Sequence[Row], use_cache: bool = False) -> list[Score]:
        autocast = torch.autocast(
            self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        )
        with torch.no_grad(), autocast:
            outputs = self.model(**batch_of(rows, self.device), answers_only=True, use_cache=use_cache)
            return scores_of(rows, outputs.logits, self.softmax_dtype)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As lm-eval's `hf` model, with the causal adapter alone."""

        def longest_window() -> Row:
            tokens = max(len(self.tok_encode(request.args[0])) for request in requests)
            continuation = (0,) * max(1, min(tokens, self.max_length))
            return Row((0,), context_is_prompt=False, requests={continuation: [0]})

        if not requests:
            return []
        with self._batch_size_for(longest_window):
            return super().loglikelihood_rolling(requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval's `hf` model; the context is the prompt."""

        def longest_text() -> Row:
            # All of it as prompt, because that needs at least as much memory as a prompt and a generated completion.
            tokens = max(
                len(self.tok_encode(text)) + normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
                for text, settings in (request.args for request in requests)
            )
            return Row((0,) * min(tokens, self.max_length), context_is_prompt=True, requests={(0,): [0]})

        if not requests:
            return []
        with self._batch_size_for(longest_text, use_cache=True):
            return super().generate_until(requests, disable_tqdm)

    # Batch sizes, for `batch_size="auto"`.

    @contextmanager
    def _batch_size_for(self, longest: Callable[[], Row], use_cache: bool = False) -> Iterator[None]:
        """Within the block, `auto` is the number of rows such as `longest` that fit into memory. The stock model
        assumes rows of `max_length` tokens."""
        given = self.batch_size_per_gpu
        if given == "auto":
            self.batch_size_per_gpu = self._largest_batch(longest(), use_cache)
        try:
            yield
        finally:
            self.batch_size_per_gpu = given

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Row]) -> int:
        """The batch size from row `pos` on: `auto:N` measures it N times."""
        part = int(pos * self.batch_schedule / len(n_reordered_requests))
        if part not in self.batch_sizes:
            reached = max(self.batch_sizes.values(), default=0) == self.max_batch_size
            row = largest_row(n_reordered_requests[pos:])
            self.batch_sizes[part] = self.max_batch_size if reached else self._largest_batch(row)
        return self.batch_sizes[part]

    def _largest_batch(self, row: Row, use_cache: bool = False) -> int:
        """How many rows like `row` fit into memory, `max_batch_size` at most. Each process measures its own,
        because none waits for the others while it scores."""
        # Rows of one length need no masks; real batches do.
        shorter = Row(row.context[1:] or row.context, row.context_is_prompt, row.requests)

        @find_executable_batch_size(starting_batch_size=self.max_batch_size)
        def fitting(batch_size: int) -> int:
            self._score([shorter, *[row] * (batch_size - 1)] if batch_size > 1 else [row], use_cache)
            return batch_size

        try:
            return fitting()
        except RuntimeError as error:
            if "No executable batch size found" not in str(error):
                raise
            return 1
        finally:
            clear_torch_cache()


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


def _adapter_config(adapter: str, revision: str, missing: str) -> BituneConfig:
    """The config of an adapter.

    Raises:
        ValueError: nothing there (`missing` says what then), or an adapter of another kind.
    """
    try:
        config = PeftConfig.from_pretrained(adapter, revision=str(revision))
        if isinstance(config, BituneConfig):
            return BituneConfig.from_pretrained(adapter, revision=str(revision))  # looks at local weights, too
    except (ValueError, KeyError, RecursionError) as error:
        if "Can't find" not in str(error):  # so PEFT 0.21.2 begins when there is no such file, or no connection
            raise ValueError(f"The adapter {adapter} cannot be read: {error}") from error
        reason = "" if Path(adapter).is_dir() else f" Revision {revision} on the hub: {error.__cause__}"
        raise ValueError(f"{missing}.{reason}") from error
    raise ValueError(
        f"{adapter} is a {getattr(config.peft_type, 'value', config.peft_type)} adapter, not a Bitune adapter. Use "
        f"`--model hf --model_args pretrained={config.base_model_name_or_path or 'BASE'},peft={adapter}` for it."
    )


def _base_of(config: BituneConfig, adapter: str) -> str:
    if not config.base_model_name_or_path:
        raise ValueError(
            f"The adapter {adapter} does not name its base model. Pass both: `pretrained=BASE,peft={adapter}`."
        )
    return config.base_model_name_or_path


def _tokenizer_of(adapter: str, revision: str) -> str | None:
    """The adapter, if a tokenizer was saved with it, as TRL does."""
    return adapter if _file(adapter, TOKENIZER_CONFIG_FILE, revision) else None


def _weights_file(adapter: str, revision: str) -> Path | None:
    return _file(adapter, SAFETENSORS_WEIGHTS_NAME, revision)


def _file(repository: str, name: str, revision: str) -> Path | None:
    """A file of a local folder or the hub, from the cache if it is there."""
    found = cached_file(
        repository,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _warn_about_other_base(config: BituneConfig, pretrained: str) -> None:
    trained_on = config.base_model_name_or_path
    if trained_on and Path(trained_on).name != Path(pretrained).name:
        eval_logger.warning(
            f"The adapter was trained on {trained_on}, and is put on `pretrained={pretrained}`. Scores mean little "
            "unless that is the same model under another name."
        )


def _rows_of_embedding(weights: Path | None, model: PreTrainedModel) -> int | None:
    """Rows of the input embedding among an adapter's weights, if it is there: PEFT saves the whole matrix, however it
    was trained, when its size has changed."""
    if weights is None:
        return None
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    with safe_open(weights, framework="pt") as file:
        rows = [
            file.get_slice(key).get_shape()[0]
            for key in file.keys()  # noqa: SIM118  not a dict
            if key.startswith(f"{ROOT}{name}.") and key.endswith(".weight") and "lora_" not in key
        ]
    return max(rows, default=None)


@contextmanager
def _tied_as_it_is(model: Any) -> Iterator[None]:
    """The stock model ties the weights of a model once more, which would undo embeddings that an adapter trained."""
    model.tie_weights = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del model.tie_weights


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
