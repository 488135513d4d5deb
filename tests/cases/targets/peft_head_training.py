"""LoRA on the head itself (target_modules has lm_head).

Expected: what the draft is trained towards, and its own head, are the adapted one, or it is refused by name (as trl
and Liger do).
"""

import sys

import torch
from models import small_target
from peft import LoraConfig, get_peft_model

import beagle_sd
from beagle_sd.models.target import Target

base = small_target(tie_word_embeddings=False)
inner = (
    get_peft_model(base, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"))
    .eval()
    .get_base_model()
)
try:
    draft = beagle_sd.BeagleDraft.from_target(inner)
except ValueError as error:
    print("refused:", error)
    sys.exit(0)
h = torch.randn(3, 64)
with torch.no_grad():
    gap = (Target(inner).head(h) - draft.logits(h)).abs().max().item()
    size = Target(inner).head(h).abs().max().item()
print(
    f"largest difference between the target's logits and the draft's head over the same states: {gap:.3f} of {size:.3f}"
)
sys.exit(gap > 1e-3)
