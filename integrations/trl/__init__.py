"""TRL's trainers for Bitune.

To read in this order. Supervised fine-tuning: `trainer` (`BituneSFTTrainer`), `config` (its settings), `checks` (its
refusals), `preparation` (its datasets; with `conversations`, `samples`, `filters`), `collator` (its batches). All other
trainers: `prompts` (the mixin), `tools`, `trainers`, `experimental`. For both: `adapters`, `host` (names of TRL).
`templates` makes prompts and completions for the command line.
"""

from .config import BituneSFTConfig
from .trainer import BituneSFTTrainer

__all__ = ["BituneSFTConfig", "BituneSFTTrainer"]
