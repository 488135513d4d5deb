"""Bytes of the target's cache of one long text, whole and in pages: python -m bench.answers.cache_memory

Models of the kinds' own default configs, without weights: what is counted is what `TreeCache` allocates, in bf16.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, logging

from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.files import write_json
from beagle_sd.models.target import Target
from bench.environment import commit, sources, versions
from bench.processes import ROOT

OUT = ROOT / "bench" / "results" / "cache-memory.json"
KINDS = (
    "mistral",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "gpt_oss",
    "olmo3",
    "llama4_text",
    "deepseek_v3",
    "qwen3_next",
)
TOKENS, PAGE = 32768, 64


def row(kind: str) -> dict:
    """The kind's layers, how far back they see, and the bytes of a row of TOKENS behind which the default tree lies."""
    config = AutoConfig.for_model(kind)
    with torch.device("meta"):
        target = Target(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval())
    slots = TOKENS - 1 + TreeShape.default(torch.device("cuda")).num_nodes
    spans = [one.span.window or one.span.chunk for one in target.kept if one.heads]
    return {
        "kind": kind,
        "layers": len(target.kept),
        "with_keys": len(spans),
        "with_window": sum(span is not None for span in spans),
        "window": max((span for span in spans if span is not None), default=None),
        "whole": target.new_cache(1, slots).nbytes,
        "pages": target.new_cache(1, slots, page_size=PAGE).nbytes,
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.answers.cache_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=OUT, help=f"default {OUT.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    rows = [row(kind) for kind in KINDS]
    where = {"commit": commit(), "sources": sources(), "tokens": TOKENS, "page": PAGE}
    write_json(options.out, where | versions("torch", "transformers") | {"rows": rows})
    for one in rows:
        print(f"{one['kind']}: {one['whole'] / 2**20:.0f} MiB whole, {one['pages'] / 2**20:.0f} in pages")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
