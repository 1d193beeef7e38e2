"""`maskdp audit`: tries to break the claims of a dataset or of a run."""

import argparse
import dataclasses
import json
import math
import pathlib
import re
import stat
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax_privacy.auditing import CanaryScoreAuditor
from rich.console import Console
from rich.table import Table

from maskdp import layers, progress
from maskdp.errors import UserError
from maskdp_jax import checkpoint, parallel
from maskdp_jax import step as steps
from maskdp_jax.config import ParallelConfig, TrainConfig
from maskdp_jax.data import Clips, Views, units
from maskdp_jax.mechanism import Mechanism
from maskdp_jax.train import SECRET, make_mechanism

_SIGNIFICANCE = 0.05
_SHIFT = 0.5  # noise deviations between the two worlds: an ε that some hundred trials can refute
_MOST_RANDOM_NUMBERS = 2e8


class Finding(NamedTuple):
    """One check: what was checked, whether it held, and what was seen."""

    check: str
    holds: bool
    seen: str


def audit_dataset(folder: str | pathlib.Path) -> Iterator[Finding]:
    """Checks of a dataset: the contract in every frame, no path in any key, what the avatars were drawn from."""
    dataset = layers.Dataset(folder)
    broken, paths, count = [], [], 0
    total = sum(len(dataset[split]) for split in dataset.splits)
    with progress.bar("audit", total, "clips") as advance:
        for split in dataset.splits:
            for record in dataset[split]:
                count += 1
                try:
                    record.layers(range(record.frames))
                except UserError as error:
                    broken.append(str(error))
                names = (record.clip_id, record.video_id, record.scene_id, *record.subject_ids)
                if any(re.search(r"^[/~]|\\|\.\.|^[A-Za-z]:", name) for name in names) or not re.fullmatch(
                    r"[0-9a-f]{64}", record.source
                ):
                    paths.append(record.clip_id)
                advance(1)
    yield Finding(
        "no colour where alpha is 0, in every frame", not broken, broken[0] if broken else f"{count} clips, all frames"
    )
    yield Finding("no path in keys and source", not paths, ", ".join(paths[:3]) or "none")
    context = dataset.metadata.get("context")
    yield Finding("avatars independent of the scene", context == "none", f"context: {context}")


def audit_run(folder: str | pathlib.Path, trials: int) -> Iterator[Finding]:
    """Checks of a finished run: where its ε comes from, where its secret is, and a game against the real step."""
    folder = pathlib.Path(folder)
    trained = checkpoint.load(folder)
    if not trained.card:
        raise UserError(f"{folder}: has no privacy card, expected a finished run")
    yield from _secret(folder)
    config, card = checkpoint.read_config(folder), trained.card
    if card["epsilon"] is None:
        yield Finding(
            "an ε is stated only for noisy runs", not config.objective.private, f"{config.objective.name}: none"
        )
        return
    recorded = Mechanism(**card["mechanism"])
    own = recorded.epsilon(card["delta"]).value
    yield Finding(
        "ε follows from the mechanism", own <= card["epsilon"] * (1 + 1e-6), f"{own:.6g} of {card['epsilon']:.6g}"
    )
    dataset = layers.Dataset(config.data.path)
    same = dataset.fingerprint() == trained.data
    yield Finding("the dataset is the one it was trained on", same, config.data.path)
    if not same:
        return
    count = len(units(Clips(dataset, config.data.split, config.data).keys, config.privacy))
    from_config = make_mechanism(config, count)
    yield Finding(
        "the mechanism follows from the config", from_config == recorded, recorded.epsilon(card["delta"]).event
    )
    yield game(trained, config, recorded, trials)


def _secret(folder: pathlib.Path) -> Iterator[Finding]:
    path = folder / SECRET
    if not path.exists():
        yield Finding("secret kept from the run folder", True, "no run.secret here")
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    yield Finding("secret readable by its owner alone", mode == 0o600, f"mode {mode:04o}")
    words = json.loads(path.read_text())["secret"]
    needles = (words.encode(), bytes.fromhex(words))
    files = [file for file in folder.rglob("*") if file.is_file() and file != path]
    leaks = [str(file.relative_to(folder)) for file in files if any(needle in file.read_bytes() for needle in needles)]
    yield Finding("secret in no other file of the run", not leaks, ", ".join(leaks) or f"{len(files)} files searched")


def game(trained: checkpoint.Trained, config: TrainConfig, mechanism: Mechanism, trials: int) -> Finding:
    """A distinguishing game on the real step: half of the trials have one training record, half its neighbour.

    The adversary sees several releases at the final weights, every one with the record, and projects them on the
    direction in which the neighbours differ. A lower bound on ε (Clopper and Pearson, arXiv 2101.04535) above what
    the mechanism claims for so many releases shows a fault in clipping, noise or accounting.
    """
    clips = Clips(layers.Dataset(config.data.path), config.data.split, config.data)
    records = units(clips.keys, config.privacy)
    there = clips.batch([records[0]], max(map(len, records)))
    neighbour = there._replace(composite=there.public)
    if mechanism.adjacency == "remove":
        neighbour = there._replace(padding=~there.padding)
    layout = parallel.Layout(ParallelConfig(devices=1))
    ratio = mechanism.noise_multiplier / mechanism.sensitivity
    size = sum(leaf.size for leaf in jax.tree.leaves(trained.objective.noisy(trained.weights)))
    affordable = max(1, int(_MOST_RANDOM_NUMBERS / (2 * trials * size)))
    releases = min(math.ceil((_SHIFT * ratio) ** 2), affordable)
    played = Mechanism(
        num_units=1,
        batch_size=1,
        steps=releases,
        objective=mechanism.objective,
        adjacency=mechanism.adjacency,
        noise_multiplier=mechanism.noise_multiplier,
        l2_clip_norm=mechanism.l2_clip_norm,
    )

    def released(mechanism: Mechanism):
        def one(weights, batch: Views, key):
            noised, norms = steps.release(trained.objective, mechanism, layout, weights, batch, key)
            return weights, noised, norms

        return lambda batch, key: layout.mapped(one)(trained.weights, batch, key)[1]

    silent = jax.jit(released(dataclasses.replace(played, noise_multiplier=0.0)))
    keys = jax.random.split(jax.random.key(0), (2,))
    gap = jax.tree.map(jnp.subtract, silent(there, keys), silent(neighbour, keys))
    length = math.sqrt(sum(float(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(gap)))

    def score(batch: Views, key) -> jax.Array:
        noised = released(played)(batch, key)
        return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(noised), jax.tree.leaves(gap)))

    play = jax.jit(lambda batch, trial: jnp.sum(jax.lax.map(lambda key: score(batch, key), trial)))

    seed = np.random.SeedSequence().generate_state(2 * 2 * trials * releases * 2, np.uint32)
    streams = jax.random.wrap_key_data(seed.reshape(2, trials, releases, 2, 2), impl="threefry2x32")
    worlds = []
    with progress.bar("game", 2 * trials, "trials") as advance:
        for batch, draws in zip((there, neighbour), streams):
            scores = []
            for trial in draws:
                scores.append(float(play(batch, trial)))
                advance(1)
            worlds.append(scores)
    claimed = played.epsilon(config.objective.delta).value
    found = CanaryScoreAuditor(*worlds).epsilon_clopper_pearson(_SIGNIFICANCE, config.objective.delta)
    reach = length / (played.sensitivity * played.l2_clip_norm)
    return Finding(
        "a game against the real step finds no more than is claimed",
        bool(found <= claimed),
        f"ε ≥ {found:.3g} at 95 % from {2 * trials} trials; claimed for {releases} releases: {claimed:.3g} "
        f"(the record moved the sum by {100 * reach:.0f} % of the bound)",
    )


def main(arguments: Sequence[str]) -> int:
    """`maskdp audit RUN|DATASET`."""
    parser = argparse.ArgumentParser(prog="maskdp audit", description=main.__doc__)
    parser.add_argument("path", help="run folder or two-layer dataset")
    parser.add_argument("--trials", type=int, default=200, help="of the game, in either world")
    given = parser.parse_args(arguments)
    if given.trials < 1:
        raise UserError(f"--trials: {given.trials}, expected a number above 0")
    is_run = any((pathlib.Path(given.path) / name).exists() for name in (checkpoint.RUN, checkpoint.MODEL))
    findings = list(audit_run(given.path, given.trials) if is_run else audit_dataset(given.path))
    table = Table("check", "", "seen")
    for finding in findings:
        table.add_row(finding.check, "holds" if finding.holds else "[red]FAILS[/red]", finding.seen)
    Console().print(table)
    return 0 if all(finding.holds for finding in findings) else 1
