"""Files as Windows writes them: CRLF ends, a BOM, UTF-16 from PowerShell.

Expected: CRLF and BOM read; UTF-16 refused with a word about the encoding.
"""

import json
import pathlib
import sys
import tempfile

from beagle_sd.data.conversations import read_messages

line = json.dumps(
    {"messages": [{"role": "user", "content": "caf\u00e9 \U0001f600"}, {"role": "assistant", "content": "ok"}]},
    ensure_ascii=False,
)
folder = pathlib.Path(tempfile.mkdtemp())
failed = []
for name, data in (
    ("crlf", (line + "\r\n" + line + "\r\n").encode()),
    ("bom", b"\xef\xbb\xbf" + line.encode()),
    ("utf16", (line + "\n").encode("utf-16")),
):
    path = folder / f"{name}.jsonl"
    path.write_bytes(data)
    try:
        print(name, list(read_messages(path))[0][1][0])
    except Exception as error:
        text = str(error).replace(str(folder), "")
        print(name, type(error).__name__, text)
        if name == "bom" or not any(w in text.lower() for w in ("utf", "encod")):
            failed.append(name)
sys.exit(bool(failed))
