"""A contender's process: it loads its engine once, then answers a request a line.

`python -m bench.engines.workers MODULE OPTIONS` runs in the engine's own environment, so this file and the engines'
import the standard library alone until `load` is called. A module has PACKAGES, whose versions are told, and
`load(options) -> answer(prompt ids, new tokens) -> (new ids, seconds after the first of them or None)`.

Lines of JSON, first {"ready": versions} or {"why": what stands in the way}; then for each {"prompt": ids,
"max_new_tokens": n} one {"tokens": ids, "seconds": prefill included, "decode_seconds": ...}.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import time
from typing import IO


def main(arguments: list[str]) -> None:
    """Serve the engine of a module, with the JSON of its options, until stdin ends."""
    module, options = arguments[0], json.loads(arguments[1])
    out = _own_output()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, options["cpus"])
    try:
        engine = importlib.import_module(module)
        answer = engine.load(options)
    except ModuleNotFoundError as error:
        return _send(out, {"why": f"the package {error.name} is not installed in its environment"})
    except Exception as error:
        return _send(out, {"why": f"{type(error).__name__}: {error}"})
    _send(out, {"ready": {name: importlib.metadata.version(name) for name in engine.PACKAGES}})
    for line in sys.stdin:
        request = json.loads(line)
        began = time.perf_counter()
        tokens, decode_seconds = answer(request["prompt"], request["max_new_tokens"])
        seconds = time.perf_counter() - began
        _send(out, {"tokens": tokens, "seconds": seconds, "decode_seconds": decode_seconds})


def _own_output() -> IO[str]:
    """What stdout was; from here on an engine that prints does so to stderr."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return out


def _send(out: IO[str], message: dict) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
