"""Per-example clipping: Σ_i min(1, C/‖g_i‖) · g_i, without forming the g_i that are large.

`clipped_fun` takes any function of one example (a gradient, the difference of two, a mean over clips), `clipped_grad` a
loss. Both have the call shape of `jax_privacy.clipping`'s functions of those names and can stand in their place.
"""

import dataclasses
import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from dp_accounting import NeighboringRelation
from jaxtyping import Array, Bool, Float, PyTree

from maskdp_jax import bookkeeping
from maskdp_jax.factors import joint_norm, norm_of_array, varying_axes, varying_tree, zeros_like

Method = Literal["auto", "bookkeeping", "vmap"]

_ROUNDING = 5e-6  # float32 norms are good to about 1e-6; the margin keeps the true norm of a term within C


class AuxiliaryOutput(NamedTuple):
    """Per example, and not private: losses, norms of gradients before clipping, and the aux of the loss; or None."""

    values: Any
    grad_norms: Any
    aux: Any


@dataclasses.dataclass(frozen=True)
class Clipped:
    """A clipped function, with the interface of `jax_privacy`'s `BoundedSensitivityCallable`.

    Attributes:
        fun: the function that is called.
        l2_norm_bound: the norm of what one example adds to the sum at most.
        has_aux: whether `fun` returns more than the sum, as the second of a pair.
        explain: arguments -> tree like the first output, a line for each leaf: `value`, `gram`, `form` or `inside`, and
            why (`bookkeeping.Leaf`). Nothing is computed.
    """

    fun: Callable[..., Any]
    l2_norm_bound: Any
    has_aux: bool
    explain: Callable[..., PyTree]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fun(*args, **kwargs)

    def sensitivity(self, neighboring_relation: NeighboringRelation = NeighboringRelation.REPLACE_SPECIAL) -> Any:
        """L2 sensitivity of the sum: the bound; twice that where an example may be replaced by any other."""
        if not isinstance(neighboring_relation, NeighboringRelation):
            raise ValueError(f"neighboring_relation: {neighboring_relation!r}, expected a NeighboringRelation")
        return (2 if neighboring_relation == NeighboringRelation.REPLACE_ONE else 1) * self.l2_norm_bound


def clipped_fun(
    fun: Callable,
    has_aux: bool = False,
    *,
    batch_argnums: int | Sequence[int] = 0,
    keep_batch_dim: bool = True,
    l2_clip_norm: float | Array | PyTree = 1.0,
    rescale_to_unit_norm: bool = False,
    normalize_by: float = 1.0,
    return_norms: bool = False,
    microbatch_size: int | None = None,
    nan_safe: bool = True,
    dtype: Any = None,
    prng_argnum: int | None = None,
    spmd_axis_name: Any = None,
    method: Method = "auto",
    automatic: float | None = None,
) -> Clipped:
    """A function that clips what `fun` makes of each example and sums over the examples.

        Σ_i w_i · fun(example_i) / normalize_by,    w_i = min(1, C/‖fun(example_i)‖)

    Guarantees:
        One example changes the sum by at most C (`l2_norm_bound`: C / normalize_by) if it is left out, padded or zero,
        and by twice that if it is another. With a tree of clip norms, C is √Σ C_k².
        The norm is taken of exactly the array that is summed: same factors, same rounding, same rearrangement. So this
        holds to 1e-5 at any scale of float32 and bfloat16, whatever cancels within a record, for sums of few examples;
        a float32 sum of n terms rounds by up to n·6e-8·C more. What one example adds does not depend on the others.
        Where rounding hides part of a norm, clipping assumes up to 1 % more than the norm that is returned; an example
        that would need more is formed instead. A norm so far below C that it cannot matter may be returned as 0.
        An example marked as padding, or whose value holds a NaN, an infinity or a norm beyond its type, contributes
        exactly 0, chosen by `where`. (`jax_privacy` 2.0 zeroes only the coordinates that are not finite.) Norms and
        sums are float32 or wider whatever the types of `fun`, and their contractions take the highest precision; C is
        undershot by 5e-6 of its size, so that rounding does not take a term beyond it.
        Microbatches change rounding only. Inside `shard_map` the terms are clipped before any collective: arguments
        that are the same on all devices are made varying first, or their gradients would be summed over devices inside
        `grad`. Norms and aux are per example and not private.

    Args:
        fun: (*args, **kwargs) -> tree, or (tree, aux) with `has_aux`. Keyword arguments have an example axis too.
        batch_argnums: positional arguments with an example axis in front.
        keep_batch_dim: `fun` gets examples with a leading axis of 1; otherwise without it. Whatever belongs to one
            record (all its clips) is one example.
        l2_clip_norm: C, or a tree prefix of the output with one clip norm for each subtree, clipped on its own.
        rescale_to_unit_norm: divide by C after clipping.
        normalize_by: divide the sum by this public constant.
        return_norms: return the norms (b,) before clipping too; a tree of them for a tree of clip norms.
        microbatch_size: examples held at once; must divide their number. Those of padding alone are skipped.
        nan_safe: False lets what is not finite through.
        dtype: of the sum; by default that of `fun`'s output, float32 at least. A narrower one voids the guarantee.
        prng_argnum: an argument that is a key, to be split over the examples. The key of an example then follows from
            its place in the batch: where a record must keep its randomness, pass keys as data.
        spmd_axis_name: of `jax.vmap`.
        method: `bookkeeping` keeps large leaves in factored form; `vmap` forms them all; `auto` is `bookkeeping`, but
            `vmap` for functions with effects such as `jax.debug.print`.
        automatic: γ of automatic clipping, w_i = C/(‖fun(example_i)‖ + γ) (arXiv 2206.07136).

    Returns:
        A function of the arguments of `fun` and `is_padding_example` (b,) that returns the sum; with `has_aux` or
        `return_norms`: (sum, aux), (sum, norms) or (sum, (aux, norms)).

    Raises:
        ValueError: C is negative, `normalize_by` or γ not above 0, the microbatch does not divide the batch, or there
            is a collective in `fun`.
        NotImplementedError: `bookkeeping` of a function with effects.
        TypeError: when the clipped function is differentiated. Its clip weights are not meant to be.
    """
    norms_of = _Norms(l2_clip_norm, rescale_to_unit_norm, automatic, nan_safe)
    if not normalize_by > 0:
        raise ValueError(f"normalize_by: {normalize_by}, it must be > 0")
    if method not in ("auto", "bookkeeping", "vmap"):
        raise ValueError(f"method: {method!r}, expected auto, bookkeeping or vmap")
    batch_argnums = _as_tuple(batch_argnums)
    if not batch_argnums:
        raise ValueError("batch_argnums must not be empty")

    def split(args, kwargs):
        """What belongs to the examples, how many there are, and what makes `fun` a function of one of them."""
        if max(batch_argnums) >= len(args):
            raise ValueError(f"batch_argnums: {batch_argnums}, unable to find so many among {len(args)} arguments")
        batched = {i: args[i] for i in batch_argnums}
        sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves((batched, kwargs))}
        if len(sizes) != 1 or sizes == {()}:
            raise ValueError("batch_argnums: arguments differ in the size of their batch axis, or have none")
        ((size,),) = sizes
        if prng_argnum is not None:
            batched[prng_argnum] = jax.tree.map(lambda key: jax.random.split(key, size), args[prng_argnum])
        axes = frozenset().union(*map(varying_axes, jax.tree.leaves((batched, kwargs))))
        fixed = [None if i in batched else varying_tree(arg, axes) for i, arg in enumerate(args)]

        def one(batched, kwargs):
            full = list(fixed)
            for i, arg in batched.items():
                full[i] = _lifted(arg) if keep_batch_dim and i in batch_argnums else arg
            return _with_aux(fun, has_aux)(*full, **kwargs)

        return one, (batched, kwargs), size, axes

    def weighted_sum(one, weigh, padding, examples):
        options = {"spmd_axis_name": spmd_axis_name}
        try:
            if method != "vmap":
                return bookkeeping.weighted_sum(one, weigh, padding, examples, **options)
        except NotImplementedError:
            if method == "bookkeeping":
                raise
        return bookkeeping.weighted_sum(one, weigh, padding, examples, form_all=True, **options)

    def clipped_fn(*args, is_padding_example=None, **kwargs):
        one, examples, size, axes = split(args, kwargs)
        padding = jnp.zeros(size, bool) if is_padding_example is None else jnp.asarray(is_padding_example, bool)
        padding = varying_tree(padding, axes)

        def microbatch(padding, examples):
            return weighted_sum(one, norms_of, padding, examples)

        total, norms, aux = _in_microbatches(microbatch, padding, examples, microbatch_size)
        total = jax.tree.map(lambda leaf: (leaf / normalize_by).astype(dtype or leaf.dtype), total)
        total = _not_differentiable(total)
        if keep_batch_dim:
            aux = jax.tree.map(lambda x: jnp.squeeze(x, 1) if x.ndim >= 2 and x.shape[1] == 1 else x, aux)
        match has_aux, return_norms:
            case False, False:
                return total
            case False, True:
                return total, norms
            case True, False:
                return total, aux
        return total, (aux, norms)

    def explain(*args, is_padding_example=None, **kwargs):
        one, examples, *_ = split(args, kwargs)
        ways = functools.partial(bookkeeping.explain, one, examples, spmd_axis_name=spmd_axis_name)
        try:
            return ways(form_all=method == "vmap")
        except NotImplementedError:
            if method == "bookkeeping":
                raise
            return ways(form_all=True)

    return Clipped(clipped_fn, norms_of.bound / normalize_by, has_aux or return_norms, explain)


def clipped_grad(
    fun: Callable,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    l2_clip_norm: float | Array | PyTree,
    batch_argnums: int | Sequence[int] = 1,
    return_values: bool = False,
    return_grad_norms: bool = False,
    pre_clipping_transform: Callable[[PyTree], PyTree] | None = None,
    **options: Any,
) -> Clipped:
    """Like `jax.grad` of a per-example loss, each example's gradient clipped and the results summed.

    Guarantees:
        Those of `clipped_fun`, for ∇fun or what `pre_clipping_transform` makes of it.

    Args:
        fun: -> loss, or (loss, aux) with `has_aux`.
        argnums: the arguments to differentiate in.
        l2_clip_norm, batch_argnums: as in `clipped_fun`.
        return_values, return_grad_norms: return losses, and norms of the gradients before transform and clipping.
        pre_clipping_transform: applied to each example's gradient before it is clipped.
        options: all others of `clipped_fun`.

    Returns:
        A function of the arguments of `fun` and `is_padding_example` (b,) that returns the sum; with `has_aux`,
        `return_values` or `return_grad_norms`: (sum, `jax_privacy`'s `AuxiliaryOutput`), its fields (b, …) or None.
    """
    both = _as_tuple(argnums), _as_tuple(batch_argnums)
    if min(sum(both, ()), default=0) < 0 or set(both[0]) & set(both[1]):
        raise ValueError(
            f"argnums {argnums}, batch_argnums {batch_argnums}: expected numbers from 0 up, with no overlap"
        )
    gradient = jax.value_and_grad(_with_aux(fun, has_aux), argnums, has_aux=True)
    transformed = return_grad_norms and pre_clipping_transform is not None

    def grad_fn(*args, **kwargs):
        (value, aux), grad = gradient(*args, **kwargs)
        norm = (
            joint_norm(jnp.stack([norm_of_array(leaf[None])[0] for leaf in jax.tree.leaves(grad)]))
            if transformed
            else None
        )
        return pre_clipping_transform(grad) if pre_clipping_transform else grad, (value, norm, aux)

    clipped = clipped_fun(
        grad_fn,
        has_aux=True,
        batch_argnums=batch_argnums,
        l2_clip_norm=l2_clip_norm,
        return_norms=return_grad_norms,
        **options,
    )
    returns_aux = has_aux or return_values or return_grad_norms

    def clipped_fn(*args, **kwargs):
        total, rest = clipped.fun(*args, **kwargs)
        if not returns_aux:
            return total
        (value, before, aux), norms = rest if return_grad_norms else (rest, None)
        return total, AuxiliaryOutput(
            values=value if return_values else None,
            grad_norms=before if transformed else norms,
            aux=aux if has_aux else None,
        )

    return Clipped(clipped_fn, clipped.l2_norm_bound, returns_aux, clipped.explain)


@dataclasses.dataclass(frozen=True)
class _Norms:
    """From factored examples to their norms and clip weights."""

    clip_norms: float | Array | PyTree
    rescale: bool
    automatic: float | None
    nan_safe: bool

    def __post_init__(self):
        for clip in jax.tree.leaves(self.clip_norms):
            if isinstance(clip, numbers.Real) and not clip >= 0:
                raise ValueError(f"l2_clip_norm: {clip}, expected a number from 0 up")
        if self.automatic is not None and not self.automatic > 0:
            raise ValueError(f"automatic: {self.automatic}, expected a number above 0")

    @property
    def bound(self) -> Any:
        """The norm of one clipped example at most."""
        clips = [1.0 if self.rescale else clip for clip in jax.tree.leaves(self.clip_norms)]
        return clips[0] if len(clips) == 1 else sum(clip**2 for clip in clips) ** 0.5

    def __call__(self, padding: Bool[Array, " b"], found: PyTree) -> tuple[PyTree, PyTree]:
        """From the norm of every leaf: clip weights of every leaf, and norms like `clip_norms`."""
        clips, structure = jax.tree.flatten(self.clip_norms)
        groups = jax.tree.leaves(jax.tree.broadcast(jax.tree.unflatten(structure, range(len(clips))), found))
        parts = [[] for _ in clips]
        for group, norm in zip(groups, jax.tree.leaves(found)):
            parts[group].append(norm)
        zero = jnp.zeros(padding.shape, jnp.float32) * padding
        norms = [joint_norm(jnp.stack([zero, *part])) for part in parts]
        finite = functools.reduce(jnp.logical_and, map(jnp.isfinite, norms))
        instead = 0 if self.nan_safe else jnp.nan
        weights = [jnp.where(finite, self._weight(norm, clip), instead) for norm, clip in zip(norms, clips)]
        weights = [jnp.where(padding, 0, weight) for weight in weights]
        norms = jax.tree.unflatten(structure, [norm.astype(jnp.float32) for norm in norms])
        return jax.tree.unflatten(jax.tree.structure(found), [weights[group] for group in groups]), norms

    def _weight(self, norm: Float[Array, " b"], clip: float | Array) -> Float[Array, " b"]:
        info = jnp.finfo(norm.dtype)
        clip = jnp.asarray(clip, norm.dtype)
        within = clip * (1 - (_ROUNDING if norm.dtype == jnp.float32 else 64 * info.eps))
        if self.automatic is not None:
            return within / (norm + self.automatic) / (clip if self.rescale else 1)
        weight = jnp.minimum(1, within / jnp.maximum(norm, info.tiny))
        if self.rescale:
            return jnp.where(clip > 0, weight / clip, 1 / jnp.maximum(norm, info.tiny))
        return weight


def _in_microbatches(
    fun: Callable, padding: Bool[Array, " b"], examples: PyTree, size: int | None
) -> tuple[PyTree, PyTree, PyTree]:
    """`fun(padding, examples) -> (sum, norms, aux)` over microbatches of `size`, one after the other."""
    total = len(padding)
    if size is None or size >= total:
        return fun(padding, examples)
    if size < 1 or total % size:
        raise ValueError(f"microbatch_size: {size} does not divide the batch of {total}")
    parts = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), (padding, examples))
    empty = zeros_like(jax.eval_shape(fun, *jax.tree.map(lambda x: x[0], parts)))

    def add(sums, part):
        more, *rows = jax.lax.cond(jnp.all(part[0]), lambda *_: empty, fun, *part)
        return jax.tree.map(jnp.add, sums, more), rows

    sums, rows = jax.lax.scan(add, empty[0], parts)
    return sums, *jax.tree.map(lambda x: x.reshape(total, *x.shape[2:]), rows)


@jax.custom_jvp
def _not_differentiable(tree: PyTree) -> PyTree:
    return tree


@_not_differentiable.defjvp
def _(primals, tangents):
    raise TypeError("a clipped sum cannot be differentiated: its clip weights are not meant to be")


def _with_aux(fun: Callable, has_aux: bool) -> Callable:
    return fun if has_aux else lambda *args, **kwargs: (fun(*args, **kwargs), ())


def _lifted(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[None], tree)


def _as_tuple(numbers: int | Sequence[int]) -> tuple[int, ...]:
    return (numbers,) if isinstance(numbers, int) else tuple(numbers)
