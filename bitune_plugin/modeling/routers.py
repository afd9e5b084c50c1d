"""Logits of the routers of experts (`output_router_logits=True`), for the balancing loss of a mixture of experts.

A balancing loss counts how many tokens go to each expert. Bitune lengthens rows and, if experts have adapters inside,
runs a block once per stream, so that the routers see more tokens than the caller gave. The caller gets logits for its
own tokens: each once, as routed in the causal stream, in the order and shape of a stock model. Padding is left out by
the loss, which takes the caller's `attention_mask`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..core.layout import PromptLayout


def of_causal_stream(recorded: Sequence[Tensor], layout: PromptLayout) -> tuple[Tensor, ...]:
    """The router logits of the caller's tokens.

    Args:
        recorded: the outputs of the routers, in order: for a block that ran once, `[R * M, experts]`; for one that ran
            once per stream, `[R * tokens, experts]` of the causal stream, then those of the bidirectional one.
        layout: of the forward pass.

    Returns:
        For each router `[B * T, experts]`. The values at padding have no meaning.

    Raises:
        ValueError: the logits are not one row per token.
    """
    rows, causal = layout.source.shape[0], layout.tokens
    tokens_of = {length: rows * length for length in (layout.length, causal)}
    found, skip = [], False
    for logits in recorded:
        flat = logits.flatten(0, -2)
        if skip or len(flat) == 0:  # the bidirectional stream of the block before
            skip = False
            continue
        length = next((length for length, tokens in tokens_of.items() if tokens == len(flat)), None)
        if length is None:
            raise ValueError(
                f"`output_router_logits=True`: a router returned logits of shape {list(logits.shape)}, where Bitune "
                f"expects one row for each of {tokens_of[layout.length]} tokens. Set `output_router_logits=False`."
            )
        skip = length == causal != layout.length
        layout_here = layout.to(flat.device)
        found.append(layout_here.restore(flat.unflatten(0, (rows, length))).flatten(0, 1))
    return tuple(found)
