"""Everything a GPU is needed for, and how half an hour on one is spent."""

HEADLINES = ("verify_tree", "tree_attention", "block_attention", "distill_loss", "training_step", "top_candidates")
"""Benchmarks that matter most: they are measured first without peers, with tiles tuned before."""
PEERS = ("flex_attention", "training_step", "distill_loss", "round", *HEADLINES[2::-1], "top_candidates")
"""The same beside everybody else's, those first of which a ratio is asked for."""
TILED = ("round", "tree_attention", "block_attention", "flex_attention", "training_step")
"""Benchmarks of kernels whose tiles are tuned: measured again where other tiles have been found."""
