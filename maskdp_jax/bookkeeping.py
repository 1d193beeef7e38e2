"""Book-keeping: per-example gradients in factored form, read off the jaxpr, so that they need never be formed.

A large per-example gradient is nearly always the last product of the backward pass, `G = Σ_t a_t ⊗ δ_t`, perhaps
transposed or reshaped, perhaps added to others. `factored_vmap` traces the function of *one* example, finds those
products and stops short of them: it returns the factors `(a, δ)` of each large leaf, and the value of each small one.
It then maps the shortened function over the examples with `jax.vmap`, so the example axis comes first by construction,
whatever the sizes are. From the factors follow

* the squared norm `‖G_i‖²`: by Gram matrices, `Σ_{t,s} (a_t·a_s)(δ_t·δ_s)`, or by forming one leaf at a time;
* the weighted sum `Σ_i c_i G_i`: one contraction over examples and positions, the cost of an ordinary weight gradient.

No layer is registered anywhere. What is not understood is kept as a value: slower, and always correct.

References: Bu et al., Differentially Private Optimization on Large Foundation Models (arXiv 2210.00038), book-keeping;
Li et al., Large Language Models Can Be Strong Differentially Private Learners (arXiv 2110.05679), the Gram norm.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array, Float, PyTree

INLINED = frozenset({"jit", "pjit", "closed_call"})
"""Calls whose body may stand in their place. Every other sub-jaxpr stays whole."""

MOVES = frozenset({"transpose", "reshape", "squeeze", "expand_dims", "copy", "copy_p", "convert_element_type"})
"""Operations of one operand that move entries and change none (but in type): they keep the norm."""

REMAT = frozenset({"checkpoint", "remat", "remat2"})

SUMS = frozenset({"add", "add_any", "sub", "neg", "reduce_sum"})

SMALL = 4096
"""Leaves of fewer entries than this are kept as values: forming them costs less than two contractions."""


# --- What a leaf is made of -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Value:
    """An array kept as it is, one for each example."""

    var: Any


@dataclasses.dataclass(frozen=True)
class Product:
    """`dot_general(lhs, rhs)`, left undone."""

    lhs: Any
    rhs: Any
    numbers: tuple

    def sizes(self) -> tuple[int, int, int, int]:
        """Sizes of the product: batch b, contracted t, left m, right n; it has b·m·n entries."""
        (contracted, _), (batch, _) = self.numbers
        b = math.prod(self.lhs.aval.shape[i] for i in batch)
        t = math.prod(self.lhs.aval.shape[i] for i in contracted)
        return b, t, self.lhs.aval.size // (b * t), self.rhs.aval.size // (b * t)


@dataclasses.dataclass(frozen=True)
class Enclosed:
    """An output of a `scan` or a `remat` body: its squared norm is taken inside the body, where its factors are alive.

    It has no sum: take that from a reweighted backward pass.
    """

    var: Any


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear operation (one of MOVES or SUMS) applied to terms."""

    eqn: Any
    terms: tuple


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A term times a number, or times a scalar that each example has one of."""

    term: Any
    factor: float | Any  # a number, or a variable


Term = Value | Product | Enclosed | Linear | Scaled


def _products(term: Term) -> list[Product]:
    match term:
        case Product():
            return [term]
        case Linear(_, terms):
            return [product for part in terms for product in _products(part)]
        case Scaled(inner, _):
            return _products(inner)
    return []


def _kept(term: Term) -> list[Any]:
    """The variables that `term` needs from the trace."""
    match term:
        case Value(var) | Enclosed(var):
            return [var]
        case Product(lhs, rhs, _):
            return [lhs, rhs]
        case Linear(_, terms):
            return [var for part in terms for var in _kept(part)]
        case Scaled(inner, factor):
            return _kept(inner) + ([] if isinstance(factor, float) else [factor])


# --- Reading a jaxpr ------------------------------------------------------------------------------------------------


class _Reader:
    """A jaxpr with its calls inlined, and the equation that made each variable."""

    def __init__(self, closed: core.ClosedJaxpr):
        if closed.effects:
            raise NotImplementedError(f"per-example function with effects {closed.effects}: they would be lost")
        self.jaxpr = closed.jaxpr
        self.eqns: list[Any] = []
        self.constants = dict(zip(closed.jaxpr.constvars, closed.consts))
        self.same: dict[Any, Any] = {}
        self._inline(closed.jaxpr)
        self.made_by = {var: eqn for eqn in self.eqns for var in eqn.outvars}
        self.outvars = [self.resolve(var) for var in closed.jaxpr.outvars]

    def resolve(self, atom):
        while not isinstance(atom, core.Literal) and atom in self.same:
            atom = self.same[atom]
        return atom

    def _inline(self, jaxpr) -> None:
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in INLINED:
                inner = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
                body = self._renamed(inner.jaxpr)
                self.constants.update(zip(body.constvars, inner.consts))
                self.same.update(zip(body.invars, eqn.invars))
                self._inline(body)
                self.same.update(zip(eqn.outvars, body.outvars))
            else:
                self.eqns.append(eqn.replace(invars=[self.resolve(atom) for atom in eqn.invars]))

    def _renamed(self, jaxpr):
        """The same jaxpr over new variables, since one body may be called more than once."""
        names: dict[Any, Any] = {}

        def new(atom):
            if isinstance(atom, core.Literal | core.DropVar):
                return atom
            if atom not in names:
                names[atom] = core.Var(atom.aval)
            return names[atom]

        def each(atoms):
            return [new(atom) for atom in atoms]

        eqns = [eqn.replace(invars=each(eqn.invars), outvars=each(eqn.outvars)) for eqn in jaxpr.eqns]
        fields = {name: each(getattr(jaxpr, name)) for name in ("constvars", "invars", "outvars")}
        return jaxpr.replace(eqns=eqns, **fields)

    def term(self, atom) -> Term:
        """What `atom` is made of, as far as it is understood."""
        atom = self.resolve(atom)
        eqn = None if isinstance(atom, core.Literal) else self.made_by.get(atom)
        if eqn is None:
            return Value(atom)
        name = eqn.primitive.name
        if name == "dot_general":
            return Product(*eqn.invars, eqn.params["dimension_numbers"])
        if name in MOVES or name in SUMS:
            parts = tuple(self.term(operand) for operand in eqn.invars)
            if any(_products(part) for part in parts) and all(part.aval.shape != () for part in eqn.invars):
                return Linear(eqn, parts)
        if name in ("mul", "div"):
            scalars = [self._scalar(operand) for operand in eqn.invars]
            if scalars[1] is not None and _products(inner := self.term(eqn.invars[0])):
                if name == "mul":
                    return Scaled(inner, scalars[1])
                if isinstance(scalars[1], float):
                    return Scaled(inner, 1.0 / scalars[1])
            if name == "mul" and scalars[0] is not None and _products(inner := self.term(eqn.invars[1])):
                return Scaled(inner, scalars[0])
        return Value(atom)

    def _scalar(self, atom):
        """The number or scalar variable that `atom` is, or is a broadcast of; None if it is neither."""
        atom = self.resolve(atom)
        if isinstance(atom, core.Literal):
            return float(atom.val) if atom.aval.shape == () else None
        if atom.aval.shape == ():
            return atom
        eqn = self.made_by.get(atom)
        if eqn is not None and eqn.primitive.name in ("broadcast_in_dim", "convert_element_type"):
            return self._scalar(eqn.invars[0])
        return None

    def enclosed(self, var) -> Any | None:
        """The output of a scan (stacked over its steps) or remat that `var` is, but for moves; None if it is neither.

        It must be needed for nothing else, since its squared norm takes its place.
        """
        uses = [atom for eqn in self.eqns for atom in eqn.invars if atom is var] + [v for v in self.outvars if v is var]
        eqn = self.made_by.get(var)
        if eqn is None or len(uses) > 1:
            return None
        if eqn.primitive.name in MOVES:
            return self.enclosed(eqn.invars[0])
        if eqn.primitive.name in REMAT:
            return var
        if eqn.primitive.name == "scan" and eqn.outvars.index(var) >= eqn.params["num_carry"]:
            return var
        return None

    def square_inside(self, leaves: Sequence[Any]) -> None:
        """Rewrites the bodies that make `leaves` so that each gives the squared norm (of each step) in its place."""
        for position, eqn in enumerate(self.eqns):
            inside = [i for i, var in enumerate(eqn.outvars) if var in leaves]
            if not inside:
                continue
            body = eqn.params["jaxpr"]
            closed = body if isinstance(body, core.ClosedJaxpr) else core.ClosedJaxpr(body, ())
            squared = _squared_outputs(closed, inside)
            outvars = list(eqn.outvars)
            for i in inside:
                steps = (eqn.params["length"],) if eqn.primitive.name == "scan" else ()
                norm = core.Var(squared.out_avals[i].update(shape=steps))
                self.same[eqn.outvars[i]] = norm
                outvars[i] = norm
            params = {**eqn.params, "jaxpr": squared if isinstance(body, core.ClosedJaxpr) else squared.jaxpr}
            self.eqns[position] = eqn.replace(params=params, outvars=outvars)

    def shortened(self, outvars: Sequence[Any]) -> core.ClosedJaxpr:
        """The jaxpr that computes just `outvars`."""
        needed, wanted = [], set(outvars)
        for eqn in reversed(self.eqns):
            if any(var in wanted for var in eqn.outvars):
                needed.append(eqn)
                wanted.update(atom for atom in eqn.invars if not isinstance(atom, core.Literal))
        constants = {var: value for var, value in self.constants.items() if var in wanted}
        jaxpr = self.jaxpr.replace(constvars=list(constants), outvars=list(outvars), eqns=needed[::-1])
        return core.ClosedJaxpr(jaxpr, list(constants.values()))


# --- Gradients in factored form -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the per-example output: what it is made of, and how its norm is taken.

    Attributes:
        norm: `value` (it exists), `gram` (from Gram matrices) or `form` (formed for all examples, squared, dropped).
        reason: why, for `explain`.
    """

    term: Term
    dtype: Any
    norm: str
    reason: str


def _plan(reader: _Reader, var, small: int, enclose: bool) -> Leaf:
    aval = var.aval
    if aval.size < small:
        return Leaf(Value(var), aval.dtype, "value", f"small ({aval.size} entries)")
    term = reader.term(var)
    products = _products(term)
    if not products:
        made_by = reader.made_by.get(var)
        name = made_by.primitive.name if made_by else "no operation"
        if enclose and (output := reader.enclosed(var)) is not None:
            return Leaf(Enclosed(output), aval.dtype, "inside", "squared inside its scan or remat")
        return Leaf(Value(var), aval.dtype, "value", f"made by {name}")
    factor_entries = sum(b * t * (m + n) for b, t, m, n in (product.sizes() for product in products))
    if len(products) == 1 and factor_entries >= 2 * aval.size:
        return Leaf(Value(var), aval.dtype, "value", f"its factors have {factor_entries} entries, itself {aval.size}")
    if (single := _stripped(term)) is None:
        return Leaf(term, aval.dtype, "form", f"a sum ({len(products)} products): Gram norms would cancel")
    _, t, m, n = single.sizes()
    if t * (m + n) < m * n:
        return Leaf(term, aval.dtype, "gram", f"{t} positions, {m} by {n}")
    return Leaf(term, aval.dtype, "form", f"{t} positions, {m} by {n}: Gram matrices would cost more")


def _squared_outputs(closed: core.ClosedJaxpr, positions: Sequence[int]) -> core.ClosedJaxpr:
    """`closed` with the squared norm of each output at `positions` in that output's place."""
    invars = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type) for v in closed.jaxpr.invars]

    def squared(*args):
        reader = _Reader(closed)
        leaves = {i: _plan(reader, reader.outvars[i], 1, True) for i in positions}
        values = _evaluate(reader, leaves.values(), [v for i, v in enumerate(reader.outvars) if i not in leaves], args)
        outputs = []
        for i, var in enumerate(reader.outvars):
            if i in leaves:
                alone = {name: value[None] for name, value in values.items()}
                outputs.append(_squared_norm(leaves[i], alone)[0])
            else:
                outputs.append(_read(var, values))
        return outputs

    return jax.make_jaxpr(squared)(*invars)


def _evaluate(reader: _Reader, leaves, others: Sequence[Any], args) -> dict[Any, Array]:
    """The value of every variable that the leaves and the other outputs need, for one example."""
    leaves = list(leaves)
    reader.square_inside([leaf.term.var for leaf in leaves if isinstance(leaf.term, Enclosed)])
    wanted = [atom for leaf in leaves for atom in _kept(leaf.term)] + list(others)
    names = list(dict.fromkeys(atom for atom in wanted if not isinstance(atom, core.Literal)))
    made = [reader.resolve(name) for name in names]
    return dict(zip(names, core.jaxpr_as_fun(reader.shortened(made))(*args)))


def _read(atom, values: dict[Any, Array]) -> Array:
    return jnp.asarray(atom.val, atom.aval.dtype) if isinstance(atom, core.Literal) else values[atom]


def _stripped(term: Term) -> Product | None:
    """The product that `term` is, but for moves, signs and scales; None if it is more than that."""
    match term:
        case Product():
            return term
        case Linear(eqn, (inner,)) if eqn.primitive.name in MOVES or eqn.primitive.name == "neg":
            return _stripped(inner)
        case Scaled(inner, _):
            return _stripped(inner)
    return None


class Factored:
    """Per-example arrays `G_i`, one pytree leaf each, kept in factored form.

    Made by `factored_vmap`. `arrays` maps each kept variable to its value with the example axis first.
    """

    def __init__(self, leaves: list[Leaf], arrays: dict[Any, Array], tree):
        self.leaves, self.arrays, self.tree = leaves, arrays, tree

    @property
    def has_sums(self) -> bool:
        """Whether `weighted_sum` can be had."""
        return not any(isinstance(leaf.term, Enclosed) for leaf in self.leaves)

    def squared_norms(self) -> list[Float[Array, " b"]]:
        """`‖G_i‖²` of each leaf, float32 or wider; by Gram matrices never less than that by rounding."""
        return [_squared_norm(leaf, self.arrays) for leaf in self.leaves]

    def weighted_sum(self, weights: Float[Array, " b"], dtype: Any = None) -> PyTree:
        """`Σ_i weights_i G_i`, summed in float32 or wider; returned as `dtype`, or each leaf in its own type.

        A weight of 0 takes an example out only where its factors are finite: `drop` the others first.
        """
        sums = [_contract(leaf.term, self.arrays, weights).astype(dtype or leaf.dtype) for leaf in self.leaves]
        return jax.tree.unflatten(self.tree, sums)

    def drop(self, dropped: Array) -> "Factored":
        """The same with every factor of the examples marked in `dropped` (b,) set to exactly 0, whatever it was."""

        def zero(array):
            return jnp.where(dropped.reshape(-1, *[1] * (array.ndim - 1)), jnp.zeros_like(array), array)

        return Factored(self.leaves, {var: zero(array) for var, array in self.arrays.items()}, self.tree)

    def explain(self) -> PyTree:
        """For each leaf one line: how its norm is taken, and why."""
        return jax.tree.unflatten(self.tree, [f"{leaf.norm}: {leaf.reason}" for leaf in self.leaves])


def _wide(dtype) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _squared_norm(leaf: Leaf, arrays) -> Array:
    if leaf.norm == "gram":
        return _gram(leaf.term, arrays)
    if leaf.norm == "inside":
        squares = arrays[leaf.term.var]
        return jnp.sum(squares.reshape(len(squares), -1), 1)
    names = list(dict.fromkeys(_kept(leaf.term)))

    def one(*example):
        return jnp.sum(jnp.square(_form(leaf.term, dict(zip(names, example)))))

    return jax.vmap(one)(*(arrays[name] for name in names))


def _gram(term: Term, arrays) -> Array:
    match term:
        case Product(lhs, rhs, ((lc, rc), (lb, rb))):
            left = _self_products(_positions_last(arrays[lhs], lb, lc))
            right = _self_products(_positions_last(arrays[rhs], rb, rc))
            # Where the terms of Σ_t a_t ⊗ δ_t cancel, rounding can hide most of the norm; (Σ‖a‖²)(Σ‖δ‖²) bounds the
            # squared terms, so this slack keeps an example from passing for small.
            slack = jnp.trace(left, axis1=2, axis2=3) * jnp.trace(right, axis1=2, axis2=3)
            return jnp.sum(left * right, (1, 2, 3)) + 4 * jnp.finfo(left.dtype).eps * jnp.sum(slack, 1)
        case Scaled(inner, factor):
            scale = factor if isinstance(factor, float) else arrays[factor].astype(jnp.float32)
            return _gram(inner, arrays) * scale**2
        case Linear(_, (inner,)):
            return _gram(inner, arrays)
    raise AssertionError(term)


def _positions_last(array, batch, contracted) -> Array:
    """(examples, batch, positions, features) of one operand of a product."""
    free = [i for i in range(array.ndim - 1) if i not in batch and i not in contracted]
    array = jnp.transpose(array, [0, *(i + 1 for i in (*batch, *contracted, *free))])
    sizes = [math.prod(array.shape[1 + a : 1 + b]) for a, b in _spans(len(batch), len(contracted), len(free))]
    return array.reshape(array.shape[0], *sizes)


def _spans(*lengths: int) -> list[tuple[int, int]]:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [(start, start + length) for start, length in zip(starts, lengths)]


def _self_products(array) -> Array:
    return jnp.einsum(
        "ebtd,ebsd->ebts",
        array,
        array,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=_wide(array.dtype),
    )


def _form(term: Term, example) -> Array:
    """The leaf of one example, in float32 or wider."""
    match term:
        case Value(var):
            return example[var].astype(_wide(example[var].dtype))
        case Product(lhs, rhs, numbers):
            return jax.lax.dot_general(
                example[lhs],
                example[rhs],
                numbers,
                precision=jax.lax.Precision.HIGHEST,
                preferred_element_type=_wide(example[lhs].dtype),
            )
        case Scaled(inner, factor):
            return _form(inner, example) * (factor if isinstance(factor, float) else example[factor])
        case Linear(eqn, terms):
            return _apply(eqn, [_form(part, example) for part in terms])
    raise AssertionError(term)


def _contract(term: Term, arrays, weights) -> Array:
    """`Σ_i weights_i G_i` of one leaf, in float32 or wider."""
    match term:
        case Value(var):
            array = arrays[var]
            return jnp.tensordot(weights.astype(_wide(array.dtype)), array.astype(_wide(array.dtype)), 1)
        case Product(lhs, rhs, ((lc, rc), (lb, rb))):
            left, right = (array.astype(_wide(array.dtype)) for array in (arrays[lhs], arrays[rhs]))
            if left.size <= right.size:
                left = _scale(left, weights)
            else:
                right = _scale(right, weights)
            examples_too = [(0, *(i + 1 for i in axes)) for axes in (lc, rc)]
            numbers = examples_too, [tuple(i + 1 for i in axes) for axes in (lb, rb)]
            return jax.lax.dot_general(left, right, numbers, precision=jax.lax.Precision.HIGHEST)
        case Scaled(inner, factor):
            return _contract(inner, arrays, weights * (factor if isinstance(factor, float) else arrays[factor]))
        case Linear(eqn, terms):
            return _apply(eqn, [_contract(part, arrays, weights) for part in terms])
    raise AssertionError(term)


def _scale(array, weights) -> Array:
    return array * weights.astype(array.dtype).reshape(-1, *[1] * (array.ndim - 1))


def _apply(eqn, operands: list[Array]) -> Array:
    """The linear operation of `eqn`, but without a conversion to a narrower type."""
    if eqn.primitive.name == "convert_element_type":
        return operands[0]
    return eqn.primitive.bind(*operands, **eqn.params)


def factored_vmap(fun: Callable, in_axes: Sequence[int | None], *, enclose: bool = False) -> Callable:
    """`jax.vmap(fun)` whose first output stays factored.

    Args:
        fun: maps the arguments of one example to `(tree, aux)`.
        in_axes: for each positional argument, 0 (an example axis comes first) or None.
        enclose: take the norm of a leaf that a scan or remat makes inside that body. Such a leaf has a norm but no
            `weighted_sum` (`Factored.has_sums` is false); without it, such a leaf is kept as a value.

    Returns:
        A function of the batched arguments that returns `(Factored, aux)`, `aux` with the example axis first.

    Raises:
        NotImplementedError: `fun` has effects such as `jax.debug.print`, which a shortened function would lose.
    """

    def mapped(*args):
        plan: dict[str, Any] = {}

        def one(*example):
            closed, (tree, aux) = jax.make_jaxpr(fun, return_shape=True)(*example)
            reader = _Reader(closed)
            shapes, structure = jax.tree.flatten(tree)
            leaves = [_plan(reader, var, SMALL, enclose) for var in reader.outvars[: len(shapes)]]
            others = reader.outvars[len(shapes) :]
            values = _evaluate(reader, leaves, others, jax.tree.leaves(example))
            plan.update(leaves=leaves, tree=structure, names=list(values))
            outputs = [_read(var, values) for var in others]
            return list(values.values()), jax.tree.unflatten(jax.tree.structure(aux), outputs)

        arrays, aux = jax.vmap(one, in_axes=tuple(in_axes))(*args)
        return Factored(plan["leaves"], dict(zip(plan["names"], arrays)), plan["tree"]), aux

    return mapped
