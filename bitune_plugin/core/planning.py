"""Plans a batch: from masks to a `PromptLayout`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import LayoutError
from .gather import Gather
from .layout import PromptLayout
from .prompts import with_first_of_rows
from .tokens import Tokens, slots_of


@torch.compiler.disable
def plan(
    prompt_mask: Tensor,
    attention_mask: Tensor | None = None,
    completion_index: Tensor | None = None,
    starts: Tensor | None = None,
    one_sequence_per_row: bool = False,
    several_prompts: bool = False,
    cached: Tensor | None = None,
) -> PromptLayout | None:
    """Plans the lengthened rows of a batch.

    Args:
        prompt_mask: bool `[B, T]`, True on every prompt token, the last one included.
        attention_mask: `[B, T]`, zero or False on padding; `None` for a batch without padding.
        completion_index: int `[B, T]`, for rows in which several completions follow one prompt: 0 on the prompt,
            then 1, 2, ... on its completions in turn. By default a prompt has one completion.
        starts: bool `[B, T]`, True where a sequence begins; by default a row holds one. See `sequence_starts`.
        one_sequence_per_row: give every sequence a row of its own, padded on the right.
        several_prompts: a sequence may have several prompts, read turn by turn (`turns.py`).
        cached: bool `[B, C]`, for tokens that follow those in a cache, False where a column of it is padding. It goes
            with `several_prompts`.

    Returns:
        The layout, on the device of `prompt_mask`; `None` for a batch that is all padding.

    Raises:
        LayoutError: a prompt token follows a completion token, or the completions of a prompt are not in order; or
            several prompts do not go with the other arguments.
    """
    device, shape = prompt_mask.device, (prompt_mask.shape[0], prompt_mask.shape[1])
    # On the CPU, in one transfer, because Python must know the lengths anyhow.
    attended = torch.ones_like(prompt_mask) if attention_mask is None else attention_mask.bool()
    masks = torch.stack([prompt_mask, attended, with_first_of_rows(starts, attended)])
    prompt_mask, attended, starts = masks.cpu().unbind()
    if not attended.any():
        return None
    tokens = Tokens.of(prompt_mask, attended, starts, several_prompts)
    if cached is not None:
        tokens = tokens.after(cached.cpu())
    if completion_index is not None:
        tokens = tokens.with_completions(completion_index.cpu(), prompt_mask)
    if tokens.all_uniform and (len(tokens.length), len(tokens.present)) == (shape[0], shape[0] * shape[1]):
        layout = _rows_kept(tokens, shape)
    elif one_sequence_per_row:
        if tokens.turn is not None:
            raise LayoutError(
                "This model computes attention by itself, and Bitune reads one prompt of a row with it, and no cache "
                "before it. Give every assistant turn a row of its own, with all turns before it as the prompt."
            )
        layout = _one_sequence_per_row(tokens, shape)
    else:
        layout = _one_row(tokens, shape)
    return layout.to(device)


def _rows_kept(tokens: Tokens, shape: tuple[int, int]) -> PromptLayout:
    """Uniform sequences keep their rows, and their segments are slices: `[B, T]` to `[B, T + P - 1]`."""
    rows, size = shape[0], int(tokens.encoded_length[0])
    copied = torch.cat([torch.arange(shape[1]), torch.arange(size)])
    position = tokens.position.view(shape)[:, copied]
    return PromptLayout(
        shape,
        packed=False,
        is_plain_causal=False,
        tokens=shape[1],
        source=torch.arange(rows)[:, None] * shape[1] + copied,
        positions=position[:1] if tokens.completion_index is None else position,
        groups=(tokens.group(torch.arange(rows)),),
        target=None,
        answers=(~tokens.is_encoded).nonzero().flatten(),
    )


def _one_sequence_per_row(tokens: Tokens, shape: tuple[int, int]) -> PromptLayout:
    """Every sequence has a row of its own, from the left: `[B, T]` to `[D, M]`."""
    rows, longest = len(tokens.length), int(tokens.length.max())
    copies = tokens.is_encoded.nonzero().flatten()
    length = longest + max(int(tokens.encoded_length.max()), 1)
    in_row, in_stream = (tokens.sequence * size + tokens.offset for size in (length, longest))
    filled = torch.cat([in_row, in_row[copies] + longest])
    return PromptLayout(
        shape,
        packed=tokens.packed,
        is_plain_causal=tokens.is_plain_causal,
        tokens=longest,
        source=_filled(rows * length, filled, torch.cat([tokens.present, tokens.present[copies]])).view(rows, length),
        positions=_filled(rows * length, filled, torch.cat([tokens.position, tokens.position[copies]])).view(
            rows, length
        ),
        groups=(tokens.group(torch.arange(rows), encoded_slots=1),),
        target=_filled(shape[0] * shape[1], tokens.present, in_stream),
        answers=in_stream[~tokens.is_encoded],
    )


def _one_row(tokens: Tokens, shape: tuple[int, int]) -> PromptLayout:
    """All sequences share one row without padding, with their bidirectional stream behind: `[B, T]` to `[1, M]`."""
    count = len(tokens.present)
    copies = tokens.is_encoded.nonzero().flatten()
    # Encode one dummy token, hidden from every query, if no prompt is encoded: under DDP each rank must produce
    # gradients for the bidirectional adapter, or the all-reduce hangs.
    copied = copies if len(copies) else torch.zeros(1, dtype=torch.long)
    groups = list(_of_similar_length(tokens.length))
    to_slots, filled = _to_slots(tokens, groups)
    to_tokens = torch.full((count + len(copied),), -1).index_put((to_slots[filled],), filled.nonzero().flatten())
    return PromptLayout(
        shape,
        packed=tokens.packed,
        is_plain_causal=tokens.is_plain_causal,
        tokens=count,
        source=torch.cat([tokens.present, tokens.present[copied]])[None],
        positions=torch.cat([tokens.position, tokens.position[copied]])[None],
        groups=tuple(map(tokens.group, groups)),
        target=_filled(shape[0] * shape[1], tokens.present, torch.arange(count)),
        answers=(~tokens.is_encoded).nonzero().flatten(),
        to_slots=Gather(to_slots, (~filled).nonzero().flatten()),
        to_tokens=Gather(to_tokens.clamp(min=0), (to_tokens < 0).nonzero().flatten()),
        cached=0 if tokens.cached is None else tokens.cached.shape[1],
        has_gaps=tokens.has_gaps,
    )


def _to_slots(tokens: Tokens, groups: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The place of the single row for each slot, in the order of `PromptLayout.to_slots`, and a mask of full slots."""
    first, encoded, answer = tokens.first, tokens.encoded_length, tokens.length - tokens.encoded_length
    first_bidirectional = len(tokens.present) + encoded.cumsum(0) - encoded
    slots = []
    for members in groups:
        of_prefix, of_answer, of_bidirectional = (
            slots_of(at[members], length[members])
            for at, length in ((first, encoded), (first + encoded, answer), (first_bidirectional, encoded))
        )
        slots += [(tokens.encoded_first[index], filled) for index, filled in (of_prefix, of_answer)]
        slots.append(of_bidirectional)
    indices, filled = zip(*slots, strict=True)
    return torch.cat([index.flatten() for index in indices]), torch.cat([each.flatten() for each in filled])


def _of_similar_length(lengths: Tensor) -> Iterator[Tensor]:
    """Groups sequences so that the longest is at most twice as long as the shortest, because padding then costs at
    most a fixed multiple of the attention of each sequence alone. `[D]` to indices of each group."""
    order = lengths.argsort(descending=True, stable=True)
    while len(order):
        near = lengths[order] * 2 >= lengths[order[0]]
        yield order[near].sort().values
        order = order[~near]


def _filled(size: int, index: Tensor, values: Tensor) -> Tensor:
    """`[size]`: `values` at `index`, and 0 elsewhere."""
    return torch.zeros(size, dtype=torch.long).index_put((index,), values)
