"""The shape of a round's tree."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TreeShape:
    """How a round drafts: `depth` levels, `branch` expansions a level with `branch` children each, the best
    `num_nodes` kept, root counted. branch 1 is a chain; num_nodes 1 is plain decoding.

    Written "depth,branch,num_nodes". Raises ValueError for sizes out of range.
    """

    depth: int
    branch: int
    num_nodes: int

    def __post_init__(self):
        for name, most in (("depth", 64), ("branch", 64), ("num_nodes", 1024)):
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise ValueError(f"{name} is {value}; allowed: 1 to {most}")

    def __str__(self) -> str:
        return f"{self.depth},{self.branch},{self.num_nodes}"

    @classmethod
    def parse(cls, text: str) -> TreeShape:
        """The shape written "depth,branch,num_nodes", as "4,4,8"; ValueError for another text."""
        parts = text.split(",")
        if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
            raise ValueError(f"the tree is {text!r}; allowed: depth,branch,num_nodes, as 4,4,8")
        return cls(*map(int, parts))

    @classmethod
    def default(cls, device: torch.device, *, chain: bool = False) -> TreeShape:
        """The paper's tree on a GPU; a small one on the CPU, where every verified node costs time; or a chain as
        deep."""
        depth, branch, num_nodes = (6, 10, 60) if device.type == "cuda" else (4, 4, 8)
        return cls(depth, 1, depth + 1) if chain else cls(depth, branch, num_nodes)

    @property
    def levels(self) -> int:
        """Drafted levels that a tree of this shape can keep."""
        return min(self.depth, self.num_nodes - 1)


PLAIN = TreeShape(1, 1, 1)
"""Plain decoding."""
