"""The mechanism: one object that draws the batches and states their ε. There is no other way to an ε.

The proofs are in `docs/privacy.md`; `D` and `D′` differ in one record under `adjacency`, and both play at every step

    release Σ_{i∈S} clip_C(v_i) + N(0, σ²C²)   and, for the masked objectives, exact gradients of the public batch P.
"""

import bisect
import dataclasses
import decimal
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import dp_accounting
import numpy as np
from dp_accounting import pld, rdp
from scipy import optimize, special, stats

from maskdp import config
from maskdp.errors import UserError
from maskdp_jax.keys import RunSecret
from maskdp_jax.noise import support_delta

Objective = Literal["maskdp", "maskdp_residual", "maskdp_two_step", "dp_sgd", "public_only", "sgd"]
Adjacency = Literal["zero_out", "replace", "remove"]
Sampling = Literal["independent", "shared_poisson", "shared_epochs"]
Unit = Literal["video", "subject", "scene"]

OBJECTIVES = ("maskdp", "maskdp_residual", "maskdp_two_step", "dp_sgd", "public_only", "sgd")
ADJACENCIES = ("zero_out", "replace", "remove")
SAMPLINGS = ("independent", "shared_poisson", "shared_epochs")
UNITS = ("video", "subject", "scene")
MASKED = ("maskdp", "maskdp_residual", "maskdp_two_step")

_Relation = dp_accounting.NeighboringRelation
_OVERFLOW = 1e-24  # default chance that any Poisson batch of the run exceeds its slots
_LARGEST_EPSILON = 512.0
_MOST = {"num_units": 2**31 - 1, "steps": 10**8}  # units are int32; beyond it an account takes minutes
_CLIP_NORMS = 1e-20, 1e20  # terms, noise and the spacing of a lattice are normal float32 numbers
_NOISE = 1e-6, 1e9
_FFT_ERROR = 2.0**-50  # δ charged per composed step for the rounding of the Fourier transform in a PLD
_RENYI_ORDERS = (*range(2, 65), *range(72, 257, 8), 384, 512, 768, 1024)  # whole orders: exact sums, and fast


class Batch(NamedTuple):
    """Unit indices of one step, int32, padded with -1.

    Attributes:
        private: (private_slots,) the units whose private layers enter the clipped sum.
        public: (public_slots,) the units whose public views give exact gradients.
    """

    private: np.ndarray
    public: np.ndarray


@dataclasses.dataclass(frozen=True)
class Epsilon:
    """What may be claimed at `delta`.

    Attributes:
        value: the claim: the least of the bounds at hand, infinite when there is none.
        pld: by privacy loss distributions; None where that accountant does not apply.
        rdp: by Rényi divergences; looser, but for δ below 1e-11 or so. None where that accountant does not apply.
        delta: the δ of all three; it includes the δ lost to the finite support of the noise.
        event: what was accounted, in words.
    """

    value: float
    pld: float | None
    rdp: float | None
    delta: float
    event: str


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """Sampler, sensitivity and privacy of a training run.

    Guarantees:
        The batches that `batch` yields for the steps 0 … `steps` - 1, clipped to `l2_clip_norm`, summed, noised once
        with standard deviation `noise_stddev` and released with exact gradients of the public batch, are
        (`epsilon(delta).value`, `delta`)-DP under `adjacency` for one unit. This holds for records whose term at each
        step is a function of the record, of the earlier releases and of the public layers, and for a `RunSecret` that
        nobody else knows. It does not speak of labels, poses, silhouettes, N or timing (`docs/privacy.md`).

    Attributes:
        num_units: N, records of the privacy unit. Public.
        batch_size: expected private batch q·N (`shared_epochs`: its size). Sums are divided by it, whatever was drawn.
        steps: T, releases, counting a step that is run again with fresh keys as one more.
        noise_multiplier: σ, in units of `l2_clip_norm` and never rescaled by the sensitivity.
        l2_clip_norm: C.
        max_batch: slots of a Poisson batch; what exceeds them is dropped uniformly at random and accounted. By default
            enough that any batch of the run overflows with probability at most 1e-24.
        public_batch: size of the public batch under `independent`; `batch_size` by default.
        exact: the release is made in integers (`lattice.Lattice`), not in floating point.
        unit: what one record is: `video`, `subject` or `scene`.
        dataset: random id of the dataset that the records are of; empty for a plan.

    Raises:
        UserError: a combination that has no meaning or no proof.
    """

    num_units: int
    batch_size: int
    steps: int
    objective: Objective = "maskdp"
    adjacency: Adjacency = "zero_out"
    sampling: Sampling = "independent"
    noise_multiplier: float = 0.0
    l2_clip_norm: float = 1.0
    max_batch: int | None = None
    public_batch: int | None = None
    exact: bool = False
    unit: Unit = "video"
    dataset: str = ""

    def __post_init__(self):
        config.one_of(self, "objective", OBJECTIVES)
        config.one_of(self, "adjacency", ADJACENCIES)
        config.one_of(self, "sampling", SAMPLINGS)
        config.one_of(self, "unit", UNITS)
        config.positive(self, "num_units", "batch_size", "steps", "l2_clip_norm")
        for name, most in _MOST.items():
            if getattr(self, name) > most:
                raise UserError(f"Mechanism.{name}: {getattr(self, name)}, expected at most {most}")
        if self.batch_size > self.num_units:
            raise UserError(f"Mechanism.batch_size: {self.batch_size}, expected at most num_units = {self.num_units}")
        least, most = _CLIP_NORMS
        if not least <= self.l2_clip_norm <= most:
            raise UserError(f"Mechanism.l2_clip_norm: {self.l2_clip_norm}, expected a number from {least} to {most}")
        least, most = _NOISE
        if self.noise_multiplier != 0 and not least <= self.noise_multiplier <= most:
            raise UserError(
                f"Mechanism.noise_multiplier: {self.noise_multiplier}, expected 0 or a number from {least} to {most}"
            )
        if self.noise_multiplier > 0 and self.objective in ("sgd", "public_only"):
            raise UserError(f"Mechanism.noise_multiplier: {self.objective} adds no noise, expected 0")
        if self.adjacency == "remove" and self.objective not in ("dp_sgd", "sgd"):
            raise UserError(
                f"Mechanism.adjacency: under remove a record's public view leaves too, and {self.objective} takes exact"
                " gradients of it; expected zero_out or replace"
            )
        if self.sampling == "shared_poisson" and self.objective == "dp_sgd":
            raise UserError("Mechanism.sampling: dp_sgd has no public batch to share, expected independent")
        if self.max_batch is not None:
            config.positive(self, "max_batch")
            if self._in_epochs:
                raise UserError("Mechanism.max_batch: epochs are cut into whole batches, expected none")
        if self.public_batch is not None:
            config.positive(self, "public_batch")
            if self.objective not in (*MASKED, "public_only"):
                raise UserError(f"Mechanism.public_batch: {self.objective} has no public batch, expected none")
            if self.objective in MASKED and self.sampling != "independent":
                raise UserError(f"Mechanism.public_batch: {self.sampling} takes the private batch, expected none")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, of which `Mechanism(**values)` makes an equal mechanism; they survive JSON exactly."""
        return dataclasses.asdict(self)

    @property
    def sampling_prob(self) -> float:
        """q."""
        return self.batch_size / self.num_units

    @property
    def divisor(self) -> int:
        """What the noised private sum is divided by: q·N, a public constant, never the size of the batch drawn."""
        return self.batch_size

    @property
    def public_divisor(self) -> int:
        """What the sum of public gradients is divided by: the expected size of the public batch."""
        return self.batch_size if self._shared else self.public_slots

    @property
    def noise_stddev(self) -> float:
        """σ·C, the standard deviation of the noise on each coordinate of the global sum; exact ones add a little."""
        return self.noise_multiplier * self.l2_clip_norm

    @property
    def sensitivity(self) -> float:
        """How far one record moves the sum of clipped terms, in units of C: 0, 1, 2 or infinity.

        A clipped term that vanishes for one of two neighbours moves the sum by C. One that is swapped for another
        clipped term moves it by 2C: `replace` always, and `zero_out` where the public view has a gradient of its own.
        """
        if self.objective == "sgd":
            return math.inf
        if self.objective == "public_only":
            return 0.0
        return 1.0 if (self.objective, self.adjacency) in _VANISHING else 2.0

    @functools.cached_property
    def private_slots(self) -> int:
        """Length of `Batch.private`."""
        if self.objective == "public_only":
            return 0
        if self._in_epochs:
            return self.batch_size
        if self.max_batch is not None:
            return min(self.max_batch, self.num_units)
        return _binomial_bound(self.num_units, self.sampling_prob, _OVERFLOW / self.steps)

    @property
    def public_slots(self) -> int:
        """Length of `Batch.public`."""
        if self.objective in ("sgd", "dp_sgd"):
            return 0
        return self.private_slots if self._shared else self.public_batch or self.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """⌈N / batch⌉: steps in which the epoch sampler shows every unit once."""
        return math.ceil(self.num_units / self.batch_size)

    def batch(self, secret: RunSecret, step: int) -> Batch:
        """The units of one step: a function of the secret and the step alone, equal in every process.

        Guarantees:
            `independent`: each unit is in S with probability q, independently of every other unit, step and of P.
            `shared_poisson`: the same S, and P = S. `shared_epochs`: P = S, each unit exactly once an epoch.
            A Poisson draw beyond the slots is cut to a uniformly random subset. Nothing looks at the records.

        Raises:
            ValueError: `step` is not one of the accounted steps.
        """
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} is not among the {self.steps} steps that were accounted")
        if self.objective == "public_only":
            return Batch(np.empty(0, np.int32), self._chunk(secret, "sample/public", step, self.public_slots))
        if self._in_epochs:
            private = self._chunk(secret, "sample/private", step, self.batch_size)
        else:
            private = self._poisson(secret, step)
        if self.objective not in MASKED:
            return Batch(private, np.empty(0, np.int32))
        if self._shared:
            return Batch(private, private.copy())
        return Batch(private, self._chunk(secret, "sample/public", step, self.public_slots))

    def event(self) -> tuple[dp_accounting.DpEvent, dp_accounting.NeighboringRelation]:
        """The whole run as an event of dp_accounting, with the neighbouring relation it must be accounted under.

        Shared Poisson batches have no such event and come as `UnsupportedDpEvent`; `epsilon` sums them exactly.
        """
        removal = _Relation.ADD_OR_REMOVE_ONE if self.adjacency == "remove" else _Relation.REPLACE_SPECIAL
        if self.sensitivity == 0:
            return dp_accounting.NoOpDpEvent(), removal
        if self.sensitivity == math.inf or self.noise_multiplier == 0:
            return dp_accounting.NonPrivateDpEvent(), removal
        if self._in_epochs:
            gaussian = dp_accounting.GaussianDpEvent(self.noise_multiplier / self.sensitivity)
            return dp_accounting.SelfComposedDpEvent(gaussian, self._epochs), _Relation.ADD_OR_REMOVE_ONE
        if self._shared:
            return dp_accounting.UnsupportedDpEvent(), removal
        relation = _Relation.REPLACE_ONE if self.sensitivity == 2 else removal
        if self.private_slots == self.num_units:
            return self._untruncated, relation
        step = dp_accounting.TruncatedSubsampledGaussianDpEvent(
            self.num_units, self.sampling_prob, self.private_slots, self.noise_multiplier
        )
        return dp_accounting.SelfComposedDpEvent(step, self.steps), relation

    def delta(self, epsilon: float) -> float:
        """The smallest δ that may be claimed at `epsilon`, by the bound of `Epsilon.value`."""
        return min(1.0, self._delta(epsilon) + support_delta(self.steps, epsilon, self.exact))

    def epsilon(self, delta: float) -> Epsilon:
        """What may be claimed at `delta`.

        Guarantees:
            Every figure is an upper bound: grids round up, a search returns its safe end, the tails of sums count in
            full, and the finite support of the noise, the truncation of batches and the rounding of Fourier transforms
            are charged to δ.

        Raises:
            UserError: `delta` is not inside (0, 1).
        """
        _check_delta(delta)
        if self.sensitivity == 0:
            return Epsilon(0.0, 0.0, 0.0, delta, self._words())
        if self.sensitivity == math.inf or self.noise_multiplier == 0:
            return Epsilon(math.inf, None, None, delta, self._words())

        def least(bound: Callable[[float], float]) -> float:
            charged = lambda epsilon: bound(epsilon) + support_delta(self.steps, epsilon, self.exact)  # noqa: E731
            return _smallest_epsilon(charged, delta, _largest_epsilon(self.steps, delta, self.exact))

        found = [least(bound) for bound in self._bounds]
        by_pld = by_rdp = None
        if self._in_epochs:
            by_pld = _finite(least(functools.partial(self._pld_delta, *self.event())))
        elif not self._shared:
            by_pld = _finite(found[0])
        if self._renyi_delta is not None:
            by_rdp = _finite(least(self._renyi_delta))
        return Epsilon(min(found), by_pld, by_rdp, delta, self._words())

    # --- the sampler -------------------------------------------------------------------------------------------------

    @property
    def _shared(self) -> bool:
        return self.objective in MASKED and self.sampling != "independent"

    @property
    def _in_epochs(self) -> bool:
        return self.sampling == "shared_epochs" or self.objective in ("sgd", "public_only")

    @property
    def _epochs(self) -> int:
        """How often one unit takes part at most."""
        return math.ceil(self.steps / self.steps_per_epoch)

    def _poisson(self, secret: RunSecret, step: int) -> np.ndarray:
        generator = secret.generator("sample/private", step)
        drawn = np.flatnonzero(generator.random(self.num_units) < self.sampling_prob)
        if len(drawn) > self.private_slots:
            drawn = generator.choice(drawn, self.private_slots, replace=False)
        return _padded(drawn, self.private_slots)

    def _chunk(self, secret: RunSecret, purpose: str, step: int, size: int) -> np.ndarray:
        epoch, position = divmod(step, math.ceil(self.num_units / size))
        order = secret.generator(purpose, epoch).permutation(self.num_units)
        return _padded(order[position * size : (position + 1) * size], size)

    # --- the account -------------------------------------------------------------------------------------------------

    @property
    def _untruncated(self) -> dp_accounting.DpEvent:
        """The event of Poisson batches that never overflow."""
        gaussian = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        step = dp_accounting.PoissonSampledDpEvent(self.sampling_prob, gaussian)
        return dp_accounting.SelfComposedDpEvent(step, self.steps)

    @property
    def _whole(self) -> dp_accounting.DpEvent:
        """The run as an event in which no batch overflows."""
        return self.event()[0] if self._in_epochs else self._untruncated

    @functools.cached_property
    def _overflow(self) -> float:
        """Bound on the chance that any Poisson batch of the run exceeds its slots."""
        return self.steps * float(stats.binom.sf(self.private_slots, self.num_units, self.sampling_prob))

    def _overflow_delta(self, epsilon: float) -> float:
        """The δ by which truncation can be bought off: `_overflow` for both neighbours."""
        return (1 + _exp(epsilon)) * self._overflow

    def _subsampled_delta(self, epsilon: float) -> float:
        """δ(ε) of Poisson batches by PLD: overflow bought off where that costs next to nothing, else as an event."""
        event, relation = self.event()
        overflow = self._overflow_delta(epsilon)
        bought = self._pld_delta(self._untruncated, relation, epsilon) + overflow
        return bought if overflow <= 1e-2 * bought else self._pld_delta(event, relation, epsilon)

    def _pld_delta(
        self, event: dp_accounting.DpEvent, relation: dp_accounting.NeighboringRelation, epsilon: float
    ) -> float:
        """δ(ε) of an event by PLD, 1 where losses are beyond any grid."""
        grid = self._grid
        if grid >= 1:
            return 1.0
        loss = _composed_pld(event, relation, grid)
        return float(loss.get_delta_for_epsilon(epsilon)) + self._exposures * _FFT_ERROR

    def _delta(self, epsilon: float) -> float:
        """δ(ε) of the run with perfect noise."""
        if self.sensitivity == 0:
            return 0.0
        if self.sensitivity == math.inf or self.noise_multiplier == 0:
            return 1.0
        return min(bound(epsilon) for bound in self._bounds)

    @functools.cached_property
    def _bounds(self) -> tuple[Callable[[float], float], ...]:
        """Upper bounds on δ(ε) of the run with perfect noise.

        Independent batches have the bound of the same batches in plain sight too: the least where δ is too small for
        the arithmetic of a PLD and swapped terms have no Rényi event.
        """
        if self._in_epochs or self._shared:
            return (self._seen_delta,)
        return self._subsampled_delta, self._renyi_delta or self._seen_delta

    def _seen_delta(self, epsilon: float) -> float:
        """δ(ε) if everyone sees who is drawn: the sum over how often one unit takes part."""
        times, chances, rest = _participation(1 if self._in_epochs else self.sampling_prob, self._exposures)
        shifts = np.sqrt(times) * self.sensitivity / self.noise_multiplier
        return float(rest + chances @ gaussian_delta(epsilon, shifts))

    @property
    def _exposures(self) -> int:
        return self._epochs if self._in_epochs else self.steps

    @property
    def _grid(self) -> float:
        """Spacing of privacy losses in a PLD; any is sound.

        In proportion to the spread of one step's loss, by its Rényi divergence of order 2, so that a tiny ε is resolved
        as well as a large one; coarser where the largest loss would take more than 40,000 points. Rounding spreads the
        loss by 3e-4 of its variance at most.
        """
        probability, times = (1.0, self._epochs) if self._in_epochs else (self.sampling_prob, self.steps)
        shift = self.sensitivity / self.noise_multiplier
        gap = shift**2
        if gap < 30:
            loss = math.log1p(probability**2 * math.expm1(gap))
        else:
            loss = max(gap + 2 * math.log(probability), 1.0)
        largest = math.log1p(probability * math.expm1(min(10 * shift + gap / 2, 700)))
        return max(min(0.04, 5e-4 * math.sqrt(times)) * math.sqrt(loss), largest / 4e4)

    @functools.cached_property
    def _renyi_delta(self) -> Callable[[float], float] | None:
        """δ(ε) by Rényi divergences; None for shared Poisson and for swapped terms, which they have no event for."""
        event, relation = self.event()
        subsampled = not (self._in_epochs or self._shared)
        accountant = rdp.RdpAccountant(_RENYI_ORDERS, relation)
        event = self._untruncated if subsampled else event
        if not accountant.supports(event):
            return None
        accountant.compose(event)
        return lambda epsilon: accountant.get_delta(epsilon) + (self._overflow_delta(epsilon) if subsampled else 0)

    def _words(self) -> str:
        if self.sensitivity == 0:
            return "no access to private layers"
        if self.sensitivity == math.inf or self.noise_multiplier == 0:
            return "not private: no noise"
        entry = f"Gaussian(σ={self.noise_multiplier:.6g})"
        if self._in_epochs:
            return f"{self._epochs} × Gaussian(σ={self.noise_multiplier:.6g}/{self.sensitivity:.0f}), no amplification"
        if self._shared:
            return (
                f"Σ_k Binomial(k; {self.steps}, {self.sampling_prob:.6g}) · "
                f"k × Gaussian(σ={self.noise_multiplier:.6g}/{self.sensitivity:.0f}), no amplification"
            )
        _, relation = self.event()
        slots = f", at most {self.private_slots}" if self.private_slots < self.num_units else ""
        return f"{self.steps} × Poisson(q={self.sampling_prob:.6g}{slots}, {entry}) under {relation.name}"


# The clipped term is exactly 0 for one of the two neighbours.
_VANISHING = {("maskdp", "zero_out"), ("maskdp_residual", "zero_out"), ("dp_sgd", "remove")}


def calibrate(
    mechanism: Mechanism,
    epsilon: float,
    delta: float,
    parameter: Literal["noise_multiplier", "steps", "batch_size"] = "noise_multiplier",
) -> Mechanism:
    """`mechanism` with the least noise, the most steps or the largest batch whose claim at `delta` is within `epsilon`.

    Guarantees:
        The result's `epsilon(delta).value` was computed and is at most `epsilon`. Noise is within a factor 1 + 1e-5
        of the least, steps and batch within one part in 10⁴ (so exact below 10⁴). Everything else is left as it is.

    Raises:
        UserError: nothing in reach keeps to `epsilon`, or the objective has nothing to calibrate.
    """
    if not 0 < epsilon < math.inf:
        raise UserError(f"epsilon: {epsilon}, expected a number above 0")
    _check_delta(delta)
    if mechanism.sensitivity in (0, math.inf):
        raise UserError(f"objective: {mechanism.objective} has no noise to calibrate")
    steps = 1 if parameter == "steps" else mechanism.steps
    if epsilon > (largest := _largest_epsilon(steps, delta, mechanism.exact)):
        raise UserError(
            f"epsilon: {epsilon:.6g}, expected at most {math.floor(10 * largest) / 10} for {steps} steps at delta "
            f"{delta}: beyond it the finite support of the noise alone costs more than half of delta"
        )

    aimed = epsilon * (1 - 1e-6)  # so that the search for ε, which stops 1e-7 above the least, stays within `epsilon`

    if parameter == "noise_multiplier":
        return dataclasses.replace(mechanism, noise_multiplier=_least_noise(mechanism, aimed, delta))

    limit = mechanism.num_units if parameter == "batch_size" else _MOST["steps"]
    at = lambda value: dataclasses.replace(mechanism, **{parameter: value})  # noqa: E731
    quick = lambda value: _excess(at(value)._bounds[-1](aimed) + support_delta(at(value).steps, aimed), delta)  # noqa: E731
    whole = functools.cache(lambda value: _excess(at(value).delta(aimed), delta))
    if whole(1) > 0:
        raise UserError(f"{parameter}: even 1 exceeds epsilon {epsilon} at delta {delta}; expected more noise")
    return at(_most(whole, _most(quick, 1, limit) if quick(1) <= 0 else 1, limit))


def _most(excess: Callable[[int], float], safe: int, limit: int) -> int:
    """The largest whole number up to `limit` with `excess` at most 0, or one part in 10⁴ less; `safe` is one."""
    if excess(safe) > 0:
        safe = 1
    unsafe = safe + 1
    while unsafe <= limit and excess(unsafe) <= 0:
        safe, unsafe = unsafe, unsafe + math.ceil(unsafe / 2)
    if unsafe > limit and excess(limit) <= 0:
        return limit
    unsafe = min(unsafe, limit)
    for turn in itertools.count():
        if unsafe - safe <= max(1, safe // 10_000):
            return safe
        share = 0.5 if turn % 3 == 2 else excess(safe) / (excess(safe) - excess(unsafe))  # false position, then a half
        middle = min(max(safe + round(share * (unsafe - safe)), safe + 1), unsafe - 1)
        safe, unsafe = (middle, unsafe) if excess(middle) <= 0 else (safe, middle)


def _excess(spent: float, delta: float) -> float:
    """log of `spent` over `delta`."""
    return math.log(max(spent, 1e-300) / delta)


def _least_noise(mechanism: Mechanism, epsilon: float, delta: float) -> float:
    """The least σ, from above and to 1e-5 of its size, with `mechanism.delta(epsilon)` at most `delta`."""

    @functools.cache
    def excess(log_noise: float) -> float:
        return _excess(dataclasses.replace(mechanism, noise_multiplier=math.exp(log_noise)).delta(epsilon), delta)

    safe = 0.0
    while excess(safe) > 0:
        safe += math.log(2)
        if safe > math.log(2**20):
            raise UserError(f"epsilon: {epsilon:.6g} at delta {delta} takes a noise multiplier above 2^20")
    unsafe = safe - math.log(2)
    while excess(unsafe) <= 0:
        safe, unsafe = unsafe, unsafe - math.log(2)
        if unsafe < -math.log(2**6):
            return math.exp(safe)
    safe = optimize.brentq(excess, unsafe, safe, xtol=2e-6)
    while excess(safe) > 0:
        safe += 4e-6
    return math.exp(safe)


def compose(mechanisms: Sequence[Mechanism], delta: float) -> Epsilon:
    """What may be claimed at `delta` of publishing the runs of all `mechanisms`, trained on the same records.

    Guarantees:
        An upper bound. Runs with a privacy loss distribution are composed by it, also when later settings were chosen
        after seeing earlier results; those without one (shared Poisson) join by basic composition, each at an equal
        part of `delta`. A run without noise on private data makes it infinite; one that reads none costs nothing.

    Raises:
        UserError: the runs differ in dataset, unit, adjacency or number of records, so that no one claim speaks of all.
    """
    for name in ("dataset", "unit", "adjacency", "num_units"):
        found = sorted({str(getattr(m, name)) for m in mechanisms})
        if len(found) > 1:
            raise UserError(f"compose: the runs differ in {name} ({', '.join(found)}) and share no claim")
    costly = [m for m in mechanisms if m.sensitivity > 0]
    words = "; ".join(m._words() for m in costly) or "no access to private layers"
    if any(m.sensitivity == math.inf or m.noise_multiplier == 0 for m in costly):
        return Epsilon(math.inf, None, None, delta, words)
    summed = [m for m in costly if isinstance(m.event()[0], dp_accounting.UnsupportedDpEvent)]
    composed = [m for m in costly if m not in summed]
    parts = len(summed) + bool(composed)
    value = sum(m.epsilon(delta / parts).value for m in summed)
    by_pld = None
    if composed:
        grid = max(m._grid for m in composed)
        if grid >= 1:
            return Epsilon(math.inf, None, None, delta, words)
        losses = [_composed_pld(m._whole, m.event()[1], grid) for m in composed]
        loss = functools.reduce(lambda one, other: one.compose(other), losses)

        def delta_of(epsilon: float) -> float:
            overflow = sum(m._overflow_delta(epsilon) for m in composed if not m._in_epochs)
            lost = sum(support_delta(m.steps, epsilon, m.exact) for m in composed)
            rounding = sum(m._exposures for m in composed) * _FFT_ERROR
            return loss.get_delta_for_epsilon(epsilon) + overflow + lost + rounding

        together = _smallest_epsilon(delta_of, delta / parts)
        by_pld = None if summed else together
        value += together
    return Epsilon(float(value), by_pld, None, delta, words)


def gaussian_delta(epsilon: float, shift: np.ndarray) -> np.ndarray:
    """δ of N(shift, 1) against N(0, 1): Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ), 0 at μ = 0 (arXiv 1805.06530, theorem 8)."""
    shift = np.asarray(shift, np.float64)
    mu = np.where(shift > 0, shift, 1.0)
    delta = special.ndtr(mu / 2 - epsilon / mu) - np.exp(epsilon + special.log_ndtr(-mu / 2 - epsilon / mu))
    return np.where(shift > 0, np.maximum(delta, 0), 0.0)


def _participation(probability: float, trials: int) -> tuple[np.ndarray, np.ndarray, float]:
    """How often a unit takes part, the chances of it, and the chance of anything left out."""
    if probability >= 1:
        return np.array([trials]), np.ones(1), 0.0
    most = _binomial_bound(trials, probability, 1e-30)
    times = np.arange(most + 1)
    return times, stats.binom.pmf(times, trials, probability), float(stats.binom.sf(most, trials, probability))


def _binomial_bound(trials: int, probability: float, chance: float) -> int:
    """The least k that a binomial draw exceeds with at most `chance`. (scipy's `isf` ends at chances of 1e-16.)"""
    return bisect.bisect_left(range(trials), True, key=lambda k: bool(stats.binom.sf(k, trials, probability) <= chance))


@functools.lru_cache(maxsize=8)
def _composed_pld(event: dp_accounting.DpEvent, relation: dp_accounting.NeighboringRelation, grid: float):
    """The PLD of `event`; 100 steps at a time, rounded up to a multiple of 100, where there are more than 10⁵.

    The tail bound of one long self-composition is loose: its support, and with it the time, grow with the steps.
    """
    stages = 1
    if isinstance(event, dp_accounting.SelfComposedDpEvent) and event.count > 1e5:
        stages, event = -(-event.count // 100), dp_accounting.SelfComposedDpEvent(event.event, 100)
    accountant = pld.PLDAccountant(relation, value_discretization_interval=grid)
    accountant.compose(event)
    return accountant._pld.self_compose(stages) if stages > 1 else accountant._pld


def _largest_epsilon(steps: int, delta: float, exact: bool) -> float:
    """The ε at which the finite support of the noise costs half of `delta`; beyond it nothing is claimed."""
    return math.log(max(delta / support_delta(steps, 0.0, exact) - 1, 1e-300))


def _smallest_epsilon(delta_of: Callable[[float], float], delta: float, largest: float = _LARGEST_EPSILON) -> float:
    """The least ε, from above and to 1e-7 of its size, at which `delta_of` is at most `delta`; infinite if none.

    None is sought beyond `largest`.
    """
    if delta_of(0.0) <= delta:
        return 0.0
    unsafe, safe = 0.0, 2.0**-10
    while delta_of(safe) > delta:
        if safe >= largest:
            return math.inf
        unsafe, safe = safe, min(safe * 2, largest)
    while safe - unsafe > 1e-7 * safe:
        middle = (safe + unsafe) / 2
        unsafe, safe = (unsafe, middle) if delta_of(middle) <= delta else (middle, safe)
    return safe


def upward(value: float, digits: int = 6) -> str:
    """`value` to that many significant digits, rounded up: no ε, δ or σ is shown smaller than it is."""
    rounded = decimal.Context(digits, decimal.ROUND_CEILING).create_decimal(repr(float(value)))
    return f"{float(rounded):.{digits}g}"


def _exp(value: float) -> float:
    """e^value, or infinity."""
    return math.exp(value) if value < 709 else math.inf


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise UserError(f"delta: {delta}, expected a number between 0 and 1")


def _finite(epsilon: float) -> float | None:
    return epsilon if math.isfinite(epsilon) else None


def _padded(units: np.ndarray, slots: int) -> np.ndarray:
    padded = np.full(slots, -1, np.int32)
    padded[: len(units)] = units
    return padded
