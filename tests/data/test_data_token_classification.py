"""Tagged sentences: CoNLL files, columns, ids and schemes of tags, and their rows: windows in which every word counts once."""

import json
from itertools import pairwise

import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpeft.data import ReadOptions, TokenCache, read_tables
from jaxpeft.data.conll import read_tagged_file
from jaxpeft.data.tables import Tables
from jaxpeft.data.tag_schemes import as_iobes, find_scheme, has_scheme
from jaxpeft.data.tagged import tagged_splits, words_to_answer
from jaxpeft.data.token_classification import token_data
from jaxpeft.data.windows import windows
from jaxpeft.data.words import Splitter, encode_words
from jaxpeft.errors import InputError

CONLL_2003 = """-DOCSTART- -X- -X- O

EU NNP I-NP I-ORG
rejects VBZ I-VP O
German JJ I-NP I-MISC

-DOCSTART- -X- O O

Peter NNP I-NP I-PER
Blackburn NNP I-NP I-PER
"""
UNIVERSAL = """# sent_id = 1
# text = Vámonos al mar
1-2	Vámonos	_	_	_	_	_	_	_	_
1	Vamos	ir	VERB	_	_	0	root	_	_
2	nos	yo	PRON	_	_	1	obj	_	_
2.1	#	_	X	_	_	_	_	_	_
3	10 000	#	NUM	_	_	1	obl	_	_

# sent_id = 2
1	#	#	SYM	_	_	0	root	_	_
"""


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return str(path)


def tagged(train, validation=None, *, test=None, reading=None, **options):
    """The splits of some files."""
    files = {"train_file": str(train), "validation_file": str(validation or train), "test_file": test and str(test)}
    tables = read_tables(None, **files, read_file=read_tagged_file, **(reading or {}))
    return tagged_splits(tables, ReadOptions(empty_texts="refuse", **options))


def named(splits, split="train"):
    return [[splits.label_names[i] for i in tags] for tags in getattr(splits, split).labels]


def refusal(make):
    with pytest.raises(InputError) as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


def jsonl(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


# CoNLL files


@pytest.mark.parametrize("name", ["a.conll", "a.bio", "a.iob", "a.txt", "a b[1].CONLL"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_words_are_first_and_tags_last(name, ending, tmp_path):
    splits = tagged(write(tmp_path / name, CONLL_2003.replace("\n", ending)))
    assert list(splits.train.texts) == [["EU", "rejects", "German"], ["Peter", "Blackburn"]]
    assert splits.label_names == ("O", "I-MISC", "I-ORG", "I-PER")
    assert named(splits) == [["I-ORG", "O", "I-MISC"], ["I-PER", "I-PER"]]
    assert splits.notes == (
        "the tags are those of column 'tags'; data.label_column takes another: column_2, column_3",
        "4 tags in the scheme IOB1; they are trained as they are",
    )


def test_another_column_is_chosen_by_its_place_or_its_name(tmp_path):
    file = write(tmp_path / "a.conll", CONLL_2003)
    assert named(tagged(file, label_column="column_2"))[0] == ["NNP", "VBZ", "JJ"]
    names = {"column_names": ["word", "pos", "chunk", "ner"]}
    found = tagged(file, text_column="word", label_column="chunk", reading=names)
    assert named(found)[0] == ["I-NP", "I-VP", "I-NP"]
    message = refusal(lambda: tagged(file, reading={"column_names": ["word", "tag"]}))
    assert message == f"{file}, line 3: 4 columns, and data.column_names has 2; make the two agree"
    assert "did you mean 'column_2'" in refusal(lambda: tagged(file, label_column="colum_2"))


def test_conllu_has_its_own_columns_and_comments(tmp_path):
    splits = tagged(write(tmp_path / "a.conllu", UNIVERSAL))
    assert list(splits.train.texts) == [["Vamos", "nos", "10 000"], ["#"]]
    assert named(splits) == [["VERB", "PRON", "NUM"], ["SYM"]]
    assert splits.notes[-1] == "4 tags without a scheme of entities: every word is counted by itself"


def test_a_hash_is_a_word_or_a_comment(tmp_path):
    """A comment has other columns, or ends as no tag does; the word has a tag."""
    text = "# id 7\n# domain=train x\nJohn B-PER\n# O\nis\tO\n\n# a O comment\nTo O\n"
    splits = tagged(write(tmp_path / "a.conll", text))
    assert list(splits.train.texts) == [["John", "#", "is"], ["To"]]


def test_only_blanks_and_tabs_separate(tmp_path):
    """A no-break space and a line separator are characters like others; a field between tabs may have blanks, or be empty."""
    splits = tagged(write(tmp_path / "a.conll", "a\u00a0b B-X\n\u2028  O\nNew York\tI-X\n\tO\n\n \t \nc O"))
    assert list(splits.train.texts) == [["a\u00a0b", "\u2028", "New York", ""], ["c"]]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_encodings(encoding, tmp_path):
    given = {"encoding": encoding} if encoding == "latin-1" else {}
    splits = tagged(write(tmp_path / "a.conll", "Müller B-PER\nging O\n\nja O\n", encoding), reading=given)
    assert list(splits.train.texts) == [["Müller", "ging"], ["ja"]]


def test_several_files_by_a_pattern(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.conll", f"w{i} B-X\nand O\n")
    splits = tagged(tmp_path / "*.conll", reading={"glob": True})
    assert [words[0] for words in splits.train.texts] == ["w0", "w1", "w2"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.conll", "a O\nb\nc O\n", "line 2: 1 column, and the other lines have 2; repair it"),
        ("a.conll", "a x O\nb O\n", "line 2: 2 columns, and the other lines have 3; repair it"),
        ("a.conll", "-DOCSTART- O\n\n", "has no words; give a file with at least one sentence"),
        ("a.conll", "", "is empty (0 bytes)"),
        ("a.conllu", "a O\n", "line 1: 2 columns, and CoNLL-U has 10; make the two agree"),
        ("a.conll", "a\nb\n", "no column is known to hold tags (tokens); give data.label_column"),
        ("a.conll", "a O\nb O\n", "are 'O', and a classification needs at least two classes"),
        ("a.conl", "a O\n", "the suffix '.conl' is not one of .txt, .csv, .tsv, .json, .jsonl, .parquet, .conll, .bio"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(name, text, message, tmp_path):
    assert message in refusal(lambda: tagged(write(tmp_path / name, text)))


def test_options_of_other_formats_are_refused(tmp_path):
    file = write(tmp_path / "a.conll", CONLL_2003)
    message = refusal(lambda: tagged(file, reading={"delimiter": "tab"}))
    assert message == f"data.delimiter is for .csv and .tsv files, but {file} is not one; leave it out"
    table = write(tmp_path / "a.jsonl", '{"tokens": ["a"], "tags": ["O"]}\n')
    assert "for .csv, .tsv and CoNLL files" in refusal(lambda: tagged(table, reading={"column_names": ["a"]}))


# Tables


ROWS = [{"tokens": ["a", "b"], "ner_tags": ["B-X", "O"]}, {"tokens": ["c"], "ner_tags": ["O"]}]


def test_lists_in_jsonl_and_parquet(tmp_path):
    pandas.DataFrame(ROWS).to_parquet(tmp_path / "a.parquet")
    for file in (jsonl(tmp_path / "a.jsonl", ROWS), tmp_path / "a.parquet"):
        splits = tagged(file)
        assert list(splits.train.texts) == [["a", "b"], ["c"]]
        assert named(splits) == [["B-X", "O"], ["O"]]


def test_the_names_that_a_hub_dataset_declares():
    import datasets

    names = ["O", "B-LOC", "I-LOC", "B-never"]
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(datasets.ClassLabel(names=names))}
    )
    rows = {"tokens": [["New", "York", "is"], ["big"]] * 5, "ner_tags": [[1, 2, 0], [0]] * 5}
    table = datasets.Dataset.from_dict(rows, features=features)
    hidden = datasets.Dataset.from_dict({**rows, "ner_tags": [[-1] * 3, [-1]] * 5})
    tables = Tables({"train": table, "test": hidden}, {"train": "hub [train]", "test": "hub [test]"}, "hub")
    splits = tagged_splits(tables, ReadOptions(empty_texts="refuse"))
    assert splits.label_names == tuple(names)
    assert named(splits)[0] in (["B-LOC", "I-LOC", "O"], ["O"])
    assert splits.test is None
    assert "the tags of hub [test] are all -1 or empty: it is not used" in splits.notes
    assert splits.notes[-1].startswith("no validation split: a fixed random 1 of 10 rows")
    renamed = tagged_splits(tables, ReadOptions(label_names=names[::-1], empty_texts="refuse"))
    assert {"B-LOC", "O"} <= {tag for tags in named(renamed) for tag in tags}


def test_ids_without_names(tmp_path):
    rows = [{"tokens": ["a", "b"], "tags": [10, 0]}, {"tokens": ["c"], "tags": [2]}]
    file = jsonl(tmp_path / "a.jsonl", rows)
    assert tagged(file).label_names == ("0", "2", "10")
    rows = [{"tokens": ["a", "b"], "tags": [1, 0]}]
    splits = tagged(jsonl(tmp_path / "b.jsonl", rows), label_names=["O", "B-X", "I-X"])
    assert named(splits) == [["B-X", "O"]]
    message = refusal(lambda: tagged(file, label_names=["O", "B-X", "I-X"]))
    assert "row 1, word 1: the tag 10 is not one of the ids 0 to 2" in message


def test_the_base_s_classes_keep_their_ids(tmp_path):
    file = write(tmp_path / "a.conll", CONLL_2003)
    base = ("i-per", "O", "I-ORG", "I-LOC", "I-MISC")
    splits = tagged(file, base_names=base)
    assert splits.label_names == base
    assert named(splits) == [["I-ORG", "O", "I-MISC"], ["i-per", "i-per"]]
    others = tagged(file, base_names=("POSITIVE", "NEGATIVE"))
    assert others.label_names[0] == "O"
    assert "the base's own classes are others: POSITIVE, NEGATIVE" in others.notes


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, {}, "row 3: 2 words and 1 tags; give one tag for each word"),
        (
            {"tokens": ["a"], "tags": None},
            {},
            "row 3: it has no tags (null); leave such rows out with data.drop_unlabelled",
        ),
        ({"tokens": ["a"], "tags": [""]}, {}, "row 3, word 1: the tag '' is neither a name nor an id"),
        ({"tokens": ["a", None], "tags": ["O", "O"]}, {}, "row 3, word 2: column 'tokens' has no text there (null)"),
        (
            {"tokens": None, "tags": []},
            {},
            "row 3: column 'tokens' has no words (null); fill them in, or set data.drop_empty",
        ),
        ({"tokens": [], "tags": []}, {}, "1 of 3 rows have no text (row 3); fill them in, or set data.drop_empty"),
        ({"tokens": ["a"], "tags": ["O"]}, {"text_column": "token"}, "has no such column; did you mean 'tokens'"),
        ({"tokens": ["a"], "tags": ["O"]}, {"text_column": "id"}, "row 1: column 'id' holds 'x', not a list of words"),
        (
            {"tokens": ["a"], "tags": ["O"]},
            {"label_column": "id"},
            "row 1: the tags are 'x', not a list with one for each word",
        ),
        (
            {"tokens": ["a"], "tags": ["O"]},
            {"label_names": ["O", "B-Y"]},
            "word 1: the tag 'B-X' is unknown; known: O, B-Y",
        ),
    ],
)
def test_a_mistake_in_a_row_is_one_line(row, options, message, tmp_path):
    good = {"tokens": ["a", "b"], "tags": ["B-X", "O"]}
    file = jsonl(tmp_path / "a.jsonl", [{**each, "id": "x"} for each in (good, good, row)])
    assert message in refusal(lambda: tagged(file, **options))


def test_rows_without_words_or_tags_can_be_left_out(tmp_path):
    rows = [
        *ROWS,
        {"tokens": ["d"], "ner_tags": None},
        {"tokens": None, "ner_tags": []},
        {"tokens": [], "ner_tags": []},
    ]
    file = jsonl(tmp_path / "a.jsonl", rows)
    tables = read_tables(
        None, train_file=file, validation_file=jsonl(tmp_path / "b.jsonl", ROWS), read_file=read_tagged_file
    )
    splits = tagged_splits(tables, ReadOptions(empty_texts="drop", drop_unlabelled=True))
    assert list(splits.train.texts) == [["a", "b"], ["c"]]
    assert f"1 of 5 rows of {file} have no tags and are left out" in splits.notes
    assert f"2 of 4 rows of {file} have no text and are left out (rows 4, 5)" in splits.notes


def test_a_tag_that_train_lacks_is_refused(tmp_path):
    train, other = write(tmp_path / "a.conll", "a B-X\nb O\n"), write(tmp_path / "b.conll", "a O\nb B-Y\n")
    message = refusal(lambda: tagged(train, other))
    assert message == (
        f"{other}, row 1, word 2: the tag 'B-Y' is unknown; known: O, B-X; correct it, or list all classes in data.label_names"
    )
    assert tagged(train, other, label_names=["O", "B-X", "B-Y"]).num_labels == 3


def test_texts_and_words_to_answer(tmp_path):
    conll = read_tagged_file(write(tmp_path / "a.conll", "a\nb\n\nc\n"))
    assert list(words_to_answer(conll, "a", ReadOptions()).texts) == [["a", "b"], ["c"]]
    table = read_tagged_file(write(tmp_path / "a.csv", "text,n\nNew York,1\n"))
    assert list(words_to_answer(table, "a", ReadOptions()).texts) == ["New York"]
    pairs = ReadOptions(text_pair_column="n")
    assert "data.text_pair_column 'n': words of single texts" in refusal(lambda: words_to_answer(table, "a", pairs))
    assert "no column is known to hold words (n)" in refusal(
        lambda: words_to_answer(table.select_columns(["n"]), "a", ReadOptions())
    )


def test_the_digest_sees_the_boundaries_of_words(tmp_path):
    texts = ["a B-X\nb O\n", "a B-X\nb B-X\n", "ab B-X\nc O\n"]
    digests = {
        tagged(write(tmp_path / f"{i}.conll", text), label_names=["O", "B-X"]).digest() for i, text in enumerate(texts)
    }
    assert len(digests) == 3


# Schemes


@pytest.mark.parametrize(
    ("sentences", "name", "faults"),
    [
        (["B-X I-X O", "O B-Y B-Y"], "IOB2", 0),
        (["B-X O"], "IOB2", 0),
        (["I-X I-X O", "I-Y B-Y I-X"], "IOB1", 0),
        (["I-X O"], "IOB1", 0),
        (["B-X I-X O B-X", "O I-Y B-Z"], "IOB2", 1),
        (["I-X I-X O I-X", "O B-Y"], "IOB1", 1),
        (["B-X E-X O S-Y"], "IOBES", 0),
        (["B-X L-X O U-Y"], "BILOU", 0),
        (["I-X E-X E-X"], "IOE2", 0),
    ],
)
def test_the_scheme_is_found(sentences, name, faults):
    found = find_scheme(each.split() for each in sentences)
    assert (found.name, found.faults) == (name, faults)


@pytest.mark.parametrize("tags", ["NOUN VERB", "O", "O PER", "B-X NOUN", "B- O", "-LRB- PRP$"])
def test_other_tags_have_none(tags):
    assert find_scheme([tags.split()]) is None
    assert not has_scheme(tags.split())


def test_bilou_is_iobes_in_other_letters():
    assert [as_iobes(tag) for tag in ("B-X", "L-X", "U-L-U", "O", "I-U")] == ["B-X", "E-X", "S-L-U", "O", "I-U"]


# Windows


@given(st.integers(0, 200), st.integers(1, 30), st.data())
def test_windows(length, room, data):
    stride = data.draw(st.integers(0, room - 1))
    found = windows(length, room, stride)
    assert found[0][0] == 0
    assert found[-1][1] == length
    assert all(stop - start == room for start, stop in found[:-1])
    assert found[-1][1] - found[-1][0] <= room
    assert all(before[1] - after[0] == stride for before, after in pairwise(found))
    assert len(found) == 1 or found[-1][1] - found[-1][0] > stride  # none is superfluous


def words_and_tags(rng, number):
    """Sentences of real and of dropped words, some of several tokens, and tags that are all different."""
    vocabulary = ["cat", "internationalization", "a", "", "\x00", "Müller's", "x" * 30, "\u200b"]
    sentences = [list(rng.choice(vocabulary, rng.integers(0, 40))) for _ in range(number)]
    count = iter(range(10**6))
    return sentences, [[next(count) for _ in words] for words in sentences]


@pytest.mark.parametrize("stride", [0, 3, 9, None])
def test_every_word_with_a_token_counts_once(stride, tokenizer):
    sentences, tags = words_and_tags(np.random.default_rng(0), 25)
    data = token_data(
        sentences, tags, tokenizer, max_length=16, batch_size=4, seed=3, doc_stride=stride, bucket_lengths=(8,)
    )
    expected = {
        tag: tokenizer(word, add_special_tokens=False)["input_ids"][0]
        for words, row in zip(sentences, tags, strict=True)
        for word, tag in zip(words, row, strict=True)
        if tokenizer(word, add_special_tokens=False)["input_ids"]
    }
    for batches in (data.eval_batches(), map(data.train_batch, range(data.batches_per_epoch))):
        seen = {}
        for batch in batches:
            assert batch["labels"].shape == batch["weights"].shape == batch["input_ids"].shape
            assert batch["input_ids"].shape[1] in (8, 16)
            for row, column in zip(*np.nonzero(batch["weights"]), strict=True):
                tag = int(batch["labels"][row, column])
                assert tag not in seen
                seen[tag] = int(batch["input_ids"][row, column])
        assert seen == expected
    lost = sum(map(len, tags)) - len(expected)
    assert any(f"the tokenizer drops {lost} words" in note for note in data.notes)
    assert any("sentences are longer than 16 tokens" in note for note in data.notes)


def test_the_window_with_most_context_decides(tokenizer):
    """20 tokens in windows of 8 that share 4: (0, 8), (4, 12), (8, 16), (12, 20)."""
    data = token_data([["a"] * 20], [range(20)], tokenizer, max_length=10, batch_size=4, seed=0, doc_stride=4)
    (batch,) = data.eval_batches()
    found = [batch["labels"][i][batch["weights"][i] > 0].tolist() for i in np.argsort(batch["rows"])]
    # Tokens 0 to 3 have nothing before them; 5 is 2 from the end of the first window and 1 from the start of the second.
    assert found == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12, 13], [14, 15, 16, 17, 18, 19]]
    specials = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    assert [row[[0, -1]].tolist() for row in batch["input_ids"]] == [specials] * 4


def test_a_sample_has_whole_sentences(tokenizer):
    sentences, tags = words_and_tags(np.random.default_rng(1), 30)
    data = token_data(sentences, tags, tokenizer, max_length=16, batch_size=4, seed=3, doc_stride=4)
    part = data.sample(12)
    assert 1 <= len(part.labels) <= 12
    of_data = {tuple(each) for each in data.sentences(data.tags)}
    assert all(tuple(each) in of_data for each in part.sentences(part.tags))
    ids = dict(zip(data.tags[data.word_of_token], data.encoded.input_ids, strict=True))
    for batch in part.eval_batches():
        row, column = np.nonzero(batch["weights"])
        words = part.places(batch["rows"][row], column)
        np.testing.assert_array_equal(part.tags[words], batch["labels"][row, column])
        assert all(ids[tag] for tag in part.tags[words])
    assert {len(data.sample(4).labels)} == {len(data.with_seed(9).sample(4).labels)}


@pytest.mark.parametrize(("length", "stride", "most"), [(16, 14, 13), (16, 20, 13)])
def test_a_stride_that_does_not_fit(length, stride, most, tokenizer):
    message = refusal(
        lambda: token_data([["a"]], None, tokenizer, max_length=length, batch_size=1, seed=0, doc_stride=stride)
    )
    assert (
        f"data.doc_stride {stride} does not fit into rows of {length} tokens, of which 2 are special; give at most {most}"
        in message
    )


# Words and tokens


def byte_level():
    """RoBERTa's kind of tokenizer, which marks the blank before a word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import RobertaTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(["a town in the north , he's in Berlin ."] * 20, trainer)
    core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return RobertaTokenizerFast(tokenizer_object=core), lambda: RobertaTokenizerFast(
        tokenizer_object=core, add_prefix_space=True
    )


def at_white_space():
    """XLM-RoBERTa's kind of tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(
        models.Unigram([("<unk>", 0.0), *((letter, -1.0) for letter in "▁abcdefghijklmnopqrstuvwxyzN.'")], 0)
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def test_tokens_are_those_of_transformers(tokenizer):
    sentences = [["Dr.", "Müller's", "", "internationalization"], ["\x00"], ["New York", "x"]]
    roberta, with_blanks = byte_level()
    for ours, theirs in ((tokenizer, tokenizer), (roberta, with_blanks())):
        found = encode_words(sentences, ours)
        expected = theirs(sentences, is_split_into_words=True, add_special_tokens=False)
        assert found.tokens["input_ids"].tolist() == [i for ids in expected["input_ids"] for i in ids]
        assert found.tokens["words"].tolist() == [word for i in range(3) for word in expected.word_ids(i)]
    assert roberta("in")["input_ids"] != with_blanks()("in")["input_ids"]  # it makes a difference


def test_the_words_of_a_text(tokenizer):
    text = " He's in  New York,\tnot 中文. \x00"
    found = {}
    for name, kind in (("bert", tokenizer), ("roberta", byte_level()[0]), ("xlm", at_white_space())):
        found[name] = [text[start:stop] for start, stop in Splitter.of(kind).words(text)]
    assert found["bert"] == ["He", "'", "s", "in", "New", "York", ",", "not", "中", "文", "."]
    assert found["roberta"][:7] == ["He", "'s", "in", "New", "York", ",", "not"]
    assert found["xlm"][:8] == ["He", "'", "s", "in", "New", "York", ",", "not"]
    assert Splitter.of(tokenizer).words("  \n") == []


def test_tokens_are_kept_in_the_cache(tmp_path, tokenizer):
    """A second start with other windows reads the same file."""
    splits = tagged(jsonl(tmp_path / "a.jsonl", ROWS))
    warnings = []
    cache = TokenCache(tmp_path / "tokens", warnings.append)
    texts, labels = splits.train.texts, splits.train.labels
    first = token_data(texts, labels, tokenizer, max_length=16, batch_size=1, seed=0, cache=cache)
    (file,) = (tmp_path / "tokens").iterdir()
    made = file.stat().st_mtime_ns
    again = token_data(texts, labels, tokenizer, max_length=8, batch_size=1, seed=0, doc_stride=1, cache=cache)
    assert file.stat().st_mtime_ns == made
    assert [each.name for each in (tmp_path / "tokens").iterdir()] == [file.name]
    np.testing.assert_array_equal(first.encoded.input_ids, again.encoded.input_ids)
    assert warnings == []
