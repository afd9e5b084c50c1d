"""`bitune serve` and the options of `vllm serve`: each works, or is refused in one line that names it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

import pytest

from bitune_plugin.cli import main, serve, serve_options
from bitune_plugin.cli.serve import OURS, command_of
from bitune_plugin.cli.serve_options import (
    check_command,
    check_dotted,
    check_names,
    check_order,
    named,
    without,
    without_config,
)
from serving import save

with_vllm = pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM")


@pytest.mark.parametrize(
    "argv",
    [
        ["adapter", "--port", "8001"],
        ["--print", "adapter"],
        ["adapter", "--print", "--port", "8001"],
        ["adapter"],
        ["--print"],
        [],
    ],
)
def test_the_adapter_comes_first(argv: list[str]) -> None:
    check_order(argv, OURS)


def test_an_option_before_the_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`--port` stands before the adapter. .* `bitune serve ADAPTER --port`"):
        check_order(["--print", "--port", "8001", "adapter"], OURS)


def test_a_second_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`other` is no option, and the adapter is `adapter`\. Give one adapter"):
        check_order(["adapter", "--print", "other", "--port", "8001"], OURS)


@pytest.mark.parametrize("option", ["--hf-overrides.rope_theta=1", "--hf_overrides.rope_theta"])
def test_overrides_by_name_are_refused(option: str) -> None:
    """vLLM puts them behind the command line as one object, in the place of ours: it would serve the base alone."""
    check_dotted(["--hf-overrides", "{}", "--compilation-config.mode", "3"])
    with pytest.raises(ValueError, match=r"`--hf-overrides.rope_theta` would take the place .* as one object"):
        check_dotted([option, "1"])


@pytest.mark.parametrize(
    "option",
    [
        *["--headless", "--api_server_count=2", "-asc", "--grpc", "--data-parallel-start-rank", "-dpr"],
        *["--data-parallel-hybrid-lb", "-dph", "--data-parallel-multi-port-external-lb", "-dpm"],
    ],
)
def test_what_only_the_command_of_vllm_knows_is_refused_without_it(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server alone ignores these: it would start another one than was asked for, and say nothing."""
    monkeypatch.setattr(serve_options, "has_vllm_serve", lambda: True)
    check_command([option, "2"])
    monkeypatch.setattr(serve_options, "has_vllm_serve", lambda: False)
    check_command(["--data-parallel-size", "2", "--port", "8001"])
    name = option.partition("=")[0].replace("_", "-")
    with pytest.raises(ValueError, match=f"`{name}` is for the command `vllm serve`, which does not work"):
        check_command([option, "2"])


def test_the_command_is_vllm_serve_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"model": "base", "hf_overrides": {"bitune_adapter": "folder"}}

    def command(works: bool) -> Sequence[str]:
        monkeypatch.setattr(serve, "has_vllm_serve", lambda: works)
        return command_of("adapter", arguments, ["--headless"])[1:]

    ours = ["--served-model-name", "adapter", "--hf-overrides", json.dumps(arguments["hf_overrides"])]
    assert command(True) == ["-m", "vllm.entrypoints.cli.main", "serve", "base", "--headless", *ours]
    server = "vllm.entrypoints.openai.api_server"
    assert command(False) == ["-m", server, "--headless", "--model", "base", *ours]


def test_no_options_are_none() -> None:
    assert list(named([])) == without([], "--model") == without_config([]) == []


def test_an_option_is_taken_out_with_its_value() -> None:
    options = ["--model", "a", "--port", "1", "--model=b", "--model", "--model"]
    assert without(options, "--model") == ["--port", "1"]
    assert without(["--served_model_name", "a", "--x"], "--served-model-name") == ["--x"]


@with_vllm
@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]])
def test_a_file_of_options_comes_before_the_others(form: list[str], tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("port: 8001\nenable_prefix_caching: false\nhf-overrides: {rope_theta: 5}\n")
    options = without_config(["--port", "8002", *(each.format(file) for each in form)])
    assert options[:2] == ["--port", "8001"]
    assert options[-2:] == ["--port", "8002"]
    assert json.loads(options[options.index("--hf-overrides") + 1]) == {"rope_theta": 5}


@with_vllm
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("enable-prefix-caching: true\n", "`--enable-prefix-caching` shares parts of prompts"),
        ("hf-overrides.rope_theta: 5\n", "`--hf-overrides.rope_theta` would take the place"),
        ("max-num-batched-tokens: 64\n", "must be at least `--max-model-len`"),
        ("- port\n", "cannot be read"),
        ("config: other.yaml\n", "names another file of options"),
        ("frobnicate: 3\n", "`--frobnicate` is no option of `vllm serve`"),
        ("hf-overrides: [1]\n", "`hf_overrides='1'` must be a mapping"),
        ("hf-overrides: rope\n", "`hf_overrides='rope'` must be a mapping"),
        ("tensor-parallel-size: 0\n", "`tensor_parallel_size`: Input should be greater than or equal to 1."),
        (None, "cannot be read"),
    ],
)
def test_refused_options_are_found_in_a_file(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "options.yaml"
    if text is not None:
        file.write_text(text)
    assert main(["serve", str(save(tmp_path).adapter), "--print", "--config", str(file)]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("bitune serve: error: ")
    assert message in line


@with_vllm
@pytest.mark.parametrize("options", [["--hf-over.rope_theta", "5"], ["--hf_over", "{}"], ["--max-num-batched=64"]])
def test_beginnings_of_names_are_refused(options: list[str]) -> None:
    """vLLM takes `--hf-over.rope_theta` for overrides, and puts them in the place of ours: it would serve the base."""
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    assert make_arg_parser(FlexibleArgumentParser()).parse_args(options)
    check_names(["--hf_overrides.rope_theta", "5", "--middleware+=x", "-tp", "1", "--no-enable-prefix-caching"])
    name = options[0].partition("=")[0].partition(".")[0].replace("_", "-")
    with pytest.raises(ValueError, match=rf"`{name}` is no option .* in full: `{name}"):
        check_names(options)


@with_vllm
def test_the_printed_command_is_one_of_a_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pasted into a shell, it has the same arguments, whatever is in them."""
    odd = 'it\'s a $HOME `x` "q" \\ *\n z'
    assert main(["serve", str(save(tmp_path).adapter), "--print", "--served-model-name", odd]) == 0
    line = capsys.readouterr().out
    line = line[line.index("VLLM_USE_V2_MODEL_RUNNER=0 ") :]
    assert odd in shlex.split(line)
    shown = f'show() {{ printf "%s\\0" "$@"; }}; {line.replace(sys.executable, "show", 1)}'
    done = subprocess.run(["sh", "-c", shown], capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == shlex.split(line)[2:]


@with_vllm
def test_overrides_in_a_file_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("hf-overrides: {rope_theta: 5.0}\nserved-model-name: mine\nport: 8001\n")
    served = save(tmp_path)
    assert main(["serve", str(served.adapter), "--print", "--config", str(file), "--max-model-len", "100"]) == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert "--served-model-name mine" in line
    assert line.count("--served-model-name") == 1
    assert "--config" not in line
    overrides = json.loads(line.rpartition("--hf-overrides '")[2].split("'")[0])
    assert overrides["rope_theta"] == 5.0
    assert overrides["bitune_adapter"] == str(served.adapter)


def test_the_example_hands_on_what_is_behind_two_dashes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai")
    example = run_path(str(Path(__file__).parents[2] / "examples" / "serve.py"))
    command = ["serve.py", "adapter", "--prompt", "one", "--port", "8001", "--", "--max-model-len", "512"]
    monkeypatch.setattr(sys, "argv", command)
    arguments = example["parse_arguments"]()
    assert (arguments.adapter, arguments.port) == (Path("adapter"), 8001)
    assert arguments.options == ["--max-model-len", "512"]
    monkeypatch.setattr(sys, "argv", command[:-3])
    assert example["parse_arguments"]().options == []
