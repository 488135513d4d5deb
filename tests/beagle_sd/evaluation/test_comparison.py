"""The comparison table: who takes part, what its numbers mean, where prompts come from."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from models import agreeable_target, small_draft, small_target
from tokenizers_for_tests import small_tokenizer

from beagle_sd import AdaptiveTree
from beagle_sd.decoding.engine import Engine
from beagle_sd.decoding.generate import generate
from beagle_sd.decoding.report import Report
from beagle_sd.decoding.trees.adaptive import Costs
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.evaluation.comparison import (
    BASELINE,
    Answer,
    compare,
    compare_on,
    lower_bound,
    read_prompts,
    rows_of,
    warm_up,
    write_csv,
)
from beagle_sd.evaluation.contenders import EngineRun, contenders
from beagle_sd.evaluation.plot import plot_comparison

CHAIN, TREE = TreeShape(2, 1, 3), TreeShape(3, 2, 6)
COSTS = Costs({1: 10.0, 3: 12.0, 6: 14.0}, {CHAIN: 1.0, TREE: 2.0})


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_every_contender_answers_every_prompt(tmp_path, temperature):
    target, texts = agreeable_target(), tmp_path / "questions.txt"
    texts.write_text("ab\n\ncd e\nf\n")
    told, so_far = [], []
    rows, costs = compare_on(
        [str(texts)],
        target,
        small_tokenizer(),
        small_draft(target),
        AdaptiveTree(COSTS, {CHAIN: 1.5, TREE: 1.8}),
        count=2,
        max_new_tokens=8,
        temperature=temperature,
        assistant=small_target(seed=3),
        on_progress=lambda *now: told.append(now),
        on_rows=so_far.append,
    )
    assert [len(found.rows) for found in so_far] == [7, 7] and so_far[-1] == (rows, costs)
    assert {row.answers for row in so_far[0].rows} == {1}
    assert [row.contender for row in rows] == [
        BASELINE,
        "transformers, prompt lookup",
        "transformers, assisted",
        "beagle, plain",
        "beagle, chain of 2",
        "beagle, tree of 6 (depth 3, branch 2)",
        "beagle, adaptive tree",
    ]
    assert told == [(str(texts), 1, 2), (str(texts), 2, 2)] and {row.answers for row in rows} == {2}
    baseline, plain, chain = rows[0], rows[3], rows[4]
    assert (baseline.low, baseline.median, baseline.high, baseline.tokens_per_round) == (1.0, 1.0, 1.0, 1.0)
    assert plain.tokens_per_round == plain.decode == 1.0 and plain.predicted is None
    assert chain.predicted == pytest.approx(chain.tokens_per_round * 10 / 13, abs=1e-3) and chain.decode > 0
    write_csv(rows, tmp_path / "rows.csv")
    kept = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert len(kept) == 7 and float(kept[4]["median"]) == chain.median
    pytest.importorskip("matplotlib")
    plot_comparison(rows, tmp_path / "rows.svg")
    assert (tmp_path / "rows.svg").stat().st_size > 1000


def test_ratios_are_paired_and_per_token():
    def answer(seconds, tokens, decode):
        return Answer(seconds, tokens, Report(4, tokens, 2.0, seconds={"prefill": 9.0, "target": decode}, row_rounds=4))

    answers = [
        {
            BASELINE: Answer(2.0 * slow, 10, None),
            "beagle, plain": answer(2.0, 11, 4.0),
            "beagle, chain of 2": answer(2.0 * slow, 20, 1.0 * slow),
        }
        for slow in (1, 1, 2)
    ]
    chain = rows_of("set", answers, [CHAIN], COSTS, dict.fromkeys(answers[0], 5))[2]
    assert (chain.low, chain.median, chain.high) == (2.0, 2.0, 2.0), "slow prompts are slow for both"
    assert chain.ms_per_token == 100.0 and chain.tokens_per_round == 2.0
    assert chain.decode == pytest.approx((4.0 / 10) / (1.0 / 19), abs=1e-3), "prefill is left out"


def test_the_order_turns():
    order = []
    runs = {name: lambda ids, name=name: (order.append((name, ids.tolist())), (1, None))[1] for name in "abc"}
    assert len(list(compare(runs, [[1], [2]], small_target().device))) == 2
    assert order == [("a", [[1]]), ("b", [[1]]), ("c", [[1]]), ("b", [[2]]), ("c", [[2]]), ("a", [[2]])]


class FakeGraph:
    """A graph that runs its round when it is replayed; how many there are."""

    made = 0

    def __init__(self, play, device, pool):
        FakeGraph.made += 1
        play()
        self.replay = play


@pytest.fixture
def graphed(monkeypatch):
    """Every engine takes a GPU's path, with graphs that are none; the engines in the order of their making."""
    engines = []

    def graphed_engine(*args, **options):
        engines.append(Engine(*args, **options, graph=True, fixed=True))
        return engines[-1]

    FakeGraph.made = 0
    monkeypatch.setattr("beagle_sd.evaluation.contenders.Engine", graphed_engine)
    monkeypatch.setattr("beagle_sd.decoding.engine.RoundGraph", FakeGraph)
    monkeypatch.setattr("beagle_sd.decoding.engine.check_capturable", lambda device, dtype: None)
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: None)
    return engines


def runs_of(target, draft, **settings):
    tree = AdaptiveTree(COSTS, {CHAIN: 1.5, TREE: 1.8})
    return contenders(target, draft, [CHAIN, TREE], tree, capacity=40, max_new_tokens=12, **settings)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_kept_engine_writes_what_a_new_one_would(graphed, temperature, monkeypatch):
    target = agreeable_target()
    draft = small_draft(target)
    texts: list[torch.Tensor] = []

    def noted(*args, **options):
        out = generate(*args, **options)
        texts.append(out.sequences)
        return out

    monkeypatch.setattr("beagle_sd.evaluation.contenders.generate", noted)
    prompts = [torch.tensor([ids]) for ids in ([5, 6, 7], [9] * 20, [3], [5, 6, 7])]
    for name, run in runs_of(target, draft, temperature=temperature).items():
        if isinstance(run, EngineRun):
            texts.clear()
            for ids in prompts:
                run(ids)
            fresh = [
                generate(target, None, ids, max_new_tokens=12, temperature=temperature).sequences for ids in prompts
            ]
            assert all(map(torch.equal, texts, fresh)) and len(texts) == 4, name
    assert len(graphed) == 4, "an engine a contender, however many answers"


def test_nothing_is_captured_after_the_warm_up(graphed):
    """The adaptive tree's engine has a graph for every shape that it may choose, a plain round among them."""
    target = agreeable_target()
    runs = runs_of(target, small_draft(target))
    warm_up(runs, [5, 6, 7], target.device)
    assert FakeGraph.made == 6 and [len(engine._graphs) for engine in graphed] == [1, 1, 1, 3]
    for answers in compare(runs, [[1, 2], [3], [4, 5]], target.device):
        reports = [answer.report for answer in answers.values() if answer.report is not None]
        assert len(reports) == 4 and all(set(report.seconds) == {"prefill", "rounds"} for report in reports)
    assert FakeGraph.made == 6 and len(graphed) == 4


def test_the_others_engines_are_no_contenders_memory(graphed, monkeypatch):
    """As if every answer held all engines and nothing else."""
    target = agreeable_target()
    runs = runs_of(target, small_draft(target))

    def all_engines(work, device):
        work()
        return 1000 + sum(engine.nbytes for engine in graphed)

    monkeypatch.setattr("beagle_sd.evaluation.comparison.peak_bytes", all_engines)
    peaks = warm_up(runs, [5, 6, 7], target.device)
    own = {name: run.nbytes if isinstance(run, EngineRun) else 0 for name, run in runs.items()}
    assert peaks == {name: 1000 + own[name] for name in runs} and len(set(own.values())) >= 4


def test_the_warm_up_tells_each_contenders_memory():
    """The second holds 64 MiB more than the others, whatever ran before it."""

    def holding(megabytes):
        return lambda ids: (len(torch.ones(megabytes, 2**18).add_(1.0)), None)

    peaks = warm_up({"a": holding(1), "b": holding(65), "c": holding(1)}, [1, 2], torch.device("cpu"))
    if None in peaks.values():
        pytest.skip("only Linux tells a process's peak of memory")
    assert peaks["b"] - peaks["a"] == pytest.approx(64 * 2**20, rel=0.1)
    assert abs(peaks["c"] - peaks["a"]) < 6 * 2**20


def test_the_lower_bound_is_the_sign_tests():
    """Known table: of 20 the 6th smallest, of 10 the 2nd, of 5 the smallest, of 4 none."""
    assert lower_bound([float(i) for i in range(20, 0, -1)]) == 6.0
    assert lower_bound([float(i) for i in range(1, 11)]) == 2.0
    assert lower_bound([3.0, 1.0, 2.0, 5.0, 4.0]) == 1.0
    assert lower_bound([1.0] * 4) is None


def test_prompts_of_a_file(tmp_path):
    tokenizer = small_tokenizer()
    chats = tmp_path / "chats.jsonl"
    lines = [
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": text},
                {"role": "assistant", "content": "no"},
            ]
        }
        for text in "abcd"
    ]
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = [tokenizer.decode(ids) for ids in read_prompts(str(chats), tokenizer, 2)]
    assert ["a<" in text or "c<" in text for text in read] == [True, True] and not any("no<" in text for text in read)
    assert len(read_prompts(str(chats), tokenizer, 9)) == 4


def test_texts_to_edit_need_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("BEAGLE_CACHE", str(tmp_path))
    tokenizer = small_tokenizer()
    read = [tokenizer.decode(ids) for ids in read_prompts("editing", tokenizer, 4)]
    assert len(set(read)) == 4 and not any(tmp_path.iterdir())
    assert "def bill(items, discount):" in read[0] and read[0].endswith("<|im_start|>assistant\n")


def test_what_is_wrong_is_named(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    for source, count, message in [
        ("nothing", 1, "'nothing' is no set.*allowed: mt-bench"),
        (str(tmp_path / "empty.txt"), 1, "holds no prompt"),
        ("gsm8k", 0, "count is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_prompts(source, small_tokenizer(), count)
