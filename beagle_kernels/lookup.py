"""Prompt lookup: what followed the text's own end when the same tokens stood earlier in the text.

For an earlier end e of a text of L tokens let m(e) be how many tokens before e are those before L, `longest` at most.
The largest m(e) wins, of equals the latest e, and what follows e is copied; where the copy reaches the text's end it
goes on into what it has copied, as in LZ77, so that a text that repeats itself goes on repeating.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, checks

MOST_COPIED = 64
"""Tokens of one call."""
LONGEST = 1024
"""Tokens compared before each end."""


def lookup(
    text: Tensor, lengths: Tensor, count: int, *, longest: int = 16, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Copy `count` tokens from behind the longest earlier occurrence of the text's own end.

    text int64 [B, S], of which row b has lengths[b] tokens, lengths int32 [B] (taken as 0 to S); what lies behind is
    not used. count 0 to 64, longest 1 to 1024. A negative token, a placeholder, equals none.

    Returns tokens int64 [B, count], from the first placeholder that would be copied on -1, and matched int32 [B], how
    many tokens before the text's end stood there earlier: 0 if not even the last one did, and then tokens are all -1.
    Raises ValueError or TypeError on wrong shapes, dtypes and bounds.
    """
    checks.tensor("lookup", "text", text, (None, None), checks.INT64)
    checks.tensor("lookup", "lengths", lengths, (text.shape[0],), checks.INT32)
    checks.at_least("lookup", "count", count, 0, MOST_COPIED)
    checks.at_least("lookup", "longest", longest, 1, LONGEST)
    checks.same_device("lookup", text=text, lengths=lengths)
    return torch.ops.beagle.lookup.default(text, lengths, count, longest, backend)


@backends.operator("lookup")
def _lookup(text: Tensor, lengths: Tensor, count: int, longest: int, backend: str = "auto") -> tuple[Tensor, Tensor]:
    return backends.call("lookup", backend, text.device, text, lengths, count, longest)


@_lookup.register_fake
def _(text, lengths, count, longest, backend="auto"):
    return text.new_empty(text.shape[0], count), lengths.new_empty(text.shape[0])
