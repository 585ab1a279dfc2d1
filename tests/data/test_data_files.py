"""Files as users have them: their names, delimiters, quotes, encodings and empty rows. pandas writes them where it can."""

import csv
import os
import resource
import subprocess
import sys

import numpy as np
import pandas
import pytest

from jaxpeft.data import load_file, load_splits
from jaxpeft.data.delimited import open_delimited
from jaxpeft.data.files import read_file
from jaxpeft.errors import InputError

TEXTS = ["good, really", 'a "stray" quote', "two\nlines, of text", "tab\there; and | too", "plain", "übel"] * 4
TABLE = pandas.DataFrame({"text": TEXTS, "label": [row % 2 for row in range(len(TEXTS))]})


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return str(path)


def refusal(path, **options):
    with pytest.raises(InputError) as error:
        load_file(str(path), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "name",
    ["a[1].csv", "*.csv", "a?.csv", "~a.csv", "a b.csv", "a::b.csv", "[a].jsonl", "*.json", "a::b.parquet", "[x].txt"],
)
def test_a_path_is_a_path(name, tmp_path):
    path = tmp_path / name
    frame = pandas.DataFrame({"text": ["mine"]})
    writers = {
        ".csv": lambda: frame.to_csv(path, index=False),
        ".jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        ".json": lambda: frame.to_json(path, orient="records"),
        ".parquet": lambda: frame.to_parquet(path),
        ".txt": lambda: path.write_text("mine\n"),
    }
    for other in ("a1", "ab", "a", "x", "b"):  # what the name would match as a pattern
        write((tmp_path / other).with_suffix(path.suffix), "not mine")
    writers[path.suffix]()
    assert load_file(str(path)).texts == ["mine"]


def test_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.txt", "at home\n")
    assert load_file("~/a.txt").texts == ["at home"]
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "~no-user.txt", "here\n")
    assert load_file("~no-user.txt").texts == ["here"]


def test_several_files_by_a_pattern(tmp_path):
    for i, text in enumerate(["one", "two", "three"]):
        write(tmp_path / f"part-{i}.csv", f"text,label\n{text},{i % 2}\n")
    (tmp_path / "part-9.csv").mkdir()
    pattern = str(tmp_path / "part-?.csv")
    split = load_file(pattern, glob=True)
    assert (split.texts, split.labels.tolist()) == (["one", "two", "three"], [0, 1, 0])
    assert f"no file {pattern}" in refusal(pattern)
    assert "no file matches the pattern" in refusal(tmp_path / "*.tsv", glob=True)
    write(tmp_path / "part-3.csv", "label,text\n1,four\n")
    assert "part-3.csv has the columns label, text, but" in refusal(pattern, glob=True)
    (tmp_path / "part-3.csv").unlink()
    splits = load_splits(train_file=pattern, glob=True)
    assert (len(splits.train), len(splits.validation)) == (2, 1)


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_files_of_pandas(suffix, delimiter, index, quoting, tmp_path):
    path = tmp_path / f"a.{suffix}"
    TABLE.to_csv(path, sep=delimiter, index=index, quoting=quoting)
    split = load_file(str(path))
    assert split.texts == TEXTS
    assert split.labels.tolist() == TABLE.label.tolist()
    assert read_file(str(path)).column_names == ["text", "label"]
    given = load_file(str(path), delimiter="tab" if delimiter == "\t" else delimiter, quotes=True)
    assert given.texts == TEXTS


def test_an_index_that_was_written_twice(tmp_path):
    TABLE.to_csv(tmp_path / "once.csv")
    pandas.read_csv(tmp_path / "once.csv").to_csv(tmp_path / "twice.csv")  # ",Unnamed: 0,text,label"
    split = load_file(str(tmp_path / "twice.csv"))
    assert (split.texts, split.labels.tolist()) == (TEXTS, TABLE.label.tolist())


@pytest.mark.parametrize("header", ["text,label,", "text,label", " text , label,,"])
@pytest.mark.parametrize("rows", ["a,1,\nb,0,\n", "a,1\nb,0\n", "a,1,,\n\nb,0\n"])
def test_trailing_commas_are_ignored(header, rows, tmp_path):
    split = load_file(write(tmp_path / "a.csv", f"{header}\n{rows}"))
    assert (split.texts, split.labels.tolist()) == (["a", "b"], [1, 0])
    split = load_file(write(tmp_path / "b.csv", rows), column_names=("text", "label"))
    assert (split.texts, split.labels.tolist()) == (["a", "b"], [1, 0])


def test_no_column_has_a_name(tmp_path):
    assert "line 1: no column has a name; give data.column_names" in refusal(write(tmp_path / "a.csv", ",\na,1\n"))
    assert "b.csv has no rows" in refusal(write(tmp_path / "b.csv", "\n\n"))


def test_the_delimiter_is_found_or_asked_for(tmp_path):
    path = write(tmp_path / "a.csv", "text;label\nGood, really;1\nBad, no;0\n")
    assert load_file(path).texts == ["Good, really", "Bad, no"]
    path = write(tmp_path / "b.csv", "review, full;label\nGood;1\nBad, no, no;0\n")
    assert load_file(path, text_column="review, full").texts == ["Good", "Bad, no, no"]
    path = write(tmp_path / "c.csv", "a;b|c\n1;2|3\n")
    assert "fields could end at ';' or at '|'; give one of them as data.delimiter" in refusal(path)
    assert load_file(path, text_column="a", delimiter=";").texts == ["1"]
    path = write(tmp_path / "d.csv", "text^label\na^1\nb^0\n")
    assert load_file(path, delimiter="^").labels.tolist() == [1, 0]
    assert load_file(write(tmp_path / "e.csv", "text\na\nb; c\n")).texts == ["a", "b; c"]
    for wrong in ("", ";;", '"', "\n"):
        assert "it must be one character, or tab" in refusal(path, delimiter=wrong)
    assert "delimiter is for .csv and .tsv files" in refusal(write(tmp_path / "a.txt", "a\n"), delimiter=";")


def test_quotes_in_a_file_with_tabs_that_no_program_wrote(tmp_path):
    texts = ['"whole"', 'a " stray', '"at the start', 'and at the end"', "5' 3\" tall", '"" twice', '"said "so"']
    path = write(tmp_path / "a.tsv", "text\tlabel\n" + "".join(f"{text}\t{i % 2}\n" for i, text in enumerate(texts)))
    assert load_file(path).texts == texts
    assert load_file(path, quotes=False).texts == texts
    assert "line 7: a quote" in refusal(path, quotes=True)


def test_quotes_in_a_file_with_tabs_that_say_both(tmp_path):
    text = 'text\tlabel\n"she said ""hi"""\t1\n"at the start\t0\nplain\t1\n'
    path = write(tmp_path / "a.tsv", text)
    message = refusal(path)
    assert "a.tsv, line 3: a quote" in message
    assert "set data.quotes to false" in message
    assert load_file(path, quotes=False).texts == ['"she said ""hi"""', '"at the start', "plain"]


LABELLED = "".join(f"text {i},{i % 2}\n" for i in range(10))
STRAY = {
    "never-closed": ('"a stray, quote,1\n', r"line 12: a quote .* takes in the next 10 lines"),
    "closed-in-a-text": ('"a stray quote,1\nfive "or" six,0\n', r"line 12: a quote"),
    "closed-at-a-field": (
        '"a stray quote,1\nand it is 5",0\n',
        r"line 12: a quote .* takes in 2 lines that look like rows",
    ),
    "behind-a-label": ('text,1,"x\ny,0,5"\n', r"line 12: "),
}


@pytest.mark.parametrize("name", STRAY)
def test_a_stray_quote_is_refused_with_its_line(name, tmp_path):
    rows, message = STRAY[name]
    path = write(tmp_path / "a.csv", "text,label\n" + LABELLED + rows + LABELLED.replace("text", "other"))
    with pytest.raises(InputError, match=message):
        load_file(path)


def test_a_text_with_line_breaks_is_no_stray_quote(tmp_path):
    text = 'text,label\n"Great movie, loved it.\nBut, too long",1\n"1, 0\n0, 1",0\n' + LABELLED
    assert load_file(write(tmp_path / "a.csv", text)).texts[:2] == [
        "Great movie, loved it.\nBut, too long",
        "1, 0\n0, 1",
    ]
    path = write(tmp_path / "b.csv", "text,label\n" + LABELLED + '"a,1\nb",0\n')
    assert "set data.quotes to true if it is one text" in refusal(path)
    assert load_file(path, quotes=True).texts[-1] == "a,1\nb"
    assert load_file(path, quotes=False).texts[-2:] == ['"a', 'b"']


def test_mistakes_have_the_line_of_the_file(tmp_path):
    path = write(tmp_path / "a.csv", 'text,label\n"two\nlines",1\n\nc,0\nd\n')
    assert "a.csv, line 6: 2 columns (text, label) but 1 field; put quotes around a text with line breaks" in refusal(
        path
    )
    path = write(tmp_path / "b.csv", "text,label\na,1\nb,c,0\n")
    assert "b.csv, line 3: 2 columns (text, label) but 3 fields; put quotes around a text that holds ','" in refusal(
        path
    )
    path = write(tmp_path / "c.tsv", "text\tlabel\na\tb\t0\n")
    assert "a text that holds a tab and set data.quotes to true" in refusal(path)


def test_long_texts(tmp_path):
    text = "word " * 50_000  # more than the limit of Python's csv module
    path = write(tmp_path / "a.csv", f'text,label\n"{text}",1\n')
    assert load_file(path).texts == [text]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-16-le", "utf-8-sig", "utf-32"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "txt", "json", "jsonl"])
def test_encodings(suffix, encoding, tmp_path):
    path = tmp_path / f"a.{suffix}"
    content = {
        "csv": "text,label\nübel,1\ncafé,0\n",
        "tsv": "text\tlabel\nübel\t1\ncafé\t0\n",
        "txt": "übel\ncafé\n",
        "json": '[{"text": "übel"},\n {"text": "café"}]',
        "jsonl": '{"text": "übel"}\n{"text": "café"}\n',
    }[suffix]
    write(path, content, encoding)
    assert load_file(str(path), encoding=encoding).texts == ["übel", "café"]
    if encoding in ("utf-16", "utf-8-sig", "utf-32"):  # a byte order mark says it
        assert load_file(str(path)).texts == ["übel", "café"]
    else:
        assert "data.encoding" in refusal(path)


LATER = "text,label\n" + LABELLED
WRONG = {
    "latin-1-as-utf-8": (
        "latin-1",
        None,
        r"a.csv, line 12: the byte 0xfc is not utf-8; set data.encoding to .* latin-1, cp1252",
    ),
    "utf-8-as-latin-1": (
        "utf-8",
        "latin-1",
        r"a.csv, line 12: the text is utf-8, not latin-1; leave data.encoding out",
    ),
    "utf-8-as-utf-16-le": ("utf-8", "utf-16-le", r"a.csv, line 1: the text is utf-8, not utf-16-le"),
    "utf-8-as-ascii": ("utf-8", "ascii", r"a.csv, line 12: the text is utf-8, not ascii"),
    "latin-1-as-ascii": (
        "latin-1",
        "ascii",
        r"a.csv, line 12: the byte 0xfc is not ascii; set data.encoding to the file's encoding",
    ),
    "utf-16-le-as-utf-16": (
        "utf-16-le",
        "utf-16",
        r"a.csv, line 1: no byte order mark of utf-16; .* utf-16-le or utf-16-be",
    ),
    "utf-16-le-as-utf-8": (
        "utf-16-le",
        None,
        r"a.csv, line 1: .* without a byte order mark; give data.encoding utf-16-le",
    ),
    "utf-16-be-as-utf-8": ("utf-16-be", None, r"give data.encoding utf-16-be"),
    "utf-16-as-latin-1": (
        "utf-16",
        "latin-1",
        r"line 1: it begins with the byte order mark of utf-16, but data.encoding is latin-1",
    ),
    "latin-1-as-utf-16-le": (
        "latin-1",
        "utf-16-le",
        r"line 1: .* so it is not utf-16-le; set data.encoding to .* latin-1",
    ),
    "no-encoding": ("utf-8", "latin-99", r"data.encoding 'latin-99' is unknown; give one such as utf-8"),
    "no-text-encoding": ("utf-8", "hex", r"data.encoding 'hex' is unknown"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_encoding_is_refused(name, tmp_path):
    of_file, given, message = WRONG[name]
    path = write(tmp_path / "a.csv", LATER + "übel,1\n", of_file)
    with pytest.raises(InputError, match=message):
        load_file(path, encoding=given)


def test_the_line_of_a_wrong_byte_in_a_long_file(tmp_path):
    lines = ["a line of text"] * 200_000  # more than one block
    lines[150_000] = "übel"
    assert "line 150001: the byte 0xfc" in refusal(write(tmp_path / "a.txt", "\n".join(lines), "latin-1"))


def test_json_with_rows_under_a_key(tmp_path):
    rows = '[{"text": "12", "label": "01"}, {"text": "2020-01-01 x", "label": "02"}]'
    path = write(tmp_path / "a.json", f'{{"version": 1,\n "data": {rows},\n "meta": {{"rows": {rows}}}}}')
    for field in ("data", "meta.rows"):
        split = load_file(path, field=field)
        assert split.texts == ["12", "2020-01-01 x"]
    assert "a.json is one object, with rows under data; give data.field data" in refusal(path)
    assert "data.field 'dta': " in refusal(path, field="dta")
    assert "did you mean 'data'?; keys: version, data, meta" in refusal(path, field="dta")
    assert "has no list of rows there" in refusal(path, field="version")
    assert "field is for .json files" in refusal(write(tmp_path / "a.csv", "text\na\n"), field="data")
    assert "the file is a list: leave it out" in refusal(write(tmp_path / "b.json", rows), field="data")


def test_forms_of_json(tmp_path):
    for text in ('{"text": "a"}\n{"text": "b"}\n', '["a", "b"]', '\n[\n {"text": "a"},\n {"text": "b"}\n]\n'):
        assert load_file(write(tmp_path / "a.json", text)).texts == ["a", "b"]
    assert load_file(write(tmp_path / "b.json", '{"text": "a"}')).texts == ["a"]
    assert "c.json, line 3: not JSON" in refusal(
        write(tmp_path / "c.json", '[{"text": "a"},\n{"text": "b"}\n{"text": "c"}]')
    )
    assert "row 2: 5 is not an object" in refusal(write(tmp_path / "d.json", '[{"text": "a"}, 5]'))


EMPTY = "text,label\na,1\n,0\nb,0\n  ,1\nc,1\n"


def test_empty_texts_are_counted(tmp_path):
    path = write(tmp_path / "a.csv", EMPTY)
    assert load_file(path).texts == ["a", "", "b", "  ", "c"]
    assert "a.csv: 2 of 5 rows have no text (rows 2, 4); fill them in, or set data.drop_empty to true" in refusal(
        path, empty_texts="refuse"
    )
    split = load_file(path, empty_texts="drop")
    assert (split.texts, split.labels.tolist()) == (["a", "b", "c"], [1, 0, 1])
    splits = load_splits(train_file=path, validation_file=path, empty_texts="drop")
    assert (splits.train.texts, splits.train.labels.tolist()) == (["a", "b", "c"], [1, 0, 1])
    assert splits.notes == (f"2 of 5 rows of {path} have no text and are left out (rows 2, 4)",) * 2
    with pytest.raises(InputError, match=r"b.csv: 2 of 5 rows have no text"):
        load_splits(
            train_file=write(tmp_path / "c.csv", LATER),
            test_file=write(tmp_path / "b.csv", EMPTY),
            empty_texts="refuse",
        )
    many = write(tmp_path / "d.csv", "text,label\n" + ",1\n" * 9 + "a,0\n")
    assert "(rows 1, 2, 3, 4, 5 and 4 more)" in refusal(many, empty_texts="refuse")


def test_an_empty_pair_has_two_empty_texts(tmp_path):
    path = write(tmp_path / "a.csv", "sentence1,sentence2,label\na,,1\n,b,0\n,,1\nc,d,0\n")
    split = load_file(path, empty_texts="drop")
    assert (split.texts, split.pairs, split.labels.tolist()) == (["a", "", "c"], ["", "b", "d"], [1, 0, 0])
    assert "1 of 4 rows have no text (row 3)" in refusal(path, empty_texts="refuse")


def test_null_is_an_empty_text(tmp_path):
    path = write(
        tmp_path / "a.jsonl", '{"text": "a", "label": 0}\n{"text": null, "label": 1}\n{"text": "b", "label": 1}\n'
    )
    assert "row 2: column 'text' has no text (null); fill it in, or set data.drop_empty to true" in refusal(path)
    assert load_file(path, empty_texts="drop").texts == ["a", "b"]
    path = write(tmp_path / "b.jsonl", '{"sentence1": "a", "sentence2": null}\n{"sentence1": "b", "sentence2": "c"}\n')
    assert load_file(path, empty_texts="drop").pairs == ["c"]
    TABLE.assign(text=[None, *TEXTS[1:]]).to_parquet(tmp_path / "a.parquet")
    assert load_file(str(tmp_path / "a.parquet"), empty_texts="drop").texts == TEXTS[1:]


MEMORY = """
import resource, sys
from jaxpeft.data.files import read_file
used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read_file(sys.argv[1])
before = used()
table = read_file(sys.argv[2])
print(used() - before)
"""


def test_a_large_file_is_read_in_constant_memory(tmp_path):
    for name, number in (("small.csv", 1_000), ("large.csv", 150_000)):
        pandas.DataFrame({"text": ["a few words of text " * 10] * number, "label": np.arange(number) % 2}).to_csv(
            tmp_path / name
        )
    size = os.path.getsize(tmp_path / "large.csv") / 1024
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "small.csv"), str(tmp_path / "large.csv")]
    assert int(subprocess.run(command, capture_output=True, check=True, text=True).stdout) < size
    assert resource  # the unit is KiB on Linux


def test_real_files_are_read_as_before(real_data):
    file = open_delimited(str(real_data / "sst2" / "train.tsv"), "utf-8")
    assert (file.delimiter, file.quotes, file.names) == ("\t", False, ("sentence", "label"))
    lines = (real_data / "sst2" / "train.tsv").read_text().splitlines()[1:]
    assert read_file(str(real_data / "sst2" / "train.tsv"))["sentence"][:] == [line.split("\t")[0] for line in lines]
