"""Everything a GPU is needed for, and how half an hour on one is spent."""

HEADLINES = ("verify_tree", "tree_attention", "block_attention", "training_step", "top_candidates")
"""Benchmarks that matter most: they are run before tuning."""
