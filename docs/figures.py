"""Draws the figures of the method page from the ops' own results: python docs/figures.py"""

from __future__ import annotations

from pathlib import Path

import torch

from beagle_kernels import accept_tree, block_attention, build_tree
from beagle_kernels.reference.build_tree import unpack

FOLDER = Path(__file__).parent / "figures"
CELL, TRUE, OWN, NONE = 22, "#2f6f9f", "#e08a2c", "#eceff1"


def svg(width: int, height: int, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="white"/>', *parts, "</svg>", ""])


def text(x: float, y: float, content: str, size: int = 12, anchor: str = "middle", fill: str = "#222") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">{content}</text>'


def grid(x: float, y: float, cells: torch.Tensor, colour: str) -> list[str]:
    """A matrix of bools as squares."""
    return [
        f'<rect x="{x + CELL * column:g}" y="{y + CELL * row:g}" width="{CELL - 2}" height="{CELL - 2}" rx="3" '
        f'fill="{colour if on else NONE}"/>'
        for row, line in enumerate(cells.tolist())
        for column, on in enumerate(line)
    ]


def masks(rows: int = 12, window: int = 4) -> str:
    """Which keys each query sees in training: read off block_attention, and a window's own earlier rows."""
    q, k, v = torch.zeros(rows, 1, rows), torch.zeros(rows, 1, rows), torch.eye(rows)[:, None]
    seen, _ = block_attention(q, k, v, window, torch.tensor([0], dtype=torch.int32))
    index = torch.arange(rows)
    own = (index[None] // window == index[:, None] // window) & (index[None] < index[:, None])
    right, half = 70 + CELL * rows + 40, CELL * rows / 2
    parts = [text(70 + half, 20, "true states H", 13), text(right + half, 20, "draft states S", 13)]
    parts += [text(x + CELL * j + 10, 38, str(j), 11) for x in (70, right) for j in index.tolist()]
    parts += [text(58, 60 + CELL * i, f"query {i}", 11, "end") for i in index.tolist()]
    parts += grid(70, 45, seen[:, 0] > 0, TRUE) + grid(right, 45, own & (index[:, None] >= window), OWN)
    bottom = 45 + CELL * rows + 20
    parts += [
        text(70 + half, bottom, "stage 1 and 2: block_attention, once for all rows"),
        text(right + half, bottom, "stage 2 only: extend_attention, step by step"),
    ]
    return svg(right + CELL * rows + 20, bottom + 15, parts)


def tree() -> str:
    """A small tree, its mask words, and the path that was accepted."""
    words = ["The", "sky", "sea", "is", "was", "blue", "so"]
    parents = torch.tensor([[-1, -1, 0, 0, 2, 2]], dtype=torch.int32)
    scores = torch.tensor([[-0.2, -1.5, -0.4, -1.2, -0.6, -1.4]])
    built = build_tree(torch.tensor([0]), torch.arange(1, 7)[None], scores, parents, 7, 3)
    verdict = accept_tree(built, torch.tensor([[1, 3, 0, 5, 0, 4, 0]]))
    accepted = set(verdict.path[0].tolist())
    depth, place, parts = built.depth[0].tolist(), {}, []
    for node in range(7):
        row = sum(depth[other] == depth[node] for other in range(node))
        place[node] = 60 + 95 * depth[node], 60 + 70 * row
    for node, (x, y) in place.items():
        if node:
            up = place[int(built.parents[0, node])]
            parts.append(f'<line x1="{up[0]}" y1="{up[1]}" x2="{x}" y2="{y}" stroke="#999"/>')
    for node, (x, y) in place.items():
        colour = TRUE if node in accepted else "#b0bec5"
        parts += [
            f'<circle cx="{x}" cy="{y}" r="22" fill="{colour}"/>',
            text(x, y + 4, words[node], 12, fill="white"),
            text(x + 24, y - 16, str(node), 10),
        ]
    left = 470
    parts += [text(left + CELL * 3.5, 20, "tree.mask: what each node sees", 13)]
    parts += [
        text(left + CELL * node + 10, 36, str(node), 11) + text(left - 8, 58 + CELL * node, str(node), 11, "end")
        for node in range(7)
    ]
    parts += grid(left, 43, unpack(built.mask, 7)[0], TRUE)
    parts += [text(15, 225, "blue: accepted, since each equals the target's choice at its parent", anchor="start")]
    return svg(680, 245, parts)


FIGURES = {"masks.svg": masks, "tree.svg": tree}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
