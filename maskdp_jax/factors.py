"""What a per-example gradient is made of while it is not formed: terms, their norms and their weighted sums.

A term stands for one array per example, `G_i`. It names variables of a traced function; `arrays` maps each of them to
its value for all examples, the example axis first, and `example` to its value for one. Everything is computed in
float32 or wider, at the highest precision, whatever the types of the factors.

**The norm is taken of exactly the array that is summed.** Both read the same stored factors, in the same rearrangement.
To a norm is added a bound of what the contraction may round (`rounding`). Where positions cancel, so that this bound is
no longer small beside the norm, or where factors are so large or small that their products might overflow or underflow,
the arrays are formed one by one, measured and summed (`measured`, `summed`). For that each position is scaled by powers
of two, which is exact; `exponent` returns what was taken out.

References: Bu et al., Differentially Private Optimization on Large Foundation Models (arXiv 2210.00038), book-keeping;
Li et al., Large Language Models Can Be Strong Differentially Private Learners (arXiv 2110.05679), the Gram norm.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MOVES = frozenset(
    {"transpose", "reshape", "squeeze", "broadcast_in_dim", "copy", "copy_p", "convert_element_type", "pad"}
)
"""Operations that move the entries of one operand and change none but in type, and that add at most zeros to them.

(`broadcast_in_dim` where it only adds axes of size 1, `pad` where it pads with 0, `convert_element_type` from float to
float.) They keep the norm.
"""

SUMS = frozenset({"add", "add_any", "sub", "neg", "reduce_sum"})

GRAM_ERROR = 0.02
"""Largest rounding error of ‖G‖² from Gram matrices, over ‖G‖²; if it may be more in any example, all are formed."""

CONTRACTION_ERROR = 2e-5
"""Largest rounding error of a contracted `G`, over ‖G‖; if it may be more in any example, all are formed."""

MODERATE = 50
"""Products of factors between 2^-50 and 2^50 are taken as they are."""

_HIGHEST = jax.lax.Precision.HIGHEST
_NOTHING = -10_000  # exponent of 0


class Term:
    """One array per example, as far as it is understood."""

    @property
    def kept(self) -> tuple[Any, ...]:
        """The variables whose values it needs."""
        raise NotImplementedError

    @property
    def entries(self) -> int:
        """Number of entries of those variables for one example."""
        return sum(var.aval.size for var in dict.fromkeys(self.kept))

    @property
    def factored(self) -> bool:
        """Whether anything in it is not computed yet."""
        return True

    def exponent(self, arrays: Mapping[Any, Array]) -> Int[Array, " b"]:
        """e such that `G·2^-e` neither overflows nor, unless its positions cancel, underflows."""
        raise NotImplementedError

    def form(self, example: Mapping[Any, Array], exponent: Int[Array, ""]) -> Array:
        """`G·2^-exponent` of one example."""
        raise NotImplementedError

    def rounding(self, arrays: Mapping[Any, Array], exponent: Int[Array, " b"]) -> Float[Array, " b"]:
        """A bound of `2^-exponent·‖contracted - G‖`: how far rounding may take what is summed from `G`."""
        raise NotImplementedError

    def moderate(self, arrays: Mapping[Any, Array]) -> Bool[Array, ""]:
        """Whether all factors are finite, and neither so large nor so small that their products leave float32."""
        raise NotImplementedError

    def contract(self, arrays: Mapping[Any, Array], weights: Float[Array, " b"]) -> Array:
        """`Σ_i weights_i G_i` of factors that are moderate. Examples of weight 0 add exactly 0."""
        raise NotImplementedError


class Countable(Term):
    """A sum `Σ_t a_t ⊗ δ_t` over positions, whose norm Gram matrices give without forming it."""

    def gram_is_cheaper(self) -> bool:
        """Whether they take fewer operations than forming it."""
        raise NotImplementedError

    def gram(self, arrays: Mapping[Any, Array]) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
        """`‖G_i‖² = Σ_{t,s} (a_t·a_s)(δ_t·δ_s)`, and `Σ_t ‖a_t‖‖δ_t‖`, which is ‖G‖ if all positions pull the same way.

        Both of `G·2^-exponent`.
        """
        raise NotImplementedError

    def positions(self) -> int:
        """How many are summed."""
        raise NotImplementedError

    def features(self) -> int:
        """How many products a Gram matrix sums for one of its entries, of both factors together."""
        raise NotImplementedError

    @property
    def gram_error(self) -> float:
        """Rounding error of `gram`, in roundoffs of `(Σ_t ‖a_t‖‖δ_t‖)²`.

        Sums of 3072 positive products were seen to be off by 180 roundoffs (XLA on a CPU), and of more by little more.
        """
        return 16 + min(self.positions() + self.features(), 8192) / 16

    @property
    def contraction_error(self) -> float:
        """Rounding error of `contract`, in roundoffs of `Σ_t ‖a_t‖‖δ_t‖`."""
        return _contraction_error(self.positions())


@dataclasses.dataclass(frozen=True)
class Value(Term):
    """An array kept as it is."""

    var: Any

    kept = property(lambda self: (self.var,))
    factored = False

    def exponent(self, arrays):
        return _example_exponent(arrays[self.var])

    def form(self, example, exponent):
        return times_power(_wide(example[self.var]), -exponent)

    def rounding(self, arrays, exponent):
        array = _flat(_wide(arrays[self.var]))
        return 4 * _unit(array) * jnp.sqrt(_squares(times_power(array, -exponent[:, None]), 1))

    def moderate(self, arrays):
        return _all_moderate(_example_exponent(arrays[self.var]))

    def contract(self, arrays, weights):
        array = _wide(arrays[self.var])
        return jnp.sum(_weighted(array, _real(weights, array)), 0)


@dataclasses.dataclass(frozen=True)
class Enclosed(Term):
    """An output of a `scan` or a `remat`, whose factors live and die inside: its norm and sum are taken there."""

    var: Any

    kept = property(lambda self: (self.var,))


class Outer(Countable):
    """`Σ_t a_t ⊗ δ_t` of two stacks of rows, one row a position; the product has batch axes if the stacks have."""

    shape: tuple[int, ...]

    def blocks(self, arrays: Mapping[Any, Array]) -> list[tuple[Array, Array]]:
        """`a` and `δ`, each (examples, batch, positions, features), in parts that follow each other along positions."""
        raise NotImplementedError

    def _scales(self, arrays):
        """Exponents of the rows of `a` and `δ`, by how much to raise either, and the exponent that this takes out.

        Rows of `δ` are then near 1, those of `a` as large as the product, the largest near 1.
        """
        a, d = (jnp.concatenate([_exponent(rows, 3) for rows in side], 2) for side in zip(*self.blocks(arrays)))
        empty = (a == _NOTHING) | (d == _NOTHING)
        exponent = jnp.max(jnp.where(empty, _NOTHING, a + d), (1, 2, 3), initial=_NOTHING)
        lift = jnp.where(empty, _NOTHING, d - exponent[:, None, None, None])
        return (a, d), lift, jnp.where(empty, _NOTHING, -d), exponent

    def exponent(self, arrays):
        return self._scales(arrays)[-1]

    def moderate(self, arrays):
        return _all_moderate(jnp.stack(self._scales(arrays)[0]))

    def form(self, example, exponent):
        arrays = {var: example[var][None] for var in self.kept}
        left, right = (jnp.concatenate(side, 2) for side in zip(*self.blocks(arrays)))
        _, lift, drop, own = self._scales(arrays)
        left = times_power(times_power(left, lift), own - exponent)
        return _multiplied(left, times_power(right, drop), (((2,), (2,)), ((0, 1), (0, 1)))).reshape(self.shape)

    def contract(self, arrays, weights):
        total = 0
        for k, (left, right) in enumerate(self.blocks(arrays)):
            left, right = _wide(left), _wide(right)
            if self.weighs_left(k):
                left = _weighted(left, weights.astype(left.dtype))
            else:
                right = _weighted(right, weights.astype(right.dtype))
            total = total + _multiplied(left, right, (((0, 2), (0, 2)), ((1,), (1,))))
        return total.reshape(self.shape)

    def weighs_left(self, block: int) -> bool:
        """Whether the weights are multiplied with `a` of this block, or with `δ`; a copy is made of either."""
        raise NotImplementedError

    def rounding(self, arrays, exponent):
        _, *lifts, own = self._scales(arrays)
        left, right = (
            times_power(jnp.concatenate([jnp.sqrt(_squares(_wide(rows), 3)) for rows in side], 2), lift[..., 0])
            for side, lift in zip(zip(*self.blocks(arrays)), lifts)
        )
        return self.contraction_error * _unit(left) * times_power(_spread(left, right), own - exponent)

    def gram(self, arrays):
        _, *lifts, _ = self._scales(arrays)
        left, right = (
            times_power(_self_products(side), lift + jnp.swapaxes(lift, 2, 3))
            for side, lift in zip(zip(*self.blocks(arrays)), lifts)
        )
        lengths = (jnp.sqrt(jnp.diagonal(products, axis1=2, axis2=3)) for products in (left, right))
        return jnp.sum(left * right, (1, 2, 3)), _spread(*lengths)


@dataclasses.dataclass(frozen=True)
class Product(Outer):
    """`dot_general(lhs, rhs)`, not computed."""

    lhs: Any
    rhs: Any
    numbers: tuple

    kept = property(lambda self: (self.lhs, self.rhs))

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Batch b, contracted t, left m, right n; the product has b·m·n entries."""
        (batch, contracted, left), (_, _, right) = self._axes()
        lhs, rhs = self.lhs.aval.shape, self.rhs.aval.shape
        return tuple(
            math.prod(shape[i] for i in axes)
            for shape, axes in ((lhs, batch), (lhs, contracted), (lhs, left), (rhs, right))
        )

    @property
    def shape(self):
        (batch, _, left), (_, _, right) = self._axes()
        lhs, rhs = self.lhs.aval.shape, self.rhs.aval.shape
        return (*(lhs[i] for i in (*batch, *left)), *(rhs[i] for i in right))

    def _axes(self):
        """Batch, contracted and free axes of both operands."""
        contracted, batch = self.numbers
        sides = zip((self.lhs, self.rhs), batch, contracted)
        return [(b, t, [i for i in range(var.aval.ndim) if i not in b and i not in t]) for var, b, t in sides]

    def blocks(self, arrays):
        return [tuple(_positions(arrays[var], *axes[:2]) for var, axes in zip(self.kept, self._axes()))]

    def weighs_left(self, block):
        return self.lhs.aval.size <= self.rhs.aval.size

    def gram_is_cheaper(self):
        _, t, m, n = self.sizes
        return t * (m + n) < m * n

    def positions(self):
        return self.sizes[1]

    def features(self):
        return sum(self.sizes[2:])

    def with_batch_contracted(self, axes: tuple[int, ...]) -> "Product | None":
        """The product of which this one, summed over output axes `axes`, is the value; None if these are no batch."""
        contracted, batch = self.numbers
        if any(axis >= len(batch[0]) for axis in axes):
            return None
        moved = [tuple(side[axis] for axis in axes) for side in batch]
        left = [tuple(axis for i, axis in enumerate(side) if i not in axes) for side in batch]
        return Product(self.lhs, self.rhs, (tuple((*c, *m) for c, m in zip(contracted, moved)), tuple(left)))


@dataclasses.dataclass(frozen=True)
class Pair(Outer):
    """`A₁ᵀD₁ ± A₂ᵀD₂`, two products of the same form, as of the two views of one record.

    Where the views are alike and the sign is −, the products cancel. So the sum is rearranged into
    `(A₁ − A₂)ᵀD₁ + A₂ᵀ(D₁ ± D₂)`, each of whose parts is as small as the difference of the views: as one product of
    twice the positions. Norm and sum are taken of that.
    """

    first: Product
    second: Product
    sign: int

    kept = property(lambda self: (*self.first.kept, *self.second.kept))
    shape = property(lambda self: self.first.shape)

    def blocks(self, arrays):
        (a, d), (b, e) = (map(_wide, product.blocks(arrays)[0]) for product in (self.first, self.second))
        return [(a - b, d), (b, d + e if self.sign > 0 else d - e)]

    def weighs_left(self, block):
        return block == 0  # the side that is a difference, and so a copy already

    def gram_is_cheaper(self):
        _, t, m, n = self.first.sizes
        return 2 * t * (m + n) < m * n

    def positions(self):
        return 2 * self.first.positions()

    def features(self):
        return self.first.features()


@dataclasses.dataclass(frozen=True)
class Scattered(Countable):
    """Rows added to a table of zeros (the gradient of an embedding), not computed."""

    indices: Any
    updates: Any
    eqn: Any

    kept = property(lambda self: (self.indices, self.updates))

    def exponent(self, arrays):
        return _example_exponent(arrays[self.updates])

    def form(self, example, exponent):
        rows = times_power(_wide(example[self.updates]), -exponent)
        return self._add(jnp.zeros(self.eqn.outvars[0].aval.shape, rows.dtype), example[self.indices], rows, 0)

    def moderate(self, arrays):
        return _all_moderate(self.exponent(arrays))

    def contract(self, arrays, weights):
        rows = _wide(arrays[self.updates])
        rows = _weighted(rows, weights.astype(rows.dtype))
        return self._add(jnp.zeros(self.eqn.outvars[0].aval.shape, rows.dtype), arrays[self.indices], rows, 1)

    def rounding(self, arrays, exponent):
        rows = self._rows(arrays, exponent)
        return self.contraction_error * _unit(rows) * jnp.sum(jnp.sqrt(_squares(rows, 2)), 1)

    def positions(self):
        return self.updates.aval.size // max(1, self.features())

    def features(self):
        windows = self.eqn.params["dimension_numbers"].update_window_dims
        return math.prod(self.updates.aval.shape[i] for i in windows)

    def _rows(self, arrays, exponent) -> Float[Array, "examples positions features"]:
        windows = self.eqn.params["dimension_numbers"].update_window_dims
        scattered = [i for i in range(self.updates.aval.ndim) if i not in windows]
        rows = _positions(arrays[self.updates], (), scattered)[:, 0]
        return times_power(_wide(rows), -_along(exponent, rows))

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
        rows = self._rows(arrays, self.exponent(arrays))[:, None]
        products = _self_products([rows])[:, 0]
        same = (index[:, :, None] == index[:, None, :]) & inside[:, :, None] & inside[:, None, :]
        lengths = jnp.sqrt(jnp.diagonal(products, axis1=1, axis2=2))
        lengths = jnp.sum(jnp.where(same, lengths[:, :, None] * lengths[:, None, :], 0), (1, 2))
        return jnp.sum(jnp.where(same, products, 0), (1, 2)), jnp.sqrt(lengths)


@dataclasses.dataclass(frozen=True)
class Convolved(Term):
    """`conv_general_dilated(lhs, rhs)`, not computed (the gradient of a kernel)."""

    lhs: Any
    rhs: Any
    eqn: Any

    kept = property(lambda self: (self.lhs, self.rhs))

    def _exponents(self, arrays):
        return [_example_exponent(arrays[var]) for var in self.kept]

    def exponent(self, arrays):
        return sum(self._exponents(arrays))

    def form(self, example, exponent):
        own, _ = self._exponents({var: example[var][None] for var in self.kept})
        left = times_power(_wide(example[self.lhs]), -own[0])
        return self._convolve(left, times_power(_wide(example[self.rhs]), own[0] - exponent))

    def moderate(self, arrays):
        return _all_moderate(jnp.stack(self._exponents(arrays)))

    def contract(self, arrays, weights):
        numbers = self.eqn.params["dimension_numbers"]
        left, right = (_wide(arrays[var]) for var in self.kept)
        right = _weighted(right, weights.astype(right.dtype))
        return self._convolve(_folded(left, numbers.lhs_spec[1]), _folded(right, numbers.rhs_spec[1]))

    def rounding(self, arrays, exponent):
        taps = math.prod(self.eqn.outvars[0].aval.shape[i] for i in self.eqn.params["dimension_numbers"].out_spec[2:])
        lengths = []
        for var, own in zip(self.kept, self._exponents(arrays)):
            array = _flat(_wide(arrays[var]))
            lengths.append(jnp.sqrt(_squares(times_power(array, -own[:, None]), 1)))
        scale = times_power(jnp.ones_like(lengths[0]), self.exponent(arrays) - exponent)
        return _contraction_error(self.rhs.aval.size) * math.sqrt(taps) * _unit(scale) * scale * math.prod(lengths)

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

    def exponent(self, arrays):
        return _largest([term.exponent(arrays) for term in self.terms])

    def form(self, example, exponent):
        return self.apply([term.form(example, exponent) for term in self.terms])

    def moderate(self, arrays):
        return jnp.all(jnp.stack([term.moderate(arrays) for term in self.terms]))

    def contract(self, arrays, weights):
        return self.apply([term.contract(arrays, weights) for term in self.terms])

    def rounding(self, arrays, exponent):
        total = sum(term.rounding(arrays, exponent) for term in self.terms)
        if self.name != "reduce_sum":
            return total
        return total * math.sqrt(self.eqn.invars[0].aval.size / max(1, self.eqn.outvars[0].aval.size))

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

    def parts(self, arrays: Mapping[Any, Array]) -> tuple[Any, Any]:
        """The factor as a mantissa of at least 1/2 and a power of two."""
        if isinstance(self.factor, float):
            return math.frexp(self.factor) if self.factor else (0.0, _NOTHING)
        factor = _wide(arrays[self.factor])
        exponent = _exponent(factor, ())
        return times_power(factor, -exponent), exponent

    def exponent(self, arrays):
        return self.term.exponent(arrays) + self.parts(arrays)[1]

    def form(self, example, exponent):
        mantissa, own = self.parts(example)
        return jax.lax.optimization_barrier(self.term.form(example, exponent - own) * mantissa)

    def moderate(self, arrays):
        own = jnp.asarray(self.parts(arrays)[1])
        return self.term.moderate(arrays) & _all_moderate(2 * own)

    def contract(self, arrays, weights):
        factor = self.factor if isinstance(self.factor, float) else arrays[self.factor].astype(weights.dtype)
        return self.term.contract(arrays, weights * factor)

    def rounding(self, arrays, exponent):
        mantissa, own = self.parts(arrays)
        return self.term.rounding(arrays, exponent - own) * abs(mantissa)


@dataclasses.dataclass(frozen=True)
class Bare:
    """A term without its moves and scales: its norm is that of `core` times all factors."""

    core: Countable
    scales: tuple[Scaled, ...] = ()


def bare(term: Term) -> Bare | None:
    """`term` as one thing that Gram matrices can measure, but for moves and scales; None if it is more than that."""
    match term:
        case Countable():
            return Bare(term)
        case Scaled(inner) if found := bare(inner):
            return dataclasses.replace(found, scales=(*found.scales, term))
        case Linear(_, (inner,)) if term.name in MOVES or term.name == "neg":
            return bare(inner)
    return None


def paired(one: Term, other: Term, sign: float) -> Term | None:
    """`one + sign·other` as a `Pair`, with the moves and scales that both have; None if they differ in more."""
    p, q = 1.0, sign
    while True:
        match one, other:
            case Linear(_, (inner,)), _ if one.name == "neg":
                one, p = inner, -p
            case _, Linear(_, (inner,)) if other.name == "neg":
                other, q = inner, -q
            case Scaled(inner, float(number)), _:
                one, p = inner, p * number
            case _, Scaled(inner, float(number)):
                other, q = inner, q * number
            case _:
                break
    match one, other:
        case Product(), Product() if p and abs(p) == abs(q) and _same_form(one, other):
            pair = Pair(one, other, 1 if p == q else -1)
            return pair if p == 1 else Scaled(pair, p)
        case Scaled(left, factor), Scaled(right, same) if factor is same:
            found = paired(left, right, q / p) if p else None
            found = found and Scaled(found, factor)
        case Linear(eqn, (left,)), Linear(_, (right,)) if one.name in MOVES and _same_move(one, other):
            found = paired(left, right, q / p) if p else None
            found = found and Linear(eqn, (found,))
        case _:
            return None
    return found if found is None or p == 1 else Scaled(found, p)


def _same_form(one: Product, other: Product) -> bool:
    shapes = [tuple(var.aval.shape for var in product.kept) for product in (one, other)]
    return shapes[0] == shapes[1] and str(one.numbers) == str(other.numbers)


def _same_move(one: Linear, other: Linear) -> bool:
    shapes = [linear.eqn.invars[0].aval.shape for linear in (one, other)]
    return (one.name, str(one.eqn.params), shapes[0]) == (other.name, str(other.eqn.params), shapes[1])


# --- Norms and sums -------------------------------------------------------------------------------------------------


def norm_of_array(array: Array) -> Float[Array, " b"]:
    """`‖G_i‖` of arrays that exist, at any scale; infinite where it overflows."""
    array = _flat(_wide(array))
    exponent = _exponent(array, 1)
    return times_power(jnp.sqrt(_squares(times_power(array, -exponent), 1)), exponent[:, 0])


def measured(
    term: Term, arrays: Mapping[Any, Array], size: int, skipped: Bool[Array, " b"], core: Bare | None
) -> tuple[Float[Array, " b"], Bool[Array, ""]]:
    """`‖G_i‖`, never less than the norm of what `summed` adds for the example.

    Args:
        term: G, of `size` entries.
        arrays: all that is in it.
        skipped: examples whose norm is of no interest.
        core: from `bare`, to take norms from Gram matrices where nothing cancels.

    Returns:
        Norms, and whether `summed` must form the arrays: positions cancel in an example, or its factors are extreme.
    """
    exponent = term.exponent(arrays)
    split, form = _some_at_a_time(term, arrays, exponent, size)
    formed = lambda: jax.lax.map(lambda part: norm_of_array(form(*part)), split).reshape(exponent.shape)  # noqa: E731
    if core is None:
        norm, rounding = formed(), term.rounding(arrays, exponent)
        delicate = jnp.any((rounding > CONTRACTION_ERROR * norm) & ~skipped) | ~term.moderate(arrays)
        return times_power(jnp.where(delicate, norm, norm + rounding), exponent), delicate
    squares, spread = core.core.gram(arrays)
    unit = _unit(squares)
    error, rounding = core.core.gram_error * unit * jnp.square(spread), core.core.contraction_error * unit * spread
    norm = jnp.sqrt(jnp.maximum(squares, 0) + error)
    cancels = jnp.any(((error > GRAM_ERROR * squares) | (rounding > CONTRACTION_ERROR * norm)) & ~skipped)
    delicate = cancels | ~term.moderate(arrays)
    mantissa = math.prod((abs(scaled.parts(arrays)[0]) for scaled in core.scales), start=jnp.ones_like(squares))
    return times_power(jax.lax.cond(delicate, formed, lambda: (norm + rounding) * mantissa), exponent), delicate


def summed(
    term: Term, arrays: Mapping[Any, Array], size: int, weights: Float[Array, " b"], delicate: Bool[Array, ""]
) -> Array:
    """`Σ_i weights_i G_i` of what `measured` has measured. Examples of weight 0 add exactly 0, whatever they hold."""

    def formed():
        exponent = term.exponent(arrays)
        split, form = _some_at_a_time(term, arrays, exponent, size)
        scales = times_power(weights, exponent).reshape(split[0].shape)

        def total(scale, *part):
            made = form(*part)
            return jnp.sum(_weighted(made, scale), 0)

        empty = zeros_like(jax.eval_shape(lambda: total(*(array[0] for array in (scales, *split)))))
        return jax.lax.scan(lambda sofar, part: (sofar + total(*part), None), empty, (scales, *split))[0]

    if isinstance(term, Value):
        return term.contract(arrays, weights)
    delicate |= ~_all_moderate(_exponent(weights, ()))
    return jax.lax.cond(delicate, formed, lambda: term.contract(arrays, weights))


def _some_at_a_time(term: Term, arrays: Mapping[Any, Array], exponent: Int[Array, " b"], size: int):
    """Exponents and arrays (parts, examples, ...), and a function of one part that forms `G·2^-exponent`.

    As many examples are a part as have room in a quarter of what the factors take.
    """
    names, count = tuple(dict.fromkeys(term.kept)), len(exponent)
    at_once = max(1, count * term.entries // (4 * size))
    at_once = next(n for n in range(min(at_once, max(count, 1)), 0, -1) if count % n == 0)
    split = [
        array.reshape(count // at_once, at_once, *array.shape[1:]) for array in (exponent, *map(arrays.get, names))
    ]
    each = jax.vmap(lambda exponent, *example: term.form(dict(zip(names, example)), exponent))
    return split, lambda *part: jax.lax.optimization_barrier(each(*part))


def zeros_like(tree: Any) -> Any:
    """Zeros of the given shapes and types; inside `shard_map` they vary over the same mesh axes."""

    def zeros(aval):
        kind, array = aval.manual_axis_type, jnp.zeros(aval.shape, aval.dtype)
        axes = tuple(sorted(kind.varying)) if kind else ()
        return jax.lax.pcast(array, axes, to="varying") if axes else array

    return jax.tree.map(zeros, tree)


def joint_norm(norms: Float[Array, "parts ..."]) -> Float[Array, "..."]:
    """The norm of all parts together, without overflow on the way."""
    exponent = _exponent(norms, 0)
    return times_power(jnp.sqrt(jnp.sum(jnp.square(times_power(norms, -exponent)), 0)), exponent[0])


# --- Arrays with the example axis first -----------------------------------------------------------------------------


def times_power(array: Array, exponent: Int[Array, "..."] | int) -> Array:
    """`array · 2^exponent`, exact but for overflow and underflow; exactly 0 (or NaN) where it is an exponent of 0."""
    kind, mantissa, bias = _layout(_wide_type(jnp.finfo(array.dtype).dtype))
    exponent = jnp.asarray(exponent, kind)
    nothing, exponent = exponent <= _NOTHING // 2, jnp.clip(exponent, 2 - 2 * bias, 2 * bias - 2)
    half = exponent >> 1
    for part in (half, exponent - half):
        power = jax.lax.bitcast_convert_type(jnp.where(nothing, 0, part + bias) << mantissa, _float_type(kind))
        array = array * power.astype(jnp.finfo(array.dtype).dtype)
    return array


def _exponent(array: Array, axes: int | tuple[int, ...]) -> Int[Array, "..."]:
    """The least e with |array| < 2^e along `axes`, which stay as 1; `_NOTHING` for 0 and what is too small to count."""
    if jnp.iscomplexobj(array):
        size = jnp.maximum(jnp.abs(array.real), jnp.abs(array.imag))
    else:
        size = jnp.abs(array)
    largest = _wide(jnp.max(size, axes, keepdims=True, initial=0))
    kind, mantissa, bias = _layout(largest.dtype)
    exponent = (jax.lax.bitcast_convert_type(largest, kind) >> mantissa).astype(jnp.int32) & (2 * bias + 1)
    return jnp.where(exponent == 0, _NOTHING, exponent - (bias - 1))


def _layout(dtype) -> tuple[Any, int, int]:
    """Of a floating-point type: an integer type of its size, bits of the mantissa, bias of the exponent."""
    return (jnp.int64, 52, 1023) if dtype == jnp.float64 else (jnp.int32, 23, 127)


def _float_type(kind) -> Any:
    return jnp.float64 if kind == jnp.int64 else jnp.float32


def _example_exponent(array: Array) -> Int[Array, " b"]:
    return _exponent(_flat(array), 1)[:, 0]


def _largest(exponents: Sequence[Array]) -> Array:
    largest = exponents[0]
    for exponent in exponents[1:]:
        largest = jnp.maximum(largest, exponent)
    return largest


def _unit(array: Array) -> float:
    """Unit roundoff."""
    return float(jnp.finfo(array.dtype).eps) / 2


def _contraction_error(positions: int) -> float:
    """Of a sum over that number of positions, in roundoffs of the sum of their sizes; seen to be up to 80."""
    return 4 + min(positions, 4096) / 32


def _spread(left: Float[Array, "b batch t"], right: Float[Array, "b batch t"]) -> Float[Array, " b"]:
    """`Σ_t ‖a_t‖‖δ_t‖`, what ‖G‖ would be if all positions pulled the same way; over batches, the root of squares."""
    return jnp.sqrt(jnp.sum(jnp.square(jnp.sum(left * right, 2)), 1))


def _wide_type(dtype) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _wide(array: Array) -> Array:
    return array.astype(_wide_type(array.dtype))


def _real(weights: Array, array: Array) -> Array:
    return weights.astype(jnp.finfo(array.dtype).dtype)


def _squares(array: Array, axis: int) -> Array:
    """`Σ |x|²` along an axis."""
    return jnp.sum(array.real**2 + array.imag**2 if jnp.iscomplexobj(array) else jnp.square(array), axis)


def _flat(array: Array) -> Array:
    return array.reshape(len(array), math.prod(array.shape[1:]))


def _along(per_example: Array, array: Array) -> Array:
    return per_example.reshape(-1, *[1] * (array.ndim - 1))


def _weighted(array: Array, weights: Float[Array, " b"]) -> Array:
    """Each example times its weight; exactly 0 where that is 0."""
    weights = _along(weights, array)
    return jnp.where(weights == 0, 0, array * weights)


def _all_moderate(exponents: Int[Array, "..."]) -> Bool[Array, ""]:
    return jnp.all((jnp.abs(exponents) <= MODERATE) | (exponents <= _NOTHING // 2))


def _folded(array: Array, axis: int) -> Array:
    """The example axis joined to axis `axis` of the rest."""
    array = jnp.moveaxis(array, 0, axis)
    return array.reshape(*array.shape[:axis], array.shape[axis] * array.shape[axis + 1], *array.shape[axis + 2 :])


def _positions(array: Array, batch, contracted) -> Float[Array, "examples batch positions features"]:
    """One operand of a product, its batch axes, contracted axes and free axes each in one."""
    free = [i for i in range(array.ndim - 1) if i not in batch and i not in contracted]
    sizes = [math.prod(array.shape[1 + i] for i in axes) for axes in (batch, contracted, free)]
    array = jnp.transpose(array, [0, *(i + 1 for i in (*batch, *contracted, *free))])
    array = array.reshape(array.shape[0], *sizes)
    return array if jnp.finfo(array.dtype).maxexp >= 128 else _wide(array)  # float16 has no room for powers of two


def _multiplied(left: Array, right: Array, numbers) -> Array:
    return jax.lax.dot_general(left, right, numbers, precision=_HIGHEST, preferred_element_type=_wide_type(left.dtype))


def _self_products(blocks: Sequence[Array]) -> Float[Array, "examples batch positions positions"]:
    """Of all rows of the blocks with each other."""
    numbers = ((3,), (3,)), ((0, 1), (0, 1))
    products = {(i, j): _multiplied(blocks[i], blocks[j], numbers) for j in range(len(blocks)) for i in range(j + 1)}
    if len(blocks) == 1:
        return products[0, 0]
    across = products[0, 1]
    top = jnp.concatenate([products[0, 0], across], 3)
    return jnp.concatenate([top, jnp.concatenate([jnp.swapaxes(across, 2, 3), products[1, 1]], 3)], 2)
