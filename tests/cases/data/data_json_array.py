"""ShareGPT's own file is one JSON array in a .json.

Expected: read as it is.
"""

import json
import pathlib
import sys
import tempfile

from beagle_sd.data.conversations import read_conversations, read_messages

records = [{"id": "a", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}]
folder = pathlib.Path(tempfile.mkdtemp())
failed = False
for name in ("a.json", "b.jsonl"):
    (folder / name).write_text(json.dumps(records, indent=1))
    try:
        print(
            name,
            list(read_messages(folder / name))
            if name.endswith("l")
            else list(read_conversations(folder / name, None, 64)),
        )
    except Exception as error:
        print(name, type(error).__name__, str(error).replace(str(folder), ""))
        failed = True
sys.exit(failed)
