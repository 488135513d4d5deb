"""Roles of real sets: tool, function_call, observation, developer, chatgpt, model.

Expected: each is mapped to a turn, or left out with a note of how many, so that a set with some such lines can be
used.
"""

import json
import pathlib
import sys
import tempfile

from beagle_sd.data.conversations import read_messages

bad = []
for role in ("tool", "function_call", "observation", "developer", "chatgpt", "model", "bing"):
    line = {
        "conversations": [
            {"from": "human", "value": "hi"},
            {"from": role, "value": "x"},
            {"from": "gpt", "value": "hello"},
        ]
    }
    path = pathlib.Path(tempfile.mkdtemp()) / "a.jsonl"
    path.write_text(json.dumps(line) + "\n")
    try:
        print(role, list(read_messages(path)))
    except ValueError as error:
        print(role, "->", str(error).replace(str(path.parent), ""))
        bad.append(role)
sys.exit(bool(bad))
