"""The table of TRL's trainers in `docs/trainers.md`. The walk tests every row; `python tests/support/trainer_table.py`
writes the table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
HEAD = "| trainer of TRL | the stock class | with one line swapped |\n|---|---|---|\n"


@dataclass(frozen=True)
class Row:
    """A trainer.

    Attributes:
        name: without "Trainer".
        experimental: it is in `trl.experimental`.
        stock_is_exact: the stock class with `peft_config=BituneConfig()` is exact; it is refused otherwise.
        ours: Bitune has a class of its own, which is exact.
        remark: what else there is to say of the stock class.
    """

    name: str
    experimental: bool = False
    stock_is_exact: bool = False
    ours: bool = True
    remark: str = ""

    @property
    def line(self) -> str:
        module = "trl.experimental" if self.experimental else "trl"
        stock = "exact" if self.stock_is_exact else "refused in the first training step"
        ours = f"`Bitune{self.name}Trainer`: exact" if self.ours else "none"
        return f"| `{module}` `{self.name}Trainer` | {self.remark or stock} | {ours} |\n"


ROWS = (
    Row("SFT", stock_is_exact=True, remark="exact, from prompts and completions"),
    Row("DPO", stock_is_exact=True, remark="exact; not the logits for `compute_metrics`"),
    Row("KTO", stock_is_exact=True, remark="exact; not the logits for `compute_metrics`"),
    Row("GRPO", stock_is_exact=True, remark="exact, without vLLM and tools"),
    Row("RLOO", stock_is_exact=True, remark="exact, without vLLM and tools"),
    Row("Distillation"),
    Row("Reward", ours=False),
    Row("CPO", experimental=True),
    Row("ORPO", experimental=True),
    Row("TPO", experimental=True),
    Row("GKD", experimental=True),
    Row("OnlineDPO", experimental=True),
)


def table() -> str:
    return HEAD + "".join(row.line for row in ROWS)


def page() -> str:
    """The page, with the table as it should be."""
    text = PAGE.read_text()
    start = text.index(HEAD.splitlines()[0])
    return text[:start] + table() + text[text.index("\n\n", start) + 1 :]


if __name__ == "__main__":
    PAGE.write_text(page())
