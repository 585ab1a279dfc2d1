"""Floating-point operations of one step, from the shapes alone.

Counted are the matrix products, 2 operations a multiply-add; the passes through norms, activations, softmax, dropout and the optimizer
are left out (XLA's own count has them: one to a few percent more).

With N weights in the encoder's linear layers a token costs

    forward 2N + gradients of the layers' inputs 2N            where adapters train: 4N
    and the gradients of the weights 2N                        where everything trains: 6N

and, beyond that rule of thumb:

- attention's own two products, 4·length·width a token and layer forward and twice that backward;
- the head, at the tokens where it is computed (`head`) and not at the others: the product with the vocabulary is a third of DistilBERT's
  forward pass;
- what the last layer does behind its attention, at the tokens where it is computed (`behind`), and its queries (`queries`): one that
  knows which tokens the head reads leaves the others out;
- the adapters of query and value themselves, 6·rank·(in + out) a token;
- with adapters, what nothing asks for is subtracted: in the first layer the gradients of the inputs of query, key and value, and of the
  keys, as nothing below them trains.

HiRA's, DoRA's and QLoRA's own products are not counted: LoRA's are what the step is worth, so a method that does more per step
shows a lower share of the peak.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """A BERT's dimensions; `output_is_behind`: the attention's output layer runs on the tokens asked for (not in DistilBERT)."""

    width: int
    num_layers: int
    feed_forward: int
    vocabulary: int
    output_is_behind: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Sizes:
        """Of a transformers config.json."""
        if config["model_type"] == "distilbert":
            return cls(config["dim"], config["n_layers"], config["hidden_dim"], config["vocab_size"], False)
        return cls(
            config["hidden_size"],
            config["num_hidden_layers"],
            config["intermediate_size"],
            config["vocab_size"],
            True,
        )


@dataclass(frozen=True)
class Shape:
    """One batch: `rows` of `length` tokens; `head`, `behind` and `queries` tokens a row (a mean), and how many such batches (`count`)."""

    rows: int
    length: int
    head: float
    behind: float
    queries: float
    count: int = 1


@dataclass(frozen=True)
class Trained:
    """What trains: everything, or adapters of `rank` at query and value (0: none), and the head's square layer."""

    everything: bool = False
    rank: int = 0
    head: bool = False


def step_flops(sizes: Sizes, shape: Shape, trained: Trained, *, num_labels: int = 0) -> float:
    """Operations of one forward and backward pass over `shape`; `num_labels` 0 is masked language modelling."""
    d, tokens = sizes.width, shape.rows * shape.length
    passes = 3 if trained.everything else 2  # forward, inputs, weights
    forward_output, forward_mlp = 2 * d * d, 4 * d * sizes.feed_forward
    forward_qkv, product = 6 * d * d, 2 * shape.length * d
    whole = passes * (forward_qkv + forward_output + forward_mlp) + 6 * product
    adapters = 2 * 6 * trained.rank * 2 * d
    total = tokens * sizes.num_layers * (whole + adapters)
    # Without queries of others there is no output of theirs either, whichever side of the border it lies on.
    only_queries = shape.queries < shape.length
    left_out = forward_mlp + (forward_output if sizes.output_is_behind or only_queries else 0)
    total -= shape.rows * (shape.length - shape.behind) * passes * left_out
    total -= shape.rows * (shape.length - shape.queries) * (passes * 2 * d * d + 6 * product + adapters / 2)
    if not trained.everything:
        total -= tokens * (forward_qkv + product + 2 * 2 * trained.rank * d)
    return total + shape.rows * shape.head * _head(sizes, trained, num_labels)


def _head(sizes: Sizes, trained: Trained, num_labels: int) -> float:
    """Operations a token of the head: a square layer, and the vocabulary or the labels."""
    square, outputs = 2 * sizes.width**2, 2 * sizes.width * (num_labels or sizes.vocabulary)
    last_trains = trained.everything or (trained.head and num_labels > 0)
    return square * (3 if trained.everything or trained.head else 2) + outputs * (3 if last_trains else 2)


def total_flops(sizes: Sizes, shapes: list[Shape], trained: Trained, *, steps: int, num_labels: int = 0) -> float:
    """Mean operations of a step, where `shapes` are the batches of `steps` steps."""
    return sum(shape.count * step_flops(sizes, shape, trained, num_labels=num_labels) for shape in shapes) / steps
