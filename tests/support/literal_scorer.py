"""What lm-eval's requests mean under Bitune, literally: three passes, one request at a time.

Nothing of the product and nothing of lm-eval is used here. Texts must break into tokens at spaces, so that tokens of a
context and of its continuation can be told apart by encoding each alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerFast

from three_pass import ThreePass

Score = tuple[float, bool]
"""Log-likelihood of a continuation, and whether greedy decoding gives it."""


@dataclass
class LiteralScorer:
    """Answers single requests.

    Args:
        model: three literal passes.
        tokenizer: of whole words.
        max_length: tokens that the model takes.
    """

    model: ThreePass
    tokenizer: PreTrainedTokenizerFast
    max_length: int = 128
    _known: dict[tuple, Score] = field(default_factory=dict, repr=False)

    def loglikelihood(self, context: str, continuation: str) -> Score:
        """The context is the prompt; an empty one is the token that begins a text."""
        prompt = self.tokenizer.encode(context) or [self.tokenizer.bos_token_id]
        return self.loglikelihood_of_tokens(prompt, self.tokenizer.encode(continuation))

    def loglikelihood_of_tokens(self, prompt: list[int], answer: list[int]) -> Score:
        """Whatever is too long is cut on the left. Nothing follows the last token of the answer."""
        room = self.max_length - (len(answer) - 1)
        key = tuple(prompt[-room:]), tuple(answer)
        if key not in self._known:
            self._known[key] = self._score(prompt[-room:], answer)
        return self._known[key]

    def generate(self, context: str, until: list[str], steps: int) -> str:
        """Greedy decoding, up to a stop word or the end of the text."""
        prompt = torch.tensor(self.tokenizer.encode(context)[-(self.max_length - steps) :])
        with torch.no_grad():
            answer = self.model.generate(prompt, steps)[len(prompt) :].tolist()
        if self.tokenizer.eos_token_id in answer:
            answer = answer[: answer.index(self.tokenizer.eos_token_id)]
        text = self.tokenizer.decode(answer, skip_special_tokens=True)
        return text[: min([text.index(word) for word in until if word in text], default=len(text))]

    def rolling(self, text: str) -> float:
        """The causal adapter alone, in windows of `max_length`; every token is scored once, the first ones after the
        token that begins a text, and the last window reaches as far back as it can."""
        tokens = [self.tokenizer.bos_token_id, *self.tokenizer.encode(text)]
        total = 0.0
        for start in range(1, len(tokens), self.max_length):
            end = min(start + self.max_length, len(tokens))
            seen = tokens[max(0, end - 1 - self.max_length) : end - 1]
            predicted = self._log_probabilities(seen, prompt_length=1)[start - end :]
            total += sum(row[token].item() for row, token in zip(predicted, tokens[start:end], strict=True))
        return total

    def _score(self, prompt: list[int], answer: list[int]) -> Score:
        predicted = self._log_probabilities(prompt + answer, len(prompt))[:-1]
        total = sum(row[token].item() for row, token in zip(predicted, answer, strict=True))
        return total, predicted.argmax(dim=-1).tolist() == answer

    def _log_probabilities(self, tokens: list[int], prompt_length: int) -> torch.Tensor:
        """Of what follows each token from the last one of the prompt on. A prompt of one token has nothing to be read
        twice, so that everything is the causal adapter's."""
        with torch.no_grad():
            return self.model(torch.tensor(tokens), prompt_length).log_softmax(dim=-1)
