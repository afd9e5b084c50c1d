"""A tokenizer of whole words, in which the tokens of the tiny model have names."""

from __future__ import annotations

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from .subject import VOCABULARY

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
WORDS = (*SPECIAL, *(f"w{token}" for token in range(len(SPECIAL), VOCABULARY)))
"""Token -> its word."""

END = SPECIAL.index("<eos>")


def text(tokens: Tensor) -> str:
    """The words of `tokens`, `[T]`."""
    return " ".join(WORDS[token] for token in tokens.tolist())


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Breaks a text into `WORDS` at its spaces."""
    backend = Tokenizer(WordLevel({word: token for token, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
