"""`beagle-sd prepare --engine vllm` but for vLLM itself: stand-in engines, our own loop's answers and states."""

from __future__ import annotations

import json
import os
import signal

import engines
import forks
import pytest
import torch
from models import VOCAB, small_target
from tokenizers_for_tests import small_tokenizer
from typer.testing import CliRunner

from beagle_sd.cli.app import app
from beagle_sd.data import answers, shards, states
from beagle_sd.data.answers import Request, seed_of
from beagle_sd.data.conversations import Conversation
from beagle_sd.vllm import checks, prepare

END = small_tokenizer().eos_token_id
ENDS = [END, 5, VOCAB + 7]


def by_index(found) -> dict[int, shards.Sequence]:
    found = list(found)
    assert len({one.index for one in found}) == len(found)
    return {one.index: one for one in found}


def whole(one: shards.Sequence) -> tuple:
    return [*one.tokens.tolist(), one.final_token], one.loss_mask.tolist(), one.index, one.temperature


def requests(count: int, temperature: float = 0.0) -> list[Request]:
    """Prompts of different lengths, each third a chat of up to three turns; turns begin with an end."""
    made, tokens = [], torch.Generator().manual_seed(0)
    for index in range(count):
        prompt, *later = (torch.randint(6, VOCAB, (2 + index % 7,), generator=tokens).tolist() for _ in range(4))
        turns = tuple([END, *turn] for turn in later[: index % 3])
        made.append(Request(index, prompt, temperature, turns))
    return made


@pytest.mark.parametrize("limit", [14, 30, 400])
@pytest.mark.parametrize("longest", [1, 9])
def test_answers_are_those_of_our_loop(limit, longest):
    """Also of chats, which go on as long as there is room, and of prompts that leave none."""
    model, asked = small_target(), requests(17)
    engine = engines.Answers(model, [one for one in ENDS if one < VOCAB])
    found = by_index(
        prepare.write_answers(engine, asked, ends=ENDS, batch=3, max_new_tokens=longest, limit=limit, seed=1)
    )
    sizes = {"batch": 3, "max_new_tokens": longest, "context": limit}
    own = by_index(answers.write_answers(model, asked, ends=ENDS, states=False, **sizes))
    assert {index: whole(one) for index, one in found.items()} == {index: whole(one) for index, one in own.items()}
    assert engine.most <= 6 and all(not one.states.numel() for one in found.values())
    short = prepare.write_answers(
        engine, [Request(0, [7] * limit, 0.0)], ends=ENDS, batch=1, max_new_tokens=1, limit=limit
    )
    assert list(short) == [], "no room for an answer"


def test_each_turn_has_a_seed_of_its_own_that_vllm_takes():
    model, asked = small_target(), requests(9, 1.0)
    engine = engines.Answers(model, [END])
    sizes = {"batch": 20, "max_new_tokens": 4, "limit": 400}
    found = by_index(prepare.write_answers(engine, asked, ends=[END], seed=3, **sizes))
    assert len(engine.seeds) == len(set(engine.seeds)) == 18
    assert engine.seeds[:9] == [seed_of(3, request) for request in asked]
    again = engines.Answers(model, [END])
    for seed in (-1, 2**40):
        list(prepare.write_answers(again, asked, ends=[END], seed=seed, **sizes))
    assert all(0 <= seed < 2**63 for seed in again.seeds)
    again = by_index(prepare.write_answers(again, asked[::-1], ends=[END], seed=3, **sizes | {"batch": 1}))
    assert {index: whole(one) for index, one in again.items()} == {index: whole(one) for index, one in found.items()}


def conversations(count: int) -> list[Conversation]:
    tokens = torch.Generator().manual_seed(1)
    lengths = [1 + 5 * index % 17 for index in range(count)]
    ids = [torch.randint(6, VOCAB, (length,), generator=tokens).tolist() for length in lengths]
    return [Conversation(n, one, [place % 2 == 1 for place in range(len(one))], -1.0) for n, one in enumerate(ids)]


def test_states_are_those_of_our_forward(monkeypatch):
    monkeypatch.setattr(prepare, "_TOKENS_AHEAD", 30)
    model, texts = small_target(), conversations(30)
    engine = engines.States(model)
    found, own = (
        by_index(sequences)
        for sequences in (prepare.sequences_with_states(engine, texts), states.sequences_with_states(model, texts))
    )
    assert {index: whole(one) for index, one in found.items()} == {index: whole(one) for index, one in own.items()}
    assert len(found) == sum(len(text.ids) > 1 for text in texts) and engine.most <= 30
    for index, one in found.items():
        assert one.states.dtype == torch.bfloat16
        torch.testing.assert_close(one.states, own[index].states, rtol=2**-7, atol=2**-7)


def test_a_text_longer_than_what_is_asked_ahead(monkeypatch):
    monkeypatch.setattr(prepare, "_TOKENS_AHEAD", 3)
    assert len(list(prepare.sequences_with_states(engines.States(small_target()), conversations(8)))) == 7


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda given: given[1:], r"vLLM gave states \[4, 64\] for the 5 tokens of text 1"),
        (lambda given: given[0], r"vLLM gave states \[64\] for the 5 tokens of text 1"),
        (lambda given: given * torch.nan, "text 1: vLLM gave states that are not finite; check the target's weights"),
    ],
)
def test_what_is_no_state_is_not_stored(spoil, message):
    with pytest.raises(RuntimeError, match=message):
        list(prepare.sequences_with_states(engines.States(small_target(), spoil), conversations(2)))


def test_answers_wait_in_files(tmp_path):
    found = list(answers.write_answers(small_target(), requests(9), ends=ENDS, max_new_tokens=5, states=False))
    written = prepare.Written(tmp_path, tokens_per_file=60)
    for one in found:
        written.add(one)
    written.flush()
    written.flush()
    assert len(shards.written_paths(tmp_path)) > 1 and written.indices() == set(range(9))
    read = {one.index: one for one in written.conversations({1, 4, 7})}
    assert sorted(read) == [1, 4, 7]
    for one in found:
        if text := read.get(one.index):
            assert (text.ids, text.learn[1:], text.index, text.temperature) == whole(one)
    written.remove(set(range(8)))
    assert len(shards.written_paths(tmp_path)) == 1 and 8 in written.indices()
    written.remove(range(9))
    assert not shards.written_paths(tmp_path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a target, prompts and chats."""
    folder = tmp_path_factory.mktemp("place")
    small_target().save_pretrained(folder / "target")
    small_tokenizer().save_pretrained(folder / "target")
    turns = [["abc"[: 1 + index % 3], "de", "f"][: 1 + index % 3] for index in range(12)]
    rows = [{"messages": [{"role": "user", "content": text} for text in texts]} for texts in turns]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "text.txt").write_text("hello there " * 200)
    return folder


REGENERATE = "prompts.jsonl {} --target target --regenerate --max-new-tokens 12 --batch 2 --dtype float32"


def run(place, line: str, *values, code: int = 0) -> str:
    before = os.getcwd()
    os.chdir(place)
    try:
        arguments = ["prepare", *line.format(*values).split()]
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    finally:
        os.chdir(before)
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@pytest.fixture(autouse=True)
def _ctrl_c_counts():
    """Whoever started the tests, in the background perhaps, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_command_stores_what_our_loop_does(place, tmp_path, monkeypatch):
    log = engines.stand_in(monkeypatch)
    said = run(place, REGENERATE + " --engine vllm --window-keys 4", tmp_path / "vllm")
    assert "12 of 12 conversations" in said and "the answers' token ids alone" in said
    assert log == ["answers", "no more answers", "states", "no more states"]
    run(place, REGENERATE + " --window-keys 4", tmp_path / "own")
    own, found = (by_index(shards.read_sequences(tmp_path / name)) for name in ("own", "vllm"))
    assert found.keys() == own.keys()
    for index, one in found.items():
        if not one.temperature:
            assert whole(one) == whole(own[index]) and one.kept.equal(own[index].kept)
            torch.testing.assert_close(one.states, own[index].states, rtol=2**-7, atol=2**-7)
    assert (tmp_path / "vllm" / "answers.npz").is_file() and not shards.written_paths(tmp_path / "vllm")
    assert shards.read_manifest(tmp_path / "vllm") == {**shards.read_manifest(tmp_path / "own"), "engine": "vllm"}
    assert "0 of 12 conversations" in run(place, REGENERATE + " --engine vllm --window-keys 4", tmp_path / "vllm")
    assert len(log) == 4, "nothing was to be done"


def test_engines_mix_only_where_they_give_the_same(place, tmp_path, monkeypatch):
    """Sampled answers differ; states of given texts do not. Folders of before there were engines are the own one's."""
    engines.stand_in(monkeypatch)
    run(place, REGENERATE + " --limit 3", tmp_path / "own")
    said = run(place, REGENERATE + " --engine vllm", tmp_path / "own", code=1)
    assert "was begun with engine='own', not 'vllm'; use a new folder, or the same arguments to go on" in said
    path = tmp_path / "own" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in manifest.items() if name != "engine"}))
    assert "9 of 12 conversations" in run(place, REGENERATE, tmp_path / "own")
    text = "text.txt {} --target target --context 64 --dtype float32"
    run(place, text + " --limit 2", tmp_path / "text")
    run(place, text, tmp_path / "whole")
    run(place, text + " --engine vllm", tmp_path / "text")
    one, other = (by_index(shards.read_sequences(tmp_path / name)) for name in ("text", "whole"))
    assert {index: whole(each) for index, each in one.items()} == {index: whole(each) for index, each in other.items()}


def test_killed_and_run_again(place, tmp_path, monkeypatch):
    """Among the answers, then among the states: the same answers and states as of one undisturbed run; other arguments
    are refused as soon as answers are there."""
    engines.stand_in(monkeypatch)
    monkeypatch.setattr(prepare.Written.__init__, "__defaults__", (40,))
    monkeypatch.setattr(shards.ShardWriter.__init__, "__defaults__", (60,))
    line, out = REGENERATE + " --engine vllm", tmp_path / "killed"
    run(place, line, tmp_path / "whole")

    def killed_after(calls: int, kind: type) -> None:
        step, left = kind.step, [calls]

        def dying(self):
            left[0] -= 1
            return step(self) if left[0] >= 0 else forks.die()

        def work():
            kind.step = dying
            run(place, line, out)

        assert forks.run(work) == -signal.SIGKILL

    killed_after(6, engines.Answers)
    waiting = prepare.Written(out).indices()
    assert 0 < len(waiting) < 12 and not shards.shard_paths(out)
    changed = line.replace("--max-new-tokens 12", "--max-new-tokens 13")
    assert "was begun with max_new_tokens=12, not 13" in run(place, changed, out, code=1)
    killed_after(7, engines.States)
    assert prepare.Written(out).indices() == set(range(12)) and 0 < len(list(shards.read_sequences(out))) < 12
    assert "12 of 12" not in run(place, line, out)
    found, wanted = by_index(shards.read_sequences(out)), by_index(shards.read_sequences(tmp_path / "whole"))
    assert {index: whole(one) for index, one in found.items()} == {index: whole(one) for index, one in wanted.items()}
    assert all(one.states.equal(wanted[index].states) for index, one in found.items())
    assert not shards.written_paths(out) and not list(out.glob("*.partial.*"))


@pytest.mark.parametrize("kind", [engines.Answers, engines.States])
def test_ctrl_c_keeps_what_is_finished(kind, place, tmp_path, monkeypatch):
    log = engines.stand_in(monkeypatch)
    step, calls = kind.step, []

    def interrupting(self):
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(kind, "step", interrupting)
    said = run(place, REGENERATE + " --engine vllm", tmp_path / "out", code=130)
    assert "run the same command again to go on" in said and log[-1].startswith("no more")
    kept = len(prepare.Written(tmp_path / "out").indices()), len(list(shards.read_sequences(tmp_path / "out")))
    assert 0 < kept[0] < 12 and not kept[1] if kind is engines.Answers else kept == (12, 7)
    run(place, REGENERATE + " --engine vllm", tmp_path / "out")
    assert len(by_index(shards.read_sequences(tmp_path / "out"))) == 12


@pytest.mark.parametrize(
    "more, message",
    [
        ("--engine sglang", "engine is 'sglang'; allowed: own, vllm"),
        ("--tensor-parallel 0", "tensor_parallel is 0; allowed: 1 or more"),
        ("--tensor-parallel 2", "tensor_parallel is 2 and engine is own; allowed: 1, or --engine vllm"),
        (
            "--engine vllm --device cuda:1",
            "device is cuda:1 and engine is vllm; allowed: none, vLLM takes the GPUs that",
        ),
        (
            "--engine vllm --context 700",
            "context is 700 and engine is vllm; allowed: up to 512, the target's positions",
        ),
        ("--engine vllm --dtype int8", "dtype is 'int8'; allowed: auto, float32"),
        (
            "--engine vllm --target text.txt",
            "text.txt has no config.json; allowed: a folder that save_pretrained wrote",
        ),
    ],
)
def test_wrong_arguments(more, message, place, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "vllm_version", lambda: "0.32.0")
    said = run(place, f"text.txt {{}} --target target {more}", tmp_path / "out", code=1)
    assert said.splitlines()[-1].startswith("error: ") and message in said, said
    assert not shards.shard_paths(tmp_path / "out")


def test_no_vllm_or_another_is_told_of(place, tmp_path, monkeypatch):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name, *more: None)
    said = run(place, "text.txt {} --target target --engine vllm", tmp_path / "out", code=1)
    assert said == (
        'error: vllm is not installed here; allowed: vllm >= 0.32, < 0.34 (pip install "beagle-kernels[vllm]")\n'
    )
    for wrong in ("0.31.2", "0.34.0rc1", "1.0"):
        monkeypatch.setattr(checks, "vllm_version", lambda wrong=wrong: wrong)
        said = run(place, "text.txt {} --target target --engine vllm", tmp_path / "out", code=1)
        assert f"vllm {wrong} is installed; allowed: vllm >= 0.32, < 0.34, whose interfaces were tried" in said
    for right in ("0.32.0", "0.32.1+cpu", "0.33.0.dev1"):
        monkeypatch.setattr(checks, "vllm_version", lambda right=right: right)
        checks.check_version()


def test_joined_processes_are_refused(place, tmp_path, monkeypatch, capfd):
    engines.stand_in(monkeypatch)
    command = REGENERATE + " --engine vllm"
    assert forks.run_ranks(2, lambda: run(place, command, tmp_path / "out", code=1)) == [0, 0]
    assert not (tmp_path / "out").exists()
