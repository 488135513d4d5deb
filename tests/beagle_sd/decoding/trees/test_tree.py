"""The shape of a tree: written and read, in range, and how many levels it can keep."""

from __future__ import annotations

import pickle

import pytest
import torch

from beagle_sd import TreeShape
from beagle_sd.decoding.trees.tree import PLAIN


@pytest.mark.parametrize("shape", [PLAIN, TreeShape(4, 4, 8), TreeShape(64, 64, 1024), TreeShape(4, 4, 8, 12)], ids=str)
def test_what_is_printed_is_read(shape):
    assert TreeShape.parse(str(shape)) == shape == TreeShape.parse(f" {str(shape).replace(',', ' , ')} ")
    assert pickle.loads(pickle.dumps(shape)) == shape and len({shape, TreeShape.parse(str(shape))}) == 1


@pytest.mark.parametrize("text", ["", "4,4", "4,4,x", "4;4;8", "4,4,8,1,1", "4,4,8,x", "-1,4,8", "4.0,4,8"])
def test_another_text_is_refused(text):
    with pytest.raises(ValueError, match=f"the tree is '{text}'; allowed: depth,branch,num_nodes, as 4,4,8"):
        TreeShape.parse(text)


@pytest.mark.parametrize(
    "sizes,message",
    [
        ((0, 1, 2), "depth is 0; allowed: 1 to 64"),
        ((65, 1, 2), "depth is 65"),
        ((1, 65, 2), "branch is 65; allowed: 1 to 64"),
        ((1, 1, 0), "num_nodes is 0; allowed: 1 to 1024"),
        ((1, 1, 1025), "num_nodes is 1025"),
        ((1, 1, 2, -1), "lookup is -1; allowed: 0 to 64"),
        ((1, 1, 2, 65), "lookup is 65"),
    ],
)
def test_sizes_out_of_range_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        TreeShape(*sizes)


def test_levels_that_can_be_kept():
    assert [TreeShape(*sizes).levels for sizes in ((1, 1, 1), (4, 1, 5), (4, 1, 3), (6, 10, 60))] == [0, 4, 2, 6]


def test_the_default_is_the_papers_on_a_gpu():
    assert TreeShape.default(torch.device("cuda")) == TreeShape(6, 10, 60)
    assert TreeShape.default(torch.device("cpu")) == TreeShape(4, 4, 8, 7)
