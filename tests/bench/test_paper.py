"""The paper's figures end to end at toy size, and the replay against real decoding."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace
from itertools import combinations

import pytest
import torch
from models import agreeable_target, small_draft
from shard_cases import MANIFEST, write_states

from beagle_sd import BeagleDraft, generate
from beagle_sd.data.shards import Sequence, ShardWriter
from beagle_sd.decoding.trees.tree import TreeShape
from bench.peers.eagle2 import EagleDraft
from bench.recipes.paper import __main__ as command
from bench.recipes.paper.figures import FIGURES, draw, make
from bench.recipes.paper.replay import greedy_answers, replay
from bench.recipes.paper.runs import RUNS, Runner, Settings
from bench.report import paper

TOY = Settings(epochs=1.0, tokens_per_step=100, lr=1e-2, warmup_steps=1, draft_vocab=60, held_out=4, eval_tokens=200)
TOY_OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(TOY).items() if value is not False]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    from tokenizers_for_tests import small_tokenizer

    folder = tmp_path_factory.mktemp("target")
    model = agreeable_target()
    model.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return model, str(folder)


@pytest.fixture(scope="module")
def states(target, tmp_path_factory):
    return write_states(tmp_path_factory.mktemp("states"), target[0], count=12)


def test_figures_from_the_command(target, states, tmp_path):
    pytest.importorskip("matplotlib")
    out, work = tmp_path / "out", tmp_path / "work"
    places = ["--states", str(states), "--work", str(work), "--out", str(out), "--target", target[1]]
    command.main(["figure3", "append", *places, *TOY_OPTIONS])
    needed = "block", "block-block", "block-no-append", "block-steps4", "eagle2", "eagle2-eagle2"
    assert {path.name for path in work.iterdir()} == {f"{name}-seed0" for name in needed}
    with (out / "figure3.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["run"] for row in rows} == {"Beagle", "EAGLE-2"}
    epochs = [float(row["epoch"]) for row in rows if row["run"] == "EAGLE-2"]
    assert epochs == sorted(epochs) and epochs[-1] == 2.0
    with (out / "append.csv").open() as file:
        append, without = csv.DictReader(file)
    assert append["tokens_seen"] == without["tokens_seen"]
    assert 1 <= float(append["chain"]) <= 5
    assert (out / "figure3.svg").stat().st_size < 100_000 and (out / "settings.json").is_file()

    def fail(*args):
        pytest.fail("a run that is done is done again")

    runner = Runner(states, work, target[1], TOY)
    runner._trained = fail
    make("append", runner, [0], out)
    with pytest.raises(ValueError, match="was run with .*new --work folder"):
        Runner(states, work, target[1], replace(TOY, lr=2e-2)).result("block", 0)


def test_losses_weights_and_options_reach_the_trainer(target, states, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    work, names = tmp_path / "work", ("losses", "optimizer", "seconds")
    monkeypatch.setattr(paper, "FOLDER", tmp_path)
    places = ["--states", str(states), "--work", str(work), "--out", str(tmp_path), "--target", target[1]]
    command.main([*names, *places, *TOY_OPTIONS, "--autocast"])
    runs = {*FIGURES["losses"].runs.values(), "muon-steps4"}
    keys = {name: _weights(work / f"{name}-seed0")["k_proj.weight"] for name in runs}
    for one, other in combinations(keys, 2):
        assert not keys[one].equal(keys[other]), (one, other)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings.keys() == set(names) and all(one["autocast"] for one in settings.values())
    assert settings["optimizer"]["options"]["Muon, 5e-3"] == {"optimizer": "muon", "lr": 5e-3}
    assert "products in bf16" in paper.settings("losses") and "learning rate 0.01 falling" in paper.settings("losses")
    assert "the learning rate falling" in paper.settings("optimizer")
    shown = paper.TABLES["paper_losses"]().splitlines()
    assert shown[0].endswith("| peak MB |") and len(shown) == 2 + len(FIGURES["losses"].runs)
    rows = [row.split(" | ") for row in paper.seconds().splitlines()[2:]]
    for head in FIGURES["seconds"].runs:
        seconds = [float(row[2]) for row in rows if row[0] == f"| {head}"]
        assert len(seconds) > 2 and seconds == sorted(seconds)


def test_a_bar_is_the_mean_of_seeds(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {"run": run, "seed": seed, "chain": 1.5, "chain_error": 0.1, "tree": 2 + seed, "tree_error": 0.1}
        for run in FIGURES["optimizer"].runs
        for seed in (0, 1)
    ]
    draw(FIGURES["optimizer"], rows, tmp_path / "bars.svg")
    shown = (tmp_path / "bars.svg").read_text(encoding="utf-8")
    assert "tree, tokens a round" in shown and shown.count("Muon") == len(("chain", "tree"))


def _weights(run):
    return BeagleDraft.from_pretrained(run / "final").state_dict()


def test_every_figure_names_runs_there_are():
    for figure in FIGURES.values():
        assert set(figure.runs.values()) <= RUNS.keys()
        assert {RUNS[run].after is None for run in figure.runs.values()} in ({True}, {False}), "equal tokens seen"
    assert all(run.after is None or RUNS[run.after].after is None for run in RUNS.values())


@pytest.mark.parametrize("shape", [(4, 1, 5), (3, 3, 8)], ids=str)
@pytest.mark.parametrize("kind", ["beagle", "window", "eagle2"])
def test_a_replay_gives_what_decoding_reports(kind, shape, target, states):
    model, _ = target
    if kind == "eagle2":
        torch.manual_seed(1)
        draft = EagleDraft.from_target(model)
    else:
        draft = small_draft(model, window_keys=9 if kind == "window" else None)
    answers = greedy_answers(states, 2)
    found = replay(draft, states, 2, *shape)
    assert found["rounds"] > len(answers) and found["tokens_per_round"] >= 1.0
    if kind == "eagle2":
        return
    rounds = tokens = 0
    for answer in answers:
        prompt = int(answer.loss_mask.nonzero()[0]) + 1
        text = torch.cat([answer.tokens, torch.tensor([answer.final_token])])
        out = generate(
            model,
            draft,
            text[None, :prompt],
            max_new_tokens=len(text) - prompt,
            tree=TreeShape(*shape),
            eos_token_id=[],
        )
        assert out.sequences[0].equal(text)
        rounds += out.report.row_rounds
        tokens += out.report.tokens_per_round * out.report.row_rounds
    assert found["rounds"] == rounds
    assert found["tokens_per_round"] == pytest.approx(tokens / rounds, abs=1e-4)


def test_states_without_a_greedy_answer_are_refused(tmp_path):
    writer = ShardWriter(tmp_path, MANIFEST)
    mask, states = torch.ones(5, dtype=torch.bool), torch.zeros(5, 64, dtype=torch.bfloat16)
    writer.add(Sequence(torch.arange(5), mask, states, 1, 0, 0.7))
    writer.flush()
    with pytest.raises(ValueError, match="no held-out greedy answer .*allowed"):
        greedy_answers(tmp_path, 1)
