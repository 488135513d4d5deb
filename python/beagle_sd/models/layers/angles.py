"""Rotary angles in decoding on a CPU: looked up, since sines and cosines wake PyTorch's threads however few they are,
and those then spin for milliseconds on the cores that the linear layers want."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beagle_sd.models.layers.attention import cache_being_read

_BLOCK = 512
"""Positions that are computed at a time."""
_FEW = 64
"""New tokens of a forward up to which their angles are looked up."""


def look_up(module: nn.Module) -> None:
    """Let a view's rotary embedding, whose angles depend on positions alone, look up those of few tokens on a CPU."""
    module.__dict__["forward"] = _LookUp(type(module).forward.__get__(module))


class _LookUp:
    """A forward (x, position_ids [B, N], ..) -> cosines and sines [B, N, R]."""

    def __init__(self, own: Any):
        self.own = own
        self.tables: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = cache_being_read()
        few = position_ids.dim() == 2 and position_ids.numel() <= _FEW
        plain = cache is not None and not cache.fixed and x.device.type == "cpu" and type(x) is Tensor
        if not few or not plain or torch.is_grad_enabled():
            return self.own(x, position_ids, *args, **kwargs)
        key = x.dtype, args, tuple(kwargs.items())
        table, last = self.tables.get(key), int(position_ids.max())
        if table is None or last >= len(table[0]):
            size = (last // _BLOCK + 1) * _BLOCK
            found = self.own(x, torch.arange(size)[None], *args, **kwargs)
            if not isinstance(found, tuple):  # Llama 4's are complex numbers
                return self.own(x, position_ids, *args, **kwargs)
            table = self.tables[key] = found[0][0].contiguous(), found[1][0].contiguous()
        return tuple(F.embedding(position_ids, one) for one in table)
