"""`lookup` by the compiled executors: a row a team."""

from __future__ import annotations

from torch import Tensor

from ..extension import addresses, compiled, dense, executor, flat


@compiled("lookup")
def lookup(text: Tensor, lengths: Tensor, count: int, longest: int) -> tuple[Tensor, Tensor]:
    batch, size = text.shape
    text, found = dense(text), (text.new_empty(batch, count), lengths.new_empty(batch))
    kept, inputs = flat(lengths)
    sizes = (text.stride(0), batch, size, count, longest)
    with executor(text.device) as (module, where):
        module.lookup(where, text.data_ptr(), *inputs, *sizes, *addresses(found))
    return found
