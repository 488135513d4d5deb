"""The tables in the README and the card are those of the result files, and what is slower than a peer is explained."""

import json
import re

import pytest

from bench.report import pages, paper, plots, results, tables, tiles


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda path: path.parent.name)
def test_pages_are_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    assert pages.filled(text) == text, "run python -m bench.report"


def test_an_edited_figure_is_replaced():
    page = "before\n<!-- acceptance -->\n| 9.99 |\n<!-- end -->\nafter"
    assert pages.filled(page) == f"before\n<!-- acceptance -->\n{tables.acceptance()}\n<!-- end -->\nafter"


def test_an_unknown_table_is_named():
    with pytest.raises(ValueError, match="nonsense.*allowed: acceptance"):
        pages.filled("<!-- nonsense -->\n<!-- end -->")


def test_what_was_not_measured_says_so(tmp_path, monkeypatch):
    row = {
        "depth": 4,
        "branch": 1,
        "num_nodes": 5,
        "temperature": 0.0,
        "tokens_per_round": 1.5,
        "acceptance_by_depth": [0.5, 0.25],
    }
    (tmp_path / "acceptance.json").write_text(json.dumps({"shapes": [row]}))
    monkeypatch.setattr(results, "BUNDLED", tmp_path)
    assert "| chain of 4 | 1.50 | not measured | 0.50 0.25 |" in tables.acceptance()
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert tables.acceptance_elsewhere() == "not measured"
    (tmp_path / "acceptance-gsm8k.json").write_text(json.dumps({"prompts": "gsm8k", "shapes": [row]}))
    assert "| gsm8k | chain of 4 | 1.50 | not measured | 0.50 0.25 |" in tables.acceptance_elsewhere()


def test_every_op_row_names_a_peer_and_every_slower_one_a_reason():
    rows = json.loads((results.RESULTS / "cpu-ops.json").read_text(encoding="utf-8"))
    page = (results.ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    (reasons,) = re.findall(r"What stands in the way.*?(?=\n## )", page, flags=re.DOTALL)
    for group, members in results.grouped(rows).items():
        ours, _, time = results.against_fastest(members)
        op = " ".join(group.split(" ")[:1])
        assert time >= ours or f"`{op}`" in reasons, f"{group}: ratio {time / ours:.2f}, and no sentence names `{op}`"


def test_a_group_without_a_peer_is_no_row():
    alone = [row("beagle", 1.0, group="an op")]
    with pytest.raises(ValueError, match="an op has no peer"):
        results.against_fastest(alone)


def test_runs_of_several_seeds_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "FOLDER", tmp_path)
    head = "run,seed,epochs,tokens_seen,peak_bytes,chain,chain_error,tree,tree_error,depth_0,depth_1"
    many = ["a,0,2,1000,2e6,1.5,0.1,2.0,0.1,.5,.3", "b,0,2,1000,1e6,1.4,0.1,1.9,0.1,.5,.3"]
    (tmp_path / "losses.csv").write_text("\n".join([head, *many, "a,1,2,1000,4e6,1.7,0.1,2.4,0.1,.6,.3"]))
    a, b = paper.ablation("losses").splitlines()[2:]
    assert a == "| a | 0, 1 | 1,000 | 1.600 (1.500 to 1.700) | 2.200 (2.000 to 2.400) | .55 .30 | 3 |"
    assert b == "| b | 0 | 1,000 | 1.400 ± 0.100 | 1.900 ± 0.100 | .50 .30 | 1 |"


def row(peer: str, seconds: float, **more) -> dict:
    return {"group": "g", **more, "peer": peer, "p50": seconds}


def test_the_gpu_s_tables_come_from_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert "| every op | not measured |" in tables.gpu() and "8B-shaped random bfloat16" in paper.table_1()
    ops = [row("beagle", 1e-3, **{"share of copy": 0.8}), row("sdpa", 2e-3)]
    ops.append({"group": "g", "peer": "absent", "skipped": "why"})
    at = {"at": {"model": "8B", "batch": 1}, "token/s": 40.0, "tokens_per_round": 4.1, "acceptance": "replayed"}
    rounds = [row("beagle", 1.0, **at, peak_bytes=17e9), row("target.generate", 3.0, **at | {"acceptance": "none"})]
    steps = {"bench:x": {"rows": ops}, "round": {"rows": rounds}}
    (tmp_path / "gpu.json").write_text(json.dumps({"environment": {"gpu": "a GPU"}, "steps": steps}))
    assert "| g | 1,000.0 |  | 80% |  | sdpa | 2.00x |  |" in tables.gpu()
    assert "| a GPU | 8B, batch 1 | beagle, replayed acceptance | 40.0 | 3.00 | 4.1 | 17.00 |" in paper.table_1()


def test_a_ratio_of_two_clocks_says_so_and_a_stopped_run_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    ops = [row("beagle", 1e-3, clock="graph replay"), row("sdpa", 2e-3, clock="events")]
    ops += [row("beagle", 1e-3, group="h", clock="events"), row("sdpa", 2e-3, group="h", clock="events")]
    ops.append(row("beagle", 1e-3, group="stopped", clock="events"))
    at = {"at": {"model": "8B", "batch": 1}, "token/s": 40.0, "tokens_per_round": 4.1, "acceptance": "replayed"}
    steps = {"bench:x": {"rows": ops}, "round": {"rows": [row("beagle", 1.0, **at)]}}
    (tmp_path / "gpu.json").write_text(json.dumps({"environment": {"gpu": "a GPU"}, "steps": steps}))
    assert "| g | 1,000.0 |  |  |  | sdpa (by events, ours by graph replay) | 2.00x |  |" in tables.gpu()
    assert "| h | 1,000.0 |  |  |  | sdpa | 2.00x |  |" in tables.gpu()
    assert "| stopped | 1,000.0 |  |  |  | none was measured |  |  |" in tables.gpu()
    assert "beagle, replayed acceptance | 40.0 | not measured | 4.1 |" in paper.table_1()


def test_tiles_of_float32_are_a_line_of_their_own():
    entry = {
        "kernel": "block_dq",
        "arch": 90,
        "head_size": 64,
        "dtype": "bfloat16",
        "config": [128, 64, 8, 2, True],
        "timed": "backward",
        "shipped_ms": 3.0,
        "tuned_ms": 2.0,
    }
    wide = entry | {"dtype": "float32", "config": [32, 32, 4, 1, False], "tuned_ms": 3.0}
    assert tiles.lines_of([wide, entry]).splitlines() == [
        '"block_dq": 90: {64: Config(128, 64, 8, 2, True)},  # backward faster by 64: 1.50x',
        '"block_dq": 90: {64: Config(32, 32, 4, 1, False)},  # backward, float32 faster by 64: 1.00x',
    ]


def test_a_panel_is_the_sizes_that_differ_in_one(tmp_path):
    rows = [
        row(peer, seconds * keys, series="tree_attention", at={"batch": batch, "keys": keys})
        for peer, seconds in (("beagle", 1e-6), ("sdpa mask", 2e-6))
        for keys in (100, 200, 400)
        for batch in (1, 2)
        if batch == 1 or keys != 400
    ]
    fixed, lines = plots.panel(list(plots.with_sizes(rows)), "tree_attention", "keys")
    assert fixed == "batch 1" and [x for x, _ in lines["beagle"]] == [100, 200, 400]
    assert lines["beagle"][2][1] == pytest.approx(0.4)
    assert plots.panel(list(plots.with_sizes(rows)), "tree_attention", "batch") == ("", {})
    (path,) = plots.draw("cpu", rows, tmp_path)
    assert path.name == "cpu-tree-attention.svg" and "sdpa mask" in path.read_text(encoding="utf-8")
    before = path.read_bytes()
    assert plots.draw("cpu", rows, tmp_path)[0].read_bytes() == before
