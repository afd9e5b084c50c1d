"""One command on a GPU: is Bitune exact there, and what does it cost?

    python examples/benchmarks/gpu.py                     # on any machine with CUDA, in less than ten minutes
    python examples/benchmarks/gpu.py --budget 120 --models llama-1b
    python examples/benchmarks/gpu.py --models path/to/model
    python examples/benchmarks/gpu.py --device cpu --models llama-toy --attention sdpa --lengths 32 --tokens 64 \
        --prompt 16 --new-tokens 4                        # shows on a CPU that the command works, and nothing else

Models of 1 and 3 billion parameters in the shapes of Llama and Gemma, with random weights in bfloat16, so that nothing
is downloaded. In this order:

* *exactness*: logits and gradients of `sdpa`, `flex_attention` and each flash attention that is installed, in float32
  and bfloat16, beside the three literal passes (`cuda/exactness.py`); on the first layers of the smaller models;
* *training*: time and memory of a step against LoRA and three passes, rows of 512 to 4096 tokens, with and without
  checkpointing; and rows of unequal length, padded and packed. To be reached: `over` at most 1.05;
* *prefill* of 2,000 tokens, at most 2.0 times LoRA's, and *decoding* with a dynamic, a static and a compiled static
  cache, at most 1.02 times LoRA's;
* *profile* of one step: the shares of matrix products, attention and copies.

All contenders of a case are in one process and share the frozen weights. They run by turns, forwards and backwards,
after two runs that do not count; times are those of CUDA events. A contender that fails, for lack of memory for
example, leaves its reason in its row, and the others go on. `--budget` is kept: each case gets an equal share of what
is left for rounds beyond the second, and what the budget does not reach is listed as such. The results are written as
JSON and as a table, anew after each case.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    # In place of this file's own folder, whose `lm_eval.py` Python would import instead of lm-eval.
    sys.path[:1] = [str(ROOT / "examples"), str(ROOT / "tests" / "support")]
    import_module("benchmarks.cuda.command").main(__doc__)
