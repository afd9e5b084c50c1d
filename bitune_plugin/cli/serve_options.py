"""The options of `vllm serve` on the command line of `bitune serve`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from typing import Any

OF_VLLM_SERVE = (
    "--headless",
    "--api-server-count",
    "-asc",
    "--grpc",
    "--data-parallel-multi-port-external-lb",
    "-dpm",
    "--data-parallel-hybrid-lb",
    "-dph",
    "--data-parallel-start-rank",
    "-dpr",
)
"""Options that `vllm serve` acts on before it starts a server; the server alone ignores them (0.28 to 0.32)."""


def check_order(argv: Sequence[str], ours: Sequence[str]) -> None:
    """Raises ValueError if options of vLLM stand before the adapter, or something else behind it.

    Only vLLM knows which of its options have values, so that the adapter could not be told from a value.

    Args:
        argv: the command line.
        ours: the options that may stand before the adapter.
    """
    adapter = next((i for i, each in enumerate(argv) if each not in ours), None)
    if adapter is None:
        return
    name = argv[adapter]
    if name.startswith("-"):
        raise ValueError(f"`{name}` stands before the adapter. Name the adapter first: `bitune serve ADAPTER {name}`.")
    following = next((each for each in argv[adapter + 1 :] if each not in ours), "-")
    if not following.startswith("-"):
        raise ValueError(
            f"`{following}` is no option, and the adapter is `{name}`. Give one adapter, and the base model by "
            "`--model`."
        )


def without_config(options: Sequence[str]) -> list[str]:
    """Options with those of the file of `--config` in its place: before all others, which win over them.

    Raises:
        ValueError: there is no such file, or nothing in it that could be options.
    """
    files = [value for name, value in named(options) if name == "--config"]
    if not files:
        return list(options)
    if len(files) > 1 or not files[0]:
        raise ValueError("`--config` must name one file of options, in YAML.")
    parser = server_parser()
    try:
        read = parser.load_config_file(files[0])
    except Exception as error:  # of the file system, of YAML, or because it holds no mapping
        raise ValueError(f"`--config {files[0]}` cannot be read ({error}). Name a file of options, in YAML.") from error
    if any(name == "--config" for name, _ in named(read)):
        raise ValueError(f"`--config {files[0]}` names another file of options. Write its options into the former.")
    return [*read, *without(options, "--config")]


def check_names(options: Sequence[str]) -> None:
    """Raises ValueError for a name that vLLM does not know as it stands.

    vLLM also takes the beginning of a name, such as `--hf-over.rope_theta 5`, which nothing here would find.
    """
    known = server_parser()._option_string_actions
    for name in (name.partition(".")[0].rstrip("+") for name, _ in named(options)):
        if name.startswith("--") and name not in known:
            whole = [other for other in known if name != "--" and other.startswith(name)]
            instead = f"`{'`, `'.join(whole[:3])}`" if whole else "those of `vllm serve --help`"
            raise ValueError(f"`{name}` is no option of `vllm serve`. Write names in full: {instead}.")


@cache
def server_parser() -> Any:
    """vLLM's own parser of the options of `vllm serve`, which takes a while to build."""
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


def check_dotted(options: Sequence[str]) -> None:
    """Raises ValueError for `--hf-overrides.name`, which vLLM puts behind, and so in the place of, all that is set."""
    for name, _ in named(options):
        if name.startswith("--hf-overrides."):
            raise ValueError(
                f"`{name}` would take the place of the overrides that Bitune sets. Give them as one object: "
                "`--hf-overrides '{\"name\": value}'`."
            )


def check_command(options: Sequence[str]) -> None:
    """Raises ValueError for options of `vllm serve` that would be ignored, because it cannot be called."""
    for name, _ in named(options):
        if name in OF_VLLM_SERVE and not has_vllm_serve():
            raise ValueError(
                f"`{name}` is for the command `vllm serve`, which does not work in this build of vLLM (its package is "
                "not called vllm). Leave it out, or install the package vllm."
            )


def has_vllm_serve() -> bool:
    """Whether the command `vllm` works: it asks for its own version, and some builds have another name (0.32)."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return False
    return True


def engine_options(options: Sequence[str]) -> dict[str, Any]:
    """The options of an engine among those of the server, by the names of vLLM's `EngineArgs`, if they were given."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    known = EngineArgs.add_cli_args(FlexibleArgumentParser(allow_abbrev=False))
    before = known.parse_args([])
    after, _ = known.parse_known_args(with_dashes(options))
    return {name: value for name, value in vars(after).items() if value != getattr(before, name)}


def with_dashes(options: Sequence[str]) -> list[str]:
    """Options with dashes for underscores in their names; vLLM takes both."""
    found = []
    for option in options:
        name, equals, value = option.partition("=")
        name, dot, rest = name.partition(".")
        found.append(name.replace("_", "-") + dot + rest + equals + value if name.startswith("--") else option)
    return found


def named(options: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each option, with dashes, and what stands behind it: its value, if it has one."""
    dashed = with_dashes(options)
    for option, following in zip_longest(dashed, dashed[1:], fillvalue=""):
        name, equals, value = option.partition("=")
        if option.startswith("-"):
            yield name, value if equals else following


def without(options: Sequence[str], name: str) -> list[str]:
    """Options without the one called `name`, and without its value."""
    kept, is_value = [], False
    for option, dashed in zip(options, with_dashes(options), strict=True):
        if not is_value and dashed.partition("=")[0] != name:
            kept.append(option)
        is_value = not is_value and dashed == name
    return kept
