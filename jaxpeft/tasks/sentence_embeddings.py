"""Sentence embeddings: a vector for each text, so that texts that belong together are near each other (Reimers & Gurevych 2019).

The loss of pairs (text, text that belongs to it) and triplets (with one that does not) is contrastive: among all second and third
texts of the batch, each first text must find its own (van den Oord et al. 2018, arXiv 1807.03748, equation 4; sentence-transformers'
MultipleNegativesRankingLoss). Equal texts are known by their tokens, and a text that is known to belong to a first text is not one
of its negatives: a copy of it, its own second text in another row, or the second text of another row with the same first text.

Negatives are those of one batch, over all devices. Accumulated micro-steps are batches of their own. Pairs with numbers have another
loss (`jaxpeft.tasks.scored_pairs`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpeft.data import (
    ReadOptions,
    SentencePairData,
    Split,
    Splits,
    Tables,
    questions_of,
    read_sentence_pairs,
    sentence_pair_data,
    texts_to_answer,
)
from jaxpeft.data.classification import cap_buckets
from jaxpeft.errors import InputError
from jaxpeft.tasks.base import Batch, Questions, Take, Task
from jaxpeft.tasks.metrics import retrieval_ranks
from jaxpeft.tasks.text_pipeline import RowOptions, TextPipeline

_SHOWN = 5
_SHORTEST = 1e-12  # a vector of length 0 has no direction; torch divides by this


@dataclass(frozen=True)
class SentenceEmbeddings(Task):
    """Embeds texts. Logits are the embeddings `[texts, d]`, as they are pooled.

    Attributes:
        pooling: "mean" of the tokens' vectors, or "cls": that of the first token.
        scale: factor of the cosines in the loss, the inverse of its temperature.
        normalize: True if embeddings that leave the program have length 1.
        texts_per_row: texts of a row of the data, 2 or 3.
    """

    pooling: str = "mean"
    scale: float = 20.0
    normalize: bool = True
    texts_per_row: int = 2

    name = "sentence-embeddings"
    title = "sentence embeddings"
    head = "sentence-embeddings"
    pipeline_tag = "sentence-similarity"
    auto_class = "AutoModel"
    known_metrics = ("loss", "mrr", "recall_at_1", "recall_at_10", "spearman", "pearson")
    reported_metrics: ClassVar[tuple[str, ...]] = ("mrr", "recall_at_1", "recall_at_10")
    reads_labels = False
    trains_head = False
    has_head = False
    compares_rows = True
    reads_scores = True
    label_flags = ("drop_unlabelled",)
    reads_negatives = True
    answers_single_texts = True
    options_from = "embedding"
    example = "A man is eating a piece of bread."

    @classmethod
    def read(cls, tables: Tables, options: ReadOptions) -> Splits:
        """Two texts in each row, and maybe a third one or a number."""
        return read_sentence_pairs(tables, options)

    @classmethod
    def read_questions(cls, table: Any, where: str, options: ReadOptions) -> Split:
        """The texts of a table, and the second ones if `options` names their column."""
        return texts_to_answer(table, where, questions_of(table, where, options))

    @classmethod
    def for_labels(cls, num_labels: int | None, headline_metrics: Sequence[str] = ()) -> Task:
        """The task for pairs without labels or, if they have numbers, for scored pairs."""
        if num_labels == 1:
            from jaxpeft.tasks.scored_pairs import ScoredPairs

            return ScoredPairs(1, ScoredPairs.reported_metrics)
        return cls(None, cls.reported_metrics)

    def configured(self, options: Mapping[str, Any], splits: Splits | None = None) -> Self:
        """The task with its flags, for rows of as many texts as those in `splits`."""
        found = super().configured(options)
        return found if splits is None else replace(found, texts_per_row=len(splits.train.columns))

    def check_data(self, splits: Splits) -> None:
        """Raise InputError if rows have a single text, or a split for evaluation has fewer than two rows."""
        if splits.train.pairs is None:
            raise InputError(
                f"{self.name} needs two texts in each row, and {splits.source} has one; give data.train_file with data.text_column and "
                "data.text_pair_column"
            )
        for split in (splits.validation, splits.test):
            if split is not None and len(split) < 2:
                raise InputError(
                    f"{splits.source} leaves 1 row to judge {self.title} by, and pairs are judged by others; add rows"
                )

    def make_data(self, split: Split, pipeline: TextPipeline, *, batch_size: int, seed: int) -> SentencePairData:
        """Rows of two or three texts, batched by their longest text."""
        rows = pipeline.rows
        return sentence_pair_data(
            split,
            pipeline.tokenizer,
            max_length=rows.max_length,
            batch_size=batch_size,
            seed=seed,
            bucket_lengths=rows.bucket_lengths,
            cache=rows.token_cache,
        )

    def make_questions(self, split: Split, pipeline: TextPipeline, *, batch_size: int, top: int | None) -> Questions:
        """The answer to a text is its embedding, `[d]` fp32; the answer to a pair is the cosine of the two."""
        data = self.make_data(replace(split, labels=None), pipeline, batch_size=batch_size, seed=0)
        batches = list(data.eval_batches())

        def answers(outputs: Iterable[np.ndarray]) -> list[Any]:
            rows = np.concatenate([batch["rows"] for batch in batches])
            found = np.concatenate(list(outputs)).reshape(len(rows), data.texts_per_row, -1)
            in_order = found[rows >= 0][np.argsort(rows[rows >= 0])]
            if split.pairs is not None:
                return cosines(in_order).tolist()
            return list(unit(in_order[:, 0]) if self.normalize else in_order[:, 0])

        return Questions(batches, answers, data.num_truncated)

    def in_words(self, answer: Any) -> list[str]:
        """The cosine, or of an embedding its number of values, its length, and the first values."""
        if isinstance(answer, float):
            return [f"cosine {answer:.4f}"]
        first = ", ".join(f"{value:.4f}" for value in answer[:_SHOWN])
        return [f"{len(answer)} values, norm {np.linalg.norm(answer):.4f}: {first}{', …' * (len(answer) > _SHOWN)}"]

    def as_record(self, answer: Any) -> dict[str, Any]:
        """The `cosine`, or the `embedding` as a list."""
        if isinstance(answer, float):
            return {"cosine": answer}
        return {"embedding": [float(str(value)) for value in answer]}  # as few digits as say the fp32 number

    def tokens_read(self, batch: Batch, virtual_tokens: int = 0) -> Take | None:
        """Takes the first token for "cls", a virtual one if there are some, as in sentence-transformers. The mean reads all."""
        return (lambda x: x[:, :1]) if self.pooling == "cls" else None

    def places_read(self, batch: Batch, virtual_tokens: int = 0) -> jax.Array | None:
        """The first token for "cls"; None for the mean."""
        return jnp.zeros((len(batch["input_ids"]), 1), jnp.int32) if self.pooling == "cls" else None

    def read_out(self, outputs: jax.Array, batch: Batch, virtual_tokens: int = 0) -> jax.Array:
        """The embeddings, `[texts, d]`. Virtual tokens count in the mean, as in sentence-transformers."""
        if self.pooling == "cls":
            return outputs[:, 0]
        mask = (batch["attention_mask"] > 0).astype(outputs.dtype)
        mask = jnp.pad(mask, ((0, 0), (virtual_tokens, 0)), constant_values=1.0)
        return (outputs * mask[..., None]).sum(1) / jnp.maximum(mask.sum(1, keepdims=True), 1.0)

    def losses(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """Cross-entropy of each row's own second text among all second and third texts of the batch, `[rows]`."""
        texts = by_row(unit(logits), batch)
        candidates = texts[:, 1:].swapaxes(0, 1).reshape(-1, texts.shape[-1])
        scores = self.scale * jnp.matmul(texts[:, 0], candidates.T, precision=jax.lax.Precision.HIGHEST)
        scores = jnp.where(self._compared(batch), scores, -jnp.inf)
        return optax.softmax_cross_entropy_with_integer_labels(scores, jnp.arange(len(texts)))

    def _compared(self, batch: Batch) -> jax.Array:
        """True at the candidates that a row's own second text is compared with, and at that text: `[rows, candidates]`."""
        ids = by_row(batch["text_ids"], batch)
        first, second, candidates = ids[:, 0], ids[:, 1], ids[:, 1:].T.reshape(-1)
        belongs = (candidates == second[:, None]) | (candidates == first[:, None])
        same_first = jnp.pad(first == first[:, None], ((0, 0), (0, len(candidates) - len(first))))
        real = jnp.tile(batch["weights"] > 0, ids.shape[1] - 1)
        own = jnp.eye(len(first), len(candidates), dtype=bool)
        return own | (real & ~belongs & ~same_first)

    def statistics(self, logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """`loss` and `weight`. The metrics compare all rows of a data set."""
        total, weight = self.loss(logits, batch)
        return {"loss": total, "weight": weight}

    def gathered(self, outputs: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """The embeddings of first and second texts, `[n, 2, d]`, and the numbers of their rows in the data."""
        real = np.asarray(batch["weights"]) > 0
        return by_row(outputs, batch)[real, :2], np.asarray(batch["rows"])[real]

    def measure(
        self, sums: Mapping[str, float], outputs: np.ndarray | None, labels: np.ndarray | None, data: Any = None
    ) -> dict[str, float]:
        """`loss`, and how well each first text finds its second one among the second texts of all rows.

        The loss has the negatives of evaluation batches. Ranks count all texts that are at least as near, except for those that are
        known to belong to the first text.
        """
        assert outputs is not None
        assert labels is not None
        vectors, ids = unit(outputs), data.text_ids[labels]
        ranks = retrieval_ranks(vectors[:, 0], vectors[:, 1], ids[:, 0], ids[:, 1])
        return {
            "loss": sums["loss"] / sums["weight"],
            "mrr": float((1 / ranks).mean()),
            "recall_at_1": float((ranks <= 1).mean()),
            "recall_at_10": float((ranks <= 10).mean()),
        }

    def batch_shapes(self, rows: RowOptions, batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the tokens' arrays, `[batch_size · texts, length]`, of `text_ids`, and of `labels` and `weights`, `[batch_size]`."""
        texts = batch_size * self.texts_per_row
        ids = jax.ShapeDtypeStruct((texts, length), jnp.int32)
        labels = jax.ShapeDtypeStruct((batch_size,), jnp.float32)
        return {
            "input_ids": ids,
            "attention_mask": ids,
            "token_type_ids": ids,
            "text_ids": jax.ShapeDtypeStruct((texts,), jnp.int32),
            "labels": labels,
            "weights": labels,
        }

    def lengths(self, rows: RowOptions) -> tuple[int, ...]:
        """The bucket lengths, up to `rows.max_length`."""
        return cap_buckets(rows.bucket_lengths, rows.max_length)

    def export_files(self, rows: RowOptions, width: int) -> dict[str, Any]:
        """The files by which sentence-transformers knows the parts of the model: encoder, pooling and normalisation."""
        modules = ["Transformer", "Pooling", *(["Normalize"] if self.normalize else [])]
        paths = ["", *(f"{i}_{name}" for i, name in enumerate(modules) if i)]
        return {
            "modules.json": [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
                for i, (name, path) in enumerate(zip(modules, paths, strict=True))
            ],
            "sentence_bert_config.json": {"max_seq_length": rows.max_length, "do_lower_case": False},
            "1_Pooling/config.json": {
                "word_embedding_dimension": width,
                "pooling_mode_cls_token": self.pooling == "cls",
                "pooling_mode_mean_tokens": self.pooling == "mean",
                "pooling_mode_max_tokens": False,
                "pooling_mode_mean_sqrt_len_tokens": False,
            },
        }

    def in_library(self, place: str, sentence: str) -> tuple[str, list[str]]:
        """Lines of Python for sentence-transformers."""
        return "sentence-transformers", [
            "from sentence_transformers import SentenceTransformer",
            "",
            f"model = SentenceTransformer({place!r})",
            f"print(model.encode([{sentence!r}]))",
        ]

    def torch_lines(self, sentence: str, pair: str | None = None) -> list[str]:
        """Lines of Python that print the embedding."""
        pooled = "tokens[:, 0]" if self.pooling == "cls" else "tokens.mean(1)"  # a single text has no padding
        normalized = [f"embedding = {pooled}", "print(embedding / embedding.norm(dim=-1, keepdim=True))"]
        return [
            f'inputs = tokenizer({sentence!r}, return_tensors="pt")',
            "tokens = model(**inputs).last_hidden_state",
            *(normalized if self.normalize else [f"print({pooled})"]),
        ]

    def notes(self, rows: RowOptions) -> list[str]:
        """How texts become embeddings, and what the figures compare."""
        vector = "vector of the first token" if self.pooling == "cls" else "mean of the tokens' vectors"
        length = ", divided by its length" if self.normalize else ""
        return [f"An embedding is the {vector}{length}.", self._figures]

    @property
    def _figures(self) -> str:
        return (
            "Each first text looks for its second one among the second texts of all rows; the loss has the negatives of one evaluation "
            "batch."
        )


def unit(vectors: Any) -> Any:
    """The vectors divided by their lengths: `[…, d]`, of numpy or jax."""
    xp = jnp if isinstance(vectors, jax.Array) else np
    squares = xp.maximum((vectors * vectors).sum(-1, keepdims=True), _SHORTEST**2)
    return vectors / xp.sqrt(squares)


def cosines(texts: Any) -> Any:
    """The cosines of the first two texts of each row, `[rows]`, from `texts: [rows, texts, d]`, of numpy or jax."""
    vectors = unit(texts[:, :2])
    return (vectors[:, 0] * vectors[:, 1]).sum(-1)


def by_row(texts: Any, batch: Batch) -> Any:
    """An array of the batch's texts, `[rows · texts, …]`, by row: `[rows, texts, …]`."""
    return texts.reshape(len(batch["weights"]), -1, *texts.shape[1:])
