"""`beagle-sd prepare --engine vllm` on SmolLM2 with vLLM itself: our loop's answers and states, also after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from closeness import close_as_eager

from beagle_sd.data.shards import Sequence, read_manifest, read_sequences, shard_paths, written_paths
from beagle_sd.models import smollm2
from beagle_sd.models.loading import load_target

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [
    ("Name three rivers in Europe and say where they end.",),
    ("Write a short poem about the sea.", "Now make it shorter."),
    ("Why is the sky blue?",),
    ("Name a fruit.", "Name another one, and its colour."),
    ("What is a prime number?", "Is 91 one? Explain."),
    ("Give me a recipe for pancakes.",),
    ("Who was Ada Lovelace?",),
    ("Explain recursion to a child.",),
    ("Sum up in one sentence: " + "The quick brown fox jumps over the lazy dog near the river bank. " * 24,),
    ("What is 17 times 23? Think step by step.",),
    ("List five animals that live in the sea.",),
    ("Tell me a joke.",),
    ("How do bees make honey?",),
    ("Write a function in Python that reverses a list.", "And one that sorts it.", "Thank you!"),
    ("What does a compiler do?",),
    ("Describe a sunset.",),
]
GREEDY = [index for index in range(len(PROMPTS)) if index % 4 in (0, 1)]
REGENERATE = ("--regenerate", "--max-new-tokens", "32", "--context", "448", "--batch", "4", "--dtype", "float32")
VLLM = ("--engine", "vllm")

pytestmark = pytest.mark.slow


def started(*arguments: object) -> subprocess.Popen:
    """`prepare` in small parts, as a session of its own."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "python")))
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "2",
        "VLLM_NO_USAGE_STATS": "1",
        **os.environ,
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "300",
    }
    script = Path(__file__).with_name("prepare_in_small_parts.py")
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def run(*arguments: object, code: int = 0) -> str:
    process = started(*arguments)
    said = process.communicate(timeout=900)[0]
    assert process.returncode == code, said
    return said


def interrupted(number: int, when: Callable[[], bool], *arguments: object) -> tuple[int, str]:
    """`prepare` that gets a signal as soon as `when` holds, as Ctrl-C gives it: with all of its processes; SIGKILL
    gets it alone. Its exit status and what it said; none of its processes is left."""
    process, until = started(*arguments), time.monotonic() + 600
    while not when():
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.05)
    until = time.monotonic() + 60
    if number == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, number)
    said = process.communicate(timeout=120)[0]
    while members(process.pid):
        assert time.monotonic() < until, f"processes are left: {members(process.pid)}"
        time.sleep(0.05)
    return process.returncode, said


def members(session: int) -> list[int]:
    """The processes of a session that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # ended just now
            continue
        if fields[0] != "Z" and int(fields[3]) == session:
            found.append(int(path.parent.name))
    return found


def sequences(folder: Path) -> dict[int, Sequence]:
    found = list(read_sequences(folder))
    by_index = {sequence.index: sequence for sequence in found}
    assert len(by_index) == len(found), "nothing twice"
    return by_index


def whole(sequence: Sequence) -> tuple:
    return [*sequence.tokens.tolist(), sequence.final_token], sequence.loss_mask.tolist(), sequence.temperature


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "prompts.jsonl"
    rows = [{"messages": [{"role": "user", "content": text} for text in turns]} for turns in PROMPTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def ours(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "own"
    run(source, out, *REGENERATE, "--device", "cpu")
    return out


@pytest.fixture(scope="module")
def theirs(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "vllm"
    said = run(source, out, *REGENERATE, *VLLM)
    assert f"{len(PROMPTS)} of {len(PROMPTS)} conversations" in said
    return out


@pytest.fixture(scope="module")
def exact() -> Callable[[torch.Tensor], torch.Tensor]:
    """The target's states of tokens [n], in fp64."""
    model = load_target(smollm2.NAME, dtype=torch.float64, device="cpu")[0]

    @torch.no_grad()
    def states(tokens: torch.Tensor) -> torch.Tensor:
        return model.model(tokens[None]).last_hidden_state[0]

    return states


def test_greedy_answers_are_those_of_our_loop(ours, theirs):
    """Sampled ones are answers to the same prompts."""
    own, found = sequences(ours), sequences(theirs)
    assert found.keys() == own.keys() == set(range(len(PROMPTS)))
    assert [whole(found[index]) for index in GREEDY] == [whole(own[index]) for index in GREEDY]
    assert all(sequence.temperature == own[index].temperature for index, sequence in found.items())
    for index in set(found) - set(GREEDY):
        prompt = int(own[index].loss_mask.int().argmax()) + 1
        assert found[index].tokens[:prompt].equal(own[index].tokens[:prompt])
        answered = found[index].loss_mask[prompt - 1 :]
        assert not found[index].loss_mask[: prompt - 1].any() and answered.all() == (len(PROMPTS[index]) == 1)
    assert (theirs / "answers.npz").is_file() and not written_paths(theirs)
    assert read_manifest(theirs) == {**read_manifest(ours), "engine": "vllm"}


def test_states_are_right_to_their_own_rounding(ours, theirs, exact):
    """Stored in bf16: no further from the truth than twice what our own path's are, by the largest and the mean."""
    own, found = sequences(ours), sequences(theirs)
    for index in GREEDY:
        truth = exact(found[index].tokens)
        close_as_eager(found[index].states, own[index].states, truth, 2.0, f"prompt {index}")


def test_states_of_stored_answers_in_bf16_within_a_window(ours, exact, tmp_path):
    """Of answers that another engine wrote, and only those rows that a draft with a window uses."""
    arguments = ours / "answers.npz", "--context", 448, "--window-keys", 16, "--dtype", "bfloat16"
    run(arguments[0], tmp_path / "own", *arguments[1:], "--device", "cpu")
    run(arguments[0], tmp_path / "vllm", *arguments[1:], *VLLM)
    own, found = sequences(tmp_path / "own"), sequences(tmp_path / "vllm")
    assert found.keys() == own.keys() and len(found) == len(PROMPTS)
    for index, sequence in found.items():
        kept = sequence.kept
        assert whole(sequence) == whole(own[index]) and kept is not None and kept.equal(own[index].kept)
        truth = exact(sequence.tokens)[kept]
        close_as_eager(sequence.states, own[index].states, truth, 2.0, f"text {index}")
    assert read_manifest(tmp_path / "vllm") == read_manifest(tmp_path / "own")
    assert any(not sequence.kept.all() for sequence in found.values() if sequence.kept is not None)


def test_killed_among_answers_and_among_states(source, theirs, exact, tmp_path):
    """Then the same command again: what an undisturbed run stores, sampled answers too."""
    out = tmp_path / "killed"
    command = source, out, *REGENERATE, *VLLM
    assert interrupted(signal.SIGKILL, lambda: bool(written_paths(out)), *command)[0] == -signal.SIGKILL
    assert written_paths(out) and not shard_paths(out)
    assert interrupted(signal.SIGKILL, lambda: bool(shard_paths(out)), *command)[0] == -signal.SIGKILL
    assert written_paths(out) and 0 < len(sequences(out)) < len(PROMPTS)
    run(*command)
    found, wanted = sequences(out), sequences(theirs)
    assert {index: whole(one) for index, one in found.items()} == {index: whole(one) for index, one in wanted.items()}
    for index, sequence in found.items():
        close_as_eager(sequence.states, wanted[index].states, exact(sequence.tokens), 2.0, f"prompt {index}")
    assert not written_paths(out) and not list(out.glob("*.partial.*"))
    assert (out / "manifest.json").read_text() == (theirs / "manifest.json").read_text()
    before = time.monotonic()
    assert f"0 of {len(PROMPTS)} conversations" in run(*command)
    assert time.monotonic() - before < 60, "nothing to do: vLLM is not started"


def test_ctrl_c_keeps_what_is_finished(source, tmp_path):
    """The whole terminal gets it, vLLM's processes too."""
    out = tmp_path / "stopped"
    command = source, out, *REGENERATE, *VLLM
    code, said = interrupted(signal.SIGINT, lambda: bool(written_paths(out)), *command)
    assert code == 130 and "run the same command again to go on" in said, said
    assert written_paths(out) and "Traceback" not in said


def test_what_vllm_refuses_is_said_in_a_line(source, tmp_path):
    said = run(source, tmp_path / "out", *REGENERATE, *VLLM, "--tensor-parallel", 2, code=1)
    assert "error: " in said and "must be divisible by tensor parallel size (2)" in said, said
    broken = shutil.copytree(smollm2.converted(), tmp_path / "broken")
    weights = broken / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    said = run(source, tmp_path / "out", *REGENERATE, *VLLM, "--target", broken, code=1)
    assert said.splitlines()[-1].startswith(f"error: vLLM does not start with {broken} (WorkerProc initialization"), (
        said
    )
