"""Tuning tries every candidate once, survives what one of them does, and finds the fastest by the clock it is given."""

from __future__ import annotations

import json
import sys

import pytest
import torch

pytest.importorskip("triton")

import triton  # noqa: E402

from beagle_kernels.triton import configs  # noqa: E402
from bench import tuning  # noqa: E402
from bench.tuning import Shape, Trial  # noqa: E402

SHAPES = {"tiny": [[Shape(torch.float16, 64, 8, (2, 1), (1, 40, 3), (1, 2, 3))], [Shape(torch.float32, 64, 8, (2, 1))]]}


def cost(config: configs.Config, kernel: str) -> float:
    """A time that no two candidates share, and that has another winner for each kernel."""
    digits = "-".join(map(str, [kernel, *config]))
    return 1.0 + sum(ord(letter) * (index + 7) % 101 for index, letter in enumerate(digits)) + config.block_m * 1e-3


class Stubs:
    """Calls that launch nothing: one notes under which tiles of its kernels it ran, one kernel's tiles cannot run."""

    def __init__(self, monkeypatch):
        self.ran: list[tuple[str, configs.Config]] = []
        self.refuses = None
        monkeypatch.setattr(configs, "_tuned", {})
        monkeypatch.setattr(tuning, "STAGES", SHAPES)
        monkeypatch.setattr(tuning, "call_of", self.call_of)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(triton.testing, "do_bench", self.do_bench)

    def call_of(self, shape, kernel, device):
        def call() -> None:
            config = configs._tuned.get(tuning.key_of(shape, kernel, device)) or tuning.shipped(
                tuning.key_of(shape, kernel, device)
            )
            self.ran.append((kernel, config))
            if self.refuses is not None:
                self.refuses(kernel, config)

        return call

    def do_bench(self, run, **options) -> float:
        run()
        kernel, config = self.ran[-1]
        return cost(config, kernel)


@pytest.fixture
def stubs(monkeypatch) -> Stubs:
    return Stubs(monkeypatch)


def compiled_here(size: str, stage: int, device: str) -> dict:
    """As tuning.compile_stage, by three workers in this process."""
    return tuning.read_notes(notes_of(tuning.STAGES[size][stage], 3))


def notes_of(shapes: list[Shape], workers: int) -> list[str]:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        for worker in range(workers):
            share = tuning.share_of(tuning.trials(shapes, "cpu"), worker, workers)
            tuning.compile_share(share, "cpu", Path(folder) / str(worker))
        return [line for file in sorted(Path(folder).iterdir()) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("workers", [1, 5, 12])
@pytest.mark.parametrize("stage", tuning.STAGES["full"], ids=["16 bit", "32 bit"])
def test_every_candidate_is_in_one_share(stage, workers):
    found = tuning.trials(stage, "cpu")
    shares = [tuning.share_of(found, worker, workers) for worker in range(workers)]
    assert sorted(map(str, found)) == sorted(str(trial) for share in shares for trial in share)
    assert len(set(found)) == len(found) and max(map(len, shares)) - min(map(len, shares)) <= 1
    places = {(trial.kernel, trial.shape.head_size) for trial in found}
    assert places == {(kernel, width) for width in (64, 128) for kernel in tuning.kernels(stage[0])}
    for kernel, width in places if stage[0].dtype != torch.float32 else ():
        tried = {trial.config for trial in found if (trial.kernel, trial.shape.head_size) == (kernel, width)}
        assert tried >= set(configs.CANDIDATES[kernel][width])


def test_the_first_shape_is_that_of_the_headlines():
    ((shape,),) = tuning.STAGES["full" + tuning.FIRST]
    assert (shape.dtype, shape.head_size) == (torch.bfloat16, 128) and tuning.kernels(shape) == [*tuning.TIMED_BY]


def test_tiles_have_a_name():
    """Whatever their order; those that are the shipped ones count for nothing."""
    one, two = ({"kernel": name, "arch": 90, "head_size": 64, "dtype": "float16"} for name in ("tree", "block_dq"))
    tuned, same = {"config": [1, 2], "shipped": [2, 2]}, {"config": [1, 2], "shipped": [1, 2]}
    assert tuning.label([one | tuned, two | tuned]) == tuning.label([two | tuned, one | tuned])
    assert tuning.label([one | tuned, two | same]) == tuning.label([one | tuned]) != tuning.label([two | tuned])
    assert tuning.label([one | same]) is None and tuning.label([]) is None


def test_the_fastest_wins_and_is_written_at_once(stubs, monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "compile_stage", compiled_here)
    out, seen = tmp_path / "found.json", []
    monkeypatch.setattr("beagle_sd.files.write_json", lambda file, entries: seen.append((file, [*entries])))
    entries: list[dict] = []
    assert tuning.tune_all("tiny", "cpu", out, entries) == []
    assert [len(found) for _, found in seen] == [*range(1, len(entries) + 1)] and seen[-1] == (out, entries)
    assert [(entry["kernel"], entry["dtype"]) for entry in entries] == [
        *((kernel, "float16") for kernel in tuning.TIMED_BY),
        *((kernel, "float32") for kernel in tuning.BLOCK),
    ]
    for entry in entries:
        key = entry["kernel"], entry["arch"], entry["head_size"], getattr(torch, entry["dtype"])
        best = configs.Config(*entry["config"])
        assert configs._tuned.pop(key) == best
        tried = configs.candidates(*key)
        assert len(tried) > 2 and best == min(tried, key=lambda config: cost(config, key[0]))
        assert entry["shipped"] == list(tuning.shipped(key)) and entry["tuned_ms"] == cost(best, key[0])


ERRORS = [
    triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory"),
    triton.runtime.errors.PTXASError("Internal Triton PTX codegen error"),
    RuntimeError("PassManager::run failed"),
    triton.compiler.errors.CompilationError("", None, "no such tile"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_candidate_that_fails_is_noted_and_not_timed(stubs, monkeypatch, tmp_path, error):
    """Half of them fail, the fastest first."""
    monkeypatch.setattr(tuning, "compile_stage", compiled_here)

    def refuses(kernel, config):
        if config.warps == 8 and kernel not in tuning.TREE:
            raise error

    stubs.refuses = refuses
    small = configs.Config(32, 32, 4, 1)
    monkeypatch.setattr(configs, "choose", lambda *key, tma=False: configs._tuned.get(key, small))
    entries: list[dict] = []
    assert tuning.tune_all("tiny", "cpu", tmp_path / "found.json", entries) == []
    assert len(entries) == 8 and all(entry["config"][2] == 4 for entry in entries if entry["kernel"] in tuning.BLOCK)
    refused = entries[0]["refused"]
    assert refused and all(type(error).__name__ in why for why in refused.values())
    assert all(shape.split(" x ")[2] == "8" for shape in refused)


def test_a_kernel_that_cannot_be_tuned_leaves_the_others_their_turn(stubs, monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "compile_stage", lambda size, stage, device: {})

    def refuses(kernel, config):
        if kernel == "block_dq":
            raise RuntimeError("nothing runs")

    stubs.refuses = refuses
    out = tmp_path / "found.json"
    failed = tuning.tune_all("tiny", "cpu", out, [])
    assert len(failed) == 2 and all("block_dq" in why and "nothing runs" in why for why in failed)
    assert [entry["kernel"] for entry in json.loads(out.read_text())] == [
        "block_forward",
        "block_dkv",
        "tree",
        "tree_few",
        "block_forward",
        "block_dkv",
    ]


def test_what_was_not_compiled_in_time_is_not_timed(stubs, monkeypatch):
    (shape,) = SHAPES["tiny"][0]
    tried = {config: None for config in configs.candidates(*tuning.key_of(shape, "tree", "cpu"))[:2]}
    tuning.winner(shape, "tree", tried, "cpu")
    assert {config for _, config in stubs.ran} == set(tried)


def test_tuning_goes_on(stubs, monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "compile_stage", compiled_here)
    all_of_it: list[dict] = []
    tuning.tune_all("tiny", "cpu", None, all_of_it)
    configs._tuned.clear()
    kept, stubs.ran = [*all_of_it[:6]], []
    tuning.tune_all("tiny", "cpu", tmp_path / "found.json", kept)
    assert kept == all_of_it and {kernel for kernel, _ in stubs.ran} == {"block_dq", "block_dkv", "block_forward"}
    assert configs._tuned[("block_forward", 90, 64, torch.float16)] == configs.Config(*all_of_it[0]["config"])


def test_a_lost_context_is_left_by_a_new_process(stubs, monkeypatch, tmp_path):
    """It goes on after the candidate that lost it."""

    class Replaced(BaseException):
        pass

    def execv(program, arguments):
        raise Replaced(arguments)

    def refuses(kernel, config):
        raise RuntimeError("an illegal memory access was encountered")

    shape = Shape(torch.float16, 64, 8, (2, 1))
    share = [Trial(shape, "block_dq", configs.Config(64, 32, 4, stages)) for stages in (1, 2, 3)]
    stubs.refuses = refuses
    monkeypatch.setattr(tuning.os, "execv", execv)
    monkeypatch.setattr(tuning, "context_is_lost", lambda: True)
    monkeypatch.setattr(configs, "architecture", lambda device: 90)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for number in (1, 2, 3):
        with pytest.raises(Replaced) as replaced:
            tuning.compile_share(share, "cuda", tmp_path / "notes")
        assert replaced.value.args[0][:3] == [sys.executable, "-m", "bench.tuning"]
        assert len((tmp_path / "notes").read_text().splitlines()) == number == len(stubs.ran)
    tuning.compile_share(share, "cuda", tmp_path / "notes")
    assert [config.stages for _, config in stubs.ran] == [1, 2, 3] and configs._tuned == {}


def test_tuned_tiles_are_used(monkeypatch):
    monkeypatch.setattr(configs, "_tuned", {})
    entry = {"kernel": "tree", "arch": 90, "head_size": 128, "dtype": "bfloat16", "config": [64, 32, 4, 2]}
    tuning.use([entry])
    assert configs.choose("tree", 90, 128, torch.bfloat16) == configs.Config(64, 32, 4, 2)


def test_few_rows_and_many_are_tuned_apart():
    """On shapes whose rows are of the kind that they are tuned for."""
    from beagle_kernels.triton.tree_splits import kind_of

    for shape in (shape for stages in tuning.STAGES.values() for stage in stages for shape in stage):
        for kernel in set(tuning.kernels(shape)) & set(tuning.TREE):
            assert kind_of(getattr(shape, kernel)[1] * shape.heads[0] // shape.heads[1]) == kernel
