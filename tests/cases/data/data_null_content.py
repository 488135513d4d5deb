"""A tool call's turn has "content": null.

Expected: null is no text (empty), or the line is refused by name.
"""

import json
import pathlib
import sys
import tempfile

from beagle_sd.data.conversations import read_messages

line = {
    "messages": [
        {"role": "user", "content": "What is the weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {}}}],
        },
        {"role": "user", "content": "It said 20 degrees."},
        {"role": "assistant", "content": "It is 20 degrees."},
    ]
}
path = pathlib.Path(tempfile.mkdtemp()) / "a.jsonl"
path.write_text(json.dumps(line) + "\n")
try:
    ((_, messages),) = read_messages(path)
except ValueError as error:
    print("refused:", error)
    sys.exit(0)
print(messages)
sys.exit(any(m["content"] == "None" for m in messages))
