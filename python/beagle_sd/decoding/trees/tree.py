"""The shape of a round's tree."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TreeShape:
    """How a round drafts: `depth` levels, `branch` expansions a level with `branch` children each, and a branch of up
    to `lookup` tokens copied from the text itself, the best `num_nodes` kept, root counted. branch 1 is a chain;
    num_nodes 1 is plain decoding; lookup 0 copies nothing.

    Written "depth,branch,num_nodes" or "depth,branch,num_nodes,lookup". Raises ValueError for sizes out of range.
    """

    depth: int
    branch: int
    num_nodes: int
    lookup: int = 0

    def __post_init__(self):
        for name, least, most in (("depth", 1, 64), ("branch", 1, 64), ("num_nodes", 1, 1024), ("lookup", 0, 64)):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name} is {value}; allowed: {least} to {most}")

    def __str__(self) -> str:
        copied = f",{self.lookup}" if self.lookup else ""
        return f"{self.depth},{self.branch},{self.num_nodes}{copied}"

    @classmethod
    def parse(cls, text: str) -> TreeShape:
        """The shape as it is written, "4,4,8" or "4,4,16,12"; ValueError for another text."""
        parts = text.split(",")
        if len(parts) not in (3, 4) or not all(part.strip().isdecimal() for part in parts):
            raise ValueError(
                f"the tree is {text!r}; allowed: depth,branch,num_nodes, as 4,4,8, and lookup behind them, as 4,4,16,12"
            )
        return cls(*map(int, parts))

    @classmethod
    def default(cls, device: torch.device, *, chain: bool = False) -> TreeShape:
        """The paper's tree on a GPU; a small one on the CPU, where every verified node costs time, with a branch copied
        from the text; or a chain as deep."""
        depth, branch, num_nodes, lookup = (6, 10, 60, 0) if device.type == "cuda" else (4, 4, 8, 7)
        return cls(depth, 1, depth + 1) if chain else cls(depth, branch, num_nodes, lookup)

    @property
    def deepest(self) -> int:
        """Levels of its candidates."""
        return max(self.depth, self.lookup)

    @property
    def levels(self) -> int:
        """Levels below the root that a tree of this shape can keep."""
        return min(self.deepest, self.num_nodes - 1)


PLAIN = TreeShape(1, 1, 1)
"""Plain decoding."""
