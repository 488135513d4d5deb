"""The target's top hidden states of token ids, teacher-forced: for shards, and for training without them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from beagle_sd.data import shards
from beagle_sd.data.conversations import Conversation
from beagle_sd.models.target import Target

_FORWARD_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Tokens of a forward of the target, padding counted."""
_POOL = 1024
"""Conversations that are sorted by length together, so that little of a forward is padding."""


@torch.no_grad()
def target_states(target: Target, sequences: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """Run the target over sequences of token ids [n_i] int64, some at a time, the longest first.

    Yields (which, states): indices into `sequences`, and the states of those, end to end: [sum of n_i, d] bfloat16 on
    the target's device. The same sequences give the same groups and so the same states. Empty sequences are an error.
    """
    room, device = _FORWARD_TOKENS[target.device.type], target.device
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    while order:
        which = order[: max(1, room // len(sequences[order[0]]))]
        order = order[len(which) :]
        tokens = pad_sequence([sequences[index] for index in which], batch_first=True)
        # causal, so that padding on the right is never seen
        hidden = target.states(tokens.to(device))
        lengths = torch.tensor([len(sequences[index]) for index in which])
        inside = (torch.arange(tokens.shape[1]) < lengths[:, None]).flatten().nonzero().flatten()
        yield which, hidden.flatten(0, 1).index_select(0, inside.to(device)).to(torch.bfloat16)


def sequences_with_states(model: PreTrainedModel, conversations: Iterable[Conversation]) -> Iterator[shards.Sequence]:
    """Conversations with their states, as shards take them; those of fewer than two tokens teach nothing and are left
    out."""
    target = Target(model)
    remaining = (conversation for conversation in conversations if len(conversation.ids) > 1)
    while pool := list(islice(remaining, _POOL)):
        ids = [torch.tensor(conversation.ids[:-1]) for conversation in pool]
        for which, states in target_states(target, ids):
            parts = states.cpu().split([len(ids[index]) for index in which])
            for index, part in zip(which, parts, strict=True):
                _, text, learn, temperature = pool[index]
                mask = torch.tensor(learn[1:])
                yield shards.Sequence(ids[index], mask, part.clone(), text[-1], pool[index].index, temperature)
