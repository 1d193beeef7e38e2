"""The norm is taken of exactly the array that is summed: nothing one record may hold moves the sum by more than C.

Random programs, scales and records, drawn from seeds, beside an oracle that forms every gradient in float64. Scales go
from 1e-30 to 1e30, within one record too; positions cancel; two views of a record are equal but for a few roundoffs.
"""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdp_jax import bookkeeping
from maskdp_jax.clipping import clipped_fun

RECORDS, POSITIONS, IN, OUT = 4, 3, 12, 10
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def every_leaf_is_large(monkeypatch):
    monkeypatch.setattr(bookkeeping, "SMALL", 1)


# Programs. A record has two views `x`, `y` (positions, IN), their cotangents `d`, `e` (positions, OUT), a scalar `s`,
# tokens. Those in EXACT only multiply, add and cast to bfloat16, so that float64 gives their term.


def product(p, r):
    return {"w": jax.grad(lambda w: jnp.sum((r["x"] @ w) * r["d"]))(p["w"])}


def scaled(p, r):
    """Times a scalar of the record; a second leaf is small, a third unused."""
    fun = lambda w, b: r["s"] * jnp.sum((r["x"] @ w + b) * r["d"])  # noqa: E731
    w, b = jax.grad(fun, (0, 1))(p["w"], p["b"])
    return {"w": w, "b": b, "none": jnp.zeros((0, 3)), "unused": jnp.zeros(())}


def difference(p, r):
    """Two views, subtracted."""
    gradient = jax.grad(lambda w, x, d: jnp.sum((x @ w) * d))
    return {"w": gradient(p["w"], r["x"], r["d"]) - gradient(p["w"], r["y"], r["e"])}


def concatenated(p, r):
    """Two views in one forward pass, the sign in the loss."""
    signed = jnp.concatenate([r["d"], -r["e"]])
    return {"w": jax.grad(lambda w: jnp.sum((jnp.concatenate([r["x"], r["y"]]) @ w) * signed))(p["w"])}


def unlike(p, r):
    """Products of different forms, added; a value too."""
    w = jax.grad(lambda w: jnp.sum((r["x"] @ w) * r["d"]) - jnp.sum((r["y"][:1] @ w) * r["e"][:1]))(p["w"])
    return {"w": w + jnp.outer(r["x"][0], r["e"][1])}


def table(p, r):
    rows = lambda t: jnp.sum(t[r["tokens"]] * r["x"])  # noqa: E731
    return {"t": jax.grad(rows)(p["t"])}


def convolution(p, r):
    def fun(k):
        y = jax.lax.conv_general_dilated(r["x"][None], k, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        return jnp.sum(y[0] * r["d"])

    return {"k": jax.grad(fun)(p["k"])}


def half(p, r):
    """bfloat16 factors, cancelled between views."""
    x, y, d, e = (r[name].astype(jnp.bfloat16) for name in "xyde")
    fun = lambda w, x, d: jnp.sum((x @ w.astype(jnp.bfloat16)) * d).astype(jnp.float32)  # noqa: E731
    return {"w": jax.grad(fun)(p["w"], x, d) - jax.grad(fun)(p["w"], y, e)}


def network(p, r, remat=False, scan=True):
    """A deep network of both views, in bfloat16."""

    def layer(h, w):
        return h + jnp.tanh(h.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32), None

    def loss(q):
        h = jnp.concatenate([r["x"], r["y"]])
        step = jax.checkpoint(layer) if remat else layer
        if scan:
            h, _ = jax.lax.scan(step, h, q)
        else:
            for w in q:
                h, _ = step(h, w)
        return jnp.sum(jnp.sin(h[:POSITIONS]) * r["d"][:, :1]) - jnp.sum(jnp.sin(h[POSITIONS:]) * r["e"][:, :1])

    return {"layers": jax.grad(loss)(p["layers"])}


EXACT = {fun.__name__: fun for fun in (product, scaled, difference, concatenated, unlike, table, convolution, half)}
DEEP = {
    "loop": lambda p, r: network(p, r, scan=False),
    "scan": network,
    "remat": lambda p, r: network(p, r, remat=True, scan=False),
    "scan and remat": lambda p, r: network(p, r, remat=True),
}
PARAMS = {
    "w": jnp.zeros((IN, OUT)),
    "b": jnp.zeros(OUT),
    "t": jnp.zeros((5, IN)),
    "k": jnp.zeros((3, IN, OUT)),
    "layers": jnp.asarray(np.random.default_rng(1).normal(size=(3, IN, IN)) / 4, jnp.float32),
}


def power(rng, decades):
    return 10.0 ** rng.uniform(-decades, decades)


def draw(seed: int, deep: bool = False) -> tuple[dict, dict, float]:
    """Records, another for the place of the first, and C."""
    rng = np.random.default_rng(seed)
    decades = 0 if deep else rng.choice([0, 3, 15, 30])
    scales = [power(rng, decades) for _ in range(2)]  # of x and d; what they make is then of any size
    if rng.random() < 0.5:
        scales[1] = power(rng, min(decades, 7)) / scales[0]  # ... or moderate, though its factors are not
    apart = 10.0 ** -rng.choice([0.0, 3.0, 6.7, 7.5, 20.0])
    within = rng.choice([0, 0, 8])

    def record():
        x = rng.normal(size=(POSITIONS, IN)) * np.array([power(rng, within) for _ in range(POSITIONS)])[:, None]
        d = rng.normal(size=(POSITIONS, OUT)) * np.array([power(rng, within) for _ in range(POSITIONS)])[:, None]
        match rng.integers(6):
            case 0:
                x[1], d[1] = x[0], -d[0] * (1 + apart)  # two positions cancel
            case 1:
                x[:] = np.abs(x[0]) if within else 0.1  # all pull the same way
                d[:] = np.abs(d[0])
            case 2:
                x[0] = 0
        views = {"x": scales[0] * x, "d": scales[1] * d}
        views["y"] = views["x"] * (1 + apart * rng.normal(size=x.shape))
        views["e"] = views["d"] * (1 + apart * rng.normal(size=d.shape) * rng.integers(2))
        clipped = {name: np.clip(np.float32(view), -1e38, 1e38) for name, view in views.items()}
        return clipped | {"s": np.float32(power(rng, decades / 2)), "tokens": rng.integers(0, 5, POSITIONS)}

    rows = [record() for _ in range(RECORDS + 1)]
    records = {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}
    clip = np.clip(scales[0] * scales[1] * power(rng, 3), 1e-30, 1e30)
    return records, jax.tree.map(lambda leaf: leaf[-1], records), float(np.float32(clip))


def length(tree) -> float:
    with np.errstate(over="ignore"):
        return float(np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(tree))))


def clipped_sums(programs, records, padding, clip, **options):
    """Of each program, clipped on its own."""
    clipped = clipped_fun(
        lambda p, r: {name: fun(p, r) for name, fun in programs.items()},
        batch_argnums=1,
        keep_batch_dim=False,
        l2_clip_norm=dict.fromkeys(programs, clip),
        return_norms=True,
        **options,
    )
    return clipped(PARAMS, records, is_padding_example=padding)


def moves(total, records, other, clip):
    """By how much each sum moves if a record is left out, and if the first is replaced by another; in units of C.

    Also the sum and the norms of all records.
    """

    def apart(padding, swapped=False):
        rows = jax.tree.map(lambda leaf, new: leaf.at[0].set(new), first, other) if swapped else first
        moved = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), everyone, total(rows, padding, clip)[0])
        return {name: length(tree) / clip for name, tree in moved.items()}

    first, index = jax.tree.map(lambda leaf: leaf[:RECORDS], records), np.arange(RECORDS)
    everyone, norms = total(first, index < 0, clip)
    left_out = [apart(index == i) for i in range(RECORDS)]
    worst = {name: max(moved[name] for moved in left_out) for name in everyone}
    return worst, apart(index < 0, swapped=True), everyone, norms


def assert_bounded(total, seeds, deep=False):
    for seed in seeds:
        records, other, clip = draw(seed, deep)
        left_out, replaced, everyone, norms = moves(total, records, other, clip)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(everyone)), (seed, norms)
        for name in everyone:
            assert left_out[name] <= 1 + TOLERANCE, (seed, name, left_out[name], norms[name])
            assert replaced[name] <= 2 * (1 + TOLERANCE), (seed, name, replaced[name])


OPTIONS = [{"method": "auto"}, {"method": "vmap"}, {"method": "bookkeeping", "microbatch_size": 2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_record_moves_the_sum_by_more_than_the_clip_norm(options):
    """80 draws of 8 programs, 4 records left out and 1 replaced in each."""
    assert_bounded(jax.jit(functools.partial(clipped_sums, EXACT, **options)), range(80))


def test_no_record_moves_the_sum_of_a_deep_network():
    """20 draws of a network as a loop, with scan, with remat and with both."""
    assert_bounded(jax.jit(functools.partial(clipped_sums, DEEP)), range(20), deep=True)


def test_norms_and_sums_are_those_of_float64():
    """80 draws: as far as float32 resolves what the positions of a record add up to."""
    programs = {name: fun for name, fun in EXACT.items() if name != "half"}
    total = jax.jit(functools.partial(clipped_sums, programs))
    with jax.enable_x64(True):
        zeros = {name: jnp.zeros(leaf.shape, jnp.float64) for name, leaf in PARAMS.items()}
        exact = jax.jit(jax.vmap(lambda r: {name: fun(zeros, r) for name, fun in programs.items()}))
    for seed in range(80):
        records, _, clip = draw(seed)
        sums, norms = total(records, np.zeros(RECORDS + 1, bool), clip)
        with jax.enable_x64(True):
            wide = jax.tree.map(
                lambda leaf: np.asarray(leaf, np.float64 if leaf.dtype == np.float32 else leaf.dtype), records
            )
            terms = jax.tree.map(np.asarray, exact(wide))
        long = {name: np.linalg.norm(wide[name], axis=2) for name in "xyde"}
        spread = sum((long[x] * long[d]).sum(1) for x, d in ("xd", "ye", "xe")) * np.maximum(1, np.abs(wide["s"]))
        for name, tree in terms.items():
            want = np.sqrt(sum(np.square(leaf.reshape(RECORDS + 1, -1)).sum(1) for leaf in jax.tree.leaves(tree)))
            got = np.asarray(norms[name], np.float64)
            resolved = 1e-5 * (spread if name != "table" else long["x"].sum(1))
            seen = (want < 1e37) & (resolved < 1e37)
            assert np.all(np.abs(got - want)[seen] <= (1e-4 * want + resolved + 1e-37)[seen]), (seed, name, got, want)
            if not np.all(np.isfinite(got)):
                continue
            weights = np.minimum(1, clip / np.maximum(got, 1e-300))
            errors = jax.tree.map(lambda s, t: s - np.tensordot(weights, t, 1), sums[name], tree)  # noqa: B023
            assert length(errors) <= bookkeeping.PRECISION * clip + (weights * resolved).sum() + 1e-36, (seed, name)


def test_no_record_changes_what_the_others_add():
    """Positions cancel to 3 % in 64 records, and to 1e-6 in one more, which needs another way of being measured."""
    rng = np.random.default_rng(0)
    x = np.tile(rng.normal(size=IN), (65, POSITIONS, 1))
    d = np.tile(rng.normal(size=OUT), (65, POSITIONS, 1)) * np.array([1, -1, 0])[:, None]
    d[:, 0] *= 1 + np.where(np.arange(65) == 0, 1e-6, 0.03)[:, None]
    records = {"x": jnp.asarray(x, jnp.float32), "d": jnp.asarray(d, jnp.float32)}
    total = jax.jit(functools.partial(clipped_sums, {"product": product}))
    everyone, rest = (total(records, np.arange(65) < gone, 1e-6)[0]["product"]["w"] for gone in (0, 1))
    assert 0.9 < length(np.float64(everyone) - np.float64(rest)) / 1e-6 <= 1 + TOLERANCE


def sharded_sums(records, padding, clip):
    """Of two devices; run in a process of its own."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def local(records, padding, clip):
        sums, norms = clipped_sums(EXACT | DEEP, records, padding, clip)
        return jax.lax.psum(sums, "data"), norms

    specs = spec("data"), spec("data"), spec()
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(spec(), spec("data")))(records, padding, clip)


def test_no_record_moves_the_sum_over_devices():
    """20 draws on two emulated devices."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, __file__], env=environment, check=True, timeout=300)


if __name__ == "__main__":
    bookkeeping.SMALL = 1
    assert_bounded(jax.jit(sharded_sums), range(20))
