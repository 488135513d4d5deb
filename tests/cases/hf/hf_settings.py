"""Settings of transformers' generate that users of speculation ask for.

Expected: honoured, or refused by name with a true reason. Those that do not look at the text before (min_new_tokens,
suppress_tokens, sequence_bias of one token, one-token bad_words_ids) could be honoured exactly in a tree.
"""

import sys
import warnings

import torch
from models import small_target

import beagle_sd

warnings.filterwarnings("ignore")

target = small_target(initializer_range=0.3)
draft = beagle_sd.BeagleDraft.from_target(target)
ids = torch.randint(3, 90, (2, 12))
mask = torch.ones_like(ids)
mask[1, :5] = 0
free = target.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)
end = int(free[0, 12 + 6])
other = int(free[1, 12 + 3])
cases = {
    "eos list": dict(eos_token_id=[end, other], pad_token_id=0),
    "pad == eos, left padding": dict(eos_token_id=end, pad_token_id=end),
    "eos tensor": dict(eos_token_id=torch.tensor([end, other]), pad_token_id=0),
    "max_length": dict(max_length=25, max_new_tokens=None, pad_token_id=0),
    "max_length and max_new_tokens": dict(max_length=15, max_new_tokens=20, pad_token_id=0),
    "num_return_sequences": dict(do_sample=True, num_return_sequences=2, top_k=1, pad_token_id=0),
    "max_time": dict(max_time=60.0, pad_token_id=0),
    "min_new_tokens": dict(min_new_tokens=10, eos_token_id=end, pad_token_id=0),
    "suppress_tokens": dict(suppress_tokens=[end], pad_token_id=0),
    "bad_words_ids (one token)": dict(bad_words_ids=[[end]], pad_token_id=0),
    "sequence_bias (one token)": dict(sequence_bias=[[[end], -5.0]], pad_token_id=0),
    "bad_words_ids (two tokens)": dict(bad_words_ids=[[end, other]], pad_token_id=0),
    "repetition_penalty": dict(repetition_penalty=1.1, pad_token_id=0),
    "no_repeat_ngram_size": dict(no_repeat_ngram_size=2, pad_token_id=0),
    "typical_p": dict(do_sample=True, typical_p=0.9, pad_token_id=0),
    "epsilon_cutoff": dict(do_sample=True, epsilon_cutoff=0.01, pad_token_id=0),
    "output_scores": dict(output_scores=True, return_dict_in_generate=True, pad_token_id=0),
    "output_hidden_states": dict(output_hidden_states=True, return_dict_in_generate=True, pad_token_id=0),
    "num_beams": dict(num_beams=2, pad_token_id=0),
    "guidance_scale": dict(guidance_scale=1.5, pad_token_id=0),
    "prompt_lookup_num_tokens": dict(prompt_lookup_num_tokens=3, pad_token_id=0),
    "use_cache=False": dict(use_cache=False, pad_token_id=0),
    "cache_implementation=dynamic": dict(cache_implementation="dynamic", pad_token_id=0),
}
failed = False
exact = {"min_new_tokens", "suppress_tokens", "bad_words_ids (one token)", "sequence_bias (one token)", "eos tensor"}
for name, more in cases.items():
    settings = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, **more}
    settings = {k: v for k, v in settings.items() if v is not None}
    try:
        want = target.generate(ids, **settings)
    except Exception as error:
        print(f"{name:30s} plain: {type(error).__name__} {str(error)[:80]}")
        continue
    want = getattr(want, "sequences", want)
    try:
        made = target.generate(ids, **settings, custom_generate=beagle_sd.custom_generate(draft))
        made = getattr(made, "sequences", made)
        same = torch.equal(made, want)
        print(f"{name:30s}", "same" if same else "OTHER")
        failed |= not same
    except Exception as error:
        print(f"{name:30s} {type(error).__name__}: {str(error)[:130]}")
        failed |= name in exact or not (isinstance(error, ValueError) and "allowed" in str(error))
try:
    made = beagle_sd.generate(
        target, draft, ids[:1], max_new_tokens=20, eos_token_id=torch.tensor([end, other])
    ).sequences
    print("beagle_sd.generate(eos tensor)", made.shape[1] - 12, "of", 20)
except Exception as error:
    print("beagle_sd.generate(eos tensor)", type(error).__name__, str(error)[:120])
    failed = True
sys.exit(failed)
