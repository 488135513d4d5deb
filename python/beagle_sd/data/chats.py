"""Chats to token ids through the target's chat template, and which of them the assistant says."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection
from os.path import commonprefix

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from beagle_sd.data.rows import Unusable
from beagle_sd.models.ends import end_tokens

_DIGITS = "27182818284590452353"
_SAID = ("content", "reasoning_content")
_HIDDEN = "the chat template does not show where the text of a turn is"


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Unusable unless the tokenizer has a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise Unusable(
            "the tokenizer has no chat template, as that of a base model has none; allowed: a target trained on "
            "chats, or plain text: a .txt file for `beagle-sd prepare`, --raw for `generate` and `bench`"
        )


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> list[int]:
    """The chat template's ids, ready for the assistant's turn; Unusable where the template refuses the messages."""
    return encode_text(tokenizer, render_chat(tokenizer, messages))


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> str:
    """The text whose ids `encode_chat` gives."""
    return _Template(tokenizer).render(messages, prompt=True)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text as a template renders it, whose special tokens are in it."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def render_next_turn(tokenizer: PreTrainedTokenizerBase, messages: list[dict], said: str) -> str | None:
    """What the chat template renders behind the last answer of a chat whose last turn is the user's: the end of the
    answer's turn, then the user's, ready for the next answer. None where it does not leave `said`, the text of prompt
    and answer so far, as it is but for blanks: turns are rendered otherwise once there are later ones, or thoughts
    dropped.
    """
    template, digits = _Template(tokenizer), _DIGITS
    while any(digits in message["content"] for message in messages):
        digits += "7"
    last = max(number for number, one in enumerate(messages) if one["role"] == "assistant")
    marked = [one | {"content": digits} if number == last else one for number, one in enumerate(messages)]
    _, found, behind = template.render(marked, prompt=True).partition(digits)
    same = "".join((said + behind).split()) == "".join(template.render(messages, prompt=True).split())
    return behind if found and same else None


def encode_turns(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> list[list[int]]:
    """The ids of a chat whose every turn of the user is to be answered: what stands before the first answer, ready for
    it, and then what stands between each answer and the next, which begins with the end of the turn.

    messages: the user's turns, after at most one of the system. Unusable where the template refuses them, or renders a
    turn otherwise once there are later ones: then no answer can be gone on from.
    """
    template, digits = _Template(tokenizer), _DIGITS
    while any(digits in message["content"] for message in messages):
        digits += "7"
    chat: list[dict] = []
    parts: list[str] = []
    for message in messages:
        chat.append(message)
        if message["role"] != "user":
            continue
        before, text = digits.join([*parts, ""]), template.render(chat, prompt=True)
        if not text.startswith(before) or digits in text[len(before) :]:
            raise Unusable(
                "the chat template changes earlier turns when later ones follow, so no answer can be continued from"
            )
        parts.append(text[len(before) :])
        chat.append({"role": "assistant", "content": digits})
    return [encode_text(tokenizer, part) for part in parts]


def user_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """What the chat template renders before the text of a user's first turn, and the token that it puts behind it;
    Unusable where the template hides the text or puts no token of its own behind it."""
    before, found, behind = _Template(tokenizer).render([{"role": "user", "content": _DIGITS}]).partition(_DIGITS)
    if not found:
        raise Unusable(_HIDDEN)
    ids = tokenizer(behind.lstrip(), add_special_tokens=False, verbose=False)["input_ids"]
    if not ids or ids[0] not in tokenizer.added_tokens_decoder:
        raise Unusable("the chat template ends a user's turn with no token of its own, so the target cannot write one")
    return before, ids[0]


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], ends: Collection[int] | None = None
) -> tuple[list[int], list[bool]]:
    """Ids of the whole chat as the template renders it, and for each whether the assistant says it.

    That is in every turn the message's text, so far as the template shows it, up to the first of `ends` (None: the
    tokenizer's eos), or else with the end of turn that the template puts behind it. It is never what the template
    itself puts before it: the header, or an empty think block where the message has no thoughts. Of thoughts that the
    template shows, all behind what it renders as the generation prompt is learnt, the opening <think> too, since there
    the model goes on by itself; thoughts that it drops, as of earlier turns, are not in the ids at all.
    Unusable where the template refuses the messages or does not show where a turn's text is.
    """
    chat = _Rendered(tokenizer, messages)
    try:
        encoded = tokenizer(chat.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except NotImplementedError as error:
        raise Unusable("the tokenizer does not tell where its tokens stand; allowed: a fast tokenizer") from error
    tokens = _Tokens(chat.text, encoded["input_ids"], encoded["offset_mapping"])
    ends = set(end_tokens(tokenizer=tokenizer) if ends is None else ends)
    learn = [False] * len(tokens.ids)
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or not any(message.get(name, "").strip() for name in _SAID):
            continue
        place = chat.said(number)
        if place is None or not chat.text[slice(*place)].strip():
            continue
        positions = tokens.within(*place)
        last = next((position for position in positions if tokens.ids[position] in ends), None)
        if last is None:
            behind = tokens.behind(place[1])
            if behind and (tokens.ids[behind[-1]] in ends or _ends_turn(chat, number, tokens, behind[-1])):
                positions += behind
        for position in positions:
            learn[position] = last is None or position <= last
    return tokens.ids, learn


class _Template:
    """A tokenizer's chat template, given content in the form that it shows: some of vision-language models show lists
    of parts alone, and nothing of a string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        check_template(tokenizer)
        self.tokenizer, self.parts = tokenizer, False
        self.parts = not self._shows_text()
        self.parts = self.parts and self._shows_text()

    def _shows_text(self) -> bool:
        """Whether a user's text is shown, as it is and not as Python or JSON would write the list that holds it."""
        try:
            text = self.render([{"role": "user", "content": _DIGITS}])
        except Unusable:
            return False
        return _DIGITS in text and f"'{_DIGITS}'" not in text and f'"{_DIGITS}"' not in text

    def render(self, messages: list[dict], *, prompt: bool = False) -> str:
        """The chat as text; prompt: ready for the assistant's turn."""
        if self.parts:
            messages = [one | {"content": [{"type": "text", "text": one["content"]}]} for one in messages]
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise Unusable(f"the chat template refuses it: {error}") from error
        assert isinstance(text, str)
        return text


class _Rendered:
    """A chat as its template renders it, and where in that text a turn's own text stands.

    A turn is rendered anew with digits in place of its text: what stays the same before and behind them is the
    template's, or other turns', whatever the template adds, trims, numbers, joins or drops.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, messages: list[dict]):
        self.template, self.messages = _Template(tokenizer), messages
        self.text = self.template.render(messages)
        self.digits = _DIGITS
        while self.digits in self.text:
            self.digits += "7"
        self.prompt = self._generation_prompt()
        self._places: dict[int, tuple[int, int] | None] = {}

    def said(self, number: int) -> tuple[int, int] | None:
        """[begin, end) in the text of what the message says, behind all of the generation prompt; None where the
        template leaves the message out."""
        if number not in self._places:
            self._places[number] = self._place(number)
        return self._places[number]

    def _place(self, number: int) -> tuple[int, int] | None:
        before, after, found = self._around(number, len(self.messages))
        if not found and before == self.text:
            return None
        end = len(self.text) - len(after)
        if not found or self.digits in after or not self.text.endswith(after):
            raise Unusable(_HIDDEN)
        if self.text.startswith(before) and len(before) <= end:
            return self._behind_prompt(len(before)), end
        same = len(commonprefix([self.text, before]))
        floor = self._end_before(number)
        if not floor <= same <= end:
            raise Unusable(_HIDDEN)
        header = self.text.rfind(self.prompt, floor, same) if self.prompt else -1
        return (same if header < 0 else header + len(self.prompt)), end

    def behind_last(self, number: int) -> str:
        """What the template renders behind a message that is the last."""
        return self._around(number, number + 1)[1]

    def _around(self, number: int, count: int) -> tuple[str, str, bool]:
        """The first `count` messages rendered: before and behind the digits in place of message `number`'s text, and
        whether they were there."""
        digits = {"role": self.messages[number]["role"], "content": self.digits}
        changed = self.template.render([*self.messages[:number], digits, *self.messages[number + 1 : count]])
        before, found, after = changed.partition(self.digits)
        return before, after, bool(found)

    def _end_before(self, number: int) -> int:
        """Where in the text the last message before ends that is in it."""
        places = (self.said(earlier) for earlier in range(number - 1, -1, -1))
        return next((place[1] for place in places if place), 0)

    def _generation_prompt(self) -> str:
        """What the template adds where the assistant is to speak; "" where it cannot be told."""
        first = next((number for number, one in enumerate(self.messages) if one["role"] == "assistant"), 0)
        asked = self.messages[:first]
        try:
            without, prompted = (self.template.render(asked, prompt=prompt) for prompt in (False, True))
        except Unusable:  # not of so few messages
            return ""
        return prompted[len(commonprefix([without, prompted])) :]

    def _behind_prompt(self, begin: int) -> int:
        """`begin`, or where the generation prompt ends if it goes on into what is said, as with an opening <think>."""
        starts = range(max(0, begin - len(self.prompt) + 1), begin)
        return next((at + len(self.prompt) for at in starts if self.text.startswith(self.prompt, at)), begin)


class _Tokens:
    """A text's token ids and where in it each stands."""

    def __init__(self, text: str, ids: list[int], offsets: list[tuple[int, int]]):
        self.text, self.ids, self.offsets = text, ids, offsets
        self._stops = [stop for _, stop in offsets]

    def within(self, begin: int, end: int) -> list[int]:
        """The tokens of text[begin:end]; one that reaches beyond counts if that part is blank."""
        positions = []
        for position in range(bisect_right(self._stops, begin), len(self.ids)):
            start, stop = self.offsets[position]
            if start >= end:
                break
            if not (self.text[start:begin] + self.text[end:stop]).strip():
                positions.append(position)
        return positions

    def behind(self, end: int) -> list[int]:
        """The first token from `end` on that is not blank, after those that are; empty where there is none."""
        behind = []
        for position in range(bisect_right(self._stops, end), len(self.ids)):
            if self.offsets[position][0] >= end:
                behind.append(position)
                if self.piece(position):
                    return behind
        return []

    def piece(self, position: int) -> str:
        start, stop = self.offsets[position]
        return self.text[start:stop].strip()


def _ends_turn(chat: _Rendered, number: int, tokens: _Tokens, position: int) -> bool:
    """Whether a token is the template's own end of the turn: one of the tokenizer's added tokens that stands behind the
    turn also where no other follows, and so is no later turn's header."""
    if tokens.ids[position] not in chat.template.tokenizer.added_tokens_decoder:
        return False
    return chat.behind_last(number).lstrip().startswith(tokens.piece(position))
