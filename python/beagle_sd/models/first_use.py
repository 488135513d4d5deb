"""A target's first use: a short text with a branch through our cache and mask, beside the model's own forward of it.

What a config does not tell shows here: attention sinks, masks of the model's own, latent attention, rows that depend
on those beside them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from beagle_sd.models.cache import TreeCache
from beagle_sd.models.head import UnsupportedTarget

if TYPE_CHECKING:
    from beagle_sd.models.target import Target

_TEXT = 6
_PARENTS = (-1, 0, 0, 1, 2, 3, 4)
"""A root with two branches of three tokens: node n's parent."""
_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
"""How far the norm of the difference of two forwards may be from none, as a share of the values' own norm."""
_TF32 = 0.02
_NOISE = 4.0
"""In 16 bits, as far as so many times what two ways of the model's own forward differ by: experts may change."""
_known: WeakKeyDictionary[PreTrainedModel, tuple] = WeakKeyDictionary()


def check_first_use(target: Target) -> None:
    """Raise UnsupportedTarget, saying what differs, unless the target's states over our cache and a tree are those of
    its own forward. Some forwards over a few tokens, once a model, dtype and device; again if modules were replaced."""
    model = target.model
    if model.training or target.head.weight.is_meta:  # dropout, or nothing to compute with
        return
    state = (target.dtype, target.device, tuple(map(id, model.modules())))
    if _known.get(model) != state:
        with torch.inference_mode(), torch.autocast(target.device.type, enabled=False):
            _compare(target)
        _known[model] = state


def _compare(target: Target) -> None:
    tokens = _tokens(target)
    branches = [_path(node) for node in (len(_PARENTS) - 2, len(_PARENTS) - 1)]
    text = tokens[:_TEXT]
    own = target.states(torch.stack([torch.cat([text, tokens[_TEXT + torch.tensor(nodes)]]) for nodes in branches]))
    if not bool(own.isfinite().all()):  # broken weights are told of where their logits are used
        return
    alone = target.states(text[None])[0]
    allowed = _allowed(target.dtype, target.device, _difference(own[0, :_TEXT], alone))
    _refuse_over(allowed, own[0, :_TEXT], alone, target, "the start of a text in a batch, by its own forward,")
    cached, tree = _by_our_cache(target, tokens)
    _refuse_over(allowed, cached, own[0, :_TEXT], target, "a plain text")
    for nodes, want in zip(branches, own[:, _TEXT:], strict=True):
        _refuse_over(allowed, tree[nodes], want, target, "a text's tokens beside another branch of a tree")


def _tokens(target: Target) -> Tensor:
    """Tokens all over the vocabulary, none that the config names (an image's stands for more than text)."""
    count, vocab = _TEXT + len(_PARENTS), target.config.vocab_size
    named = {value for name, value in target.model.config.to_dict().items() if "token" in name and type(value) is int}
    found = []
    for number in range(count):
        token = (2 * number + 1) * vocab // (2 * count)
        found.append(next((near for near in range(token, vocab) if near not in named), token))
    return torch.tensor(found, device=target.device)


def _path(node: int) -> list[int]:
    return [*_path(_PARENTS[node]), node] if node >= 0 else []


def _by_our_cache(target: Target, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The states of the text and of the tree's nodes, as a round computes them."""
    device, nodes, cache = target.device, range(len(_PARENTS)), None
    depth = torch.tensor([[len(_path(node)) - 1 for node in nodes]], device=device)
    words = torch.tensor([[[sum(1 << seen for seen in _path(node))] for node in nodes]], device=device)
    lengths = torch.tensor([_TEXT], dtype=torch.int32, device=device)
    try:
        cache = target.new_cache(1, len(tokens))
        text = target.prefill(tokens[None, :_TEXT], lengths, cache)
        tree = target.forward(tokens[None, _TEXT:], depth, words, cache)
    except (UnsupportedTarget, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if cache is not None and not getattr(target.model, "_supports_attention_backend", False):
            _check_attended(target, cache)
        raise UnsupportedTarget(
            f"{type(target.model).__name__} cannot run over a cache of keys and values of equal heads with a tree's "
            f"mask ({type(error).__name__}: {error}); allowed: models whose layers attend by the mask they are given"
        ) from error
    _check_attended(target, cache)
    return text[0], tree[0]


def _check_attended(target: Target, cache: TreeCache) -> None:
    if not cache.attended:
        raise UnsupportedTarget(
            f"{type(target.model).__name__} does not take registered attention functions; allowed: "
            "models that go through transformers' AttentionInterface"
        )


def _allowed(dtype: torch.dtype, device: torch.device, noise: float) -> float:
    allowed = _DIFFERENCE[dtype]
    if dtype == torch.float32:
        return _TF32 if device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32 else allowed
    return max(allowed, _NOISE * noise)


def _difference(have: Tensor, want: Tensor) -> float:
    have, want = have.float(), want.float()
    return float((have - want).norm(dim=-1).max() / want.norm(dim=-1).mean().clamp(min=1e-30))


def _refuse_over(allowed: float, have: Tensor, want: Tensor, target: Target, where: str) -> None:
    if (found := _difference(have, want)) > allowed or found != found:
        raise UnsupportedTarget(
            f"{type(target.model).__name__} gives other states for {where} than for that text alone (they differ by "
            f"{100 * found:.2g}%), so its texts would not be those of plain decoding; allowed: models whose tokens "
            "see those before them that the mask says, and no more (no sinks, no mask of the model's own, no tokens "
            "that see later ones, no activations quantised by scales that rows share)"
        )
