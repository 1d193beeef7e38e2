"""`maskdp export`: what may leave the lab. Weights, labels, config and card; no secret, no optimiser state, no path."""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import orbax.checkpoint as ocp
from rich.console import Console

from maskdp import atomic
from maskdp import config as config_files
from maskdp.errors import UserError
from maskdp_jax import checkpoint


def export(run: str | pathlib.Path, out: str | pathlib.Path) -> pathlib.Path:
    """Writes the trained model of `run` to the new folder `out`, in one step.

    Guarantees:
        The export is a function of the released weights, of labels and config, and of the card. It holds neither the
        run's secret or id, nor states of optimisers, nor metrics, nor a path of the machine it was trained on.

    Raises:
        UserError: `run` has not finished, or `out` exists.
    """
    out = pathlib.Path(out)
    if out.exists():
        raise UserError(f"{out}: exists, expected a new folder")
    trained = checkpoint.load(run)
    if not trained.card:
        raise UserError(f"{run}: has no privacy card, expected a finished run")
    config = checkpoint.read_config(run)
    bare = dataclasses.replace(config, out="-", init="", data=dataclasses.replace(config.data, path="-"))
    with atomic.folder(out) as aside:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((aside / checkpoint.WEIGHTS).absolute(), jax.device_get(trained.weights))
        atomic.write_text(aside / checkpoint.CONFIG, config_files.dump(bare))
        atomic.write_json(aside / checkpoint.CARD, dict(trained.card))
        atomic.write_json(aside / checkpoint.MODEL, {"labels": trained.labels, "data": trained.data})
    return out


def main(arguments: Sequence[str]) -> int:
    """`maskdp export RUN --out DIR`."""
    parser = argparse.ArgumentParser(prog="maskdp export", description=main.__doc__)
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("--out", required=True, help="new folder for the model")
    given = parser.parse_args(arguments)
    Console().print(f"{export(given.run, given.out)}: weights, labels, config and privacy card", highlight=False)
    return 0
