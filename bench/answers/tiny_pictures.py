"""Random pictures for the tiny models that take them, as their processors would hand them to `model.generate`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from bench.answers.tiny_targets import VOCAB, tiny_config, tiny_target

KINDS = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
"""What may take images: the class of each kind, by name."""
SPECIAL = 120
"""The first of the ids of tokens that stand for images and their ends: no prompt of text has them."""
SIDE = 32
"""Of a picture, in pixels."""
TEXTS = ((5, 4), (3, 2))
"""Tokens of text before and behind each row's picture."""
GRIDS = ((1, 4, 4), (1, 2, 4))
"""Each row's picture in patches, where pictures may differ in size: time, height, width."""
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("gemma3", "shieldgemma2"), {"mm_tokens_per_image": 4}),
    "llava_next": {"image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]},
    **dict.fromkeys(("idefics3", "smolvlm"), {"scale_factor": 2}),
}
"""What a kind's config needs besides."""


def picture_overrides(kind: str) -> dict[str, Any]:
    """What makes the kind's tiny_config take pictures of SIDE pixels: their tokens in the vocabulary, small patches."""
    known = vars(tiny_config(CONFIG_MAPPING[kind]))
    names = sorted(name for name, value in known.items() if type(value) is int and _stands_for_more(name))
    found: dict[str, Any] = {name: SPECIAL + number for number, name in enumerate(names)}
    vision = known.get("vision_config")
    if isinstance(vision, PretrainedConfig):
        sizes = {"image_size": SIDE, "patch_size": 8, "window_size": SIDE}
        found["vision_config"] = tiny_config(
            type(vision), **{name: size for name, size in sizes.items() if type(getattr(vision, name, None)) is int}
        ).to_dict()
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
    features = getattr(model, "get_image_features", None)
    token = getattr(model.config, "image_token_id", None)
    if features is None or token is None or not SPECIAL <= token < VOCAB:
        return None
    named = inspect.signature(features).parameters
    takes = inspect.signature(model.forward).parameters
    if "image_grid_thw" in named:
        shown, counts = _by_grid(model, rows, seed)
    elif "pixel_values" in named:
        shown, counts = _of_one_size(kind, model, rows, seed)
    else:
        return None
    found = _prompts(token, rows, counts, model.config)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in takes:
            shown[name] = (found["input_ids"] == token).long()
    return found | shown


def _by_grid(model: PreTrainedModel, rows: Sequence[int], seed: int) -> tuple[dict[str, Tensor], list[int]]:
    """Patches of all pictures [sum of patches, values of a patch] and their grids [B, 3]; tokens of each."""
    vision = model.config.vision_config
    grids = torch.tensor([GRIDS[row] for row in rows])
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", None) or 3
    values = channels * (getattr(vision, "temporal_patch_size", None) or 1) * vision.patch_size**2
    merged = (getattr(vision, "spatial_merge_size", None) or 1) ** 2
    patches = torch.cat([_pixels(int(grid.prod()), values, seed=seed) for grid in grids])
    return {"pixel_values": patches, "image_grid_thw": grids}, [int(grid.prod()) // merged for grid in grids]


def _pixels(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _of_one_size(
    kind: str, model: PreTrainedModel, rows: Sequence[int], seed: int
) -> tuple[dict[str, Tensor], list[int]]:
    """Row 0's picture [1, 3, SIDE, SIDE], none for row 1; tokens of each."""
    image: dict[str, Tensor] = {"pixel_values": _pixels(1, 3, SIDE, SIDE, seed=seed)}
    takes = inspect.signature(model.get_image_features).parameters  # type: ignore[arg-type]
    if "pixel_attention_mask" in takes:  # [rows, pictures, ...], none where all is zero
        image["pixel_values"] = image["pixel_values"][None]
    if "image_sizes" in takes:
        image["image_sizes"] = torch.tensor([[SIDE, SIDE]])
    if kind.startswith("llava_next"):  # the whole picture, then its parts
        image["pixel_values"] = _pixels(1, 3, 3, SIDE, SIDE, seed=seed)
        image["image_sizes"] = torch.tensor([[SIDE, 2 * SIDE]])
    if kind.startswith("llava_onevision"):
        image["pixel_values"] = _pixels(1, 2, 3, SIDE, SIDE, seed=seed)
    count = _tokens_of(model, image)
    if 0 not in rows:
        return {}, [0] * len(rows)
    if "pixel_attention_mask" in takes:
        shown = image["pixel_values"]
        image["pixel_values"] = torch.cat([shown if row == 0 else torch.zeros_like(shown) for row in rows])
    return image, [count if row == 0 else 0 for row in rows]


@torch.inference_mode()
def _tokens_of(model: PreTrainedModel, image: dict[str, Tensor]) -> int:
    """How many tokens the model's own features of one picture stand for."""
    made = model.get_image_features(**image)  # type: ignore[operator]
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
