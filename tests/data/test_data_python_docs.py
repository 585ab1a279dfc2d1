import pytest

from jaxpeft.data.python_docs import load_python_docs, paragraph_key, paragraphs, split_topics
from jaxpeft.errors import InputError


def keys(texts):
    return {paragraph_key(text) for text in texts}


def test_no_paragraph_is_in_two_splits_or_twice_in_one():
    splits = load_python_docs()
    train, validation, test = splits.train, splits.validation, splits.test
    assert not keys(train.texts) & keys(validation.texts)
    assert not keys(train.texts) & keys(test.texts)
    assert not keys(validation.texts) & keys(test.texts)
    for split in (train, validation, test):
        assert len(keys(split.texts)) == len(split)


def test_sizes_are_about_80_10_10():
    splits = load_python_docs()
    sizes = [sum(map(len, split.texts)) for split in (splits.train, splits.validation, splits.test)]
    assert sizes[1] >= 30_000
    assert sizes[2] >= 30_000
    assert 0.76 < sizes[0] / sum(sizes) < 0.84
    assert splits.num_labels is None
    assert splits.train.labels is None


def test_a_topic_within_another_leaks_nothing():
    topics = {"for": "One.\n\nTwo", "compound": "Zero.\n\n   One.\n\nTwo", "new": "Three.\n\nThree."}
    splits = split_topics(topics)
    assert splits == {"validation": ["One.", "Two"], "test": [], "train": ["Zero.", "Three."]}
    assert split_topics(dict(reversed(topics.items()))) == splits


def test_the_text_is_as_it_stands():
    assert list(paragraphs("Title\n*****\n\n\n   indented\n")) == ["Title\n*****", "   indented\n"]


def test_a_python_without_pydoc_data(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(InputError, match=r"no pydoc_data module.*train_file"):
        load_python_docs()
