"""Where training prompts come from: this project's own templates, and files of public packages."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import random
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from beagle_sd.data.evaluation_sets import wheel_file
from beagle_sd.data.prompts import long
from beagle_sd.data.prompts.templates import templates, text_file
from beagle_sd.data.prompts.turns import chats

Prompt = str | tuple[str, ...]
"""What a user asks; several in a row are a chat whose every turn is to be answered."""


@dataclass(frozen=True)
class Source:
    """Where prompts come from. `read(rng, count, folder)` returns up to `count` prompts or raises FileNotFoundError."""

    licence: str
    found: str
    read: Callable[[random.Random, int, Path], Sequence[Prompt]]


def _pick(rng: random.Random, texts: list[str], count: int) -> list[str]:
    texts = sorted(set(texts))
    return rng.sample(texts, min(count, len(texts)))


def _sensible(text: str) -> bool:
    """Whether a chat's first line stands alone: enough words, no link, no shouting, nothing hateful or sexual."""
    words = re.findall(r"[a-z']+", text.lower())
    loud = text.isupper() or "http" in text or "@" in text
    return not loud and 4 <= len(words) <= 60 and not set(words) & set(text_file("templates.json")["unfit_words"])


def _chitchat(rng: random.Random, count: int, folder: Path) -> list[str]:
    path = wheel_file("chitchat-dataset==0.9.0", "chitchat_dataset/dataset.json", folder, download=False)
    first = []
    for chat in json.loads(path.read_text(encoding="utf-8")).values():
        turns = chat["messages"]
        lines = [message["text"].strip() for message in turns[0]] if turns else []
        # A lone "Hello" often precedes the real first line of the same person, and a line that asks nothing is mostly
        # an answer to the question both were given.
        text, question = " ".join(lines[:3]), chat.get("prompt")
        asks_itself = "?" in text or not question
        if _sensible(text) and len(text.split()) >= (8 if asks_itself else 4):
            first.append(text if asks_itself else f"{question} {text}")
    return _pick(rng, first, count)


def _chatterbot(rng: random.Random, count: int, folder: Path) -> list[str]:
    import yaml

    home = folder / "chatterbot_corpus" / "data" / "english"
    if not home.is_dir():
        raise FileNotFoundError(f"{home} is not there; it is a folder of chatterbot-corpus==1.3.3")
    texts = []
    for path in sorted(home.glob("*.yml")):
        chats = yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
        texts += [chat[0].strip() for chat in chats if isinstance(chat[0], str) and _sensible(chat[0])]
    return _pick(rng, texts, count)


# gsm_symbolic is left out because its templates are problems of the GSM8K test set, aiw because MT-Bench asks the same
# riddle, and pictures, grids and long searches because a small model's answers to them teach nothing.
REASONING_TASKS = {
    "arithmetic": [
        "basic_arithmetic",
        "calendar_arithmetic",
        "chain_sum",
        "decimal_arithmetic",
        "dice",
        "fraction_simplification",
        "gcd",
        "lcm",
        "leg_counting",
        "prime_factorization",
        "products",
    ],
    "algebra": ["polynomial_equations", "polynomial_multiplication", "simple_equations", "simple_integration"],
    "algorithmic": [
        "base_conversion",
        "letter_counting",
        "number_filtering",
        "number_sorting",
        "spell_backward",
        "word_sequence_reversal",
        "word_sorting",
    ],
    "logic": ["knights_knaves", "syllogisms"],
    "cognition": ["number_sequences"],
    "games": ["countdown"],
    "graphs": ["family_relationships"],
    "geometry": ["simple_geometry"],
    "probability": ["coin_flip"],
}


@contextmanager
def _reasoning_datasets(home: Path) -> Iterator[dict]:
    """The generator classes, imported file by file: the package's own `__init__` wants puzzles' heavy dependencies."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == home.name}
    try:
        for package in [home.name, *(f"{home.name}.{area}" for area in REASONING_TASKS)]:
            module = types.ModuleType(package)
            module.__path__ = [str(home.parent.joinpath(*package.split(".")))]
            sys.modules[package] = module
        for area, tasks in REASONING_TASKS.items():
            for task in tasks:
                importlib.import_module(f"{home.name}.{area}.{task}")
        yield importlib.import_module(f"{home.name}.factory").DATASETS
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == home.name]:
            del sys.modules[name]
        sys.modules.update(before)


def _reasoning_gym(rng: random.Random, count: int, folder: Path) -> list[str]:
    home = folder / "reasoning_gym"
    if not home.is_dir():
        raise FileNotFoundError(f"{home} is not there; it is the package in reasoning-gym==0.1.25")
    modules = {f"{home.name}.{area}.{task}" for area, tasks in REASONING_TASKS.items() for task in tasks}
    size = 2 * -(-count // len(modules))  # twice the share, since long questions and repeats are dropped
    texts = []
    with _reasoning_datasets(home) as datasets:
        for generator, config in datasets.values():
            if generator.__module__ not in modules:
                continue
            questions = (item["question"].strip() for item in generator(config(size=size, seed=rng.randrange(2**31))))
            texts.append(dict.fromkeys(q for q in questions if 4 <= len(q.split()) <= 120))
    by_turns = (text for row in zip_longest(*texts) for text in row if text)
    return list(dict.fromkeys(by_turns))[:count]


STDLIB_MODULES = """
    argparse ast base64 bisect calendar collections colorsys contextlib copy csv datetime decimal difflib dis enum
    fileinput fnmatch fractions functools getpass gettext glob gzip hashlib heapq hmac html imaplib inspect ipaddress
    json linecache locale logging mimetypes netrc ntpath numbers operator os pathlib pickle pickletools pkgutil platform
    plistlib posixpath pprint queue quopri random re reprlib sched secrets shelve shlex shutil smtplib socket
    statistics string subprocess symtable tarfile tempfile textwrap threading timeit tokenize trace traceback types
    typing uuid warnings wave weakref zipfile
""".split()


def _stdlib_functions() -> list[dict[str, str]]:
    found = []
    for name in STDLIB_MODULES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.origin or not spec.origin.endswith(".py"):
            continue
        # No methods: without their class there is nothing to explain or complete.
        for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            doc = ast.get_docstring(node)
            if doc and 8 <= len(doc.split()) <= 90:
                signature = f"def {node.name}({ast.unparse(node.args)}):"
                body = '    """' + doc.replace("\n", "\n    ").replace("\n    \n", "\n\n") + '\n    """'
                found.append(
                    {
                        "module": name,
                        "function": node.name,
                        "signature": signature,
                        "doc": doc,
                        "stub": f"{signature}\n{body}",
                    }
                )
    return found


def _python_stdlib(rng: random.Random, count: int, folder: Path) -> list[str]:
    templates, functions = text_file("templates.json")["standard_library"], _stdlib_functions()
    every = [template.format(**function) for template in templates for function in functions]
    return _pick(rng, every, count)


def _python_docs(rng: random.Random, count: int, folder: Path) -> list[str]:
    homes = [folder / "python-docs", *sorted(Path("/usr/share/doc").glob("python3*/html/_sources"))]
    home = next((home for home in homes if home.is_dir()), None)
    if home is None:
        raise FileNotFoundError(f"{homes[0]} is not there; it is html/_sources of Debian's python3.11-doc")
    passages = []
    for path in sorted(path for part in ("tutorial", "howto", "library", "faq") for path in home.glob(f"{part}/*.txt")):
        for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
            # Prose only: no directive, list, heading, table or indented code.
            if re.match(r"[A-Z][a-z]", block) and not re.search(r"^\s|^\.\.|::|^[-=*#^~\"+]{3}|\|", block, re.M):
                plain = re.sub(r":[a-z:]+:`[!~]?([^`<]+?)(?: <[^`]*>)?`", r"\1", block)
                plain = " ".join(re.sub(r"`+|\*+|_\b(?=\W)", "", plain).split())
                if 25 <= len(plain.split()) <= 100:
                    passages.append(plain)
    templates = text_file("templates.json")["documentation"]
    chosen = _pick(rng, passages, count)
    return [rng.choice(templates).format(passage=passage) for passage in chosen]


SOURCES = {
    "templates": Source("of this project", "in this package", templates),
    "chitchat-dataset": Source("MIT", "chitchat_dataset/dataset.json of chitchat-dataset==0.9.0", _chitchat),
    "chatterbot-corpus": Source("BSD-3-Clause", "chatterbot_corpus/ of chatterbot-corpus==1.3.3", _chatterbot),
    "reasoning-gym": Source("Apache-2.0", "reasoning_gym/ of reasoning-gym==0.1.25", _reasoning_gym),
    "python-stdlib": Source("PSF-2.0", "docstrings of the running Python's standard library", _python_stdlib),
    "python-docs": Source("PSF-2.0", "python-docs/ or /usr/share/doc/python3*/html/_sources", _python_docs),
    "long-documents": Source("of the files", "folders in documents/, and python-docs/", long.documents),
    "long-code": Source("of the files; PSF-2.0", "folders in code/, and the running Python's library", long.code),
    "chats": Source("as templates, chitchat-dataset and long-documents", "where those are", chats),
}
