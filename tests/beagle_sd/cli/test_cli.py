"""The command line from prompts to a trained draft, on a small target of the tests' own."""

from __future__ import annotations

import json
import sys

import forks
import numpy as np
import pytest
import torch
from models import small_target
from tokenizers_for_tests import small_tokenizer
from typer.testing import CliRunner

from beagle_sd.cli.app import app
from beagle_sd.data.shards import read_sequences
from beagle_sd.decoding.trees import calibration
from beagle_sd.models.draft import BeagleDraft


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Costs go to a folder of the test's own, and take one short pass."""
    monkeypatch.setenv("BEAGLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "_PASSES", 1)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    small_target().save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return str(folder)


def run(*args, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def write_prompts(path, count: int = 30):
    lines = [{"messages": [{"role": "user", "content": "abc"[: 1 + i % 3]}], "source": "test"} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_from_prompts_to_a_draft_that_decodes(target, tmp_path):
    prompts, states, out = write_prompts(tmp_path / "prompts.jsonl"), tmp_path / "states", tmp_path / "run"
    said = run("prepare", prompts, states, "--target", target, "--regenerate", "--batch", 8, "--max-new-tokens", 20)
    assert "30 of 30 conversations" in said and (states / "answers.npz").is_file()
    assert "0 of 30 conversations" in run(
        "prepare", prompts, states, "--target", target, "--regenerate", "--batch", 8, "--max-new-tokens", 20
    )
    trained = run(
        "train",
        states,
        out,
        "--target",
        target,
        "--draft-vocab",
        40,
        "--block-epochs",
        2,
        "--simulation-epochs",
        2,
        "--tokens-per-step",
        512,
        "--lr",
        1e-3,
        "--warmup-steps",
        2,
        "--key-value-heads",
        4,
    )
    assert json.loads((out / "final" / "config.json").read_text())["num_key_value_heads"] == 4
    assert "acceptance by depth" in trained and (out / "final" / "model.safetensors").is_file()
    shown = run("generate", "ab", "--target", target, "--draft", out / "final", "--max-new-tokens", 12)
    assert "Same tokens as plain decoding." in shown and "Tree: adaptive" in shown
    assert all(row in shown for row in ("speculative", "plain, same loop", "target.generate"))
    assert "calibrations: 1 in" in run("info")
    again = run("generate", "ab", "--target", target, "--draft", out / "final", "--max-new-tokens", 12, "--calibrate")
    assert "Same tokens as plain decoding." in again
    live = run(
        "train",
        states / "answers.npz",
        tmp_path / "live",
        "--target",
        target,
        "--draft-vocab",
        40,
        "--block-epochs",
        1,
        "--simulation-epochs",
        1,
        "--tokens-per-step",
        512,
        "--lr",
        1e-3,
        "--window-keys",
        12,
    )
    assert json.loads((tmp_path / "live" / "final" / "config.json").read_text())["window_keys"] == 12
    assert trained.splitlines()[0].split(";")[0] == live.splitlines()[0].split(";")[0]
    assert (tmp_path / "live" / "final" / "model.safetensors").is_file()
    onward = (
        "train",
        states,
        tmp_path / "onward",
        "--target",
        target,
        "--from-draft",
        out / "final",
        "--block-epochs",
        0,
    )
    said = run(*onward, "--key-value-heads", 4, code=1)
    assert "--key-value-heads given with --from-draft; allowed: the shape of the draft in" in said
    assert "is a file, and --more is given" in run(*onward, "--more", states / "answers.npz", code=1)
    assert "window_keys is -5; allowed: 0 (all) or more" in run(*onward, "--window-keys", -5, code=1)
    said = run(*onward, "--more", states, "--simulation-epochs", 1, "--lr", 0, "--window-keys", 9, "--draft-vocab", 50)
    assert said.startswith(f"{2 * int(trained.split()[0])} sequences")
    before, after = (BeagleDraft.from_pretrained(folder / "final") for folder in (out, tmp_path / "onward"))
    assert after.config.window_keys == 9 and after.config.num_key_value_heads == 4
    assert len(after.draft_vocab) == after.config.draft_vocab_size == 50 != len(before.draft_vocab)
    kept = dict(after.named_parameters())
    assert all(weight.equal(kept[name]) for name, weight in before.named_parameters())
    again = "prepare", states / "answers.npz", tmp_path / "again", "--target", target
    assert "10 of 10 conversations" in run(*again, "--limit", 10)
    assert "20 of 30 conversations" in run(*again)


def test_prompts_written_by_the_target(target, tmp_path):
    out = tmp_path / "own.jsonl"
    said = run("prompts", out, "--written-by", target, "--count", 6, "--seed", 3)
    assert "6 prompts in" in said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 6 and {row["source"] for row in rows} == {"target"}
    assert "6 of 6 conversations" in run(
        "prepare", out, tmp_path / "states", "--target", target, "--regenerate", "--max-new-tokens", 8
    )
    said = run("prompts", out, "--written-by", target, "--mix", "templates=1", code=1)
    assert f"written_by is {target} and mix templates=1; allowed: one of the two" in said
    assert "device is cpu; allowed only with --written-by" in run("prompts", out, "--device", "cpu", code=1)
    assert "dtype is 'int4'; allowed" in run("prompts", out, "--written-by", target, "--dtype", "int4", code=1)


@pytest.mark.parametrize("regenerate", [True, False])
def test_processes_share_what_is_prepared(regenerate, target, tmp_path):
    """Two processes go on where one stopped: together they store what one does, each sequence once."""
    source = write_prompts(tmp_path / "prompts.jsonl", 12)
    line = ["--target", target, "--batch", 4, "--max-new-tokens", 8]
    if regenerate:
        line.append("--regenerate")
    else:
        run("prepare", source, tmp_path / "first", "--regenerate", *line)
        source = tmp_path / "first" / "answers.npz"
    run("prepare", source, tmp_path / "one", *line)
    run("prepare", source, tmp_path / "two", *line, "--limit", 5)
    assert forks.run_ranks(2, lambda: run("prepare", source, tmp_path / "two", *line)) == [0, 0]
    one, two = ({sequence.index: sequence for sequence in read_sequences(tmp_path / name)} for name in ("one", "two"))
    assert one.keys() == two.keys() and len(list(read_sequences(tmp_path / "two"))) == len(two) == len(one)
    for index, sequence in one.items():
        assert sequence.tokens.equal(two[index].tokens) and sequence.final_token == two[index].final_token
        torch.testing.assert_close(sequence.states, two[index].states, rtol=2**-6, atol=2**-6)
    assert len(list((tmp_path / "two").glob("states-*.safetensors"))) == 3
    if regenerate:
        files = [np.load(tmp_path / name / "answers.npz") for name in ("one", "two")]
        assert all(np.array_equal(files[0][part], files[1][part]) for part in ("ids", "index", "lengths"))


def test_what_is_waited_for_is_said_where_somebody_looks(target, tmp_path, capsys, monkeypatch):
    from beagle_sd import BeagleDraft
    from beagle_sd.cli.console import Console, loading
    from beagle_sd.models import smollm2

    BeagleDraft.from_target(small_target()).save_pretrained(tmp_path / "draft")
    args = ["generate", "ab", "--target", target, "--draft", str(tmp_path / "draft"), "--max-new-tokens", "2"]
    looked_at = CliRunner().invoke(app, args, env={"COLUMNS": "200", "FORCE_COLOR": "1"})
    for what in ("loading", "measuring what rounds cost", "warming up", "decoding the same without the draft"):
        assert what in looked_at.stderr and what not in looked_at.stdout
    assert CliRunner().invoke(app, args, env={"COLUMNS": "200"}).stderr == ""

    monkeypatch.setenv("FORCE_COLOR", "1")
    with loading(Console(), smollm2.NAME):
        pass
    with loading(Console(quiet=True), smollm2.NAME):
        pass
    assert capsys.readouterr().err.count("converting smollm2-135m for transformers: once") == 1


@pytest.mark.parametrize(
    "args,message",
    [
        (("generate", " "), "the prompt is empty"),
        (("generate", "a", "--temperature", "-1"), "temperature is -1.0; allowed: 0"),
        (("generate", "a", "--top-p", "0"), "top_p is 0.0; allowed: above 0"),
        (("generate", "a", "--tree", "4,4,0"), "num_nodes is 0; allowed: 1 to 1024"),
        (("generate", "a", "--dtype", "int3"), "dtype is 'int3'; allowed: auto"),
        (("generate", "a", "--draft", "{nowhere}"), "{nowhere}"),
        (("generate", "a", "--tree", "2,1,3", "--calibrate"), "--calibrate was given with --tree; allowed"),
        (("bench", "--tree", "4,4"), "the tree is '4,4'; allowed: depth,branch,num_nodes"),
        (("bench", "--prompts", "mt-bank"), "'mt-bank' is no set of prompts and no file; allowed: mt-bench"),
        (("bench", "--count", "0"), "count is 0; allowed: 1 or more"),
    ],
)
def test_wrong_arguments(target, tmp_path, args, message):
    from beagle_sd import BeagleDraft

    BeagleDraft.from_target(small_target()).save_pretrained(tmp_path / "draft")
    nowhere = str(tmp_path / "nowhere")
    args = [arg.format(nowhere=nowhere) for arg in args]
    if "--draft" not in args:
        args += ["--draft", str(tmp_path / "draft")]
    said = run(*args, "--target", target, code=1)
    assert message.format(nowhere=nowhere) in said.replace("\n", ""), said


def test_the_comparison_as_a_table_csv_and_plot(target, tmp_path):
    from beagle_sd import BeagleDraft

    BeagleDraft.from_target(small_target()).save_pretrained(tmp_path / "draft")
    (tmp_path / "questions.txt").write_text("ab\ncd\n")
    pytest.importorskip("matplotlib")
    said = run(
        "bench",
        "--target",
        target,
        "--draft",
        tmp_path / "draft",
        "--prompts",
        tmp_path / "questions.txt",
        "--count",
        1,
        "--max-new-tokens",
        6,
        "--tree",
        "2,1,3",
        "--tree",
        "3,2,6",
        "--csv",
        tmp_path / "rows.csv",
        "--plot",
        tmp_path / "rows.png",
    )
    for contender in ("target.generate", "prompt lookup", "beagle, plain", "beagle, chain of 2", "adaptive tree"):
        assert contender in said and contender in (tmp_path / "rows.csv").read_text()
    assert "questions.txt, 1 prompts" in said.replace("\n", "") and (tmp_path / "rows.png").stat().st_size > 1000


def test_a_plot_without_matplotlib_is_refused_before_measuring(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = run("bench", "--target", "nowhere/at-all", "--plot", tmp_path / "rows.png", code=1)
    assert "a plot needs matplotlib" in said and "beagle-kernels[bench]" in said


def test_wrong_files(target, tmp_path):
    assert "is not a file; allowed" in run("prepare", tmp_path / "no.jsonl", tmp_path / "s", "--target", target, code=1)
    assert "manifest.json is missing" in run("train", tmp_path, tmp_path / "o", "--target", target, code=1)
    assert "no draft is bundled" in run("generate", "a", "--target", "unknown/model", code=1)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    assert "no assistant turn to learn from" in run("prepare", bad, tmp_path / "t", "--target", target, code=1)


def test_states_of_another_target_are_refused(target, tmp_path):
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats.write_text(json.dumps({"messages": turns}) + "\n")
    run("prepare", chats, tmp_path / "states", "--target", target)
    other = tmp_path / "other"
    small_target(hidden_size=32).save_pretrained(other)
    small_tokenizer().save_pretrained(other)
    said = run("train", tmp_path / "states", tmp_path / "o", "--target", other, code=1)
    assert "hidden_size=64; this target has 32" in said.replace("\n", "")


def test_info_names_backends():
    assert "reference" in run("info")
