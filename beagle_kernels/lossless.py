"""Does a verifier keep the target's law? python -m beagle_kernels.lossless [--adapter module:Class]

Target and draft are random Markov models over a tiny vocabulary, so the probability of every text of a few tokens is
known exactly. Many texts are decoded by speculative rounds and counted, over tree shapes, temperatures and filters;
a chi-square test compares the counts with the joint law. A wrong rule fails with a p-value near 0, a right one fails
once in ten thousand whole runs (Bonferroni over the cases). `bench/lossless.py` is another check: token for token on a
real model.

To check another package's verifier, give a class with the method of `Verifier`; `chain_only = True` leaves out trees.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from beagle_kernels import Sampling, build_tree, choose_tokens, top_candidates, verify_chain, verify_tree
from beagle_kernels.__main__ import end_with_reader

VOCAB, LENGTH = 3, 5
"""Tokens of the vocabulary and of a text: 243 texts."""
FALSE_ALARM = 1e-4
"""The chance that a right verifier fails a whole run."""


@dataclass(frozen=True)
class Case:
    """A tree (`depth` levels of `branch` children each, the best `nodes` kept, root counted) and how it samples."""

    depth: int
    branch: int
    nodes: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


SHAPES = ((1, 1, 2), (3, 1, 4), (1, 3, 4), (2, 2, 7), (3, 2, 9))
"""depth, branch and nodes."""
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.6},
    {},
    {"temperature": 1.7},
    {"top_k": 2},
    {"top_p": 0.8},
    {"min_p": 0.3},
    {"temperature": 1.3, "top_k": 2, "top_p": 0.9, "min_p": 0.1},
)
CASES = tuple(Case(*shape, **sampling) for shape in SHAPES for sampling in SAMPLINGS)


class Verifier(Protocol):
    """One round of speculative decoding, drafting included, for R texts at once."""

    def round(
        self, target: Tensor, draft: Tensor, last: Tensor, positions: Tensor, seeds: Tensor, case: Case
    ) -> tuple[Tensor, Tensor]:
        """Emit the next tokens of each text: tokens [R, n] int64 and how many of them count, [R] from 1 to n.

        target, draft [V, V] f32: the logits after token t are row t. last [R] int64: each text's last token;
        positions [R] int64: the index of the next one; seeds [R] int64: the text's own, the same in every round.
        """
        ...


class CoupledTree:
    """Ours: top_candidates, build_tree, verify_tree."""

    chain_only = False

    def round(self, target, draft, last, positions, seeds, case):
        sampling = sampling_of(case, seeds)
        tree = build_tree(last, *candidates(draft, last, positions, sampling, case), case.nodes, case.depth)
        verdict = verify_tree(target[tree.tokens], tree, positions, sampling)
        return emitted(tree.tokens, verdict), verdict.num_accepted.long() + 1


class RejectionChain:
    """Ours: verify_chain, with the draft's own noise."""

    chain_only = True
    rule = "token"

    def round(self, target, draft, last, positions, seeds, case):
        sampling, tokens, logits = sampling_of(case, seeds), [last], []
        for step in range(case.depth):
            logits.append(draft[tokens[-1]])
            tokens.append(choose_tokens(logits[-1], positions + step, sampling, stream=1, rounds=positions)[0])
        nodes = torch.stack(tokens, 1)
        verdict = verify_chain(target[nodes], torch.stack(logits, 1), nodes[:, 1:], positions, sampling, self.rule)
        return emitted(nodes, verdict), verdict.num_accepted.long() + 1


class BlockChain(RejectionChain):
    """Ours: verify_chain with rule "block"."""

    rule = "block"


def sampling_of(case: Case, seeds: Tensor) -> Sampling:
    """The case's settings for rows of these seeds."""
    return Sampling.of(len(seeds), seeds, case.temperature, case.top_k, case.top_p, case.min_p)


def candidates(
    draft: Tensor, last: Tensor, positions: Tensor, sampling: Sampling, case: Case
) -> tuple[Tensor, Tensor, Tensor]:
    """All candidates of a full tree, as build_tree takes them: tokens, scores, parents [R, M]."""
    rows, level = len(last), last[:, None]
    score, number, found = torch.zeros(rows, 1), torch.full((1,), -1), []
    for depth in range(case.depth):
        width = level.shape[1]
        at = (positions + depth).repeat_interleave(width)
        child, gain = top_candidates(draft[level.flatten()], case.branch, at, sampling.repeat(width))
        score = (score[:, :, None] + gain.view(rows, width, -1).clamp(max=0)).flatten(1)
        found.append((child.view(rows, -1), score, number.repeat_interleave(case.branch).expand(rows, -1).int()))
        number = torch.arange(score.shape[1]) + sum(part[0].shape[1] for part in found[:-1])
        level = found[-1][0]
    tokens, scores, parents = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return tokens, scores, parents


def emitted(nodes: Tensor, verdict) -> Tensor:
    """[R, depth + 1]: the accepted nodes' tokens, then the target's own; what follows means nothing."""
    tokens = nodes.gather(1, verdict.path.long().clamp(min=0)).roll(-1, 1)
    return tokens.scatter(1, verdict.num_accepted.long()[:, None], verdict.next_token[:, None])


def decode(verifier: Verifier, target: Tensor, draft: Tensor, case: Case, start: Tensor, seeds: Tensor):
    """Texts [R, LENGTH] after token 0, by rounds; the first token of row r stands at position start[r]. Also the
    mean of tokens a round."""
    rows = len(seeds)
    text = torch.zeros(rows, LENGTH + case.depth + 1, dtype=torch.int64)
    last, done, rounds = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64), 0
    while len(live := (done < LENGTH).nonzero()[:, 0]):
        tokens, counts = verifier.round(target, draft, last[live], start[live] + done[live], seeds[live], case)
        if int(counts.min()) < 1 or int(counts.max()) > tokens.shape[1]:
            raise ValueError(
                f"{type(verifier).__name__}.round gave counts from {int(counts.min())} to "
                f"{int(counts.max())} of {tokens.shape[1]} tokens; allowed: 1 to all"
            )
        used = tokens[:, : case.depth + 1]
        text[live[:, None], done[live, None] + torch.arange(used.shape[1])] = used
        last[live] = tokens.gather(1, counts[:, None] - 1)[:, 0]
        done[live] += counts
        rounds += len(live)
    return text[:, :LENGTH], float(done.sum()) / rounds


def filtered_law(table: Tensor, case: Case) -> Tensor:
    """Rows of probabilities f64 of a table of logits, by the filters' definition and by none of our kernels."""
    z = table.double()
    if case.temperature == 0:
        return torch.nn.functional.one_hot(z.argmax(-1), z.shape[1]).double()
    p = (z / case.temperature).softmax(-1)
    keep = torch.ones_like(p, dtype=torch.bool)
    if 0 < case.top_k < z.shape[1]:
        keep &= z >= z.sort(-1, descending=True).values[:, case.top_k - 1 : case.top_k]
    left = p * keep
    above = (left[:, None, :] * (z[:, None, :] > z[:, :, None])).sum(-1)
    if case.top_p < 1:
        keep &= above < case.top_p * left.sum(-1, keepdim=True)
    keep &= p >= case.min_p * p.amax(-1, keepdim=True)
    return p * keep / (p * keep).sum(-1, keepdim=True)


def joint_law(p: Tensor, start: int, length: int) -> Tensor:
    """Probability of every text of `length` tokens after `start`, the first token slowest: [V ** length]."""
    law = p[start]
    for _ in range(length - 1):
        law = (law[:, None] * p.repeat(len(law) // len(p), 1)).flatten()
    return law


def index_of(text: Tensor, vocab: int) -> Tensor:
    """Each text's index in joint_law."""
    return (text * vocab ** torch.arange(text.shape[1] - 1, -1, -1)).sum(1)


def p_value(counts: Tensor, law: Tensor) -> float:
    """Of the chi-square test, cells expected below 5 pooled; 0 where something impossible was seen."""
    counts, expected = counts.double(), law * counts.sum()
    if counts[law == 0].sum() > 0:
        return 0.0
    big = expected >= 5
    have, want = counts[big], expected[big]
    if float(expected[~big].sum()) > 0:
        have, want = torch.cat((have, counts[~big].sum()[None])), torch.cat((want, expected[~big].sum()[None]))
    if len(want) < 2:
        return 1.0
    statistic = ((have - want) ** 2 / want).sum()
    return float(torch.special.gammaincc(torch.tensor((len(want) - 1) / 2).double(), statistic / 2))


@dataclass(frozen=True)
class Result:
    """A case's p-value, and tokens a round. noise: "seeds", a seed a text; "positions", one seed at many places."""

    case: Case
    noise: str
    p_value: float
    tokens_per_round: float


def check(verifier: Verifier, cases: Iterable[Case] = CASES, texts: int = 20_000, seed: int = 0) -> Iterator[Result]:
    """Run every case it can with either kind of noise; `passed` gives the verdict over all results."""
    generator = torch.Generator().manual_seed(seed)
    target, draft = (torch.randn(VOCAB, VOCAB, generator=generator) for _ in range(2))
    many = torch.arange(texts)
    noises = {
        "seeds": (torch.ones_like(many), many * 7919 + seed),
        "positions": (1 + many * (LENGTH + 11), torch.full_like(many, seed)),
    }
    for case, (noise, (start, seeds)) in itertools.product(cases, noises.items()):
        if case.branch > 1 and getattr(verifier, "chain_only", False):
            continue
        text, speed = decode(verifier, target, draft, case, start, seeds)
        if int(text.min()) < 0 or int(text.max()) >= VOCAB:
            yield Result(case, noise, 0.0, speed)
            continue
        counts = torch.bincount(index_of(text, VOCAB), minlength=VOCAB**LENGTH)
        yield Result(case, noise, p_value(counts, joint_law(filtered_law(target, case), 0, LENGTH)), speed)


def passed(results: list[Result]) -> bool:
    """Whether no p-value is below FALSE_ALARM shared by all of them."""
    return all(result.p_value >= FALSE_ALARM / len(results) for result in results)


def load_adapter(name: str) -> Verifier:
    """An instance of "module:Class"; ValueError where there is none with a method `round`."""
    module, _, attribute = name.partition(":")
    try:
        verifier = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"adapter {name!r} cannot be made ({error}); allowed: module:Class") from error
    if not callable(getattr(verifier, "round", None)):
        raise ValueError(f"adapter {name!r} has no method round; see beagle_kernels.lossless.Verifier")
    return verifier


def report(name: str, verifier: Verifier, texts: int, seed: int) -> bool:
    """Print each case as it ends and the verdict; returns whether it passed."""
    print(f"{name}: {texts:,} texts of {LENGTH} tokens over {VOCAB} a case")
    print("  depth branch nodes     T top-k top-p min-p  noise      tokens a round   p-value")
    results = []
    for result in check(verifier, texts=texts, seed=seed):
        results.append(result)
        case = result.case
        print(
            f"  {case.depth:5} {case.branch:6} {case.nodes:5} {case.temperature:5} {case.top_k:5} {case.top_p:5} "
            f"{case.min_p:5}  {result.noise:9} {result.tokens_per_round:15.2f}   {result.p_value:.2g}",
            flush=True,
        )
    good, least = passed(results), min(result.p_value for result in results)
    print(
        f"{name}: {'LOSSLESS' if good else 'NOT LOSSLESS'}: least p-value {least:.2g} of {len(results)}; "
        f"below {FALSE_ALARM / len(results):.1g} is a failure\n"
    )
    return good


def main(arguments: list[str] | None = None) -> None:
    """The command line; exits with 1 where a verifier fails."""
    parser = argparse.ArgumentParser(
        prog="python -m beagle_kernels.lossless",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--adapter", help="module:Class of the verifier to check; default: ours")
    parser.add_argument("--texts", type=int, default=20_000, help="texts a case; more find smaller faults")
    parser.add_argument("--seed", type=int, default=0, help="of the models and the noise")
    args = parser.parse_args(arguments)
    if args.texts < 100:
        parser.error(f"--texts is {args.texts}; allowed: 100 or more")
    try:
        checked: dict[str, Verifier] = (
            {args.adapter: load_adapter(args.adapter)}
            if args.adapter
            else {"coupled tree": CoupledTree(), "rejection chain": RejectionChain(), "block chain": BlockChain()}
        )
    except ValueError as error:
        parser.error(str(error))
    outcomes = [report(name, verifier, args.texts, args.seed) for name, verifier in checked.items()]
    raise SystemExit(0 if all(outcomes) else 1)


if __name__ == "__main__":
    end_with_reader()
    main()
