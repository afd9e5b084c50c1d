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
        ours: what there is to say of Bitune's own class; empty if there is none.
        remark: what there is to say of the stock class, if more than that.
    """

    name: str
    experimental: bool = False
    stock_is_exact: bool = False
    ours: str = "exact"
    remark: str = ""

    @property
    def line(self) -> str:
        module = "trl.experimental" if self.experimental else "trl"
        stock = "exact" if self.stock_is_exact else "refused in the first training step"
        ours = f"`Bitune{self.name}Trainer`: {self.ours}" if self.ours else "none"
        return f"| `{module}` `{self.name}Trainer` | {self.remark or stock} | {ours} |\n"


SAMPLES = "exact, without vLLM and tools"
WITH_TOOLS = "exact, with tools too"
NOT_BUILT = {"ours": "refused when it is built", "remark": "refused (it needs a vLLM server)"}

ROWS = (
    Row("SFT", stock_is_exact=True, remark="exact, from prompts and completions; not the logits for `compute_metrics`"),
    Row("DPO", stock_is_exact=True, remark="exact; not the logits for `compute_metrics`"),
    Row("KTO", stock_is_exact=True, remark="exact; not the logits for `compute_metrics`"),
    Row("GRPO", stock_is_exact=True, remark=SAMPLES, ours=WITH_TOOLS),
    Row("RLOO", stock_is_exact=True, remark="exact, without vLLM"),
    Row("Distillation", ours=WITH_TOOLS),
    Row("Reward", ours="", remark="refused when the adapter is added"),
    Row("A2PO", experimental=True, ours="exact; its model must carry the adapter"),
    Row("AsyncDistillation", experimental=True, **NOT_BUILT),
    Row("AsyncGRPO", experimental=True, **NOT_BUILT),
    Row("CPO", experimental=True),
    Row("GKD", experimental=True),
    Row("GMPO", experimental=True, stock_is_exact=True, remark=SAMPLES, ours=WITH_TOOLS),
    Row("GOLD", experimental=True),
    Row("IWOPD", experimental=True),
    Row("ORPO", experimental=True),
    Row("OnlineDPO", experimental=True),
    Row("SDFT", experimental=True),
    Row("SDPO", experimental=True),
    Row("ServerDistillation", experimental=True),
    Row("TPO", experimental=True),
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
