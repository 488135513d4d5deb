"""Tiny random models that take pictures, and prompts with pictures in them as their processors give them."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers_for_tests import small_tokenizer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    LlavaProcessor,
    PreTrainedModel,
)

IMAGE, VIDEO, START, END = 120, 121, 122, 123
"""Tokens: a picture's place, a film's, and what stands around them."""
NEW = 24
_TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_GRID: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "initializer_range": 0.3,
}
_SQUARE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.3,
}
_MARKS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "text_config": _TEXT | _AXES,
        "vision_config": {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "initializer_range": 0.3},
        **_MARKS,
    },
    "qwen2_5_vl": {
        "text_config": _TEXT | _AXES,
        "vision_config": _GRID | {"out_hidden_size": 64, "fullatt_block_indexes": [1]},
        **_MARKS,
    },
    "qwen3_vl": {
        "text_config": _TEXT | _AXES,
        "vision_config": _GRID | {"out_hidden_size": 64, "deepstack_visual_indexes": [0, 1]},
        **_MARKS,
    },
    "llava": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _SQUARE | {"model_type": "clip_vision_model", "projection_dim": 32},
        "image_token_index": IMAGE,
    },
    "gemma3": {
        "text_config": _TEXT | {"layer_types": ["full_attention"] * 2, "sliding_window": 8},
        "vision_config": _SQUARE | {"model_type": "siglip_vision_model"},
        "image_token_index": IMAGE,
        "boi_token_index": START,
        "eoi_token_index": END,
        "mm_tokens_per_image": 4,
    },
    "smolvlm": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _SQUARE,
        "image_token_id": IMAGE,
        "scale_factor": 2,
        "pad_token_id": 0,
    },
}
KINDS = tuple(CONFIGS)
WITH_GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def picture_target(kind: str, seed: int = 0, **text: Any) -> PreTrainedModel:
    """A random model of a kind in fp32; `text` goes into the config of its language model."""
    fields = CONFIGS[kind]
    config = AutoConfig.for_model(kind, **fields | {"text_config": fields["text_config"] | text})
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.get_input_embeddings().weight.mul_(0.03 if kind == "gemma3" else 0.3)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def picture_prompts(kind: str, grids: list[list[tuple[int, int]]], side: str = "left", seed: int = 3) -> dict[str, Any]:
    """Keyword arguments of `target.generate`: a row for each list of pictures, padded at one side.

    grids: the patches of each picture, upright by across, both even; only the Qwen kinds heed their sizes. Text of
    random tokens stands before, between and behind the pictures, in every row of another length.
    """
    noise = torch.Generator().manual_seed(seed)
    rows = []
    for row, pictures in enumerate(grids):
        parts = [torch.randint(3, 110, (4 + 2 * row,), generator=noise)]
        for high, wide in pictures:
            count = high * wide // 4 if kind in WITH_GRIDS else _count(kind)
            parts += [torch.tensor([START]), torch.full((count,), IMAGE), torch.tensor([END])]
            parts += [torch.randint(3, 110, (3,), generator=noise)]
        rows.append(torch.cat(parts))
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        where = slice(longest - len(tokens), None) if side == "left" else slice(len(tokens))
        ids[row, where], mask[row, where] = tokens, 1
    return {"input_ids": ids, "attention_mask": mask, **_pixels(kind, grids, ids, noise)}


def _count(kind: str) -> int:
    return {"llava": 16, "gemma3": 4, "smolvlm": 4}[kind]


def _pixels(kind: str, grids: list[list[tuple[int, int]]], ids: Tensor, noise: torch.Generator) -> dict[str, Tensor]:
    flat = [grid for pictures in grids for grid in pictures]
    seen = (ids == IMAGE).long()
    if kind in WITH_GRIDS:
        patch = 16 if kind == "qwen3_vl" else 14
        patches = sum(high * wide for high, wide in flat)
        return {
            "pixel_values": torch.randn(patches, 3 * 2 * patch * patch, generator=noise),
            "image_grid_thw": torch.tensor([[1, high, wide] for high, wide in flat]),
            "mm_token_type_ids": seen,
        }
    pixels = torch.randn(len(flat), 3, 32, 32, generator=noise)
    if kind == "gemma3":
        return {"pixel_values": pixels, "token_type_ids": seen}
    if kind == "smolvlm":  # a row each, filled up with pictures that are all zero and not looked at
        most, begin = max(map(len, grids)), 0
        rows = torch.zeros(len(grids), most, 3, 32, 32)
        for row, pictures in enumerate(grids):
            rows[row, : len(pictures)] = pixels[begin : begin + len(pictures)]
            begin += len(pictures)
        return {"pixel_values": rows}
    return {"pixel_values": pixels}


def save_with_processor(folder: str) -> None:
    """A LLaVA and the processor that goes with it: "<image>" is a picture's place in a text."""
    from transformers import CLIPImageProcessor  # which warns where torchvision is missing

    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    fields = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(image_processor=pictures, tokenizer=tokenizer, **fields).save_pretrained(folder)
    target = picture_target("llava")
    target.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    target.save_pretrained(folder)


def beside(prompt: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """input_ids, attention_mask and the rest."""
    rest = {name: value for name, value in prompt.items() if name not in ("input_ids", "attention_mask")}
    return prompt["input_ids"], prompt["attention_mask"], rest
