"""What a per-example gradient is made of while it is not formed: terms, their norms and their weighted sums.

A term stands for one array an example, `G_i`. It names variables of a traced function; `arrays` maps each of them to
its value for all examples, the example axis first, and `example` to its value for one. Everything is computed in
float32 or wider, at the highest precision, whatever the types of the factors.

References: Bu et al., Differentially Private Optimization on Large Foundation Models (arXiv 2210.00038), book-keeping;
Li et al., Large Language Models Can Be Strong Differentially Private Learners (arXiv 2110.05679), the Gram norm.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

MOVES = frozenset(
    {"transpose", "reshape", "squeeze", "broadcast_in_dim", "copy", "copy_p", "convert_element_type", "pad"}
)
"""Operations that move the entries of one operand and change none but in type, and that add at most zeros to them.

(`broadcast_in_dim` where it only adds axes of size 1, `pad` where it pads with 0.) They keep the norm.
"""

SUMS = frozenset({"add", "add_any", "sub", "neg", "reduce_sum"})

_HIGHEST = jax.lax.Precision.HIGHEST


class Term:
    """One array an example, as far as it is understood."""

    @property
    def kept(self) -> tuple[Any, ...]:
        """The variables whose values it needs."""
        raise NotImplementedError

    @property
    def entries(self) -> int:
        """Entries of those variables for one example."""
        return sum(var.aval.size for var in dict.fromkeys(self.kept))

    @property
    def factored(self) -> bool:
        """Whether anything in it is left undone."""
        return True

    def form(self, example: Mapping[Any, Array]) -> Array:
        """`G` of one example."""
        raise NotImplementedError

    def contract(
        self, arrays: Mapping[Any, Array], weights: Float[Array, " b"], dropped: Bool[Array, " b"] | None
    ) -> Array:
        """`Σ_i weights_i G_i`; examples marked in `dropped`, whose weight is 0, add exactly 0 whatever they hold."""
        raise NotImplementedError


class Countable(Term):
    """A sum `Σ_t a_t ⊗ δ_t` over positions, whose norm Gram matrices give without forming it."""

    def gram_is_cheaper(self) -> bool:
        """Whether they take fewer operations than forming it."""
        raise NotImplementedError

    def gram(self, arrays: Mapping[Any, Array]) -> Float[Array, " b"]:
        """`‖G_i‖² = Σ_{t,s} (a_t·a_s)(δ_t·δ_s)`, and a little more.

        Where the terms cancel, rounding can hide most of the norm; so the bound (Σ‖a_t‖²)(Σ‖δ_t‖²) of the summands is
        added at the size of rounding errors, to keep an example from passing for small.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Value(Term):
    """An array kept as it is."""

    var: Any

    kept = property(lambda self: (self.var,))
    factored = False

    def form(self, example):
        return _wide(example[self.var])

    def contract(self, arrays, weights, dropped):
        array = _without(_wide(arrays[self.var]), dropped)
        return jnp.tensordot(weights.astype(array.dtype), array, 1, precision=_HIGHEST)


@dataclasses.dataclass(frozen=True)
class Enclosed(Term):
    """An output of a `scan` or a `remat`, whose factors live and die inside: its norm and sum are taken there."""

    var: Any

    kept = property(lambda self: (self.var,))


@dataclasses.dataclass(frozen=True)
class Product(Countable):
    """`dot_general(lhs, rhs)`, left undone."""

    lhs: Any
    rhs: Any
    numbers: tuple

    kept = property(lambda self: (self.lhs, self.rhs))

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Batch b, contracted t, left m, right n; the product has b·m·n entries."""
        (contracted, _), (batch, _) = self.numbers
        b = math.prod(self.lhs.aval.shape[i] for i in batch)
        t = math.prod(self.lhs.aval.shape[i] for i in contracted)
        return b, t, self.lhs.aval.size // (b * t), self.rhs.aval.size // (b * t)

    def form(self, example):
        return jax.lax.dot_general(
            example[self.lhs],
            example[self.rhs],
            self.numbers,
            precision=_HIGHEST,
            preferred_element_type=_wide_type(example[self.lhs].dtype),
        )

    def contract(self, arrays, weights, dropped):
        left, right = (_without(_wide(arrays[var]), dropped) for var in self.kept)
        if left.size <= right.size:
            left = _scaled(left, weights)
        else:
            right = _scaled(right, weights)
        contracted, batch = self.numbers
        examples_too = [(0, *(i + 1 for i in axes)) for axes in contracted]
        numbers = examples_too, [tuple(i + 1 for i in axes) for axes in batch]
        return jax.lax.dot_general(left, right, numbers, precision=_HIGHEST)

    def gram_is_cheaper(self):
        _, t, m, n = self.sizes
        return t * (m + n) < m * n

    def gram(self, arrays):
        left, right = (_self_products(factor) for factor in self.positions(arrays))
        return jnp.sum(left * right, (1, 2, 3)) + _slack(jnp.sum(_traces(left) * _traces(right), 1))

    def positions(self, arrays) -> list[Float[Array, "examples batch positions features"]]:
        """Both factors with their positions in one axis."""
        return [
            _positions(arrays[var], batch, contracted)
            for var, contracted, batch in zip(self.kept, self.numbers[0], self.numbers[1])
        ]

    def with_batch_contracted(self, axes: tuple[int, ...]) -> "Product | None":
        """The product of which this one, summed over output axes `axes`, is the value; None if these are no batch."""
        contracted, batch = self.numbers
        if any(axis >= len(batch[0]) for axis in axes):
            return None
        moved = [tuple(side[axis] for axis in axes) for side in batch]
        left = [tuple(axis for i, axis in enumerate(side) if i not in axes) for side in batch]
        return Product(self.lhs, self.rhs, (tuple((*c, *m) for c, m in zip(contracted, moved)), tuple(left)))


@dataclasses.dataclass(frozen=True)
class Pair(Countable):
    """`p·A₁ᵀD₁ + q·A₂ᵀD₂`, two products of the same form, as of the two views of one record.

    Where the views are alike and q = −p, their Gram matrices would cancel. So the sum is taken apart into
    `(A₁ − A₂)ᵀ(p·D₁) + A₂ᵀ(p·D₁ + q·D₂)`, each of whose parts is as small as the difference of the views. Only norms
    are taken of it.
    """

    first: Product
    second: Product
    p: float
    q: float

    kept = property(lambda self: (*self.first.kept, *self.second.kept))

    def gram_is_cheaper(self):
        _, t, m, n = self.first.sizes
        return 3 * t * (m + n) < 2 * m * n

    def gram(self, arrays):
        (a, d), (y, other) = (
            [_wide(factor) for factor in product.positions(arrays)] for product in (self.first, self.second)
        )
        x, u = a - y, self.p * d
        v = u + self.q * other
        xx, uu, yy, vv = map(_self_products, (x, u, y, v))
        squares = jnp.sum(xx * uu + yy * vv + 2 * _self_products(x, y) * _self_products(u, v), (1, 2, 3))
        bounds = jnp.sqrt(_traces(xx) * _traces(uu)) + jnp.sqrt(_traces(yy) * _traces(vv))
        return squares + _slack(jnp.sum(jnp.square(bounds), 1))


@dataclasses.dataclass(frozen=True)
class Scattered(Countable):
    """Rows added to a table of zeros (the gradient of an embedding), left undone."""

    indices: Any
    rows: Any
    eqn: Any

    kept = property(lambda self: (self.indices, self.rows))

    def form(self, example):
        rows = _wide(example[self.rows])
        return self._add(jnp.zeros(self.eqn.outvars[0].aval.shape, rows.dtype), example[self.indices], rows, 0)

    def contract(self, arrays, weights, dropped):
        rows = _scaled(_without(_wide(arrays[self.rows]), dropped), weights)
        return self._add(jnp.zeros(self.eqn.outvars[0].aval.shape, rows.dtype), arrays[self.indices], rows, 1)

    def _add(self, table: Array, indices: Array, rows: Array, leading: int) -> Array:
        numbers = self.eqn.params["dimension_numbers"]
        numbers = numbers._replace(update_window_dims=tuple(i + leading for i in numbers.update_window_dims))
        return jax.lax.scatter_add(table, indices, rows, numbers, mode=self.eqn.params["mode"])

    @property
    def by_rows(self) -> bool:
        """Whether each index names one row of a table (and not a window of several, or a slice)."""
        numbers = self.eqn.params["dimension_numbers"]
        return numbers.inserted_window_dims == (0,) and numbers.scatter_dims_to_operand_dims == (0,)

    def gram_is_cheaper(self):
        return self.by_rows and self.indices.aval.size <= self.eqn.outvars[0].aval.shape[0]

    def gram(self, arrays):
        height = self.eqn.outvars[0].aval.shape[0]
        index = arrays[self.indices].reshape(len(arrays[self.indices]), -1)
        if self.eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP:
            index = jnp.clip(index, 0, height - 1)
        inside = (index >= 0) & (index < height)
        windows = self.eqn.params["dimension_numbers"].update_window_dims
        scattered = [i for i in range(self.rows.aval.ndim) if i not in windows]
        products = _self_products(_positions(arrays[self.rows], (), scattered))[:, 0]
        same = (index[:, :, None] == index[:, None, :]) & inside[:, :, None] & inside[:, None, :]
        total = jnp.sum(jnp.where(inside, jnp.diagonal(products, axis1=1, axis2=2), 0), 1)
        return jnp.sum(jnp.where(same, products, 0), (1, 2)) + _slack(total * index.shape[1])


@dataclasses.dataclass(frozen=True)
class Convolved(Term):
    """`conv_general_dilated(lhs, rhs)`, left undone (the gradient of a kernel)."""

    lhs: Any
    rhs: Any
    eqn: Any

    kept = property(lambda self: (self.lhs, self.rhs))

    def form(self, example):
        return self._convolve(*(_wide(example[var]) for var in self.kept))

    def contract(self, arrays, weights, dropped):
        numbers = self.eqn.params["dimension_numbers"]
        left, right = (_without(_wide(arrays[var]), dropped) for var in self.kept)
        left, right = _folded(left, numbers.lhs_spec[1]), _folded(_scaled(right, weights), numbers.rhs_spec[1])
        return self._convolve(left, right)

    def _convolve(self, lhs: Array, rhs: Array) -> Array:
        names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers")
        return jax.lax.conv_general_dilated(
            lhs, rhs, **{name: self.eqn.params[name] for name in names}, precision=_HIGHEST
        )


@dataclasses.dataclass(frozen=True)
class Linear(Term):
    """A linear operation (one of MOVES or SUMS) applied to terms."""

    eqn: Any
    terms: tuple[Term, ...]

    kept = property(lambda self: tuple(var for term in self.terms for var in term.kept))
    factored = property(lambda self: any(term.factored for term in self.terms))

    @property
    def name(self) -> str:
        """The operation's."""
        return self.eqn.primitive.name

    def form(self, example):
        return self.apply([term.form(example) for term in self.terms])

    def contract(self, arrays, weights, dropped):
        return self.apply([term.contract(arrays, weights, dropped) for term in self.terms])

    def apply(self, operands: list[Array]) -> Array:
        """The operation, but without a conversion to a narrower type."""
        if self.name == "convert_element_type":
            return operands[0]
        if self.name == "pad":
            return jax.lax.pad(operands[0], jnp.zeros((), operands[0].dtype), self.eqn.params["padding_config"])
        return self.eqn.primitive.bind(*operands, **self.eqn.params)


@dataclasses.dataclass(frozen=True)
class Scaled(Term):
    """A term times a number, or times a scalar that each example has one of."""

    term: Term
    factor: float | Any  # a number, or a variable

    @property
    def kept(self):
        return self.term.kept if isinstance(self.factor, float) else (*self.term.kept, self.factor)

    def form(self, example):
        return self.term.form(example) * (self.factor if isinstance(self.factor, float) else example[self.factor])

    def contract(self, arrays, weights, dropped):
        weights = weights * (self.factor if isinstance(self.factor, float) else arrays[self.factor])
        return self.term.contract(arrays, _without(weights, dropped), dropped)


@dataclasses.dataclass(frozen=True)
class Bare:
    """A term without its moves and scales: it is `number · Π scales · moved(core)`."""

    core: Countable
    number: float = 1.0
    scales: tuple[Any, ...] = ()
    moves: tuple = ()


def bare(term: Term) -> Bare | None:
    """`term` as one thing that Gram matrices can measure, but for moves and scales; None if it is more than that."""
    match term:
        case Countable():
            return Bare(term)
        case Scaled(inner, factor):
            if (found := bare(inner)) is None:
                return None
            if isinstance(factor, float):
                return dataclasses.replace(found, number=found.number * factor)
            return dataclasses.replace(found, scales=(*found.scales, factor))
        case Linear(eqn, (inner,)) if term.name in MOVES and (found := bare(inner)):
            return dataclasses.replace(found, moves=(*found.moves, (term.name, str(eqn.params))))
        case Linear(_, (inner,)) if term.name == "neg" and (found := bare(inner)):
            return dataclasses.replace(found, number=-found.number)
        case Linear(_, (one, other)):
            first, second = bare(one), bare(other)
            if first is None or second is None or (first.scales, first.moves) != (second.scales, second.moves):
                return None
            a, b = first.core, second.core
            if not (isinstance(a, Product) and isinstance(b, Product) and _same_form(a, b)):
                return None
            sign = -1.0 if term.name == "sub" else 1.0
            pair = Pair(a, b, first.number, sign * second.number)
            return Bare(pair, 1.0, first.scales, first.moves)
    return None


def _same_form(one: Product, other: Product) -> bool:
    shapes = [tuple(var.aval.shape for var in product.kept) for product in (one, other)]
    return shapes[0] == shapes[1] and str(one.numbers) == str(other.numbers)


def squared_norm(term: Term, arrays: Mapping[Any, Array], size: int) -> Float[Array, " b"]:
    """`‖G_i‖²` by forming it, of `size` entries, for as many examples at a time as have room where its factors have."""
    names = tuple(dict.fromkeys(term.kept))
    examples = tuple(arrays[name] for name in names)

    def one(*example):
        return jnp.sum(jnp.square(term.form(dict(zip(names, example)))))

    count = len(examples[0])
    at_once = max(1, count * term.entries // size)
    if at_once >= count:
        return jax.vmap(one)(*examples)
    return jax.lax.map(lambda example: one(*example), examples, batch_size=at_once)


# --- Arrays with the example axis first -----------------------------------------------------------------------------


def _wide_type(dtype) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _wide(array: Array) -> Array:
    return array.astype(_wide_type(array.dtype))


def _scaled(array: Array, weights: Array) -> Array:
    return array * weights.astype(array.dtype).reshape(-1, *[1] * (array.ndim - 1))


def _without(array: Array, dropped: Array | None) -> Array:
    if dropped is None:
        return array
    return jnp.where(dropped.reshape(-1, *[1] * (array.ndim - 1)), jnp.zeros_like(array), array)


def _folded(array: Array, axis: int) -> Array:
    """The example axis joined to axis `axis` of the rest."""
    array = jnp.moveaxis(array, 0, axis)
    return array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])


def _positions(array: Array, batch, contracted) -> Float[Array, "examples batch positions features"]:
    """One operand of a product, its batch axes, contracted axes and free axes each in one."""
    free = [i for i in range(array.ndim - 1) if i not in batch and i not in contracted]
    sizes = [math.prod(array.shape[1 + i] for i in axes) for axes in (batch, contracted, free)]
    array = jnp.transpose(array, [0, *(i + 1 for i in (*batch, *contracted, *free))])
    return array.reshape(array.shape[0], *sizes)


def _self_products(array: Array, other: Array | None = None) -> Float[Array, "examples batch positions positions"]:
    return jnp.einsum(
        "ebtd,ebsd->ebts",
        array,
        array if other is None else other,
        precision=_HIGHEST,
        preferred_element_type=_wide_type(array.dtype),
    )


def _traces(products: Array) -> Float[Array, "examples batch"]:
    return jnp.trace(products, axis1=2, axis2=3)


def _slack(bound: Float[Array, " examples"]) -> Float[Array, " examples"]:
    return 4 * jnp.finfo(bound.dtype).eps * bound
