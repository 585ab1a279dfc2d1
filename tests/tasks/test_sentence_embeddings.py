"""Sentence embeddings beside sentence-transformers: losses, pooling and metrics; and which texts are no negatives."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxpeft.adapters import PromptTuning
from jaxpeft.data import Split
from jaxpeft.errors import InputError
from jaxpeft.tasks import task_for
from jaxpeft.tasks.metrics import retrieval_ranks
from jaxpeft.tasks.scored_pairs import ScoredPairs
from jaxpeft.tasks.sentence_embeddings import SentenceEmbeddings, unit
from jaxpeft.tasks.text_pipeline import RowOptions
from jaxpeft.training.objective import Objective

TASK = task_for("sentence-embeddings")
SCORED = task_for("sentence-embeddings", 1)


def batch_of(rows, texts, *, weights=None, ids=None, labels=None):
    """The arrays of a batch that a loss reads."""
    return {
        "weights": np.ones(rows, np.float32) if weights is None else np.asarray(weights, np.float32),
        "text_ids": np.arange(rows * texts, dtype=np.int32) if ids is None else np.asarray(ids, np.int32),
        "labels": np.zeros(rows, np.float32) if labels is None else np.asarray(labels, np.float32),
    }


def mean_loss(task, logits, batch):
    total, weight = task.loss(jnp.asarray(logits), batch)
    return float(total / weight)


def in_torch(array):
    import torch

    return torch.tensor(np.asarray(array))


@pytest.mark.parametrize("texts", [2, 3])
@pytest.mark.parametrize("scale", [20.0, 5.0])
def test_the_contrastive_loss_is_that_of_sentence_transformers(texts, scale):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    logits = tiny.normal(0, 6 * texts, 8)
    theirs = losses.MultipleNegativesRankingLoss(None, scale=scale)
    embeddings = [in_torch(column) for column in logits.reshape(6, texts, 8).swapaxes(0, 1)]
    expected = theirs.compute_loss_from_embeddings(embeddings, None)
    assert mean_loss(replace(TASK, scale=scale), logits, batch_of(6, texts)) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("ties", [False, True])
def test_the_loss_of_scored_pairs_is_that_of_sentence_transformers(ties):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    logits, labels = tiny.normal(1, 12, 8), np.float32([0.1, 0.9, 0.5, 0.5 if ties else 0.4, 1.0, 0.0])
    embeddings = [in_torch(column) for column in logits.reshape(6, 2, 8).swapaxes(0, 1)]
    expected = losses.CoSENTLoss(None).compute_loss_from_embeddings(embeddings, in_torch(labels))
    assert mean_loss(SCORED, logits, batch_of(6, 2, labels=labels)) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(("task", "texts"), [(TASK, 2), (TASK, 3), (SCORED, 2)])
def test_rows_without_a_weight_do_not_exist(task, texts):
    """A batch that is not full has copies of the first row behind the end."""
    logits, labels = tiny.normal(2, 4 * texts, 8), [0.3, 0.1, 0.2, 0.4]
    batch = batch_of(4, texts, labels=labels)
    filled = batch_of(6, texts, weights=[1, 1, 1, 1, 0, 0], labels=[*labels, 0.3, 0.3])
    filled["text_ids"] = np.concatenate([batch["text_ids"], np.tile(batch["text_ids"][:texts], 2)])
    more = np.concatenate([logits, np.tile(logits[:texts], (2, 1))])
    assert mean_loss(task, more, filled) == pytest.approx(mean_loss(task, logits, batch), rel=1e-6)
    gradient = jax.grad(lambda logits: task.loss(logits, filled)[0])(jnp.asarray(more))
    assert not np.asarray(gradient)[4 * texts :].any()
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("why", "ids", "left_out"),
    [
        ("nothing is equal", [[0, 1], [2, 3], [4, 5]], []),
        ("one second text twice", [[0, 1], [2, 1], [4, 5]], [(0, 1), (1, 0)]),
        ("one first text with two second texts", [[0, 1], [0, 3], [4, 5]], [(0, 1), (1, 0)]),
        ("a first text is another's second", [[0, 1], [2, 0], [4, 5]], [(0, 1)]),
        ("a third text is another's second", [[0, 1, 9], [2, 3, 1], [4, 5, 8]], [(0, 4)]),
        ("a first text has two third texts", [[0, 1, 9], [0, 3, 8], [4, 5, 7]], [(0, 1), (1, 0)]),
    ],
)
def test_texts_that_belong_together_are_no_negatives(why, ids, left_out):
    texts = len(ids[0])
    logits, batch = tiny.normal(3, 3 * texts, 8), batch_of(3, texts, ids=np.ravel(ids))
    rows = unit(logits).reshape(3, texts, 8)
    scores = 20 * rows[:, 0] @ rows[:, 1:].swapaxes(0, 1).reshape(-1, 8).T
    for row, candidate in left_out:
        scores[row, candidate] = -np.inf
    expected = np.log(np.exp(scores).sum(1)) - np.diagonal(scores)
    np.testing.assert_allclose(TASK.losses(jnp.asarray(logits), batch), expected, rtol=1e-5)


def test_a_vector_of_length_0_has_a_gradient():
    logits = np.zeros((4, 8), np.float32)
    gradient = jax.grad(lambda logits: TASK.loss(logits, batch_of(2, 2))[0])(jnp.asarray(logits))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
def test_pooling_is_that_of_sentence_transformers(pooling, kind, tiny_models):
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    model, batch = tiny_models(kind, "sentence-embeddings"), tiny.batch(4)
    frozen, adapters = model.params, {"sites": {}, "modules": {}}
    tokens = model.module.apply({"params": frozen}, **model.inputs(batch)).last_hidden_state
    theirs = modules.Pooling(32, pooling_mode=pooling)
    features = {"token_embeddings": in_torch(tokens), "attention_mask": in_torch(batch["attention_mask"])}
    expected = theirs(features)["sentence_embedding"]
    objective = Objective(model, None, replace(TASK, pooling=pooling))
    np.testing.assert_allclose(objective.logits(frozen, adapters, {}, batch), expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_virtual_tokens_count_as_in_sentence_transformers(pooling, tiny_models):
    """It puts ones in front of the mask, so the mean is also over virtual tokens, and the first token is one of them."""
    model, batch, method = tiny_models("bert", "sentence-embeddings"), tiny.batch(4), PromptTuning(num_virtual_tokens=3)
    frozen, adapters = tiny.adapted(model, method, target_modules=["word_embeddings"])
    everything = Objective(model, method, Everything())
    tokens = np.asarray(everything.logits(frozen, adapters, {}, batch))
    mask = np.pad(batch["attention_mask"], ((0, 0), (3, 0)), constant_values=1)[..., None]
    expected = tokens[:, 0] if pooling == "cls" else (tokens * mask).sum(1) / mask.sum(1)
    found = Objective(model, method, replace(TASK, pooling=pooling)).logits(frozen, adapters, {}, batch)
    np.testing.assert_allclose(found, expected, atol=1e-5)


class Everything(SentenceEmbeddings):
    """All tokens, virtual ones too."""

    def read_out(self, outputs, batch, virtual_tokens=0):
        return outputs


def test_the_encoder_has_no_pooler_and_paths_of_its_own(tiny_models):
    model = tiny_models("bert", "sentence-embeddings")
    assert model.base_prefix == ""
    assert not [path for path in model.sites() if "pooler" in path or path.startswith("bert/")]
    assert "encoder/layer/0/attention/self/query" in model.sites()
    assert model.behind_attention == "encoder/layer/1/attention/output"


def ranked(queries, documents, ids=None):
    n = len(queries)
    ids = np.arange(2 * n).reshape(n, 2) if ids is None else np.asarray(ids)
    return retrieval_ranks(unit(np.float32(queries)), unit(np.float32(documents)), ids[:, 0], ids[:, 1]).tolist()


def test_ranks_by_hand():
    queries, documents = [[1, 0], [0, 1], [1, 1]], [[1, 0.1], [1, 0], [0, 1]]
    # The first finds documents 1, 0, 2; the second 2, 0, 1; the third 0, and then 1 and 2, which are equally near.
    assert ranked(queries, documents) == [2, 3, 3]
    assert ranked(queries, documents, [[0, 1], [2, 1], [3, 4]]) == [1, 2, 3]  # document 1 is document 0
    assert ranked(queries, documents, [[0, 1], [0, 2], [3, 4]]) == [1, 2, 3]  # query 1 is query 0
    assert ranked([[1, 0]] * 3, [[1, 0]] * 3) == [3, 3, 3]  # nothing is told apart, so nothing is found


def test_ranks_are_those_of_a_search(monkeypatch):
    util = pytest.importorskip("sentence_transformers.util")
    monkeypatch.setattr("jaxpeft.tasks.metrics._QUERIES_PER_PRODUCT", 7)
    queries = tiny.normal(4, 40, 8)
    documents = queries + tiny.normal(5, 40, 8)
    hits = util.semantic_search(in_torch(queries), in_torch(documents), top_k=40)
    expected = [1 + [hit["corpus_id"] for hit in found].index(i) for i, found in enumerate(hits)]
    assert len(set(expected)) > 5
    assert ranked(queries, documents) == expected


def pipeline_with(tokenizer):
    from jaxpeft.tasks.text_pipeline import TextPipeline

    return TextPipeline(tokenizer, RowOptions(max_length=16, bucket_lengths=(8, 16)), 40, reads_pairs=True)


class Letters:
    """A tokenizer whose tokens are the letters of a text."""

    pad_token_id = 0

    def __call__(self, texts, pairs=None, **limit):
        ids = [[ord(letter) % 90 + 5 for letter in text][: limit.get("max_length", 99)] for text in texts]
        return {"input_ids": ids, "token_type_ids": [[0] * len(row) for row in ids]}


def test_figures_are_those_of_the_gathered_rows():
    """As evaluation does it: batches in another order than the rows, the last one not full."""
    split = Split([f"a{i}" * (1 + i % 4) for i in range(7)], [f"b{i}" * (1 + i % 3) for i in range(7)])
    data = TASK.make_data(split, pipeline_with(Letters()), batch_size=3, seed=0)
    embeddings = tiny.normal(6, 7, 2, 8)
    outputs, labels = [], []
    for batch in data.eval_batches():
        found, own = TASK.gathered(embeddings[np.maximum(batch["rows"], 0)].reshape(-1, 8), batch)
        outputs, labels = [*outputs, *found], [*labels, *own]
    assert sorted(labels) == list(range(7))
    measured = TASK.measure({"loss": 6.0, "weight": 3.0}, np.stack(outputs), np.asarray(labels), data)
    ranks = np.asarray(ranked(embeddings[:, 0], embeddings[:, 1]))
    assert measured == {
        "loss": 2.0,
        "mrr": pytest.approx((1 / ranks).mean()),
        "recall_at_1": pytest.approx((ranks == 1).mean()),
        "recall_at_10": 1.0,
    }


def test_correlations_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    logits, labels = tiny.normal(7, 20, 8), tiny.normal(8, 10)
    batch = {**batch_of(10, 2, labels=labels), "rows": np.arange(10)}
    measured = SCORED.measure({"loss": 1.0, "weight": 2.0}, *SCORED.gathered(logits, batch))
    rows = unit(logits).reshape(10, 2, 8)
    cosine = (rows[:, 0] * rows[:, 1]).sum(-1)
    assert measured == {
        "loss": 0.5,
        "spearman": pytest.approx(stats.spearmanr(cosine, labels).statistic),
        "pearson": pytest.approx(stats.pearsonr(cosine, labels).statistic, abs=1e-6),
    }


def test_answers():
    questions = TASK.make_questions(Split(["abc", "a", "defghijkl"]), pipeline_with(Letters()), batch_size=2, top=None)
    lengths = [batch["attention_mask"].sum(1)[:, None].astype(np.float32) for batch in questions.batches]
    found = questions.answers(np.concatenate([length, -length], 1) for length in lengths)
    assert [len(answer) for answer in found] == [2, 2, 2]
    np.testing.assert_allclose(found, np.float32([[1, -1]] * 3) / np.sqrt(2), rtol=1e-6)
    plain = replace(TASK, normalize=False)
    questions = plain.make_questions(Split(["abc", "a", "defghijkl"]), pipeline_with(Letters()), batch_size=2, top=None)
    found = questions.answers(np.concatenate([length, -length], 1) for length in lengths)
    np.testing.assert_array_equal(found, [[3, -3], [1, -1], [9, -9]])
    assert plain.in_words(found[0]) == ["2 values, norm 4.2426: 3.0000, -3.0000"]
    assert plain.in_words(np.ones(9, np.float32)) == [
        "9 values, norm 3.0000: 1.0000, 1.0000, 1.0000, 1.0000, 1.0000, …"
    ]
    assert plain.as_record(np.float32([0.1, 3])) == {"embedding": [0.1, 3.0]}
    pairs = TASK.make_questions(Split(["abc", "a"], ["ab", "b"]), pipeline_with(Letters()), batch_size=2, top=None)
    found = pairs.answers([np.float32([[1, 0], [1, 1], [0, 2], [0, -1]])])  # the shorter row is the first of the batch
    assert found == [-1.0, pytest.approx(np.sqrt(0.5))]
    assert TASK.in_words(0.5) == ["cosine 0.5000"]
    assert TASK.as_record(0.5) == {"cosine": 0.5}


def test_labels_choose_the_loss():
    assert type(task_for("sentence-embeddings", 1)) is ScoredPairs
    assert TASK.metrics == ("mrr", "recall_at_1", "recall_at_10")
    assert SCORED.metrics == ("spearman", "pearson")
    configured = SCORED.configured({"pooling": "cls", "scale": 5.0, "normalize": False})
    assert (configured.pooling, configured.scale, configured.normalize) == ("cls", 5.0, False)
    with pytest.raises(InputError, match=r"training.metric 'mrr' is not measured in this sentence embeddings"):
        SCORED.check_metric("mrr")
