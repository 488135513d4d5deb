"""The arguments with which vLLM serves a draft, checked before any of its processes starts."""

from __future__ import annotations

import json
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from beagle_sd.models.config import BeagleConfig
from beagle_sd.models.loading import target_path
from beagle_sd.vllm import COUPLED
from beagle_sd.vllm.checks import (
    check_draft_config,
    check_parallel,
    check_speculative_tokens,
    check_target,
    check_version,
    check_weights,
)


def speculative_config(
    target: str | Path,
    draft: str | Path,
    num_speculative_tokens: int = 4,
    *,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """What `vllm.LLM(target, speculative_config=...)` takes. target and draft: folders or hub names.

    ValueError or OSError, naming what was given and what is allowed, for a vLLM that was not tried, a draft that is
    broken, cannot be served or was made for another target, and numbers out of range.
    """
    check_version()
    check_speculative_tokens(num_speculative_tokens)
    config = _draft_config(draft)
    check_draft_config(config)
    check_parallel(config, tensor_parallel_size, pipeline_parallel_size)
    check_target(config, AutoConfig.from_pretrained(target_path(target), trust_remote_code=trust_remote_code))
    if Path(draft).is_dir():
        check_weights(Path(draft), config)
    return {
        "method": "eagle",
        "model": str(draft),
        "num_speculative_tokens": num_speculative_tokens,
        "use_local_argmax_reduction": True,
    }


def _draft_config(draft: str | Path) -> BeagleConfig:
    folder = Path(draft)
    on_hub = not folder.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(draft))
    if not on_hub and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{draft} has no config.json; allowed: a folder that `beagle-sd train` wrote, or a hub name"
        )
    return BeagleConfig.from_pretrained(str(draft))


def server_command(
    target: str | Path, draft: str | Path, num_speculative_tokens: int, coupled: bool, more: Sequence[str]
) -> list[str]:
    """vLLM's OpenAI-compatible server with a draft; `more`, vLLM's own arguments, as given. Errors as above."""
    known = _known(more)
    settings = speculative_config(
        target,
        draft,
        num_speculative_tokens,
        tensor_parallel_size=_number("tensor_parallel_size", known.tensor_parallel_size),
        pipeline_parallel_size=_number("pipeline_parallel_size", known.pipeline_parallel_size),
        trust_remote_code=known.trust_remote_code,
    )
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(target_path(target))]
    if known.served_model_name is None:
        command += ["--served-model-name", str(target)]
    command += ["--speculative-config", json.dumps(settings)]
    command += ["--logits-processors", COUPLED] if coupled else []
    return [*command, *more]


_OURS = ("--speculative-config", "-sc", "--logits-processors", "--model")


def _known(more: Sequence[str]) -> Namespace:
    """Those of vLLM's arguments that the checks need; ValueError for one that would replace ours."""
    words = [word.replace("_", "-") if word.startswith("--") else word for word in more]
    if ours := [word for word in words if word.partition("=")[0] in _OURS]:
        raise ValueError(
            f"{ours[0].partition('=')[0]} is given; allowed: vLLM's other options, as --target, --draft and "
            "--coupled say it"
        )
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-tp", "--tensor-parallel-size", default="1")
    parser.add_argument("-pp", "--pipeline-parallel-size", default="1")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--served-model-name")
    return parser.parse_known_args(words)[0]


def _number(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{name} is {text}; allowed: 1 or more")
    return int(text)
