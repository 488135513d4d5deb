"""Everything a GPU is needed for, and how half an hour on one is spent."""

HEADLINES = ("verify_tree", "tree_attention", "block_attention", "distill_loss", "training_step", "top_candidates")
"""Benchmarks that matter most: their own rows are measured first, with tiles tuned before."""
TILED = ("round", "tree_attention", "block_attention", "training_step")
"""Benchmarks of kernels whose tiles are tuned: measured again where other tiles have been found."""
