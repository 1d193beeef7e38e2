"""Gaussian noise with a full tail, added once to a global sum."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt32

from maskdp_jax import chacha, lattice

_WORDS = 4  # 32-bit words a coordinate
_BITS = 120  # of them in use: 2**-121 is still a normal float32
_MOST_COORDINATES = 2**30


def gaussian(key: UInt32[Array, "8"], shape: tuple[int, ...]) -> Float32[Array, "*shape"]:
    """Standard normal noise: Φ⁻¹ of 120 random bits, one of them the sign.

    `jax.random.normal` in float32 has 2²³ values and ends at ±5.4: a release beyond the reach of one neighbour gives
    the other away, and over a long run that alone costs δ ≈ 1e-4. Here small probabilities keep their own bits: the
    tail ends at ±12.7, which `support_delta` charges.

    Guarantees:
        A function of the key and shape alone: the same on one device, on eight, and under any sharding. The bits are
        those of ChaCha20 under the 256-bit `key`.
        The error of one value in float32 is below 1e-6 of max(1, |value|); the accounting takes the reals, as usual.
    """
    first, *others = chacha.words(key, _WORDS * math.prod(shape)).reshape(_WORDS, *shape)
    sign = jnp.where(first >> 31, jnp.float32(1), jnp.float32(-1))
    return sign * -jax.scipy.special.ndtri(_tail(first & jnp.uint32(2**31 - 1), *others))


def _tail(first: Array, second: Array, third: Array, fourth: Array) -> Array:
    """The probability 0.(0)first·second·third·fourth in binary, at the middle of its cell of 2⁻¹²⁰; inside (0, 1/2]."""
    places = (first, 2.0**-32), (second, 2.0**-64), (third, 2.0**-96), ((fourth >> 8) + jnp.float32(0.5), 2.0**-_BITS)
    return sum(word.astype(jnp.float32) * place for word, place in reversed(places))


def add_noise(tree: Any, key: UInt32[Array, "8"], stddev: float) -> Any:
    """`tree` of float32 leaves plus N(0, stddev²) on every coordinate.

    Call it once on the global sum, after the collective: noise on each device would add up to √devices times as much,
    or, with one key, to a correlated copy.

    Guarantees:
        Coordinate j of the flattened tree gets the same noise whatever the devices; no two coordinates share bits.

    Raises:
        ValueError: a leaf is not float32, or there are more coordinates than `support_delta` charges.
    """
    leaves, structure = jax.tree.flatten(tree)
    for leaf in leaves:
        if leaf.dtype != jnp.float32:
            raise ValueError(f"noise is added to float32 sums, got {leaf.dtype}")
    sizes = [leaf.size for leaf in leaves]
    if sum(sizes) > _MOST_COORDINATES:
        raise ValueError(f"{sum(sizes)} coordinates, the account covers {_MOST_COORDINATES}")
    noise = jnp.split(gaussian(key, (sum(sizes),)), np.cumsum(sizes)[:-1])
    noisy = [leaf + stddev * part.reshape(leaf.shape) for leaf, part in zip(leaves, noise)]
    return jax.tree.unflatten(structure, noisy)


def support_delta(steps: int, epsilon: float, exact: bool = False) -> float:
    """The δ lost to noise that is not quite Gaussian.

    In floating point a draw differs from a Gaussian rounded to its grid only in the outermost cell of either sign,
    2⁻¹¹⁹ of the mass: total variation 2⁻⁸⁹ over 2³⁰ coordinates. The integer noise of an exact release is within
    `lattice.LOST`. So over a run both neighbours are within `steps` times that, v, of the ideal mechanism, which turns
    (ε, δ) into (ε, δ + (1 + e^ε)·v).
    """
    lost = lattice.LOST if exact else _MOST_COORDINATES * 2.0 ** (1 - _BITS)
    return (1 + math.exp(min(epsilon, 700))) * steps * lost
