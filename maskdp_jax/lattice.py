"""The exact release: clipped terms and noise meet in integers, on a lattice of public spacing.

A sum of floats plus floating-point noise lies on a grid that depends on the sum, and its low bits give the sum away
(Mironov 2012, doi 10.1145/2382196.2382264). Here each clipped term is rounded to whole multiples of a spacing g, the
terms are summed in int32 over records and devices, integer noise is added, and only the result becomes a float:

    release = g · (Σ_i round(clip_C(v_i) / g) + K),    K ~ round(N(0, τ²I)),    τ = σ·(C/g + √d/2)

For a whole number s, s + round(x) = round(s + x). So the release is a function of the Gaussian mechanism over the reals
with noise multiplier σ, on terms of norm at most C/g + √d/2, and every account of that mechanism holds. What is lost is
the total variation between K as drawn and as stated (`Lattice.total_variation`), which `Mechanism` charges to δ. The
proof is in `docs/privacy.md`.
"""

import dataclasses
import decimal
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, PyTree, UInt32

from maskdp.errors import UserError
from maskdp_jax import chacha

LOST = 2.0**-72
"""Total variation of one release, all coordinates together, that is charged to δ."""

_BASE = 16  # of the ladder Σ_j 16^j·X_j
_LEAST = 64.0  # standard deviation of its rungs: from here to 16 times as much
_REACH = 14  # deviations at which a rung's table ends
_BITS = 127  # of a table's entries; one more is the sign


@dataclasses.dataclass(frozen=True)
class Lattice:
    """Spacing and integer noise of one kind of release.

    Attributes:
        spacing: g, a power of two.
        stddev: τ, standard deviation of the noise in units of g before it is rounded, itself rounded up by 1e-12 of it;
            0: no noise.
        reach: the largest magnitude of one coordinate of one rounded term.
    """

    spacing: float
    stddev: float
    reach: int

    @classmethod
    def plan(cls, noise_multiplier: float, l2_clip_norm: float, records: int, coordinates: int) -> "Lattice":
        """The finest lattice on which a sum of `records` terms and its noise cannot leave int32.

        Raises:
            UserError: there is none whose noise is close enough to a Gaussian for `LOST`.
        """
        finest = math.floor(math.log2(l2_clip_norm)) - 23  # float32 resolves no more of a term
        for exponent in range(finest, finest + 24):
            bound = l2_clip_norm / 2.0**exponent
            stddev = noise_multiplier * (bound + math.sqrt(coordinates) / 2) * (1 + 1e-12)
            lattice = cls(2.0**exponent, stddev, math.floor(bound + 0.5))
            if records * lattice.reach + lattice._largest_noise < 2**31:
                if not noise_multiplier or (stddev >= _LEAST and coordinates * lattice.total_variation <= LOST):
                    return lattice
                break
        raise UserError(
            f"privacy.exact: noise_multiplier {noise_multiplier:.3g} over {coordinates} coordinates and {records} "
            "records leaves no room for integers of 32 bits; expected other noise, or privacy.exact false"
        )

    def rounded(self, terms: PyTree) -> PyTree:
        """Clipped float32 terms in units of g, int32, each coordinate rounded to the nearest."""
        whole = lambda x: jnp.clip(jnp.round(x / self.spacing), -self.reach, self.reach).astype(jnp.int32)  # noqa: E731
        return jax.tree.map(whole, terms)

    def released(self, sums: PyTree, key: UInt32[Array, "8"]) -> PyTree:
        """The noised sums as float32.

        Guarantees:
            Coordinate j of the flattened tree gets the same noise whatever the devices.
        """
        leaves, structure = jax.tree.flatten(sums)
        sizes = [leaf.size for leaf in leaves]
        noise = self.noise(key, sum(sizes)) if self.stddev else jnp.zeros(sum(sizes), jnp.int32)
        parts = jnp.split(noise, np.cumsum(sizes)[:-1])
        noisy = [(leaf + part.reshape(leaf.shape)).astype(jnp.float32) for leaf, part in zip(leaves, parts)]
        return jax.tree.unflatten(structure, [leaf * self.spacing for leaf in noisy])

    def noise(self, key: UInt32[Array, "8"], count: int) -> Int32[Array, " count"]:
        """`count` independent draws of K: the ladder Σ_j 16^j·X_j of discrete Gaussians X_j.

        Guarantees:
            Within `total_variation` of round(N(0, τ²)) each. Integer arithmetic on the bits of ChaCha20 alone, hence
            equal on every device.
        """
        words = chacha.words(key, 4 * self._rungs * count).reshape(4, self._rungs, count)
        sign, first = words[0] >> 31, words[0] & np.uint32(2**31 - 1)
        magnitude = _search(jnp.asarray(_table(self._variance)), (first, *words[1:]))
        rungs = jnp.where(sign, -magnitude, magnitude)
        return sum(rungs[j] * _BASE**j for j in range(self._rungs))

    @property
    def total_variation(self) -> float:
        """Bound on the total variation between one draw of `noise` and round(N(0, τ²)).

        With s² = τ² + 1/12 and U uniform on [-1/2, 1/2], round(N(0, τ²)) has the mass E φ_τ(k + U) at k, and the
        density of N(0, s²) is E φ_τ(k + U′) with U′ ~ N(0, 1/12). U and U′ agree up to the third moment, so by Taylor
        the two differ by at most (E U⁴ + E U′⁴)/24 · (‖φ_τ⁗‖₁ + ‖φ_τ⁽⁵⁾‖₁) ≤ (√24 τ⁻⁴ + √120 τ⁻⁵)/720, summed over k.
        Half of it is the total variation. The density's sum over all k is 1 up to 3·exp(-2π²s²), each joint of the
        ladder is off by 4·exp(-2π²·15.8) at most, and each table by 2⁻¹²⁸ an entry and its tail of 2⁻¹⁴⁰.
        """
        if not self.stddev:
            return 0.0
        shape = (math.sqrt(24) + math.sqrt(120) / self.stddev) / 1440 / self.stddev**4
        tables = self._rungs * (_entries(self._variance) * 2.0 ** -(_BITS + 1) + 2.0**-140)
        return shape + tables + 4 * self._rungs * math.exp(-2 * math.pi**2 * 15.8)

    @property
    def _rungs(self) -> int:
        return max(1, math.ceil(math.log(max(self.stddev, 1) / _LEAST, _BASE)))

    @property
    def _variance(self) -> float:
        """σ₀² of each rung, rounded up: σ₀²·(1 + 256 + …) = τ² + 1/12."""
        return (self.stddev**2 + 1 / 12) * (1 + 1e-12) / sum(_BASE ** (2 * j) for j in range(self._rungs))

    @property
    def _largest_noise(self) -> int:
        return _entries(self._variance) * sum(_BASE**j for j in range(self._rungs)) if self.stddev else 0


def _entries(variance: float) -> int:
    return math.ceil(_REACH * math.sqrt(variance))


@functools.lru_cache(maxsize=16)
def _table(variance: float) -> UInt32[np.ndarray, "entries 4"]:
    """⌊2¹²⁷·P(|X| ≤ m)⌋ for m = 0, 1, … in 32-bit words, the highest first.

    X is the discrete Gaussian, P(k) ∝ e^(-k²/2σ²) for whole k.

    In decimals of 60 digits. Filled up with values above every draw to a power of two less one.
    """
    with decimal.localcontext(prec=60):
        step = (-1 / decimal.Decimal(variance)).exp()
        ratio, mass, masses = (-1 / (2 * decimal.Decimal(variance))).exp(), decimal.Decimal(2), [decimal.Decimal(1)]
        for _ in range(_entries(variance) - 1):
            mass *= ratio
            ratio *= step
            masses.append(mass)
        total = sum(masses)
        below, cumulated = decimal.Decimal(0), []
        for mass in masses:
            below += mass
            cumulated.append(int(below / total * 2**_BITS))
    words = [[value >> shift & 2**32 - 1 for shift in (96, 64, 32, 0)] for value in cumulated]
    table = np.full((2 ** len(words).bit_length() - 1, 4), 2**32 - 1, np.uint32)
    table[: len(words)] = words
    return table


def _search(table: UInt32[Array, "entries 4"], draw: tuple[UInt32[Array, "*shape"], ...]) -> Int32[Array, "*shape"]:
    """How many entries of `table` are at most the 128-bit number `draw`, by bisection."""
    depth = len(table).bit_length()

    def halve(turn, found):
        probe = found + (1 << (depth - 1 - turn))
        entry = table[probe - 1]
        below = entry[..., 3] <= draw[3]
        for place in (2, 1, 0):
            below = (entry[..., place] < draw[place]) | ((entry[..., place] == draw[place]) & below)
        return jnp.where(below, probe, found)

    return jax.lax.fori_loop(0, depth, halve, (draw[0] & 0).astype(jnp.int32))
