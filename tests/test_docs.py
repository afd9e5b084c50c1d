"""The README and the pages: their links lead somewhere, their code runs, their figures are those of the results."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from contextlib import chdir
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

import lm_eval.tasks
import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from lm_eval._cli import HarnessCLI
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from bitune_plugin import BituneConfig
from bitune_plugin.cli.sft_settings import read_settings
from bitune_plugin.integrations.lm_eval import TASKS
from models import WORDS, tiny, word_tokenizer
from reference import DATA

ROOT = Path(__file__).parents[1]
DOCS, EXAMPLES = ROOT / "docs", ROOT / "examples"
README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md")), *sorted(EXAMPLES.rglob("README.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODEL = "google/gemma-3-270m"
"""The model of the pages; here a folder with a tiny one."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]+`", "", text, flags=re.MULTILINE | re.DOTALL)


# --- Links ------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that code hosts and mkdocs agree on."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", read(page), flags=re.M | re.S), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings]
    return {re.sub(r"\s", "-", heading) for heading in plain} & {re.sub(r"[-\s]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"(?:\]\(|(?:src|srcset|href)=\")([^)\"\s]+)", without_code(read(page))):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{name_of(page)} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{name_of(page)} links to {target}"


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"^ +- (\S+\.md)$", read(ROOT / "mkdocs.yml"), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))


def test_the_pictures_of_the_method_are_those_of_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS / "images")
    from draw_method import FOLDER, pictures

    assert {name: read(FOLDER / name) for name in pictures()} == pictures()


# --- Code -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with all that the pages name, and the current one: a base model, a dataset, adapters."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "examples").symlink_to(EXAMPLES)
    shutil.copytree(DATA / "llama-checkpoint", folder / "authors-folder")
    samples = [{"prompt": " ".join(WORDS[i : i + 5]), "completion": f" {WORDS[i + 5]}"} for i in range(4)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, samples)))
    with chdir(folder):
        tiny().save_pretrained(MODEL)
        word_tokenizer().save_pretrained(MODEL)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), BituneConfig())
        for adapter in ("adapter", "out/checkpoint-1", "out/checkpoint-2"):
            model.save_pretrained(adapter)
            word_tokenizer().save_pretrained(adapter)
        yield folder


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_runs_as_it_stands(page: Path, workplace: Path) -> None:
    """All blocks of a page, one after the other."""
    if page.stem == "serving":
        pytest.importorskip("vllm")
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, name_of(page), "exec"), names)
    if page.stem == "plugins":
        (to_alpha,) = names["bitune_mixings"]().values()
        assert to_alpha(torch.tensor([0.01]), 0.01).item() == 0.5


def test_the_readme_loads_an_adapter_without_importing_bitune() -> None:
    """That such programs run is in `test_autoload.py`."""
    training, loading = blocks(README, "python")
    assert "import BituneConfig" in training
    assert "bitune" not in loading


class Command(NamedTuple):
    page: Path
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{name_of(self.page)}: {' '.join(self.words)}"


def commands() -> list[Command]:
    """Every command in the Bash blocks of all pages, without the variables set before it."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words and re.match(r"[A-Z0-9_]+=", words[0]):
                    words.pop(0)
                if words:
                    found.append(Command(page, tuple(words)))
    return found


def check_bitune(words: list[str]) -> None:
    (entry,) = entry_points(group="console_scripts", name="bitune")
    command, *arguments = words
    if command == "sft":
        read_settings([*arguments, "--use_cpu", "true"])
    elif command in ("doctor", "serve"):  # which run in tests/checks and tests/serving
        with pytest.raises(SystemExit, match="0"):
            entry.load()([command, *arguments, "--help"])
    else:
        assert entry.load()(words) == 0


def check_lm_eval(words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["lm_eval", *words])
        arguments = HarnessCLI().parse_args()
    assert arguments.model in ("bitune", "local-completions", "vllm")
    given = arguments.tasks if isinstance(arguments.tasks, str) else ",".join(arguments.tasks)
    for task in given.split(","):
        ours, theirs = Path(TASKS, f"{task}.yaml"), Path(lm_eval.tasks.__file__).parent / task
        assert ours.is_file() or theirs.is_dir(), task


def check_accelerate(words: list[str]) -> None:
    arguments = launch_command_parser().parse_args(words[1:])
    if arguments.module:
        assert arguments.training_script == "lm_eval"
        check_lm_eval(arguments.training_script_args)
    else:
        assert (ROOT / arguments.config_file).is_file()
        assert (ROOT / arguments.training_script).is_file()


def check_python(words: list[str]) -> None:
    """The script, or the module of a folder, is there and has these options; of `sft.py` and `rates.py` TRL's."""
    if words[0].startswith("-") or words[0] in ("examples/sft.py", "examples/paper/rates.py"):
        return
    script = ROOT / words[0]
    if script.is_dir():
        assert (script / "__main__.py").is_file()
        script = script / f"{words[1]}.py"
    source = "".join(map(read, [script, *script.parent.glob("*.py"), EXAMPLES / "quickstart.py"]))
    assert script.is_file()
    assert all(f'"{option}"' in source for option in words[1:] if option.startswith("--"))


def check_make(words: list[str]) -> None:
    assert re.search(rf"^{words[0]}:.*##", read(ROOT / "Makefile"), re.MULTILINE)


def check_pip(words: list[str]) -> None:
    extras = [extra for word in words for found in re.findall(r"\[(.+)\]", word) for extra in found.split(",")]
    assert set(extras) <= PROJECT["optional-dependencies"].keys()


CHECKS = {
    "bitune": check_bitune,
    "lm_eval": check_lm_eval,
    "accelerate": check_accelerate,
    "python": check_python,
    "make": check_make,
    "pip": check_pip,
    "curl": None,
    "git": None,
    "vllm": None,
    "cd": None,
    "export": None,
    "mkdir": None,
    "printf": None,
    "pre-commit": None,
}


def test_commands_are_as_their_programs_take_them(workplace: Path) -> None:
    """Those of `bitune` run, but for `sft` and `doctor`; the arguments of all others are parsed."""
    for command in commands():
        program, *words = command.words
        assert program in CHECKS, command.name
        try:
            if CHECKS[program]:
                CHECKS[program](words)
        except (Exception, SystemExit) as error:
            raise AssertionError(command.name) from error


def test_the_settings_of_a_recipe_are_known(tmp_path: Path) -> None:
    (recipe,) = blocks(DOCS / "cli.md", "yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    settings = read_settings(["--config", str(tmp_path / "recipe.yaml"), "--use_cpu", "true"])
    assert not settings.for_accelerate


# --- Figures ----------------------------------------------------------------------------------------------------------


def results(name: str) -> list[dict]:
    return json.loads(read(EXAMPLES / "benchmarks" / "results" / f"{name}.json"))


def range_of(numbers: list[float]) -> str:
    low, high = f"{min(numbers):.1f}", f"{max(numbers):.1f}"
    return low if low == high else f"{low} to {high}"


def test_the_readme_s_costs_are_those_of_the_benchmarks() -> None:
    steps = [r for name in ("lengths", "train_step", "train_step-checkpointing") for r in results(name)]
    generated = [r for r in results("generate") if r["contender"] == "bitune"]
    scored = {r["shape"]: [] for r in results("lm_eval")}
    for result in results("lm_eval"):
        if result["contender"] == "bitune":
            scored[result["shape"]].append(result["speed"])
    several, single = (
        [speed for shape, speeds in scored.items() if (shape.partition("x")[2] == "1") is one for speed in speeds]
        for one in (False, True)
    )
    rows = [
        ("a training step, half of each row prompt", [r["ratio"] for r in steps if r["contender"] == "bitune"], ""),
        ("the same on padded", [r["ratio"] for r in results("ragged") if r["contender"] == "bitune"], ", because"),
        ("reading a prompt", [r["prefill_ratio"] for r in generated], " |"),
        ("each generated token", [r["per_token_ratio"] for r in generated], " |"),
        ("scoring choices of several tokens", several, " times as fast"),
    ]
    for start, ratios, end in rows:
        (line,) = re.findall(rf"^\| {start}.*$", read(README), re.MULTILINE)
        assert f"| 1 | {range_of(ratios)}{end}" in line
    assert f"of one token {range_of(single)} |" in line


def test_the_readme_s_scores_are_those_of_the_evidence() -> None:
    evidence = read(EXAMPLES / "evidence" / "README.md")

    def scores(task: str, method: str) -> list[str]:
        (line,) = re.findall(rf"^\| smollm2-135m \| {task} \| {method} \| 3 \|(.*)\|$", evidence, re.MULTILINE)
        return [cell.split()[0] for cell in line.split("|") if cell.strip()][1:3]

    shown = re.findall(r"samples(?: \(SmolLM2\))? \| \**([\d.]+)\** \| \**([\d.]+)\** \|", read(README))
    expected = [
        pair
        for task in ("short_path_star", "larger_families")
        for pair in zip(scores(task, "LoRA r=16"), scores(task, "Bitune r=8"), strict=True)
    ]
    assert shown == expected
    assert "| LoRA r=16 | 18 | -4.2 | 0.1 |" in evidence
    assert "| **+4.2** (p 0.1) |" in read(README)


def test_the_readme_counts_models_and_methods() -> None:
    def names(page: str, start: str, end: str, pattern: str = r"`[^`]+`") -> int:
        return len(re.findall(pattern, read(DOCS / page).split(start)[1].split("-->", 1)[1].split(end)[0]))

    readme = read(README)
    assert f"**{names('models.md', '<!-- exact', '##')} model types**" in readme
    assert f"**{names('models.md', '<!-- refused', '<!-- end')} are refused**" in readme
    assert f"[{names('peft-methods.md', '<!-- methods', '| refused', '`[A-Za-z0-9]+Config`')} methods]" in readme


def test_a_release_has_one_version_and_one_date() -> None:
    citation = yaml.safe_load(read(ROOT / "CITATION.cff"))
    version, date = re.search(r"^## \[([\d.]+)\] - (\S+)$", read(ROOT / "CHANGELOG.md"), re.MULTILINE).groups()
    assert (citation["version"], str(citation["date-released"])) == (version, date)
    assert version == PROJECT["version"]
