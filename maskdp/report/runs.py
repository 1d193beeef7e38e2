"""Run folders as `maskdp train` leaves them, read without jax; and runs that share a configuration."""

import dataclasses
import functools
import json
import math
import pathlib
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from maskdp import config as config_files
from maskdp.errors import UserError

CONFIG = "config.yaml"
CARD = "privacy_card.json"
RESULT = "result.json"
METRICS = "metrics.jsonl"
AUDIT = "audit.json"

NOT_SETTINGS = ("seed", "out")
"""Keys in which runs of one configuration may differ."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of `count` runs; `sd` is None for one run."""

    mean: float
    sd: float | None
    count: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """The Spread of the finite values, None where there are none."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite:
        return None
    return Spread(statistics.fmean(finite), statistics.stdev(finite) if len(finite) > 1 else None, len(finite))


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        name: name of its folder.
        config: resolved config.
        card: its privacy card.
        result: final figures.
        metrics: one record a logged step.
        audit: what `maskdp audit` found; empty where none was made.
    """

    name: str
    config: Mapping[str, Any]
    card: Mapping[str, Any]
    result: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]
    audit: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def objective(self) -> str:
        """Name of the objective."""
        return self.config["objective"]["type"]

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The config flattened to dotted keys, without what runs of one configuration may differ in."""
        flat = config_files.flatten(self.config)
        return {key: value for key, value in flat.items() if key not in NOT_SETTINGS}

    @property
    def settings_hash(self) -> str:
        """Short hash that runs of one configuration share; the dataset counts by its id, not by where it lies."""
        values = {**self.settings, "data.path": self.result["dataset"]}
        return config_files.digest(values)[:12]

    def accuracy(self, view: str) -> float | None:
        """Final accuracy on `composite` or `public_view`, None where it was not measured."""
        return self.result.get("accuracy", {}).get(view)


def load(folder: str | pathlib.Path) -> Run:
    """Reads a run folder.

    Raises:
        UserError: not a run folder, not finished, or a file of it cannot be read.
    """
    folder = pathlib.Path(folder)
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder}: not a run folder, expected one that `maskdp train` wrote")
    for name in (CARD, RESULT):
        if not (folder / name).exists():
            raise UserError(f"{folder}: has no {name}, expected a finished run")
    try:
        config = yaml.safe_load((folder / CONFIG).read_text())
        card, result = (json.loads((folder / name).read_text()) for name in (CARD, RESULT))
        audit = json.loads((folder / AUDIT).read_text()) if (folder / AUDIT).exists() else {}
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: cannot be read ({' '.join(str(error).split())})") from None
    if "dataset" not in card or "dataset" not in result:
        raise UserError(f"{folder}: of an older version, whose card is not to be released; expected a run made again")
    return Run(folder.resolve().name, config, card, result, tuple(_lines(folder / METRICS)), audit)


def _lines(path: pathlib.Path) -> Iterable[dict[str, Any]]:
    """Records of a JSON-lines file; a last line that was cut off by a kill is passed over."""
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def find(paths: Iterable[str | pathlib.Path]) -> list[pathlib.Path]:
    """The run folders among `paths`; a folder of runs (a sweep) stands for the finished runs below it.

    Raises:
        UserError: a path holds no finished run.
    """
    found: list[pathlib.Path] = []
    for path in map(pathlib.Path, paths):
        inside = [path] if (path / CONFIG).exists() else sorted(file.parent for file in path.rglob(RESULT))
        if not inside:
            raise UserError(f"{path}: holds no finished run, expected folders that `maskdp train` wrote")
        found += [folder for folder in inside if folder not in found]
    return found


def by_settings(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs grouped by configuration, in the order given."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.settings_hash, []).append(run)
    return list(groups.values())
