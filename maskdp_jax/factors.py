"""What a per-example gradient is made of while it is not formed: terms, their norms and their weighted sums.

A term stands for one array per example, `G_i`. It names variables of a traced function; `arrays` maps each of them to
its value for all examples, the example axis first. Everything is computed in float32 or wider, at the highest
precision, whatever the types of the factors.

Norm and sum read the same stored factors, in the same rearrangement. Each norm has two bounds of how much more
`contract` may add for that example: `slack` for roundoff, `hidden` for underflow. They are small unless positions
cancel or factors are extreme; such examples are formed, measured and summed instead (`bookkeeping.weighted_sum`).

References: Bu et al., Differentially Private Optimization on Large Foundation Models (arXiv 2210.00038), book-keeping;
Li et al., Large Language Models Can Be Strong Differentially Private Learners (arXiv 2110.05679), the Gram norm.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

MOVES = frozenset(
    {"transpose", "reshape", "squeeze", "broadcast_in_dim", "copy", "copy_p", "convert_element_type", "pad"}
)
"""Operations that move the entries of one operand and change none but in type, and that add at most zeros to them.

(`broadcast_in_dim` where it only adds axes of size 1, `pad` where it pads with 0, `convert_element_type` from float to
float.) They keep the norm.
"""

SUMS = frozenset({"add", "add_any", "sub", "neg", "reduce_sum"})

LEAST_WEIGHT, LARGEST_WEIGHT = 2.0**-50, 2.0**25
"""Range of the weights that `contract` takes, other than 0; a term's own scalars lie between 2^-25 and 2^25."""

_HIGHEST = jax.lax.Precision.HIGHEST


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

    def rounding(self, arrays: Mapping[Any, Array]) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
        """Bounds of `‖contracted - G‖`: slack and hidden."""
        raise NotImplementedError

    def contract(self, arrays: Mapping[Any, Array], weights: Float[Array, " b"]) -> Array:
        """`Σ_i weights_i G_i`. Examples of weight 0 add exactly 0, whatever they hold."""
        raise NotImplementedError


class Countable(Term):
    """A sum `Σ_t a_t ⊗ δ_t` over positions, whose norm Gram matrices give without forming it."""

    def gram_is_cheaper(self) -> bool:
        """Whether they take fewer operations than forming it."""
        raise NotImplementedError

    def gram(self, arrays: Mapping[Any, Array]) -> tuple[Float[Array, " b"], Float[Array, " b"], Float[Array, " b"]]:
        """`‖G_i‖² = Σ_{t,s} (a_t·a_s)(δ_t·δ_s)`; `Σ_t ‖a_t‖‖δ_t‖`, which is ‖G‖ if all positions pull the same way; and
        hidden."""
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

    def rounding(self, arrays):
        array = _flat(_wide(arrays[self.var]))
        norm = jnp.sqrt(_squares(array, 1))
        return 4 * _unit(array) * norm, jnp.full_like(norm, 2 * _root(array) * math.sqrt(array.shape[1]))

    def contract(self, arrays, weights):
        array = _wide(arrays[self.var])
        return jnp.sum(weighted(array, _real(weights, array)), 0)


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

    def contract(self, arrays, weights):
        total = 0
        for k, (left, right) in enumerate(self.blocks(arrays)):
            left, right = _wide(left), _wide(right)
            weights = weights.astype(left.dtype)
            if self.weighs_left(k):
                left, right = weighted(left, weights), _kept(right, weights)
            else:
                left, right = _kept(left, weights), weighted(right, weights)
            total = total + _multiplied(left, right, (((0, 2), (0, 2)), ((1,), (1,))))
        return total.reshape(self.shape)

    def weighs_left(self, block: int) -> bool:
        """Whether the weights are multiplied with `a` of this block, or with `δ`; a copy is made of either."""
        raise NotImplementedError

    def rounding(self, arrays):
        blocks = self.blocks(arrays)
        lengths = [[jnp.sqrt(_squares(_wide(rows), 3)) for rows in block] for block in blocks]
        spread, hidden = self._spread(blocks, lengths)
        return self.contraction_error * _unit(spread) * spread, hidden

    def gram(self, arrays):
        blocks, squares, lengths = self.blocks(arrays), 0, []
        for i, j in itertools.combinations_with_replacement(range(len(blocks)), 2):
            products = [_multiplied(*pair, (((3,), (3,)), ((0, 1), (0, 1)))) for pair in zip(blocks[i], blocks[j])]
            squares = squares + (1 if i == j else 2) * jnp.sum(math.prod(products), (1, 2, 3))
            if i == j:
                lengths.append([jnp.sqrt(_diagonal(side)) for side in products])
        return squares, *self._spread(blocks, lengths)

    def _spread(self, blocks, lengths) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
        """`Σ_t ‖a_t‖‖δ_t‖` (over batches, the root of squares), and hidden.

        The square of an entry below `_root` may vanish, and so may the product of an entry and a weight below `tiny`.
        """
        total = sum(jnp.sum(left * right, 2) for left, right in lengths)
        (m, n), root = (rows.shape[3] for rows in blocks[0]), _root(total)
        count = sum(math.prod(left.shape[1:3]) for left, _ in blocks)
        sides = (sum(jnp.sum(rows, (1, 2)) for rows in side) for side in zip(*lengths))
        hidden = sum(math.sqrt(other) * side for side, other in zip(sides, (n, m)))
        hidden = 2 * root * (hidden + count) + 2 * root**2 / LEAST_WEIGHT * count * math.sqrt(m * n)
        return jnp.sqrt(jnp.sum(jnp.square(total), 1)), hidden


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

    def contract(self, arrays, weights):
        rows = _wide(arrays[self.updates])
        rows = weighted(rows, weights.astype(rows.dtype))
        return self._add(jnp.zeros(self.eqn.outvars[0].aval.shape, rows.dtype), arrays[self.indices], rows)

    def rounding(self, arrays):
        rows = self._rows(arrays)
        spread = jnp.sum(jnp.sqrt(_squares(rows, 2)), 1)
        return self.contraction_error * _unit(rows) * spread, self._hidden(spread)

    def _hidden(self, like: Array) -> Array:
        return jnp.full_like(like, 2 * _root(like) * self.positions() * math.sqrt(max(1, self.features())))

    def positions(self):
        return self.updates.aval.size // max(1, self.features())

    def features(self):
        windows = self.eqn.params["dimension_numbers"].update_window_dims
        return math.prod(self.updates.aval.shape[i] for i in windows)

    def _rows(self, arrays) -> Float[Array, "examples positions features"]:
        windows = self.eqn.params["dimension_numbers"].update_window_dims
        scattered = [i for i in range(self.updates.aval.ndim) if i not in windows]
        return _wide(_positions(arrays[self.updates], (), scattered)[:, 0])

    def _add(self, table: Array, indices: Array, rows: Array) -> Array:
        numbers = self.eqn.params["dimension_numbers"]
        numbers = numbers._replace(update_window_dims=tuple(i + 1 for i in numbers.update_window_dims))
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
        rows = self._rows(arrays)
        products = _multiplied(rows, rows, (((2,), (2,)), ((0,), (0,))))
        same = (index[:, :, None] == index[:, None, :]) & inside[:, :, None] & inside[:, None, :]
        lengths = jnp.sqrt(_diagonal(products))
        spread = jnp.sqrt(jnp.sum(jnp.where(same, lengths[:, :, None] * lengths[:, None, :], 0), (1, 2)))
        return jnp.sum(jnp.where(same, products, 0), (1, 2)), spread, self._hidden(spread)


@dataclasses.dataclass(frozen=True)
class Convolved(Term):
    """`conv_general_dilated(lhs, rhs)`, not computed (the gradient of a kernel)."""

    lhs: Any
    rhs: Any
    eqn: Any

    kept = property(lambda self: (self.lhs, self.rhs))

    def contract(self, arrays, weights):
        numbers = self.eqn.params["dimension_numbers"]
        left, right = (_wide(arrays[var]) for var in self.kept)
        weights = weights.astype(right.dtype)
        left, right = _kept(left, weights), weighted(right, weights)
        return self._convolve(_folded(left, numbers.lhs_spec[1]), _folded(right, numbers.rhs_spec[1]))

    def rounding(self, arrays):
        taps = math.prod(self.eqn.outvars[0].aval.shape[i] for i in self.eqn.params["dimension_numbers"].out_spec[2:])
        left, right = (jnp.sqrt(_squares(_flat(_wide(arrays[var])), 1)) for var in self.kept)
        entries, out = [var.aval.size for var in self.kept], self.eqn.outvars[0].aval.size
        sizes = sum(math.sqrt(size) * (length + 2 * math.sqrt(size)) for size, length in zip(entries, (left, right)))
        hidden = (2 * _root(left) * (left + right + 1) + _root(left) ** 2 / LEAST_WEIGHT * sizes) * math.sqrt(out)
        return jnp.stack(
            [
                _contraction_error(self.rhs.aval.size) * math.sqrt(taps) * _unit(left) * left * right,
                hidden * math.sqrt(max(1, self.lhs.aval.size, self.rhs.aval.size)),
            ]
        )

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

    def contract(self, arrays, weights):
        return self.apply([term.contract(arrays, weights) for term in self.terms])

    def rounding(self, arrays):
        more = 1.0
        if self.name == "reduce_sum":
            more = math.sqrt(self.eqn.invars[0].aval.size / max(1, self.eqn.outvars[0].aval.size))
        return tuple(more * sum(bound) for bound in zip(*(term.rounding(arrays) for term in self.terms)))

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

    def contract(self, arrays, weights):
        factor = self.factor if isinstance(self.factor, float) else arrays[self.factor].astype(weights.dtype)
        return self.term.contract(arrays, weighted(jnp.broadcast_to(factor, weights.shape), weights))

    def rounding(self, arrays):
        return self.times(arrays, *self.term.rounding(arrays))

    def times(self, arrays: Mapping[Any, Array], *bounds: Float[Array, " b"]) -> tuple[Float[Array, " b"], ...]:
        """Bounds of the scaled term from those of `term`, hidden the last; infinite where the scalar is extreme."""
        *others, hidden = bounds
        factor = self.factor if isinstance(self.factor, float) else arrays[self.factor]
        factor = jnp.abs(jnp.asarray(factor, hidden.dtype))
        usual = (factor == 0) | ((factor >= 1 / LARGEST_WEIGHT) & (factor <= LARGEST_WEIGHT))
        return *(other * factor for other in others), jnp.where(usual, hidden * jnp.maximum(1, factor), jnp.inf)


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
    """`‖G_i‖` of arrays that exist, at any scale; not finite where it overflows."""
    array = _flat(_wide(array))
    if jnp.iscomplexobj(array):
        array = jnp.concatenate([array.real, array.imag], 1)
    return _norm(array, 1)


def bounds(term: Term, arrays: Mapping[Any, Array], size: int, core: Bare | None) -> tuple[Array, Array, Array]:
    """`‖G_i‖`, slack and hidden, each (b,): `term.contract` adds for an example at most their sum times its weight.

    Args:
        term: G, of `size` entries.
        arrays: all that is in it.
        core: from `bare`, to take norms from Gram matrices; None: form some examples at a time, and drop them.
    """
    if isinstance(term, Value):
        norm = jnp.sqrt(_squares(_flat(_wide(arrays[term.var])), 1))
        return norm, jnp.zeros_like(norm), jnp.full_like(norm, 2 * _root(norm) * math.sqrt(size))
    if core is None:
        names = dict.fromkeys(term.kept)
        kept = [arrays[name] for name in names]
        parts = in_parts(kept, at_once(len(kept[0]), term.entries, size))
        form = jax.vmap(lambda part: formed(term, dict(zip(names, part))))
        norm = jax.lax.map(lambda part: jnp.sqrt(_squares(_flat(form(part)), 1)), parts).reshape(len(kept[0]))
        slack, hidden = term.rounding(arrays)
        return norm, slack, hidden + 2 * _root(norm) * math.sqrt(size)
    squares, spread, hidden = core.core.gram(arrays)
    squares, unit = jnp.maximum(squares, 0), _unit(squares)
    norm = jnp.sqrt(squares)
    above = jnp.sqrt(squares + core.core.gram_error * unit * jnp.square(spread)) - norm
    found = norm, above + core.core.contraction_error * unit * spread, hidden
    for scaled in reversed(core.scales):
        found = scaled.times(arrays, *found)
    return found


def formed(term: Term, example: Mapping[Any, Array]) -> Array:
    """`G` of one example."""
    one = {var: example[var][None] for var in term.kept}
    return term.contract(one, jnp.ones(1, jnp.result_type(jnp.float32, *(_wide_real(array) for array in one.values()))))


def at_once(count: int, entries: int, size: int) -> int:
    """How many of `count` examples, each of `entries`, to form at a time, so that they need a quarter of the memory."""
    most = max(1, min(count, count * entries // (4 * max(1, size))))
    return next(n for n in range(most, 0, -1) if count % n == 0)


def in_parts(tree: Any, size: int) -> Any:
    """Arrays (examples, ...) as (parts, size, ...)."""
    return jax.tree.map(lambda array: array.reshape(len(array) // size, size, *array.shape[1:]), tree)


def zeros_like(tree: Any) -> Any:
    """Zeros of the given shapes and types; inside `shard_map` they vary over the same mesh axes."""

    def zeros(aval):
        kind, array = aval.manual_axis_type, jnp.zeros(aval.shape, aval.dtype)
        axes = tuple(sorted(kind.varying)) if kind else ()
        return jax.lax.pcast(array, axes, to="varying") if axes else array

    return jax.tree.map(zeros, tree)


def joint_norm(norms: Float[Array, "parts ..."]) -> Float[Array, "..."]:
    """The norm of all parts together, without overflow on the way."""
    return _norm(norms, 0)


def _norm(array: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Large and small arrays are scaled by a power of two first, so that no square leaves the type."""
    info = jnp.finfo(array.dtype)
    largest = jnp.max(jnp.abs(array), axis, keepdims=True, initial=0)
    edge, lift = 2.0 ** int(0.4 * info.maxexp), 2.0 ** int(0.7 * info.maxexp)
    large, little = largest > edge, largest < 1 / edge
    scale = jnp.where(large, 1 / lift, jnp.where(little, lift, 1)).astype(array.dtype)
    back = jnp.where(large, lift, jnp.where(little, 1 / lift, 1)).astype(array.dtype)
    return jnp.squeeze(back, axis) * jnp.sqrt(jnp.sum(jnp.square(array * scale), axis))


def varying_axes(leaf: Array) -> frozenset:
    """The mesh axes over which `leaf` differs between devices, inside `shard_map`."""
    return jax.typeof(leaf).manual_axis_type.varying


def varying_tree(tree: PyTree, axes: frozenset) -> PyTree:
    """`tree` with its arrays made varying over `axes`; all else in it stays as it is."""

    def varying(leaf):
        missing = tuple(sorted(axes - varying_axes(leaf))) if isinstance(leaf, jax.Array) else ()
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(varying, tree)


# --- Arrays with the example axis first -----------------------------------------------------------------------------


def _unit(array: Array) -> float:
    """Unit roundoff."""
    return float(jnp.finfo(array.dtype).eps) / 2


def _root(array: Array) -> float:
    """The least size whose square is sure not to vanish."""
    return math.sqrt(float(jnp.finfo(array.dtype).tiny))


def _contraction_error(positions: int) -> float:
    """Of a sum over that number of positions, in roundoffs of the sum of their sizes; seen to be up to 80."""
    return 4 + min(positions, 4096) / 32


def _wide_type(dtype) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _wide(array: Array) -> Array:
    return array.astype(_wide_type(array.dtype))


def _wide_real(array: Array) -> Any:
    return _wide_type(jnp.finfo(array.dtype).dtype) if jnp.issubdtype(array.dtype, jnp.inexact) else jnp.float32


def _real(weights: Array, array: Array) -> Array:
    return weights.astype(jnp.finfo(array.dtype).dtype)


def _squares(array: Array, axis: int) -> Array:
    """`Σ |x|²` along an axis."""
    return jnp.sum(array.real**2 + array.imag**2 if jnp.iscomplexobj(array) else jnp.square(array), axis)


def _diagonal(products: Float[Array, "... n n"]) -> Float[Array, "... n"]:
    """Without the gather of `jnp.diagonal`."""
    return jnp.sum(jnp.where(jnp.eye(products.shape[-1], dtype=bool), products, 0), -1)


def _flat(array: Array) -> Array:
    return array.reshape(len(array), math.prod(array.shape[1:]))


def _along(per_example: Array, array: Array) -> Array:
    return per_example.reshape(-1, *[1] * (array.ndim - 1))


def weighted(array: Array, weights: Float[Array, " b"]) -> Array:
    """Each example times its weight, float32 or wider; exactly 0 where that is 0."""
    array = _wide(array)
    weights = _along(_real(weights, array), array)
    return jnp.where(weights == 0, 0, array * weights)


def _kept(array: Array, weights: Float[Array, " b"]) -> Array:
    """Each example as it is; exactly 0 where its weight is 0."""
    return jnp.where(_along(weights, array) == 0, 0, array)


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
    return array if jnp.finfo(array.dtype).maxexp >= 128 else _wide(array)  # squares of float16 overflow


def _multiplied(left: Array, right: Array, numbers) -> Array:
    return jax.lax.dot_general(left, right, numbers, precision=_HIGHEST, preferred_element_type=_wide_type(left.dtype))
