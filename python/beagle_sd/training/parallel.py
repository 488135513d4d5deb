"""A step's batch shared by processes and micro-batches, so that how it was shared changes nothing but rounding."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn


def shares(lengths: list[int], parts: int) -> list[list[int]]:
    """The numbers 0 .. len(lengths) - 1 in `parts` lists of about equal sums: each goes to the emptiest so far."""
    result: list[list[int]] = [[] for _ in range(parts)]
    full = [0] * parts
    for number, length in enumerate(lengths):
        emptiest = full.index(min(full))
        result[emptiest].append(number)
        full[emptiest] += length
    return result


def of_this_process(parts: list) -> list:
    """The parts that fall to this process: every so-manyth, from its rank on."""
    processes = PartialState()
    return parts[processes.process_index :: processes.num_processes]


def summed(values: Tensor) -> Tensor:
    """The sum of every process's values, the same on all of them."""
    return reduce(values, "sum") if PartialState().num_processes > 1 else values


def same_everywhere(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the main one's values, in place."""
    if PartialState().num_processes > 1:
        for parameter in parameters:
            parameter.data.copy_(broadcast(parameter.data))


def mean_gradients(parameters: Iterable[nn.Parameter], weight: Tensor) -> None:
    """Sum the gradients over all processes and divide by the weight of the whole batch, in place."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:  # this process had no row of the batch
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    if PartialState().num_processes > 1:
        flat = summed(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
    torch._foreach_div_(gradients, weight)
