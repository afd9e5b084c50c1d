"""lm-eval's model `bitune`: its `hf` model with a Bitune adapter, which knows the context from the continuation."""

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
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from peft.utils.other import check_file_exists_on_hf_hub
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

import bitune_plugin
from bitune_plugin.architectures import UnsupportedModelError
from bitune_plugin.config import BituneConfig
from bitune_plugin.forward import active_adapter
from bitune_plugin.tuner import BituneModel

from .scoring import Request, Row, Score, batch_of, dearest, rows_of, scores_of


class BituneLM(HFLM):
    """`lm_eval --model bitune`: scores and generates with a Bitune adapter (arXiv 2405.14862).

    A request's context is the prompt and is read twice; what is scored or generated after it is the answer. Rolling
    likelihoods and empty contexts have no prompt, and are scored with the causal adapter alone.

    Takes the arguments of lm-eval's `hf` model, and gives them the same meaning; `batch_size` counts contexts, each
    with all of its continuations.

    Args:
        pretrained: base model, hub id or path; or an adapter, which names its base itself; or a ready `PeftModel`.
        peft: the Bitune adapter, hub id or path; not with a ready model.
        revision: of base and adapter; of the adapter, when that names its base.
        tokenizer: by default that of the base; of the adapter, when that names its base and brings one.
        arguments: all others of lm-eval's `HFLM`.

    Raises:
        ValueError: no adapter, one that is not Bitune or does not fit the base, or a setting that Bitune cannot do.
    """

    def __init__(
        self,
        pretrained: str | PeftModel,
        peft: str | None = None,
        revision: str = "main",
        tokenizer: Any = None,
        **arguments: Any,
    ) -> None:
        _check_arguments(arguments)
        self._adapter_revision = str(revision)
        if not isinstance(pretrained, str):
            _check_ready(pretrained, peft)
            with _tied_as_it_is(pretrained):
                super().__init__(pretrained, revision=revision, tokenizer=tokenizer, **arguments)
            return
        if peft is None:
            config = _adapter_config(pretrained, revision, missing=_PEFT_MISSING.format(pretrained=pretrained))
            tokenizer = tokenizer or _tokenizer_of(pretrained, revision)
            pretrained, peft, revision = _base_of(config, pretrained), pretrained, config.revision or "main"
        else:
            config = _adapter_config(peft, revision, missing=f"`peft={peft}` holds no adapter_config.json.")
            _warn_about_other_base(config, pretrained)
        self.peft = peft
        super().__init__(pretrained, peft=peft, revision=revision, tokenizer=tokenizer, **arguments)
        self._put_on(peft)
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
                f"Not all of `pretrained={self.pretrained}` fits into memory, and PEFT would write the adapter into the "
                "model's own files to keep the rest on disk. Raise `max_memory_per_gpu` or `max_cpu_memory`, or leave "
                "`parallelize` out."
            )
        weights = load_peft_weights(peft, device="cpu", revision=self._adapter_revision)
        _resize_vocabulary(self._model, weights)
        try:
            self._model = PeftModel.from_pretrained(self._model, peft, revision=self._adapter_revision).eval()
        except UnsupportedModelError:
            raise
        except ValueError as error:
            raise ValueError(
                f"The adapter `peft={peft}` does not fit the base model `pretrained={self.pretrained}`: {error}"
            ) from error

    def get_model_info(self) -> dict[str, Any]:
        """As lm-eval's `hf` model; under `"bitune"` what it takes to trace a result: adapter, config, alpha."""
        tuner: BituneModel = self.model.base_model
        name = active_adapter(tuner.architecture)
        alphas = {kind: [alpha.tolist() for alpha in layers] for kind, layers in tuner.alphas(name).items()}
        description = {
            "version": bitune_plugin.__version__,
            "adapter": self.peft or name,
            "adapter_revision": self._adapter_revision,
            "adapter_sha256": _sha256(self.peft),
            "config": tuner.peft_config[name].to_dict(),
            "alpha": alphas,
        }
        return {**super().get_model_info(), "bitune": description}

    # Scoring.

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Score]:
        rows = rows_of(requests, self.max_length, share=self.logits_cache)
        scores: list[Any] = [None] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        with bar:
            for batch in self._batches(rows, override_bs):
                for row, row_scores in zip(batch, self._score(batch), strict=True):
                    for places, score in zip(row.requests.values(), row_scores, strict=True):
                        for place in places:
                            scores[place] = score
                            if requests[place][0] is not None:
                                self.cache_hook.add_partial("loglikelihood", requests[place][0], score)
                        bar.update(len(places))
        return scores

    def _batches(self, rows: list[Row], size: int | None) -> Iterator[list[Row]]:
        self.batch_sizes = {}
        start = 0
        while start < len(rows):
            step = size or (self._batch_scheduler(start, rows) if self.batch_size == "auto" else self.batch_size)
            yield rows[start : start + step]
            start += step

    def _score(self, rows: Sequence[Row]) -> list[list[Score]]:
        autocast = torch.autocast(
            self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        )
        with torch.no_grad(), autocast:
            logits = self.model(**batch_of(rows, self.device), answers_only=True, use_cache=False).logits
            return scores_of(rows, logits, self.softmax_dtype)

    # Batch sizes.

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As lm-eval's `hf` model, with the causal adapter alone."""

        def longest() -> Row:
            tokens = len(self.tok_encode(max((request.args[0] for request in requests), key=len)))
            return Row((0,), is_prompt=False, requests={(0,) * min(max(tokens, 1), self.max_length): [0]})

        if not requests:
            return []
        with self._batch_size_for(longest):
            return super().loglikelihood_rolling(requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval's `hf` model; the context is the prompt."""

        def longest() -> Row:
            tokens = len(self.tok_encode(max((request.args[0] for request in requests), key=len)))
            tokens += max(normalize_gen_kwargs(r.args[1], self.max_gen_toks)["max_gen_toks"] for r in requests)
            return Row((0,) * min(tokens, self.max_length), is_prompt=True, requests={(0,): [0]})

        if not requests:
            return []
        with self._batch_size_for(longest):
            return super().generate_until(requests, disable_tqdm)

    @contextmanager
    def _batch_size_for(self, longest: Callable[[], Row]) -> Iterator[None]:
        """Within the block, `batch_size="auto"` is how many rows such as `longest` fit; the stock model takes rows of
        `max_length` tokens for it."""
        given = self.batch_size_per_gpu
        if given == "auto":
            self.batch_size_per_gpu = self._detect_batch_size([longest()])
        try:
            yield
        finally:
            self.batch_size_per_gpu = given

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Row]) -> int:
        """The batch size from row `pos` on: `batch_size="auto:N"` finds it out N times on the way."""
        part = int(pos * self.batch_schedule / len(n_reordered_requests))
        if part not in self.batch_sizes:
            largest_yet = max(self.batch_sizes.values(), default=0)
            if largest_yet < self.max_batch_size:
                largest_yet = self._detect_batch_size(n_reordered_requests, pos)
            self.batch_sizes[part] = largest_yet
        return self.batch_sizes[part]

    def _detect_batch_size(self, requests: Sequence[Row] | None = None, pos: int = 0) -> int:
        """How many rows like those from `requests[pos]` on fit into memory, `max_batch_size` at most. Each process
        finds its own: none waits for the others while it scores."""
        row = dearest(requests[pos:])

        @find_executable_batch_size(starting_batch_size=self.max_batch_size)
        def fitting(batch_size: int) -> int:
            self._score([row] * batch_size)
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
    "adapter alone as `pretrained=ADAPTER`; use `--model hf` for a model without a Bitune adapter."
)


def _check_arguments(arguments: dict[str, Any]) -> None:
    if arguments.get("delta"):
        raise ValueError(
            f"`delta={arguments['delta']}`: delta weights and a Bitune adapter cannot be put on together. Save the "
            "base model with its delta weights first, and pass that as `pretrained`."
        )
    if arguments.get("tp_plan"):
        raise ValueError(
            f"`tp_plan={arguments['tp_plan']}`: Bitune does not support tensor parallelism. Use `parallelize=True`, or "
            "several processes with `accelerate launch -m lm_eval`."
        )


def _check_ready(model: Any, peft: str | None) -> None:
    """Raises ValueError unless `model` is ready: a PeftModel whose Bitune adapter is switched on."""
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
            "The Bitune adapter of `pretrained` is switched off. Switch it on with `model.set_adapter(name)` or leave "
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
            return BituneConfig.from_pretrained(adapter, revision=str(revision))  # looks at the weights too
    except (ValueError, KeyError) as error:
        if "Can't find" in str(error):  # PEFT 0.21.2
            raise ValueError(missing) from error
        raise ValueError(f"The adapter {adapter} cannot be read: {error}") from error
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
    if Path(adapter).is_dir():
        return adapter if Path(adapter, TOKENIZER_CONFIG_FILE).is_file() else None
    return adapter if check_file_exists_on_hf_hub(adapter, TOKENIZER_CONFIG_FILE, revision=str(revision)) else None


def _warn_about_other_base(config: BituneConfig, pretrained: str) -> None:
    trained_on = config.base_model_name_or_path
    if trained_on and Path(trained_on).name != Path(pretrained).name:
        eval_logger.warning(
            f"The adapter was trained on {trained_on}, and is put on `pretrained={pretrained}`. Scores mean little "
            "unless that is the same model under another name."
        )


def _resize_vocabulary(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    """Makes room for the embeddings that an adapter brings, if it was trained with tokens added. The stock model
    resizes to the length of the tokenizer for every adapter, which changes the softmax of models whose vocabulary is
    padded."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    # However it was trained, the whole matrix is saved with an adapter when its size has changed.
    brought = [
        matrix.shape[0]
        for key, matrix in weights.items()
        if key.startswith(f"base_model.model.{name}.") and key.endswith(".weight") and "lora_" not in key
    ]
    if brought and max(brought) != embedding.weight.shape[0]:
        model.resize_token_embeddings(max(brought), mean_resizing=False)


@contextmanager
def _tied_as_it_is(model: PeftModel) -> Iterator[None]:
    """The stock model ties the weights of a model once more, which would undo embeddings that an adapter trained."""
    model.tie_weights = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del model.tie_weights


def _sha256(adapter: str | None) -> str | None:
    """Of the weights, where they are a local file."""
    weights = Path(adapter or "", SAFETENSORS_WEIGHTS_NAME)
    if adapter is None or not weights.is_file():
        return None
    with weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
