"""A GPU's figures: rows outlive what is killed, say their tiles, are kept or measured again, and are shown in lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from beagle_sd.files import write_json
from bench import processes, tuning
from bench.__main__ import is_complete, rows_of
from bench.__main__ import main as bench_main
from bench.gpu import check as gpu_check
from bench.gpu import figures
from bench.registry import Case

TUNED = {"kernel": "tree", "arch": 90, "head_size": 128, "dtype": "bfloat16", "config": [64, 32, 4, 2], "shipped": [1]}


def test_rows_say_their_tiles(tmp_path, monkeypatch):
    """Shipped or tuned; a step that is stopped with tuned ones can have rows of both."""
    row, commands = {"group": "g", "peer": "beagle", "p50": 2.0}, []
    rows = [row]

    def run(command, seconds, log, **variables):
        commands.append(command)
        Path(command[command.index("--json") + 1]).write_text(json.dumps(rows))
        return {"status": "passed", "seconds": 1.0}

    monkeypatch.setattr(gpu_check, "run", run)
    steps = gpu_check.Steps(True, {"steps": {}}, tmp_path)
    assert steps.bench("tree_attention", 9)["rows"] == [row | {"tiles": "shipped"}]
    assert steps.ours("verify_tree", 9)["rows"] == [row] and commands[-1][-1] == "--without-peers"
    write_json(tmp_path / "tune.json", [TUNED])
    rows.append(row | {"tiles": tuning.label([TUNED])})
    done = steps.bench("tree_attention", 9)
    assert done["tiles"] == done["rows"][1]["tiles"] == tuning.label([TUNED]) != "shipped"
    assert done["rows"][0]["tiles"] == "shipped"
    assert json.loads(Path(commands[-1][commands[-1].index("--tuned") + 1]).read_text()) == [TUNED]


def test_rows_outlive_a_benchmark_that_is_killed(tmp_path, monkeypatch):
    """Its file is whole after each row; a step that is stopped gives them, and the next run goes on from them."""
    row = {"group": "g", "peer": "beagle", "p50": 2.0, "byte/s": 5.0}
    code = "import json, sys, time; open({!r}, 'w').write(json.dumps([{!r}])); time.sleep(60)"
    steps = gpu_check.Steps(False, {"steps": {}, "limits": {"byte/s": 10.0}}, tmp_path)

    def run(command, seconds, log, **variables):
        assert command[command.index("--json") + 1 :] == [str(tmp_path / "bench-verify_tree.json"), "--go-on"]
        return processes.run([sys.executable, "-c", code.format(command[-2], row)], 1, log)

    monkeypatch.setattr(gpu_check, "run", run)
    done = steps.bench("verify_tree", 150)
    assert done["status"] == "stopped after 1 s" and done["counts"] == {"numbers": 1}
    assert done["rows"] == [row | {"share of copy": 0.5}]


def a_case(name: str, ran: list[str], wrong: bool = False) -> Case:
    def check() -> None:
        ran.append(name)
        assert not wrong, "wrong"

    return Case(name, {"beagle": lambda: None, "peer": lambda: None}, check, rounds=1)


def test_a_benchmark_goes_on(tmp_path, monkeypatch):
    """Cases that are whole are kept; one without a peer's row, one with an error, and one of another file are not."""
    from bench.ops import bench_verify_tree

    ran: list[str] = []
    broken = a_case("broken", ran, wrong=True)
    monkeypatch.setattr(bench_verify_tree, "cases", lambda *args: [a_case("one", ran), broken, a_case("two", ran)])
    file = tmp_path / "rows.json"
    assert bench_main(["verify_tree", "--size", "tiny", "--json", str(file)]) == 1 and ran == ["one", "broken", "two"]
    rows = json.loads(file.read_text())
    assert [(row["group"], row["peer"]) for row in rows if "error" not in row] == [
        ("one", "beagle"),
        ("one", "peer"),
        ("two", "beagle"),
        ("two", "peer"),
    ]
    write_json(file, rows[:-1])
    ran.clear()
    broken.check = lambda: ran.append("mended")
    assert bench_main(["verify_tree", "--size", "tiny", "--json", str(file), "--go-on"]) == 0
    assert ran == ["mended", "two"] and all("error" not in row for row in json.loads(file.read_text()))
    assert len(json.loads(file.read_text())) == 6 and [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_ours_alone_then_all(tmp_path, monkeypatch):
    """The row that is measured again stays until the new one is there; then other tiles' rows of the case go."""
    from bench.ops import bench_verify_tree

    ran: list[str] = []
    one = a_case("one", ran)
    one.peers = {"beagle": lambda: None, "amax": lambda: None, "peer": lambda: None}
    one.bounds = ("amax",)
    monkeypatch.setattr(bench_verify_tree, "cases", lambda *args: [one])
    file, tiles = tmp_path / "rows.json", tmp_path / "tiles.json"
    command = ["verify_tree", "--size", "tiny", "--json", str(file), "--go-on"]

    def peers() -> list[str]:
        return [row["peer"] for row in json.loads(file.read_text())]

    assert bench_main([*command, "--without-peers"]) == 0 and peers() == ["beagle", "amax"]
    assert bench_main([*command, "--without-peers"]) == 0 and ran == ["one"]
    before = json.loads(file.read_text())
    one.check = lambda: ran.append(json.loads(file.read_text()) == before)
    assert bench_main([*command]) == 0 and peers() == ["beagle", "amax", "peer"] and ran == ["one", True]
    assert json.loads(file.read_text())[0] != before[0]
    write_json(tiles, [TUNED])
    before = json.loads(file.read_text())
    one.check = lambda: ran.append(json.loads(file.read_text()) == before)
    monkeypatch.setattr("bench.tuning.use", lambda entries: None)
    for _ in range(2):
        assert bench_main([*command, "--tuned", str(tiles), "--without-peers"]) == 0
    assert peers() == ["beagle", "amax"] and ran[2:] == [True]
    assert {row["tiles"] for row in json.loads(file.read_text())} == {tuning.label([TUNED])}


def test_figures_are_a_line_a_case():
    rows = [
        {"group": "op of 8", "peer": "beagle", "p50": 2e-3, "share of copy": 0.5, "tiles": "shipped"},
        {"group": "op of 8", "peer": "theirs", "p50": 3e-3},
        {"group": "op of 8", "peer": "copy", "p50": 1e-3, "bound": True},
        {"group": "op of 16", "peer": "beagle", "p50": 1.0, "round_ms": 9.5, "tokens_per_round": 3.0},
        {"group": "op of 32", "peer": "beagle", "error": "ValueError: " + 99 * "wrong "},
        {"group": "op of 64", "peer": "theirs", "skipped": "not here"},
    ]
    found = figures.lines(rows)
    assert found[:2] == [
        "  8: 2,000.0 us, 50% copy, shipped, [copy 0.50x], theirs 1.50x",
        "  16: 1,000,000.0 us, 9.50 ms a round of 3.00",
    ]
    assert "refused: ValueError" in found[2] and "no number" in found[3] and len(found) == 4
    assert all(len(line) <= figures.WIDEST for line in found) and figures.lines([]) == []


def test_a_case_that_cannot_be_made_is_one_file_s_loss(monkeypatch):
    from bench.ops import bench_verify_tree

    def cases(*args):
        yield a_case("one", [])
        raise MemoryError("too large")

    monkeypatch.setattr(bench_verify_tree, "cases", cases)
    rows = list(rows_of("verify_tree", "cpu", "tiny", results := []))
    assert [row["group"] for row in rows] == ["one", "one", "verify_tree"] and "MemoryError" in rows[-1]["error"]
    assert not results and is_complete(a_case("one", []), rows) and not is_complete(a_case("two", []), rows)


def test_shares_of_the_limits():
    shares = gpu_check.with_shares({"byte/s": 4.0}, {"byte/s": 8.0, "flop/s": 1.0})
    assert shares == {"byte/s": 4.0, "share of copy": 0.5}
