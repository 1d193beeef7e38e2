"""`maskdp audit`: tries to break the claims of a dataset, of a run, or of an export.

stored      contract of a dataset, secret of a run
claims      card, mechanism and config agree; a second account
terms       the run's own model and records: how far one record moves the sum, what reaches θ without noise
canaries    worst-case records through the real training loop
law         do the releases of that rehearsal follow the stated law?
bounds      lower bounds on ε from it
exports     what may leave the lab, searched byte by byte
membership  attacks on the trained model alone
"""

import argparse
import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from maskdp import __version__, atomic, layers
from maskdp.errors import UserError
from maskdp_jax import checkpoint, run_folder
from maskdp_jax.audit import bounds, canaries, claims, exports, law, membership, stored, terms
from maskdp_jax.audit.findings import Finding
from maskdp_jax.data import Clips, units
from maskdp_jax.export import export
from maskdp_jax.mechanism import Mechanism

REPORT = "audit.json"
"""What an audit leaves in the folder of a run; `maskdp report` shows it."""

STEPS = 300
"""Steps of a rehearsal at most."""


def audit_dataset(folder: str | pathlib.Path) -> Iterator[Finding]:
    """Checks of a dataset."""
    return stored.dataset_checks(layers.Dataset(folder))


def audit_export(folder: str | pathlib.Path, data: str | pathlib.Path | None) -> Iterator[Finding]:
    """Checks of what may leave the lab; with `data`, for hashes of its files too."""
    folder = pathlib.Path(folder)
    dataset = layers.Dataset(data) if data else None
    yield exports.scan(folder, exports.secrets_of(None, dataset), exports.released_arrays(folder))


def audit_run(
    folder: str | pathlib.Path, steps: int = STEPS, rehearsals: int = 1
) -> Iterator[Finding | list[bounds.Attack]]:
    """Checks of a finished run, and the attacks made on its rehearsals."""
    folder = pathlib.Path(folder)
    trained = checkpoint.load(folder)
    if not trained.card:
        raise UserError(f"{folder}: has no privacy card, expected a finished run")
    config, card = run_folder.read_config(folder), trained.card
    yield from stored.secret_checks(folder)
    dataset = layers.Dataset(config.data.path)
    same = dataset.contents_tag() == run_folder.read(folder)["contents"]
    yield Finding("the dataset is the one it was trained on", same, "it is" if same else "it is another")
    if not same:
        return
    with tempfile.TemporaryDirectory(prefix="maskdp-audit-") as aside:
        released = export(folder, pathlib.Path(aside) / "export")
        yield exports.scan(released, exports.secrets_of(folder, dataset), exports.released_arrays(released))
    count = len(units(Clips(dataset, config.data.split, config.data).keys, config.privacy))
    recorded = Mechanism(**card["mechanism"])
    if card["epsilon"] is None:
        yield Finding(
            "an ε is stated only for noisy runs", not config.objective.private, f"{config.objective.name}: none"
        )
    else:
        yield from claims.claims(config, card, count, dataset.id)
    yield from terms.terms(trained.objective, trained.weights, config, recorded, dataset)
    if config.data.eval_split in dataset.splits and len(dataset[config.data.eval_split]) > membership.DECOYS:
        yield membership.finding(trained, dataset, config.data.split, config.data.eval_split)
    if card["epsilon"] is not None and recorded.noise_multiplier:
        for _ in range(rehearsals):
            rehearsed = canaries.rehearse(config, recorded, len(trained.labels), steps)
            yield from law.laws(rehearsed)
            finding, attacks = bounds.lower_bound(rehearsed, card["delta"])
            yield finding
            yield attacks


def report(findings: Sequence[Finding], attacks: Sequence[bounds.Attack]) -> dict[str, Any]:
    """What `audit.json` holds. Findings that depend on private layers say so; `maskdp report` leaves them out."""
    curves = [(attack, *attack.curve()) for attack in attacks]
    return {
        "maskdp": __version__,
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "attacks": [
            {"name": attack.name, "bounds": dict(attack.bounds), "false": false, "true": true}
            for attack, false, true in curves
        ],
    }


def line(finding: Finding) -> str:
    """What was checked, whether it holds, what was found and what is claimed."""
    claimed = f"; claimed: {finding.claimed}" if finding.claimed else ""
    return f"{'holds' if finding.holds else 'FAILS'}  {finding.check}: {finding.found}{claimed}"


def main(arguments: Sequence[str]) -> int:
    """`maskdp audit RUN|DATASET|EXPORT`; exit status 1 where a check fails."""
    parser = argparse.ArgumentParser(prog="maskdp audit", description=main.__doc__)
    parser.add_argument("path", help="run folder, two-layer dataset, or export")
    parser.add_argument("--data", help="of an export: the dataset whose hashes must not be in it")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of a rehearsal at most, default {STEPS}")
    parser.add_argument("--rehearsals", type=int, default=1, help="runs on canaries, default 1")
    given = parser.parse_args(arguments)
    if min(given.steps, given.rehearsals) < 1:
        raise UserError("--steps, --rehearsals: expected numbers above 0")
    path = pathlib.Path(given.path)
    if (path / run_folder.RUN).exists():
        found = audit_run(path, given.steps, given.rehearsals)
    elif (path / checkpoint.MODEL).exists():
        found = audit_export(path, given.data)
    else:
        found = audit_dataset(path)
    findings: list[Finding] = []
    attacks: list[bounds.Attack] = []
    for one in found:
        if isinstance(one, Finding):
            findings.append(one)
            sys.stdout.write(line(one) + "\n")
            sys.stdout.flush()
        else:
            attacks += one
    if (path / run_folder.RUN).exists():
        atomic.write_json(path / REPORT, report(findings, attacks))
    broken = sum(not finding.holds for finding in findings)
    sys.stdout.write(f"{path}: {len(findings)} checks, {broken or 'none'} failed\n")
    return 1 if broken else 0
