"""`python -m bench.peers`: which other packages can be compared here, and why not."""

import torch

from bench.peers import table

for name, why in table("cuda" if torch.cuda.is_available() else "cpu").items():
    print(f"{name:40}{why or 'compared'}")
