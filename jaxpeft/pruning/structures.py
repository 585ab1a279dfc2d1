"""The pieces that are pruned as a whole: single entries, n of every m entries, blocks, or whole ranks.

A structure says which pieces ("units") a tensor has, how a unit is scored from the scores of its entries, and which entries
belong to it. Matrices are stored as Flax kernels, so a product sums over their axis 0: d_in of `a: [d_in, r]`, r of `b: [r, d_out]`.

Units of a layer are a dict label → float scores, of any shape. The label is the parameter's name; for whole ranks the product's, `a·b`.
A unit that does not exist scores -inf. That is padding: a run with a smaller rank that trains together with others.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxpeft.errors import InputError, check_choice

Shape = tuple[int, ...]
Combine = Literal["sum", "norms"]
"""How the entries' scores make the score of a rank: their sum, or ‖a_k‖·‖b_k‖ of the scores."""

Pair = tuple[str, str]
"""The names of the factors of a product L·R: `[n, r]` and `[r, m]`."""


def num_kept(size: int, sparsity: float) -> int:
    """Entries kept of `size` at `sparsity` in [0, 1): `max(1, round(size·(1 − sparsity)))`, exactly."""
    return max(1, round(size * (1 - sparsity)))


def keep_largest(score: jax.Array, num_keep: int | jax.Array) -> jax.Array:
    """The bool mask of the `num_keep` largest entries of `score`, of its shape. Ties keep the lower flat index.

    `num_keep` may be traced, so one compiled program serves every step of a schedule.
    """
    # argsort is stable. It sorts the negated scores, so that equal scores stay in the order of their index.
    order = jnp.argsort(-score.reshape(-1), stable=True)
    rank = jnp.zeros(score.size, jnp.int32).at[order].set(jnp.arange(score.size, dtype=jnp.int32))
    return (rank < num_keep).reshape(score.shape)


class Structure(ABC):
    """The pieces in which entries are pruned. Implementations are frozen dataclasses, so jit takes them as static arguments."""

    def count(self, path: str, shapes: Mapping[str, Shape], sparsity: float) -> dict[str, int]:
        """How many units the layer `path` keeps at `sparsity`, by label, from the `shapes` of its pruned parameters: `num_kept` of `size`.

        Raises:
            InputError: if the structure does not fit the shapes.
        """
        return {label: num_kept(size, sparsity) for label, size in self.size(shapes).items()}

    @abstractmethod
    def size(self, shapes: Mapping[str, Shape]) -> dict[str, int]:
        """How many units the layer has, by label."""

    @abstractmethod
    def units(
        self, scores: Mapping[str, jax.Array], exists: Mapping[str, jax.Array], combine: Combine
    ) -> dict[str, jax.Array]:
        """The scores of a layer's units, by label, from the `scores` of its entries; -inf for a unit without an existing entry.

        `exists` has a bool array like each of `scores`.
        """

    @abstractmethod
    def expand(self, kept: Mapping[str, jax.Array], shapes: Mapping[str, Shape]) -> dict[str, jax.Array]:
        """The bool mask of every parameter, from the bool units."""

    def covered(self, masks: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Which units have an entry that `masks` keep, by label."""
        scores = {name: mask.astype(jnp.float32) for name, mask in masks.items()}
        units = self.units(scores, masks, "sum")
        return {label: ~jnp.isneginf(unit) for label, unit in units.items()}

    def keep(self, units: jax.Array, num_keep: int | jax.Array) -> jax.Array:
        """The `num_keep` highest of `units`, as bool."""
        return keep_largest(units, num_keep)


@dataclass(frozen=True)
class Elements(Structure):
    """Single entries: the unit is the entry."""

    def size(self, shapes: Mapping[str, Shape]) -> dict[str, int]:
        """The entries of every tensor."""
        return {name: _product(shape) for name, shape in shapes.items()}

    def units(
        self, scores: Mapping[str, jax.Array], exists: Mapping[str, jax.Array], combine: Combine
    ) -> dict[str, jax.Array]:
        """The scores themselves."""
        return {name: jnp.where(exists[name], score, -jnp.inf) for name, score in scores.items()}

    def expand(self, kept: Mapping[str, jax.Array], shapes: Mapping[str, Shape]) -> dict[str, jax.Array]:
        """The units themselves."""
        return {name: kept[name].reshape(shape) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Groups(Structure):
    """N:M sparsity: n of every m consecutive entries along the axis that the product sums over (Mishra et al. 2021, arXiv 2104.08378).

    Before the final sparsity a group keeps `max(n, round(m·(1 − sparsity)))` of its entries.
    """

    n: int
    m: int

    @property
    def sparsity(self) -> float:
        """1 − n/m."""
        return 1 - self.n / self.m

    def count(self, path: str, shapes: Mapping[str, Shape], sparsity: float) -> dict[str, int]:
        """The entries that every group keeps.

        Raises:
            InputError: if m does not divide the axis that the product sums over.
        """
        for name, shape in shapes.items():
            if shape[0] % self.m:
                raise InputError(
                    f"pruning.structure {self.n}:{self.m} needs an axis that {self.m} divides, and '{name}' of layer {path} sums over "
                    f"{shape[0]}; choose another rank, or leave the layer out of adapter.target_modules"
                )
        return {name: max(self.n, round(m * (1 - sparsity))) for name, m in self.size(shapes).items()}

    def size(self, shapes: Mapping[str, Shape]) -> dict[str, int]:
        """m: the entries of a group."""
        return dict.fromkeys(shapes, self.m)

    def units(
        self, scores: Mapping[str, jax.Array], exists: Mapping[str, jax.Array], combine: Combine
    ) -> dict[str, jax.Array]:
        """The scores in groups, `[rows / m, columns, m]`."""
        return {name: self._grouped(jnp.where(exists[name], score, -jnp.inf)) for name, score in scores.items()}

    def _grouped(self, score: jax.Array) -> jax.Array:
        rows, columns = score.shape
        # Only the padded rank of a run that trains together with others is not divisible by m; what is added does not exist.
        padded = jnp.pad(score, ((0, -rows % self.m), (0, 0)), constant_values=-jnp.inf)
        return jnp.swapaxes(padded.reshape(-1, self.m, columns), 1, 2)

    def expand(self, kept: Mapping[str, jax.Array], shapes: Mapping[str, Shape]) -> dict[str, jax.Array]:
        """Undo the grouping."""
        whole = {name: jnp.swapaxes(kept[name], 1, 2).reshape(-1, shape[1]) for name, shape in shapes.items()}
        return {name: mask[: shapes[name][0]] for name, mask in whole.items()}

    def keep(self, units: jax.Array, num_keep: int | jax.Array) -> jax.Array:
        """The `num_keep` highest of every group. Ties keep the lower index in the group."""
        order = jnp.argsort(-units, axis=-1, stable=True)
        return jnp.argsort(order, axis=-1) < num_keep


@dataclass(frozen=True)
class Blocks(Structure):
    """Blocks of `height` rows and `width` columns, from the first row and column on. Blocks at the edges are cut off there.

    A block scores the mean of its entries, so that a block that was cut competes on equal terms. Counts are of blocks.
    """

    height: int
    width: int

    def size(self, shapes: Mapping[str, Shape]) -> dict[str, int]:
        """The blocks of every tensor, those at the edges included."""
        return {name: -(-rows // self.height) * -(-cols // self.width) for name, (rows, cols) in shapes.items()}

    def units(
        self, scores: Mapping[str, jax.Array], exists: Mapping[str, jax.Array], combine: Combine
    ) -> dict[str, jax.Array]:
        """The mean score of every block, `[rows / height, columns / width]`, rounded up."""
        found = {}
        for name, score in scores.items():
            there = exists[name]
            sums, numbers = self._sums(jnp.where(there, score, 0.0)), self._sums(there.astype(score.dtype))
            found[name] = jnp.where(numbers > 0, sums / jnp.maximum(numbers, 1.0), -jnp.inf)
        return found

    def _sums(self, score: jax.Array) -> jax.Array:
        rows, columns = score.shape
        padded = jnp.pad(score, ((0, -rows % self.height), (0, -columns % self.width)))
        blocks = padded.reshape(-(-rows // self.height), self.height, -(-columns // self.width), self.width)
        return blocks.sum((1, 3))

    def expand(self, kept: Mapping[str, jax.Array], shapes: Mapping[str, Shape]) -> dict[str, jax.Array]:
        """Every entry follows its block."""
        return {
            name: jnp.repeat(jnp.repeat(kept[name], self.height, 0), self.width, 1)[: shape[0], : shape[1]]
            for name, shape in shapes.items()
        }


@dataclass(frozen=True)
class Ranks(Structure):
    """Whole ranks k of low-rank products L·R: column k of L together with row k of R. Only this makes files and products smaller.

    `products` has their names; a layer may lack some of them, but not all. A rank scores the sum of its entries' scores, or
    ‖l_k‖·‖r_k‖ of the scores, as the criterion says.
    """

    products: tuple[Pair, ...]

    def count(self, path: str, shapes: Mapping[str, Shape], sparsity: float) -> dict[str, int]:
        """The ranks that every product keeps.

        Raises:
            InputError: if the layer has no product.
        """
        if not self._products_in(shapes):
            whole = " and ".join(f"'{name}' {list(shape)}" for name, shape in shapes.items())
            raise InputError(
                f"pruning.structure rank needs a low-rank product, and layer {path} has none, because its rank is too large: {whole} are "
                "whole; lower adapter.rank, leave the layer out of adapter.target_modules, or set pruning.structure to element"
            )
        return super().count(path, shapes, sparsity)

    def _products_in(self, names: Container[str]) -> dict[str, Pair]:
        """Those that a layer with the parameters `names` has, by label."""
        return {f"{first}·{second}": (first, second) for first, second in self.products if first in names}

    def size(self, shapes: Mapping[str, Shape]) -> dict[str, int]:
        """The rank of every product."""
        return {label: shapes[first][1] for label, (first, _) in self._products_in(shapes).items()}

    def units(
        self, scores: Mapping[str, jax.Array], exists: Mapping[str, jax.Array], combine: Combine
    ) -> dict[str, jax.Array]:
        """The score of every rank, `[r]`, by product."""
        found = {}
        for label, pair in self._products_in(scores).items():
            left, right = (jnp.where(exists[name], scores[name], 0.0) for name in pair)
            norms = jnp.linalg.norm(left, axis=0) * jnp.linalg.norm(right, axis=1)
            score = norms if combine == "norms" else left.sum(0) + right.sum(1)
            there = exists[pair[0]].any(0) | exists[pair[1]].any(1)
            found[label] = jnp.where(there, score, -jnp.inf)
        return found

    def expand(self, kept: Mapping[str, jax.Array], shapes: Mapping[str, Shape]) -> dict[str, jax.Array]:
        """Columns of L and rows of R. Parameters outside the products keep all entries."""
        masks = {}
        for label, (first, second) in self._products_in(shapes).items():
            masks[first] = jnp.broadcast_to(kept[label], shapes[first])
            masks[second] = jnp.broadcast_to(kept[label][:, None], shapes[second])
        return masks


ELEMENTS = Elements()


def structure_of(text: str, products: tuple[Pair, ...] = ()) -> Structure:
    """The structure that `--pruning.structure` names: element, rank, `n:m` such as 2:4, or `height x width` such as 8x8.

    Args:
        text: the flag's value.
        products: the low-rank products of the method (`Method.products`), which whole ranks need.

    Raises:
        InputError: the text names no structure, or the method has no ranks.
    """
    if match := re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text):
        n, m = map(int, match.groups())
        if n >= m:
            raise InputError(f"pruning.structure '{text}' keeps {n} of {m} entries, which prunes none; give n below m")
        return Groups(n, m)
    if match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text):
        return Blocks(*map(int, match.groups()))
    if text == "rank":
        if not products:
            raise InputError(
                "pruning.structure rank needs a method with low-rank products of a fixed rank (LoRA, HiRA, LoHa, LoKr); set it to "
                "element, or to a block such as 1x8"
            )
        return Ranks(products)
    if text != "element":
        check_choice("pruning.structure", text, ["element", "rank", "2:4 (any n:m)", "8x8 (any block)"])
    return ELEMENTS


def _product(shape: Shape) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
