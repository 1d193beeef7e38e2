import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import jax_privacy.clipping
import numpy as np
import pytest

from maskdp_jax import bookkeeping
from maskdp_jax.clipping import clipped_fun, clipped_grad

BOTH = clipped_fun, jax_privacy.clipping.clipped_fun

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


def clipped_sum(grad_fn, params, batch, *, is_padding=None, **options):
    """Float32 sum and norms of `grad_fn(params, example)`."""
    fun = clipped_fun(grad_fn, batch_argnums=1, keep_batch_dim=False, return_norms=True, dtype=jnp.float32, **options)
    return fun(params, batch, is_padding_example=is_padding)


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
    total, ours = jax.jit(clipped_grad(fun, **options))(PARAMS, BATCH, is_padding_example=padding)
    theirs, aux = jax.jit(jax_privacy.clipping.clipped_grad(fun, **options))(PARAMS, BATCH, is_padding_example=padding)
    assert_close(total, theirs, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours.grad_norms, aux.grad_norms, rtol=1e-5)
    assert ours.values is ours.aux is aux.values is aux.aux is None


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


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_what_is_not_finite_contributes_exactly_zero(poison, microbatch_size):
    """The sum is, to the bit, that with the record replaced by one whose gradient is 0; at 3e38 the norm overflows."""
    bad, zero = ({**BATCH, "x": BATCH["x"].at[4, 2].set(poison)}, {**BATCH, "x": BATCH["x"].at[4].set(0)})
    total, norms = summed(direct, PARAMS, bad, l2_clip_norm=1.0, microbatch_size=microbatch_size)
    expected, _ = summed(direct, PARAMS, zero, l2_clip_norm=1.0, microbatch_size=microbatch_size)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, total, expected))
    assert not np.isfinite(norms[4])


def test_padding_contributes_exactly_zero_even_if_it_is_nan():
    padding = jnp.isin(jnp.arange(12), jnp.array([0, 5, 11]))
    poisoned = {**BATCH, "x": jnp.where(padding[:, None], jnp.nan, BATCH["x"])}
    total, _ = summed(gradient, PARAMS, poisoned, l2_clip_norm=1.0, is_padding=padding)
    clean, _ = summed(gradient, PARAMS, rows(BATCH, np.flatnonzero(~padding)), l2_clip_norm=1.0)
    assert_close(total, clean, rtol=1e-6, atol=1e-6)


def test_empty_batch_is_exactly_zero():
    total, _ = summed(gradient, PARAMS, BATCH, l2_clip_norm=1.0, is_padding=jnp.ones(12, bool))
    assert all(not leaf.any() for leaf in jax.tree.leaves(total))
    total, norms = summed(gradient, PARAMS, rows(BATCH, np.arange(0)), l2_clip_norm=1.0)
    assert all(not leaf.any() for leaf in jax.tree.leaves(total))
    assert norms.shape == (0,)


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
    for options in (dict(l2_clip_norm=-1.0), dict(normalize_by=0.0), dict(automatic=0.0), dict(method="ghost")):
        with pytest.raises(ValueError, match=next(iter(options))):
            clipped_fun(gradient, **options)
    with pytest.raises(ValueError, match="does not divide"):
        clipped_sum(gradient, PARAMS, BATCH, l2_clip_norm=1.0, microbatch_size=5)
    with pytest.raises(ValueError, match="overlap"):
        clipped_grad(loss, argnums=1, l2_clip_norm=1.0)
    with pytest.raises(TypeError, match="differentiated"):
        jax.grad(lambda p: clipped_sum(gradient, p, BATCH, l2_clip_norm=1.0)[0]["w"].sum())(PARAMS)


def wide_loss(params, x):
    return jnp.sum(jnp.tanh(x @ params["in"]) @ params["out"] + params["bias"]) ** 2


WIDE = {
    "in": jnp.asarray(rng.normal(size=(80, 90)), jnp.float32),
    "out": jnp.asarray(rng.normal(size=(90, 70)), jnp.float32),
    "bias": jnp.zeros(70),
}
POSITIONS = jnp.asarray(rng.normal(size=(6, 4, 80)) * np.logspace(-3, 0, 6)[:, None, None], jnp.float32)
options = dict(l2_clip_norm=1.0, keep_batch_dim=False)


def test_both_methods_say_the_same_and_explain_themselves():
    ways = clipped_grad(wide_loss, **options).explain(WIDE, POSITIONS)
    assert ways["in"].startswith("gram")
    assert ways["bias"].startswith("value: small")
    formed = clipped_grad(wide_loss, method="vmap", **options)
    assert all(way.startswith("value") for way in jax.tree.leaves(formed.explain(WIDE, POSITIONS)))
    assert_close(
        jax.jit(clipped_grad(wide_loss, **options))(WIDE, POSITIONS),
        jax.jit(formed)(WIDE, POSITIONS),
        rtol=1e-5,
        atol=1e-5,
    )


def test_effects_are_kept_by_forming_every_leaf_and_refused_by_bookkeeping():
    seen = []

    def told(params, x):
        jax.debug.callback(lambda v: seen.append(float(v)), x[0, 0])
        return wide_loss(params, x)

    with pytest.raises(NotImplementedError, match="effects"):
        clipped_grad(told, method="bookkeeping", **options)(WIDE, POSITIONS)
    jax.block_until_ready(clipped_grad(told, **options)(WIDE, POSITIONS))
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(seen), sorted(np.asarray(POSITIONS[:, 0, 0])))


def test_float32_keeps_to_the_oracle_in_float64():
    """Norms and gradients of float32 against those of float64, one example at a time: to 1e-5."""
    clipped = jax.jit(clipped_grad(wide_loss, return_grad_norms=True, **options))
    total, aux = clipped(WIDE, POSITIONS)
    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), (WIDE, POSITIONS))
        formed = jax.vmap(jax.grad(wide_loss), (None, 0))(params, x)
        norms = np.sqrt(sum(np.sum(np.square(g).reshape(6, -1), 1) for g in jax.tree.leaves(formed)))
        weights = np.minimum(1, 1 / norms)
        exact = jax.tree.map(lambda g: np.tensordot(weights, g, 1), formed)
    np.testing.assert_allclose(aux.grad_norms, norms, rtol=1e-5)
    difference = norm(jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, total, exact))
    assert difference <= 1e-5 * norm(exact)


def test_each_group_keeps_to_its_own_clip_norm():
    clips = {"in": 0.5, "out": 0.2, "bias": 1e-3}
    fun = clipped_grad(wide_loss, l2_clip_norm=clips, keep_batch_dim=False, return_grad_norms=True)
    total, aux = jax.jit(fun)(WIDE, POSITIONS)
    assert fun.l2_norm_bound == pytest.approx((0.5**2 + 0.2**2 + 1e-6) ** 0.5)
    formed = jax.vmap(jax.grad(wide_loss), (None, 0))(WIDE, POSITIONS)
    for name, clip in clips.items():
        norms = np.linalg.norm(np.asarray(formed[name], np.float64).reshape(6, -1), axis=1)
        expected = np.tensordot(np.minimum(1, clip / norms), formed[name], 1)
        np.testing.assert_allclose(aux.grad_norms[name], norms, rtol=1e-5)
        np.testing.assert_allclose(total[name], expected, rtol=1e-3, atol=2e-5 * clip)


def test_automatic_clipping():
    """C/(‖g‖ + γ): no example reaches C, and none is left out however small (arXiv 2206.07136)."""
    fun = clipped_grad(wide_loss, automatic=0.01, **options)
    for i in range(6):
        alone = POSITIONS[i : i + 1]
        size = norm(jax.vmap(jax.grad(wide_loss), (None, 0))(WIDE, alone))
        assert norm(fun(WIDE, alone)) == pytest.approx(size / (size + 0.01), rel=2e-5)


def test_one_compilation_serves_all_batches():
    traced = []

    def counted(params, x):
        traced.append(x.shape)
        return wide_loss(params, x)

    fun = jax.jit(clipped_grad(counted, **options))
    fun(WIDE, POSITIONS)
    count = len(traced)
    fun(WIDE, POSITIONS * 2)
    assert len(traced) == count


def test_microbatches_of_padding_are_skipped():
    """Their loss would not even be finite; the sum is that of the others to the bit."""
    poisoned, padding = POSITIONS.at[4:].set(jnp.nan), jnp.arange(6) >= 4
    fun = jax.jit(clipped_grad(wide_loss, microbatch_size=2, return_values=True, **options))
    total, aux = fun(WIDE, poisoned, is_padding_example=padding)
    expected, _ = fun(WIDE, POSITIONS, is_padding_example=padding)
    jax.tree.map(np.testing.assert_array_equal, total, expected)
    np.testing.assert_array_equal(aux.values[4:], 0)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, pytest
from jax.sharding import AxisType, PartitionSpec as P
from maskdp_jax import bookkeeping
from maskdp_jax.clipping import clipped_grad
bookkeeping.SMALL = 1
rng = np.random.default_rng(0)
batch = jnp.asarray(rng.normal(size=(16, 2, 6)), jnp.float32)
params = jnp.asarray(rng.normal(size=(3, 6, 6)), jnp.float32)
def plain(p, x):
    return jnp.sin(jnp.tanh(x @ p[0]) @ p[1] @ p[2]).sum()
def layered(p, x):
    return jnp.sin(jax.lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), x, p)[0]).sum()
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
for loss in (plain, layered):
    for micro in (None, 2):
        def local(p, x, micro=micro):
            fun = clipped_grad(
                loss, l2_clip_norm=1.0, keep_batch_dim=False, return_grad_norms=True, microbatch_size=micro
            )
            total, aux = fun(p, x)
            return jax.lax.psum(total, "data"), aux.grad_norms
        sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P("data"))))
        total, norms = sharded(params, batch)
        formed = jax.vmap(jax.grad(loss), (None, 0))(params, batch)
        exact = jnp.sqrt(jnp.sum(formed**2, (1, 2, 3)))
        np.testing.assert_allclose(norms, exact, rtol=1e-5)
        expected = jnp.tensordot(jnp.minimum(1, 1 / exact), formed, 1)
        np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-4)
def mixing(p, x):
    return plain(p, x * jax.lax.psum(x, "data").sum())
for method in ("auto", "bookkeeping", "vmap"):
    def local(p, x, method=method):
        return jax.lax.psum(clipped_grad(mixing, l2_clip_norm=1.0, keep_batch_dim=False, method=method)(p, x), "data")
    with pytest.raises(ValueError, match="psum.*mixes records"):
        jax.eval_shape(jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()), params, batch)
"""


def test_clips_before_any_collective():
    """On four devices the norms and the sum are those of one, and a loss with a collective is refused."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", SHARDED], env=environment, check=True, timeout=120)


def one_term(fun, example, clip=1.0, **more):
    clipped = clipped_fun(fun, keep_batch_dim=False, l2_clip_norm=clip, return_norms=True, **more)
    total, norms = jax.jit(clipped)(jax.tree.map(lambda leaf: leaf[None], example))
    return total, norms[0]


def test_complex_leaves_have_the_norm_of_their_parts():
    x = jnp.asarray(rng.normal(size=(2, 10)), jnp.float32)
    total, size = one_term(lambda x: x[0] + 1j * x[1], x, clip=1e9)
    np.testing.assert_allclose(total, x[0] + 1j * x[1])
    np.testing.assert_allclose(size, np.linalg.norm(x), rtol=1e-6)
    total, _ = one_term(lambda x: x[0] * (1 + 1j), x, clip=0.5)
    assert 0.49 < np.linalg.norm(total) <= 0.5


@pytest.mark.parametrize("kind", [jnp.int32, jnp.bool_])
def test_a_cast_that_changes_values_is_kept(kind, monkeypatch):
    monkeypatch.setattr(bookkeeping, "SMALL", 1)
    a, d = jnp.asarray(rng.normal(size=(2, 3, 20)), jnp.float32) * 2
    fun = lambda r: (r[0].T @ r[1]).astype(kind).astype(jnp.float32)  # noqa: E731
    np.testing.assert_array_equal(one_term(fun, (a, d), clip=1e9)[0], fun((a, d)))


def test_the_sum_is_not_rounded_to_the_type_of_the_parameters():
    """Before noise is added, a bfloat16 sum of 1000 ± 1 would move by 4 or not at all."""
    ones = jnp.ones((1000, 4), jnp.bfloat16)
    total = jax.jit(clipped_fun(lambda x: x, keep_batch_dim=False, l2_clip_norm=2.0))
    assert total(ones).dtype == jnp.float32
    np.testing.assert_allclose(total(ones) - total(ones[1:]), 1, rtol=1e-4)


def test_what_jax_privacy_takes_and_a_jaxpr_reader_may_stumble_over(monkeypatch):
    """Unused scalars, constant outputs, leaves and contractions of size 0, division by zero."""
    monkeypatch.setattr(bookkeeping, "SMALL", 1)
    x = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    programs = [
        lambda fun: fun(lambda x: jax.grad(lambda p: jnp.sum(x @ p["w"]))({"w": x, "unused": 2.0}), has_aux=False),
        lambda fun: fun(lambda x: (x, 1.0)),
        lambda fun: fun(lambda x: (x, 1.0), has_aux=True),
        lambda fun: fun(lambda x: {"a": x, "b": jnp.zeros((0, 5))}),
        lambda fun: fun(lambda x: jax.grad(lambda p: jnp.sum(x[:0, None] @ p))(jnp.ones((1, 9)))),
        lambda fun: fun(lambda x: jnp.outer(x, x) / 1e30),
    ]
    for program in programs:
        ours, theirs = (jax.jit(program(functools.partial(module, keep_batch_dim=False)))(x) for module in BOTH)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), ours, theirs)
    total, size = one_term(lambda x: jnp.outer(x, x) / 0.0, x[0])
    assert not total.any()
    assert not np.isfinite(size)


def test_views_in_one_forward_pass_are_clipped_no_more_than_apart():
    """Their positions cancel to 1e-4; a bound of what Gram matrices may round would be 26 times the norm."""
    p, x, d = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((64, 80), (1, 4, 64), (4, 80)))
    y = x * (1 + 1e-4 * jnp.asarray(rng.normal(size=x.shape), jnp.float32))

    def loss(p, x, y):
        h = jnp.tanh(jnp.concatenate([x, y]) @ p / 8)
        return jnp.sum(h[:4] * d) - jnp.sum(h[4:] * d)

    fun = lambda **more: clipped_grad(  # noqa: E731
        loss, l2_clip_norm=1.0, batch_argnums=(1, 2), keep_batch_dim=False, return_grad_norms=True, **more
    )
    assert "formed where its positions cancel" in fun().explain(p, x, y)
    norms = [jax.jit(fun(method=method))(p, x, y)[1].grad_norms for method in ("auto", "vmap")]
    np.testing.assert_allclose(*norms, rtol=1e-2)


def test_reading_a_loss_takes_time_in_proportion_to_it(monkeypatch):
    """Each operation is looked at once, though each is an operand of two."""
    looked_at = []
    read = bookkeeping._Reader._read
    monkeypatch.setattr(bookkeeping._Reader, "_read", lambda self, atom: looked_at.append(atom) or read(self, atom))

    def squared(x):
        h = jnp.outer(x, x)
        for _ in range(40):
            h = h * h
        return h

    clipped_fun(squared, keep_batch_dim=False).explain(jnp.ones((1, 80)))
    assert len(looked_at) <= 50
