"""`maskdp train`: one run, from shards to a checkpoint with a privacy card. Reads top to bottom like the algorithm."""

import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from maskdp import atomic, layers, progress
from maskdp import config as config_files
from maskdp.errors import UserError
from maskdp_jax import card as cards
from maskdp_jax import checkpoint, ledger, lineage, parallel, run_folder
from maskdp_jax import environment as environments
from maskdp_jax.config import DataConfig, TrainConfig
from maskdp_jax.data import Clips, Views, contributions, shared_units, stream, units
from maskdp_jax.evaluate import Evaluator
from maskdp_jax.mechanism import Mechanism, calibrate, upward
from maskdp_jax.model import Network, Params, fits
from maskdp_jax.objectives import Objective
from maskdp_jax.step import Optimizers, StepBatch, make_step

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
    environments.ask_for_determinism()
    parallel.join()
    folder = train(config)
    if jax.process_index() == 0:
        result = json.loads((folder / run_folder.RESULT).read_text())
        shares = ", ".join(f"{100 * value:.1f} % on the {view}" for view, value in result["accuracy"].items())
        sys.stdout.write(f"{folder}: {config.objective.name}, {_claim(folder)}; accuracy {shares or 'not measured'}\n")
    return 0


def train(config: TrainConfig, rehearsal: Rehearsal | None = None) -> pathlib.Path:
    """Runs `config` to its end, from its last checkpoint if there is one, and returns the run folder.

    `rehearsal` is given by `maskdp audit` alone.

    Guarantees:
        The weights of every step, hence all checkpoints, keep to the ε of the card. The mechanism is stored before the
        first step and never computed again; the run is entered in the dataset's ledger before the first step. A run
        that was cut off repeats the steps since its last checkpoint with the same keys, bit for bit, which releases
        nothing new; where that cannot be (other config, data, devices, versions or code) it is refused.
        Card and result name the dataset by its random id; no hash of its contents leaves `run.json`.

    Raises:
        UserError: config, dataset and run folder do not go together.
    """
    folder = pathlib.Path(config.out)
    if (folder / run_folder.RESULT).exists():
        run_folder.refuse_other_config(folder, config)
        run_folder.refuse_other_dataset(folder, layers.Dataset(config.data.path).id)
        return folder

    # ---- Data: clips → records of the privacy unit.
    dataset = layers.Dataset(config.data.path)
    context = dataset.metadata.get("context")
    if config.objective.private and context != "none" and config.privacy.adjacency != "remove":
        raise UserError(
            f"{config.data.path}: its avatars were drawn in view of the scene (context {context}), for which no ε of "
            "the private layer holds; expected objective.type sgd, or dp_sgd with privacy.adjacency remove"
        )
    clips = Clips(dataset, config.data.split, config.data)
    eval_clips = _eval_clips(config, dataset)
    records = units(clips.keys, config.privacy)
    most_clips = max(map(len, records))
    contents = dataset.contents_tag()

    # ---- Model: from random weights or from those of a public run.
    network = Network(config.model, config.data.frames, config.data.size, len(clips.labels), config.seed)
    objective = Objective.from_config(network, config.objective)
    if rehearsal:
        objective = rehearsal.objective(objective)
    start = checkpoint.load(config.init) if config.init else None
    params = fits(start.params, network.init, head=start.labels == clips.labels) if start else network.init
    layout = parallel.Layout(config.parallel)
    state = layout.replicate(checkpoint.start_state(config, objective, params))

    # ---- Privacy: one object for batches and ε, stored at the start; one secret behind every draw.
    plan = plan_mechanism(config, len(records), dataset.id)
    environment = environments.describe(layout.mesh.size)
    if config.objective.private:
        environments.refuse_nondeterminism(jax.devices()[0].platform, environment["XLA_FLAGS"])
    if jax.process_index() == 0 and not run_folder.started(folder):
        sources = _sources(config, start, clips, eval_clips, dataset)
        mechanism = make_mechanism(config, len(records), dataset.id)
        run_folder.create(folder, config, mechanism, clips.labels, contents, environment, sources)
    _together("folder")
    run_id, secret, mechanism = run_folder.open_again(folder, config, plan, contents, environment)
    if jax.process_index() == 0:
        ledger.charge(dataset, run_id, config.data.split, config.objective.delta, mechanism)
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
    metrics = _Metrics(folder / run_folder.METRICS, first)
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
        used = sum(map(len, records))
        card = cards.make(
            config,
            mechanism,
            most=contributions(clips.keys, records),
            clips=used,
            left_out=len(clips) - used,
            context=context,
            people_kept=int(dataset.metadata.get("people_kept", 0)),
            start_weights=_origin(config, start),
            eval_overlap=config.data.eval_on_protected_records and bool(eval_clips),
        )
        atomic.write_json(folder / run_folder.CARD, card)
        atomic.write_json(
            folder / run_folder.RESULT,
            {
                "accuracy": {name.removeprefix("accuracy_"): value for name, value in accuracy.items()},
                "classes": len(clips.labels),
                "dataset": dataset.id,
                "eval_split": config.data.eval_split if eval_clips else None,
                "steps": mechanism.steps,
                "seconds": round(time.monotonic() - began, 1),
                "versions": environments.versions(),
            },
        )
    _together("end")
    return folder


def plan_mechanism(config: TrainConfig, num_units: int, dataset: str) -> Mechanism:
    """The mechanism of a run over `num_units` records; its noise is 0 where the config names an ε."""
    objective, optim = config.objective, config.optim
    own_batch = objective.name == "public_only" or (objective.masked and config.privacy.sampling == "independent")
    return Mechanism(
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
        unit=config.privacy.unit,
        dataset=dataset,
    )


def make_mechanism(config: TrainConfig, num_units: int, dataset: str = "") -> Mechanism:
    """The mechanism of a run over `num_units` records, with the least noise that keeps to ε if the config names one."""
    plan = plan_mechanism(config, num_units, dataset)
    objective = config.objective
    if objective.private and objective.epsilon is not None:
        return calibrate(plan, objective.epsilon, objective.delta)
    return plan


def _sources(
    config: TrainConfig,
    start: checkpoint.Trained | None,
    clips: Clips,
    eval_clips: Clips | None,
    dataset: layers.Dataset,
) -> list[lineage.Source]:
    """The sources behind the weights of a new run: itself, and those behind its start weights.

    Raises:
        UserError: the start weights or the evaluation records depend on records that this run protects.
    """
    # avatars drawn in view of the scene tell of it, so that learning from them alone reads private layers too
    tells = dataset.metadata.get("context") != "none" and config.objective.name == "public_only"
    own = lineage.of_clips(
        "sgd" if tells else config.objective.name, dataset.id, clips
    )  # its avatars tell of the scene
    behind = _sources_behind(config, start, clips, dataset.id) if start else []
    if config.objective.name == "sgd" or eval_clips is None or config.data.eval_on_protected_records:
        return [own, *behind]
    shared = shared_units(config.privacy, clips.keys, eval_clips.keys)
    alike = lineage.overlap(own, eval_clips, public_too=False)["private layers"]
    if shared or alike:
        what = f"{len(shared)} units ({', '.join(shared[:3])} …)" if shared else f"{alike} equal private layers"
        raise UserError(
            f"data.eval_split: {config.data.eval_split} shares {what} with {config.data.split}, whose records are "
            "protected; expected disjoint splits, or data.eval_on_protected_records for accuracies that no ε covers"
        )
    return [own, *behind]


def _sources_behind(config: TrainConfig, start: checkpoint.Trained, clips: Clips, dataset: str) -> list[lineage.Source]:
    """The sources behind start weights, which enter for free and so must be functions of public data.

    Raises:
        UserError: a run behind them was private, or read records that this run protects, known by video id, private or
            public layer (under `remove` also a run that read public layers alone); or it cannot be told which.
    """
    known = lineage.read(pathlib.Path(config.init))
    if config.objective.name == "sgd":
        return known or []
    runs = _origin(config, start)["runs"]
    for objective in (*(run["objective"] for run in runs), *(source.objective for source in known or ())):
        if objective not in ("sgd", "public_only"):
            raise UserError(f"init: {config.init} stems from a private {objective} run, expected public data")
    public_too = config.privacy.adjacency == "remove"
    for source in known or ():
        if source.objective == "public_only" and not public_too:
            continue
        for kind, count in lineage.overlap(source, clips, public_too=True).items():
            if count:
                raise UserError(
                    f"init: {config.init} was trained with {source.objective} on records protected here: "
                    f"{count} equal {kind} in {config.data.split}; expected public data"
                )
    for run in runs if known is None else ():
        if run["objective"] == "public_only" and not public_too:
            continue
        if run["dataset"] == dataset:
            raise UserError(f"init: {config.init} was trained on this very dataset, expected public data")
        if config.init != checkpoint.STUDIO_NAME and not config.init_is_public:
            raise UserError(
                f"init: {config.init} does not say which records it was trained on; expected a run folder, or "
                "init_is_public true if its data are public and hold no record protected here"
            )
    return known or []


def _origin(config: TrainConfig, start: checkpoint.Trained | None) -> dict[str, Any]:
    """Where the start weights come from, for the card."""
    if start is None:
        return {"from": "random", "runs": []}
    behind = start.card.get("start_weights", {}).get("runs", [])
    said = "runs that the user says are public" if config.init_is_public else "runs on public data"
    return {"from": said, "runs": [{"objective": start.objective.name, "dataset": start.dataset}, *behind]}


def _views(clips: Clips, records, layout: parallel.Layout, ids: np.ndarray, most_clips: int) -> Views | None:
    if not len(ids):
        return None
    padded = np.full(layout.padded(len(ids)), -1, np.int32)
    padded[: len(ids)] = ids
    return clips.batch([records[i] if i >= 0 else None for i in layout.local(padded)], most_clips)


def _eval_clips(config: TrainConfig, dataset: layers.Dataset) -> Clips | None:
    """The clips to evaluate on; None without `eval_split`, or where a dataset of one split has not the default one."""
    split = config.data.eval_split
    if split == DataConfig.eval_split and dataset.splits == [config.data.split]:
        if jax.process_index() == 0:
            sys.stderr.write(f"maskdp train: {dataset.path} has no split {split!r}: the run is not evaluated\n")
        return None
    return Clips(dataset, split, config.data) if split else None


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
    card = json.loads((folder / run_folder.CARD).read_text())
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
