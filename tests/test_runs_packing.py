"""A whole run on packed texts: what it minimises is what it minimises without packing."""

import json
import shutil

import pytest
import tiny_runs

FLAGS = """
--task classification --model.name base --model.dropout 0 --data.train_file labels.tsv --training.batch_size 40
--training.num_steps 3 --data.max_length 32
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.workplace(tmp_path_factory)


@pytest.mark.slow
def test_a_packed_run_has_the_losses_of_the_run_without(root):
    """All rows in one batch, so that both runs see the same texts in every update; over four devices."""
    losses, shapes = {}, {}
    for packing in ("true", "false"):
        directory, results = tiny_runs.train(root, FLAGS, "--name", f"packing-{packing}", "--data.packing", packing)
        lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
        losses[packing] = [line["loss"] for line in lines if line["split"] == "train"]
        shapes[packing] = results["compiled_shapes"]
        shutil.rmtree(directory)
    assert losses["true"][0] == pytest.approx(losses["false"][0], rel=1e-5)
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-4)
    assert shapes == {"true": ["20 x 32"], "false": ["40 x 32"]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data.packing true", "data.packing is only for classification"),
        (
            "--task classification --adapter.method prompt-tuning --data.packing true",
            "data.packing cannot be used with prompt-tuning",
        ),
        ("--model.attention flash", "model.attention 'flash' needs a TPU, or an NVIDIA GPU"),
    ],
)
def test_what_cannot_be_is_refused(root, capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        tiny_runs.train(root, "--name refused --model.name base --data.train_file labels.tsv " + flags)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
