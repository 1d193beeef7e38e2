import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import jax_privacy.clipping
import numpy as np
import pytest

from maskdp_jax.clipping import clipped_grad, clipped_sum

rng = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32), "b": jnp.zeros(3)}
BATCH = {
    "x": jnp.asarray(rng.normal(size=(12, 5)) * np.logspace(-2, 2, 12)[:, None], jnp.float32),
    "y": jnp.asarray(rng.integers(0, 3, 12)),
}


def loss(params, example):
    logits = jnp.tanh(example["x"]) @ params["w"] + params["b"] + (example["x"] ** 2).sum() * params["b"]
    return -jax.nn.log_softmax(logits)[example["y"]]


gradient = jax.grad(loss)
one = jax.jit(gradient)
summed = jax.jit(clipped_sum, static_argnums=0, static_argnames=("l2_clip_norm", "microbatch_size"))


def rows(batch, index):
    return jax.tree.map(lambda x: x[jnp.asarray(index)], batch)


def norm(tree) -> float:
    return float(np.sqrt(sum((np.asarray(leaf, np.float64) ** 2).sum() for leaf in jax.tree.leaves(tree))))


def oracle(batch, clip):
    """Float64, one example at a time."""
    total, norms = {k: np.zeros(v.shape) for k, v in PARAMS.items()}, []
    for i in range(len(batch["y"])):
        term = {k: np.asarray(v, np.float64) for k, v in one(PARAMS, rows(batch, i)).items()}
        norms.append(norm(term))
        total = {k: total[k] + min(1, clip / norms[-1]) * term[k] for k in total}
    return total, np.array(norms)


def assert_close(left, right, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), left, right)


@pytest.mark.parametrize(("clip", "microbatch_size"), [(0.1, None), (0.1, 4), (1e6, 1)])
def test_matches_one_example_at_a_time(clip, microbatch_size):
    total, norms = jax.jit(lambda p, b: summed(gradient, p, b, l2_clip_norm=clip, microbatch_size=microbatch_size))(
        PARAMS, BATCH
    )
    expected, exact_norms = oracle(BATCH, clip)
    np.testing.assert_allclose(norms, exact_norms, rtol=1e-5)
    assert_close(total, expected, rtol=1e-3, atol=3e-5 * clip * 12 if clip < 1e3 else 1e-2)


@pytest.mark.parametrize("keep_batch_dim", [False, True])
def test_drops_in_for_jax_privacy(keep_batch_dim):
    fun = (lambda p, e: loss(p, jax.tree.map(lambda x: x[0], e))) if keep_batch_dim else loss
    options = dict(l2_clip_norm=0.5, keep_batch_dim=keep_batch_dim, normalize_by=4.0, return_grad_norms=True)
    padding = jnp.arange(12) >= 10
    total, norms = jax.jit(clipped_grad(fun, **options))(PARAMS, BATCH, is_padding_example=padding)
    theirs, aux = jax.jit(jax_privacy.clipping.clipped_grad(fun, **options))(PARAMS, BATCH, is_padding_example=padding)
    assert_close(total, theirs, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(norms[:10], aux.grad_norms[:10], rtol=1e-5)


def test_every_term_is_within_the_clip_norm():
    """In float64, with nothing to spare for rounding."""
    for i in range(12):
        for clip in (0.01, 0.3, 3.0):
            total, _ = summed(gradient, PARAMS, rows(BATCH, [i]), l2_clip_norm=clip)
            assert norm(total) <= clip


def test_sensitivity_of_neighbours():
    """A vanished record moves the sum by at most C; one swapped for another by at most 2C, and nearly that."""
    clip, most = 0.7, 0.0
    opposite = {"x": BATCH["x"], "s": jnp.where(jnp.arange(12) == 0, -1.0, 1.0)}
    signed = lambda p, e: jax.tree.map(lambda g: e["s"] * g, gradient(p, {"x": e["x"], "y": 0}))  # noqa: E731
    total = lambda batch, gone: summed(signed, PARAMS, batch, l2_clip_norm=clip, is_padding=gone)[0]  # noqa: E731
    for i in range(12):
        everyone = total(opposite, jnp.zeros(12, bool))
        without = total(opposite, jnp.arange(12) == i)
        swapped = total({**opposite, "s": opposite["s"].at[i].multiply(-1)}, jnp.zeros(12, bool))
        assert norm(jax.tree.map(jnp.subtract, everyone, without)) <= clip * (1 + 1e-5)
        moved = norm(jax.tree.map(jnp.subtract, everyone, swapped))
        assert moved <= 2 * clip * (1 + 1e-5)
        most = max(most, moved)
    assert most > 1.9 * clip


def direct(_, example):
    return {"w": example["x"][:, None] * jnp.ones(3), "b": example["x"][:3]}


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e25])
@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_what_is_not_finite_contributes_exactly_zero(poison, microbatch_size):
    """The sum is, to the bit, that with the record replaced by one whose gradient is 0; 1e25 overflows the norm."""
    bad, zero = ({**BATCH, "x": BATCH["x"].at[4, 2].set(poison)}, {**BATCH, "x": BATCH["x"].at[4].set(0)})
    total, norms = summed(direct, PARAMS, bad, l2_clip_norm=1.0, microbatch_size=microbatch_size)
    expected, _ = summed(direct, PARAMS, zero, l2_clip_norm=1.0, microbatch_size=microbatch_size)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, total, expected))
    assert norms[4] == 0


def test_padding_contributes_exactly_zero_even_if_it_is_nan():
    padding = jnp.isin(jnp.arange(12), jnp.array([0, 5, 11]))
    poisoned = {**BATCH, "x": jnp.where(padding[:, None], jnp.nan, BATCH["x"])}
    total, norms = summed(gradient, PARAMS, poisoned, l2_clip_norm=1.0, is_padding=padding)
    clean, _ = summed(gradient, PARAMS, rows(BATCH, np.flatnonzero(~padding)), l2_clip_norm=1.0)
    assert_close(total, clean, rtol=1e-6, atol=1e-6)
    assert np.all(np.asarray(norms)[np.asarray(padding)] == 0)


def test_empty_batch_is_exactly_zero():
    total, norms = summed(gradient, PARAMS, BATCH, l2_clip_norm=1.0, is_padding=jnp.ones(12, bool))
    assert all(not leaf.any() for leaf in jax.tree.leaves((total, norms)))


def test_sums_are_float32_whatever_the_compute_type():
    """A thousand ones: in bfloat16 the sum would stay at 256, and so would the norm of a thousand ones."""
    ones = jnp.ones((1000, 1000), jnp.bfloat16)
    total, norms = summed(lambda p, example: example, (), ones, l2_clip_norm=1e6)
    assert total.dtype == norms.dtype == jnp.float32
    assert np.all(total == 1000)
    np.testing.assert_allclose(norms, 1000**0.5, rtol=1e-6)


def test_norms_of_long_vectors():
    """Ten million coordinates: a naive float32 sum would drift."""
    long = jnp.asarray(np.random.default_rng(1).normal(size=(2, 10_000_000)), jnp.float32)
    _, norms = summed(lambda p, example: example, (), long, l2_clip_norm=1.0)
    np.testing.assert_allclose(norms, np.linalg.norm(np.asarray(long, np.float64), axis=1), rtol=1e-6)


def test_a_huge_clip_norm_is_the_ordinary_gradient():
    total, _ = summed(gradient, PARAMS, BATCH, l2_clip_norm=1e9)
    plain = jax.grad(lambda p: jax.vmap(loss, (None, 0))(p, BATCH).sum())(PARAMS)
    assert_close(total, plain, rtol=1e-4, atol=1e-2)


def test_refuses_what_it_cannot_do():
    for options in (dict(l2_clip_norm=0.0), dict(l2_clip_norm=np.inf), dict(l2_clip_norm=1.0, microbatch_size=5)):
        with pytest.raises(ValueError):
            clipped_sum(gradient, PARAMS, BATCH, **options)
    with pytest.raises(ValueError, match="batch axis"):
        clipped_grad(loss, argnums=1, l2_clip_norm=1.0)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from maskdp_jax.clipping import clipped_sum
rng = np.random.default_rng(0)
batch = jnp.asarray(rng.normal(size=(16, 6)), jnp.float32)
params = jnp.asarray(rng.normal(size=6), jnp.float32)
gradient = jax.grad(lambda p, x: jnp.sin(p @ x) * 3)
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
for micro in (None, 2):
    def local(p, x):
        total, norms = clipped_sum(gradient, p, x, l2_clip_norm=1.0, microbatch_size=micro)
        return jax.lax.psum(total, "data"), norms
    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P("data"))))
    total, norms = sharded(params, batch)
    expected, exact = clipped_sum(gradient, params, batch, l2_clip_norm=1.0)
    np.testing.assert_allclose(norms, exact, rtol=1e-5)
    np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-5)
"""


def test_clips_before_any_collective():
    """On four devices the norms and the sum are those of one."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", SHARDED], env=environment, check=True, timeout=120)
