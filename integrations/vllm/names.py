"""Names that the parts of the integration share, in processes of vLLM and in those that start them."""

from __future__ import annotations

PREFIX = "Bitune"
"""Of the names of architectures: `BituneLlamaForCausalLM`."""

ENDINGS = ("ForCausalLM", "LMHeadModel")
"""Of the architectures that are causal language models."""

ADAPTER = "bitune_adapter"
"""The entry of `hf_overrides`, and so of the model's config, with the folder of the adapter."""

PROMPT_LENGTH = "bitune_prompt_length"
"""The entry of `SamplingParams.extra_args` with the number of tokens that are prompt, if not all of them are."""
