"""Every kind of causal LM: what came of it is said, whatever happens in its process, and the page says it on."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from beagle_kernels import Sampling, choose_tokens
from bench.answers import targets
from bench.answers.kinds import one_kind, tiny_targets
from bench.answers.kinds.one_kind import AS_IT_COMES, NOT_MADE, OTHER, RAISED, REFUSED, SAME, TOOK_TREE, Row
from bench.answers.kinds.own_text import TIE, first_wrong, own_text, stepped_logits, whole_is_stepped, whole_logits
from bench.report import results
from bench.report import targets as page


def outcomes(rows: list[Row]) -> list[tuple[str, str]]:
    return [(row.layers, row.outcome) for row in rows]


def test_a_kind_that_works_is_the_same_with_branches_accepted_and_padded():
    (row,) = one_kind.rows_of("llama")
    assert (row.outcome, row.why, row.padded, row.verified, row.chain) == (SAME, "", True, "tree", "")
    assert row.varied >= one_kind.VARIED and row.tokens_per_round > 2


def test_refusals_and_what_cannot_be_made_say_why():
    row = one_kind.tried("florence2", AS_IT_COMES, {})
    assert row.outcome == REFUSED and "allowed" in row.why
    (row,) = one_kind.rows_of("gemma4_assistant")
    assert row.outcome == NOT_MADE and "hidden_size_per_layer_input" in row.why


def with_plants(monkeypatch, wrong) -> Row:
    """Of llama, where `generate` is wrong(real, target, draft, ids, mask, **options)."""
    real = one_kind.generate
    with monkeypatch.context() as patch:
        patch.setattr(one_kind, "generate", lambda *args, **options: wrong(real, *args, **options))
        return one_kind.tried("llama", AS_IT_COMES, {})


def other_token(made, row: int, token: int):
    made.sequences[row, token] = (made.sequences[row, token] + 1) % tiny_targets.VOCAB
    return made


def test_other_tokens_are_faults_wherever_they_come(monkeypatch):
    def one_off(real, *args, **options):
        return other_token(real(*args, **options), 0, -3)

    def one_off_sampled(real, *args, **options):
        made = real(*args, **options)
        return other_token(made, 0, -1) if "temperature" in options else made

    def one_off_drafted(real, target, draft, *args, **options):
        made = real(target, draft, *args, **options)
        return other_token(made, 0, -4) if draft is not None and "temperature" in options else made

    def one_off_batched(real, target, draft, ids, *args, **options):
        made = real(target, draft, ids, *args, **options)
        return other_token(made, 2, -20) if len(ids) > 1 else made

    def other_noise(real, *args, seed, **options):
        return real(*args, seed=seed + 1, **options)

    for wrong, why in (
        (one_off, "without a draft, 1 rows: row 0 from new token 17 on"),
        (one_off_sampled, "sampled, without a draft, 1 rows: row 0 from new token 19 on"),
        (one_off_drafted, "sampled, with a draft, 1 rows: row 0 from new token 16 on"),
        (one_off_batched, "without a draft, 3 rows: row 2 from new token 0 on"),
    ):
        row = with_plants(monkeypatch, wrong)
        assert (row.outcome, row.why) == (OTHER, why)
    row = with_plants(monkeypatch, other_noise)
    assert row.outcome == OTHER and row.why.startswith("sampled, without a draft, 1 rows")


def test_other_errors_and_late_refusals_are_faults(monkeypatch):
    def unclear(real, *args, **options):
        raise ValueError("not enough values to unpack")

    def too_late(real, target, draft, ids, mask, streamer, **options):
        streamer.put(ids[0])
        raise ValueError("one; allowed: another")

    for wrong, why in (
        (unclear, "ValueError: not enough values to unpack"),
        (too_late, "ValueError: one; allowed: another"),
    ):
        row = with_plants(monkeypatch, wrong)
        assert (row.outcome, row.why) == (RAISED, why)


def test_a_target_of_chains_has_to_refuse_trees_before_any_token(monkeypatch):
    monkeypatch.setattr(one_kind, "chains_only", lambda model: "its layers pass a state on")

    def right(real, *args, tree, **options):
        if tree.branch > 1:
            raise ValueError("the tree has branches; allowed: use a chain, branch=1")
        return real(*args, tree=tree, **options)

    def late(real, *args, tree, streamer, **options):
        made = real(*args, tree=tree, streamer=streamer, **options)
        if tree.branch > 1:
            raise ValueError("use a chain; allowed: branch=1")
        return made

    def unclear(real, *args, tree, **options):
        if tree.branch > 1:
            raise ValueError("no trees; allowed: none")
        return real(*args, tree=tree, **options)

    row = with_plants(monkeypatch, right)
    assert (row.outcome, row.verified, row.chain) == (SAME, "chain", "its layers pass a state on")
    assert row.tokens_per_round > 2
    for wrong, why in (
        (lambda real, *args, **options: real(*args, **options), "a tree with branches was not refused"),
        (late, "refused after a token: use a chain; allowed: branch=1"),
        (unclear, "refused without the words 'use a chain': no trees; allowed: none"),
    ):
        row = with_plants(monkeypatch, wrong)
        assert (row.outcome, row.why, row.verified) == (TOOK_TREE, why, "")


def test_the_sampled_truth_forgives_what_rounding_decides_and_nothing_else():
    text, settings = torch.tensor([0, 1]), {"temperature": 1.0, "top_k": 1}
    near = torch.tensor([[1.0, 1.0 - TIE, -5.0], [1.0 + TIE, 1.0, -5.0]])
    far = torch.tensor([[1.0, 0.5, -5.0], [1.001, 1.0, -5.0]])
    assert first_wrong(near, text, 5, 0, settings) is None
    assert first_wrong(far, text, 5, 0, settings) == 1
    assert first_wrong(far, text, 5, 0, {}) == 1
    edge = torch.tensor([[0.5, 0.3, 0.2]]).log()
    drawn = {seed: int(choose(edge, seed, 1.0)) for seed in range(50)}
    seed = next(seed for seed, token in drawn.items() if token == 2)
    assert first_wrong(edge, torch.tensor([2]), 5, seed, {"temperature": 1.0, "top_p": 0.8}) is None
    assert first_wrong(edge, torch.tensor([2]), 5, seed, {"temperature": 1.0, "top_p": 0.79}) == 0


def choose(logits: torch.Tensor, seed: int, top_p: float) -> torch.Tensor:
    return choose_tokens(logits, torch.tensor([5]), Sampling.of(1, seed, 1.0, top_p=top_p))[0]


def test_steps_and_one_forward_say_the_same_where_nothing_is_cut_off():
    model = tiny_targets.tiny_target("llama")
    prompts = one_kind.text_prompts((0,))
    text = own_text(model, prompts, one_kind.NEW)
    stepped, whole = stepped_logits(model, prompts, text), whole_logits(model, prompts, text)
    assert stepped.argmax(-1).equal(text) and (stepped - whole).abs().max() < TIE
    assert whole_is_stepped(model, prompts, text)
    assert not whole_is_stepped(model, {**prompts, "pixel_values": text}, text)


def test_the_layers_of_every_type_are_there_and_windows_begin_within_the_prompts_or_behind_them():
    config = tiny_targets.tiny_target("gemma3_text").config
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert min(one_kind.LENGTHS) < config.sliding_window < max(one_kind.LENGTHS)
    assert min(one_kind.LENGTHS) + one_kind.NEW > config.sliding_window
    assert set(tiny_targets.full_attention("gemma3_text")["layer_types"]) == {"full_attention"}
    assert tiny_targets.full_attention("llama") == {}
    prompts = one_kind.text_prompts((0, 1, 2))
    assert tuple(prompts["attention_mask"].sum(1).tolist()) == one_kind.LENGTHS


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
    assert capfd.readouterr().out.endswith("1 same, 0 refused, 1 not made, 0 other tokens, 1 raised, 0 took a tree\n")


def test_an_unknown_kind_is_named(capsys):
    with pytest.raises(SystemExit):
        targets.main(["llama", "lama"])
    assert "no kinds lama; allowed: afmoe" in capsys.readouterr().err


def test_the_page_has_every_kind_of_causal_lm_and_no_fault():
    found = results.read("targets.json")
    if found["transformers"] == transformers.__version__:
        assert {row["kind"] for row in found["rows"]} >= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert page.faults() == "None."


def test_the_page_groups_what_works_and_reads_rows_of_before_chains(monkeypatch):
    same = {"outcome": "same", "why": ""}
    rows = [
        {"kind": "a", "layers": "as it comes"} | same,
        {"kind": "b", "layers": "as it comes", "verified": "chain", "chain": "b has states"} | same,
        {"kind": "b", "layers": "full attention", "verified": "tree", "chain": ""} | same,
        {"kind": "a", "layers": "full attention", "verified": "tree", "chain": ""} | same,
        {"kind": "a", "layers": "with an image", "verified": "tree", "chain": ""} | same,
        {"kind": "b", "layers": "with an image", "outcome": "not made", "why": "no picture"},
    ]
    monkeypatch.setattr(page.results, "read", lambda name: {"rows": rows})
    assert page.working().splitlines()[2:] == [
        "| it comes | tree | 1 | a |",
        "| it comes | chain | 1 | b |",
        "| changed to full attention in every layer | tree | 1 | b |",
        "| it comes, with an image | tree | 1 | a |",
    ]
    assert page.chains().splitlines()[2:] == ["| has states | b |"]
    assert page.text_alone() == "b"


def test_reasons_are_grouped_without_what_is_one_model_s():
    assert page.reason("gpt2 has no rotary positions; allowed: RoPE") == "has no rotary positions"
    assert page.reason("mistral has sliding_window=8; allowed: full attention (...)") == "has sliding_window"
    assert page.reason("zamba has recurrent layers (layer 2), whose states follow") == (
        "has recurrent layers, whose states follow"
    )
    assert page.reason("the LM head has a bias; allowed: heads without") == "the LM head has a bias"
    assert page.reason("X gives other states for a text (they differ by 3%), so; allowed: Y") == (
        "gives other states for a text, so"
    )
