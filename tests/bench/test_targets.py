"""Every kind of causal LM: what came of it is said, whatever happens in its process, and the page says it on."""

from __future__ import annotations

import json
import os
import time

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bench.answers import targets, tiny_targets
from bench.answers.targets import AS_IT_COMES, FULL, NOT_MADE, OTHER, RAISED, REFUSED, SAME, Row
from bench.report import results
from bench.report import targets as page


def outcomes(rows: list[Row]) -> list[tuple[str, str]]:
    return [(row.layers, row.outcome) for row in rows]


def test_a_kind_that_works_is_the_same_with_branches_accepted_and_padded():
    (row,) = targets.rows_of("llama")
    assert (row.outcome, row.why, row.padded) == (SAME, "", True)
    assert row.varied >= targets.VARIED and row.tokens_per_round > 1.1


def test_refusals_and_what_cannot_be_made_say_why():
    windows = targets.rows_of("gpt_oss")
    assert outcomes(windows) == [(AS_IT_COMES, REFUSED), (FULL, REFUSED)]
    assert "sliding_attention" in windows[0].why and "s_aux" in windows[1].why
    (row,) = targets.rows_of("gemma4_assistant")
    assert row.outcome == NOT_MADE and "hidden_size_per_layer_input" in row.why


def test_other_tokens_and_other_errors_are_faults(monkeypatch):
    real = targets.generate

    def one_token_off(*args, **options):
        made = real(*args, **options)
        made.sequences[:, -3] += 1
        return made

    def unclear(*args, **options):
        raise ValueError("not enough values to unpack")

    def too_late(*args, streamer, **options):
        streamer.put(args[2])
        raise ValueError("one; allowed: another")

    for wrong, outcome, why in (
        (one_token_off, OTHER, "without a draft, 1 rows: row 0 from new token 17 on"),
        (unclear, RAISED, "ValueError: not enough values to unpack"),
        (too_late, RAISED, "ValueError: one; allowed: another"),
    ):
        monkeypatch.setattr(targets, "generate", wrong)
        row = targets.tried("llama", AS_IT_COMES, {})
        assert (row.outcome, row.why) == (outcome, why)


def test_the_layers_of_every_type_are_there_and_windows_act_within_the_text():
    config = tiny_targets.tiny_target("gemma3_text").config
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert config.sliding_window < targets.PROMPT
    assert set(tiny_targets.full_attention("gemma3_text")["layer_types"]) == {"full_attention"}
    assert tiny_targets.full_attention("llama") == {}


def crash(kind: str, tell) -> list[Row]:
    tell(Row(kind, AS_IT_COMES, RAISED))
    os._exit(7)


def hang(kind: str, tell) -> list[Row]:
    tell(Row(kind, AS_IT_COMES, NOT_MADE))
    time.sleep(60)
    return []


def test_a_crash_or_a_hang_ends_no_sweep(monkeypatch, tmp_path, capfd):
    ways = {"llama": lambda kind, tell: [Row(kind, AS_IT_COMES, SAME)], "qwen2": crash, "mamba": hang}
    monkeypatch.setattr(targets, "rows_of", lambda kind, tell: ways[kind](kind, tell))
    out = tmp_path / "targets.json"
    assert targets.main([*ways, "--seconds", "1", "--at-once", "3", "--out", str(out)]) == 1
    rows = json.loads(out.read_text())["rows"]
    assert [(row["kind"], row["outcome"], row["why"]) for row in rows] == [
        ("llama", SAME, ""),
        ("qwen2", RAISED, "its process ended with 7"),
        ("mamba", NOT_MADE, "no end in 1 s"),
    ]
    assert capfd.readouterr().out.endswith("1 same, 0 refused, 1 not made, 0 other tokens, 1 raised\n")


def test_an_unknown_kind_is_named(capsys):
    with pytest.raises(SystemExit):
        targets.main(["llama", "lama"])
    assert "no kinds lama; allowed: afmoe" in capsys.readouterr().err


def test_the_page_has_every_kind_of_causal_lm_and_no_fault():
    found = results.read("targets.json")
    if found["transformers"] == transformers.__version__:
        assert {row["kind"] for row in found["rows"]} >= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert page.faults() == "None."


def test_reasons_are_grouped_without_what_is_one_model_s():
    assert page.reason("gpt2 has no rotary positions; allowed: RoPE") == "has no rotary positions"
    assert page.reason("mistral has sliding_window=8; allowed: full attention (...)") == "has sliding_window"
    assert page.reason("the LM head has a bias; allowed: heads without") == "the LM head has a bias"
    assert page.reason("X gives other states for a text (they differ by 3%), so; allowed: Y") == (
        "gives other states for a text, so"
    )
