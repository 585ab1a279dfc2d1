"""Questions from files, and their rows: windows over the context, beside those that transformers' own scripts make."""

import itertools
import json
import re

import datasets
import numpy as np
import pytest

from jaxpeft.data import (
    LongQuestion,
    ReadOptions,
    Tables,
    TokenCache,
    has_unanswerable,
    question_answering_data,
    question_splits,
    questions_to_answer,
    read_question_file,
    read_tables,
)
from jaxpeft.data.windows import windows
from jaxpeft.errors import InputError

PLAY = (
    "The play, »Väg«, was written by Anna Holm in 1924. It was first shown in Malmö 🎭 on 3 May 1925, to 1,200 people."
)
LAKE = "The lake is 12 km long. Its deepest place is near the village of Ost."


def found(context, text):
    return {"text": text, "answer_start": context.index(text)}


DOCUMENT = {
    "version": "v2.0",
    "data": [
        {
            "title": "Play",
            "paragraphs": [
                {
                    "context": PLAY,
                    "qas": [
                        {
                            "id": "a",
                            "question": "Who wrote it?",
                            "answers": [found(PLAY, "Anna Holm"), found(PLAY, "Holm")],
                            "is_impossible": False,
                        },
                        {
                            "id": "b",
                            "question": "Who sang?",
                            "answers": [],
                            "plausible_answers": [found(PLAY, "Anna Holm")],
                            "is_impossible": True,
                        },
                    ],
                }
            ],
        },
        {
            "title": "Lake",
            "paragraphs": [
                {
                    "context": LAKE,
                    "qas": [{"id": "c", "question": "How long is it?", "answers": [found(LAKE, "12 km")]}],
                }
            ],
        },
    ],
}
QUESTIONS = ["Who wrote it?", "Who sang?", "How long is it?"]
LABELS = [
    (("Anna Holm", PLAY.index("Anna")), ("Holm", PLAY.index("Holm"))),
    (),
    (("12 km", 12),),
]


def written(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def splits_of(path, **options):
    options = {"empty_texts": "refuse"} | options
    read = read_tables(None, train_file=path, validation_file=path, read_file=read_question_file)
    return question_splits(read, ReadOptions(**options))


def test_windows_by_hand():
    assert windows(10, 4, 2) == [(0, 4), (2, 6), (4, 8), (6, 10)]
    assert windows(11, 4, 2) == [(0, 4), (2, 6), (4, 8), (6, 10), (8, 11)]
    assert windows(4, 4, 2) == [(0, 4)]
    assert windows(5, 4, 0) == [(0, 4), (4, 5)]
    assert windows(0, 4, 2) == [(0, 0)]
    with pytest.raises(InputError, match="windows of 4 tokens cannot share 4; give a stride from 0 to 3"):
        windows(5, 4, 4)


@pytest.mark.parametrize("room", [1, 2, 5, 9])
def test_windows_cover_everything_and_share_exactly_the_stride(room):
    for length in range(1, 40):
        for stride in range(room):
            made = windows(length, room, stride)
            assert made[0][0] == 0
            assert made[-1][1] == length
            assert all(0 < stop - start <= room for start, stop in made)
            assert all(first[1] - second[0] == stride for first, second in itertools.pairwise(made))
            assert all(stop - start == room for start, stop in made[:-1])


def tables_of_every_form(tmp_path):
    rows = [
        {"id": qa["id"], "question": qa["question"], "context": paragraph["context"], "answers": qa["answers"]}
        for article in DOCUMENT["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]
    hub = [
        {**row, "answers": {name: [a[name] for a in row["answers"]] for name in ("text", "answer_start")}}
        for row in rows
    ]
    yield written(tmp_path / "squad.json", DOCUMENT)
    yield written(tmp_path / "list.jsonl", "\n".join(map(json.dumps, rows)))
    yield written(tmp_path / "hub.jsonl", "\n".join(map(json.dumps, hub)))
    datasets.Dataset.from_list(hub).to_parquet(tmp_path / "hub.parquet")
    yield str(tmp_path / "hub.parquet")


def test_every_form_of_a_file_has_the_same_questions(tmp_path):
    for path in tables_of_every_form(tmp_path):
        splits = splits_of(path)
        assert list(splits.train.texts) == QUESTIONS, path
        assert list(splits.train.pairs) == [PLAY, PLAY, LAKE]
        assert splits.train.labels.tolist() == LABELS
        assert has_unanswerable(splits)
        assert f"1 of 3 questions of {path} have no answer in their context (SQuAD 2.0)" in splits.notes
        assert (splits.num_labels, splits.label_names) == (2, None)
        split = questions_to_answer(read_question_file(path), path, ReadOptions())
        assert (list(split.texts), list(split.pairs), split.labels) == (QUESTIONS, [PLAY, PLAY, LAKE], None)


def test_answers_of_the_hub_are_lists_of_its_features():
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "context": datasets.Value("string"),
            "answers": {
                "text": datasets.List(datasets.Value("string")),
                "answer_start": datasets.List(datasets.Value("int32")),
            },
        }
    )
    rows = [{"question": "How long is it?", "context": LAKE, "answers": {"text": ["12 km"], "answer_start": [12]}}]
    table = datasets.Dataset.from_list(rows * 2, features=features)
    splits = question_splits(Tables({"train": table}, {"train": "squad [train]"}, "squad"), ReadOptions())
    assert splits.train.labels.tolist() == [LABELS[2]]
    assert not has_unanswerable(splits)


def test_several_documents_and_a_field(tmp_path):
    for i, article in enumerate(DOCUMENT["data"]):
        written(tmp_path / f"part-{i}.json", {"data": [article]})
    table = read_question_file(str(tmp_path / "part-*.json"), glob=True)
    assert table["question"][:] == QUESTIONS
    assert table["id"][:] == ["a", "b", "c"]
    assert read_question_file(str(tmp_path / "part-1.json"), field="data")["question"][:] == QUESTIONS[2:]
    rows = [{"question": "Q?", "context": "C", "answers": []}]
    path = written(tmp_path / "rows.json", {"rows": rows, "version": 1})
    assert read_question_file(path, field="rows")["context"][:] == ["C"]
    with pytest.raises(InputError, match=re.escape("data.delimiter is for .csv and .tsv files")):
        read_question_file(str(tmp_path / "part-1.json"), delimiter=",")
    path = written(tmp_path / "latin.json", "")
    (tmp_path / "latin.json").write_bytes(json.dumps(DOCUMENT, ensure_ascii=False).replace("🎭", "").encode("latin-1"))
    with pytest.raises(InputError, match="latin-1"):
        read_question_file(path)
    assert read_question_file(path, encoding="latin-1")["context"][0].startswith("The play, »Väg«")


def test_other_columns(tmp_path):
    row = {"q": "How long is it?", "passage": LAKE, "gold": {"text": ["12 km"], "answer_start": [12]}}
    path = written(tmp_path / "other.jsonl", "\n".join([json.dumps(row)] * 2))
    splits = splits_of(path, text_column="q", text_pair_column="passage", label_column="gold")
    assert splits.train.labels.tolist() == [LABELS[2]] * 2
    with pytest.raises(InputError, match=r"data.text_column='question': .*other.jsonl has no such column.*columns: q"):
        splits_of(path)


def changed(**changes):
    row = {"question": "How long is it?", "context": LAKE, "answers": {"text": ["12 km"], "answer_start": [12]}}
    return row | changes


def at(start, text="12 km"):
    return {"text": [text], "answer_start": [start]}


BAD_ROWS = {
    "off by one": (
        changed(id="x7", answers=at(13)),
        "row 2 (id x7): the answer '12 km' is not at answer_start 13, which has '2 km '; it begins at 12: set answer_start to that",
    ),
    "off by two": (changed(answers=at(10)), "which has 's 12 '; it begins at 12"),
    "far": (changed(answers=at(0)), "which has 'The l'; it begins at 12: set answer_start to the right one"),
    "nowhere": (
        changed(answers=at(12, "12km")),
        "'12km' is not at answer_start 12, which has '12 k'; it is nowhere in the context",
    ),
    "negative": (changed(answers=at(-5, "Ost.")), "'Ost.' is not at answer_start -5, which has ''; it begins at 65"),
    "empty text": (changed(answers=at(3, "")), "the answer '' with answer_start 3 needs a text"),
    "uneven": (changed(answers={"text": ["12 km"], "answer_start": []}), "need as many of 'answer_start' as of 'text'"),
    "no object": (changed(answers="12 km"), "the answers are '12 km'; they must be an object with the lists"),
    "blank": (
        changed(context="  "),
        "1 of 2 rows have no text in one of their 2 columns (row 2); fill them in, or set data.drop_empty to true",
    ),
    "unlabelled": (
        changed(answers=None),
        "1 of 2 rows of {path} have no answers (null): row 2; give the answers ([] if",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_refused_with_its_number_and_the_way_out(name, tmp_path):
    row, message = BAD_ROWS[name]
    good = changed(id="x1", answers="all" if isinstance(row["answers"], str) else changed()["answers"])
    path = written(tmp_path / "bad.jsonl", "\n".join(map(json.dumps, [good, row])))
    if name == "no object":
        message = "row 1 (id x1): the answers are 'all'"
    with pytest.raises(InputError, match=re.escape(message.format(path=path))) as caught:
        splits_of(path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_without_text_or_answers_are_left_out_if_asked(tmp_path):
    rows = [changed(context=""), changed(answers=None), changed(question="Is it long?")]
    path = written(tmp_path / "gaps.jsonl", "\n".join(map(json.dumps, rows)))
    splits = splits_of(path, empty_texts="drop", drop_unlabelled=True)
    assert list(splits.train.texts) == ["Is it long?"]
    assert any("1 of 3 rows" in note and "(row 1)" in note for note in splits.notes)
    assert any("1 of 2 rows" in note and "row 2" in note and "left out" in note for note in splits.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d["data"][0]["paragraphs"][0].pop("context"),
            "article 1, paragraph 1: 'context' is 'None', not text",
        ),
        (lambda d: d["data"][1]["paragraphs"][0].update(qas={}), "article 2, paragraph 1: 'qas' is '{}', not a list"),
        (
            lambda d: d["data"][0]["paragraphs"][0]["qas"][0].update(question=3),
            "paragraph 1, question 1: 'question' is '3'",
        ),
        (
            lambda d: d["data"][0]["paragraphs"][0]["qas"][0].update(is_impossible=True),
            "question 1 (a) is_impossible, and has answers",
        ),
        (
            lambda d: d["data"][1]["paragraphs"][0]["qas"][0]["answers"][0].update(answer_start="12"),
            "question 1 (c): the answer {'text'",
        ),
    ],
)
def test_a_document_that_lacks_something(change, message, tmp_path):
    document = json.loads(json.dumps(DOCUMENT))
    change(document)
    with pytest.raises(InputError, match=re.escape(message)):
        read_question_file(written(tmp_path / "squad.json", document))


def test_a_test_split_without_answers_is_not_used(tmp_path):
    document = json.loads(json.dumps(DOCUMENT))
    for article in document["data"]:
        for qa in article["paragraphs"][0]["qas"]:
            qa.pop("answers"), qa.pop("is_impossible", None)
    train, test = written(tmp_path / "train.json", DOCUMENT), written(tmp_path / "test.json", document)
    read = read_tables(None, train_file=train, test_file=test, read_file=read_question_file)
    splits = question_splits(read, ReadOptions())
    assert splits.test is None
    assert f"{test} has no answers (not public): it is not used" in splits.notes


def test_contexts_are_held_out_as_a_whole(tmp_path):
    rows = [changed(context=f"{LAKE} {i // 3}") for i in range(60)]
    path = written(tmp_path / "many.jsonl", "\n".join(map(json.dumps, rows)))
    splits = question_splits(read_tables(None, train_file=path, read_file=read_question_file), ReadOptions())
    assert not set(splits.train.pairs) & set(splits.validation.pairs)
    assert (len(splits.train), len(splits.validation)) == (54, 6)
    assert any("6 of 60 questions" in note and "2 of 20 contexts" in note for note in splits.notes)


LONG = " ".join([PLAY, LAKE] * 4)


def labels_of(*answers):
    labels = np.empty(len(answers), object)
    labels[:] = answers
    return labels


def made(tokenizer, questions, contexts, labels=None, **options):
    options = {"max_length": 48, "batch_size": 4, "seed": 0, "stride": 12} | options
    return question_answering_data(questions, contexts, labels, tokenizer, **options)


def rows_of(data):
    offsets = data.encoded.offsets
    return [data.encoded.input_ids[start:stop].tolist() for start, stop in itertools.pairwise(offsets)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_and_labels_are_those_of_transformers_script(tokenizer, side, monkeypatch):
    """`run_qa.py`'s preparation, written out: windows of the tokenizer, and the answer's tokens, or [CLS]."""
    monkeypatch.setattr(tokenizer, "truncation_side", side)
    contexts = [LONG, LAKE, LONG]
    starts = [LONG.index("1924"), LAKE.index("Ost"), LONG.index("Malmö 🎭")]
    labels = labels_of(*[((text, start),) for text, start in zip(["1924", "Ost", "Malmö 🎭"], starts, strict=True)])
    data = made(tokenizer, QUESTIONS, contexts, labels)
    theirs = tokenizer(
        QUESTIONS,
        contexts,
        truncation="only_second",
        max_length=48,
        stride=12,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    order = np.lexsort((theirs["overflow_to_sample_mapping"],))
    if side == "left":  # there the tokenizer begins with the last window
        order = np.concatenate(
            [np.flatnonzero(np.equal(theirs["overflow_to_sample_mapping"], i))[::-1] for i in range(3)]
        )
    assert data.questions.tolist() == [theirs["overflow_to_sample_mapping"][i] for i in order]
    assert rows_of(data) == [theirs["input_ids"][i] for i in order]
    expected = []
    for i in order:
        question = theirs["overflow_to_sample_mapping"][i]
        (text, start), offsets = labels[question][0], theirs["offset_mapping"][i]
        inside = [j for j, number in enumerate(theirs.sequence_ids(int(i))) if number == 1]
        first, last = inside[0], inside[-1]
        if not (offsets[first][0] <= start and offsets[last][1] >= start + len(text)):
            expected.append([0, 0])
            continue
        while first < len(offsets) and offsets[first][0] <= start:
            first += 1
        while offsets[last][1] >= start + len(text):
            last -= 1
        expected.append([first - 1, last + 1])
    assert data.labels.tolist() == expected
    assert [0, 0] in expected
    assert sum(label != [0, 0] for label in expected) >= 3
    for row, label, question in zip(rows_of(data), data.labels, data.questions, strict=True):
        if label.any():
            answer = tokenizer.decode(row[label[0] : label[1] + 1])
            assert answer.replace(" ", "") in (labels[question][0][0].lower().replace(" ", ""), "malmo[UNK]")


def test_spans_and_characters_lead_back_to_the_context(tokenizer):
    data = made(tokenizer, ["Who wrote it?"], [LONG])
    covered = np.zeros(len(LONG), bool)
    for row, (first, stop) in enumerate(data.spans):
        start = data.encoded.offsets[row]
        for begin, end in data.characters[start + first : start + stop]:
            covered[begin:end] = True
    assert all(done for done, letter in zip(covered, LONG, strict=True) if not letter.isspace())
    assert (data.labels == 0).all()
    assert data.num_truncated == 0


def test_a_stride_is_at_most_half_of_the_room(tokenizer):
    data = made(tokenizer, ["Who?"], [LONG], stride=128)
    room = data.spans[0][1] - data.spans[0][0]
    assert room == 48 - 5  # [CLS] who ? [SEP] … [SEP]
    characters = [
        data.characters[o + s : o + e].tolist() for o, (s, e) in zip(data.encoded.offsets, data.spans, strict=False)
    ]
    assert characters[0][-(room // 2) :] == characters[1][: room // 2]


def test_a_batch(tokenizer):
    data = made(tokenizer, QUESTIONS, [PLAY, PLAY, LAKE], labels_of(*LABELS), bucket_lengths=(16, 24))
    batch = data.train_batch(0)
    shapes = {name: (array.shape, array.dtype.name) for name, array in batch.items()}
    length = batch["input_ids"].shape[1]
    assert shapes == {
        **dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), ((4, length), "int32")),
        "labels": ((4, 2), "int32"),
        "weights": ((4,), "float32"),
    }
    rows = np.concatenate([batch["rows"] for batch in data.eval_batches()])
    assert sorted(rows[rows >= 0]) == list(range(len(data.labels)))
    assert data.with_seed(3).seed == 3


def test_a_sample_has_whole_questions(tokenizer):
    contexts = [LONG, LAKE] * 6
    data = made(tokenizer, [f"Who wrote number {i}?" for i in range(12)], contexts, labels_of(*[()] * 12))
    part = data.sample(20)
    assert part.num_questions < 12
    assert len(part.labels) <= 20
    assert sorted(set(part.questions)) == list(range(part.num_questions))
    for question, context in enumerate(part.contexts):
        number = (part.questions == question).sum()
        assert number == (data.questions == contexts.index(context)).sum()
        row = int(np.flatnonzero(part.questions == question)[0])
        start, (first, stop) = part.encoded.offsets[row], part.spans[row]
        begin, end = part.characters[start + first, 0], part.characters[start + stop - 1, 1]
        inside = tokenizer(context[begin:end], add_special_tokens=False)["input_ids"]
        assert rows_of(part)[row][first:stop] == inside
    assert data.sample(1).num_questions == 1  # with all of its rows
    assert data.sample(10_000).num_questions == 12


def test_an_empty_context_is_a_row(tokenizer):
    data = made(tokenizer, ["Who?"], [""])
    assert data.spans.tolist() == [[5, 5]]
    assert rows_of(data) == tokenizer(["Who?"], [""])["input_ids"]


def test_a_question_that_leaves_no_room(tokenizer):
    with pytest.raises(
        LongQuestion,
        match=r"the question 'why why .*' has, with the special tokens, 43 tokens, so data.max_length 48 leaves 5",
    ):
        made(tokenizer, ["Who?", "why " * 40], [LAKE, LAKE])
    with pytest.raises(LongQuestion, match=r"leaves 0 to the context; shorten it, or raise data\.max_length") as caught:
        made(tokenizer, ["Who?", "why " * 90], [LAKE, LAKE])
    assert caught.value.row == 1


def test_an_answer_without_a_token(tokenizer):
    context = "It is \u200b long."
    with pytest.raises(InputError, match="the tokenizer makes no token of the answer"):
        made(tokenizer, ["What?"], [context], labels_of((("\u200b", 6),)))


def test_a_slow_tokenizer_is_refused(tokenizer, tmp_path):
    from transformers import BertTokenizer

    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"BertTokenizer does not know the places of its tokens.*use a fast tokenizer"):
        made(BertTokenizer(str(tmp_path / "vocab.txt")), ["Who?"], [LAKE])


def test_rows_from_the_token_cache_are_the_same(tokenizer, tmp_path):
    path = written(tmp_path / "squad.json", DOCUMENT)
    split, said = splits_of(path).train, []
    cache = TokenCache(tmp_path / "tokens", said.append)
    plain = made(tokenizer, split.texts, split.pairs, split.labels)
    for _ in range(2):
        kept = made(tokenizer, split.texts, split.pairs, split.labels, cache=cache)
        for name in ("labels", "questions", "spans", "characters"):
            np.testing.assert_array_equal(getattr(kept, name), getattr(plain, name))
        assert rows_of(kept) == rows_of(plain)
    assert len(list((tmp_path / "tokens").iterdir())) == 1
    # The cache serves every length and stride.
    made(tokenizer, split.texts, split.pairs, split.labels, cache=cache, max_length=64, stride=3)
    assert len(list((tmp_path / "tokens").iterdir())) == 1
    assert said == []
