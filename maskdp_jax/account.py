"""`maskdp account`: the noise for an ε, or the ε of a noise, before anything is trained."""

import dataclasses
import json
import math

from maskdp import config
from maskdp.errors import UserError
from maskdp_jax.mechanism import Mechanism, calibrate


@dataclasses.dataclass(frozen=True)
class AccountConfig:
    """A training run as its privacy sees it.

    Attributes:
        n: records of the privacy unit.
        batch: expected private batch.
        epochs: length of the run, in passes over the records; or `steps`.
        steps: length of the run, in releases.
        epsilon: the claim to find the least noise for; or `noise_multiplier`.
        noise_multiplier: standard deviation of the noise over the clip norm, to find the claim of.
        delta: of (ε, δ).
        objective: maskdp, maskdp_residual, maskdp_two_step, dp_sgd, public_only or sgd.
        adjacency: zero_out, replace or remove.
        sampling: independent, shared_poisson or shared_epochs.
        max_batch: slots of a Poisson batch; what a truncated draw costs is accounted. 0: practically never truncated.
        json: print JSON.
    """

    n: int = 0
    batch: int = 0
    epochs: float | None = None
    steps: int | None = None
    epsilon: float | None = None
    noise_multiplier: float | None = None
    delta: float = 1e-5
    objective: str = "maskdp"
    adjacency: str = "zero_out"
    sampling: str = "independent"
    max_batch: int = 0
    json: bool = False

    def __post_init__(self):
        config.positive(self, "n", "batch")
        if (self.epochs is None) == (self.steps is None):
            raise UserError("epochs, steps: expected one of the two")
        config.positive(self, "steps" if self.epochs is None else "epochs")
        if self.objective not in ("sgd", "public_only") and (self.epsilon is None) == (self.noise_multiplier is None):
            raise UserError("epsilon, noise_multiplier: expected one of the two")

    def mechanism(self) -> Mechanism:
        """The mechanism described, its noise found if it was not given."""
        mechanism = Mechanism(
            num_units=self.n,
            batch_size=self.batch,
            steps=self.steps or math.ceil(self.epochs * self.n / self.batch),
            objective=self.objective,
            adjacency=self.adjacency,
            sampling=self.sampling,
            noise_multiplier=self.noise_multiplier or 0.0,
            max_batch=self.max_batch or None,
        )
        if self.epsilon is None or self.objective in ("sgd", "public_only"):
            return mechanism
        return calibrate(mechanism, self.epsilon, self.delta)


def account(mechanism: Mechanism, delta: float) -> dict[str, float | int | str | None]:
    """The figures of `mechanism` at `delta`; None where there is none."""
    claim = mechanism.epsilon(delta)
    figures = {
        "noise_multiplier": mechanism.noise_multiplier,
        "epsilon": claim.value,
        "epsilon_pld": claim.pld,
        "epsilon_rdp": claim.rdp,
        "delta": claim.delta,
        "sampling_prob": mechanism.sampling_prob,
        "steps": mechanism.steps,
        "sensitivity": mechanism.sensitivity,
        "event": claim.event,
    }
    return {name: None if value == math.inf else value for name, value in figures.items()}


def main(arguments: list[str]) -> int:
    """`maskdp account --n N --batch B (--epochs E | --steps T) (--epsilon e | --noise_multiplier s) --delta d …`."""
    # a bare --json reads better than the --json true of every other flag
    options = config.parse(AccountConfig, _with_value(arguments, "--json"), "account")
    figures = account(options.mechanism(), options.delta)
    if options.json:
        print(json.dumps(figures, indent=2, allow_nan=False, ensure_ascii=False))
        return 0
    print(f"{options.objective} under {options.adjacency}, {options.sampling} batches")
    for name, value in figures.items():
        text = "none" if value is None else f"{value:.6g}" if isinstance(value, float) else value
        print(f"  {name:<16}  {text}")
    return 0


def _with_value(arguments: list[str], flag: str) -> list[str]:
    """`arguments` with `true` after a bare `flag`."""
    spelt = []
    for argument, following in zip(arguments, [*arguments[1:], "--"]):
        spelt.append(argument)
        if argument == flag and following.startswith("--"):
            spelt.append("true")
    return spelt
