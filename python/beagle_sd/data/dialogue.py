"""A chat in progress as token ids: what was said stays as the target saw and wrote it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from beagle_sd.data.chats import check_template, encode_text, render_chat, render_next_turn


class Prompt(NamedTuple):
    """A turn of the user, and the chat up to it, ready for the answer: as ids and as text."""

    turn: str
    ids: list[int]
    text: str


class Dialogue:
    """The turns of a user and the target's answers, after a text of the system if there is one.

    A prompt is the one before it and its answer, id by id, and then what the chat template puts behind that answer and
    around the user's new turn, so that an engine that holds them goes on from there: decoded and encoded again, the
    same text may have other ids. Where the template does not leave what was said as it was, the chat is encoded anew.

    ends: what ends an answer; such a token gives way to the end of turn that the template writes, nearly always the
    same. Raises Unusable for a tokenizer without a chat template, and where it takes no text of the system.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int], system: str = ""):
        check_template(tokenizer)
        self.tokenizer, self.ends = tokenizer, frozenset(ends)
        self.set_system(system)

    def set_system(self, text: str) -> None:
        """Begin anew under another text of the system, "" for none; Unusable, with all as it was, where the template
        takes none."""
        system = [{"role": "system", "content": text}] if text else []
        render_chat(self.tokenizer, [*system, {"role": "user", "content": "a"}])
        self.system = system
        self.forget()

    def forget(self) -> None:
        """Begin anew under the same text of the system."""
        self.turns: list[dict] = []
        self.ids: list[int] = []
        self.text = ""

    def prompt(self, turn: str) -> Prompt:
        """What is to be answered if the user says this next; Unusable where the template refuses it."""
        messages = [*self.system, *self.turns, {"role": "user", "content": turn}]
        following = render_next_turn(self.tokenizer, messages, self.text) if self.turns else None
        if following is None:
            text = render_chat(self.tokenizer, messages)
            return Prompt(turn, encode_text(self.tokenizer, text), text)
        ids = [*self._without_end(self.ids), *encode_text(self.tokenizer, following)]
        return Prompt(turn, ids, self.text + following)

    def add(self, prompt: Prompt, answer: Sequence[int]) -> None:
        """A prompt was answered by these ids, with its end if it came to one. Without any nothing was said, and the
        chat is as before."""
        if not answer:
            return
        said = str(self.tokenizer.decode([*self._without_end(answer)], skip_special_tokens=False))
        self.turns += [{"role": "user", "content": prompt.turn}, {"role": "assistant", "content": said}]
        self.ids, self.text = [*prompt.ids, *answer], prompt.text + said

    def _without_end(self, ids: Sequence[int]) -> Sequence[int]:
        return ids[:-1] if ids[-1] in self.ends else ids
