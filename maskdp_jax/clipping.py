"""Per-example clipping: Σ_i min(1, C/‖g_i‖) · g_i, with the norms.

`clipped_sum` takes any per-example vector (a gradient, the difference of two, a mean over clips); `clipped_grad` has
the call shape of `jax_privacy.clipping.clipped_grad`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from maskdp_jax.bookkeeping import factored_vmap

_ROUNDING = 1 - 1e-5  # float32 norms are good to about 1e-6; the margin keeps the true norm of a term within C


def clipped_sum(
    grad_fn: Callable[[Any, Any], Any],
    params: Any,
    batch: Any,
    *,
    l2_clip_norm: float,
    is_padding: Bool[Array, " batch"] | None = None,
    microbatch_size: int | None = None,
) -> tuple[Any, Float32[Array, " batch"]]:
    """The sum over a batch of `grad_fn(params, example)`, each clipped to `l2_clip_norm`, and the norms before.

    Guarantees:
        One example changes the sum by at most `l2_clip_norm` if it is left out, padded or zero, and by twice that if it
        is another. An example with `is_padding`, or whose vector holds a NaN, an infinity or a norm beyond float32,
        contributes exactly 0, chosen by `where`; its norm is reported as 0. Norms and sums are float32 whatever the
        parameters are, and their contractions take the highest precision. Microbatches change rounding only. Inside
        `shard_map` the terms are clipped before any collective: parameters that are the same on all devices are made
        varying first, or their gradients would be summed over devices inside `grad`.
        The norms are per example and not private.

    Args:
        grad_fn: (params, example) -> tree; `example` is `batch` without its leading axis. Whatever belongs to one
            record (all its clips) is one example: average inside.
        params: tree, the same for every example.
        batch: tree of arrays with a leading batch axis.
        l2_clip_norm: C.
        is_padding: (B,) rows to be left out, e.g. empty slots and records whose two views are equal.
        microbatch_size: examples held at once; must divide B.

    Raises:
        ValueError: C is not a positive number, or the microbatch does not divide the batch.
    """
    if not 0 < l2_clip_norm < float("inf"):
        raise ValueError(f"l2_clip_norm: {l2_clip_norm}, expected a number above 0")
    size = jax.tree.leaves(batch)[0].shape[0]
    if is_padding is None:
        is_padding = jnp.zeros(size, jnp.bool_)
    axes = frozenset().union(*map(_varying_axes, jax.tree.leaves((batch, is_padding))))
    params = jax.tree.map(functools.partial(_varying, axes=axes), params)

    def microbatch(examples, padding):
        gradients, _ = factored_vmap(lambda p, example: (grad_fn(p, example), ()), (None, 0))(params, examples)
        squares = sum(gradients.squared_norms()).astype(jnp.float32)
        finite = jnp.isfinite(squares) & (squares >= 0)
        counts = ~padding & finite
        norms = jnp.sqrt(jnp.where(counts, squares, 0))
        scales = jnp.minimum(1, l2_clip_norm * _ROUNDING / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny))
        weights = jnp.where(counts, scales, 0)  # times factors that are finite: exactly 0
        total = jax.lax.cond(
            jnp.all(finite),
            lambda: gradients.weighted_sum(weights, jnp.float32),
            lambda: gradients.drop(~counts).weighted_sum(weights, jnp.float32),
        )
        return total, norms

    if microbatch_size is None or microbatch_size >= size:
        return microbatch(batch, is_padding)
    if microbatch_size < 1 or size % microbatch_size:
        raise ValueError(f"microbatch_size: {microbatch_size} does not divide the batch of {size}")
    parts = jax.tree.map(lambda x: x.reshape(-1, microbatch_size, *x.shape[1:]), (batch, is_padding))
    shapes, _ = jax.eval_shape(microbatch, *jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda leaf: _varying(jnp.zeros(leaf.shape, leaf.dtype), axes=axes), shapes)

    def add(total, part):
        more, norms = microbatch(*part)
        return jax.tree.map(jnp.add, total, more), norms

    total, norms = jax.lax.scan(add, zeros, parts)
    return total, norms.reshape(size)


def clipped_grad(
    fun: Callable[..., Array],
    argnums: int = 0,
    *,
    l2_clip_norm: float,
    normalize_by: float = 1.0,
    batch_argnums: int | Sequence[int] = 1,
    keep_batch_dim: bool = True,
    return_grad_norms: bool = False,
    microbatch_size: int | None = None,
) -> Callable[..., Any]:
    """Like `jax.grad` of a per-example loss, each example's gradient clipped and the results summed.

    The call shape, defaults and meaning are those of `jax_privacy.clipping.clipped_grad`; the returned function takes
    `is_padding_example` too.

    Guarantees:
        Those of `clipped_sum`, divided by `normalize_by`, which must be a public constant.
    """
    batch_argnums = (batch_argnums,) if isinstance(batch_argnums, int) else tuple(batch_argnums)
    if argnums in batch_argnums:
        raise ValueError(f"argnums {argnums} has a batch axis")

    def clipped_fn(*args, is_padding_example=None, **kwargs):
        batch = {i: args[i] for i in batch_argnums}

        def grad_fn(params, example):
            if keep_batch_dim:
                example = jax.tree.map(lambda x: x[None], example)
            full = [example.get(i, arg) for i, arg in enumerate(args)]
            full[argnums] = params
            return jax.grad(fun, argnums)(*full, **kwargs)

        total, norms = clipped_sum(
            grad_fn,
            args[argnums],
            batch,
            l2_clip_norm=l2_clip_norm,
            is_padding=is_padding_example,
            microbatch_size=microbatch_size,
        )
        total = jax.tree.map(lambda leaf: leaf / normalize_by, total)
        return (total, norms) if return_grad_norms else total

    return clipped_fn


def _varying_axes(leaf: Array) -> frozenset:
    """The mesh axes over which `leaf` differs between devices, inside `shard_map`."""
    return jax.typeof(leaf).manual_axis_type.varying


def _varying(leaf: Array, axes: frozenset) -> Array:
    missing = tuple(sorted(axes - _varying_axes(leaf)))
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf
