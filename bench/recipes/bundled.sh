#!/usr/bin/env bash
# Trains the bundled draft of SmolLM2-135M from the stored answers, then measures it. Safe to kill and run again.
#   bench/recipes/bundled.sh FOLDER
# More answers first: beagle-sd prompts FOLDER/prompts.jsonl --seed 3, then
#                     beagle-sd prepare FOLDER/prompts.jsonl FOLDER/states --regenerate --dtype bfloat16
# The long answers: beagle-sd prompts FOLDER/long.jsonl --count 3000 --seed 1923 --mix long-documents=2 --mix long-code=1
#                   --mix chats=1, then beagle-sd prepare FOLDER/long.jsonl FOLDER/long --regenerate --context 6400 (of
#                   its first 500 rows those 330 that were done in half an hour)
set -euo pipefail
work=${1:?"usage: bench/recipes/bundled.sh FOLDER (checkpoints and states go there, about 6 GB)"}
cd "$(dirname "$0")/../.."
# 8,740 of 25,217 stored answers, at about 1,000 tokens a second on a core, and the answers to long texts.
beagle-sd prepare bench/data/smollm2-135m-answers.npz "$work/states" --dtype bfloat16 --limit 8740
beagle-sd prepare bench/data/smollm2-135m-long-answers.npz "$work/long" --dtype bfloat16 --context 6400 --window-keys 256
common=(--tokens-per-step 2048 --schedule cosine --warmup-steps 40 --regression 1.0 --optimizer muon --autocast
    --eval-steps 500 --save-steps 200)
beagle-sd train "$work/states" "$work/first" --draft-vocab 8192 --key-value-heads 9 --window-keys 256 --window 1 \
    --block-epochs 2 --simulation-epochs 0 --lr 5e-3 "${common[@]}"
beagle-sd train "$work/states" "$work/run" --more "$work/long" --from-draft "$work/first/final" --window 1 --steps 4 \
    --block-epochs 0 --simulation-epochs 3 --lr 4e-3 --context 6400 "${common[@]}"
python - "$work" <<'PYTHON'
import sys
import torch
from beagle_sd import BeagleDraft

draft = BeagleDraft.from_pretrained(f"{sys.argv[1]}/run/final").to(torch.bfloat16)
draft.save_pretrained(f"{sys.argv[1]}/half")
PYTHON
python -m bench.answers.acceptance --draft "$work/half" --count 40 --out "$work/half/acceptance.json"
