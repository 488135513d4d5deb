"""Beagle: lossless speculative decoding with a cross-attention draft (arXiv 2505.24544)."""

# ruff: noqa: E402
from beagle_sd import needs
from beagle_sd.cli.interrupt import end_at_interrupt, is_command

end_at_interrupt()  # before torch is imported, which takes seconds
try:
    needs.check()
except ImportError as error:
    if is_command():  # whoever typed it wants the line alone
        raise SystemExit(f"error: {error}") from None
    raise

from beagle_sd.decoding.custom_generate import custom_generate, generate_saved
from beagle_sd.decoding.engine import Engine
from beagle_sd.decoding.generate import Generated, generate
from beagle_sd.decoding.graph import GraphError
from beagle_sd.decoding.guides.guide import Guide
from beagle_sd.decoding.many import Answer, Request, generate_many
from beagle_sd.decoding.report import Report
from beagle_sd.decoding.trees.adaptive import AdaptiveTree
from beagle_sd.decoding.trees.calibration import adaptive_tree
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.models.config import BeagleConfig
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.models.head import UnsupportedTarget
from beagle_sd.models.layers.halved import halve_
from beagle_sd.models.layers.quantize import quantize_
from beagle_sd.models.loading import load_bundled

__all__ = [
    "Answer",
    "Guide",
    "Request",
    "generate_many",
    "AdaptiveTree",
    "BeagleConfig",
    "BeagleDraft",
    "Engine",
    "Generated",
    "GraphError",
    "Guide",
    "Report",
    "TreeShape",
    "UnsupportedTarget",
    "adaptive_tree",
    "custom_generate",
    "generate",
    "generate_saved",
    "halve_",
    "load_bundled",
    "quantize_",
]
