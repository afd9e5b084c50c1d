"""Engines of vLLM in the process of the tests: one in processes of its own takes a minute to start, and not seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # before vLLM is imported
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import pytest

NEED_VLLM = [
    f"test_{name}.py"
    for name in ("engine", "lm_eval_vllm", "operations", "placement", "requests", "scheduling", "server")
]
collect_ignore = [] if find_spec("vllm") else NEED_VLLM
"""Without vLLM, the rest of this folder is tested."""


@pytest.fixture(scope="session")
def cache_of_vllm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("vllm"))


# Not of the package: without `__init__.py` that means the session, and other tests of the process could not compile.
@pytest.fixture(scope="module", autouse=True)
def _environment(cache_of_vllm: str) -> Iterator[None]:
    """Of the engines here, and of those in new processes."""
    with pytest.MonkeyPatch.context() as patch:
        # vLLM compiles small functions of its sampler, which takes longer than these tests.
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        # As `tests/conftest.py` has it here: threads that wait for each other cost a tiny model many times its work.
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("VLLM_CACHE_ROOT", cache_of_vllm)
        yield
