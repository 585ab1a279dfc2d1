"""Whole runs with and without the token cache: the same files, and a second start does not tokenise."""

import json

import pytest
import tiny_runs

from jaxpeft.data import masked_lm
from jaxpeft.data.token_cache import TokenCache
from jaxpeft.report import console
from jaxpeft.runs import data as runs_data

MASKED = "--model.name base --data.train_file train.txt --data.validation_file validation.txt --adapter.dropout 0.1"
PACKED = "--task classification --model.name base --data.train_file labels.tsv --data.packing true"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.workplace(tmp_path_factory)


def outcome(directory):
    """All that a run says about its training, without its speed."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]
    return metrics, (directory / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("flags", [MASKED, pytest.param(PACKED, marks=pytest.mark.slow)], ids=["masked", "packed"])
def test_a_run_is_the_same_with_and_without_a_cache(root, tmp_path, monkeypatch, flags):
    kind = flags.split()[1]
    train = [f"{flags} --data.token_cache {place} --name" for place in ("null", tmp_path / "tokens")]
    without, _ = tiny_runs.train(root, train[0], f"{kind}-without")
    first, _ = tiny_runs.train(root, train[1], f"{kind}-first")
    num_files = len(list((tmp_path / "tokens").iterdir()))
    assert num_files == 2, "train and validation"
    assert (tmp_path / "tokens").stat().st_mode & 0o077 == 0, "others must not read the texts"

    def written(*_):
        raise AssertionError("the second start tokenises")

    monkeypatch.setattr("jaxpeft.data.token_cache._write", written)
    second, _ = tiny_runs.train(root, train[1], f"{kind}-second")
    assert outcome(without) == outcome(first) == outcome(second)


def test_a_run_is_resumed_with_another_cache(root, tmp_path, monkeypatch):
    """The config file keeps the flag, so that a run without a cache is resumed without one; but it changes no result."""
    flags = f"{MASKED} --data.token_cache null --training.num_steps 2 --evaluation.before false --name moved"
    directory, _ = tiny_runs.train(root, flags)
    before = outcome(directory)
    resume = ("--config", "runs/moved/config.yaml", "--resume", "true", "--name", "moved")
    with monkeypatch.context() as patch:
        patch.setattr(TokenCache, "rows", None)
        tiny_runs.train(root, "", *resume)
    tiny_runs.train(root, "", *resume, "--data.token_cache", str(tmp_path / "tokens"))
    assert list((tmp_path / "tokens").iterdir())
    assert outcome(directory)[1] == before[1]


def test_a_directory_that_cannot_be_written_to_is_refused(root, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as error:
        tiny_runs.train(root, f"{MASKED} --name refused --data.token_cache {tmp_path / 'file' / 'inside'}")
    assert error.value.code == 2
    assert "data.token_cache" in (said := capsys.readouterr().err)
    assert "file/inside: Not a directory; give another directory, or null for none" in said
    assert not (root / "runs" / "refused").exists()


def test_a_home_that_cannot_be_written_to_is_said_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(console.console, "quiet", False)
    assert runs_data.token_cache("auto") is None
    assert runs_data.token_cache("auto") is None
    assert capsys.readouterr().out.count("warning: tokenised rows are not kept in") == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert runs_data.token_cache("auto").directory == tmp_path / "home" / "jaxpeft" / "tokens"


def test_texts_are_read_piece_by_piece(root, monkeypatch):
    """No more texts at once than a call of the tokenizer takes."""
    from jaxpeft.data import load_file

    texts = load_file(str(root / "train.txt")).texts
    monkeypatch.setattr(masked_lm, "_TEXTS_PER_CALL", 7)
    sizes = []

    def tokenizer(chunk, **_):
        sizes.append(len(chunk))
        return {"input_ids": [[1]] * len(chunk)}

    tokenizer.unk_token = "[UNK]"
    pieces = masked_lm._token_stream(texts, tokenizer)
    next(pieces)
    assert sizes == [7]
    assert sum(map(len, pieces)) == len(texts) - 7
