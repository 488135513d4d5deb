"""A row whose prompt alone is longer than the context (a pasted document), its answer cut away.

Expected: left out and counted ('too long'), since nothing in it is learnt.
"""

import json
import pathlib
import sys
import tempfile

from transformers import AutoTokenizer

from beagle_sd.data.conversations import read_conversations
from beagle_sd.models.smollm2 import converted

tokenizer = AutoTokenizer.from_pretrained(converted())
path = pathlib.Path(tempfile.mkdtemp()) / "a.jsonl"
path.write_text(
    json.dumps({"messages": [{"role": "user", "content": "word " * 5000}, {"role": "assistant", "content": "ok"}]})
    + "\n"
)
found = list(read_conversations(path, tokenizer, 512))
print([(len(c.ids), sum(c.learn)) for c in found])
sys.exit(any(not any(c.learn[1:]) for c in found))
