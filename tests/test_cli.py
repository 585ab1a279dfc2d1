"""What users get wrong: one line that names the value and the way out, status 2, and nothing written."""

import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import tiny
import tiny_runs
from hub_server import HubServer
from huggingface_hub import constants

from jaxpeft import cli
from jaxpeft.cli import train as train_command

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.xdist_group("runs")


@pytest.fixture
def work(tmp_path_factory, tmp_path, monkeypatch):
    """A working directory with `base`, `train.txt` and `labels.tsv`."""
    source = tiny_runs.workplace(tmp_path_factory)
    shutil.copytree(source / "base", tmp_path / "base")
    for name in ("train.txt", "labels.tsv"):
        shutil.copy(source / name, tmp_path)
    (tmp_path / "outside.tsv").write_text("text\tlabel\n" + "\n".join(f"a line\t{i % 2}" for i in range(30)))
    (tmp_path / "outside-dev.tsv").write_text("text\tlabel\na line\t1\na line\t7\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text("\n\n\n")
    (tmp_path / "unknown-key.yaml").write_text("adapter:\n  rnak: 4\n")
    (tmp_path / "unknown-group.yaml").write_text("adaptor:\n  rank: 4\n")
    (tmp_path / "wrong-type.yaml").write_text("training:\n  num_steps: many\n")
    (tmp_path / "not.yaml").write_text("adapter: [rank")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(directory):
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def refused(capsys, flags, *, command=None):
    """Run a command that must fail; its one line on standard error."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, *flags.split()]) if command else train_command.main(
            [*COMMON.split(), *flags.split()], prog="train.py"
        )
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.endswith("\n")
    assert "Traceback" not in error
    return error


COMMON = (
    "--name x --model.name base --training.num_steps 3 --training.warmup_steps 1 --data.max_length 16 --adapter.rank 2"
)
TEXT = "--data.train_file train.txt"
LABELS = "--task classification --data.train_file labels.tsv"
MISTAKES = {
    "unknown-flag": (f"{TEXT} --adapter.rnak 4", r"--adapter\.rnak 4; did you mean --adapter\.rank\?"),
    "abbreviation": (f"{TEXT} --adapter.ran 4", r"--adapter\.ran 4; did you mean --adapter\.rank\?"),
    "peft-name": (f"{TEXT} --adapter.r 4", r"--adapter\.r 4; it is PEFT's name: call it --adapter\.rank "),
    "peft-long-name": (f"{TEXT} --adapter.lora_alpha 4", r"--adapter\.lora_alpha 4; .*: call it --adapter\.alpha "),
    "unknown-flag-with-a-dash": (f"{TEXT} --output-dir x", r"--output-dir.*did you mean --output_dir\?"),
    "unknown-key": ("--config unknown-key.yaml", r"rnak.*did you mean 'adapter\.rank'\?"),
    "unknown-group": ("--config unknown-group.yaml", r"adaptor\.rank.*did you mean 'adapter\.rank'\?"),
    "wrong-type": (f"{TEXT} --adapter.rank many", r"adapter\.rank.*many"),
    "wrong-type-in-a-file": ("--config wrong-type.yaml", r"training\.num_steps.*many"),
    "wrong-choice": (
        f"{TEXT} --adapter.method lore",
        r"adapter\.method is 'lore'; it must be one of lora, hira, .*full, head",
    ),
    "option-of-another-method": (
        f"{TEXT} --adapter.method hira --adapter.use_dora true",
        r"adapter\.use_dora True is an option of lora, and adapter\.method is 'hira'; set it to null",
    ),
    "unknown-further-option": (
        f"{TEXT} --adapter.method adalora --adapter.options.total_stop 4",
        r"adapter\.options: the method adalora has no option 'total_stop'; did you mean 'total_step'\?",
    ),
    "further-option-with-a-flag": (
        f"{TEXT} --adapter.options.rank 4",
        r"adapter\.options has 'rank', which has a flag of its own: set adapter\.rank 4",
    ),
    "further-option-of-no-name-near": (
        f"{TEXT} --adapter.method ia3 --adapter.options.x 1",
        r"the method ia3 has no option 'x'; it has feedforward_modules, init_ia3_weights",
    ),
    "lora-plus-without-lora": (
        f"{TEXT} --adapter.method ia3 --training.loraplus_lr_ratio 4",
        r"loraplus_lr_ratio 4 needs adapter\.method to be one of lora, sora, not 'ia3'",
    ),
    "pruned-vectors": (
        f"{TEXT} --adapter.method vera --pruning.sparsity 0.5",
        r"needs adapter\.method to be one of .*, not 'vera'",
    ),
    "unknown-start": (f"{TEXT} --adapter.init_lora_weights pizza", r"'pizza'"),
    "places-of-bitfit": (
        f"{TEXT} --adapter.method bitfit --adapter.target_modules [query]",
        r"adapter\.target_modules \['query'\] cannot be used with bitfit",
    ),
    "text-without-its-start": (
        f"{TEXT} --adapter.method prompt-tuning --adapter.prompt_tuning_init_text x",
        r"prompt_tuning_init_text needs adapter\.prompt_tuning_init TEXT",
    ),
    "adalora-ranks": (
        f"{TEXT} --adapter.method adalora --adapter.target_r 99",
        r"adapter\.target_r is 99; .* from 0 to adapter\.init_r",
    ),
    "no-config-file": ("--config nowhere.yaml", r"nowhere\.yaml"),
    "out-of-range": (f"{TEXT} --pruning.sparsity 1.5", r"pruning\.sparsity is 1\.5; it must be at least 0 and below 1"),
    "url": (
        "--data.train_file train.txt --output_dir gs://bucket/runs",
        r"output_dir 'gs://bucket/runs' is a URL; give a directory",
    ),
    "no-data": ("", r"no data: give data\.name .* or data\.train_file"),
    "two-data": (f"{TEXT} --data.name python-docs", r"'python-docs' and .* 'train\.txt' exclude each other"),
    "no-data-file": ("--data.train_file nowhere.txt", r"nowhere\.txt"),
    "unknown-suffix": ("--data.train_file base/vocab.doc", r"vocab\.doc"),
    "no-column": (
        f"{LABELS} --data.text_column txet",
        r"text_column='txet': labels\.tsv has no such column; did you mean 'text'",
    ),
    "no-label-column": (f"{LABELS} --data.label_column stars", r"label_column='stars': .*columns: text, label"),
    "no-labels": (
        f"{TEXT} --task classification",
        r"classification needs labels, and .*train\.txt has none; .*label_column",
    ),
    "label-outside": (
        "--task classification --data.train_file outside.tsv --data.validation_file outside-dev.tsv",
        r"outside-dev\.tsv.*7",
    ),
    "empty-file": ("--data.train_file empty.txt", r"empty\.txt"),
    "blank-file": ("--data.train_file blank.txt", r"blank\.txt"),
    "unknown-data-set": (
        "--data.name wikitext-2-raw",
        r"dataset 'wikitext-2-raw' is unknown; did you mean 'wikitext-2-raw-v1'",
    ),
    "unknown-model": (
        f"{TEXT} --model.name ./nowhere",
        r"model './nowhere': no such directory; give a directory, package:",
    ),
    "no-package": (f"{TEXT} --model.name package:nowhere/model", r"package nowhere is not installed"),
    "no-tokenizer": (f"{TEXT} --model.tokenizer ./nowhere", r"'./nowhere': no such directory"),
    "rows-too-long": (
        f"{TEXT} --data.max_length 64",
        r"data\.max_length 64 exceeds the 32 positions of base; give at most 32",
    ),
    "target-of-another-model": (
        f"{TEXT} --adapter.target_modules [q_lin]",
        r"target_modules 'q_lin' matches no layer; .* query, value",
    ),
    "target-misspelt": (
        f"{TEXT} --adapter.target_modules [qeury]",
        r"'qeury' matches no layer; did you mean 'query'\?",
    ),
    "target-regex": (f"{TEXT} --adapter.target_modules query", r"'query', read as a regular expression.*\[query\]"),
    "bad-regex": (f"{TEXT} --adapter.target_modules (query", r"'\(query' is not a regular expression"),
    "module-to-save": (f"{TEXT} --adapter.modules_to_save [poler]", r"modules_to_save 'poler' matches no module"),
    "rank-above-width": (
        f"{TEXT} --adapter.rank 17",
        r"adapter\.rank 17 is outside 1 to 16, the width of layer .*query",
    ),
    "full-and-nf4": (
        f"{TEXT} --adapter.method full --model.quantization nf4",
        r"'full'.* set model\.quantization to none",
    ),
    "warm-up": (f"{TEXT} --training.warmup_steps 9", r"training\.warmup_steps 9 is not below the run's 3 steps"),
    "metric": (f"{TEXT} --training.metric f1", r"training\.metric 'f1' is not measured for masked-lm; .*accuracy"),
    "metric-of-other-labels": (
        f"{LABELS} --training.metric pearson",
        r"training\.metric 'pearson' is not measured in this classification with 2 classes; .*accuracy, f1, matthews",
    ),
    "one-class": (f"{LABELS} --data.num_labels 1", r"data\.num_labels is 1; .*data\.regression true"),
    "names-and-numbers": (
        f"{LABELS} --data.label_names [a,b] --data.regression true",
        r"data\.label_names is for classes, and data\.regression predicts numbers",
    ),
    "one-name-twice": (f"{LABELS} --data.label_names [a,a]", r"data\.label_names is \['a', 'a'\]; .* each given once"),
    "names-without-labels": (f"{TEXT} --data.label_names [a,b]", r"data\.label_names is for tasks with labels"),
    "batch-size": (f"{TEXT} --training.batch_size 6", r"training\.batch_size 6 cannot be split over 4 devices; 4 can"),
    "nothing-to-resume": (f"{TEXT} --resume", r"nothing to resume in 'runs/x'; start the run without --resume"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_in_one_line(name, work, capsys):
    flags, message = MISTAKES[name]
    before = files(work)
    assert re.search(message, error := refused(capsys, flags)), error
    assert files(work) == before
    assert not (work / "runs").exists()


def test_a_file_that_is_no_yaml_is_named(work, capsys):
    assert "not.yaml" in refused(capsys, "--config not.yaml")


def test_a_single_class_is_refused(work, capsys):
    (work / "few.tsv").write_text("text\tlabel\n" + "a line\tgood\n" * 30)
    assert "good" in refused(capsys, "--task classification --data.train_file few.tsv --data.bucket_lengths [16]")


def test_a_correlation_of_one_row_is_refused(work, capsys):
    (work / "few.tsv").write_text("text\tlabel\n" + "".join(f"a line\t{i}.5\n" for i in range(10)))
    assert "1 row" in refused(capsys, "--task classification --data.train_file few.tsv --data.bucket_lengths [16]")


def test_a_sentence_without_a_mask_leaves_nothing(work, capsys):
    assert "'Hello.' has no [MASK]" in refused(capsys, f'{TEXT} --evaluation.examples ["Hello."]')
    assert not (work / "runs").exists()


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("pedict", "runs/x", r"unknown command 'pedict'; did you mean 'predict'\?"),
        ("predict", "runs/x hello", r"no such run: 'runs/x'"),
        ("evaluate", "base", r"no config\.yaml in 'base': it is not a run's directory"),
        ("evaluate", "runs/x --split train", r"split.*train"),
        ("merge", "runs/x base", r"'base' exists and is not empty; give a new directory"),
        ("predict", "base", r"texts"),
        (
            "predict",
            "runs/x train.txt",
            r"'train\.txt' is a path here, .* jaxpeft predict runs/x --file train\.txt; .* echo train\.txt",
        ),
        ("predict", "runs/x good base", r"'base' is a path here"),
    ],
)
def test_a_mistake_in_a_command(command, flags, message, work, capsys):
    before = files(work)
    assert re.search(message, error := refused(capsys, flags, command=command)), error
    assert files(work) == before


@pytest.fixture
def stopped(tmp_path_factory, work):
    """A run's directory `runs/everything` in `work`, as it was left."""
    directory, _ = tiny_runs.everything(tiny_runs.workplace(tmp_path_factory))
    shutil.copytree(directory, work / "runs" / "everything")
    for split in ("validation", "test"):
        shutil.copy(directory.parent.parent / f"{split}.txt", work)
    return work / "runs" / "everything"


def test_a_run_is_not_overwritten(stopped, work, capsys):
    before = files(work)
    error = refused(capsys, "--config runs/everything/config.yaml --name everything")
    assert (
        "'runs/everything' already holds a run; continue it with --config runs/everything/config.yaml --resume" in error
    )
    assert files(work) == before


AS_IT_WAS = "--config runs/everything/config.yaml --name everything --resume"


def test_resuming_with_another_configuration(stopped, work, capsys):
    before = files(work)
    error = refused(capsys, f"{AS_IT_WAS} --training.learning_rate 0.5 --seed 3")
    assert "started with another configuration (" in error
    assert "seed: 0, now 3" in error
    assert "training.learning_rate: 0.01, now 0.5" in error
    assert files(work) == before


def test_resuming_on_another_base(stopped, work, capsys):
    tiny.random_encoder(work / "base", num_hidden_layers=1, seed=1, **tiny_runs.TINY)
    before = files(work)
    error = refused(capsys, AS_IT_WAS)
    assert "checkpoint 6 in" in error
    assert "was trained on another base than the one model.name gives now" in error
    assert files(work) == before


def test_mistakes_with_a_finished_run(stopped, work, capsys):
    for flags, message in {
        "predict runs/everything hello": "'hello' has no [MASK] to fill",
        "predict runs/everything [MASK] --top 0": "--top is 0; it must be at least 1",
        f"predict runs/everything {'[MASK],' * 30}": "tokens; the model has 32 positions for a text: shorten it",
    }.items():
        command, rest = flags.split(" ", 1)
        assert message in refused(capsys, rest, command=command)
    (stopped / "results.json").unlink()
    assert "has not finished; continue it with" in refused(capsys, "runs/everything [MASK]", command="predict")


def test_the_hub_does_not_know_it_or_cannot_be_reached(work, capsys, monkeypatch):
    def ask(server):
        with monkeypatch.context() as patch:
            patch.setattr(constants, "ENDPOINT", server.endpoint)
            patch.setattr(constants, "HF_HUB_CACHE", str(work / "cache"))
            patch.setenv("NO_PROXY", "127.0.0.1")
            return refused(capsys, f"{TEXT} --model.name org/absent")

    with HubServer() as gone:
        pass
    with HubServer() as server:
        assert ask(server) == (
            "train.py: error: unknown model 'org/absent': the hub has no such repository, and there is no such directory here\n"
        )
    assert ask(gone) == (
        f"train.py: error: model 'org/absent': the hub ({gone.endpoint}) cannot be reached and no copy is "
        "cached; give a local directory or package:module/folder as --model.name\n"
    )
    assert not (work / "runs").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["train.py", "--help"],
        ["-m", "jaxpeft", "--help"],
        ["-m", "jaxpeft", "train", "--help"],
        ["-m", "jaxpeft", "preflight", "--help"],
    ],
)
def test_help_answers_at_once_and_loads_nothing_heavy(command):
    code = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    if sys.argv[0] == "-m":
        sys.argv.pop(0)
        runpy.run_module(sys.argv[0], run_name="__main__")
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    assert not stop.code
print(sorted({"jax", "flax", "transformers", "torch", "datasets", "numpy"} & set(sys.modules)), file=sys.stderr)
"""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 3
    assert done.stderr == "[]\n"
    if "train" in command[-2]:
        text = " ".join(done.stdout.split())
        for flag, default in {"--adapter.rank": "null", "--training.learning_rate": "0.0003", "--name": "null"}.items():
            assert re.search(rf" {flag} [A-Z_.]+ [^()]*\(type: [^()]*, default: {default}\)", text), flag


def test_one_help_for_all_commands(capsys):
    cli.main(["--help"])
    text = capsys.readouterr().out
    commands = [
        "train",
        "evaluate",
        "predict",
        "merge",
        "pack",
        "unpack",
        "quantize",
        "compare",
        "sparsity-plan",
        "preflight",
    ]
    assert re.findall(r"^  (\w[\w-]*) ", text, re.MULTILINE) == commands == list(cli.COMMANDS)
    assert "--version" in text
    cli.main(["--version"])
    assert capsys.readouterr().out == f"jaxpeft {version('jaxpeft')}\n"


def test_a_bug_keeps_its_traceback(work, monkeypatch):
    from jaxpeft.runs import train

    def broken(config):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(train, "setup_run", broken)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        train_command.main([*COMMON.split(), *TEXT.split()], prog="train.py")
