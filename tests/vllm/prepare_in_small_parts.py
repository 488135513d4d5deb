"""`beagle-sd prepare` with its arguments, in parts of few tokens: a process to be killed between them."""

from __future__ import annotations

import sys

from beagle_sd.cli.app import app
from beagle_sd.data.shards import ShardWriter
from beagle_sd.vllm.prepare import Written

TOKENS = 200

if __name__ == "__main__":  # which vLLM's own processes, that import this file, are not
    ShardWriter.__init__.__defaults__ = Written.__init__.__defaults__ = (TOKENS,)
    sys.argv[1:1] = ["prepare"]
    app()
