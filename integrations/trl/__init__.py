"""TRL: `BituneSFTTrainer` and its data."""

from .trainer import BituneSFTConfig, BituneSFTTrainer

__all__ = ["BituneSFTConfig", "BituneSFTTrainer"]
