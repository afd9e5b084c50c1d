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

from bitune_plugin.cli.terminal import parser, say
from bitune_plugin.integrations.vllm.arguments import V2_RUNNER, check_installed, engine_args

SERVER = "vllm.entrypoints.openai.api_server"
"""Run as a module, because `vllm serve` of the builds for CPUs looks for a package of another name (0.32)."""

SET_HERE = ("model", "revision", "tokenizer", "hf_overrides", "max_num_batched_tokens")
"""What `engine_args` may set, by the names of vLLM's `EngineArgs`."""

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
    options, of_vllm = _parser().parse_known_args(argv)
    check_dotted(of_vllm)
    check_installed()
    arguments = engine_args(options.adapter, **engine_options(of_vllm))
    _check(arguments)
    command = command_of(options.adapter, arguments, of_vllm)
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


def check_dotted(of_vllm: Sequence[str]) -> None:
    """Raises ValueError for `--hf-overrides.name`, which vLLM puts behind, and so in the place of, all that is set."""
    for option in _with_dashes(of_vllm):
        name = option.partition("=")[0]
        if name.startswith("--hf-overrides."):
            raise ValueError(
                f"`{name}` would take the place of the overrides that Bitune sets. Give them as one object: "
                "`--hf-overrides '{\"name\": value}'`."
            )


def engine_options(of_vllm: Sequence[str]) -> dict[str, Any]:
    """The options of an engine among those of the server, by the names of vLLM's `EngineArgs`, if they were given."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    known = EngineArgs.add_cli_args(FlexibleArgumentParser(allow_abbrev=False))
    before = known.parse_args([])
    after, _ = known.parse_known_args(_with_dashes(of_vllm))
    return {name: value for name, value in vars(after).items() if value != getattr(before, name)}


def _with_dashes(options: Sequence[str]) -> list[str]:
    """Options with dashes for underscores in their names; vLLM takes both."""
    found = []
    for option in options:
        name, equals, value = option.partition("=")
        name, dot, rest = name.partition(".")
        found.append(name.replace("_", "-") + dot + rest + equals + value if name.startswith("--") else option)
    return found


def _check(arguments: dict[str, Any]) -> None:
    """Raises ValueError, with its advice, if an engine with these arguments is refused, before one is started."""
    from pydantic import ValidationError
    from vllm.engine.arg_utils import EngineArgs

    try:
        EngineArgs(**arguments).create_engine_config()
    except ValidationError as error:
        reasons = [str(each.get("ctx", {}).get("error", each["msg"])) for each in error.errors()]
        raise ValueError(" ".join(reasons)) from error


def command_of(adapter: str, arguments: dict[str, Any], of_vllm: Sequence[str]) -> list[str]:
    """The command that starts the server.

    Args:
        adapter: as it was named; a folder lends the model its name, and a hub id is one.
        arguments: those of `engine_args`.
        of_vllm: the options of the command line. What is set in `arguments` comes last, and so wins.
    """
    name = Path(adapter).resolve().name if Path(adapter).is_dir() else adapter
    named = [] if any(each.startswith("--served") for each in of_vllm) else ["--served-model-name", name]
    ours = []
    for each in SET_HERE:
        if each in arguments:
            value = arguments[each]
            ours += [f"--{each.replace('_', '-')}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return [sys.executable, "-m", SERVER, *named, *of_vllm, *ours]
