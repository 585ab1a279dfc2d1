#!/usr/bin/env bash
# PEFT 0.21.2 loses the order of rank_pattern and alpha_pattern when it saves: a reloaded adapter computes something else, or does not load.
#
# The first key of a pattern that matches a layer decides. save_pretrained writes adapter_config.json with sorted keys, at every level.
# So two keys that match one layer change places if the alphabet says so: here r"layer\.0\..*" comes to stand before "query". With
# alpha_pattern the reloaded layer has another scaling, without a warning. With rank_pattern PEFT cannot load the file that it wrote.
#
# Seen with peft 0.21.2, torch 2.13.0, transformers 4.57.6 on Python 3.11:
#   alpha_pattern: scaling 8.0 before saving, 2.0 after loading
#   rank_pattern: RuntimeError, size mismatch
# Exit status 0 if this is still so, 1 if not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 peft==0.21.2 transformers==4.57.6

cat >"$work/order.py" <<'PYTHON'
import sys

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn


def base():
    layers = [nn.ModuleDict({"query": nn.Linear(4, 4), "value": nn.Linear(4, 4)}) for _ in range(2)]
    return nn.ModuleDict({"layer": nn.ModuleList(layers)})


def saved_and_loaded(folder, **patterns):
    model = get_peft_model(base(), LoraConfig(r=2, lora_alpha=2, target_modules=["query", "value"], **patterns))
    model.save_pretrained(folder)
    return model, PeftModel.from_pretrained(base(), folder)


def scaling(model):
    return model.get_submodule("base_model.model.layer.0.query").scaling["default"]


before, after = saved_and_loaded(sys.argv[1] + "/alpha", alpha_pattern={"query": 16, r"layer\.0\..*": 4})
print(f"alpha_pattern: scaling {scaling(before)} before saving, {scaling(after)} after loading")
try:
    saved_and_loaded(sys.argv[1] + "/rank", rank_pattern={"query": 3, r"layer\.0\..*": 1})
    print("rank_pattern: loaded")
except RuntimeError as error:
    print("rank_pattern: RuntimeError,", "size mismatch" if "size mismatch" in str(error) else error)
PYTHON
found=$("$work/venv/bin/python" "$work/order.py" "$work" 2>/dev/null)
echo "$found"
expected="alpha_pattern: scaling 8.0 before saving, 2.0 after loading
rank_pattern: RuntimeError, size mismatch"
[ "$found" = "$expected" ] || { echo "this has changed" >&2; exit 1; }
