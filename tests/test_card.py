"""The model card: numbers that were measured, metadata that the hub reads, and code that runs when it is pasted."""

import functools
import json
import re
import subprocess
import sys

import pytest
import tiny_runs
from huggingface_hub import ModelCard

from jaxpeft.tasks.token_classification import Span, TaggedText

RUNS = {
    "masked-lm": tiny_runs.everything,
    "classification": tiny_runs.labels,
    "full": tiny_runs.scores,
    "token-classification": tiny_runs.entities,
    "questions": tiny_runs.questions,
}
RUN_BLOCKS = """
import contextlib, io, json, sys
outputs = []
for block in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(block, "card", "exec"), {})
    outputs.append(output.getvalue())
print(json.dumps(outputs))
"""

pytestmark = pytest.mark.xdist_group("runs")


@pytest.fixture(name="root")
def _root(tmp_path_factory):
    return tiny_runs.workplace(tmp_path_factory)


@pytest.fixture(params=RUNS)
def run(request, root):
    """The run's directory, its results and its card."""
    directory, results = RUNS[request.param](root)
    return directory, results, ModelCard.load(directory.parent.parent / results["export"] / "README.md")


def code_of(card):
    return re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)


def filled(code, places):
    for place, own in places.items():
        code = code.replace(f"'{place}", f"'{own}")
    return code


@functools.cache
def outputs(root):
    """What the code of all the cards prints, by run; one process, as imports take longest."""
    pytest.importorskip("peft", reason="needs peft: pip install -e '.[test]'")
    cards = {name: ModelCard.load(root / make(root)[1]["export"] / "README.md") for name, make in RUNS.items()}
    # The card's places are the reader's own: here the working directory.
    places = {"path/to/base": "base", "path/to/": "runs/"}
    blocks = [filled(block, places) for card in cards.values() for block in code_of(card)]
    done = subprocess.run(
        [sys.executable, "-c", RUN_BLOCKS], cwd=root, input=json.dumps(blocks), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not re.search("UserWarning|missing adapter keys", done.stderr), done.stderr
    printed = iter(json.loads(done.stdout.splitlines()[-1]))
    return {name: [next(printed) for _ in code_of(card)] for name, card in cards.items()}


def test_metadata(run):
    _, results, card = run
    data = card.data.to_dict()
    assert data["library_name"] == ("transformers" if results["method"] == "full" else "peft")
    tags = {"masked-lm": "fill-mask", "classification": "text-classification"}
    assert data["pipeline_tag"] == tags.get(results["task"], results["task"])
    assert {"jax", "flax", "jaxpeft"} <= set(data["tags"])
    (index,) = data["model-index"]
    assert index["name"] == results["name"]
    measured = {metric["type"]: metric["value"] for result in index["results"] for metric in result["metrics"]}
    assert measured == results["test"]
    (split,) = {result["dataset"]["split"] for result in index["results"]}
    assert split == results["test_split"]
    assert all(value is not None for value in data.values())


def test_every_number_is_the_runs(run):
    directory, results, card = run
    text = card.content
    assert not re.search(r"\b(N/A|n/a|nan|NaN|None|null|inf|TODO|More Information Needed)\b", text)
    assert f"| total | {results['parameters_total']:,} |" in text
    share = 100 * results["parameters_trainable"] / results["parameters_total"]
    assert f"| trainable | {results['parameters_trainable']:,} ({share:.2f} %) |" in text
    (weights,) = (directory.parent.parent / results["export"]).glob("*.safetensors")
    assert f"{weights.stat().st_size / 1e6:.2f} MB" in text
    for value in (*results["test"].values(), *results["before"].values()):
        assert f"{value:.4f}" in text or f"{value:,.1f}" in text
    assert ("| – |" in text) == (not results["before"])
    assert f"step {results['best_step']} of {results['steps']}" in text
    config = (directory / "config.yaml").read_text()
    assert (
        f"| learning rate | {float(re.search(r'learning_rate: (.*)', config)[1]):g}, linear, 1 warm-up steps |" in text
    )
    for example in results["examples"]:
        assert example["text"] in text
    assert "runs/" not in text
    assert str(directory.absolute()) not in text


def test_it_says_the_method(run):
    _, results, card = run
    said = {"hira": "Sparse HiRA on an NF4 base", "lora": "LoRA", "full": "Full fine-tuning"}[results["method"]]
    assert f"| method | {said} |" in card.content
    assert ("sparsity | 50 %, magnitude-based" in card.content) == (results["method"] == "hira")
    assert ("trained on an NF4 base" in card.content) == (results["method"] == "hira")
    assert ("| rank | 2 |" in card.content) == (results["method"] != "full")


@pytest.mark.slow
def test_the_code_fills_masks(root):
    results = tiny_runs.everything(root)[1]
    ours, theirs = outputs(root)["masked-lm"]
    first_mask = eval(ours)[0][0]
    assert [token for token, _ in first_mask[:3]] == [token for token, _ in results["examples"][0]["after"][0]]
    # On the full-precision base it may be another word, as the card says.
    assert theirs.strip()


@pytest.mark.slow
def test_the_code_classifies(root):
    ours, theirs = outputs(root)["classification"]
    probabilities = [float(number) for number in re.findall(r"\d\.\d+", theirs)]
    assert sorted(probabilities) == pytest.approx(
        sorted(p for _, p in eval(ours)[0]), abs=1e-4
    )  # torch prints four digits


@pytest.mark.slow
def test_the_code_tags_words(root):
    ours, theirs = outputs(root)["token-classification"]
    (answer,) = eval(ours, {"TaggedText": TaggedText, "Span": Span})
    assert eval(theirs) == list(zip(answer.words, answer.tags, strict=True))


@pytest.mark.slow
def test_the_code_gives_the_value_of_a_regression(root):
    ours, theirs = outputs(root)["full"]
    assert float(re.search(r"-?\d\.\d+", theirs)[0]) == pytest.approx(eval(ours)[0][0][1], abs=1e-4)


@pytest.mark.slow
def test_the_code_answers_a_question(root):
    """Both sides say that there is no answer, or give the same one."""
    ours, theirs = outputs(root)["questions"]
    said = re.search(r"best=(None|PossibleAnswer\(text='([^']*)')", ours)
    assert theirs.strip() == ("no answer" if said[1] == "None" else said[2])
