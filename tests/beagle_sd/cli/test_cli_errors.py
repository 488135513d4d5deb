"""What a user may get wrong at the command line: one line with what was given and what is allowed, no traceback."""

from __future__ import annotations

import json
import os

import pytest
import torch
from models import small_draft, small_target
from tokenizers_for_tests import small_tokenizer
from typer.testing import CliRunner

from beagle_sd.cli.app import app
from beagle_sd.data.prompts import build as prompts


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a target, a draft, states and what is wrong with each kind of input."""
    folder = tmp_path_factory.mktemp("place")
    target = small_target()
    target.save_pretrained(folder / "target")
    small_tokenizer().save_pretrained(folder / "target")
    target.save_pretrained(folder / "base")
    base = small_tokenizer()
    base.chat_template = None
    base.save_pretrained(folder / "base")
    for name in ("draft", "cut", "unmeasured"):
        small_draft(target).save_pretrained(folder / name)
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "unmeasured" / "acceptance.json").write_text('{"shapes": [{"depth": 2}]}')
    (folder / "folder").mkdir()
    (folder / "file").write_text("x")
    (folder / "empty.txt").touch()
    (folder / "empty.jsonl").touch()
    (folder / "bytes.txt").write_bytes(b"\xff\xfe bad")
    (folder / "bytes.jsonl").write_bytes(b"\xff\xfe bad")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (folder / "answers.jsonl").write_text(json.dumps({"messages": turns[1:]}) + "\n")
    tool = json.dumps({"messages": [*turns, {"role": "tool", "content": "a"}]})
    (folder / "tools.jsonl").write_text(tool + "\n" + tool + "\n")
    (folder / "odd.jsonl").write_text(json.dumps({"messages": turns}) + "\n" + tool + "\n")
    (folder / "long.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a" * 3000}]}) + "\n")
    return folder


def run(place, line: str):
    before = os.getcwd()
    os.chdir(place)
    try:
        return CliRunner().invoke(app, line.split(), env={"COLUMNS": "300"})
    finally:
        os.chdir(before)


@pytest.mark.parametrize(
    "line, message",
    [
        ("prepare nowhere.txt out", "nowhere.txt is not a file; allowed: .jsonl, .json, .txt or .npz"),
        ("prepare folder out", "folder is not a file; allowed"),
        ("prepare empty.txt out", "empty.txt holds nothing to learn from: it is empty"),
        ("prepare empty.jsonl out", "empty.jsonl holds nothing to learn from: it is empty"),
        ("prepare empty.jsonl out --regenerate", "empty.jsonl holds nothing to learn from: it is empty"),
        ("prepare long.jsonl out --regenerate", "left out 1: too long: a prompt of more than 511 tokens"),
        ("prepare bytes.txt out", "bytes.txt is not UTF-8 text: it looks like UTF-16"),
        ("prepare bytes.jsonl out", "bytes.jsonl is not UTF-8 text: it looks like UTF-16"),
        ("prepare empty.txt out --regenerate", "ends in '.txt'; allowed with --regenerate: .jsonl"),
        ("prepare answers.jsonl out --regenerate", "left out 1: no user turn to answer (first: answers.jsonl: line 1)"),
        ("prepare odd.jsonl out --strict", "odd.jsonl: line 2: a turn of role 'tool'; such a row is left out unless"),
        (
            "prepare tools.jsonl out",
            "holds nothing to learn from: left out 2: a turn of role 'tool' (first: tools.jsonl:",
        ),
        ("prepare chats.jsonl out --target base", "no chat template, as that of a base model has none; allowed"),
        ("prepare chats.jsonl out --target base --regenerate", "plain text: a .txt file for `beagle-sd prepare`"),
        ("prepare chats.jsonl out --context 0", "context is 0; allowed: 1 or more"),
        ("prepare chats.jsonl out --regenerate --batch 0", "batch is 0; allowed: 1 or more"),
        ("prepare chats.jsonl out --regenerate --max-new-tokens -1", "max_new_tokens is -1; allowed: 1 or more"),
        ("prepare chats.jsonl out --dtype int8", "dtype is 'int8'; allowed: auto, float32"),
        ("prepare chats.jsonl out --device gpu", "device is 'gpu'; allowed here: cpu"),
        (
            "prepare chats.jsonl out --device cuda:99",
            "device is 'cuda:99', which torch does not see; allowed here: cpu",
        ),
        (
            "prepare chats.jsonl out --target folder",
            "folder has no config.json; allowed: a folder that save_pretrained",
        ),
        ("prepare chats.jsonl out --target file", "file has no config.json; allowed: a folder that save_pretrained"),
        ("prepare chats.jsonl file", "File exists: 'file'"),
        ("train nowhere out", "nowhere/manifest.json is missing: nowhere is not a folder made by `beagle-sd prepare`"),
        ("train folder out", "folder is not a folder made by"),
        (
            "train tools.jsonl out",
            "holds nothing to learn from: left out 2: a turn of role 'tool' (first: tools.jsonl:",
        ),
        ("train folder out --lr -1", "lr is -1.0; allowed: 0 or more"),
        ("train folder out --schedule linear", "schedule is 'linear'; allowed: 'constant', 'cosine'"),
        ("generate a --draft nowhere", "nowhere has no config.json; allowed: a folder that `beagle-sd train` wrote"),
        ("generate a --draft folder", "folder has no config.json; allowed: a folder that `beagle-sd train` wrote"),
        ("generate a --draft cut", "model.safetensors is damaged or cut short"),
        ("generate a --draft unmeasured", "acceptance.json is damaged (a shape lacks one of branch, depth,"),
        ("generate a --draft draft --seed 99999999999999999999", "seed is 99999999999999999999 for 1 rows; allowed"),
        ("generate a --draft draft --max-new-tokens 0", "max_new_tokens is 0; allowed: at least 1"),
        ("plot folder", "metrics.jsonl is not there; allowed: a folder that `beagle-sd train` wrote"),
        ("prompts folder --count 0", "folder is a folder; allowed: the name of a file"),
    ],
)
def test_wrong_arguments(place, line, message, monkeypatch):
    monkeypatch.setitem(prompts.MIX, "templates", 1.0)
    for name in set(prompts.MIX) - {"templates"}:
        monkeypatch.delitem(prompts.MIX, name)
    result = run(
        place,
        line
        + (
            " --target target" if line.split()[0] in ("prepare", "train", "generate") and "--target" not in line else ""
        ),
    )
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), (result.output, result.exception)
    assert result.output.splitlines()[-1].startswith("error: ") and message in result.output, result.output


def test_a_failed_beginning_does_not_bar_the_folder(place):
    """Nothing was stored for the wrong source, so another may take its place."""
    assert run(place, "prepare empty.txt begun --target target").exit_code == 1
    done = run(place, "prepare chats.jsonl begun --target target")
    assert done.exit_code == 0 and "1 of 1 conversations" in done.output, done.output
    refused = run(place, "prepare answers.jsonl begun --target target")
    assert refused.exit_code == 1 and "use a new folder" in refused.output


def test_what_is_left_out_is_counted(place):
    for more in ("", " --regenerate --max-new-tokens 2"):
        said = run(place, f"prepare odd.jsonl left{len(more)} --target target{more}")
        assert said.exit_code == 0 and "1 of 1 conversations" in said.output, said.output
        assert "left out 1: a turn of role 'tool' (first: odd.jsonl: line 2)" in said.output.splitlines()


def test_regenerated_answers_answer_the_last_user(place):
    """What stood there as an answer is not what the target continues."""
    from beagle_sd.data.conversations import encode_chat
    from beagle_sd.data.shards import read_sequences

    result = run(place, "prepare chats.jsonl rewritten --regenerate --batch 1 --max-new-tokens 5 --target target")
    assert result.exit_code == 0, result.output
    (sequence,) = read_sequences(place / "rewritten")
    prompt = encode_chat(small_tokenizer(), [{"role": "user", "content": "a"}])
    assert sequence.tokens[: len(prompt)].tolist() == prompt
    assert sequence.loss_mask.equal(torch.arange(len(sequence.tokens)) >= len(prompt) - 1)


def test_prompts_say_which_source_they_lack(tmp_path, monkeypatch):
    """A machine without a source's files still gets its prompts, and is told."""

    def missing(rng, count, folder):
        raise FileNotFoundError("nowhere to be had")

    monkeypatch.setitem(prompts.SOURCES, "python-docs", prompts.SOURCES["python-docs"].__class__("", "", missing))
    for name in set(prompts.MIX) - {"templates", "python-docs"}:
        monkeypatch.delitem(prompts.MIX, name)
    result = CliRunner().invoke(app, ["prompts", str(tmp_path / "p.jsonl"), "--count", "40"], env={"COLUMNS": "300"})
    assert result.exit_code == 0, (result.output, result.exception)
    assert "left out: python-docs: nowhere to be had" in result.output and "40 prompts" in result.output
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 40
