"""The documentation: every Python block runs, every command and flag exists, every link leads somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import click
import pytest
import typer
from models import small_target
from picture_cases import save_with_processor
from tokenizers_for_tests import small_tokenizer
from typer.testing import CliRunner

import beagle_kernels
from beagle_sd.cli.app import app
from beagle_sd.decoding.trees import calibration

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "docs"))

import figures  # noqa: E402

PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def pages_with_python() -> list:
    """The README's target is a real model."""
    return [
        pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] if page.name in ("README.md", "train.md") else [])
        for page in PAGES
        if blocks(page, "python")
    ]


@pytest.mark.parametrize("page", pages_with_python())
def test_blocks_run_in_the_order_of_the_page(page, tmp_path, monkeypatch):
    """Python, and in blocks marked sh the command beagle-sd, with a file behind < as its input; "my-model" is a small
    target of the tests' own, and "my-vision-model" one that takes pictures."""
    monkeypatch.chdir(tmp_path)
    if page.name != "README.md":
        monkeypatch.setenv("BEAGLE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(calibration, "_PASSES", 1)
    small_target().save_pretrained("my-model")
    small_tokenizer().save_pretrained("my-model")
    if "my-vision-model" in page.read_text(encoding="utf-8"):
        save_with_processor("my-vision-model")
    names = {"__name__": "page"}
    for number, (kind, text) in enumerate(FENCE.findall(page.read_text(encoding="utf-8")), 1):
        if kind == "python":
            exec(compile(text, f"{name_of(page)}, block {number}", "exec"), names)
        for line in text.splitlines() if kind == "sh" else ():
            command, _, source = line.partition(" < ")
            typed = Path(source).read_text(encoding="utf-8") if source else None
            result = CliRunner().invoke(app, shlex.split(command)[1:], input=typed)
            assert result.exit_code == 0, (line, result.output, result.exception)


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figures_are_up_to_date(name):
    """Written by python docs/figures.py."""
    assert (ROOT / "docs/figures" / name).read_text(encoding="utf-8") == figures.FIGURES[name]()


def test_the_messages_of_troubleshooting_are_in_the_code():
    """Each row's message, piece by piece between its dots, as the sources have it."""
    code = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("beagle_kernels", "python", "setup.py", "csrc")
        for path in ([ROOT / folder] if folder.endswith(".py") else (ROOT / folder).rglob("*.py"))
    )
    code = re.sub(r'"\s*f?"', "", code)
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) > 15
    for message in re.findall(r"`([^`]+)`", " ".join(rows)):
        if message not in ("loss is nan", "inf"):
            missing = [
                part
                for part in re.split(r"\.\.\.|\[|\]|\(|\)|'\w+'|: ", message)
                if part.strip() and part.strip() not in code
            ]
            assert not missing, (message, missing)


def commands(page: Path) -> list[list[str]]:
    """The shell lines of a page's unmarked and sh blocks, without comments, and the commands within its text."""
    text = page.read_text(encoding="utf-8")
    lines = "".join(blocks(page, "") + blocks(page, "sh")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    known = re.compile(r"([A-Z_]+=\S+ )*((beagle-sd|python|make|pip|torchrun) \S|(bench|csrc)/\S+\.sh)")
    found = [shlex.split(line, comments=True) for line in lines if known.match(line)]
    return [[word for word in words if not re.match(r"[A-Z_]+=", word)] for words in found]


def check_beagle_sd(arguments: list[str]) -> None:
    """The subcommand exists and every option given is one of its own."""
    group = typer.main.get_command(app)
    if not arguments:
        return
    command = group.get_command(click.Context(group), arguments[0])
    assert command is not None, f"no command beagle-sd {arguments[0]}"
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [word for word in arguments[1:] if word.startswith("--") and word not in options]
    # what is not one of its own goes to vLLM
    assert not unknown or command.context_settings.get("ignore_unknown_options"), (arguments, unknown)


def check_module(module: str, arguments: list[str]) -> None:
    """The module exists, and its sources, those of its whole folder if it is one, know every option given."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    path = Path(spec.origin)
    files = path.parent.glob("*.py") if path.name == "__init__.py" else [path]
    code = "".join(file.read_text(encoding="utf-8") for file in files)
    unknown = [word for word in arguments if word.startswith("--") and f'"{word}"' not in code]
    assert module.startswith("pytest") or not unknown, (module, unknown)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_commands_and_their_flags_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for words in commands(page):
        if words[0] == "make":
            assert words[1] in targets, words
        elif words[0] == "pip":
            assert words[1] in ("install", "uninstall"), words
        elif words[0].endswith(".sh"):
            script = (ROOT / words[0]).read_text(encoding="utf-8")
            for module in re.findall(r"-m (bench\S+)", script)[:1]:
                check_module(module, words[1:])
        elif "-m" in words:
            module, *arguments = words[words.index("-m") + 1 :]
            check_beagle_sd(arguments) if module == "beagle_sd" else check_module(module, arguments)
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), words
        elif words[0] == "beagle-sd":
            check_beagle_sd(words[1:])


def test_the_readme_is_for_the_first_minute():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 105
    assert "```python" in text.splitlines()[:25]
    said = {name_of(page): len(re.findall("no GPU has", page.read_text(encoding="utf-8"), re.I)) for page in PAGES}
    assert said.pop("README.md") == 1 and not any(said.values()), "said once, in the README; elsewhere: not measured"


def test_every_op_has_a_page():
    ops = {name for name in beagle_kernels.__all__ if name.islower()}
    assert ops == {page.stem for page in (ROOT / "docs/ops").glob("*.md")} - {"README"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert "://" in link or (page.parent / link).exists(), link
