"""Token classification: its loss beside torch's, its figures beside seqeval's, its answers, and what it refuses."""

import warnings

import jax
import numpy as np
import pytest
import tiny
from sklearn.metrics import accuracy_score, f1_score

from jaxpeft.adapters import Lora, PromptTuning
from jaxpeft.config import DataConfig, RunConfig, TrainingConfig
from jaxpeft.data import Split
from jaxpeft.data.tagged import ragged
from jaxpeft.errors import InputError
from jaxpeft.tasks import TASKS, task_for
from jaxpeft.tasks.entities import entities_by_type, entities_of, entity_scores
from jaxpeft.tasks.text_pipeline import RowOptions, TextPipeline
from jaxpeft.tasks.token_classification import EntityRecognition, Span, TaggedText, TokenClassification
from jaxpeft.training.micro_batches import MicroBatches, mean_loss_and_gradients
from jaxpeft.training.objective import Objective

NAMES = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
SENTENCES = [["John", "saw", "New", "York", "\x00"], ["he", "left"], ["internationalization"] * 9, ["\x00"]]
TAGS = [["B-PER", "O", "B-LOC", "I-LOC", "O"], ["O", "O"], ["B-LOC", "I-LOC", "I-LOC", "O", "O"] + ["O"] * 4, ["O"]]
ROWS = RowOptions(max_length=16, bucket_lengths=(8,), doc_stride=4)


@pytest.fixture(scope="module")
def tokenizer():
    """The bert-base-uncased vocabulary."""
    import tiny_runs
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_runs.package_model(), use_fast=True)


@pytest.fixture(scope="module")
def pipeline(tokenizer):
    return TextPipeline(tokenizer, ROWS, 32, reads_pairs=False, label_names=NAMES)


def split(tags=TAGS, names=NAMES):
    flat = np.asarray([names.index(tag) for each in tags for tag in each], np.int32)
    return Split(SENTENCES, None, ragged(flat, [len(each) for each in tags]))


# Which task it is


def test_names_decide_what_is_measured():
    entities, tags = task_for("token-classification", 5, NAMES), task_for("token-classification", 2, ("NOUN", "O"))
    assert (type(entities), entities.metrics) == (EntityRecognition, ("f1", "precision", "recall", "accuracy"))
    assert (type(tags), tags.metrics) == (TokenClassification, ("accuracy", "f1"))
    assert entities.metric_title("f1", NAMES) == "entity F1"
    assert tags.metric_title("f1", None) == "F1 (macro mean of tags)"
    assert entities.metric_title("accuracy", NAMES) == tags.metric_title("accuracy", None) == "word accuracy"
    with pytest.raises(InputError, match="'recall' is not measured in this token classification with 2 classes"):
        tags.check_metric("recall")


# Figures


CASES = {
    "all right": (["B-X I-X O", "O B-Y"], ["B-X I-X O", "O B-Y"]),
    "a wrong end": (["B-X I-X I-X O B-Y"], ["B-X I-X O O B-Y"]),
    "a wrong type": (["B-X I-X O"], ["B-Y I-Y O"]),
    "a type that changes inside": (["B-X I-X"], ["B-X I-Y"]),
    "two in a row": (["B-X B-X"], ["B-X I-X"]),
    "none predicted": (["B-X O"], ["O O"]),
    "none at all": (["O O"], ["O O"]),
    "over the end of a sentence": (["B-X", "I-X O"], ["B-X", "O B-X"]),
    "begun with I": (["B-X I-X O"], ["I-X I-X O"]),
    "IOB1": (["I-X I-X B-X O I-Y"], ["I-X I-X I-X O I-Y"]),
    "IOBES": (["S-X O B-Y I-Y E-Y"], ["S-X O B-Y E-Y O"]),
}
BY_HAND = {  # true entities, predicted ones, those that are both
    "all right": (2, 2, 2),
    "a wrong end": (2, 2, 1),
    "a wrong type": (1, 1, 0),
    "a type that changes inside": (1, 2, 0),
    "two in a row": (2, 1, 0),
    "none predicted": (1, 0, 0),
    "none at all": (0, 0, 0),
    "over the end of a sentence": (2, 2, 1),
    "begun with I": (1, 1, 1),
    "IOB1": (3, 2, 1),
    "IOBES": (2, 2, 1),
}


def separated(sentences):
    return [each.split() for each in sentences]


@pytest.mark.parametrize("name", CASES)
def test_entities_are_counted_as_seqeval_does(name):
    from seqeval import metrics

    true, predicted = map(separated, CASES[name])
    number, found, right = BY_HAND[name]
    precision, recall = right / found if found else 0, right / number if number else 0
    f1 = 2 * precision * recall / (precision + recall) if right else 0
    scores = entity_scores(true, predicted)
    assert scores == pytest.approx((precision, recall, f1))
    seqeval = (metrics.precision_score, metrics.recall_score, metrics.f1_score)
    assert scores == pytest.approx([each(true, predicted, zero_division=0) for each in seqeval])
    classes = entities_by_type(true, predicted)
    assert [sum(each.rows for each in classes), sum(each.predicted for each in classes)] == [number, found]
    if number:
        report = metrics.classification_report(true, predicted, output_dict=True, zero_division=0)
        for each in classes:
            theirs = report[each.name]
            expected = (theirs["precision"], theirs["recall"], theirs["f1-score"], theirs["support"])
            assert (each.precision, each.recall, each.f1, each.rows) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["all right", "a wrong end", "a wrong type", "two in a row", "none predicted"])
def test_valid_tags_have_the_same_figures_in_strict_mode(name):
    """The modes differ only in what a scheme does not allow, such as an entity of IOB2 that begins with I."""
    from seqeval import metrics, scheme

    true, predicted = map(separated, CASES[name])
    strict = metrics.f1_score(true, predicted, mode="strict", scheme=scheme.IOB2, zero_division=0)
    assert entity_scores(true, predicted)[2] == pytest.approx(strict)


def test_the_modes_differ_for_tags_that_a_scheme_does_not_allow():
    from seqeval import metrics, scheme

    true, predicted = map(separated, CASES["begun with I"])
    assert metrics.f1_score(true, predicted, mode="strict", scheme=scheme.IOB2, zero_division=0) == 0
    assert entity_scores(true, predicted)[2] == 1


def test_bilou_is_counted_as_seqeval_counts_it_in_strict_mode():
    from seqeval import metrics, scheme

    true, predicted = separated(["U-X O B-Y I-Y L-Y O"]), separated(["U-X O B-Y L-Y O U-Y"])
    strict = metrics.f1_score(true, predicted, mode="strict", scheme=scheme.BILOU, zero_division=0)
    assert entity_scores(true, predicted)[2] == pytest.approx(strict) == pytest.approx(0.4)
    assert entities_of(true[0]) == [("X", 0, 0), ("Y", 2, 4)]


def evaluated(task, data, rng):
    """Random outputs of the evaluation, as the step and the task make them; and the logits of each batch."""
    outputs, labels, sums, logits = [], [], {"loss": 0.0, "weight": 0.0}, []
    for batch in data.eval_batches():
        logits.append(rng.standard_normal((*batch["labels"].shape, task.num_labels)).astype(np.float32))
        found = task.gathered(np.asarray(task.outputs(logits[-1])), batch)
        outputs.append(found[0])
        labels.append(found[1])
        statistics = task.statistics(logits[-1], batch)
        sums = {name: sums[name] + float(statistics[name]) for name in sums}
    return sums, np.concatenate(outputs), np.concatenate(labels), logits


def test_every_word_has_one_prediction_and_one_label(pipeline):
    """Also those that the tokenizer drops: their answer is O. The answers of `predict` are those that are counted."""
    task = task_for("token-classification", 5, NAMES)
    data = task.make_data(split(), pipeline, batch_size=2, seed=0)
    sums, outputs, labels, logits = evaluated(task, data, np.random.default_rng(0))
    assert sums["weight"] == len(labels) == 15  # of 17 words, two are dropped
    questions = task.make_questions(Split(SENTENCES), pipeline, batch_size=2, top=None)
    answers = questions.answers(logits)
    assert [list(answer.words) for answer in answers] == SENTENCES
    predicted = [list(answer.tags) for answer in answers]
    assert [predicted[0][4], predicted[3][0]] == ["O", "O"]
    measured = task.measure(sums, outputs, labels, data)
    precision, recall, f1 = entity_scores(TAGS, predicted)
    accuracy = accuracy_score(sum(TAGS, []), sum(predicted, []))  # noqa: RUF017
    expected = {"loss": sums["loss"] / 15, "f1": f1, "precision": precision, "recall": recall, "accuracy": accuracy}
    assert measured == pytest.approx(expected)
    found = task.by_class(outputs, labels, NAMES, data)
    assert found.classes == entities_by_type(TAGS, predicted)
    assert found.confusion is None
    spans = [(span.type, span.start, span.end) for answer in answers for span in answer.spans]
    assert sum(each.predicted for each in found.classes) == len(spans)


def test_tags_without_a_scheme_are_counted_one_by_one(tokenizer):
    """Without O among the classes, a dropped word is wrong."""
    names = ("NOUN", "VERB", "X")
    tags = [["NOUN", "VERB", "NOUN", "NOUN", "X"], ["X", "VERB"], ["NOUN"] * 9, ["X"]]
    task = task_for("token-classification", 3, names)
    pipeline = TextPipeline(tokenizer, ROWS, 32, label_names=names)
    data = task.make_data(split(tags, names), pipeline, batch_size=2, seed=0)
    sums, outputs, labels, logits = evaluated(task, data, np.random.default_rng(1))
    answers = task.make_questions(Split(SENTENCES), pipeline, batch_size=2, top=None).answers(logits)
    predicted = [tag for answer in answers for tag in answer.tags]
    true = [tag for each in tags for tag in each]
    assert predicted[4] == predicted[-1] == "O"
    measured = task.measure(sums, outputs, labels, data)
    assert measured["accuracy"] == pytest.approx(accuracy_score(true, predicted))
    assert measured["f1"] == pytest.approx(f1_score(true, predicted, labels=names, average="macro", zero_division=0))
    found = task.by_class(outputs, labels, names, data)
    assert [each.rows for each in found.classes] == [true.count(name) for name in names]
    assert [each.predicted for each in found.classes] == [predicted.count(name) for name in names]
    assert np.sum(found.confusion) == 15
    assert [(span.type, span.text) for span in answers[1].spans] == [
        (tag, word) for tag, word in zip(answers[1].tags, SENTENCES[1], strict=True)
    ]


# Loss


def test_the_loss_is_torch_s(pipeline):
    torch = pytest.importorskip("torch")
    task = task_for("token-classification", 5, NAMES)
    data = task.make_data(split(), pipeline, batch_size=8, seed=0)
    batch = data.train_batch(0)
    logits = tiny.normal(0, *batch["labels"].shape, 5)
    total, weight = task.loss(logits, batch)
    targets = torch.tensor(np.where(batch["weights"] > 0, batch["labels"], -100), dtype=torch.long)
    theirs = torch.nn.functional.cross_entropy(torch.tensor(logits).flatten(0, 1), targets.flatten())
    assert float(total / weight) == pytest.approx(theirs.item(), rel=1e-6)


def test_the_step_does_not_depend_on_micro_batches(tiny_models, pipeline):
    task = task_for("token-classification", 5, NAMES)
    model = tiny_models("bert", "token-classification", config={"vocab_size": 30522, "num_labels": 5}, num_labels=5)
    frozen, adapters = tiny.adapted(model, Lora(rank=2, dropout=0.3))
    objective = Objective(model, Lora(rank=2, dropout=0.3), task)
    data = task.make_data(split(), pipeline, batch_size=4, seed=0)
    batch = {name: np.asarray(array) for name, array in data.train_batch(0).items()}

    def logits(adapters, batch, key, row_key):
        return objective.logits(frozen, adapters, {}, batch, key, row_key)

    found = {}
    for rows in (4, 3, 1):
        step = jax.jit(
            lambda adapters, key, rows=rows: mean_loss_and_gradients(
                logits, objective.loss, lambda _: None, adapters, batch, key, MicroBatches(rows=rows)
            )
        )
        found[rows] = step(adapters, jax.random.key(3))
    for rows in (3, 1):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found[rows], found[4])


@pytest.mark.parametrize("method", [Lora(rank=2), PromptTuning(num_virtual_tokens=3)], ids=["lora", "prompt-tuning"])
def test_logits_are_those_of_the_tokens(method, tiny_models, pipeline):
    """Not of virtual ones, which prompt tuning puts in front; padding changes none of them."""
    task = task_for("token-classification", 5, NAMES)
    model = tiny_models("bert", "token-classification", config={"vocab_size": 30522, "num_labels": 5}, num_labels=5)
    names = ["word_embeddings"] if isinstance(method, PromptTuning) else None
    frozen, adapters = tiny.adapted(model, method, target_modules=names)
    data = task.make_data(split(), pipeline, batch_size=1, seed=0)
    logits = jax.jit(Objective(model, method, task).logits)
    for batch in data.eval_batches():
        batch = {name: array for name, array in batch.items() if name != "rows"}
        found = logits(frozen, adapters, {}, batch)
        assert found.shape == (*batch["input_ids"].shape, 5)
        padded = {name: np.pad(array, ((0, 0), (0, 4))) for name, array in batch.items()}
        again = logits(frozen, adapters, {}, padded)
        inside = batch["attention_mask"] > 0
        np.testing.assert_allclose(again[:, : inside.shape[1]][inside], found[inside], atol=1e-5)


def test_the_shapes_that_are_compiled_are_those_of_the_data(pipeline):
    task = task_for("token-classification", 5, NAMES)
    data = task.make_data(split(), pipeline, batch_size=2, seed=0)
    assert task.lengths(ROWS) == (8, 16)
    for batch in data.eval_batches():
        shapes = task.batch_shapes(ROWS, 2, batch["input_ids"].shape[1])
        assert {name: (shape.shape, shape.dtype) for name, shape in shapes.items()} == {
            name: (array.shape, array.dtype) for name, array in batch.items() if name != "rows"
        }


# Answers


def answer_to(text, tags, pipeline, task=None):
    """The answer to a text whose words are given `tags`, each with probability 0.9 or more."""
    task = task or task_for("token-classification", 5, NAMES)
    questions = task.make_questions(Split([text]), pipeline, batch_size=1, top=None)
    order = iter(tags)
    outputs = []
    for batch in questions.batches:
        logits = np.zeros((*batch["weights"].shape, len(NAMES)), np.float32)
        for row, column in zip(*np.nonzero(batch["weights"]), strict=True):
            logits[row, column, NAMES.index(next(order))] = 9.0
        outputs.append(logits)
    (answer,) = questions.answers(outputs)
    return answer


def test_spans_have_offsets_of_the_user_s_text(pipeline):
    text = "  John\tMüller-Lüdenscheidt  saw\nNew York."
    answer = answer_to(text, ["B-PER", "I-PER", "I-PER", "I-PER", "O", "B-LOC", "I-LOC", "O"], pipeline)
    assert answer.words == ("John", "Müller", "-", "Lüdenscheidt", "saw", "New", "York", ".")
    assert [(span.type, span.text) for span in answer.spans] == [
        ("PER", "John\tMüller-Lüdenscheidt"),
        ("LOC", "New York"),
    ]
    assert all(text[span.start : span.end] == span.text for span in answer.spans)
    assert all(0.9 < span.probability < 1 for span in answer.spans)


def test_a_list_of_words_is_taken_as_it_is(pipeline):
    """Its offsets are those of the words joined by blanks. Dropped words have the tag O, and so end an entity."""
    words = ["New", "", "York's", "\x00"]
    answer = answer_to(words, ["B-LOC", "I-LOC"], pipeline)
    assert (answer.words, answer.tags) == (tuple(words), ("B-LOC", "O", "I-LOC", "O"))
    joined = " ".join(words)
    assert [joined[span.start : span.end] for span in answer.spans] == ["New", "York's"]
    record = task_for("token-classification", 5, NAMES).as_record(answer)
    assert record["tags"] == list(answer.tags)
    assert record["spans"][0] == {
        "type": "LOC",
        "text": "New",
        "start": 0,
        "end": 3,
        "probability": pytest.approx(0.9995, abs=1e-4),
    }


@pytest.mark.parametrize("text", ["", " ", "\x00", [], [""]])
def test_texts_without_a_word_have_an_answer(text, pipeline):
    answer = answer_to(text, [], pipeline)
    assert answer.spans == ()
    assert set(answer.tags) <= {"O"}
    task = task_for("token-classification", 5, NAMES)
    assert task.in_words(answer) == ["no entities"]


def test_answers_in_words():
    answer = TaggedText(("New", "York", "!"), ("B-LOC", "I-LOC", "O"), (Span("LOC", "New York", 0, 8, 0.987),))
    assert task_for("token-classification", 5, NAMES).in_words(answer) == ["LOC 'New York' (0 to 8) 98.7 %"]
    assert task_for("token-classification", 2, ("X", "Y")).in_words(answer) == ["New/B-LOC York/I-LOC !/O"]


def test_long_texts_are_not_cut(pipeline):
    text = " ".join(["word"] * 100)
    answer = answer_to(text, ["O"] * 100, pipeline)
    assert len(answer.words) == len(answer.tags) == 100


def test_no_warnings_of_seqeval():
    """Their kind would stop a program that takes warnings for errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert entity_scores([["O"]], [["O"]]) == (0, 0, 0)
        assert entities_by_type([["O"]], [["O"]]) == ()


# Refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"text_pair_column": "b"},
            "data.text_pair_column 'b' cannot be used in token-classification, which reads one text a row",
        ),
        (
            {"num_labels": 3},
            "data.num_labels is for classification and multi-label, and token-classification cannot use it",
        ),
        ({"regression": True}, "data.regression is for classification, and token-classification cannot use it"),
        ({"doc_stride": -1}, "data.doc_stride is -1; it must be at least 0, or null"),
        ({"packing": True}, "data.packing is only for classification"),
    ],
)
def test_flags_that_it_cannot_use(flags, message):
    with pytest.raises(InputError, match=message):
        RunConfig(task="token-classification", data=DataConfig(train_file="a.conll", **flags))


@pytest.mark.parametrize("task", ["classification", "masked-lm"])
def test_a_stride_is_for_windows(task):
    with pytest.raises(
        InputError,
        match=f"data.doc_stride 0 is for question-answering and token-classification, and the task is {task}; leave it out",
    ):
        RunConfig(task=task, data=DataConfig(train_file="a.csv", doc_stride=0))


def test_a_metric_that_it_never_measures():
    with pytest.raises(
        InputError, match="'matthews' is not measured for token-classification; choose from loss, accuracy, f1"
    ):
        RunConfig(
            task="token-classification",
            data=DataConfig(train_file="a.conll"),
            training=TrainingConfig(metric="matthews"),
        )


def test_pairs_are_refused(pipeline):
    with pytest.raises(InputError, match="trained on single texts, and it is asked about pairs"):
        task_for("token-classification", 5, NAMES).make_questions(Split(["a"], ["b"]), pipeline, batch_size=1, top=None)


def test_data_whose_words_are_all_dropped(pipeline):
    rows = Split([["\x00"], [""]], None, ragged(np.zeros(2, np.int32), [1, 1]))
    with pytest.raises(InputError, match="the tokenizer drops every word of the 2 sentences"):
        task_for("token-classification", 5, NAMES).make_data(rows, pipeline, batch_size=1, seed=0)


def test_a_txt_file_to_answer_has_texts_unless_the_run_read_conll_from_one(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("New York\nBerlin X\n")
    kind = TASKS["token-classification"]
    assert kind.read_question_file(str(file), alike=False).column_names == ["text"]
    assert kind.read_question_file(str(file), alike=True)[0] == {"tokens": ["New", "Berlin"], "tags": ["York", "X"]}
