"""`maskdp train`: one run, from shards to a checkpoint with a privacy card. Reads top to bottom like the algorithm."""

import dataclasses
import importlib.metadata
import json
import pathlib
import sys
import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from maskdp import atomic, layers, progress
from maskdp import config as config_files
from maskdp.errors import UserError
from maskdp_jax import card as cards
from maskdp_jax import checkpoint, parallel
from maskdp_jax.config import TrainConfig
from maskdp_jax.data import Clips, Views, contributions, stream, units
from maskdp_jax.evaluate import Evaluator
from maskdp_jax.keys import RunSecret
from maskdp_jax.mechanism import Mechanism, calibrate, upward
from maskdp_jax.model import Network, Params, fits
from maskdp_jax.objectives import Objective
from maskdp_jax.step import Optimizers, StepBatch, make_step

SECRET, RESULT, METRICS = "run.secret", "result.json", "metrics.jsonl"
_NOT_PRIVATE = "raw_* and accuracy_* are computed on private data without noise: keep this file with the data"


class Rehearsal(Protocol):
    """An attack on the loop of `train`: other terms in place of the records' own, and a look at every release."""

    def objective(self, objective: Objective) -> Objective:
        """The objective whose `term` is attacked with."""

    def watch(self, noised: Params) -> jax.Array:
        """What is kept of a noised sum, inside the compiled step."""

    def see(self, batch: StepBatch, watched: jax.Array) -> None:
        """One step: the batch it took, and what `watch` kept."""


def main(arguments: Sequence[str]) -> int:
    """`maskdp train --config_path F [--a.b value]`."""
    config = config_files.parse(TrainConfig, list(arguments), "train")
    parallel.join()
    folder = train(config)
    if jax.process_index() == 0:
        result = json.loads((folder / RESULT).read_text())
        shares = ", ".join(f"{100 * value:.1f} % on the {view}" for view, value in result["accuracy"].items())
        sys.stdout.write(f"{folder}: {config.objective.name}, {_claim(folder)}; accuracy {shares or 'not measured'}\n")
    return 0


def train(config: TrainConfig, rehearsal: Rehearsal | None = None) -> pathlib.Path:
    """Runs `config` to its end, from its last checkpoint if there is one, and returns the run folder.

    `rehearsal` is given by `maskdp audit` alone.

    Guarantees:
        The weights of every step, hence all checkpoints, keep to the ε of the card. A run that was cut off repeats the
        steps since its last checkpoint with the same keys, bit for bit, which releases nothing new; where that cannot
        be (other config, data, devices or versions) it is refused.

    Raises:
        UserError: config, dataset and run folder do not go together.
    """
    # ---- Data: clips → records of the privacy unit.
    dataset = layers.Dataset(config.data.path)
    context = dataset.metadata.get("context")
    if config.objective.private and context != "none" and config.privacy.adjacency != "remove":
        raise UserError(
            f"{config.data.path}: its avatars were drawn in view of the scene (context {context}), for which no ε of "
            "the private layer holds; expected objective.type sgd, or dp_sgd with privacy.adjacency remove"
        )
    clips = Clips(dataset, config.data.split, config.data)
    eval_clips = _eval_clips(config, dataset) if config.data.eval_split else None
    records = units(clips.keys, config.privacy)
    most_clips = max(map(len, records))
    fingerprint = dataset.fingerprint()

    # ---- Model: from random weights or from those of a public run.
    network = Network(config.model, config.data.frames, config.data.size, len(clips.labels), config.seed)
    objective = Objective.from_config(network, config.objective)
    if rehearsal:
        objective = rehearsal.objective(objective)
    params, init = _start_weights(config, network, clips.labels, fingerprint) if config.init else (network.init, None)
    layout = parallel.Layout(config.parallel)
    state = layout.replicate(checkpoint.start_state(config, objective, params))

    # ---- Privacy: one object for batches and ε; one secret behind every draw, bound to this run.
    mechanism = make_mechanism(config, len(records))
    about = {
        "config": config_files.fingerprint(dataclasses.replace(config, out="-")),
        "data": fingerprint,
        "labels": clips.labels,
        "devices": f"{layout.mesh.size} {jax.devices()[0].platform} in {jax.process_count()} processes",
        "versions": versions(),
    }
    folder = pathlib.Path(config.out)
    if jax.process_index() == 0:
        _open_folder(folder, config, about)
    _together("folder")
    run_id = json.loads((folder / checkpoint.RUN).read_text())["run_id"]
    secret = RunSecret.load(folder / SECRET, run_id, about["config"], fingerprint)
    if (folder / RESULT).exists():
        return folder
    checkpoints = checkpoint.Checkpoints(folder)
    if checkpoints.latest() is not None:
        state = checkpoints.restore(state, secret)
    first = int(state.step)

    # ---- Batches: element t is a function of the secret and t alone.
    def load(t: int) -> StepBatch:
        batch = mechanism.batch(secret, t)
        private, public = (_views(clips, records, layout, ids, most_clips) for ids in batch)
        return StepBatch(None, private) if objective.name == "sgd" else StepBatch(private, public)

    # ---- The loop.
    watch = rehearsal.watch if rehearsal else None
    step = make_step(objective, mechanism, Optimizers.from_config(config), layout, watch)
    evaluator = Evaluator(objective, eval_clips) if eval_clips else None
    metrics = _Metrics(folder / METRICS, first)
    began = time.monotonic()
    with progress.bar(f"train {objective.name}", mechanism.steps, "steps") as advance:
        advance(first)
        for t, batch in zip(
            range(first, mechanism.steps), stream(load, first, mechanism.steps, config.data.threads), strict=True
        ):
            state, values, norms = step(state, layout.shard(batch), secret.noise_key(t))
            if rehearsal:
                rehearsal.see(batch, values.pop("watched"))
            done = t + 1
            if _due(config.every.log, done):
                metrics.write(done, **_logged(objective, values, norms))
            if evaluator and _due(config.every.evaluate, done) and done < mechanism.steps:
                metrics.write(done, **_accuracies(evaluator, state))
            if _due(config.every.checkpoint, done) or done == mechanism.steps:
                metrics.flush()
                checkpoints.save(state, secret)
            advance(1)
    checkpoints.close()

    # ---- The end: figures, and the card.
    if jax.process_index() == 0:
        accuracy = _accuracies(evaluator, state) if evaluator else {}
        metrics.write(mechanism.steps, **accuracy)
        metrics.flush()
        card = cards.make(
            config,
            mechanism,
            most=contributions(clips.keys, records),
            clips=sum(map(len, records)),
            data={"fingerprint": fingerprint, "context": context},
            init=init,
        )
        atomic.write_json(folder / checkpoint.CARD, card)
        atomic.write_json(
            folder / RESULT,
            {
                "accuracy": {name.removeprefix("accuracy_"): value for name, value in accuracy.items()},
                "classes": len(clips.labels),
                "data": fingerprint,
                "eval_split": config.data.eval_split or None,
                "steps": mechanism.steps,
                "seconds": round(time.monotonic() - began, 1),
                "versions": about["versions"],
            },
        )
    _together("end")
    return folder


def make_mechanism(config: TrainConfig, num_units: int) -> Mechanism:
    """The mechanism of a run over `num_units` records, its noise calibrated if the config names an ε."""
    objective, optim = config.objective, config.optim
    own_batch = objective.name == "public_only" or (objective.masked and config.privacy.sampling == "independent")
    mechanism = Mechanism(
        num_units=num_units,
        batch_size=min(optim.batch, num_units),
        steps=optim.steps,
        objective=objective.name,
        adjacency="zero_out" if objective.name == "public_only" else config.privacy.adjacency,
        sampling=config.privacy.sampling,
        noise_multiplier=objective.noise_multiplier or 0.0 if objective.private else 0.0,
        l2_clip_norm=objective.l2_clip_norm,
        public_batch=min(optim.public_batch, num_units) if own_batch else None,
        exact=objective.private
        and (objective.name == "maskdp" if config.privacy.exact is None else config.privacy.exact),
    )
    if objective.private and objective.epsilon is not None:
        mechanism = calibrate(mechanism, objective.epsilon, objective.delta)
    return mechanism


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    return {name: importlib.metadata.version(name) for name in ("maskdp", "jax", "flax", "optax", "dp-accounting")}


def _open_folder(folder: pathlib.Path, config: TrainConfig, about: dict[str, Any]) -> None:
    """Makes the run folder with its secret, or checks that the one there is of this very run."""
    path = folder / checkpoint.RUN
    if path.exists():
        known = json.loads(path.read_text())
        for name, value in about.items():
            if known.get(name) != value:
                raise UserError(f"{folder}: holds a run with other {name}; expected the same, or another folder as out")
        return
    if folder.exists() and any(folder.iterdir()):
        if not (folder / SECRET).exists() or (folder / checkpoint.CHECKPOINTS).exists():
            raise UserError(f"{folder}: not empty and not a run, expected a new folder as out")
        (folder / SECRET).unlink()  # the run was cut off before its first line was written: nothing came of it
    run_id = uuid.uuid4().hex
    RunSecret.create(folder / SECRET, run_id, about["config"], about["data"])
    atomic.write_text(folder / checkpoint.CONFIG, config_files.dump(config))
    atomic.write_json(path, {"run_id": run_id, **about})


def _start_weights(config: TrainConfig, network: Network, labels: list[str], fingerprint: str):
    """Weights of the run or export `config.init`, and where they come from for the card.

    They enter for free, so they must be a function of public data, and so must all the runs behind them.

    Raises:
        UserError: a run behind them was private, or read what this run protects: the clips of this very dataset, or
            under `remove` also its avatars and labels.
    """
    trained = checkpoint.load(config.init)
    behind = trained.card.get("start_weights", {}).get("runs", [])
    runs = [{"objective": trained.objective.name, "data": trained.data}, *behind]
    for run in runs if config.objective.name != "sgd" else ():
        if run["objective"] not in ("sgd", "public_only"):
            raise UserError(f"init: {config.init} stems from a private {run['objective']} run, expected public data")
        if run["data"] == fingerprint and (run["objective"] == "sgd" or config.privacy.adjacency == "remove"):
            raise UserError(
                f"init: {config.init} was trained with {run['objective']} on this very dataset, expected public data"
            )
    params = fits(trained.params, network.init, head=trained.labels == labels)
    return params, {"from": "runs on datasets taken as public", "runs": runs}


def _views(clips: Clips, records, layout: parallel.Layout, ids: np.ndarray, most_clips: int) -> Views | None:
    if not len(ids):
        return None
    padded = np.full(layout.padded(len(ids)), -1, np.int32)
    padded[: len(ids)] = ids
    return clips.batch([records[i] if i >= 0 else None for i in layout.local(padded)], most_clips)


def _eval_clips(config: TrainConfig, dataset: layers.Dataset) -> Clips:
    return Clips(dataset, config.data.eval_split, config.data)


def _accuracies(evaluator: Evaluator, state) -> dict[str, float]:
    if jax.process_index():
        return {}
    weights = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), checkpoint.released(state))
    return {f"accuracy_{view}": value for view, value in evaluator.accuracy(weights).items()}


def _logged(objective: Objective, values: dict[str, Any], norms: jax.Array) -> dict[str, float]:
    """Loss and norms under names that say whether they are private."""
    prefix = "raw_" if objective.name == "sgd" else "public_"
    found = {f"{prefix}{name}": float(value.addressable_data(0)) for name, value in values.items()}
    local = np.concatenate([np.asarray(part.data).ravel() for part in norms.addressable_shards])
    if (local > 0).any():
        found["raw_median_norm"] = float(np.median(local[local > 0]))
    return found


def _due(every: int, done: int) -> bool:
    return bool(every) and done % every == 0


def _together(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _claim(folder: pathlib.Path) -> str:
    card = json.loads((folder / checkpoint.CARD).read_text())
    return "no ε" if card["epsilon"] is None else f"ε = {upward(card['epsilon'], 4)} at δ = {card['delta']:g}"


class _Metrics:
    """`metrics.jsonl`: one record a logged step, written at every checkpoint; what a resumed run repeats is cut off."""

    def __init__(self, path: pathlib.Path, first: int):
        self._path = path
        known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self._lines = [{"note": _NOT_PRIVATE}, *(line for line in known if line.get("step", first + 1) <= first)]

    def write(self, step: int, **values: float) -> None:
        self._lines.append({"step": step, **values})

    def flush(self) -> None:
        if jax.process_index() == 0:
            atomic.write_text(self._path, "".join(json.dumps(line) + "\n" for line in self._lines))
