"""`maskdp account`: the noise for an ε, the ε of a noise, or how much training both allow, before any is done.

With `--ledger DATA`: what publishing all runs that were started on a dataset costs.
"""

import argparse
import dataclasses
import json
import math
import sys

from rich.console import Console
from rich.table import Table

from maskdp import config, layers
from maskdp.errors import UserError
from maskdp_jax import ledger
from maskdp_jax.mechanism import Mechanism, calibrate, upward


@dataclasses.dataclass(frozen=True)
class AccountConfig:
    """A training run as its privacy sees it.

    Without `noise_multiplier` the least noise for `epsilon` is found; with both, the most steps or the largest batch,
    whichever is not given.

    Attributes:
        n: records of the privacy unit.
        batch: expected private batch.
        epochs: length of the run, in passes over the records; or `steps`.
        steps: length of the run, in releases.
        epsilon: the claim to keep to.
        noise_multiplier: standard deviation of the noise over the clip norm.
        delta: of (ε, δ).
        objective: maskdp, maskdp_residual, maskdp_two_step, dp_sgd, public_only or sgd.
        adjacency: zero_out, replace or remove.
        sampling: independent, shared_poisson or shared_epochs.
        max_batch: slots of a Poisson batch; what a truncated draw costs is accounted. 0: practically never truncated.
        json: print JSON.
    """

    n: int = 0
    batch: int | None = None
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
        config.positive(self, "n")
        config.positive(self, *(name for name in ("batch", "steps", "epochs") if getattr(self, name) is not None))
        if self.epochs is not None and self.steps is not None:
            raise UserError("epochs, steps: expected one of the two")
        private = self.objective not in ("sgd", "public_only")
        given = [self.epsilon, self.noise_multiplier]
        if private and given == [None, None]:
            raise UserError(
                "epsilon, noise_multiplier: expected one of the two, or both to find the steps or the batch"
            )
        missing = [name for name, value in (("steps", self.epochs or self.steps), ("batch", self.batch)) if not value]
        if private and None not in given:
            if len(missing) != 1 or (missing == ["batch"] and self.epochs):
                raise UserError("epsilon, noise_multiplier: with both, expected just one of batch, steps")
        elif missing:
            raise UserError(f"{', '.join(missing)}: missing; epochs will do for steps")

    def mechanism(self) -> Mechanism:
        """The mechanism described, what was not given found."""
        steps = self.steps or (math.ceil(self.epochs * self.n / self.batch) if self.epochs else 1)
        mechanism = Mechanism(
            num_units=self.n,
            batch_size=self.batch or 1,
            steps=steps,
            objective=self.objective,
            adjacency=self.adjacency,
            sampling=self.sampling,
            noise_multiplier=self.noise_multiplier or 0.0,
            max_batch=self.max_batch or None,
        )
        if self.epsilon is None or self.objective in ("sgd", "public_only"):
            return mechanism
        found = "noise_multiplier" if self.noise_multiplier is None else "steps" if self.batch else "batch_size"
        with Console(stderr=True).status(f"searching the {found.replace('_', ' ')}"):
            return calibrate(mechanism, self.epsilon, self.delta, found)


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
    """`maskdp account --n N --batch B (--epochs E | --steps T) (--epsilon e | --noise_multiplier s) --delta d …`.

    Or `maskdp account --ledger DATA [--json]`.
    """
    if "--ledger" in arguments:
        return _ledger_main(arguments)
    # a bare --json reads better than the --json true of every other flag
    options = config.parse(AccountConfig, _with_value(arguments, "--json"), "account")
    figures = account(options.mechanism(), options.delta)
    if options.objective not in ("sgd", "public_only") and options.delta * options.n >= 1:
        sys.stderr.write(
            f"warning: delta {options.delta:g} is not below 1/n = {1 / options.n:.3g}: it would allow the private "
            "layer of one record to be published; choose a delta far below 1/n\n"
        )
    if options.json:
        print(json.dumps(figures, indent=2, allow_nan=False, ensure_ascii=False))
        return 0
    print(f"{options.objective} under {options.adjacency}, {options.sampling} batches")
    for name, value in figures.items():
        text = "none" if value is None else upward(value) if isinstance(value, float) else value
        print(f"  {name:<16}  {text}")
    return 0


def _ledger_main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="maskdp account", description="What publishing all runs on a dataset costs.")
    parser.add_argument("--ledger", required=True, metavar="DATA", help="two-layer dataset")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    entries = ledger.read(layers.Dataset(given.ledger))
    accounts = ledger.accounts(entries)
    if given.json:
        lines = [
            {
                **{name: value for name, value in account._asdict().items() if name != "epsilon"},
                "epsilon": account.epsilon and _finite(account.epsilon.value),
                "delta": account.epsilon and account.epsilon.delta,
            }
            for account in accounts
        ]
        print(json.dumps(lines, indent=2, allow_nan=False))
        return 0
    table = Table("started", "run", "objective", "split", "unit", "adjacency", "ε alone", "δ", box=None, pad_edge=False)
    for entry in entries:
        mechanism = entry.mechanism
        alone = mechanism.epsilon(entry.delta)
        words = (mechanism.objective, entry.split, mechanism.unit, mechanism.adjacency)
        table.add_row(entry.started[:16], entry.run[:8], *words, ledger.epsilon_words(alone), f"{entry.delta:g}")
    if entries:
        Console().print(table)
    for account in accounts:
        print(*ledger.sentences(account), sep="\n")
    if len(accounts) > 1:
        print("No single ε covers these accounts together. A record that is in several of them pays for each.")
    if not accounts:
        print(f"{given.ledger}: no run on private layers was started")
    return 0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _with_value(arguments: list[str], flag: str) -> list[str]:
    """`arguments` with `true` after a bare `flag`."""
    spelt = []
    for argument, following in zip(arguments, [*arguments[1:], "--"]):
        spelt.append(argument)
        if argument == flag and following.startswith("--"):
            spelt.append("true")
    return spelt
