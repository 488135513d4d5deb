"""OpenAI's form with parts: "content": [{"type": "text", "text": "hi"}].

Expected: the text, or refused by name.
"""

import json
import pathlib
import sys
import tempfile

from beagle_sd.data.conversations import read_messages

line = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image", "image": "a.png"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "hello"}]},
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
sys.exit(any("{'type'" in m["content"] for m in messages))
