"""Files as users have them, in whole runs: the flags reach training, evaluation and prediction."""

import io
import shutil

import pytest
import tiny_runs

from jaxpeft import cli
from jaxpeft.cli import train as train_command

pytestmark = pytest.mark.xdist_group("runs")

FLAGS = """
--name x --model.name base --task classification --adapter.rank 2 --data.max_length 16 --data.bucket_lengths [16]
--data.train_file a[1].csv --data.label_column answer --training.num_steps 3 --training.warmup_steps 1
--training.batch_size 4 --evaluation.before false
"""


@pytest.fixture
def root(tmp_path_factory, tmp_path, monkeypatch):
    """A working directory with `base` and a file as a German spreadsheet writes it, with an index and an empty text."""
    shutil.copytree(tiny_runs.workplace(tmp_path_factory) / "base", tmp_path / "base")
    rows = "".join(f"{i};a line über {i};{('no', 'yes')[i % 2]}\n" for i in range(30))
    (tmp_path / "a[1].csv").write_bytes(f";text;answer\n{rows}30;;no\n".encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_as_a_user_has_it(root, capsys, monkeypatch):
    for flags, message in {
        "": "a[1].csv, line 2: the byte 0xfc is not utf-8; set data.encoding",
        " --data.encoding latin-1": "a[1].csv: 1 of 31 rows have no text (row 31); fill them in, or set data.drop_empty to true",
    }.items():
        with pytest.raises(SystemExit):
            train_command.main((FLAGS + flags).split(), prog="train.py")
        assert message in capsys.readouterr().err
    train_command.main(f"{FLAGS} --data.encoding latin-1 --data.drop_empty true".split(), prog="train.py")
    assert "1 of 31 rows of a[1].csv have no text and are left out (row 31)" in capsys.readouterr().out
    assert "  drop_empty: true\n" in (root / "runs/x/config.yaml").read_text()

    cli.main(["evaluate", "runs/x", "--split", "validation"])
    assert "accuracy" in capsys.readouterr().out

    def give(content):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))

    give("\ufeffOne line.\r\nA line über 2.\n".encode())
    cli.main(["predict", "runs/x", "-", "Another."])
    texts = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert texts == ["One line.", "A line über 2.", "Another."]
    for content, message in {
        b"": "standard input, line 1: it is blank; give one text a line",
        b"a\n\nb\n": "standard input, line 2: it is blank",
        b"a\n\xfc\n": "standard input, line 2: not utf-8",
    }.items():
        give(content)
        with pytest.raises(SystemExit):
            cli.main(["predict", "runs/x", "-"])
        assert message in capsys.readouterr().err
