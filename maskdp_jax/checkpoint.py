"""Checkpoints of a run (Orbax), and trained models read back from a run or an export."""

import dataclasses
import functools
import hmac
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from maskdp import config as config_files
from maskdp.errors import UserError
from maskdp_jax import run_folder
from maskdp_jax import step as steps
from maskdp_jax.config import DataConfig, TrainConfig
from maskdp_jax.keys import RunSecret
from maskdp_jax.model import Network, Params
from maskdp_jax.objectives import Objective, Weights

MODEL, WEIGHTS = "model.json", "weights"
"""Files of an export, which holds no `run.json`."""


class Checkpoints:
    """The checkpoints in a run folder: whole or absent, the newest two kept.

    Guarantees:
        A checkpoint holds the state and a keyed hash of the run's secret, never the secret.
    """

    def __init__(self, folder: str | pathlib.Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(pathlib.Path(folder).absolute() / run_folder.CHECKPOINTS, options=options)

    def latest(self) -> int | None:
        """Steps done at the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def save(self, state: steps.State, secret: RunSecret) -> None:
        """Writes `state` under its number of steps. Every process calls it."""
        meta = {"secret": secret.fingerprint()}
        self._manager.save(
            int(state.step), args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        )

    def restore(self, like: steps.State, secret: RunSecret | None = None) -> steps.State:
        """The newest state, laid out as `like` (arrays or shapes).

        Raises:
            UserError: there is none, or it was written by a run with another secret.
        """
        if self.latest() is None:
            raise UserError(f"{self._manager.directory}: no checkpoint, expected a run that has taken a step")
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), meta=ocp.args.JsonRestore())
        restored = self._manager.restore(self.latest(), args=args)
        if secret is not None and not hmac.compare_digest(restored.meta["secret"], secret.fingerprint()):
            raise UserError(f"{self._manager.directory}: written with another secret than the run's")
        return restored.state

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()


STUDIO_NAME = "studio"
STUDIO = pathlib.Path(__file__).parent / "assets" / "studio"
"""Export of a model trained on public studio clips, `configs/pretrain.yaml`."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model, ready for use.

    Attributes:
        objective: how it answers (`Objective.logits`).
        weights: its parameters, the averaged W among them.
        labels: class names.
        views: how clips are brought before it.
        config: resolved values of the run's config.
        card: its privacy card.
        dataset: random id of the dataset it was trained on.
    """

    objective: Objective
    weights: Weights
    labels: list[str]
    views: DataConfig
    config: Mapping[str, Any]
    card: Mapping[str, Any]
    dataset: str

    @property
    def params(self) -> Params:
        """All parameters of f."""
        return self.weights.theta | self.weights.fixed


def load(folder: str | pathlib.Path) -> Trained:
    """The trained model in a run folder or an export; `studio` is the encoder that comes with the project.

    Raises:
        UserError: it is neither, or the run has no checkpoint yet.
    """
    folder = STUDIO if str(folder) == STUDIO_NAME else pathlib.Path(folder)
    config = run_folder.read_config(folder)
    exported = (folder / MODEL).exists()
    about = _json(folder / MODEL) if exported else run_folder.read(folder)
    network = Network(config.model, config.data.frames, config.data.size, len(about["labels"]), config.seed)
    objective = Objective.from_config(network, config.objective)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # wherever it was trained
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        jax.eval_shape(functools.partial(start_state, config, objective), network.shapes),
    )
    if exported:
        with ocp.StandardCheckpointer() as checkpointer:
            weights = checkpointer.restore((folder / WEIGHTS).absolute(), like.weights)
    else:
        checkpoints = Checkpoints(folder)
        state = checkpoints.restore(like)
        checkpoints.close()
        weights = released(state)
    card = _json(folder / run_folder.CARD) if (folder / run_folder.CARD).exists() else {}
    return Trained(
        objective,
        weights,
        list(about["labels"]),
        config.data,
        config_files.resolved(config),
        card,
        about["dataset"] if exported else about["mechanism"]["dataset"],
    )


def start_state(config: TrainConfig, objective: Objective, params: Params) -> steps.State:
    """The state before the first step of a run that starts from `params`."""
    theta, fixed = split(params, config.trainable)
    return steps.start(objective, steps.Optimizers.from_config(config), theta, fixed)


def split(params: Params, patterns: tuple[str, ...]) -> tuple[Params, Params]:
    """`params` as (trained, fixed): trained is what any of the regular expressions matches somewhere in its name.

    Raises:
        UserError: an expression is malformed or matches nothing.
    """
    for pattern in patterns:
        try:
            found = any(re.search(pattern, name) for name in params)
        except re.error as error:
            raise UserError(f"trainable: {pattern!r} is not a regular expression ({error})") from None
        if not found:
            raise UserError(f"trainable: {pattern!r} matches no parameter, expected one of {', '.join(sorted(params))}")
    trained = {name for name in params if any(re.search(pattern, name) for pattern in patterns)}
    return {n: p for n, p in params.items() if n in trained}, {n: p for n, p in params.items() if n not in trained}


def released(state: steps.State) -> Weights:
    """The weights to use and release: the averaged W in place of its last iterate."""
    return state.weights._replace(head=state.average)


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
