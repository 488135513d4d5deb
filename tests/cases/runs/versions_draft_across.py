"""A draft saved under transformers 4.57 and loaded under the installed one, and the other way.

Expected: transformers below 5.17 is refused by its version where the package is imported, and so is a draft's config in
the form that transformers 4 wrote. 4.57 is looked for in the folder $TF457, made by
pip install --target FOLDER transformers==4.57.6
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

NEW = """
import sys, torch, beagle_sd
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
target = LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes)).eval()
if sys.argv[1] == "save":
    beagle_sd.BeagleDraft.from_target(target).save_pretrained(sys.argv[2])
else:
    beagle_sd.BeagleDraft.from_pretrained(sys.argv[2]).bind(target)
"""
OLD = """
import json, sys
from transformers import PretrainedConfig
fields = json.load(open(sys.argv[1]))
class Draft(PretrainedConfig):
    model_type = fields.pop("model_type")
theta = fields.pop("rope_parameters")["rope_theta"]
Draft(**fields, rope_theta=theta).to_json_file(sys.argv[1])
"""
if not os.environ.get("TF457"):
    print("needs TF457, a folder: pip install --target FOLDER transformers==4.57.6, then TF457=FOLDER")
    sys.exit(77)


def run(code: str, *words: str, old: bool = False) -> str:
    """The last line that a child prints, with transformers 4.57 where `old`."""
    path = os.pathsep.join(filter(None, [old and os.environ["TF457"], os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    child = subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True)
    return ((child.stdout + child.stderr).strip().splitlines() or [""])[-1]


failed = False
folder = tempfile.mkdtemp()
for name, old, words, expected in (
    ("save by 4.57", True, ("save", folder), "5.17"),
    ("save by the installed", False, ("save", folder), ""),
    ("load by the installed", False, ("load", folder), ""),
    ("load by 4.57", True, ("load", folder), "5.17"),
):
    line = run(NEW, *words, old=old)
    print(f"{name}: {line[:200]}")
    failed |= expected not in line or not expected and "Error" in line
config = Path(folder) / "config.json"
print("config by 4.57:", run(OLD, str(config), old=True), sorted(json.loads(config.read_text()))[-6:])
line = run(NEW, "load", folder)
print("load its config:", line[:200])
sys.exit(failed or "ValueError" not in line or "transformers 4" not in line)
