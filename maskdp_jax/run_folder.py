"""The folder of a run: opened once, and on every later start compared with what was stored at the first.

`run.json` is the one record of what the run is: its id, dataset, labels, environment and the whole `Mechanism` with the
noise as it was computed. It is never computed again: a resumed run takes its mechanism from there.
"""

import dataclasses
import json
import pathlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from maskdp import atomic
from maskdp import config as config_files
from maskdp.errors import UserError
from maskdp_jax import lineage
from maskdp_jax.config import TrainConfig
from maskdp_jax.keys import RunSecret
from maskdp_jax.mechanism import Mechanism

CONFIG, RUN, SECRET, RESULT, CARD, METRICS, CHECKPOINTS = (
    "config.yaml",
    "run.json",
    "run.secret",
    "result.json",
    "privacy_card.json",
    "metrics.jsonl",
    "checkpoints",
)

_PLACES = {"out": "-", "data.path": "-"}  # where things lie may change; what they hold may not


class Opened(NamedTuple):
    """A run that may start or go on: its id, secret and mechanism."""

    run_id: str
    secret: RunSecret
    mechanism: Mechanism


def started(folder: pathlib.Path) -> bool:
    """Whether a run was opened here."""
    return (folder / RUN).exists()


def create(
    folder: pathlib.Path,
    config: TrainConfig,
    mechanism: Mechanism,
    labels: list[str],
    contents_tag: str,
    environment: Mapping[str, str],
    sources: Sequence[lineage.Source],
) -> None:
    """Opens a new run: secret, config, lineage and, last, `run.json`.

    Raises:
        UserError: the folder holds something else, or another process was first.
    """
    if started(folder):
        raise UserError(f"{folder}: opened by another process in the meantime, expected a folder of its own as out")
    if folder.exists() and any(folder.iterdir()):
        if not (folder / SECRET).exists() or (folder / CHECKPOINTS).exists():
            raise UserError(f"{folder}: not empty and not a run, expected a new folder as out")
        (folder / SECRET).unlink()  # the run was cut off before run.json was written, so it has taken no step
    run_id = uuid.uuid4().hex
    RunSecret.create(folder / SECRET, run_id, _config_hash(config), contents_tag)
    atomic.write_text(folder / CONFIG, config_files.dump(config))
    lineage.write(folder, sources)
    about = {
        "run_id": run_id,
        "contents": contents_tag,
        "labels": labels,
        "environment": dict(environment),
        "mechanism": mechanism.as_dict(),
    }
    atomic.write_json(folder / RUN, about)


def open_again(
    folder: pathlib.Path, config: TrainConfig, plan: Mechanism, contents_tag: str, environment: Mapping[str, str]
) -> Opened:
    """The run in `folder`, if it is the one described.

    Args:
        plan: the mechanism as `config` and the data describe it; where its noise is yet to be calibrated, 0.

    Guarantees:
        The mechanism is the stored one. A difference in config, dataset, mechanism or environment is refused, so that
        every replayed step is the same release.

    Raises:
        UserError: a difference, named; or the secret is missing or another run's.
    """
    refuse_other_config(folder, config)
    about = read(folder)
    stored = Mechanism(**about["mechanism"])
    planned = dataclasses.replace(plan, noise_multiplier=plan.noise_multiplier or stored.noise_multiplier)
    for name, value in planned.as_dict().items():
        if value != getattr(stored, name):
            _refuse(folder, f"mechanism.{name}", getattr(stored, name), value)
    if about["contents"] != contents_tag:
        raise UserError(f"{folder}: holds a run on other data; its dataset has changed, expected another folder as out")
    known = about["environment"]
    for name in sorted(known.keys() | environment.keys()):
        if known.get(name) != environment.get(name):
            _refuse(folder, name, known.get(name), environment.get(name))
    secret = RunSecret.load(folder / SECRET, about["run_id"], _config_hash(config), contents_tag)
    return Opened(about["run_id"], secret, stored)


def refuse_other_config(folder: pathlib.Path, config: TrainConfig) -> None:
    """Raises UserError, with the key, if the run in `folder` was started with another config.

    Where the run and the dataset lie does not count.
    """
    stored, given = (config_files.flatten(config_files.resolved(one)) for one in (read_config(folder), config))
    for key in sorted(stored.keys() | given.keys()):
        if key not in _PLACES and stored.get(key) != given.get(key):
            _refuse(folder, key, stored.get(key), given.get(key))


def refuse_other_dataset(folder: pathlib.Path, dataset: str) -> None:
    """Raises UserError if the run in `folder` is not on the dataset with this id."""
    if dataset != (known := read(folder)["mechanism"]["dataset"]):
        _refuse(folder, "dataset", known, dataset)


def _refuse(folder: pathlib.Path, key: str, stored: Any, given: Any) -> None:
    raise UserError(f"{folder}: holds a run with {key} {stored!r}, not {given!r}; expected another folder as out")


def read(folder: pathlib.Path) -> dict[str, Any]:
    """`run.json`.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / RUN
    try:
        about = json.loads(path.read_text())
        if {"run_id", "contents", "labels", "environment", "mechanism"} <= about.keys():
            return about
        raise ValueError("incomplete, or of an older version")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def read_config(folder: str | pathlib.Path) -> TrainConfig:
    """The resolved config that a run wrote.

    Raises:
        UserError: `folder` is not a run folder.
    """
    path = pathlib.Path(folder) / CONFIG
    if not path.exists():
        raise UserError(f"{folder}: not a run, expected a folder that `maskdp train` or `maskdp export` wrote")
    return config_files.parse(TrainConfig, ["--config_path", str(path)], "train")


def _config_hash(config: TrainConfig) -> str:
    values = config_files.flatten(config_files.resolved(config)) | _PLACES
    return config_files.digest(values)
