"""The architecture as imports show it: no circle, wings that rest only on those below them, and files of a size."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
WINGS = ("cli", "vllm", "evaluation", "training", "data", "decoding", "models", "files", "needs")
"""Of beagle_sd: each may import itself and those after it."""
ANYTHING = ("beagle_sd", "beagle_sd.__main__")
"""The package's front door and its command: they may import every wing."""
MOST_LINES = 350
"""Of a source file."""
MOST_FILES = {"python": 13, "bench": 18, "tests": 35}
"""Python files of any one folder below these; bench/ops has one an op, as has tests/beagle_kernels."""

pytestmark = pytest.mark.skipif(not (ROOT / "python").is_dir(), reason="the sources are not beside the tests")


class Import(NamedTuple):
    """Module `importer` names `imported` in a line; `at_import` unless within a function or under TYPE_CHECKING."""

    importer: str
    imported: str
    line: int
    at_import: bool


def package(folder: Path) -> dict[str, Path]:
    """The modules of a package by their dotted names."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


PACKAGES = {
    folder.rpartition("/")[2]: package(ROOT / folder) for folder in ("python/beagle_sd", "beagle_kernels", "bench")
}
MODULES = {name: path for modules in PACKAGES.values() for name, path in modules.items()}


def imports(importer: str, source: str, is_package: bool = False) -> Iterator[Import]:
    """Every import in the source of a module, wherever it stands."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(importer, alias.name, node.lineno, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importer.split(".") + ([""] if is_package else [])
            parts = base[: -node.level] if node.level else []
            stem = ".".join([*parts, node.module] if node.module else parts)
            for alias in node.names:
                whole = f"{stem}.{alias.name}"
                yield Import(importer, whole if whole in MODULES else stem, node.lineno, at_import)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, False)
            for child in node.orelse:
                yield from visit(child, at_import)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, at_import and not inside)

    yield from visit(ast.parse(source), True)


def all_imports(package: str) -> list[Import]:
    return [
        found
        for name, path in PACKAGES[package].items()
        for found in imports(name, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    ]


def wing_of(module: str) -> str:
    return module.split(".")[1]


def wrong_way(found: Import) -> bool:
    """Whether a module of a wing imports what does not stand below it: an earlier wing, or the front door itself."""
    if found.importer in ANYTHING or found.imported.split(".")[0] != "beagle_sd":
        return False
    if found.imported in ANYTHING:
        return wing_of(found.importer) != "cli"
    return WINGS.index(wing_of(found.imported)) < WINGS.index(wing_of(found.importer))


def said(found: list[Import]) -> str:
    return "\n".join(f"{each.importer}, line {each.line}, imports {each.imported}" for each in found)


def circle(found: list[Import]) -> list[str]:
    """Modules that need one another to be imported, in their order; none if there is no circle."""
    graph: dict[str, set[str]] = {}
    for each in found:
        if each.at_import and each.imported in MODULES and each.imported != each.importer:
            graph.setdefault(each.importer, set()).add(each.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_form_of_import_is_seen():
    source = """
from __future__ import annotations
import os.path, beagle_kernels
from . import generate
from .engine import Engine
from ..models import draft
from beagle_sd.models.target import Target
if TYPE_CHECKING:
    from beagle_sd.data import live
else:
    import json
def late():
    from beagle_sd.cli import app
class Early:
    import bench
"""
    found = {each.imported: each.at_import for each in imports("beagle_sd.decoding.loop", source)}
    assert found == {
        "__future__": True,
        "os.path": True,
        "beagle_kernels": True,
        "beagle_sd.decoding.generate": True,
        "beagle_sd.decoding.engine": True,
        "beagle_sd.models.draft": True,
        "beagle_sd.models.target": True,
        "beagle_sd.data.live": False,
        "json": True,
        "beagle_sd.cli.app": False,
        "bench": True,
    }
    package = [each.imported for each in imports("beagle_kernels", "from . import backends", is_package=True)]
    assert package == ["beagle_kernels.backends"]


def test_a_wrong_import_and_a_circle_are_found():
    up = Import("beagle_sd.models.draft", "beagle_sd.decoding.loop", 3, False)
    down = Import("beagle_sd.decoding.loop", "beagle_sd.models.draft", 4, True)
    door = Import("beagle_sd.models.draft", "beagle_sd", 1, True)
    assert wrong_way(up) and wrong_way(door) and not wrong_way(down)
    assert said([up]) == "beagle_sd.models.draft, line 3, imports beagle_sd.decoding.loop"
    assert circle([up, down]) == []
    assert set(circle([up._replace(at_import=True), down])) == {up.importer, down.importer}


def test_every_module_of_beagle_sd_stands_in_a_wing():
    homeless = [name for name in PACKAGES["beagle_sd"] if name not in ANYTHING and wing_of(name) not in WINGS]
    assert not homeless, f"{homeless}; allowed: {', '.join(WINGS)}"


def test_each_wing_rests_only_on_those_after_it():
    wrong = [found for found in all_imports("beagle_sd") if wrong_way(found)]
    assert not wrong, said(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_of_imports(package):
    """The front door aside, whose import of the wings is what `import beagle_sd` means."""
    found = [each for each in all_imports(package) if package not in (each.importer, each.imported)]
    assert not circle(found), " -> ".join(circle(found))


@pytest.mark.parametrize(
    "package, foreign",
    [("beagle_kernels", ("beagle_sd", "bench", "transformers")), ("beagle_sd", ("bench", "tests"))],
)
def test_nothing_points_back(package, foreign):
    wrong = [found for found in all_imports(package) if found.imported.split(".")[0] in foreign]
    assert not wrong, said(wrong)


def sources() -> list[Path]:
    """Python, C++ and CUDA of the repository's own folders and its root."""
    folders = (ROOT / name for name in ("beagle_kernels", "bench", "csrc", "docs", "python", "tests"))
    files = [path for folder in folders for path in folder.rglob("*")] + list(ROOT.glob("*.py"))
    return [path for path in files if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")]


def test_no_source_file_is_longer_than_a_reader_likes():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert len(lengths) > 100
    long = {name: length for name, length in lengths.items() if length > MOST_LINES}
    assert not long, f"{long}; allowed: up to {MOST_LINES} lines"


@pytest.mark.parametrize("top", MOST_FILES)
def test_no_folder_holds_more_than_a_screen(top):
    count: dict[str, int] = {}
    for path in (ROOT / top).rglob("*.py"):
        folder = str(path.parent.relative_to(ROOT))
        count[folder] = count.get(folder, 0) + 1
    crowded = {folder: number for folder, number in count.items() if number > MOST_FILES[top]}
    assert not crowded, f"{crowded}; allowed: up to {MOST_FILES[top]} Python files a folder"
