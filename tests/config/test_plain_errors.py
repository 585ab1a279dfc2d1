"""Messages about values that no flag can have: plain words, the choices, and how a list is written."""

import re
from typing import Any, Literal, get_type_hints

import pytest
import yaml

from jaxpeft.config import DataConfig, RunConfig
from jaxpeft.config.files import run_config
from jaxpeft.config.parsing import Parser, parse_run
from jaxpeft.config.plain_errors import in_words
from jaxpeft.errors import InputError

WORDS_OF_THE_PARSER = re.compile(
    r"Parser key|typing|Literal|<class|Union|NoneType|unicode string|\bTraceback\b|Subtypes"
)
DATA = "--data.name python-docs"


def refusal(capsys, flags):
    args = flags if isinstance(flags, list) else flags.split()
    with pytest.raises(SystemExit) as stopped:
        parse_run(args, "train.py")()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1, error
    assert not WORDS_OF_THE_PARSER.search(error), error
    return error


CASES = {
    "--task translation": "task is 'translation'; it must be one of masked-lm, classification",
    "--adapter.method lore": "it must be one of lora, hira, .*, full, head; did you mean 'lora'?",
    "--adapter.bias x": "adapter.bias is 'x'; it must be one of none, all, lora_only, or null",
    "--adapter.rank many": "adapter.rank is 'many'; it must be a whole number, or null",
    "--seed 1.5": "seed is '1.5'; it must be a whole number",
    "--training.learning_rate fast": "it must be a number",
    "--training.micro_batch_size x": "it must be auto, or a whole number",
    "--data.packing maybe": "data.packing is 'maybe'; it must be true or false",
    "--data.packing": "--data.packing needs a value: true or false",
    "--data.bucket_lengths 24": r"it must be a list of whole numbers in brackets, such as '\[24\]'",
    "--data.bucket_lengths a b": r"it must be a list of whole numbers in brackets, such as '\[8, 16\]'",
    "--data.bucket_lengths [a": r"it must be a list of whole numbers in brackets",
    "--contextual.ffn_sparsity no": r"it must be a number, or a list of numbers in brackets, such as '\[0.1, 0.5\]'",
    "--adapter.rank_pattern 3": "it must be a mapping in braces, such as '{name: value}', or null",
    "--adapter 5": "adapter is a group of flags, not a flag: give one of them, such as --adapter.method",
    "--adapter.target_modules query value": r"write a list in brackets, --adapter.target_modules '\[query, value\]'",
    "--adapter.target_modules=query value --seed 1": r"--adapter.target_modules '\[query, value\]'",
    "--data.bucket_lengths 8 16 32": r"it must be a list of whole numbers in brackets, such as '\[8, 16, 32\]'",
    "--data.train_file my file.csv": 'put the value in quotes, --data.train_file "my file.csv"',
    "--data.quotes x": "data.quotes is 'x'; it must be true or false, or null",
}


@pytest.mark.parametrize("flags", CASES)
def test_a_value_of_the_wrong_kind(flags, capsys):
    error = refusal(capsys, f"{DATA} {flags}" if "train_file" not in flags else flags)
    assert re.search(CASES[flags].replace("?", r"\?"), error), error


def all_flags():
    for section, hint in get_type_hints(RunConfig).items():
        inner = get_type_hints(hint) if hasattr(hint, "__dataclass_fields__") else {}
        yield from ((f"{section}.{name}", kind) for name, kind in inner.items())
        if not inner:
            yield section, hint


def test_no_flag_answers_in_the_words_of_the_parser(capsys):
    for flag, hint in all_flags():
        if in_words(hint) not in ("text", "text, or null") and "text" not in in_words(hint).split(", or "):
            assert f"{flag} is '{{wrong'; it must be " in refusal(capsys, [*DATA.split(), f"--{flag}", "{wrong"])


def test_types_in_words():
    assert in_words(Literal["a", "b"] | int | None) == "one of a, b, or a whole number, or null"
    assert in_words(dict[str, Any]) == "a mapping in braces, such as '{name: value}'"
    assert in_words(list[str] | str) == "a list of texts in brackets, such as '[one, two]', or text"


FILES = {
    "training:\n  num_steps: many\n": "training.num_steps is 'many'; it must be a whole number, or null",
    "adapter: 5\n": "adapter is 5; it must be a group of keys",
    "adapter:\nname: x\n": "adapter is empty; it must be a group of keys",
    "adapter:\n": "'adapter:' without keys",
    "- a\n": "does not hold keys: write lines such as 'name: my-run'",
    "training: {num_steps: [1\n": "a.yaml, line 2: not YAML: expected ',' or ']'",
}


@pytest.mark.parametrize("text", FILES)
def test_a_mistake_in_a_config_file(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(text)
    try:
        error = refusal(capsys, f"--config a.yaml {DATA}")
    except InputError as found:  # which the command prints in one line
        error = str(found)
    assert FILES[text] in error


def test_values_of_a_comparison():
    with pytest.raises(InputError, match=r"here: training.num_steps is 'many'; it must be a whole number, or null"):
        run_config({"training": {"num_steps": "many"}}, "here")


def test_an_argument_of_a_command(capsys):
    parser = Parser(prog="command")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--top", type=int, default=5)
    with pytest.raises(SystemExit):
        parser.parse_args(["a", "--top", "x"])
    assert "top is 'x'; it must be a whole number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "name", "file"),
    [
        ("", "python-docs", None),
        ("--data.train_file my.csv", None, "my.csv"),
        ("--data.train_file=my.csv", None, "my.csv"),
        ("--data.train_file my.csv --data.name null", None, "my.csv"),
        ("--config files.yaml --data.name glue/sst2", "glue/sst2", None),
        ("--config files.yaml", None, "a.txt"),
    ],
)
def test_a_flag_for_the_data_replaces_that_of_the_config_file(flags, name, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "default.yaml").write_text("data: {name: python-docs}")
    (tmp_path / "files.yaml").write_text("data: {train_file: a.txt, validation_file: b.txt, test_file: c.txt}")
    data = parse_run(flags.split(), "train.py", tmp_path / "default.yaml")().data
    assert (data.name, data.train_file) == (name, file)


WITHOUT_FILES = {
    "--data.delimiter tab": "data.delimiter tab is for files, and the data is 'python-docs'",
    "--data.column_names [text]": "data.column_names .* is for files",
    "--data.quotes true": "data.quotes True is for files",
    "--data.encoding latin-1": "data.encoding latin-1 is for files",
    "--data.field data": "data.field data is for files",
    "--data.glob true": "data.glob True is for files",
    "--data.validation_file a.txt": "data.validation_file a.txt is for files",
}


@pytest.mark.parametrize("flags", WITHOUT_FILES)
def test_options_of_files_need_a_file(flags):
    with pytest.raises(InputError, match=WITHOUT_FILES[flags]):
        parse_run([*DATA.split(), *flags.split()], "train.py")()


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("delimiter", ";;", "data.delimiter is ';;'; it must be one character, or tab"),
        ("delimiter", '"', "it must be one character, or tab"),
        ("encoding", "latin-99", "data.encoding is 'latin-99', which Python does not know"),
        ("encoding", "hex", "data.encoding is 'hex'"),
    ],
)
def test_options_of_files_are_checked_before_anything_is_loaded(flag, value, message):
    with pytest.raises(InputError, match=message):
        parse_run(["--data.train_file", "nowhere.csv", f"--data.{flag}", value], "train.py")()


@pytest.mark.parametrize("value", [",", ";", "|", "tab", "\\t", "\t", "^", ":", " ", "#", "~", "&"])
def test_a_delimiter_is_what_was_written(value):
    config = parse_run(["--data.train_file", "a.csv", "--data.delimiter", value], "train.py")()
    assert config.data.delimiter == value
    assert yaml.safe_load(yaml.safe_dump(config.resolved()))["data"]["delimiter"] == value


@pytest.mark.parametrize(
    "path", ["a[1].csv", "[1].csv", "*.csv", "~/a b.csv", "{a}.csv", "a: b.csv", "#a.csv", "&a.csv", "null.csv"]
)
def test_a_path_is_what_was_written(path):
    assert parse_run(["--data.train_file", path], "train.py")().data.train_file == path


def test_a_pattern_is_no_name_of_a_directory():
    names = {
        path: RunConfig(data=DataConfig(train_file=path, glob=True)).run_name for path in ("a/*.csv", "part-[0-9].txt")
    }
    assert names == {"a/*.csv": "all-MiniLM-L6-v2-files-lora", "part-[0-9].txt": "all-MiniLM-L6-v2-part-0-9-lora"}


def test_the_help_has_every_flag_of_the_data_with_its_words(capsys):
    with pytest.raises(SystemExit):
        parse_run(["--help"], "train.py")
    text = " ".join(capsys.readouterr().out.split())
    assert "--data.train_file my.csv" in text
    for name in get_type_hints(DataConfig):
        words = re.split(rf" --data\.{name},? ", text)[1].split(" (type:")[0].split()
        assert len(words) > 4, name
