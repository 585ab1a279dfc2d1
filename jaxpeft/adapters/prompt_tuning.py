"""Prompt tuning: n trained vectors before the embedded words of every row (Lester et al. 2021, arXiv 2104.08691, section 2).

It changes the input and no layer. Its one site is the embedding of the words: the caller makes room for n tokens
(`Model.inputs(batch, virtual_tokens=n)`), and there the rows of the prompt replace the embeddings. Positions, token types and
LayerNorm treat them as words. As in PEFT, a classifier that reads the first token of a row then reads the prompt's first.

Options have PEFT's names. `prompt_tuning_init`:

- RANDOM: N(0, 1), as torch initialises an embedding; far larger than the word embeddings of a BERT. The paper's is uniform in ±0.5.
- SAMPLE_VOCAB: the embeddings of n words drawn from the vocabulary.
- TEXT: the embeddings of `prompt_tuning_init_text`. There is no tokenizer here, so the caller gives `init_token_ids`, which are
  repeated or cut to n. `tokenizer_name_or_path` and `tokenizer_kwargs` are only for PEFT's file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxpeft.adapters.base import PLACEHOLDER, Description, FrozenLayer, Site, SiteMethod, SiteParams
from jaxpeft.errors import InputError


@dataclass(frozen=True)
class PromptTuning(SiteMethod):
    """`num_virtual_tokens` trained vectors before every row."""

    name: ClassVar[str] = "prompt-tuning"
    description: ClassVar[Description] = Description(
        title="Prompt tuning",
        equation="n trained embeddings in front of every row",
        source="Lester et al. 2021, arXiv 2104.08691",
        advice="one frozen model that serves many tasks in a batch",
        peft="`PROMPT_TUNING`",
    )
    embeddings: ClassVar[bool] = True
    word_embeddings_only: ClassVar[bool] = True
    num_virtual_tokens: int = 20
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "RANDOM"
    prompt_tuning_init_text: str | None = None
    init_token_ids: Sequence[int] = ()
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Refuse a prompt of no tokens, and an unknown initialisation."""
        if self.num_virtual_tokens < 1:
            raise InputError(f"adapter.num_virtual_tokens is {self.num_virtual_tokens}; it must be at least 1")
        if self.prompt_tuning_init not in ("RANDOM", "SAMPLE_VOCAB", "TEXT"):
            raise InputError(
                f"unknown prompt_tuning_init '{self.prompt_tuning_init}'; it must be RANDOM, SAMPLE_VOCAB or TEXT"
            )

    @property
    def virtual_tokens(self) -> int:
        """The tokens that are added before every row: `num_virtual_tokens`."""
        return self.num_virtual_tokens

    def init(self, rng: jax.Array, site: Site, kernel: Callable[[], jax.Array]) -> SiteParams:
        """`prompt: [dim, n]`. No initialisation is a no-op, because the prompt adds tokens.

        Raises:
            InputError: if the layer is not an embedding, or if TEXT has no token ids or one outside the vocabulary.
        """
        if site.kind != "embedding":
            raise InputError(f"prompt tuning adapts the embedding of the words, and '{site.path}' is a linear layer")
        if self.prompt_tuning_init == "RANDOM":
            return {"prompt": jax.random.normal(rng, (site.d_out, self.num_virtual_tokens))}
        if self.prompt_tuning_init == "SAMPLE_VOCAB":
            ids = jax.random.randint(rng, (self.num_virtual_tokens,), 0, site.d_in)
        else:
            ids = jnp.asarray(self._text_ids(site))
        return {"prompt": kernel()[ids].T}

    def _text_ids(self, site: Site) -> list[int]:
        ids = list(self.init_token_ids)
        if not ids:
            raise InputError("prompt_tuning_init TEXT needs the text's token ids; give adapter.prompt_tuning_init_text")
        if not 0 <= min(ids) <= max(ids) < site.d_in:
            raise InputError(f"the prompt's token ids {ids} reach outside the vocabulary of {site.d_in}")
        repetitions = -(-self.num_virtual_tokens // len(ids))
        return (ids * repetitions)[: self.num_virtual_tokens]

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """`prompt: [dim, n]`, the transpose of PEFT's tensor."""
        return {"prompt": (site.d_out, self.num_virtual_tokens)}

    def kernel(self, frozen_kernel: jax.Array, params: SiteParams) -> jax.Array:
        """Prompt tuning adds tokens and changes no weights.

        Raises:
            InputError: always.
        """
        raise InputError(
            "prompt tuning cannot be merged: it adds input tokens, not weights; serve the base with the adapter"
        )

    def forward(self, x: jax.Array, params: SiteParams, layer: FrozenLayer, rng: jax.Array | None) -> jax.Array:
        """`x: [batch, n + seq]` ids, of which the first n are the placeholder → the prompt, then the embedded words.

        A row with fewer or more placeholders than n becomes NaN. A compiled program cannot raise an error, and otherwise the
        prompt would replace words unnoticed.

        Raises:
            InputError: if the rows are not longer than the prompt.
        """
        n = self.num_virtual_tokens
        if x.shape[-1] <= n:
            raise InputError(
                f"rows of {x.shape[-1]} tokens have no room for a prompt of {n}; make it with Model.inputs(batch, virtual_tokens={n})"
            )
        words = x[..., n:]
        has_room = (x[..., :n] == PLACEHOLDER).all(-1) & (words != PLACEHOLDER).all(-1)
        prompt = params["prompt"].T.astype(layer.dtype)
        rows = jnp.where(has_room[..., None, None], prompt, jnp.nan)
        return jnp.concatenate([rows, layer.base(words)], axis=-2)
