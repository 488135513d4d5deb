"""What a GPU's run gave, as bars and as tables: each figure that is asked for, from made-up rows."""

from __future__ import annotations

import importlib
import json

import pytest

from bench.__main__ import MODULES
from bench.report import bars, gpu, pages, results, tables

HEADS = "32/8 x 128"
LIMITS = {"byte/s": 4e12, "flop/s": 7e14}


def rows_of(group: str, at: dict, seconds: dict[str, float], bounds: tuple[str, ...] = (), **ours) -> list[dict]:
    """Made up: no machine gave them."""
    rows = [{"group": group, "peer": peer, "at": at, "p50": p50} for peer, p50 in seconds.items()]
    return [row | {"bound": row["peer"] in bounds} | (ours if row["peer"] == "beagle" else {}) for row in rows]


def block(rows: int) -> list[dict]:
    at, made = {"rows": rows, "heads": HEADS}, []
    for direction, rate in (("forward", 5e14), ("backward", 2.5e14)):
        name = f"block_attention {direction} {rows} x {HEADS} bfloat16"
        made += rows_of(name, at, {"beagle": 1e-3, "sdpa causal": 8e-4}, ("sdpa causal",), **{"flop/s": rate})
        made += rows_of(f"{name}, reach 256", at | {"reach": 256}, {"beagle": 1e-4}, **{"flop/s": 1e12})
    return made


def beside_flex(rows: int, **seconds: float) -> list[dict]:
    """A case for each set of options; ours takes 1 ms in all."""
    made = []
    for options, p50 in seconds.items():
        name = f"block_attention forward {rows} x {HEADS} bfloat16, beside FlexAttention ({options})"
        case = rows_of(name, {"rows": rows, "heads": HEADS}, {"beagle": 1e-3, "flex": p50}, **{"flop/s": 1e12})
        made += [row | ({"options": options} if row["peer"] == "flex" else {}) for row in case]
    return made


def record() -> dict:
    tree = {"batch": 8, "keys": 32768, "heads": HEADS}
    logits = {"batch": 8, "nodes": 64, "vocabulary": 128256, "type": "bfloat16"}
    loss = {"rows": 8192, "width": 4096, "vocabulary": 128256, "type": "bfloat16"}
    step = {"rows": 32768, "products": "bf16"}
    a_round = {"model": "8B random bfloat16", "batch": 1}
    shares = {"share_beside_target": 0.2, "share_beside_layers": 0.25, "round_ms": 7.5, "target_layers_ms": 5.5}
    found = {
        "bench:block_attention": block(8192) + block(16384),
        "bench:flex_attention": beside_flex(16384, slow=2e-3, fast=1.3e-3),
        "bench:tree_attention": rows_of(
            "tree_attention 8 x 16 nodes", tree | {"nodes": 16}, {"beagle": 1e-3}, **{"byte/s": 3e12}
        )
        + rows_of("tree_attention 8 x 64 nodes", tree | {"nodes": 64}, {"beagle": 1e-3}, **{"flop/s": 3e14}),
        "bench:verify_tree": rows_of("verify_tree greedy 8 x 64", logits, {"beagle": 1e-4}, **{"share of copy": 0.51})
        + [{"group": "verify_tree top-p 8 x 64", "peer": "beagle", "error": "AssertionError: wrong"}],
        "bench:distill_loss": rows_of(
            "distill_loss 8192 x 4096", loss, {"beagle": 0.1, "its products alone": 0.09}, ("its products alone",)
        ),
        "bench:training_step": rows_of(
            "training step, k = 5, bf16 autocast, 32768 rows", step, {"beagle": 1.3, "stage 1": 1.0}, ("stage 1",)
        ),
        "round": rows_of(
            "decode round, replayed", a_round, {"beagle": 1.0, "beagle plain": 2.9, "target.generate": 5.0},
            tokens_per_round=4.1, target_head_ms=0.5, **shares,
        ),
    }  # fmt: skip
    steps = {name: {"rows": rows} for name, rows in found.items()}
    return {"environment": {"gpu": "none: made up"}, "limits": LIMITS, "steps": steps}


def said(what: str, lines: list[str]) -> str:
    """A line without what it is about, its blanks as one."""
    (line,) = [line for line in lines if line.startswith(what + "  ")]
    return " ".join(line.removeprefix(what).split())


WANTED = {
    "block_attention forward, 8192 rows, TFLOP/s": "500.0 at least 450.0 met",
    "block_attention forward, 32768 rows, TFLOP/s": "not measured at least 450.0",
    "block_attention backward, 16384 rows, TFLOP/s": "250.0 at least 300.0 NOT MET",
    "block_attention forward, 16384 rows, x tuned FlexAttention": "1.300 at least 1.200 met fast, best of 2",
    "block_attention backward, 16384 rows, x tuned FlexAttention": "not measured at least 1.200",
    "tree_attention, 16 nodes, 32k keys, of copy": "75.0% at least 80.0% NOT MET",
    "tree_attention, 64 nodes, 32k keys, TFLOP/s": "300.0 at least 350.0 NOT MET",
    "verify_tree greedy, of copy": "51.0% at least 80.0% NOT MET",
    "verify_tree top-p, of copy": "not measured at least 40.0%",
    "distill_loss, 8192 x 4096, its products' time over ours": "90.0% at least 85.0% met",
    "training step, stage 2 over stage 1": "1.300 at most 1.250 NOT MET",
    "round, all but the target's forward": "20.0% at most 22.0% met 7.50 ms a round",
    "round, all but its layers": "25.0% no bar 7.50 ms a round",
    "round, x plain decoding in the same loop": "2.900 at least 2.800 met",
    "round, x target.generate": "5.000 no bar",
}


def test_every_figure_that_is_asked_for(tmp_path, capsys):
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(record()))
    assert pages.main(["--bars", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {what: said(what, lines) for what in WANTED} == WANTED
    assert lines[0] == "refused: verify_tree top-p 8 x 64: AssertionError: wrong"
    assert {bar.what for bar in bars.BARS} >= WANTED.keys() and len(lines) == 1 + len(bars.BARS)


def test_rows_alone_will_do_and_the_fuller_of_two_runs_counts():
    """As with --without-peers and then with them: a ratio is of one run."""
    rows = rows_of(
        "decode round, replayed", {"model": "8B random bfloat16", "batch": 1}, {"beagle": 1.0, "beagle plain": 3.0}
    )
    assert said("round, x plain decoding in the same loop", bars.lines(rows)) == "3.000 at least 2.800 met"
    two = {"steps": {"full": {"rows": rows}, "ours": {"rows": [rows[0] | {"p50": 0.5}]}}}
    assert said("round, x plain decoding in the same loop", bars.lines(two)) == "3.000 at least 2.800 met"


def test_the_sizes_by_which_rows_are_found_are_those_that_cases_give():
    """Another name for one would leave a figure unmeasured, and nobody would know before the GPU's half hour."""
    made = []
    for name in ("block_attention", "tree_attention", "verify_tree", "distill_loss", "training_step", "round"):
        for case in importlib.import_module(MODULES[name]).cases("cpu", "tiny"):
            made += [{"group": case.name, "peer": peer, "at": case.at, "p50": 1.0} | case.work for peer in case.peers]
            made[-len(case.peers)] |= {f"{unit}/s": amount for unit, amount in case.work.items()}
    found = bars.Found({"limits": LIMITS, "steps": {"all": {"rows": made}}})
    heads = "4/2 x 16"
    at = {"rows": 70, "heads": heads, "reach": None}
    tree = bars.TREE | {"batch": 2, "keys": 70, "heads": heads, "nodes": 6}
    logits = bars.LOGITS | {"batch": 1, "nodes": 9, "vocabulary": 500, "type": "float32"}
    loss = dict(zip(bars.LOSSES[0], (64, 32))) | {"type": "float32"}
    a_round = bars.ROUND | {"model": "tiny random float32", "batch": 2}
    for figure in (
        bars.teraflops("block_attention forward", **at),
        bars.teraflops("block_attention backward", **at),
        bars.share_of_copy("tree_attention", **tree),
        bars.teraflops("tree_attention", **tree),
        bars.share_of_copy("verify_tree greedy", **logits),
        bars.share_of_copy("verify_tree sampled", **logits),
        bars.times("distill_loss", "its products alone", "beagle", **loss),
        bars.times("training step, k", "beagle", "stage 1", products="bf16"),
        bars.times("decode round", "beagle plain", "beagle", **a_round),
        bars.times("decode round", "target.generate", "beagle", **a_round),
    ):
        assert figure(found) is not None
    assert found.row("block_attention forward", rows=90, reach=20) and not found.row(
        "block_attention forward", rows=90, reach=None
    )


def test_the_tables_have_them_too(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert "| an 8B-shaped one | not measured |" in gpu.rounds()
    made = record()
    (tmp_path / "gpu.json").write_text(json.dumps(made))
    table = tables.gpu()
    assert f"| block_attention forward 8192 x {HEADS} bfloat16 | 1,000.0 | 500.0 |" in table
    assert "| sdpa causal | 0.80x | sdpa causal 800 (80%) |" in table
    assert "its products alone 90,000 (90%) |" in table
    assert "stage 1 1,000,000 (77%) |" in table and "| verify_tree top-p 8 x 64 | refused |" in table
    assert "| verify_tree greedy 8 x 64 | 100.0 |  | 51% |  | none was measured |" in table
    rows = made["steps"]["round"]["rows"]
    assert gpu.rounds().splitlines()[2] == (
        "| 8B random bfloat16, batch 1 | 4.10 | 7.50 | 5.50 | 0.50 | 20.0% | 25.0% | 2.90 | 5.00 |"
    )
    del rows[2]
    (tmp_path / "gpu.json").write_text(json.dumps(made))
    assert gpu.rounds().splitlines()[2].endswith("| 2.90 | not measured |")


@pytest.mark.parametrize("bar", bars.BARS, ids=lambda bar: bar.what)
def test_a_figure_without_its_rows_is_not_measured(bar):
    assert bar.figure(bars.Found([])) is None and bar.figure(bars.Found({"steps": {}})) is None
