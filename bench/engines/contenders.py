"""Who takes part: a name, the module of workers that runs it, its environment, its model, and its settings."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from bench.engines.environments import python_of
from bench.engines.models import model_of
from bench.processes import ROOT

BASELINE = "transformers fp32"
"""What all are compared with, in time and token for token."""
OURS = "beagle "
_OPENVINO_FP32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
_OPENVINO_LOOKUP = {"num_assistant_tokens": 3, "max_ngram_size": 3}
_WHEEL_LOOKUP = {"type": "NGRAM_SIMPLE", "fields": {"size_n": 3, "size_m": 4}}
_NATIVE_LOOKUP = {"num_pred_tokens": 3, "max_ngram_size": 3}
"""Few drafted tokens each: more cost more than they bring on two cores."""


@dataclass(frozen=True)
class Contender:
    """environment "" is this process's own; model as `models.model_of` has it; options: what `load` of the module takes
    besides what a run gives to all."""

    name: str
    module: str
    environment: str = ""
    model: str = ""
    options: dict = field(default_factory=dict)

    def why_not(self, folder: Path) -> str | None:
        """What of its parts is not in the folder, None if all is there."""
        if self.environment and not python_of(folder, self.environment).is_file():
            return f"there is no environment {self.environment} (bench.engines.environments makes it)"
        if not model_of(folder, self.model).exists():
            return f"there is no model {self.model} (bench.engines.models makes it)"
        return None

    def command(self, folder: Path, run: dict) -> list[str]:
        """Starts its process; run: threads, cpus, capacity, ends."""
        python = python_of(folder, self.environment) if self.environment else sys.executable
        options = {"model": str(model_of(folder, self.model)), **self.options, **run}
        return [str(python), "-m", "bench.engines.workers", f"bench.engines.workers.{self.module}", json.dumps(options)]

    def variables(self, threads: int) -> dict[str, str]:
        """Of its process: OpenMP's threads; our packages' folders in our own environment alone."""
        paths = [str(ROOT), str(ROOT / "python")] if not self.environment else []
        return os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths)}


def _beagle(weights: str, name: str) -> list[Contender]:
    return [
        Contender(f"{OURS}{kind} {name}", "beagle", options={"weights": weights, "adaptive": kind == "adaptive"})
        for kind in ("plain", "adaptive")
    ]


def _llamacpp(build: str, module: str, environment: str, lookup: dict) -> list[Contender]:
    """llama.cpp of a build: the four kinds of weights, fp32 also with speculation."""
    made: dict[str, tuple[str, dict]] = {"fp32": ("fp32", {"cache": "F32", "lookup": None})}
    made["fp32, lookup"] = ("fp32", {"cache": "F32", "lookup": lookup})
    made |= {name: (name, {"cache": "F16", "lookup": None}) for name in ("bf16", "q8_0", "q4_1")}
    return [
        Contender(f"llama.cpp {build} {name}", module, environment, f"{model}.gguf", options)
        for name, (model, options) in made.items()
    ]


def _openvino(name: str, weights: str, properties: dict, lookup: dict | None = None) -> Contender:
    options = {"properties": properties, "lookup": lookup}
    return Contender(f"OpenVINO {name}", "openvino", "openvino", f"openvino-{weights}", options)


CONTENDERS = [
    Contender(BASELINE, "transformers", options={"dtype": "float32"}),
    Contender("transformers bf16", "transformers", options={"dtype": "bfloat16"}),
    *_beagle("float32", "fp32"),
    *_beagle("bfloat16", "bf16"),
    *_beagle("int8", "int8"),
    *_llamacpp("wheel", "llamacpp", "llamacpp", _WHEEL_LOOKUP),
    *_llamacpp("native", "llamacpp_native", "llamacpp-native", _NATIVE_LOOKUP),
    _openvino("fp32", "fp32", _OPENVINO_FP32),
    _openvino("fp32, lookup", "fp32", _OPENVINO_FP32, _OPENVINO_LOOKUP),
    _openvino("bf16", "fp32", {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"}),
    _openvino("int8", "int8", {}),
    _openvino("int8, lookup", "int8", {}, _OPENVINO_LOOKUP),
    Contender("onnxruntime fp32", "onnxruntime", "onnxruntime", "onnx-fp32"),
    Contender("onnxruntime int8", "onnxruntime", "onnxruntime", "onnx-int8"),
    Contender("onnxruntime int4", "onnxruntime", "onnxruntime", "onnx-int4"),
]


def chosen(patterns: Sequence[str]) -> list[Contender]:
    """Those whose name fits a pattern ("openvino*"), in any case, and BASELINE; ValueError for one that fits none."""
    for pattern in patterns:
        if not any(fnmatch(each.name.lower(), pattern.lower()) for each in CONTENDERS):
            names = ", ".join(each.name for each in CONTENDERS)
            raise ValueError(f"{pattern!r} fits no contender; allowed: patterns of {names}")
    return [
        each
        for each in CONTENDERS
        if each.name == BASELINE or any(fnmatch(each.name.lower(), pattern.lower()) for pattern in patterns)
    ]
