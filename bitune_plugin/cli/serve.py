"""`bitune serve`: vLLM's OpenAI server with a Bitune adapter."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitune_plugin.cli.serve_options import (
    check_command,
    check_dotted,
    check_names,
    check_order,
    engine_options,
    has_vllm_serve,
    named,
    without,
    without_config,
)
from bitune_plugin.cli.terminal import parser, say
from bitune_plugin.integrations.vllm.arguments import V2_RUNNER, check_installed, engine_args

COMMAND, SERVER = "vllm.entrypoints.cli.main", "vllm.entrypoints.openai.api_server"
"""The modules of `vllm serve`, and of one server alone, which is run if the former does not work."""

SET_HERE = ("revision", "tokenizer", "hf_overrides", "max_num_batched_tokens")
"""What `engine_args` may set beside the model, by the names of vLLM's `EngineArgs`."""

OURS = ("--print", "-h", "--help")
"""The options of `bitune serve` itself."""

DESCRIPTION = """\
Serves a Bitune adapter with vLLM, by its OpenAI-compatible server: completions and chat, streamed or not. Finds the
base model, and sets what Bitune needs; all other options are those of `vllm serve`. The answers are those of
`PeftModel.generate`. Needs vLLM: pip install 'bitune-plugin[vllm]'
"""

EXAMPLES = """\
  bitune serve adapter
  bitune serve adapter --port 8001 --dtype bfloat16 --max-model-len 4096
  bitune serve adapter --model BASE                  where the base lies elsewhere than the adapter says
  bitune serve adapter --print                       the command that it runs, and nothing else
"""


def main(argv: Sequence[str]) -> None:
    check_order(argv, OURS)
    options, of_vllm = _parser().parse_known_args(argv)
    check_dotted(of_vllm)
    check_installed()
    of_vllm = without_config(of_vllm)
    check_names(of_vllm)
    check_dotted(of_vllm)
    check_command(of_vllm)
    arguments = engine_args(options.adapter, **engine_options(of_vllm))
    _check(arguments, headless=any(name == "--headless" for name, _ in named(of_vllm)))
    command = command_of(options.adapter, arguments, without(of_vllm, "--model"))
    if options.print:
        say(f"{V2_RUNNER}=0 {shlex.join(command)}")
        return
    os.environ.setdefault(V2_RUNNER, "0")
    sys.stdout.flush()
    os.execv(command[0], command)


def _parser() -> argparse.ArgumentParser:
    arguments = parser("serve", DESCRIPTION, EXAMPLES)
    arguments.usage = "bitune serve ADAPTER [--print] [options of `vllm serve`]"
    arguments.allow_abbrev = False
    arguments.add_argument("adapter", metavar="ADAPTER", help="folder of a Bitune adapter, or hub id")
    arguments.add_argument("--print", action="store_true", help="print the command instead of running it")
    return arguments


def _check(arguments: dict[str, Any], headless: bool) -> None:
    """Raises ValueError, with its advice, if an engine with these arguments is refused, before one is started."""
    from pydantic import ValidationError
    from vllm.engine.arg_utils import EngineArgs

    try:
        EngineArgs(**arguments).create_engine_config(headless=headless)
    except ValidationError as error:
        raise ValueError(" ".join(map(_reason, error.errors()))) from error


def _reason(error: Any) -> str:
    """What was raised, or what Pydantic says, which names no option, behind the name of the field."""
    raised = error.get("ctx", {}).get("error")
    return str(raised) if raised else f"`{'.'.join(map(str, error['loc']))}`: {error['msg']}."


def command_of(adapter: str, arguments: dict[str, Any], of_vllm: Sequence[str]) -> list[str]:
    """The command that starts the server.

    Args:
        adapter: as it was named; a folder lends the model its name, and a hub id is one.
        arguments: those of `engine_args`.
        of_vllm: the options of the command line. What is set in `arguments` comes last, and so wins.
    """
    name = Path(adapter).resolve().name if Path(adapter).is_dir() else adapter
    is_named = any(option == "--served-model-name" for option, _ in named(of_vllm))
    ours = [] if is_named else ["--served-model-name", name]
    for each in SET_HERE:
        if each in arguments:
            value = arguments[each]
            ours += [f"--{each.replace('_', '-')}", json.dumps(value) if isinstance(value, dict) else str(value)]
    if has_vllm_serve():
        return [sys.executable, "-m", COMMAND, "serve", arguments["model"], *of_vllm, *ours]
    return [sys.executable, "-m", SERVER, *of_vllm, "--model", arguments["model"], *ours]
