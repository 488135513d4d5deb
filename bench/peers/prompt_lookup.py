"""transformers' prompt lookup: the search of its candidate generator, a text at a time."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bench.peers import missing

NAME = "transformers, prompt lookup's search"


def why_not(device: str) -> str | None:
    return missing("transformers")


def searcher(count: int, longest: int, length: int) -> Callable[[Tensor], Tensor]:
    """A function of text [1, S] that gives what follows the first occurrence of its longest end that recurs: `count`
    tokens at most, or none."""
    from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

    search = PromptLookupCandidateGenerator(
        num_output_tokens=count, max_matching_ngram_size=longest, max_length=length + count + 2
    )
    # it is said to take a LongTensor, which no tensor is to a type checker
    return lambda text: search.get_candidates(text)[0][0, text.shape[1] :]  # type: ignore[arg-type]
