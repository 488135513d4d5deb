"""First use where the cache folder cannot be made (a container's user without a home).

Expected: one line that names the folder's purpose and the way out (BEAGLE_CACHE, XDG_CACHE_HOME).
"""

import os
import subprocess
import sys

env = {k: v for k, v in os.environ.items() if k not in ("XDG_CACHE_HOME", "BEAGLE_CACHE")} | {"HOME": "/proc/nope"}
out = subprocess.run(
    [sys.executable, "-m", "beagle_sd", "generate", "hi", "--max-new-tokens", "2"],
    env=env,
    capture_output=True,
    text=True,
)
text = " ".join((out.stdout + out.stderr).split())
print(out.returncode, text[-200:])
sys.exit("CACHE" not in text)
