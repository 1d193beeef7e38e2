"""What `maskdp audit` left in the folders of runs, as the report shows it."""

import math
from collections.abc import Sequence
from typing import Any

from maskdp.report.page import Row, number


def shown(table: Sequence[Row], private: bool) -> list[dict[str, Any]]:
    """One entry for each row whose first run was audited. Findings on private layers only where `private`."""
    return [_entry(row, private) for row in table if row.runs[0].audit]


def _entry(row: Row, private: bool) -> dict[str, Any]:
    audit = row.runs[0].audit
    findings = [finding for finding in audit["findings"] if private or not finding["private"]]
    broken = sum(not finding["holds"] for finding in findings)
    bounds = [bound for attack in audit["attacks"] for bound in attack["bounds"].values()]
    sentence = f"{broken} of {len(findings)} checks failed." if broken else f"All {len(findings)} checks hold."
    if bounds and row.epsilon is not None:
        sentence += f" The best attack shows ε ≥ {max(bounds):.2g}; the card claims ε = {number(row.epsilon)}."
    return {
        "name": row.name,
        "sentence": sentence,
        "failed": broken,
        "findings": findings,
        "lines": [
            {"colour": colour, "name": attack["name"], "points": _points(zip(attack["false"], attack["true"]))}
            for colour, attack in enumerate(audit["attacks"])
        ],
        "limit": _points(_allowed(row.epsilon, row.delta)) if row.epsilon is not None else "",
    }


def _allowed(epsilon: float, delta: float) -> list[tuple[float, float]]:
    """The highest true positive rate at each false positive rate that (ε, δ) leaves an attack."""
    factor = math.exp(min(epsilon, 700))
    rates = [step / 200 for step in range(201)]
    return [(rate, min(1.0, factor * rate + delta, 1 - (1 - delta - rate) / factor)) for rate in rates]


def _points(curve) -> str:
    return " ".join(f"{100 * false:.2f},{100 * (1 - true):.2f}" for false, true in curve)
