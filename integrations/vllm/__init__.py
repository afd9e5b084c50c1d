"""Bitune adapters served by vLLM: `bitune serve ADAPTER`, or offline `LLM(**engine_args(adapter))`.

A class `Bitune<Architecture>` is vLLM's own class of a model with three additions, each in a module of its own:

* `adapter.py` and `placement.py`: the causal adapter is merged into the weights while they are loaded, so that
  decoding is vLLM's own; the bidirectional adapter acts, as a low-rank difference, on the rows of the second stream.
* `rows.py` and `plan.py`: in a step with a prefill, copies of the encoded prompts are appended to the rows of the step.
* `attention.py`: every attention layer reads such a step three times, and leaves the mixture in the cache.

`operations.py` compiles the small operations that vLLM leaves to the compiler, because such a step runs uncompiled.
`register.py` is what vLLM calls in each of its processes. `runner.py` wraps the one private method of vLLM, and
`requests.py` a public one, which makes requests. `refusals.py` lists what is refused, `model_config.py` has vLLM leave
off what splits or shares prompts, `arguments.py` makes the arguments of an engine. Importing this package imports
nothing of vLLM.
"""

from __future__ import annotations

from .arguments import engine_args

__all__ = ["engine_args"]
