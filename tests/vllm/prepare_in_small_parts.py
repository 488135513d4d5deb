"""`beagle-sd prepare` with its arguments, in parts of few tokens, slowly: a process to be killed between them."""

from __future__ import annotations

import sys
import time

from beagle_sd.cli.app import app
from beagle_sd.data.shards import ShardWriter
from beagle_sd.vllm.prepare import Written

TOKENS = 200


def main() -> None:
    ShardWriter.__init__.__defaults__ = Written.__init__.__defaults__ = (TOKENS,)
    add = ShardWriter.add

    def slowly(writer, sequence) -> None:
        time.sleep(0.2)  # else vLLM has all the states of so few texts at once
        add(writer, sequence)

    ShardWriter.add = slowly  # type: ignore[method-assign]
    sys.argv[1:1] = ["prepare"]
    app()


if __name__ == "__main__":  # which vLLM's own processes, that import this file, are not
    main()
