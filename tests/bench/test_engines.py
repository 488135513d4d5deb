"""bench.engines: its GGUFs hold our weights, its turns and ratios are right, and what fails is told and left out."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from beagle_sd.evaluation.comparison import lower_bound
from beagle_sd.models import smollm2
from bench.engines import __main__ as command
from bench.engines import contenders, environments, models
from bench.engines.comparison import ratios, rows_of
from bench.engines.contenders import BASELINE, CONTENDERS, Contender, chosen
from bench.engines.turns import Answer, Gone, Worker, answers_to, turned
from bench.report import engines as tables
from bench.report import results

gguf = pytest.importorskip("gguf")

FAKE = """
import os, sys, time
PACKAGES = ()
def load(options):
    print("what an engine prints is no answer")
    if options.get("missing"):
        import no_such_engine
    if options.get("bad"):
        raise ValueError("this engine has no such thing")
    def answer(prompt, new_tokens):
        if prompt == [13]:
            print("it fell over", file=sys.stderr, flush=True)
            os._exit(3)
        if prompt == [14]:
            time.sleep(60)
        return [token + options.get("add", 1) for token in prompt][:new_tokens], 0.25
    return answer
"""


@pytest.fixture
def start(tmp_path):
    """Starts a worker with the fake engine and such options."""
    (tmp_path / "fake_engine.py").write_text(FAKE)
    with ExitStack() as stack:

        def start(**options) -> Worker:
            command = [sys.executable, "-S", "-m", "bench.engines.workers", "fake_engine"]
            run = {"cpus": sorted(os.sched_getaffinity(0))[:1], **options}
            variables = {"PYTHONPATH": str(tmp_path)}
            return Worker(stack, [*command, json.dumps(run)], variables, tmp_path / f"log-{len(os.listdir(tmp_path))}")

        yield start


def test_a_worker_answers_whatever_its_engine_prints(start):
    worker = start()
    first, second = worker.answer([1, 2, 3], 2), worker.answer([5], 2)
    assert first.tokens == [2, 3] and first.decode_seconds == 0.25 and 0 < first.seconds < 1
    assert second.tokens == [6] and worker.versions == {}
    assert worker.idle_share is not None and worker.idle_share < 0.5


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"missing": True}, "the package no_such_engine is not installed in its environment"),
        ({"bad": True}, "ValueError: this engine has no such thing"),
    ],
)
def test_what_cannot_take_part_says_why(start, options, why):
    with pytest.raises(Gone, match=why):
        start(**options)


def test_one_that_dies_is_left_out_and_the_others_go_on(start):
    workers, gone = {BASELINE: start(), "other": start(), "frail": start()}, {}
    prompts = [[1], [13], [2]]
    workers[BASELINE].answer = workers["other"].answer = lambda prompt, new_tokens: Answer([7], 1.0, None)
    answers = list(answers_to(workers, prompts, 4, gone))
    assert [sorted(each) for each in answers] == [["frail", "other", BASELINE], *[["other", BASELINE]] * 2]
    assert gone == {"frail": "its process ended with 3: it fell over"}
    rows = rows_of("mt-bench", answers, gone)
    assert [row["contender"] for row in rows if "why" not in row] == [BASELINE, "other"]
    assert next(row for row in rows if "why" in row)["why"] == gone["frail"]


def test_one_that_hangs_is_given_up(start, monkeypatch):
    monkeypatch.setattr("bench.engines.turns.ANSWER_SECONDS", 0.2)
    with pytest.raises(Gone, match="no answer in 0 s"):
        start().answer([14], 1)


def test_the_order_turns_by_one():
    assert [turned("abc", number) for number in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]


def answer(seconds: float, tokens: list[int] | None = None, decode: float | None = None) -> Answer:
    return Answer(tokens or [1, 2], seconds, decode)


def test_ratios_are_of_the_same_prompt_and_bounded():
    theirs, own = [answer(2.0 + number) for number in range(8)], [answer(1.0) for _ in range(8)]
    found = ratios(theirs, own)
    assert found["median"] == 5.5 and found["low"] == 3.4 and found["high"] == 7.6
    assert found["bound"] == lower_bound([2.0 + number for number in range(8)]) == 3.0
    assert ratios([answer(3.0, [1, 2, 3])], [answer(1.0, [1])]) == {"low": 1, "median": 1, "high": 1, "bound": None}


def test_rows_compare_all_with_transformers_and_ours_with_all():
    ours, rival = "beagle adaptive fp32", "OpenVINO fp32"
    answers = [
        {BASELINE: answer(4.0), ours: answer(1.0, decode=0.5), rival: answer(2.0, [1, 3], 1.0)},
        {BASELINE: answer(4.0), ours: answer(1.0, decode=0.5), rival: answer(2.0, [1, 2], 1.0)},
    ]
    base, own, other = rows_of("mt-bench", answers, {})
    assert own["over"][BASELINE]["median"] == 4 and own["over"][rival]["median"] == 2
    assert list(other["over"]) == list(base["over"]) == [BASELINE]
    assert (base["equal"], own["equal"], other["equal"]) == (2, 2, 1)
    assert (own["ms_per_token"], own["decode_ms_per_token"], own["tokens"]) == (500, 500, 4)
    assert base["decode_ms_per_token"] is None


def test_contenders_are_chosen_by_pattern_and_the_baseline_always_takes_part():
    names = [each.name for each in chosen(["openvino fp32*", "Beagle plain int8"])]
    assert names == [BASELINE, "beagle plain int8", "OpenVINO fp32", "OpenVINO fp32, lookup"]
    with pytest.raises(ValueError, match="'nonsense' fits no contender; allowed: patterns of transformers fp32, "):
        chosen(["nonsense"])
    assert len({each.name for each in CONTENDERS}) == len(CONTENDERS)


def test_what_was_not_made_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "model_of", lambda folder, name: tmp_path / name)
    monkeypatch.setattr(contenders, "model_of", models.model_of)
    each = Contender("an engine", "openvino", "openvino", "openvino-fp32")
    assert each.why_not(tmp_path) == "there is no environment openvino (bench.engines.environments makes it)"
    python = environments.python_of(tmp_path, "openvino")
    python.parent.mkdir(parents=True)
    python.touch()
    assert each.why_not(tmp_path) == "there is no model openvino-fp32 (bench.engines.models makes it)"
    (tmp_path / "openvino-fp32").mkdir()
    assert each.why_not(tmp_path) is None and each.command(tmp_path, {"threads": 2})[0] == str(python)
    gone: dict[str, str] = {}
    absent = Contender("another", "openvino", "llamacpp")
    with ExitStack() as stack:
        assert command.started(stack, [absent], tmp_path, {"threads": 1}, tmp_path, gone) == {}
    assert "llamacpp" in gone["another"]


def test_each_contender_has_a_module_an_environment_and_a_model():
    folder = Path(command.__file__).parent / "workers"
    for each in CONTENDERS:
        assert (folder / f"{each.module}.py").is_file()
        assert each.environment in ("", *environments.PACKAGES)
        assert each.model in ("", "q4_1.gguf", *models.MODELS)


def test_too_many_threads_are_refused():
    assert len(command.cpus(1)) == 1
    with pytest.raises(ValueError, match="threads is 100000; allowed here: 1 to "):
        command.cpus(100000)


HEADS, KV_HEADS, WIDTH, LAYERS = 4, 2, 64, 2
SHAPES = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH // 2, WIDTH),
    "attn_v": (WIDTH // 2, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "attn_norm": (WIDTH,),
    "ffn_norm": (WIDTH,),
    "ffn_gate": (96, WIDTH),
    "ffn_up": (96, WIDTH),
    "ffn_down": (WIDTH, 96),
}


def small_gguf(path: Path) -> None:
    """A Llama as llama.cpp stores it, with weights that nobody is to read."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (
        ("block_count", LAYERS),
        ("context_length", 512),
        ("embedding_length", WIDTH),
        ("feed_forward_length", 96),
        ("head_count", HEADS),
        ("head_count_kv", KV_HEADS),
        ("rope_freq_base", 10000.0),
        ("vocab_size", 8),
        ("tokenizer_model", "gpt2"),
        ("token_list", ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "c", "d"]),
        ("token_types", [3, 3, 3, 1, 1, 1, 1, 1]),
        ("token_merges", ["a b"]),
        ("bos_token_id", 1),
        ("eos_token_id", 2),
        ("unk_token_id", 0),
        ("pad_token_id", 2),
        ("chat_template", "{{ messages }}"),
    ):
        getattr(writer, f"add_{name}")(value)
    shapes = {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in SHAPES.items()}
    for name, shape in ({"token_embd": (8, WIDTH), "output_norm": (WIDTH,)} | shapes).items():
        writer.add_tensor(f"{name}.weight", torch.zeros(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0"])
def test_a_gguf_read_back_has_our_weights(tmp_path, kind, monkeypatch):
    small_gguf(tmp_path / "source.gguf")
    monkeypatch.setattr(smollm2, "find_gguf", lambda: tmp_path / "source.gguf")
    ours = smollm2.converted(tmp_path / "ours")
    torch.manual_seed(0)
    weights = {
        name: torch.randn(weight.shape).bfloat16() for name, weight in load_file(ours / "model.safetensors").items()
    }
    save_file(weights, ours / "model.safetensors", metadata={"format": "pt"})
    models.write_gguf(tmp_path / "source.gguf", ours, tmp_path / "new.gguf", kind)
    monkeypatch.setattr(smollm2, "find_gguf", lambda: tmp_path / "new.gguf")
    back = smollm2.converted(tmp_path / "back")
    found = load_file(back / "model.safetensors")
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        if kind == "Q8_0" and weight.ndim > 1:
            torch.testing.assert_close(found[name].float(), weight.float(), rtol=0.01, atol=0.02)
        else:
            assert found[name].equal(weight), name
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (ours / name).read_bytes(), name
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "new.gguf").tensors}
    assert types["output_norm.weight"] == "F32" and types["blk.0.attn_q.weight"] == kind


def test_the_tables_come_from_the_runs_files_and_say_what_was_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert {table() for table in tables.TABLES.values()} == {"not measured"}
    ours, rival = "beagle adaptive fp32", "onnxruntime fp32"
    rows = []
    for prompts in tables.SETS:
        answers = [{BASELINE: answer(4.0), ours: answer(1.0), rival: answer(2.0, decode=1.0)}] * 6
        rows += rows_of(prompts, answers, {"OpenVINO fp32": "there is no environment openvino"})
    record = {"command": "python -m bench.engines FOLDER", "threads": 2, "processor": "a processor", "rows": rows}
    record |= {"versions": {ours: {"torch": "2.13"}, rival: {"onnxruntime": "1.32"}}, "idle": {ours: 0.01, rival: None}}
    (tmp_path / "engines-2.json").write_text(json.dumps(record))
    shown = tables.engines()
    assert f"| 2 | mt-bench | {rival} | 1000.0 | 1000.0 | 2.00 (2.00, 2.00) | 2.00 | 6 of 6 | 2.00 (2.00) |" in shown
    assert "| 2 | gsm8k | OpenVINO fp32 | not measured: there is no environment openvino |" in shown
    assert "2 threads of a processor" in tables.engines_run() and "onnxruntime 1.32, torch 2.13" in tables.engines_run()
    few = tables.engines_few()
    assert "| beagle, adaptive tree | 500.0 (4.00) | 500.0 (4.00) | 500.0 (4.00) | 18 of 18 |" in few
    assert "OpenVINO" not in few
