"""docs/contributing.md's promise: a new thing of each kind is one file and one line. Its examples are added to a copy and trained with."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs" / "contributing.md").read_text()
FILES = dict(re.findall(r"```python\n# (jaxpeft/\S+\.py)\n(.*?)```", GUIDE, re.DOTALL))
LINES = dict(re.findall(r"```python\n# in (\w+)\n(.*?)```", GUIDE, re.DOTALL))
REGISTRIES = {
    "METHODS": "adapters",
    "TASKS": "tasks",
    "FAMILIES": "families",
    "SCHEDULES": "pruning",
    "SCORES": "pruning",
    "NUMBER_FORMATS": "quantization",
}
RUNS = {
    "method": "--adapter.method output-scale --data.train_file train.txt",
    "schedule-criterion-format": "--pruning.sparsity 0.5 --pruning.schedule linear --pruning.criterion relative-magnitude "
    "--pruning.begin 0.2 --pruning.every_steps 1 --model.quantization half --data.train_file train.txt",
    "task": "--task focal-classification --data.train_file labels.tsv --data.bucket_lengths [16]",
    "family": "--model.name toy-base --data.train_file train.txt",
}
PROGRAM = """
import json, sys
from transformers import FLAX_MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, BertConfig, FlaxBertForMaskedLM, AutoTokenizer, BertTokenizerFast

class ToyBertConfig(BertConfig):
    model_type = "toy-bert"

AutoConfig.register("toy-bert", ToyBertConfig)
AutoTokenizer.register(ToyBertConfig, fast_tokenizer_class=BertTokenizerFast)
FLAX_MODEL_FOR_MASKED_LM_MAPPING.register(ToyBertConfig, FlaxBertForMaskedLM)

import jaxpeft
from jaxpeft.cli import main
print(jaxpeft.__file__)
for args in json.loads(sys.argv[1]):
    main(args)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.workplace(tmp_path_factory)


def test_the_guide_has_an_example_of_each_kind():
    assert LINES.keys() == REGISTRIES.keys()
    assert len(FILES) == 6
    assert all(len(line.splitlines()) == 1 for line in LINES.values())


def extended(directory):
    """A copy of the package with the guide's six files, and six lines in its registries."""
    shutil.copytree(ROOT / "jaxpeft", directory / "jaxpeft", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in FILES.items():
        assert not (directory / name).exists()
        (directory / name).write_text(text)
    for registry, room in REGISTRIES.items():
        file = directory / "jaxpeft" / room / "__init__.py"
        text, number = re.subn(
            rf'({registry}(?:: [^=]+)? = _?Registry\(\s*"[^"]*",\s*\{{)', rf"\1\n{LINES[registry]}", file.read_text()
        )
        assert number == 1, f"{registry} is not in {file}"
        file.write_text(text)
    return directory


@pytest.mark.slow
def test_one_of_each_kind_is_one_file_and_one_line_and_trains(root, tmp_path):
    toy = root / "toy-base"
    shutil.copytree(root / "base", toy)
    config = json.loads((toy / "config.json").read_text())
    (toy / "config.json").write_text(json.dumps({**config, "model_type": "toy-bert"}))
    runs = [
        ["train", "--model.name", "base", *tiny_runs.COMMON.split(), "--name", f"toy-{name}", *flags.split()]
        for name, flags in RUNS.items()
    ]
    commands = [*runs, ["predict", "runs/toy-method", "The [MASK] statement."], ["evaluate", "runs/toy-task"]]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        cwd=root,
        env=tiny_runs.environment(PYTHONPATH=str(extended(tmp_path))),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
    results = {name: json.loads((root / "runs" / f"toy-{name}" / "results.json").read_text()) for name in RUNS}
    assert results["method"]["method"] == "output-scale"
    assert results["method"]["parameters_trainable"] > 0
    assert results["schedule-criterion-format"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert results["task"]["task"] == "focal-classification"
    assert set(results["task"]["test"]) == {"loss", "accuracy", "f1", "matthews"}
    card = (root / "runs/toy-schedule-criterion-format/adapter/README.md").read_text()
    assert "bfloat16" in card
    for name in RUNS:
        assert f"{'runs/toy-' + name}" in done.stdout
