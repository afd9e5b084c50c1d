"""Modules of 0.2 that are elsewhere now: `from bitune_plugin.full import FullConfig` still works, with a warning."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

MOVED = {
    "adapter_methods": ("tuner.transformers_methods",),
    "architectures": ("modeling.architectures", "errors", "plugins"),
    "attention": ("modeling.attention", "core.mixing"),
    "authors": ("checkpoints.authors",),
    "autocast": ("core.autocast",),
    "config": ("tuner.config", "saved_format.settings"),
    "folders": ("checkpoints.folders",),
    "forward": (
        "modeling.causal_lm",
        "modeling.prompts",
        "modeling.attach",
        "modeling.architectures",
        "modeling.backbone",
        "modeling.generation",
    ),
    "full": ("tuner.full",),
    "integrity": ("checkpoints.integrity", "saved_format.keys"),
    "joint_attention": ("modeling.joint_attention",),
    "kernels": ("modeling.backends",),
    "latent_attention": ("modeling.latent_attention",),
    "layout": ("core.layout", "core.planning", "core.prompts", "core.gather", "errors"),
    "masks": ("core.masks",),
    "merging": ("tuner.merging",),
    "methods": ("tuner.methods", "saved_format.refused"),
    "mixing": ("core.mixing",),
    "peft_host": ("tuner.host",),
    "per_thread": ("modeling.context",),
    "quirks": ("default_plugins.architectures",),
    "routing": (
        "modeling.extension",
        "modeling.context",
        "modeling.checkpointing",
        "modeling.streams",
        "tuner.adapter_layers",
    ),
    "saved": ("checkpoints.saved",),
    "status": ("tuner.status",),
    "undo": ("tuner.undo",),
    "weights": ("saved_format.weights",),
    "writing": ("checkpoints.writing",),
}
"""Old module -> the modules that have its names now."""

RENAMED = {
    "Call": "ModelCall",
    "Documents": "SequenceGroup",
    "EXTENSIONS": "PATCHES",
    "Extension": "Patch",
    "FollowingLayer": "CheckpointedLayer",
    "JointAttention": "SingleCallAttention",
    "KERNELS": "BACKENDS",
    "KEYWORD": "CONTEXT_KEYWORD",
    "Made": "Memo",
    "Move": "Gather",
    "NO_READING": "NO_CONTEXT",
    "ONCE_OWN_ARITHMETIC": "ONCE_BYPASSING",
    "Parts": "Segments",
    "Reach": "LocalAttention",
    "Reading": "ForwardContext",
    "RecomputedLayer": "CheckpointWrapperPatch",
    "Sealed": "ContextArgument",
    "Sight": "AttentionPattern",
    "Window": "SlidingWindow",
    "WindowInConfig": "SlidingWindowInConfig",
    "current_reading": "current_context",
    "document_starts": "sequence_starts",
    "extend": "patch",
    "follow_into_checkpoints": "patch_checkpoint_wrappers",
    "once": "memoized",
    "reach_of": "local_attention_of",
    "reading_in_progress": "forward_context",
    "rearrange": "permute_tokens",
    "restore": "unpatch",
}
"""Old name in an old module -> its name now."""


class MovedModule(ModuleType):
    """A stand-in for a module that was moved: looks its names up where they are now."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        package, _, old = self.__name__.rpartition(".")
        for new in MOVED[old]:
            module = import_module(f"{package}.{new}")
            for now in (RENAMED.get(name, name), name):  # `Parts` of `integrity` is called so still
                if hasattr(module, now):
                    warnings.warn(f"`{self.__name__}.{name}` is `{module.__name__}.{now}` now.", FutureWarning, 2)
                    return getattr(module, now)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def stand_in(package: str) -> None:
    """Makes the old modules of `package` importable."""
    for old in MOVED:
        name = f"{package}.{old}"
        sys.modules.setdefault(name, MovedModule(name))
