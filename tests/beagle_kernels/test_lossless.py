"""The statistical suite: ours pass, a right rule of another kind passes, every known wrong rule is caught."""

from __future__ import annotations

import os
import runpy
import signal
import sys

import forks
import pytest
import torch

from beagle_kernels.lossless import (
    CASES,
    BlockChain,
    Case,
    CoupledTree,
    RejectionChain,
    check,
    filtered_law,
    joint_law,
    main,
    p_value,
    passed,
)
from beagle_kernels.reference.philox import gumbel, uniform

QUICK = [Case(3, 1, 4), Case(1, 3, 4), Case(2, 2, 7, 0.7), Case(3, 2, 9, 1.3, 2, 0.9, 0.1), Case(3, 1, 4, 0.0)]


class SiblingRejection:
    """SpecInfer's rule at every node of a path: `branch` siblings drawn from q, p made smaller by q at each refusal.

    fault plants a known wrong rule.
    """

    def __init__(self, fault: str = ""):
        self.fault = fault

    def round(self, target, draft, last, positions, seeds, case):
        p_of, q_of = filtered_law(target, case), filtered_law(draft, case)
        rows, tokens = len(last), []
        counts, alive = torch.ones(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.bool)
        for step in range(case.depth + 1):
            p, q, at = p_of[last], q_of[last], positions + step
            siblings = case.branch if step < case.depth else 0
            taken, token = torch.zeros(rows, dtype=torch.bool), torch.zeros_like(last)
            for sibling in range(siblings):
                drawn = (q.log() + gumbel(seeds, at, q.shape[1], 10 + sibling, positions)).argmax(-1, keepdim=True)
                coin = uniform(seeds, at, 50 + sibling, positions)[:, None]
                chance = torch.ones_like(q) if self.fault == "coin <= p" else q
                accepted = (coin * chance.gather(1, drawn) < p.gather(1, drawn))[:, 0] & ~taken
                token = torch.where(accepted, drawn[:, 0], token)
                taken |= accepted
                if self.fault != "stale p" or sibling + 1 == siblings:
                    rest = (p - q).clamp(min=0)
                    p = torch.where(rest.sum(1, keepdim=True) > 0, rest / rest.sum(1, keepdim=True), p)
            stream = 10 if self.fault == "reused noise" else 99
            own = (p.log() + gumbel(seeds, at, p.shape[1], stream, positions)).argmax(-1)
            tokens.append(torch.where(taken, token, own))
            last = tokens[-1]
            counts = torch.where(alive, step + 1, counts)
            alive = alive & taken
        return torch.stack(tokens, 1), counts


@pytest.mark.parametrize(
    "verifier",
    [CoupledTree(), RejectionChain(), BlockChain(), SiblingRejection()],
    ids=lambda verifier: type(verifier).__name__,
)
def test_right_rules_pass(verifier):
    results = list(check(verifier, QUICK, texts=6000))
    assert passed(results), [result for result in results if result.p_value < 1e-3]
    assert max(result.tokens_per_round for result in results) > 1.3  # some drafts are accepted


@pytest.mark.parametrize("fault", ["coin <= p", "stale p", "reused noise"])
def test_known_wrong_rules_are_caught(fault):
    assert not passed(list(check(SiblingRejection(fault), QUICK, texts=6000)))


class Leaning(CoupledTree):
    """Verifies at a slightly wrong temperature."""

    def round(self, target, draft, last, positions, seeds, case):
        return super().round(target * 1.1, draft, last, positions, seeds, case)


def test_a_small_bias_is_caught_by_the_whole_run():
    assert not passed(list(check(Leaning(), [Case(3, 1, 4), Case(2, 2, 7)], texts=20_000)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "verifier", [CoupledTree(), RejectionChain(), BlockChain()], ids=lambda verifier: type(verifier).__name__
)
def test_ours_pass_every_case(verifier):
    assert passed(list(check(verifier, CASES, texts=8_000, seed=1)))


def test_p_values():
    law = torch.tensor([0.5, 0.25, 0.25, 0.0]).double()
    assert p_value(torch.tensor([500, 250, 250, 0]), law) == 1.0
    assert p_value(torch.tensor([500, 250, 249, 1]), law) == 0.0  # impossible
    assert p_value(torch.tensor([560, 220, 220, 0]), law) == pytest.approx(7.4e-4, rel=0.02)  # exp(-7.2), 2 degrees


def test_the_joint_law_adds_up():
    law = joint_law(filtered_law(torch.randn(3, 3), Case(1, 1, 2, 0.8)), 0, 4)
    assert law.shape == (81,) and law.sum().item() == pytest.approx(1)


def test_the_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--adapter", "beagle_kernels.lossless:RejectionChain", "--texts", "500"])
    assert end.value.code == 0 and "RejectionChain: LOSSLESS" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["--adapter", "test_lossless:Broken", "--texts", "500"])
    assert end.value.code == 1 and "NOT LOSSLESS" in capsys.readouterr().out
    for wrong in ("beagle_kernels.lossless:Nothing", "no_module:X", "beagle_kernels.lossless:Case"):
        with pytest.raises(SystemExit) as end:
            main(["--adapter", wrong])
        assert end.value.code == 2 and "allowed: module:Class" in capsys.readouterr().err


class Broken(SiblingRejection):
    """As an adapter is named on the command line."""

    def __init__(self):
        super().__init__("stale p")


def test_a_reader_that_has_seen_enough(tmp_path):
    """As `python -m beagle_kernels.lossless | head`: ended by the pipe's signal, without a word."""

    def piped() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        sys.stdout, sys.stderr = open(writer, "w"), open(tmp_path / "stderr", "w", buffering=1)
        sys.argv = ["lossless", "--texts", "100"]
        del sys.modules["beagle_kernels.lossless"]
        runpy.run_module("beagle_kernels.lossless", run_name="__main__")

    assert forks.run(piped) == -signal.SIGPIPE
    assert (tmp_path / "stderr").read_text() == ""
