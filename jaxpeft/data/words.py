"""Tokens of words: which token belongs to which word of a sentence, and the words of a plain text."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from jaxpeft.data.token_cache import Chunk, Origin, TokenCache, TokenRows, tokenised

_SENTENCES_PER_CALL = 1024
_PIECE = re.compile(r"\w+|[^\w\s]")


def encode_words(sentences: Sequence[Any], tokenizer: Any, cache: TokenCache | None = None) -> TokenRows:
    """Tokenise lists of words, without special tokens and without a limit.

    Every word is tokenised as if a blank stood before it, as in transformers with `add_prefix_space`. A word that the tokenizer drops,
    such as an empty one or one of control characters, has no tokens.

    Returns:
      the rows of tokens. Their columns are `input_ids`, and `words`, the index of each token's word within its sentence.
    """
    make = partial(_chunks, sentences, tokenizer)
    return tokenised(Origin("words", (sentences,), tokenizer, 0), ("input_ids", "words"), make, cache)


def _chunks(sentences: Sequence[Any], tokenizer: Any) -> Iterator[Chunk]:
    backend = _backend(tokenizer)
    for start in range(0, len(sentences), _SENTENCES_PER_CALL):
        chunk = [list(words) for words in sentences[start : start + _SENTENCES_PER_CALL]]
        found = backend.encode_batch(chunk, is_pretokenized=True, add_special_tokens=False)
        ids = [np.asarray(each.ids, np.int32) for each in found]
        words = [np.asarray(each.word_ids, np.int32) for each in found]
        tokens = {"input_ids": np.concatenate(ids), "words": np.concatenate(words)}
        yield Chunk(tokens, np.fromiter(map(len, ids), np.int64))


@dataclass(frozen=True)
class Splitter:
    """Separates texts into words, as a tokenizer does before it makes tokens.

    A tokenizer that separates only at white space, such as XLM-RoBERTa's, also gets punctuation separated from words.
    """

    backend: Any
    cuts_punctuation: bool

    @classmethod
    def of(cls, tokenizer: Any) -> Splitter:
        """The splitter of a fast transformers tokenizer."""
        backend = _backend(tokenizer)
        return cls(backend, len(_separated("a.", backend)) == 1)

    def words(self, text: str) -> list[tuple[int, int]]:
        """The words of a text, each as (start, stop) in characters."""
        words = _separated(text, self.backend)
        if not self.cuts_punctuation:
            return words
        return [
            (start + m.start(), start + m.end()) for start, stop in words for m in _PIECE.finditer(text[start:stop])
        ]


def _separated(text: str, backend: Any) -> list[tuple[int, int]]:
    found = backend.encode(text, add_special_tokens=False)
    words: dict[int, tuple[int, int]] = {}
    for word, (start, stop) in zip(found.word_ids, found.offsets, strict=True):
        first, last = words.get(word, (start, stop))
        words[word] = min(first, start), max(last, stop)
    # Some tokenizers count the blank before a word as a part of it.
    trimmed = [(stop - len(text[start:stop].lstrip()), stop) for start, stop in words.values()]
    trimmed = [(start, start + len(text[start:stop].rstrip())) for start, stop in trimmed]
    return [(start, stop) for start, stop in trimmed if start < stop]


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids of the special tokens before and behind a text."""
    probe = _backend(tokenizer).encode("a", add_special_tokens=True)
    text = [i for i, special in enumerate(probe.special_tokens_mask) if not special]
    return probe.ids[: text[0]], probe.ids[text[-1] + 1 :]


def _backend(tokenizer: Any) -> Any:
    """A copy of a tokenizer's core, for words: without limits, and with a blank before each word."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    if hasattr(backend.pre_tokenizer, "add_prefix_space"):
        backend.pre_tokenizer.add_prefix_space = True
    return backend
