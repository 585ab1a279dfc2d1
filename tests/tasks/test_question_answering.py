"""Question answering: its loss beside torch's, its metrics beside SQuAD's, its answers beside a search through all spans."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_runs

from jaxpeft.data import Split, question_answering_data
from jaxpeft.errors import InputError
from jaxpeft.tasks import task_for
from jaxpeft.tasks.base import RowError
from jaxpeft.tasks.question_answering import QuestionAnswering
from jaxpeft.tasks.spans import NUM_BEST, best_pairs, candidates
from jaxpeft.tasks.squad_metrics import best_threshold, exact_match, f1, normalised, scores
from jaxpeft.tasks.text_pipeline import RowOptions, TextPipeline

# Text, right answers, and by hand: exact match and F1.
CASES = [
    ("the Anna Holm", ["Anna Holm"], 1, 1),
    ("Anna Holm.", ["anna  holm"], 1, 1),
    ("Anna", ["Anna Holm"], 0, 2 / 3),  # precision 1, recall 1/2
    ("Anna Holm wrote it", ["Anna Holm"], 0, 2 / 3),  # precision 1/2, recall 1
    ("Holm", ["Anna Holm", "Holm"], 1, 1),  # the best of the answers
    ("in May 1924", ["1924", "3 May 1924"], 0, 2 / 3),  # 2/4 with the first, 4/6 with the second
    ("Holm Holm", ["Holm"], 0, 2 / 3),  # a word counts as often as in both
    ("no idea", ["Anna"], 0, 0),
    ("", ["Anna"], 0, 0),
    ("", [], 1, 1),
    ("Anna", [], 0, 0),
    ("the", [], 1, 1),  # nothing but an article
    ("Anna", ["the", "Anna"], 1, 1),  # the first has no words: it is no answer
    ("", ["the"], 1, 1),
    ("1,200", ["1200"], 1, 1),
    ("U.S.", ["US"], 1, 1),
    ("theory", ["ory"], 0, 0),  # "the" only as a word
    ("naïve — café", ["naive café"], 0, 0.4),  # accents and dashes stay: 1 of 3 words, 1 of 2
    ("Anna-Maria", ["AnnaMaria"], 1, 1),
]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_runs.package_model())


def test_normalised():
    assert normalised("The  U.S. (an ally), a friend!") == "us ally friend"


@pytest.mark.parametrize(("text", "answers", "exact", "words"), CASES)
def test_exact_match_and_f1_by_hand(text, answers, exact, words):
    found = scores([text], [answers])
    assert [float(value[0]) for value in found] == pytest.approx([exact, words])


def test_both_are_those_of_transformers():
    from transformers.data.metrics.squad_metrics import compute_exact, compute_f1, get_raw_scores, normalize_answer

    pairs = [(text, answer) for text, answers, *_ in CASES for answer in [*answers, ""]]
    for text, answer in pairs:
        assert normalised(text) == normalize_answer(text)
        assert exact_match(text, answer) == compute_exact(answer, text)
        assert f1(text, answer) == pytest.approx(compute_f1(answer, text))
    examples = [
        SimpleNamespace(qas_id=str(i), answers=[{"text": answer} for answer in answers])
        for i, (_, answers, *_) in enumerate(CASES)
    ]
    theirs = get_raw_scores(examples, {str(i): text for i, (text, *_) in enumerate(CASES)})
    ours = scores([text for text, *_ in CASES], [answers for _, answers, *_ in CASES])
    for values, expected in zip(ours, theirs, strict=True):
        assert values.tolist() == pytest.approx([expected[str(i)] for i in range(len(CASES))])


def test_the_threshold_by_hand():
    """Answering the first two gains 1 + 0.5, the third loses 1, the fourth gains 0.4."""
    differences, gains = np.array([-4.0, -2.0, 1.0, 3.0]), np.array([1.0, 0.5, -1.0, 0.4])
    assert best_threshold(differences, gains) == -0.5
    assert best_threshold(differences, -np.abs(gains)) == -5  # none is answered
    assert best_threshold(differences, np.abs(gains)) == 4  # all are
    assert best_threshold(np.array([1.0, 1.0]), np.array([1.0, -2.0])) == 0  # both or none
    assert best_threshold(np.zeros(0), np.zeros(0)) == 0


def test_the_threshold_is_as_good_as_transformers():
    from transformers.data.metrics.squad_metrics import find_best_thresh_v2

    rng = np.random.default_rng(0)
    for _ in range(20):
        has_answer, words = rng.random(30) < 0.6, rng.integers(0, 4, 30) / 3
        differences = rng.standard_normal(30) * 3
        keys = [str(i) for i in range(30)]
        theirs, *_ = find_best_thresh_v2(
            dict.fromkeys(keys, "some text"),
            dict(zip(keys, words, strict=True)),
            dict(zip(keys, differences, strict=True)),
            dict(zip(keys, has_answer, strict=True)),
        )
        threshold = best_threshold(differences, np.where(has_answer, words, -1.0))
        right = np.where(differences <= threshold, np.where(has_answer, words, 0.0), ~has_answer)
        assert 100 * right.mean() == pytest.approx(theirs)


def test_the_best_spans_are_the_best_of_all():
    rng = np.random.default_rng(1)
    for length, most in ((1, 3), (7, 3), (7, 30), (40, 5)):
        logits = rng.standard_normal((length, 2)).astype(np.float32)
        everything = sorted(
            (
                (float(logits[i, 0]) + float(logits[j, 1]), i, j)
                for i in range(length)
                for j in range(i, min(i + most, length))
            ),
            reverse=True,
        )[:NUM_BEST]
        first, last, values = best_pairs(logits, most, NUM_BEST)
        assert list(zip(first, last, strict=True)) == [(i, j) for _, i, j in everything]
        assert values == pytest.approx([value for value, *_ in everything])
    assert best_pairs(np.zeros((0, 2)), 3, 5) == ([], [], [])


CONTEXT = "The play was written by Anna Holm in 1924. It was shown in May 1925 to many people of the town."
QUESTIONS = ["Who wrote it?", "Who sang?", "When was it shown?"]
ANSWERS = [(("Anna Holm", 24),), (), (("May 1925", 59), ("1925", 63))]


def questions(tokenizer, max_answer_length=30):
    labels = np.empty(3, object)
    labels[:] = ANSWERS
    return question_answering_data(
        QUESTIONS,
        [CONTEXT] * 3,
        labels,
        tokenizer,
        max_length=24,
        batch_size=2,
        seed=0,
        stride=6,
        max_answer_length=max_answer_length,
    )


def logits_for(data, wanted):
    """Logits that give each of `wanted`, question → (text, score) pairs, its score; [CLS] has 1, and all else -10."""
    found = []
    for row, question in enumerate(data.questions):
        start, stop = data.encoded.offsets[row : row + 2]
        logits = np.full((stop - start, 2), -10, np.float32)
        logits[0] = 0.5
        first, last = data.spans[row]
        characters = data.characters[start + first : start + last]
        for text, score in wanted.get(int(question), ()):
            place = CONTEXT.index(text)
            i, j = np.flatnonzero(characters[:, 0] == place), np.flatnonzero(characters[:, 1] == place + len(text))
            if len(i) and len(j):
                logits[first + i[0], 0], logits[first + j[0], 1] = score / 2, score / 2
        # What is not of the context does not count.
        logits[1, 0], logits[-1, 1] = 50, 50
        found.append(logits)
    rows = np.random.default_rng(0).permutation(len(found))
    outputs = np.empty(len(rows), object)
    outputs[:] = [found[row] for row in rows]
    return outputs, rows


def test_answers_are_searched_in_all_windows_of_a_question(tokenizer):
    data = questions(tokenizer)
    assert np.bincount(data.questions).min() >= 2
    wanted = {0: [("Anna Holm", 4.0)], 1: [("town", 3.0)], 2: [("May 1925", 6.0)]}
    found = candidates(*logits_for(data, wanted), data)
    texts = [CONTEXT[each.spans[0].start : each.spans[0].stop] for each in found]
    assert texts == ["Anna Holm", "town", "May 1925"]
    assert [each.spans[0].score for each in found] == [4, 3, 6]
    assert [each.none for each in found] == [1, 1, 1]
    assert [each.difference for each in found] == [-3, -2, -5]
    for each in found:
        places = [(span.start, span.stop) for span in each.spans]
        assert len(set(places)) == len(places) <= NUM_BEST  # a span of two windows counts once
        shares, none = each.probabilities(with_none=True)
        assert shares.sum() + none == pytest.approx(1)
        assert none / shares[0] == pytest.approx(math.exp(each.difference))
        assert each.probabilities(with_none=False)[0].sum() == pytest.approx(1)


def test_an_answer_has_at_most_so_many_tokens(tokenizer):
    data = questions(tokenizer, max_answer_length=2)
    long = {0: [("Anna Holm in 1924", 9.0)], 1: [], 2: [("May 1925", 5.0)]}
    found = candidates(*logits_for(data, long), data)
    lengths = [len(CONTEXT[span.start : span.stop].split()) for each in found for span in each.spans]
    assert max(lengths) <= 2
    assert found[2].spans[0].score == 5


def test_no_answer_has_the_smallest_score_of_all_windows(tokenizer):
    data = questions(tokenizer)
    outputs, rows = logits_for(data, {})
    for logits, row in zip(outputs, rows, strict=True):
        logits[0] = row
    found = candidates(outputs, rows, data)
    assert [each.none for each in found] == [2 * int(np.flatnonzero(data.questions == i)[0]) for i in range(3)]


def measured(task, data, wanted):
    return task.measure({"loss": 6.0, "weight": 3.0}, *logits_for(data, wanted), data)


def test_metrics_of_squad_1_by_hand(tokenizer):
    data = questions(tokenizer)
    data.answers[1] = ("town",)
    wanted = {0: [("Anna", 4.0)], 1: [("many people", 3.0)], 2: [("1925", 6.0)]}
    assert measured(task_for("question-answering"), data, wanted) == pytest.approx(
        {"loss": 2.0, "f1": (2 / 3 + 0 + 1) / 3, "exact_match": 1 / 3}
    )


def of_squad_2(threshold=0.0):
    split = Split(QUESTIONS, [CONTEXT] * 3, np.empty(3, object))
    split.labels[:] = ANSWERS
    task = QuestionAnswering.for_labels(None).for_splits(
        SimpleNamespace(train=split, validation=split, test=None, num_labels=2)
    )
    assert task.calibration == {"null_threshold": 0.0}
    return task.__class__(task.num_labels, task.metrics, threshold)


def test_metrics_and_threshold_of_squad_2_by_hand(tokenizer):
    """[CLS] has the score 1. At threshold 0 all are answered; the second must not be."""
    data, task = questions(tokenizer), of_squad_2()
    wanted = {0: [("Anna Holm", 4.0)], 1: [("town", 3.0)], 2: [("shown in May", 6.0)]}
    figures = measured(task, data, wanted)
    assert figures == pytest.approx(
        {
            "loss": 2.0,
            "f1": (1 + 0 + 2 / 5) / 3,
            "exact_match": 1 / 3,
            "has_answer_f1": (1 + 2 / 5) / 2,
            "has_answer_exact_match": 1 / 2,
            "no_answer_f1": 0,
            "no_answer_exact_match": 0,
        }
    )
    assert set(figures) == {"loss", *task.metrics} <= set(QuestionAnswering.known_metrics)
    # Differences: -3, -2 and -5. Between -3 and -2 all but the second are answered.
    calibrated = task.calibrated(*logits_for(data, wanted), data)
    assert calibrated.calibration == {"null_threshold": -2.5}
    assert measured(calibrated, data, wanted)["f1"] == pytest.approx((1 + 1 + 2 / 5) / 3)
    assert measured(calibrated, data, wanted)["no_answer_exact_match"] == 1
    assert task_for("question-answering").calibrated(*logits_for(data, wanted), data).calibration == {}


def asked(tokenizer, task, wanted, contexts=None, top=None):
    pipeline = TextPipeline(tokenizer, RowOptions(max_length=24, doc_stride=6), 64, reads_pairs=True)
    found = task.make_questions(Split(QUESTIONS, contexts or [CONTEXT] * 3), pipeline, batch_size=2, top=top)
    data = questions(tokenizer)
    if contexts is None:
        outputs, rows = logits_for(data, wanted)
        of_row = dict(zip(rows.tolist(), outputs, strict=True))
    batches = []
    for batch in found.batches:
        logits = np.zeros((*batch["input_ids"].shape, 2), np.float32)
        for i, row in enumerate(batch["rows"].tolist()):
            if row >= 0 and contexts is None:
                logits[i, : len(of_row[row])] = of_row[row]
        batches.append(logits)
    return found.answers(batches)


def test_answers_in_words_and_as_records(tokenizer):
    wanted = {0: [("Anna Holm", 8.0)], 1: [("town", 3.0)], 2: [("May 1925", 6.0)]}
    task = of_squad_2(-2.5)
    anna, sang, shown = asked(tokenizer, task, wanted)
    record = task.as_record(anna)
    assert {key: record[key] for key in ("answer", "start", "end")} == {"answer": "Anna Holm", "start": 24, "end": 33}
    assert record["score"] + record["no_answer"] == pytest.approx(1, abs=1e-2)
    assert set(record) == {"answer", "start", "end", "score", "no_answer"}
    none = task.as_record(sang)
    assert (none["answer"], none["start"], none["end"]) == ("", None, None)
    assert none["score"] == none["no_answer"]
    assert task.in_words(sang)[0].startswith("no answer: 11.9 %")  # e¹ of e³ + e¹
    assert task.in_words(anna)[0] == "'Anna Holm', characters 24 to 33: 99.9 %"
    assert CONTEXT[shown.best.start : shown.best.end] == shown.best.text == "May 1925"

    plain = task_for("question-answering")
    several = asked(tokenizer, plain, wanted, top=3)
    record = plain.as_record(several[1])
    assert record["answer"] == "town"
    assert [set(each) for each in record["possible"]] == [{"text", "start", "end", "score"}] * 3
    assert record["possible"][0] == {"text": "town", "start": 90, "end": 94, "score": record["score"]}
    assert len(plain.in_words(several[1])) == 3
    assert "no_answer" not in record


def test_an_empty_context_has_no_answer(tokenizer):
    task = task_for("question-answering")
    empty, *_ = asked(tokenizer, task, {}, contexts=["", CONTEXT, CONTEXT])
    assert task.as_record(empty) == {"answer": "", "start": None, "end": None, "score": 1.0}
    assert task.in_words(empty) == ["no answer: the context is empty"]


def test_a_question_that_is_too_long_has_its_row(tokenizer):
    pipeline = TextPipeline(tokenizer, RowOptions(max_length=24), 64, reads_pairs=True)
    split = Split(["Who?", "why " * 30], [CONTEXT] * 2)
    with pytest.raises(RowError, match="leaves 0 to the context") as caught:
        task_for("question-answering").make_questions(split, pipeline, batch_size=2, top=1)
    assert caught.value.row == 1
    with pytest.raises(InputError, match="trained on pairs of texts, and it is asked about a single text"):
        task_for("question-answering").make_questions(Split(["Who?"]), pipeline, batch_size=2, top=1)


@pytest.mark.parametrize("length", [6, 16])
def test_the_loss_is_that_of_torch(length):
    """Over all tokens of a row, as transformers' class computes it; rows without weight do not count."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((5, length, 2)).astype(np.float32)
    labels = rng.integers(0, length, (5, 2)).astype(np.int32)
    weights = np.array([1, 1, 0, 1, 1], np.float32)
    task = task_for("question-answering")
    batch = {"labels": labels, "weights": weights}
    total, weight = task.loss(logits, batch)
    kept, places = torch.tensor(logits[weights > 0]), torch.tensor(labels[weights > 0], dtype=torch.long)
    entropy = torch.nn.functional.cross_entropy
    expected = (entropy(kept[..., 0], places[:, 0]) + entropy(kept[..., 1], places[:, 1])) / 2
    assert float(total / weight) == pytest.approx(expected.item(), rel=1e-6)
    statistics = task.statistics(logits, batch)
    assert float(statistics["loss"]) == pytest.approx(float(total))
    assert set(statistics) == {"loss", "weight"}


def test_metrics_that_are_not_measured():
    task = task_for("question-answering")
    with pytest.raises(
        InputError,
        match=r"'no_answer_f1' is not measured in this question answering; choose from loss, f1, exact_match$",
    ):
        task.check_metric("no_answer_f1")
    of_squad_2().check_metric("no_answer_f1")
