"""verify_tree against EAGLE-2's evaluation on the host and SGLang's kernels, each after the choice at every node."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from beagle_kernels import DraftTree, Sampling, build_tree, verify_tree
from bench.ops.bench_choose_tokens import top_p
from bench.peers import eagle2_tree, or_reason, sglang
from bench.registry import DTYPES, SHAPES, Case, drive, label, moved, parameters, same_as_truth


def trees(batch: int, nodes: int) -> DraftTree:
    """Trees of random shape, all nodes in use."""
    parents = [[max(-1, int(torch.randint(-1, i, ())) if i else -1) for i in range(nodes - 1)] for _ in range(batch)]
    scores = -torch.arange(1, nodes, dtype=torch.float32).expand(batch, -1).contiguous()
    tokens = torch.randint(100, (batch, nodes - 1))
    root = torch.ones(batch, dtype=torch.int64)
    return build_tree(root, tokens, scores, torch.tensor(parents).int(), nodes, nodes)


FULL = [(8, 64, 128256), (1, 60, 128256)] + [(1, nodes, 128256) for nodes in (4, 16, 256)]
FULL += [(1, 60, vocab) for vocab in (32768, 65536, 262144)]
"""(batch, nodes, vocabulary) on a GPU: what the bars are set for first."""


def cases(device: str = "cpu", size: str = "small") -> Iterator[Case]:
    shapes = FULL if size == "full" else [(1, nodes, vocab) for vocab, nodes in SHAPES[size]]
    for batch, nodes, vocab in shapes:
        tree = moved(trees(batch, nodes), device)
        drawn = torch.randn(batch, nodes, vocab, device=device)
        for dtype in DTYPES[size]:
            logits = drawn.to(dtype)
            yield of_logits(logits, tree, Sampling.of(batch, device=device))
            yield of_logits(logits, tree, Sampling.of(batch, 0, 1.0, device=device))
            if (batch, nodes, vocab) in FULL[:2] and size == "full":
                yield of_logits(logits, tree, Sampling.of(batch, 0, 1.0, 0, 0.9, device=device))
                warm = Sampling.of(batch, 0, 1.0, device=device)
                # a model's rows have a few likely tokens, and most of the others need no noise
                yield of_logits(logits * 3, tree, warm, "normal random, deviation 3")


def of_logits(logits: torch.Tensor, tree: DraftTree, sampling: Sampling, data: str = "normal random") -> Case:
    (batch, nodes, vocab), device = logits.shape, logits.device.type
    positions = torch.zeros(batch, dtype=torch.int64, device=device)
    args = logits, tree, positions, sampling
    peers: dict = {"beagle": lambda: verify_tree(*args)}
    hosts = [eagle2_tree.from_parents(tree.tokens[row], tree.parents[row].tolist()) for row in range(batch)]

    def law() -> torch.Tensor:
        return logits.float().softmax(-1)

    def by_sglang(sampled: bool):
        found = or_reason(sglang.why_not(device), lambda: sglang.verify(tree, sampled))
        return found if isinstance(found, str) else lambda: found(logits)

    def check_peer(name: str) -> None:
        if mode != "greedy" or name not in ("EAGLE-2 on the host", "SGLang"):
            return
        found = peers[name]()
        counts = found.tolist() if isinstance(found, torch.Tensor) else [accepted for accepted, _ in found]
        assert counts == verify_tree(*args).num_accepted.tolist(), f"{name} accepts {counts}"

    if not sampling.temperature.any():
        mode = "greedy"
        peers |= {"amax": lambda: logits.amax(-1), "SGLang": by_sglang(False)}
        peers["EAGLE-2 on the host"] = lambda: [eagle2_tree.greedy(*row) for row in zip(hosts, logits.argmax(-1))]
    elif (sampling.top_p == 1).all():
        mode = "sampled"
        draw = lambda: torch.multinomial(law().flatten(0, 1), 1).view(batch, nodes)  # noqa: E731
        peers["SGLang"] = by_sglang(True)
        peers["multinomial + EAGLE-2 on the host"] = lambda: [eagle2_tree.greedy(*row) for row in zip(hosts, draw())]
        peers["EAGLE-2 on the host, rejection"] = lambda: [eagle2_tree.sampled(*row) for row in zip(hosts, law())]
    else:
        mode, p = "top-p", sampling.top_p[0].item()
        nucleus = lambda: top_p(logits.flatten(0, 1), p).view(batch, nodes)  # noqa: E731
        peers["top-p + EAGLE-2 on the host"] = lambda: [eagle2_tree.greedy(*row) for row in zip(hosts, nucleus())]
    dtype = str(logits.dtype)[6:]
    return Case(
        f"verify_tree {mode} {batch} x {nodes} x {vocab} {dtype}" + data.removeprefix("normal random"),
        peers,
        lambda: same_as_truth(verify_tree, *args),
        bounds=("amax",),
        rounds=15,
        device=device,
        data=data,
        work={"byte": float(logits.numel() * logits.element_size())},
        check_peer=check_peer,
        series=f"verify_tree {mode}" if data == "normal random" else "",
        at={"batch": batch, "nodes": nodes, "vocabulary": vocab, "type": dtype},
    )


@pytest.mark.parametrize("case, peer", parameters(list(cases())), ids=label)
def test_verify_tree(benchmark, case, peer):
    drive(benchmark, case, peer)
