"""The noise has the distribution, the tail and the keys that the account assumes.

Statistical tests run on fixed keys; each states the chance with which fresh ones would have failed it.
"""

import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from maskdp_jax.keys import RunSecret
from maskdp_jax.noise import _tail, add_noise, gaussian, support_delta

SECRET = RunSecret(bytes(range(32)), "run", "config", "data")
KEY = SECRET.noise_key(0)
draw = jax.jit(gaussian, static_argnums=1)
noised = jax.jit(add_noise)


def test_is_standard_normal():
    """Mean, spread, kurtosis, both tails and the whole distribution. False alarm 5e-6."""
    n = 1_000_000
    noise = np.asarray(draw(KEY, (n,)), np.float64)
    assert abs(noise.mean()) < 5 / math.sqrt(n)
    assert abs(noise.std() - 1) < 5 / math.sqrt(2 * n)
    assert abs(stats.kurtosis(noise)) < 5 * math.sqrt(24 / n)
    for side in (noise, -noise):
        expected = n * special.ndtr(-4)
        assert abs((side > 4).sum() - expected) < 5 * math.sqrt(expected)
    assert stats.kstest(noise[:100_000], "norm").pvalue > 1e-6
    lag = np.corrcoef(noise[:-1], noise[1:])[0, 1]
    assert abs(lag) < 5 / math.sqrt(n)


def test_tail_is_exact_where_no_sample_reaches():
    """The quantile of 2⁻ᵏ for every k to 120: float32 of one uniform word would end at 5.4."""
    zero = np.uint32(0)
    for power in range(2, 120):
        words = [np.uint32(0)] * 4
        if power <= 32:
            words[0] = np.uint32(2 ** (32 - power))
        elif power <= 64:
            words[1] = np.uint32(2 ** (64 - power))
        elif power <= 96:
            words[2] = np.uint32(2 ** (96 - power))
        else:
            words[3] = np.uint32(2 ** (128 - power))
        drawn = float(-jax.scipy.special.ndtri(_tail(*map(jnp.asarray, words))))
        exact = -special.ndtri(2.0**-power + 2.0**-121)
        assert drawn == pytest.approx(exact, abs=1e-6, rel=1e-6)
    outermost = float(-jax.scipy.special.ndtri(_tail(*map(jnp.asarray, [zero] * 4))))
    assert 12.6 < outermost < 12.7
    full = jnp.asarray(np.uint32(2**32 - 1))
    assert float(_tail(full >> 1, full, full, full)) == 0.5


def test_support_is_charged():
    assert support_delta(47_250, 1.0) == pytest.approx((1 + math.e) * 47_250 * 2**-89)
    assert support_delta(47_250, 1.0, exact=True) == pytest.approx((1 + math.e) * 47_250 * 2**-72)
    assert support_delta(47_250, 10.0) < 1e-15


def test_every_bit_of_the_key_changes_the_noise():
    one = np.asarray(draw(KEY, (64,)))
    for bit in range(0, 256, 5):
        flipped = KEY.copy()
        flipped[bit // 32] ^= np.uint32(1 << bit % 32)
        assert not np.any(one == np.asarray(draw(flipped, (64,))))


def test_no_two_coordinates_steps_or_runs_share_noise():
    tree = {"a": jnp.zeros((300, 7)), "b": jnp.zeros(50), "c": jnp.zeros(())}
    flat = [
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(noised(tree, key, 1.0))])
        for key in (KEY, SECRET.noise_key(1), RunSecret(bytes(32), "run", "config", "data").noise_key(0))
    ]
    assert len(np.unique(np.abs(flat[0]))) == 2151
    for other in flat[1:]:
        assert abs(np.corrcoef(flat[0], other)[0, 1]) < 5 / math.sqrt(2151)


def test_adds_once_with_the_stated_spread():
    tree = {"a": jnp.full((500, 100), 3.0), "b": jnp.full(50_000, -1.0)}
    noisy = noised(tree, KEY, 2.5)
    assert jax.tree.map(jnp.shape, noisy) == jax.tree.map(jnp.shape, tree)
    noise = np.concatenate([np.ravel(noisy["a"]) - 3, np.ravel(noisy["b"]) + 1])
    assert noise.std() == pytest.approx(2.5, abs=5 * 2.5 / math.sqrt(2e5))
    assert all(jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(noised(tree, KEY, 0.0)), jax.tree.leaves(tree)))


def test_refuses_low_precision_sums():
    with pytest.raises(ValueError, match="float32"):
        add_noise(jnp.zeros(3, jnp.bfloat16), KEY, 1.0)


SHARDED = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from maskdp_jax.keys import RunSecret
from maskdp_jax.noise import gaussian
key = RunSecret(bytes(range(32)), "run", "config", "data").noise_key(0)
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
alone = np.asarray(jax.jit(lambda k: gaussian(k, (1024,)))(key))
split = jax.jit(lambda k: gaussian(k, (1024,)), out_shardings=NamedSharding(mesh, P("data")))(key)
inside = jax.jit(jax.shard_map(lambda k: gaussian(k, (1024,)), mesh=mesh, in_specs=P(), out_specs=P()))(key)
assert len(split.sharding.device_set) == 8
np.testing.assert_array_equal(alone, np.asarray(split))
np.testing.assert_array_equal(alone, np.asarray(inside))
"""


def test_is_the_same_on_eight_devices():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", SHARDED], env=environment, check=True, timeout=120)
