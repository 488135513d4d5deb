"""Random pictures for the tiny models that take them, as their processors would hand them to `model.generate`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from bench.answers.kinds.tiny_targets import VOCAB, tiny_config, tiny_target

KINDS = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
"""What may take images: the class of each kind, by name."""
SPECIAL = 120
"""The first of the ids of tokens that stand for images and their ends: no prompt of text has them."""
SIDE = 32
"""Of a picture, in pixels."""
PATCH = 8
TEXTS = ((5, 4), (3, 2))
"""Tokens of text before and behind each row's picture."""
GRIDS = ((1, 4, 4), (1, 2, 4))
"""Each row's picture in patches, where pictures may differ in size: time, height, width."""
PARTS = {"image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    **dict.fromkeys(("gemma3", "shieldgemma2"), {"mm_tokens_per_image": 4}),
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), PARTS),
    **dict.fromkeys(("idefics3", "smolvlm", "granite_docling"), {"scale_factor": 2}),
    "vipllava": {"vision_feature_layers": [-1, -2]},
}
"""What a kind's config needs besides."""
VISION: dict[str, dict[str, Any]] = {"gemma4": {"model_type": "gemma4_vision", "pooling_kernel_size": 2}}
"""Of vision_configs that a kind's default has none of, or that need more."""
SQUARES = ("kimi_k25", "paddleocr_vl")
"""Kinds whose patches are squares yet, not rows of values."""


def picture_overrides(kind: str) -> dict[str, Any]:
    """What makes the kind's tiny_config take pictures of SIDE pixels: their tokens in the vocabulary, small patches."""
    known = vars(tiny_config(CONFIG_MAPPING[kind]))
    names = sorted(name for name, value in known.items() if type(value) is int and _stands_for_more(name))
    found: dict[str, Any] = {name: SPECIAL + number for number, name in enumerate(names)}
    vision = known.get("vision_config")
    vision_class = CONFIG_MAPPING[VISION[kind]["model_type"]] if kind in VISION else type(vision)
    if issubclass(vision_class, PretrainedConfig):
        named = inspect.signature(vision_class).parameters
        sizes = {"image_size": SIDE, "patch_size": PATCH, "window_size": SIDE}
        sizes = {name: size for name, size in sizes.items() if name in named and type(named[name].default) is int}
        found["vision_config"] = tiny_config(vision_class, **sizes | VISION.get(kind, {})).to_dict()
    return found | OVERRIDES.get(kind, {})


def _stands_for_more(name: str) -> bool:
    return name.endswith(("_token_id", "_token_index")) and not name.startswith(("pad", "bos", "eos", "decoder", "_"))


def pictured_target(kind: str, seed: int = 0) -> PreTrainedModel:
    """tiny_target of the kind's class that takes images."""
    return tiny_target(kind, seed, KINDS[kind], **picture_overrides(kind))


def pictures(kind: str, model: PreTrainedModel, rows: Sequence[int] = (0,), seed: int = 0) -> dict[str, Tensor] | None:
    """Keyword arguments for `model.generate` with these rows, of 0 and 1, padded on the left; None for a kind that
    there is nothing for. Another seed gives other pixels under the same text.

    Row 0 is a picture between tokens of text. Row 1 is a shorter text with a picture of another size where the kind
    takes pictures of any size, else without one. input_ids and attention_mask [B, T] int64, the other entries as the
    kind's forward has them. The model is tiny_target's with picture_overrides.
    """
    features = _features_of(model)
    token = getattr(model.config, "image_token_id", None)
    if features is None or token is None or not SPECIAL <= token < VOCAB:
        return None
    named = inspect.signature(features).parameters
    takes = inspect.signature(model.forward).parameters
    if "image_grid_thw" in named:
        shown, counts = _by_grid(kind, model, rows, seed)
    elif "pixel_values" in named:
        shown, counts = _of_one_size(kind, features, rows, seed)
    else:
        return None
    found = _prompts(token, rows, counts, model.config)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in takes:
            shown[name] = (found["input_ids"] == token).long()
    return found | shown


def _features_of(model: PreTrainedModel) -> Callable[..., Any] | None:
    found = getattr(model, "get_image_features", None) or getattr(model.base_model, "get_image_features", None)
    return cast(Callable[..., Any] | None, found)


def _pixels(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _by_grid(kind: str, model: PreTrainedModel, rows: Sequence[int], seed: int) -> tuple[dict[str, Tensor], list[int]]:
    """Patches of all pictures [sum of patches, values of a patch] and their grids [B, 3]; tokens of each."""
    vision = model.config.vision_config
    grids = [GRIDS[row] for row in rows]
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", None) or 3
    frames = getattr(vision, "temporal_patch_size", None) or 1
    merge = getattr(vision, "spatial_merge_size", None) or 1
    values = (channels, PATCH, PATCH) if kind in SQUARES else (channels * frames * PATCH**2,)
    found = {
        "pixel_values": torch.cat([_pixels(t * h * w, *values, seed=seed) for t, h, w in grids]),
        "image_grid_thw": torch.tensor(grids),
    }
    if kind == "video_llama_3":
        found["image_merge_sizes"] = torch.ones(len(rows), dtype=torch.int64)
    line = int(kind == "hy_v4_vl")  # a token ends each line
    return found, [t * (h // merge) * (w // merge + line) for t, h, w in grids]


def _of_one_size(
    kind: str, features: Callable[..., Any], rows: Sequence[int], seed: int
) -> tuple[dict[str, Tensor], list[int]]:
    """Row 0's picture as the kind takes one, none for row 1; tokens of each."""
    takes = inspect.signature(features).parameters
    image = {"pixel_values": _pixels(1, 3, SIDE, SIDE, seed=seed)}
    if "image_position_ids" in takes:
        side = SIDE // PATCH
        places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1)
        image = {"pixel_values": _pixels(1, side**2, 3 * PATCH**2, seed=seed).sigmoid()}
        image["image_position_ids"] = places.view(1, side**2, 2)
    elif OVERRIDES.get(kind) is PARTS:  # the whole picture, then its parts
        image = {"pixel_values": _pixels(1, 3, 3, SIDE, SIDE, seed=seed)}
        image["image_sizes"] = torch.tensor([[SIDE, 2 * SIDE]])
    elif "image_sizes" in takes:
        image["image_sizes"] = torch.tensor([[SIDE, SIDE]])
    elif "pixel_attention_mask" in takes and kind != "aria":  # [rows, pictures, ...]
        image["pixel_values"] = image["pixel_values"][None]
        image["pixel_attention_mask"] = torch.ones(1, 1, SIDE, SIDE, dtype=torch.int64)
    elif "high_res_pixel_values" in takes:
        image["high_res_pixel_values"] = _pixels(1, 3, SIDE, SIDE, seed=seed + 100)
    count = _tokens_of(features, image)
    if 0 not in rows:
        return {}, [0] * len(rows)
    if image["pixel_values"].dim() == 5 and "pixel_attention_mask" in image:  # of a row without, all zero
        image = {
            name: torch.cat([one if row == 0 else torch.zeros_like(one) for row in rows]) for name, one in image.items()
        }
    return image, [count if row == 0 else 0 for row in rows]


@torch.inference_mode()
def _tokens_of(features: Callable[..., Any], image: dict[str, Tensor]) -> int:
    """How many tokens the model's own features of one picture stand for."""
    made = features(**image)
    made = getattr(made, "pooler_output", made)
    parts = made if isinstance(made, (list, tuple)) else [made]
    return sum(part.shape[:-1].numel() for part in parts)


def _prompts(token: int, rows: Sequence[int], counts: Sequence[int], config: PretrainedConfig) -> dict[str, Tensor]:
    """input_ids and attention_mask [B, T]: text, the picture's tokens between what begins and ends it, text."""
    texts = []
    start, end = (
        [value for name in names if type(value := getattr(config, name, None)) is int]
        for names in (
            ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index"),
            ("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index"),
        )
    )
    for row, count in zip(rows, counts, strict=True):
        generator = torch.Generator().manual_seed(row)
        before, behind = (torch.randint(3, SPECIAL, (size,), generator=generator).tolist() for size in TEXTS[row])
        picture = [*start[:1], *[token] * count, *end[:1]] if count else []
        texts.append([*before, *picture, *behind])
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    return {"input_ids": ids, "attention_mask": mask}
