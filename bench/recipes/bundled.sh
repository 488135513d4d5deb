#!/usr/bin/env bash
# Trains the bundled draft of SmolLM2-135M from the stored answers, then measures it. Safe to kill and run again.
#   bench/recipes/bundled.sh FOLDER
# More answers first: beagle-sd prompts FOLDER/prompts.jsonl --seed 3, then
#                     beagle-sd prepare FOLDER/prompts.jsonl FOLDER/states --regenerate --dtype bfloat16
set -euo pipefail
work=${1:?"usage: bench/recipes/bundled.sh FOLDER (checkpoints and states go there, about 6 GB)"}
cd "$(dirname "$0")/../.."
# The first 9,216 of 25,217 stored answers, at about 1,000 tokens a second on two cores.
beagle-sd prepare bench/data/smollm2-135m-answers.npz "$work/states" --dtype bfloat16 --limit 9216
beagle-sd train "$work/states" "$work/run" --draft-vocab 8192 --key-value-heads 9 --window 1 --steps 4 \
    --block-epochs 1.1 --simulation-epochs 1.4 --tokens-per-step 2048 --lr 2e-3 --schedule cosine --warmup-steps 40 \
    --regression 1.0 --eval-steps 300 --save-steps 100
python - "$work" <<'PYTHON'
import sys
import torch
from beagle_sd import BeagleDraft

draft = BeagleDraft.from_pretrained(f"{sys.argv[1]}/run/final").to(torch.bfloat16)
draft.save_pretrained(f"{sys.argv[1]}/half")
PYTHON
python -m bench.answers.acceptance --draft "$work/half" --count 40 --out "$work/half/acceptance.json"
