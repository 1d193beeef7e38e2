"""Book-keeping: per-example gradients in factored form, read off the jaxpr, so that they need never be formed.

A large per-example gradient is nearly always the last product of the backward pass, `G = Σ_t a_t ⊗ δ_t`, perhaps
transposed or reshaped, perhaps added to others. `weighted_sum` traces the function of *one* example, finds those
products and stops short of them: it keeps the factors `(a, δ)` of each large leaf, and the value of each small one.
It then maps the shortened function over the examples with `jax.vmap`, so the example axis comes first by construction,
whatever the sizes are. From the factors follow the norms and the weighted sum (`factors.py`). An optimization barrier
behind each kept array makes both read the same rounded values.

Examples whose positions cancel, or whose factors are extreme, cannot be measured so: their bounds of rounding
(`factors.py`) are as large as their norms. If there is one in the batch, a branch forms the arrays of a few examples at
a time, measures them and adds those of such examples. How an example is treated depends on itself alone.

Inside `scan` and `remat` the factors of one layer exist only while that layer is computed; kept, they would undo
what remat saves. There the norms are taken inside the body, and the weighted sum needs a second pass, in which each
body contracts its own factors over the examples. Both passes are one compiled program, run twice, so that the factors
of the second are those of the first to the bit.

No layer is registered anywhere. What is not understood is kept as a value: slower, and always correct.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array, Bool, Float, PyTree

from maskdp_jax.factors import (
    LARGEST_WEIGHT,
    LEAST_WEIGHT,
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
    bounds,
    in_parts,
    joint_norm,
    norm_of_array,
    paired,
    varying_axes,
    varying_tree,
    weighted,
    zeros_like,
)

INLINED = frozenset({"jit", "pjit", "closed_call"})
"""Calls whose body may stand in their place. Every other sub-jaxpr stays whole."""

REMAT = frozenset({"checkpoint", "remat", "remat2"})

SMALL = 4096
"""Leaves of fewer entries than this are kept as values: forming them costs less than two contractions."""

PRECISION = 1e-2
"""Largest part by which an example's norm may be overestimated; if it may be more, the example is formed."""

DEEPEST = 100
"""Operations between a leaf and its products that are followed; longer chains of sums are kept as values."""


# --- Reading a jaxpr ------------------------------------------------------------------------------------------------


def refuse_collectives(closed: core.ClosedJaxpr) -> None:
    """Raises ValueError if a function of one example reads others, on other devices."""
    for eqn in _innermost(closed.jaxpr):
        if eqn.primitive.name != "axis_index" and any(map(_is_collective, eqn.effects)):
            axes = eqn.params.get("axes", eqn.params.get("axis_name"))
            raise ValueError(
                f"{eqn.primitive.name} over {axes} in a per-example function: it mixes records, so no clip norm would "
                "bound what one of them adds. Take the collective of the clipped sum instead; parameters that are "
                "closed over and differentiated must be arguments."
            )


def _innermost(jaxpr) -> Iterator[Any]:
    """All equations that hold no others."""
    for eqn in jaxpr.eqns:
        inner = list(core.jaxprs_in_params(eqn.params))
        if not inner:
            yield eqn
        for body in inner:
            yield from _innermost(getattr(body, "jaxpr", body))


def _is_collective(effect) -> bool:
    return type(effect).__name__ == "NamedAxisEffect"


class _Reader:
    """A jaxpr with its calls inlined, and the equation that made each variable."""

    def __init__(self, closed: core.ClosedJaxpr):
        if effects := [effect for effect in closed.effects if not _is_collective(effect)]:
            raise NotImplementedError(f"per-example function with effects {effects}: they would be lost")
        self.jaxpr = closed.jaxpr
        self.eqns: list[Any] = []
        self.constants = dict(zip(closed.jaxpr.constvars, closed.consts))
        self.same: dict[Any, Any] = {}
        self._inline(closed.jaxpr)
        self.made_by = {var: eqn for eqn in self.eqns for var in eqn.outvars}
        self.outvars = [self._variable(self.resolve(var)) for var in closed.jaxpr.outvars]
        used = [atom for eqn in self.eqns for atom in eqn.invars] + self.outvars
        self._uses = Counter(atom for atom in used if not isinstance(atom, core.Literal))
        self._terms: dict[Any, Term] = {}
        self._depth = 0

    def _variable(self, atom):
        """A literal as a constant."""
        if not isinstance(atom, core.Literal):
            return atom
        var = core.Var(atom.aval)
        self.constants[var] = jnp.asarray(atom.val, atom.aval.dtype)
        return var

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
        if isinstance(atom, core.Literal) or self._depth > DEEPEST or not _is_real(atom):
            return Value(atom)
        if atom not in self._terms:
            self._depth += 1
            self._terms[atom] = self._read(atom)
            self._depth -= 1
        return self._terms[atom]

    def _read(self, atom) -> Term:
        eqn = self.made_by.get(atom)
        if eqn is None:
            return Value(atom)
        name, params = eqn.primitive.name, eqn.params
        match name:
            case "dot_general" if all(_is_real(operand) and operand.aval.shape for operand in eqn.invars):
                return Product(*eqn.invars, params["dimension_numbers"])
            case "conv_general_dilated" if params["feature_group_count"] == params["batch_group_count"] == 1:
                return Convolved(*eqn.invars, eqn) if all(map(_is_real, eqn.invars)) else Value(atom)
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
            return self._sum(eqn) or Value(atom)
        return Value(atom)

    def _sum(self, eqn) -> Term | None:
        """The term of one of SUMS; None if there is nothing to leave undone."""
        parts = [self.term(operand) for operand in eqn.invars]
        if eqn.primitive.name == "reduce_sum" and isinstance(parts[0], Product):
            contracted = parts[0].with_batch_contracted(eqn.params["axes"])
            return contracted or Linear(eqn, tuple(parts))
        parts = [Value(self.resolve(a)) if _enclosed(part) else part for a, part in zip(eqn.invars, parts)]
        if any(isinstance(part, Value) and isinstance(part.var, core.Literal) for part in parts):
            return None
        if len(parts) == 2 and (pair := paired(*parts, -1.0 if eqn.primitive.name == "sub" else 1.0)):
            return pair
        return Linear(eqn, tuple(parts)) if any(part.factored for part in parts) else None

    def _scaled_term(self, eqn) -> Scaled | None:
        """A factored term times (or over) a number or a scalar; None if `eqn` is anything else."""
        for inner, other in (eqn.invars, eqn.invars[::-1]):
            if (scalar := self._scalar(other)) is None:
                continue
            term = self.term(inner)
            if not term.factored or _enclosed(term):
                continue
            if eqn.primitive.name == "mul":
                return Scaled(term, scalar)
            if isinstance(scalar, float) and scalar and other is eqn.invars[1]:
                return Scaled(term, 1.0 / scalar)
        return None

    def _scalar(self, atom):
        """The number or scalar variable that `atom` is, or is a broadcast of; None if it is neither."""
        atom = self.resolve(atom)
        if isinstance(atom, core.Literal):
            return float(atom.val) if atom.aval.shape == () and _is_real(atom) else None
        if atom.aval.shape == ():
            return atom if _is_real(atom) else None
        eqn = self.made_by.get(atom)
        if eqn is not None and (eqn.primitive.name == "broadcast_in_dim" or _widens(eqn)):
            return self._scalar(eqn.invars[0])
        return None

    def _keeps_norm(self, eqn) -> bool:
        if eqn.primitive.name == "pad":
            return self._scalar(eqn.invars[1]) == 0.0 and min(min(edges) for edges in eqn.params["padding_config"]) >= 0
        return eqn.invars[0].aval.size == eqn.outvars[0].aval.size and _is_real(eqn.invars[0])

    def _adds_rows(self, eqn) -> bool:
        numbers = eqn.params["dimension_numbers"]
        plain = not numbers.operand_batching_dims and not numbers.scatter_indices_batching_dims
        return plain and self._scalar(eqn.invars[0]) == 0.0

    def with_work_inside(self, leaves: Mapping[Any, int], phase: "_Phase") -> tuple[list[Any], dict[Any, tuple]]:
        """The equations, with other bodies where they make the variables of `leaves` (variable: number of the leaf).

        In place of each variable these give two, which are returned too: the norm with its bounds (3,), of each step,
        and the sum over the examples with the weights in `phase`.
        """
        eqns, made = list(self.eqns), {}
        for position, eqn in enumerate(eqns):
            inside = {i: leaves[var] for i, var in enumerate(eqn.outvars) if var in leaves}
            if not inside:
                continue
            body = eqn.params["jaxpr"]
            closed = body if isinstance(body, core.ClosedJaxpr) else core.ClosedJaxpr(body, ())
            rewritten = _rewritten(closed, inside, phase)
            stacked = eqn.primitive.name == "scan"
            steps = (eqn.params["length"],) if stacked else ()
            outvars = [core.Var(aval.update(shape=(*steps, *aval.shape))) for aval in rewritten.out_avals]
            own, more = outvars[: len(eqn.outvars)], outvars[len(eqn.outvars) :]
            made |= {eqn.outvars[i]: (own[i], more[k]) for k, i in enumerate(inside)}
            outvars = [own[i] if i in inside else var for i, var in enumerate(eqn.outvars)] + more
            params = {**eqn.params, "jaxpr": rewritten if isinstance(body, core.ClosedJaxpr) else rewritten.jaxpr}
            if stacked:
                params["num_consts"] += len(phase)
                params |= {"linear": (*(False for _ in phase), *params["linear"])} if "linear" in params else {}
            eqns[position] = eqn.replace(params=params, invars=[*phase, *eqn.invars], outvars=outvars)
        return eqns, made

    def shortened(self, eqns: Sequence[Any], outvars: Sequence[Any], more: Sequence[Any]) -> core.ClosedJaxpr:
        """The jaxpr that computes just `outvars`, from its inputs and then those of `more`."""
        needed, wanted = [], set(outvars)
        for eqn in reversed(eqns):
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


def _is_real(atom) -> bool:
    return jnp.issubdtype(atom.aval.dtype, jnp.floating)


def _widens(eqn) -> bool:
    """Whether it is a conversion that keeps every value."""
    if eqn.primitive.name != "convert_element_type" or not _is_real(eqn.invars[0]):
        return False
    before, after = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    return jnp.promote_types(before, after) == after


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

    def bounds(self, arrays: Mapping[Any, Array]) -> tuple[Array, Array, Array]:
        """`‖G_i‖`, and how much more `sum` may add for the example: by roundoff, and by what underflowed."""
        return bounds(self.term, arrays, self.aval.size, self.core)

    def sum(self, arrays: Mapping[Any, Array], weights: Float[Array, " b"]) -> Array:
        """`Σ_i weights_i G_i`, float32 or wider."""
        return self.term.contract(arrays, weights).astype(jnp.promote_types(self.aval.dtype, jnp.float32))

    def __str__(self) -> str:
        return f"{self.norm}: {self.reason}"


def _plan(reader: _Reader, var, small: int) -> Leaf:
    aval, size = var.aval, var.aval.size
    if size < max(small, 1):
        return Leaf(Value(var), aval, "value", f"small ({size} entries)")
    term = reader.term(var)
    if not term.factored:
        made_by = reader.made_by.get(var)
        return Leaf(Value(var), aval, "value", f"made by {made_by.primitive.name if made_by else 'no operation'}")
    if _enclosed(term):
        return Leaf(term, aval, "inside", "where its scan or remat is computed")
    if term.entries >= 2 * size:
        return Leaf(Value(var), aval, "value", f"its factors have {term.entries} entries, itself {size}")
    if (found := bare(term)) is None:
        return Leaf(term, aval, "form", "a convolution or a sum of unlike products")
    if found.core.gram_is_cheaper():
        name = type(found.core).__name__.lower()
        return Leaf(term, aval, "gram", f"{name} of {term.entries} entries; formed where its positions cancel", found)
    return Leaf(term, aval, "form", "Gram matrices would cost more")


# The inputs that tell a rewritten body what to do: pass (0: norms, 1: sums), the same for all examples; and of this
# example the weight for each leaf.
_Phase = tuple[Any, Any]


def _evaluate(reader: _Reader, leaves: Sequence[Leaf], others: Sequence[Any], args, phase: _Phase) -> tuple:
    """For one example: `(arrays, bounds, sums, others)`.

    `arrays` has what the leaves are made of, the next two are of each enclosed leaf, by number.
    """
    inside = {var: k for k, leaf in enumerate(leaves) if (var := _enclosed(leaf.term))}
    given = tuple(core.Var(jax.typeof(part)) for part in phase)
    eqns, made = reader.with_work_inside(inside, given)
    kept = [var for leaf in leaves if not _enclosed(leaf.term) for var in leaf.term.kept]
    names = list(dict.fromkeys((*kept, *others, *(var for several in made.values() for var in several))))
    jaxpr = reader.shortened(eqns, [reader.resolve(name) for name in names], given)
    values = dict(zip(names, core.jaxpr_as_fun(jaxpr)(*args, *phase)))
    found = {k: joint_norm(values[made[var][0]].reshape(-1, 3)) for var, k in inside.items()}
    sums = {k: _moved(leaves[k].term, values[made[var][1]]) for var, k in inside.items()}
    return {name: values[name] for name in dict.fromkeys(kept)}, found, sums, [values[var] for var in others]


def _rewritten(closed: core.ClosedJaxpr, inside: Mapping[int, int], phase: _Phase) -> core.ClosedJaxpr:
    """`closed` with something else for each output in `inside`; see `_Reader.with_work_inside`."""

    def body(turn, weights, *args):
        reader = _Reader(closed)
        leaves = {i: _plan(reader, reader.outvars[i], 1) for i in inside}
        rest = [i for i in range(len(reader.outvars)) if i not in leaves]
        weights, plans = jnp.stack([weights[k] for k in inside.values()]), list(leaves.values())
        others = [reader.outvars[i] for i in rest]
        arrays, found, sums, others = _evaluate(reader, plans, others, args, (turn, weights))
        for k, leaf in enumerate(plans):
            if k not in found:
                found[k], sums[k] = _one_of_two(leaf, arrays, turn, weights[k])
        outputs = dict(zip(rest, others)) | {i: found[k] for k, i in enumerate(leaves)}
        return *(outputs[i] for i in range(len(reader.outvars))), *(sums[k] for k in range(len(plans)))

    return jax.make_jaxpr(body)(*map(_like, phase), *(_like(var) for var in closed.jaxpr.invars))


def _one_of_two(leaf: Leaf, arrays: Mapping[Any, Array], turn, weight) -> tuple[Array, Array]:
    """Of one example the norm with its bounds (3,), and `weight·G`; in each pass one of them, the other 0.

    Mapped over examples by `vmap`, the latter becomes their sum, in one contraction.
    """
    names = tuple(dict.fromkeys(leaf.term.kept))

    @jax.custom_batching.custom_vmap
    def both(turn, weight, *kept):
        found, total = of_all(turn, weight[None], [array[None] for array in kept])
        return found[0], total

    @both.def_vmap
    def _(size, batched, turn, *rest):
        each = zip(rest, batched[1:])
        weights, *kept = (array if mapped else jnp.broadcast_to(array, (size, *array.shape)) for array, mapped in each)
        return of_all(turn, weights, kept), (True, False)

    def of_all(turn, weights, kept):
        arrays = dict(zip(names, map(jax.lax.optimization_barrier, kept)))
        found = lambda: jnp.stack(leaf.bounds(arrays), 1)  # noqa: E731
        total = lambda: leaf.sum(arrays, weights)  # noqa: E731
        none = zeros_like(jax.eval_shape(lambda: (found(), total())))
        return jax.lax.cond(turn == 0, lambda: (found(), none[1]), lambda: (none[0], total()))

    return both(turn, weight, *(arrays[name] for name in names))


def _moved(term: Term, total: Array) -> Array:
    """The moves of an enclosed term, applied to the sum that takes the place of its variable."""
    match term:
        case Enclosed():
            return total
        case Linear(_, (inner,)):
            return term.apply([_moved(inner, total)])
    raise AssertionError(term)


# --- Sums -----------------------------------------------------------------------------------------------------------


def weighted_sum(
    fun: Callable,
    weigh: Callable[[Bool[Array, " b"], PyTree], tuple[PyTree, PyTree]],
    skipped: Bool[Array, " b"],
    examples: Sequence[PyTree],
    *,
    form_all: bool = False,
    spmd_axis_name: Any = None,
) -> tuple[PyTree, PyTree, PyTree]:
    """`Σ_i w_i G_i` of a function of one example, with weights that depend on the norms ‖G_i‖.

    Guarantees:
        No example adds more than w_i times its norm as `weigh` was told it, but for rounding of the sum of them all.
        What an example adds depends on itself alone. An example of weight 0 adds exactly 0, whatever it holds.

    Args:
        fun: maps the arguments of one example to `(G, aux)`, G a tree.
        weigh: `skipped` and norms (b,) of the leaves, a tree like G -> weights, a tree like G, and joint norms, any
            tree. Both (b,) and of each example alone.
        skipped: examples whose weight will be 0.
        examples: arguments of `fun`, the example axis first.
        form_all: form every leaf.
        spmd_axis_name: of `jax.vmap`.

    Returns:
        The sums, float32 or wider; joint norms; and `aux`, the example axis first.

    Raises:
        ValueError: there is a collective in `fun`.
        NotImplementedError: `fun` has effects such as `jax.debug.print`, which a shortened function would lose.
    """
    traced = _Traced(fun, examples, form_all, spmd_axis_name)
    leaves, inside = traced.leaves, any(leaf.norm == "inside" for leaf in traced.leaves)
    as_tree = functools.partial(jax.tree.unflatten, traced.structure)
    mapped = functools.partial(jax.vmap, spmd_axis_name=spmd_axis_name)

    def formed_sums(sums, weights, skipped, examples):
        """Of arrays that are formed: their sums added to `sums`, weights and joint norms from their norms, aux.

        The weights of the sums are those that follow from the norms, unless given.
        """
        arrays, aux = mapped(traced.form)(*examples)
        arrays = [jax.lax.optimization_barrier(array) for array in arrays]
        own, norms = weigh(skipped, as_tree([norm_of_array(array) for array in arrays]))
        own = jax.tree.leaves(own)
        more = [jnp.sum(weighted(array, weight), 0) for array, weight in zip(arrays, weights or own)]
        return [a + b.astype(a.dtype) for a, b in zip(sums, more)] if sums else more, own, norms, aux

    if all(isinstance(leaf.term, Value) for leaf in leaves):
        sums, _, *rest = formed_sums(None, None, skipped, examples)
        return as_tree(sums), *rest

    def every(turn: int | Array, weights: Float[Array, "b leaves"]):
        """Of all examples: arrays; bounds and sums of enclosed leaves by number; aux."""
        names: list[Any] = []

        def one(turn, weights, example):
            arrays, *rest = traced.evaluate(example, (turn, weights))
            names[:] = arrays
            return list(arrays.values()), *rest

        kept, *rest = mapped(one, (None, 0, 0), (0, 0, None, 0))(jnp.asarray(turn), weights, examples)
        return dict(zip(names, map(jax.lax.optimization_barrier, kept))), *rest

    def weighed(arrays, found):
        """Weights (b, leaves), 0 for examples in doubt; joint norms; which are in doubt."""
        found = [tuple(found[k].T) if k in found else leaf.bounds(arrays) for k, leaf in enumerate(leaves)]
        (least, norms), (_, rounded), (weights, _) = (
            weigh(skipped, as_tree([sum(bounds[:count]) for bounds in found])) for count in (1, 2, 3)
        )
        sure = jnp.isfinite(sum(map(sum, found)))
        for low, high in zip(jax.tree.leaves(norms), jax.tree.leaves(rounded)):
            sure &= high <= (1 + PRECISION) * low
        for high, weight in zip(jax.tree.leaves(least), jax.tree.leaves(weights)):
            high, weight = jnp.abs(high), jnp.abs(weight)
            sure &= (high <= (1 + PRECISION) * weight) & (weight <= LARGEST_WEIGHT)
            sure &= (weight >= LEAST_WEIGHT) | (weight == 0)
        doubt = ~sure & ~skipped
        weights = jnp.stack([jnp.where(doubt, 0, weight) for weight in jax.tree.leaves(weights)], 1)
        return weights, norms, doubt

    def totals(arrays, sums, weights):
        found = [sums[k] if k in sums else leaf.sum(arrays, weights[:, k]) for k, leaf in enumerate(leaves)]
        return varying_tree(found, varying_axes(skipped))

    def with_formed(sums, norms, doubt):
        """Sums with the examples in doubt added, and joint norms with theirs."""

        def add(sums, part):
            """The first turn gives the weights, and the second the sums: one program run twice, a leaf at a time."""
            doubt, skipped, example = part

            def again(_, state):
                (sums, weights, _), kept = jax.lax.optimization_barrier((state, example))
                sums, weights, norms, _ = formed_sums(sums, weights, skipped, kept)
                return sums, [jnp.where(doubt, weight, 0) for weight in weights], norms

            shapes = jax.eval_shape(lambda: formed_sums(sums, None, skipped, example)[1:3])
            sums, _, norms = jax.lax.fori_loop(0, 2, again, (sums, *zeros_like(shapes)))
            return sums, norms

        sums, own = jax.lax.scan(add, sums, in_parts((doubt, skipped, examples), 1))
        own = jax.tree.map(lambda norm: norm.reshape(len(skipped)), own)
        return sums, jax.tree.map(lambda norm, own: jnp.where(doubt, own, norm), norms, own)

    dtype = jnp.result_type(jnp.float32, *(jnp.abs(jnp.zeros((), leaf.aval.dtype)).dtype for leaf in leaves))
    none = jnp.zeros(len(leaves), dtype) * skipped[:, None]
    if not inside:
        arrays, *_, aux = every(0, none)
        weights, norms, doubt = weighed(arrays, {})
        sums = totals(arrays, {}, weights)
        sums, norms = _cond(jnp.any(doubt), lambda: with_formed(sums, norms, doubt), lambda: (sums, norms))
        return as_tree(sums), norms, aux

    def turn(state):
        number, chosen, sums, aux = state

        def passes():
            arrays, found, inner, aux = every(number, chosen[0].astype(dtype))
            measure = lambda: (weighed(arrays, found), sums)  # noqa: E731
            add = lambda: (chosen, totals(arrays, inner, chosen[0]))  # noqa: E731
            return *jax.lax.cond(number == 0, measure, add), aux

        def last():
            weights, norms, doubt = chosen
            total, norms = with_formed(sums, norms, doubt)
            return (weights, norms, doubt), total, aux

        return number + 1, *jax.lax.cond(number == 2, last, passes)

    def first():
        arrays, found, inner, aux = every(0, none)
        chosen = weighed(arrays, found)
        return chosen, totals(arrays, inner, chosen[0]), aux

    start = jnp.int32(0), *zeros_like(jax.eval_shape(first))
    _, (_, norms, _), sums, aux = jax.lax.while_loop(lambda state: state[0] < 2 + jnp.any(state[1][2]), turn, start)
    return as_tree(sums), norms, aux


def _cond(chosen: Bool[Array, ""], yes: Callable, no: Callable) -> Any:
    """`jax.lax.cond`, but without a compilation at every call outside `jit`."""
    return jax.lax.cond(chosen, yes, no) if isinstance(chosen, jax.core.Tracer) else (yes if chosen else no)()


def explain(fun: Callable, examples: Sequence[PyTree], *, form_all: bool = False, spmd_axis_name: Any = None) -> PyTree:
    """For each leaf of `weighted_sum` one line: how its norm is taken, and why. Nothing is computed."""
    traced = _Traced(fun, examples, form_all, spmd_axis_name)
    return jax.tree.unflatten(traced.structure, [str(leaf) for leaf in traced.leaves])


class _Traced:
    """A function of one example, traced once.

    Attributes:
        structure: of its first output.
        leaves: what each leaf of that is made of.
    """

    def __init__(self, fun: Callable, examples: Sequence[PyTree], form_all: bool, spmd_axis_name: Any):
        def trace(*example):
            self._closed, (tree, aux) = jax.make_jaxpr(fun, return_shape=True)(*example)
            self.structure, self._aux = jax.tree.structure(tree), jax.tree.structure(aux)

        jax.eval_shape(jax.vmap(trace, spmd_axis_name=spmd_axis_name), *examples)
        refuse_collectives(self._closed)
        count = self.structure.num_leaves
        self._reader = None if form_all else _Reader(self._closed)
        if form_all:
            self.leaves = [
                Leaf(Value(var), var.aval, "value", "asked for") for var in self._closed.jaxpr.outvars[:count]
            ]
        else:
            self.leaves = [_plan(self._reader, var, SMALL) for var in self._reader.outvars[:count]]

    def form(self, *example: PyTree) -> tuple[list[Array], PyTree]:
        """All leaves, and aux."""
        values = core.jaxpr_as_fun(self._closed)(*jax.tree.leaves(example))
        count = len(self.leaves)
        return values[:count], jax.tree.unflatten(self._aux, values[count:])

    def evaluate(self, example: Sequence[PyTree], phase: _Phase) -> tuple:
        """`_evaluate` of all leaves, with aux as a tree."""
        others = self._reader.outvars[len(self.leaves) :]
        *found, others = _evaluate(self._reader, self.leaves, others, jax.tree.leaves(example), phase)
        return *found, jax.tree.unflatten(self._aux, others)
