#!/usr/bin/env bash
# PEFT 0.21.2's class for extractive question answering drops the token types, so that a BERT no longer knows which text is the question.
#
# `get_peft_model` with `task_type="QUESTION_ANS"` returns a PeftModelForQuestionAnswering. Its forward takes `token_type_ids`, and does not
# pass them on: BERT then takes every token as one of the first text. A fresh LoRA, whose B is zero, should leave the model's logits as
# they are. It does for SEQ_CLS, and for QUESTION_ANS only if all types are 0. Nothing is said, and training on such logits works, so an
# adapter trained elsewhere (or by another class) seems to be worse than it is. `get_base_model()` has the adapter and takes the types.
#
# Seen with peft 0.21.2, transformers 4.57.6 and torch 2.13.0 on Python 3.11: the largest difference of a logit to the base's
#   SEQ_CLS       types of both texts 0.0
#   QUESTION_ANS  all types 0         0.0
#   QUESTION_ANS  types of both texts above 0.01
#   QUESTION_ANS  types of both texts, by get_base_model() 0.0
# Exit status 0 if this is still so, 1 if not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==4.57.6 peft==0.21.2
cat >"$work/program.py" <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def first(output):
    return output.start_logits if "start_logits" in output else output.logits


def difference(model_class, task_type, both_texts, base=False):
    """Of a model with a fresh adapter to the same model without, in any of its (first) logits."""
    torch.manual_seed(0)
    model = model_class(BertConfig(**SIZES, initializer_range=0.5)).eval()
    inputs = {"input_ids": torch.arange(5, 17)[None], "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    types = (torch.arange(12) >= 6).long()[None] if both_texts else torch.zeros(1, 12, dtype=torch.long)
    with torch.no_grad():
        before = first(model(**inputs, token_type_ids=types))
        adapted = get_peft_model(model, LoraConfig(task_type=task_type, target_modules=["query", "value"])).eval()
        asked = adapted.get_base_model() if base else adapted
        after = first(asked(**inputs, token_type_ids=types))
    found = float((before - after).abs().max())
    return "0.0" if found < 1e-6 else "above 0.01" if found > 0.01 else f"{found:.1e}"


QA = BertForQuestionAnswering
print("SEQ_CLS       types of both texts", difference(BertForSequenceClassification, "SEQ_CLS", True))
print("QUESTION_ANS  all types 0        ", difference(QA, "QUESTION_ANS", False))
print("QUESTION_ANS  types of both texts", difference(QA, "QUESTION_ANS", True))
print("QUESTION_ANS  types of both texts, by get_base_model()", difference(QA, "QUESTION_ANS", True, base=True))
PYTHON
found=$("$work/venv/bin/python" "$work/program.py" 2>/dev/null)
echo "$found"
expected="SEQ_CLS       types of both texts 0.0
QUESTION_ANS  all types 0         0.0
QUESTION_ANS  types of both texts above 0.01
QUESTION_ANS  types of both texts, by get_base_model() 0.0"
[ "$found" = "$expected" ] || { echo "this has changed" >&2; exit 1; }
