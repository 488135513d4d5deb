"""Prompts into the rows of an engine: what is new of each is run, and its first token chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from beagle_kernels import Sampling, Verdict, choose_tokens
from beagle_sd.decoding.buffers import Buffers
from beagle_sd.decoding.drafting import DraftCache
from beagle_sd.decoding.rounds import emit, keep_logprobs, put, shaped
from beagle_sd.decoding.settings.rules import Rules
from beagle_sd.decoding.settings.shaping import Shaping
from beagle_sd.models.cache import TreeCache
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.models.pictures import PicturePrompt, prefill_pictures
from beagle_sd.models.target import Target

_AT_ONCE = 32768
"""Tokens of prompts that a GPU runs together, with their padding."""
_ECHO_ROWS = 256
"""Of a prompt's logits made at once."""


@dataclass
class Text:
    """A prompt, how its tokens are chosen, and how many may come; shown: the prompt as processors are given it, with
    padding."""

    ids: list[int]
    max_new_tokens: int
    sampling: Sampling  # of one row, on the host
    rules: Rules = field(default_factory=Rules)
    shown: list[int] | None = None


@dataclass
class Prefill:
    """Texts that begin in `rows` of an engine, the first begins[i] tokens of each of which are kept there; pictures: of
    all rows; echo: whether to keep what the target gives the prompts' own tokens."""

    rows: Sequence[int]
    texts: Sequence[Text]
    begins: Sequence[int]
    pictures: PicturePrompt | None = None
    echo: bool = False

    def write(self, buffers: Buffers) -> None:
        """Write the texts' settings and prompts into their rows, as tensors of all of them at once."""
        device, texts = buffers.text.device, self.texts
        at = torch.tensor(self.rows, device=device)
        longest = max(len(text.ids) for text in texts)
        padded = torch.tensor([text.ids + [0] * (longest - len(text.ids)) for text in texts], device=device)
        buffers.text[at, :longest] = padded
        buffers.prompts[at] = torch.tensor([len(text.ids) for text in texts], device=device)
        buffers.limit[at] = torch.tensor([text.max_new_tokens for text in texts], device=device)
        buffers.emitted[at], buffers.live[at] = 0, True
        for buffer, *given in zip(buffers.sampling, *(text.sampling for text in texts), strict=True):
            buffer[at] = torch.cat(given).to(device)

    def run(
        self,
        target: Target,
        draft: BeagleDraft | None,
        buffers: Buffers,
        shaping_of: Callable[[Sequence[int]], Shaping | None],
    ) -> None:
        """Run what is new and emit each row's first token; shaping_of: the rules of rows that lie together."""
        for members in self._groups(buffers):
            self._run(members, target, draft, buffers, shaping_of)

    def _groups(self, buffers: Buffers) -> Iterator[list[int]]:
        """Which of the texts are run together: all, where they fill the engine; else each alone in its row, or, on a
        GPU, new ones of about one length."""
        if len(self.rows) == len(buffers.text):
            yield list(range(len(self.rows)))
            return
        apart = not buffers.cache.can_take
        group: list[int] = []
        for number in sorted(range(len(self.rows)), key=lambda number: len(self.texts[number].ids)):
            if apart or self.begins[number]:
                yield [number]
                continue
            if group and len(self.texts[number].ids) * (len(group) + 1) > _AT_ONCE:
                yield group
                group = []
            group.append(number)
        if group:
            yield group

    def _run(self, members: list[int], target: Target, draft, buffers: Buffers, shaping_of) -> None:
        device = buffers.text.device
        new = [self.texts[number].ids[self.begins[number] :] for number in members]
        longest = max(map(len, new))
        tokens = torch.tensor([one + [0] * (longest - len(one)) for one in new], device=device)
        lengths = torch.tensor([len(one) for one in new], dtype=torch.int32, device=device)
        begins = torch.tensor([self.begins[number] for number in members], dtype=torch.int32, device=device)
        at = [self.rows[number] for number in members]
        if len(at) in (1, len(buffers.text)):
            here = buffers if len(at) > 1 else buffers.part(slice(at[0], at[0] + 1))
            caches = here.cache, here.draft_cache
            hidden = run_prompts(target, draft, *caches, tokens, lengths, begins, self.pictures)
            begin_rows(target, here, shaping_of(at), hidden, lengths, echo=self.echo)
            return
        hidden = _run_aside(target, draft, buffers, at, tokens, lengths)
        for number, row in enumerate(at):
            one, of = buffers.part(slice(row, row + 1)), slice(number, number + 1)
            states = hidden[of, : len(new[number])]
            begin_rows(target, one, shaping_of([row]), states, lengths[of], echo=self.echo)


def _run_aside(target: Target, draft, buffers: Buffers, rows: list[int], tokens: Tensor, lengths: Tensor) -> Tensor:
    """Run whole prompts [n, T] in caches of their own, which the rows then take; top hidden states [n, T, d]."""
    count, longest = tokens.shape
    cache, draft_cache = target.new_cache(count, longest + 1, fixed=True), None
    if draft is not None and buffers.draft_cache is not None:
        draft_cache = DraftCache(draft, count, longest, buffers.shape.deepest, buffers.shape.branch)
    hidden = run_prompts(target, draft, cache, draft_cache, tokens, lengths, torch.zeros_like(lengths))
    into = torch.tensor(rows, device=tokens.device)
    buffers.cache.take(into, cache)
    if draft_cache is not None and buffers.draft_cache is not None:
        buffers.draft_cache.take(into, draft_cache)
    return hidden


def run_prompts(
    target: Target,
    draft: BeagleDraft | None,
    cache: TreeCache,
    draft_cache: DraftCache | None,
    tokens: Tensor,
    lengths: Tensor,
    begins: Tensor,
    pictures: PicturePrompt | None = None,
) -> Tensor:
    """Run right-padded tokens [B, T], `lengths` [B] int32 of them, behind the first `begins` [B] int32 of each row,
    whose keys are there, or whole prompts with pictures in them; top hidden states [B, T, d]."""
    if pictures is not None:
        hidden = prefill_pictures(target, pictures, cache)
    else:
        cache.offsets.zero_()
        hidden = target.prefill(tokens, lengths, cache, begins)
    if draft is not None and draft_cache is not None:
        draft_cache.begin(draft, hidden, lengths, begins)
    return hidden


def begin_rows(
    target: Target, buffers: Buffers, shaping: Shaping | None, hidden: Tensor, lengths: Tensor, *, echo: bool = False
) -> None:
    """Emit each row's first token, by the states [B, T, d] of its prompt's last lengths[b] tokens; echo: also keep what
    the target gave the prompt's own tokens."""
    begins, position = (buffers.prompts - lengths)[:, None], buffers.prompts
    last = hidden.gather(1, (lengths.long() - 1)[:, None, None].expand(-1, 1, hidden.shape[2]))
    logits = target.head(last)
    nothing = position[:, None, None][:, :, :0]
    token, status = choose_tokens(shaped(logits, nothing, buffers, shaping)[:, 0], position, buffers.sampling)
    if buffers.kept.states is not None:
        step = torch.arange(hidden.shape[1], device=hidden.device)
        put(buffers.kept.states, begins + torch.minimum(step, lengths.long()[:, None]), hidden)
    if echo:
        _keep_prompt(target, buffers, hidden, begins, lengths)
    none = torch.zeros_like(status)  # what a root accepts that has no children
    emit(buffers, Verdict(none[:, None], none, token, status), token[:, None], logits)


def _keep_prompt(target: Target, buffers: Buffers, hidden: Tensor, begins: Tensor, lengths: Tensor) -> None:
    """Keep what the target gave each token of the prompts but the first, by the states [B, T, d] before it."""
    for start in range(0, hidden.shape[1] - 1, _ECHO_ROWS):
        part = hidden[:, start : min(start + _ECHO_ROWS, hidden.shape[1] - 1)]
        step = start + 1 + torch.arange(part.shape[1], device=hidden.device)
        places = begins + torch.minimum(step, lengths.long()[:, None])
        keep_logprobs(buffers, target.head(part), buffers.text.gather(1, places), places)
