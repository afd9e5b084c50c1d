"""Documents in rows, written as text and taken apart with slow, obvious loops: for tests of layouts and masks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from bitune_plugin.core.layout import PromptLayout
from bitune_plugin.core.masks import SECOND_PASSES, Chunk, LocalAttention, SequenceGroup, SlidingWindow
from bitune_plugin.core.planning import plan

settings.register_profile("documents", deadline=None, max_examples=60)
if settings.get_current_profile_name() != "fast":
    settings.load_profile("documents")


@dataclass(frozen=True)
class Document:
    """A prompt and what follows it.

    Attributes:
        tokens: which tokens of the batch they are, in order.
        letters: what each of them is; see `Batch`.
    """

    tokens: list[int]
    letters: str

    @property
    def encoded(self) -> list[int]:
        return self.tokens[: max(self.letters.count("P") - 1, 0)]

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.encoded) :]

    def completion(self, token: int) -> int:
        """Which completion it is part of, 0 for what all of them share."""
        letter = self.letters[self.tokens.index(token)]
        return int(letter) if letter.isdigit() else 0

    def alone(self, token: int) -> list[int]:
        """The document as it is with the completion of `token` alone."""
        return [other for other in self.tokens if self.completion(other) in (0, self.completion(token))]

    def place(self, token: int) -> int:
        return self.alone(token).index(token)

    def near(self, query: int, key: int, local: LocalAttention | None) -> bool:
        if isinstance(local, SlidingWindow):
            return abs(self.place(query) - self.place(key)) < local.size
        if isinstance(local, Chunk):
            return self.place(query) // local.size == self.place(key) // local.size
        return True

    def seen_behind(self, query: int, local: LocalAttention | None) -> set[int]:
        """What an encoded token sees, and a token of an answer."""
        behind = self.alone(query)[: self.place(query) + 1]
        return {key for key in behind if self.near(query, key, local)}

    def seen_by_copy(self, query: int, local: LocalAttention | None, second_pass: str) -> set[int]:
        if second_pass == "causal":
            return self.seen_behind(query, local)
        ahead = self.encoded[self.encoded.index(query) if second_pass == "anticausal" else 0 :]
        return {key for key in ahead if self.near(query, key, local)}


@dataclass(frozen=True)
class Batch:
    """Rows such as `".PPPcc|PPc."`: `.` is padding, `P` prompt, `c` completion, `|` stands between two documents. `1`,
    `2`, ... are several completions of one prompt; what stands before them they share. Tokens are numbered row by row.
    """

    rows: tuple[str, ...]

    @cached_property
    def letters(self) -> list[str]:
        return [row.replace("|", "") for row in self.rows]

    @cached_property
    def documents(self) -> list[Document]:
        documents, first = [], 0
        for piece in "|".join(self.rows).split("|"):
            tokens = [first + place for place, letter in enumerate(piece) if letter != "."]
            first += len(piece)
            if tokens:
                documents.append(Document(tokens, piece.replace(".", "")))
        return documents

    @property
    def packed(self) -> bool:
        return len(self.documents) > sum(row.strip(".") != "" for row in self.letters)

    @property
    def several_completions(self) -> bool:
        return any(letter.isdigit() for row in self.rows for letter in row)

    @property
    def ids(self) -> Tensor:
        return torch.arange(len(self.rows) * len(self.letters[0])).view(len(self.rows), -1)

    @property
    def prompt_mask(self) -> Tensor:
        return torch.tensor([[letter == "P" for letter in row] for row in self.letters])

    @property
    def attention_mask(self) -> Tensor:
        return torch.tensor([[letter != "." for letter in row] for row in self.letters])

    @property
    def starts(self) -> Tensor:
        return torch.isin(self.ids, torch.tensor([document.tokens[0] for document in self.documents]))

    @property
    def completion_index(self) -> Tensor:
        return torch.tensor([[int(letter) if letter.isdigit() else 0 for letter in row] for row in self.letters])

    def plan(self, one_sequence_per_row: bool = False) -> PromptLayout:
        """Its layout, of no more than it takes to say what it is."""
        return plan(
            self.prompt_mask,
            self.attention_mask if "." in "".join(self.rows) else None,
            self.completion_index if self.several_completions else None,
            self.starts if self.packed else None,
            one_sequence_per_row,
        )


def groups(batch: Batch, layout: PromptLayout) -> list[tuple[SequenceGroup, list[Document]]]:
    """Which documents share slots, in the order of these."""
    if layout.to_slots is None:
        return [(layout.groups[0], batch.documents)]
    by_answer = {document.answer[0]: document for document in batch.documents}
    segments = layout.segments(layout.lengthen(batch.ids)[:, None, :, None])
    held = [[by_answer[token] for token in each.answer[:, 0, 0, 0].tolist()] for each in segments]
    return list(zip(layout.groups, held, strict=True))


# --- Any of them ------------------------------------------------------------------------------------------------------

few = st.integers(0, 5)


@st.composite
def documents(draw: st.DrawFn) -> str:
    return "P" * draw(few) + "c" * draw(few)


@st.composite
def questions(draw: st.DrawFn) -> str:
    """Completions of a prompt, or of a context that is no prompt; a number may be left out, as that of a completion
    which consists of a single token to predict."""
    choices = sorted(draw(st.lists(st.sampled_from("1234"), max_size=6)))
    return "P" * draw(few) + "c" * draw(st.integers(0, 2)) + "".join(choices)


@st.composite
def batches_of(draw: st.DrawFn, rows: st.SearchStrategy[str]) -> Batch:
    """Rows of one length, padded anywhere; often all alike, and without padding."""
    uniform = draw(st.booleans())
    drawn = [draw(rows)] * draw(st.integers(1, 3)) if uniform else draw(st.lists(rows, min_size=1, max_size=4))
    size = max(1, *(len(row.replace("|", "")) for row in drawn)) + draw(st.sampled_from([0, 0, 1, 2]))
    return Batch(tuple(draw(padded(row, size)) for row in drawn))


@st.composite
def padded(draw: st.DrawFn, row: str, size: int) -> str:
    side = draw(st.sampled_from(["left", "right", "anywhere"]))
    for _ in range(size - len(row.replace("|", ""))):
        place = {"left": 0, "right": len(row)}.get(side)
        place = draw(st.integers(0, len(row))) if place is None else place
        row = row[:place] + "." + row[place:]
    return row


packed_batches = batches_of(st.lists(documents(), max_size=3).map("|".join))
single_batches = batches_of(documents())
question_batches = batches_of(questions())
batches = st.one_of(single_batches, packed_batches, question_batches).filter(lambda batch: batch.documents)
"""With a token at least."""

second_passes = st.sampled_from(SECOND_PASSES)

local_attentions = st.one_of(st.none(), st.integers(1, 12).map(SlidingWindow), st.integers(1, 12).map(Chunk))

RAGGED = Batch(("PPPPPcc", "PPPcccc", ".PPcc..", "P.P.Pcc", "Pcccccc", "......."))
PACKED = Batch(("PPPPPPPPccc|PPc|P|cc..", "PPcc|...PP.P|..PPPPcc"))
QUESTIONS = Batch(
    (
        "PPPPP11223",  # completions of unequal length
        "PPPP1122..",  # padded on the right,
        "..PPPP1122",  # on the left,
        ".PP.P1.12.",  # and everywhere
        "P112233444",  # a prompt of one token
        "cccc112233",  # no prompt
        "PPPccc1122",  # more that is shared
        "1122334444",  # nothing that is
        "PPPPPPP222",  # the first completion is a single token, which nothing follows
        "PPPPPPPPPP",  # all of them are
        "..........",
    )
)
ALIKE_QUESTIONS = Batch(("PPP1123", "PPP1223"))
"""They keep their rows, though their completions differ."""
