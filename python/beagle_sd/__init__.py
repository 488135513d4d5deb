"""Beagle: lossless speculative decoding with a cross-attention draft (arXiv 2505.24544)."""

# ruff: noqa: E402
from beagle_sd.interrupt import end_at_interrupt

end_at_interrupt()  # before torch is imported, which takes seconds

from beagle_sd.adaptive import AdaptiveTree, adaptive_tree
from beagle_sd.bundled import load_bundled
from beagle_sd.custom_generate import custom_generate
from beagle_sd.draft import BeagleConfig, BeagleDraft
from beagle_sd.engine import Engine
from beagle_sd.generate import Generated, generate
from beagle_sd.graph import GraphError
from beagle_sd.head import UnsupportedTarget
from beagle_sd.report import Report

__all__ = [
    "AdaptiveTree", "BeagleConfig", "BeagleDraft", "Engine", "Generated", "GraphError", "Report", "UnsupportedTarget",
    "adaptive_tree",
    "custom_generate", "generate", "load_bundled",
]  # fmt: skip
