"""`maskdp export`: what may leave the lab. Weights, labels, config and card; no secret, no optimiser state, no path."""

import argparse
import dataclasses
import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from rich.console import Console

from maskdp import atomic
from maskdp import config as config_files
from maskdp.errors import UserError
from maskdp_jax import checkpoint, run_folder


def export(run: str | pathlib.Path, out: str | pathlib.Path) -> pathlib.Path:
    """Writes the trained model of `run` to the new folder `out`, in one step.

    Guarantees:
        The bytes of the export are a function of the released weights, of labels and config, and of the card: equal
        ones give equal exports, whatever the private layers, the time and the machine. It holds neither the run's
        secret or id, nor states of optimisers, nor metrics, nor a path.

    Raises:
        UserError: `run` has not finished, or `out` exists.
    """
    out = pathlib.Path(out)
    if out.exists():
        raise UserError(f"{out}: exists, expected a new folder")
    trained = checkpoint.load(run)
    if not trained.card:
        raise UserError(f"{run}: has no privacy card, expected a finished run")
    config = run_folder.read_config(run)
    bare = dataclasses.replace(config, out="-", init="", data=dataclasses.replace(config.data, path="-"))
    with atomic.folder(out) as aside:
        write_weights(aside / checkpoint.WEIGHTS, trained.weights)
        atomic.write_text(aside / run_folder.CONFIG, config_files.dump(bare))
        atomic.write_json(aside / run_folder.CARD, dict(trained.card))
        atomic.write_json(aside / checkpoint.MODEL, {"labels": trained.labels, "dataset": trained.dataset})
    return out


def write_weights(path: pathlib.Path, weights: Any) -> None:
    """Writes weights as an Orbax checkpoint whose bytes depend on them alone.

    One file an array (OCDBT draws random file names), without the times and the path that Orbax records.
    """
    weights = jax.tree.map(np.asarray, jax.device_get(weights))
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)  # Orbax warns that there is nothing to merge without OCDBT
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
            checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(weights))
    finally:
        log.setLevel(level)
    (path / "commit_success.txt").unlink(missing_ok=True)
    metadata = path / "_CHECKPOINT_METADATA"
    known = json.loads(metadata.read_text())
    metadata.write_text(json.dumps({key: value for key, value in known.items() if "timestamp" not in key}))


def main(arguments: Sequence[str]) -> int:
    """`maskdp export RUN --out DIR`."""
    parser = argparse.ArgumentParser(prog="maskdp export", description=main.__doc__)
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("--out", required=True, help="new folder for the model")
    given = parser.parse_args(arguments)
    Console().print(f"{export(given.run, given.out)}: weights, labels, config and privacy card", highlight=False)
    return 0
