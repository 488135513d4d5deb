"""What stands beside ours, and when: bounds without peers, FlexAttention's options tried once, the loss's products, the
target's part of a round, the step in bf16, and the shapes with a bar before all others."""

from __future__ import annotations

import json

import pytest
import torch

from beagle_kernels import Sampling
from beagle_sd.decoding.graph import RoundGraph
from beagle_sd.models.head import head_of
from bench.__main__ import main, rows_of
from bench.loops import bench_training_step
from bench.loops.target_time import TargetTime
from bench.ops import (
    bench_block_attention,
    bench_distill_loss,
    bench_tree_attention,
    bench_verify_tree,
)
from bench.peers import bench_flex_attention, flex
from bench.registry import Case


def a_case(ran: list[str]) -> Case:
    peers = {name: lambda name=name: ran.append(name) for name in ("beagle", "a bound", "a peer")}
    return Case("one", peers, lambda: None, bounds=("a bound",), rounds=1)


def test_a_run_without_peers_and_one_that_adds_them(tmp_path, monkeypatch, capsys):
    """The second measures ours again, and a third that is to have no peers repeats nothing."""
    ran: list[str] = []
    monkeypatch.setattr(bench_verify_tree, "cases", lambda *args: [a_case(ran)])
    monkeypatch.setattr(bench_flex_attention, "cases", lambda *args: pytest.fail("there is nothing but its peer"))
    file = tmp_path / "rows.json"
    command = ["verify_tree", "flex_attention", "--size", "tiny", "--json", str(file), "--go-on"]
    assert main([*command, "--without-peers"]) == 0 and "not compared" not in capsys.readouterr().out
    alone = json.loads(file.read_text())
    assert [row["peer"] for row in alone] == ["beagle", "a bound"] and "a peer" not in ran
    ran.clear()
    assert main([command[0], *command[2:]]) == 0
    rows = json.loads(file.read_text())
    assert [row["peer"] for row in rows] == ["beagle", "a bound", "a peer"] and {"beagle", "a peer"} <= set(ran)
    assert rows[0]["p50"] != alone[0]["p50"]
    ran.clear()
    assert main([*command, "--without-peers"]) == 0 and not ran
    with pytest.raises(SystemExit):
        main(["--base", "main", "--without-peers"])


def test_flex_s_options_are_tried_once():
    """A case each, ours beside every one; the other sizes take the fastest of the rows that are there."""
    known: list[dict] = []
    for number, case in enumerate(bench_flex_attention.cases("cpu", "tiny", known)):
        assert next(iter(case.peers)) == "beagle"
        for peer in case.peers:  # as if measured; the third of the options is the fastest
            known.append({"group": case.name, "peer": peer, "p50": 1.0 + abs(number - 2)} | case.notes(peer))
    count = len(flex.TRIED[False]) + len(flex.TRIED[True])
    assert len({row["group"] for row in known}) == count + 2 + 2
    forward = "block_attention forward 40 x 4/2 x 16 float32, beside FlexAttention"
    (tuned,) = [row for row in known if row["peer"] == "flex tuned" and row["group"] == forward]
    assert tuned["options"] == list(flex.TRIED[False])[2]
    name = forward.partition(",")[0].replace(" 40 ", " 70 ")
    assert bench_flex_attention.fastest(known, name, False) == tuned["options"]
    assert bench_flex_attention.fastest([], name, False) == flex.DEFAULT
    old = [{"group": f"{name}, beside FlexAttention (x)", "peer": "flex", "options": "x", "p50": 0.1}]
    assert bench_flex_attention.fastest(old, name, False) == flex.DEFAULT


def test_a_stopped_flex_goes_on_where_it_was(monkeypatch):
    """Rows of whole cases stay, and their options are not compiled again."""
    made: list[object] = []
    monkeypatch.setattr(flex, "attention", lambda options=None: made.append(options) or (lambda q, k, v, mask: q))
    results: list[dict] = []
    for row in rows_of("flex_attention", "cpu", "tiny", results):
        results.append(row)
        if len({row["group"] for row in results}) == 3:
            break
    kept = [row for row in results if row["group"] != results[-1]["group"]]
    again = list(rows_of("flex_attention", "cpu", "tiny", results := list(results[:-1])))
    assert kept and all(row in results for row in kept)
    assert {row["group"] for row in again}.isdisjoint(row["group"] for row in kept)


def test_the_loss_beside_its_products(monkeypatch):
    """Products of the same shapes as the op makes itself, chunk by chunk; torch.compile comes after all others."""
    (case,) = bench_distill_loss.cases(size="tiny")
    assert list(case.peers)[:2] == ["beagle", "its products alone"] and list(case.peers)[-1] == "torch.compile"
    assert case.bounds == ("its products alone",)
    inputs = [torch.randn(10, 8), torch.randn(10, 8), torch.randn(50, 8), torch.ones(10)]
    monkeypatch.setattr(bench_distill_loss.on_cpu, "BUDGET", 2 * 4 * 50 * 4)  # four rows
    assert bench_distill_loss.rows_at_once(10, 50, torch.float32, "cpu") == 4
    seen: dict[str, int] = {}
    for name, run in (("ours", bench_distill_loss.distill_loss), ("bound", bench_distill_loss.products)):
        with torch.profiler.profile(record_shapes=True) as trace:
            inputs[0].requires_grad_(name == "ours")
            run(*inputs)
        shapes = [event.input_shapes[:2] for event in trace.events() if event.name == "aten::mm"]
        seen[name] = sorted(shapes)
    assert seen["ours"] == seen["bound"] and len(seen["ours"]) == 2 * 3


def test_the_target_s_part_is_its_layers_and_its_head(monkeypatch):
    """On a GPU each replay is read, and the median is over rounds: here on events that keep made-up time."""
    from bench.loops.random_models import random_model

    model, _ = random_model("tiny", "cpu")
    timer = TargetTime(model, 3)
    with timer.watching(), torch.no_grad():
        for tokens in (3, 3, 1):
            states = model.model(input_ids=torch.zeros(2, tokens, dtype=torch.int64))[0]
            head_of(model)(states)
    assert [len(found) for found in timer.seconds.values()] == [2, 2]
    found = timer.medians()
    assert 0 < found["head"] < found["all"] and found["layers"] < found["all"]
    calls = [len(found) for found in timer.seconds.values()]
    with torch.no_grad():
        head_of(model)(states.expand(2, 3, -1))
    assert [len(found) for found in timer.seconds.values()] == calls, "it still watches"

    times = iter([0, 5, 10, 11, 0, 7, 10, 12, 0, 6, 10, 19])

    class Event:
        def __init__(self, **options):
            self.at = 0.0

        def elapsed_time(self, other):
            start, end = next(times), next(times)
            return float(end - start)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(RoundGraph, "replay", lambda self: None)
    on_gpu = TargetTime(model, 3)
    on_gpu.on_gpu, on_gpu.events = True, {part: [Event(), Event()] for part in on_gpu.seconds}
    with pytest.raises(RuntimeError, match="no round of 3 tokens"):
        on_gpu.medians()
    with on_gpu.watching():
        for _ in range(3):
            RoundGraph.replay(object.__new__(RoundGraph))
    found = on_gpu.medians()
    assert found == {"layers": pytest.approx(6e-3), "head": pytest.approx(2e-3), "all": pytest.approx(9e-3)}


def test_a_step_in_bf16_that_is_wrong_gets_no_number(monkeypatch):
    case = next(bench_training_step.cases(size="tiny"))
    assert case.name == "training step, k = 5, bf16 autocast, 180 rows" and case.bounds == ("stage 1",)
    case.check()
    right = bench_training_step.distill_loss

    def wrong(states, *args, **options):
        return right(states if states.dtype == torch.float32 else 1.2 * states, *args, **options)

    monkeypatch.setattr(bench_training_step, "distill_loss", wrong)
    with pytest.raises(AssertionError, match="in bf16"):
        case.check()


def test_the_shapes_with_a_bar_come_first():
    assert bench_verify_tree.FULL[0] == (8, 64, 128256)
    assert [shape[:3] for shape in bench_tree_attention.SHAPES["full"][:2]] == [(8, 16, 32768), (8, 64, 32768)]
    assert all(shape[2] < 2**17 for shape in bench_tree_attention.SHAPES["full"])
    assert [shape[0] for shape in bench_block_attention.SHAPES["full"][:3]] == [8192, 16384, 32768]
    assert bench_flex_attention.ROWS["full"] == (16384, 8192, 32768)
    tree = bench_verify_tree.trees(2, 5)
    logits = torch.randn(2, 5, 90)
    greedy = bench_verify_tree.of_logits(logits, tree, Sampling.of(2))
    assert list(greedy.peers)[:2] == ["beagle", "amax"] and list(greedy.peers)[-1] == "EAGLE-2 on the host"


def test_two_kinds_of_data_are_two_cases():
    """Of one name the second would count as done."""
    args = torch.randn(1, 5, 90), bench_verify_tree.trees(1, 5), Sampling.of(1, 0, 1.0)
    one, other = bench_verify_tree.of_logits(*args), bench_verify_tree.of_logits(*args, "normal random, deviation 3")
    assert other.name == one.name + ", deviation 3"
