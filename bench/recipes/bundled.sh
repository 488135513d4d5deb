#!/usr/bin/env bash
# Trains the bundled draft of SmolLM2-135M from the stored answers, then measures it. Safe to kill and run again.
#   bench/recipes/bundled.sh FOLDER
# More answers first: beagle-sd prompts FOLDER/prompts.jsonl --seed 3, then
#                     beagle-sd prepare FOLDER/prompts.jsonl FOLDER/states --regenerate --dtype bfloat16
# The long answers: beagle-sd prompts FOLDER/long.jsonl --count 3000 --seed 1923 --mix long-documents=2 --mix long-code=1
#                   --mix chats=1, then beagle-sd prepare FOLDER/long.jsonl FOLDER/long --regenerate --context 6400 (of
#                   its first 500 rows those 330 that were done in half an hour)
# The own ones: beagle-sd prompts FOLDER/own.jsonl --count 9488 --written-by smollm2-135m (those stored were written in
#               that way before there was the command), then
#               beagle-sd prepare FOLDER/own.jsonl FOLDER/own --regenerate --dtype bfloat16 (5,802 of them, in 22 minutes)
set -euo pipefail
work=${1:?"usage: bench/recipes/bundled.sh FOLDER (checkpoints and states go there, about 9 GB)"}
cd "$(dirname "$0")/../.."
data=bench/data/smollm2-135m
processes=${PROCESSES:-2}
common=(--tokens-per-step 2048 --schedule cosine --warmup-steps 40 --regression 1.0 --optimizer muon --autocast
    --eval-steps 500 --save-steps 200 --window 1 --steps 4)
train() { torchrun --nproc-per-node "$processes" -m beagle_sd train "$@" "${common[@]}"; }

# At about 1,000 tokens a second on a core: first 8,740 of the 25,217 stored answers, and the long ones.
beagle-sd prepare "$data-answers.npz" "$work/states" --dtype bfloat16 --limit 8740
beagle-sd prepare "$data-long-answers.npz" "$work/long" --dtype bfloat16 --context 6400 --window-keys 256
train "$work/states" "$work/first" --draft-vocab 8192 --key-value-heads 9 --window-keys 256 \
    --block-epochs 2 --simulation-epochs 0 --lr 5e-3
train "$work/states" "$work/second" --more "$work/long" --from-draft "$work/first/final" --context 6400 \
    --block-epochs 0 --simulation-epochs 3 --lr 4e-3

# Then more of them and the target's own prompts, those counted twice, with a vocabulary of twice the size.
beagle-sd prepare "$data-answers.npz" "$work/states" --dtype bfloat16 --limit 13953
beagle-sd prepare "$data-own-answers.npz" "$work/own" --dtype bfloat16
train "$work/states" "$work/third" --more "$work/own" --more "$work/own" --more "$work/long" --context 6400 \
    --from-draft "$work/second/final" --draft-vocab 16384 --block-epochs 0 --simulation-epochs 2.1 --lr 4e-3
# A head of 8,192 is faster on a CPU.
python - "$work" <<'PYTHON'
import sys
from pathlib import Path
import torch
from beagle_sd.data.dataset import StateDataset
from beagle_sd.models.loading import load_draft, load_target

work = Path(sys.argv[1])
data = StateDataset(*(work / name for name in ("states", "own", "own", "long")), context=6400)
target, _ = load_target("smollm2-135m")
draft = load_draft(work / "third" / "final", target, torch.float32)
draft.set_draft_vocab(data.frequent_tokens(8192, target.config.vocab_size))
draft.to(torch.bfloat16).save_pretrained(work / "half")
PYTHON
python -m bench.answers.acceptance --draft "$work/half" --count 40 --out "$work/half/acceptance.json"
