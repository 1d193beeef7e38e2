"""Book-keeping: per-example gradients in factored form, read off the jaxpr, so that they need never be formed.

A large per-example gradient is nearly always the last product of the backward pass, `G = Σ_t a_t ⊗ δ_t`, perhaps
transposed or reshaped, perhaps added to others. `factored_vmap` traces the function of *one* example, finds those
products and stops short of them: it keeps the factors `(a, δ)` of each large leaf, and the value of each small one.
It then maps the shortened function over the examples with `jax.vmap`, so the example axis comes first by construction,
whatever the sizes are. From the factors follow the norms and the weighted sum (`factors.py`).

Inside `scan` and `remat` the factors of one layer are alive only while that layer is at work; kept, they would undo
what remat saves. There the norms are taken inside the body, and the weighted sum needs a second pass, in which each
body contracts its own factors over the examples.

No layer is registered anywhere. What is not understood is kept as a value: slower, and always correct.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array, Bool, Float, PyTree

from maskdp_jax.factors import (
    MOVES,
    SUMS,
    Bare,
    Convolved,
    Enclosed,
    Linear,
    Product,
    Scaled,
    Scattered,
    Term,
    Value,
    bare,
    squared_norm,
)

INLINED = frozenset({"jit", "pjit", "closed_call"})
"""Calls whose body may stand in their place. Every other sub-jaxpr stays whole."""

REMAT = frozenset({"checkpoint", "remat", "remat2"})

SMALL = 4096
"""Leaves of fewer entries than this are kept as values: forming them costs less than two contractions."""


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
        used = [atom for eqn in self.eqns for atom in eqn.invars] + self.outvars
        self._uses = Counter(atom for atom in used if not isinstance(atom, core.Literal))

    def resolve(self, atom):
        while not isinstance(atom, core.Literal) and atom in self.same:
            atom = self.same[atom]
        return atom

    def _inline(self, jaxpr) -> None:
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in INLINED:
                self._replace(eqn, eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"])
            elif (product := _of_patches(eqn)) is not None:
                self._replace(eqn, product)
            else:
                self.eqns.append(eqn.replace(invars=[self.resolve(atom) for atom in eqn.invars]))

    def _replace(self, eqn, inner: core.ClosedJaxpr) -> None:
        body = _renamed(inner.jaxpr)
        self.constants.update(zip(body.constvars, inner.consts))
        self.same.update(zip(body.invars, eqn.invars))
        self._inline(body)
        self.same.update(zip(eqn.outvars, body.outvars))

    def term(self, atom) -> Term:
        """What `atom` is made of, as far as it is understood."""
        atom = self.resolve(atom)
        eqn = None if isinstance(atom, core.Literal) else self.made_by.get(atom)
        if eqn is None:
            return Value(atom)
        name, params = eqn.primitive.name, eqn.params
        match name:
            case "dot_general":
                return Product(*eqn.invars, params["dimension_numbers"])
            case "conv_general_dilated" if params["feature_group_count"] == params["batch_group_count"] == 1:
                return Convolved(*eqn.invars, eqn)
            case "scatter-add" if self._adds_rows(eqn):
                return Scattered(*eqn.invars[1:], eqn)
            case "mul" | "div":
                return self._scaled_term(eqn) or Value(atom)
            case "scan" if eqn.outvars.index(atom) >= params["num_carry"] and self._uses[atom] == 1:
                return Enclosed(atom)
        if name in REMAT and self._uses[atom] == 1:
            return Enclosed(atom)
        if name in MOVES and self._keeps_norm(eqn):
            inner = self.term(eqn.invars[0])
            if inner.factored and (not _enclosed(inner) or self._uses[atom] == 1):
                return Linear(eqn, (inner,))
        if name in SUMS and all(operand.aval.shape for operand in eqn.invars):
            parts = [self.term(operand) for operand in eqn.invars]
            if name == "reduce_sum" and isinstance(parts[0], Product):
                contracted = parts[0].with_batch_contracted(params["axes"])
                return contracted or Linear(eqn, tuple(parts))
            parts = [Value(self.resolve(a)) if _enclosed(part) else part for a, part in zip(eqn.invars, parts)]
            if any(part.factored for part in parts):
                return Linear(eqn, tuple(parts))
        return Value(atom)

    def _scaled_term(self, eqn) -> Scaled | None:
        """A factored term times (or over) a number or a scalar; None if `eqn` is anything else."""
        for inner, other in (eqn.invars, eqn.invars[::-1]):
            scalar, term = self._scalar(other), self.term(inner)
            if scalar is None or not term.factored or _enclosed(term):
                continue
            if eqn.primitive.name == "mul":
                return Scaled(term, scalar)
            if isinstance(scalar, float) and other is eqn.invars[1]:
                return Scaled(term, 1.0 / scalar)
        return None

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

    def _keeps_norm(self, eqn) -> bool:
        if eqn.primitive.name == "pad":
            return self._scalar(eqn.invars[1]) == 0.0 and min(min(edges) for edges in eqn.params["padding_config"]) >= 0
        return eqn.invars[0].aval.size == eqn.outvars[0].aval.size

    def _adds_rows(self, eqn) -> bool:
        numbers = eqn.params["dimension_numbers"]
        plain = not numbers.operand_batching_dims and not numbers.scatter_indices_batching_dims
        return plain and self._scalar(eqn.invars[0]) == 0.0

    def work_inside(self, leaves: Mapping[Any, int], weights: Any = None) -> None:
        """Rewrites the bodies that make the variables of `leaves`, so that each gives something else in its place.

        That is the squared norm (of each step), or with `weights`, a variable that holds one for each leaf, the
        gradient times weight `leaves[var]`, summed over the examples.
        """
        for position, eqn in enumerate(self.eqns):
            inside = {i: leaves[var] for i, var in enumerate(eqn.outvars) if var in leaves}
            if not inside:
                continue
            body = eqn.params["jaxpr"]
            closed = body if isinstance(body, core.ClosedJaxpr) else core.ClosedJaxpr(body, ())
            rewritten = _rewritten(closed, inside, weights)
            outvars, stacked = list(eqn.outvars), eqn.primitive.name == "scan"
            for i in inside:
                made = rewritten.out_avals[i]
                steps = (eqn.params["length"],) if stacked else ()
                outvars[i] = self.same[eqn.outvars[i]] = core.Var(made.update(shape=(*steps, *made.shape)))
            params = {**eqn.params, "jaxpr": rewritten if isinstance(body, core.ClosedJaxpr) else rewritten.jaxpr}
            invars = eqn.invars if weights is None else [weights, *eqn.invars]
            if stacked and weights is not None:
                params["num_consts"] += 1
                params |= {"linear": (False, *params["linear"])} if "linear" in params else {}
            self.eqns[position] = eqn.replace(params=params, invars=invars, outvars=outvars)

    def shortened(self, outvars: Sequence[Any], more: Sequence[Any]) -> core.ClosedJaxpr:
        """The jaxpr that computes just `outvars`, from its inputs and then those of `more`."""
        needed, wanted = [], set(outvars)
        for eqn in reversed(self.eqns):
            if any(var in wanted for var in eqn.outvars):
                needed.append(eqn)
                wanted.update(atom for atom in eqn.invars if not isinstance(atom, core.Literal))
        constants = {var: value for var, value in self.constants.items() if var in wanted}
        fields = {"constvars": list(constants), "invars": [*self.jaxpr.invars, *more], "outvars": list(outvars)}
        debug_info = self.jaxpr.debug_info._replace(arg_names=None, result_paths=None)
        jaxpr = self.jaxpr.replace(**fields, eqns=needed[::-1], debug_info=debug_info)
        return core.ClosedJaxpr(jaxpr, list(constants.values()))


def _renamed(jaxpr):
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


def _of_patches(eqn) -> core.ClosedJaxpr | None:
    """The kernel gradient of a convolution whose windows tile its input, as a product of patches; None otherwise."""
    if eqn.primitive.name != "conv_general_dilated":
        return None
    params, (lhs, rhs), out = eqn.params, eqn.invars, eqn.outvars[0]
    numbers, tile = params["dimension_numbers"], params["rhs_dilation"]
    (left_batch, left_feature, *left), (_, right_in, *right) = numbers.lhs_spec, numbers.rhs_spec
    grid = [rhs.aval.shape[i] for i in right]
    tiles = (
        params["feature_group_count"] == params["batch_group_count"] == 1
        and set(params["window_strides"]) | set(params["lhs_dilation"]) == {1}
        and not any(sum(params["padding"], ()))
        and tuple(out.aval.shape[i] for i in numbers.out_spec[2:]) == tuple(tile)
        and [lhs.aval.shape[i] for i in left] == [n * step for n, step in zip(grid, tile)]
    )
    if not tiles:
        return None

    def product(x, delta):
        x = jnp.transpose(x, (left_feature, left_batch, *left))
        sides = [side for pair in zip(grid, tile) for side in pair]
        x = x.reshape(*x.shape[:2], *sides)  # feature, batch, then of each axis: which tile, where in it
        which = tuple(range(2, x.ndim, 2))
        made = jax.lax.dot_general(x, delta, (((0, *which), (right_in, *right)), ((), ())))
        return jnp.transpose(made, _inverse((numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])))

    return jax.make_jaxpr(product)(_like(lhs), _like(rhs))


def _like(var) -> jax.ShapeDtypeStruct:
    """Stands for the value of `var` in a trace, inside `shard_map` too."""
    aval = var.aval
    sharding = None if aval.sharding.mesh.empty else aval.sharding
    options = {"weak_type": aval.weak_type, "sharding": sharding, "manual_axis_type": aval.manual_axis_type}
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, **options)


def _inverse(permutation: Sequence[int]) -> list[int]:
    return sorted(range(len(permutation)), key=permutation.__getitem__)


def _enclosed(term: Term) -> Any | None:
    """The variable of the scan or remat that `term` is an output of, but for moves; None if it is not."""
    match term:
        case Enclosed(var):
            return var
        case Linear(_, (inner,)):
            return _enclosed(inner)
    return None


# --- Leaves ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the per-example output: what it is made of, and how its norm is taken.

    Attributes:
        norm: `value` (it exists), `gram` (from Gram matrices), `form` (formed for some examples at a time, squared,
            dropped) or `inside` (in the body of its scan or remat).
        reason: why, for `explain`.
        core: what Gram matrices are taken of.
    """

    term: Term
    aval: Any
    norm: str
    reason: str
    core: Bare | None = None

    def squares(self, arrays: Mapping[Any, Array]) -> Float[Array, " b"]:
        """`‖G_i‖²`, float32 or wider."""
        if self.norm == "gram":
            found = self.core.core.gram(arrays) * self.core.number**2
            for scale in self.core.scales:
                found = found * jnp.square(arrays[scale].astype(found.dtype))
            return found
        if self.norm == "inside":
            squares = arrays[_enclosed(self.term)]
            return jnp.sum(squares, range(1, squares.ndim))
        return squared_norm(self.term, arrays, self.aval.size)


def _plan(reader: _Reader, var, small: int) -> Leaf:
    aval, size = var.aval, var.aval.size
    if size < small:
        return Leaf(Value(var), aval, "value", f"small ({size} entries)")
    term = reader.term(var)
    if not term.factored:
        made_by = reader.made_by.get(var)
        return Leaf(Value(var), aval, "value", f"made by {made_by.primitive.name if made_by else 'no operation'}")
    if _enclosed(term):
        return Leaf(term, aval, "inside", "where its scan or remat is at work")
    if term.entries >= 2 * size:
        return Leaf(Value(var), aval, "value", f"its factors have {term.entries} entries, itself {size}")
    if (found := bare(term)) is None:
        return Leaf(term, aval, "form", "a convolution or a sum of unlike products")
    if found.core.gram_is_cheaper():
        return Leaf(term, aval, "gram", f"{type(found.core).__name__.lower()} of {term.entries} entries", found)
    return Leaf(term, aval, "form", "Gram matrices would cost more")


def _evaluate(
    reader: _Reader, leaves: Iterable[Leaf], others: Sequence[Any], args, weights: Array | None = None
) -> dict[Any, Array]:
    """The value of every variable that the leaves and the other outputs need, for one example.

    Of enclosed leaves it is what `work_inside` puts in their place; weight k is for leaf k.
    """
    leaves = list(leaves)
    inside = {var: k for k, leaf in enumerate(leaves) if (var := _enclosed(leaf.term))}
    weights_var = None if weights is None else core.Var(jax.typeof(weights))
    reader.work_inside(inside, weights_var)
    wanted = [atom for leaf in leaves for atom in leaf.term.kept] + list(others)
    names = list(dict.fromkeys(atom for atom in wanted if not isinstance(atom, core.Literal)))
    made = [reader.resolve(name) for name in names]
    more = () if weights is None else (weights,)
    jaxpr = reader.shortened(made, () if weights is None else (weights_var,))
    return dict(zip(names, core.jaxpr_as_fun(jaxpr)(*args, *more)))


def _rewritten(closed: core.ClosedJaxpr, inside: Mapping[int, int], weights: Any) -> core.ClosedJaxpr:
    """`closed` with something else for each output in `inside`; see `_Reader.work_inside`."""
    avals = [_like(var) for var in closed.jaxpr.invars]

    def body(*args):
        weight, args = (None, args) if weights is None else (args[0], args[1:])
        reader = _Reader(closed)
        leaves = {i: _plan(reader, reader.outvars[i], 1) for i in inside}
        others = [var for i, var in enumerate(reader.outvars) if i not in leaves]
        own = None if weight is None else jnp.stack([weight[k] for k in inside.values()])
        values = _evaluate(reader, leaves.values(), others, args, own)
        outputs = [_read(var, values) if i not in leaves else None for i, var in enumerate(reader.outvars)]
        for k, (i, leaf) in enumerate(leaves.items()):
            if weight is None:
                outputs[i] = leaf.squares({name: value[None] for name, value in values.items()})[0]
            else:
                outputs[i] = _summed(leaf.term, values, own[k])
        return outputs

    return jax.make_jaxpr(body)(*([] if weights is None else [_like(weights)]), *avals)


def _summed(term: Term, values: Mapping[Any, Array], weight: Array) -> Array:
    """`weight · G` of one example; mapped over examples by `vmap` it is their sum, in one contraction."""
    if _enclosed(term):
        return _moved(term, values)
    names = tuple(dict.fromkeys(term.kept))

    @jax.custom_batching.custom_vmap
    def total(weight, *kept):
        formed = term.form(dict(zip(names, kept)))
        return formed * weight.astype(formed.dtype)

    @total.def_vmap
    def _(size, batched, weight, *kept):
        weight, *kept = (
            array if mapped else jnp.broadcast_to(array, (size, *array.shape))
            for array, mapped in zip((weight, *kept), batched)
        )
        return term.contract(dict(zip(names, kept)), weight, weight == 0), False

    return total(weight, *(values[name] for name in names))


def _moved(term: Term, values: Mapping[Any, Array]) -> Array:
    """The moves of an enclosed term, applied to the sum that stands in the place of its variable."""
    match term:
        case Enclosed(var):
            return values[var]
        case Linear(_, (inner,)):
            return term.apply([_moved(inner, values)])
    raise AssertionError(term)


def _read(atom, values: Mapping[Any, Array]) -> Array:
    return jnp.asarray(atom.val, atom.aval.dtype) if isinstance(atom, core.Literal) else values[atom]


# --- Gradients in factored form -------------------------------------------------------------------------------------


class Factored:
    """Per-example arrays `G_i`, the leaves of a pytree, kept in factored form. Made by `factored_vmap`.

    Attributes:
        leaves: what each is made of.
        tree: the structure.
    """

    def __init__(self, leaves: list[Leaf], tree, arrays: dict[Any, Array], again: Callable | None):
        self.leaves, self.tree, self._arrays, self._again = leaves, tree, arrays, again

    def squared_norms(self) -> list[Float[Array, " b"]]:
        """`‖G_i‖²` of each leaf, float32 or wider; by Gram matrices never less than that by rounding."""
        return [leaf.squares(self._arrays) for leaf in self.leaves]

    def weighted_sum(
        self, weights: Sequence[Float[Array, " b"]], dropped: Bool[Array, " b"] | None = None
    ) -> list[Array]:
        """`Σ_i weights[k]_i G_i` of the first leaves k, one for each of `weights`, float32 or wider.

        Args:
            weights: for each leaf one weight an example; 0 where `dropped`.
            dropped: examples that add exactly 0 whatever they hold; without it a weight of 0 takes an example out only
                where it is finite.
        """
        leaves, arrays = self.leaves[: len(weights)], self._arrays
        if any(_enclosed(leaf.term) for leaf in leaves):
            leaves, arrays = self._again(jnp.stack(weights, 1))
        return [
            _moved(leaf.term, arrays) if _enclosed(leaf.term) else leaf.term.contract(arrays, weight, dropped)
            for leaf, weight in zip(leaves, weights)
        ]

    def explain(self) -> PyTree:
        """For each leaf one line: how its norm is taken, and why."""
        return jax.tree.unflatten(self.tree, [f"{leaf.norm}: {leaf.reason}" for leaf in self.leaves])


def factored_vmap(fun: Callable, *, spmd_axis_name: Any = None) -> Callable:
    """`jax.vmap(fun)` whose first output stays factored.

    Args:
        fun: maps the arguments of one example to `(tree, aux)`.
        spmd_axis_name: of `jax.vmap`.

    Returns:
        A function of the batched arguments that returns `(Factored, aux)`, `aux` with the example axis first.

    Raises:
        NotImplementedError: `fun` has effects such as `jax.debug.print`, which a shortened function would lose.
    """

    def read(example):
        closed, (tree, aux) = jax.make_jaxpr(fun, return_shape=True)(*example)
        reader, (shapes, structure) = _Reader(closed), jax.tree.flatten(tree)
        leaves = [_plan(reader, var, SMALL) for var in reader.outvars[: len(shapes)]]
        return reader, leaves, structure, aux

    def mapped(*args):
        plan: dict[str, Any] = {}

        def factors(*example):
            reader, leaves, structure, aux = read(example)
            others = reader.outvars[len(leaves) :]
            values = _evaluate(reader, leaves, others, jax.tree.leaves(example))
            plan["factors"] = leaves, structure, list(values)
            outputs = [_read(var, values) for var in others]
            return list(values.values()), jax.tree.unflatten(jax.tree.structure(aux), outputs)

        def sums(weights, *example):
            reader, leaves, *_ = read(example)
            leaves = leaves[: len(weights)]
            values = _evaluate(reader, leaves, (), jax.tree.leaves(example), weights)
            inside = {var for leaf in leaves if (var := _enclosed(leaf.term))}
            plan["sums"] = (
                leaves,
                [var for var in values if var in inside],
                [var for var in values if var not in inside],
            )
            return tuple([values[var] for var in names] for names in plan["sums"][1:])

        def again(weights: Float[Array, "b leaves"]) -> tuple[list[Leaf], dict[Any, Array]]:
            made = jax.vmap(sums, out_axes=(None, 0), spmd_axis_name=spmd_axis_name)(weights, *args)
            leaves, *names = plan["sums"]
            return leaves, dict(zip(itertools.chain(*names), itertools.chain(*made)))

        arrays, aux = jax.vmap(factors, spmd_axis_name=spmd_axis_name)(*args)
        leaves, structure, names = plan["factors"]
        return Factored(leaves, structure, dict(zip(names, arrays)), again), aux

    return mapped


def formed_vmap(fun: Callable, *, spmd_axis_name: Any = None) -> Callable:
    """`factored_vmap` that forms every leaf: `jax.vmap`, in the same clothes."""

    def mapped(*args):
        tree, aux = jax.vmap(fun, spmd_axis_name=spmd_axis_name)(*args)
        arrays, structure = jax.tree.flatten(tree)
        variables = [core.Var(jax.typeof(array).update(shape=array.shape[1:])) for array in arrays]
        leaves = [Leaf(Value(var), var.aval, "value", "asked for") for var in variables]
        return Factored(leaves, structure, dict(zip(variables, arrays)), None), aux

    return mapped
