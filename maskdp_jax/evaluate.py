"""`maskdp eval` and `maskdp predict`: what a trained model says of clips, seen whole or as public views alone."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table

from maskdp import layers, progress
from maskdp.errors import UserError
from maskdp_jax import checkpoint
from maskdp_jax.data import Clips
from maskdp_jax.objectives import Objective, Weights

COMPOSITE, PUBLIC_VIEW = "composite", "public_view"
_BATCH = 32


class Evaluator:
    """Logits of every clip of a split, compiled once for any weights of one objective."""

    def __init__(self, objective: Objective, clips: Clips):
        self._clips, self._logits = clips, jax.jit(objective.logits)

    def logits(
        self, weights: Weights, view: str, advance: Callable[[int], None] = lambda _: None
    ) -> Float[np.ndarray, "clips classes"]:
        """Logits on the composite, or on the public view, in which no private pixel is read."""
        made = []
        for first in range(0, len(self._clips), _BATCH):
            numbers = range(first, min(first + _BATCH, len(self._clips)))
            records = [(n,) for n in numbers] + [None] * (_BATCH - len(numbers))
            batch = self._clips.batch(records, 1)
            composite = batch.composite if view == COMPOSITE else batch.public
            made.append(np.asarray(self._logits(weights, composite[:, 0], batch.public[:, 0]))[: len(numbers)])
            advance(len(numbers))
        return np.concatenate(made)

    def accuracy(self, weights: Weights) -> dict[str, float]:
        """Share of clips whose likeliest class is theirs, on both views."""
        labels = np.array([key.label for key in self._clips.keys])
        return {
            view: float(np.mean(self.logits(weights, view).argmax(axis=1) == labels))
            for view in (COMPOSITE, PUBLIC_VIEW)
        }


def _clips(trained: checkpoint.Trained, path: str, split: str, labelled: bool) -> Clips:
    dataset = layers.Dataset(path)
    if labelled and list(dataset.labels) != list(trained.labels):
        raise UserError(f"{path}: labels {', '.join(dataset.labels)}, expected the model's {', '.join(trained.labels)}")
    if trained.card.get("epsilon") is not None and (dataset.id, split) == (trained.dataset, trained.views.split):
        sys.stderr.write(f"{path}: the model protects the records of {split}; figures on them are not protected\n")
    config = dataclasses.replace(trained.views, path=path, cache=False)
    return Clips(dataset, split, config, labelled=labelled)


def main(arguments: Sequence[str]) -> int:
    """`maskdp eval RUN --data DIR`."""
    parser = argparse.ArgumentParser(prog="maskdp eval", description=main.__doc__)
    parser.add_argument("run", help="run folder or export")
    parser.add_argument("--data", required=True, help="two-layer dataset")
    parser.add_argument("--split", default="test")
    parser.add_argument("--view", choices=("composite", "public", "both"), default="both")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    trained = checkpoint.load(given.run)
    clips = _clips(trained, given.data, given.split, labelled=True)
    views = {"composite": (COMPOSITE,), "public": (PUBLIC_VIEW,), "both": (COMPOSITE, PUBLIC_VIEW)}[given.view]
    evaluator = Evaluator(trained.objective, clips)
    labels = np.array([key.label for key in clips.keys])
    with progress.bar("eval", len(clips) * len(views), "clips") as advance:
        right = {view: evaluator.logits(trained.weights, view, advance).argmax(axis=1) == labels for view in views}
    found = {
        "clips": len(clips),
        "accuracy": {view: float(hit.mean()) for view, hit in right.items()},
        "per_class": {
            name: {view: float(hit[labels == index].mean()) for view, hit in right.items()}
            for index, name in enumerate(trained.labels)
            if np.any(labels == index)
        },
    }
    if given.json:
        json.dump(found, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return 0
    table = Table("class", *(view.replace("_", " ") for view in views), title=f"{len(clips)} clips of {given.split}")
    for name, shares in (*found["per_class"].items(), ("all", found["accuracy"])):
        table.add_row(name, *(f"{100 * shares[view]:.1f} %" for view in views))
    Console().print(table)
    return 0


def predict_main(arguments: Sequence[str]) -> int:
    """`maskdp predict RUN DATASET`: the class of each clip, one line of JSON a clip."""
    parser = argparse.ArgumentParser(prog="maskdp predict", description=predict_main.__doc__)
    parser.add_argument("run", help="run folder or export")
    parser.add_argument("data", help="two-layer dataset, as `maskdp anonymize` makes it from videos")
    parser.add_argument("--split", help="default: all splits")
    parser.add_argument("--view", choices=("composite", "public"), default="composite")
    given = parser.parse_args(arguments)
    trained = checkpoint.load(given.run)
    view = COMPOSITE if given.view == "composite" else PUBLIC_VIEW
    for split in [given.split] if given.split else layers.Dataset(given.data).splits:
        clips = _clips(trained, given.data, split, labelled=False)
        logits = Evaluator(trained.objective, clips).logits(trained.weights, view)
        chances = np.asarray(jax.nn.softmax(logits, axis=1))
        for key, row in zip(clips.keys, chances):
            best = int(row.argmax())
            line = {"clip_id": key.clip_id, "label": trained.labels[best], "probability": round(float(row[best]), 4)}
            sys.stdout.write(json.dumps(line) + "\n")
    return 0
