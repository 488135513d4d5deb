"""Files of evaluation sets with a prompt or a few each, where the cache would have them."""

from __future__ import annotations

import gzip
import json

from beagle_sd.data.evaluation_sets import EVALUATION_SETS

ROWS = {
    "mt-bench": {"question_id": 7, "category": "writing", "turns": ["Describe a harbour.", "Now make it rhyme."]},
    "humaneval": {"task_id": "T/0", "prompt": "def twice(x):\n", "canonical_solution": "    return 2 * x\n"},
    "gsm8k": {"id": "g-1", "prompt": "Two crates hold nine melons each. How many melons?", "expected": "18"},
}


def write_set(folder, name, *rows):
    path = folder / EVALUATION_SETS[name].member
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
