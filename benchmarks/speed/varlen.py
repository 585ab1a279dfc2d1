"""Torch's attention for texts of several lengths in one row without padding, for a BERT that classifies. Imports torch.

There are three ways, and not every device and version of torch has each of them. `choose` takes the first that computes a forward and
a backward pass here, and the record says which one it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

Tensor = torch.Tensor
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""`(query, key, value, offsets, longest) → values`: `[tokens, heads, width]` each, `offsets: [texts + 1]` int32."""


def _varlen(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(query, key, value, offsets, offsets, longest, longest)


def _jagged(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int) -> Tensor:
    def nested(x: Tensor) -> Tensor:
        rows = torch.nested.nested_tensor_from_jagged(x, offsets.long(), min_seqlen=1, max_seqlen=longest)
        return rows.transpose(1, 2)

    return scaled_dot_product_attention(nested(query), nested(key), nested(value)).transpose(1, 2).values()


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = len(query)
    text = torch.bucketize(torch.arange(tokens, device=query.device), offsets[1:], right=True)
    mask = create_block_mask(
        lambda b, h, i, j: text[i] == text[j], None, None, tokens, tokens, device=str(query.device)
    )
    rows = [x.transpose(0, 1)[None] for x in (query, key, value)]
    return _compiled_flex()(*rows, block_mask=mask)[0].transpose(0, 1)


WAYS: dict[str, Attend] = {
    "torch.nn.attention.varlen.varlen_attn": _varlen,
    "scaled_dot_product_attention of jagged nested tensors": _jagged,
    "flex_attention with a block mask": _flex,
}


def choose(device: str, dtype: torch.dtype) -> tuple[str, Attend]:
    """Return the name and the function of the first way that works on `device` ("cpu", "cuda") in `dtype`.

    Raises:
        RuntimeError: none works. It says why each does not.
    """
    failed = []
    for name, attend in WAYS.items():
        inputs = [torch.randn(12, 2, 64, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]
        offsets = torch.tensor([0, 5, 12], dtype=torch.int32, device=device)
        try:
            attend(*inputs, offsets, 7).float().sum().backward()
        except Exception as error:  # each way fails with an exception of its own
            failed.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        else:
            return name + (f" (not {'; '.join(failed)})" if failed else ""), attend
    raise RuntimeError(f"torch {torch.__version__} has no attention without padding on {device}: {'; '.join(failed)}")


def one_row(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A padded batch `[texts, length]` as one row `[1, tokens]`, with `offsets: [texts + 1]` and `position_ids: [1, tokens]`."""
    inside = np.asarray(arrays["attention_mask"]) > 0
    positions = np.broadcast_to(np.arange(inside.shape[1]), inside.shape)
    return {
        "input_ids": arrays["input_ids"][inside][None],
        "position_ids": positions[inside][None],
        "offsets": np.concatenate([[0], inside.sum(1).cumsum()]),
        "labels": arrays["labels"],
    }


def one_row_loss(model: Any, batch: dict[str, Tensor], attend: Attend, *, longest: int) -> Tensor:
    """The mean loss of the texts of `one_row` under BERT's classifier; no text has more than `longest` tokens."""
    bare = model.base_model.model if hasattr(model, "peft_config") else model
    offsets = batch["offsets"].int()
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with _replaced_attention(attend, offsets, longest) as calls:
        hidden = bare.bert(**inputs, token_type_ids=torch.zeros_like(batch["input_ids"]))[0][0]
    if len(calls) != bare.config.num_hidden_layers:
        raise RuntimeError(f"this transformers called torch's attention {len(calls)} times, not once in every layer")
    pooled = bare.bert.pooler(hidden[offsets[:-1]][:, None])
    logits = bare.classifier(bare.dropout(pooled))
    return torch.nn.functional.cross_entropy(logits.float(), batch["labels"])


@contextmanager
def _replaced_attention(attend: Attend, offsets: Tensor, longest: int) -> Iterator[list[None]]:
    """Let BERT's attention call `attend`; yields a list that gets an entry for each call.

    The function in torch is what transformers 4 and 5 both call. A way to register another one is only in transformers 5's BERT.
    """
    calls: list[None] = []

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        rows = (x[0].transpose(0, 1) for x in (query, key, value))
        return attend(*rows, offsets, longest).transpose(0, 1)[None]

    torch.nn.functional.scaled_dot_product_attention = attention
    try:
        yield calls
    finally:
        torch.nn.functional.scaled_dot_product_attention = scaled_dot_product_attention
