"""Attacks on trained models: was this background trained on? `python -m benchmarks.membership` (docs/audit.md).

Labels that neither avatar nor background explains, and a background of its own for every record: the worst case, in
which only memory helps. `sgd`, `dp_sgd` and `maskdp` are trained on half of the records and attacked with both halves.
"""

import argparse
import json
import pathlib
import tempfile

import cv2
import numpy as np

from benchmarks.planted_faults import settings
from maskdp import layers
from maskdp_jax import checkpoint, train
from maskdp_jax.audit.findings import CONFIDENCE
from maskdp_jax.audit.membership import CANDIDATES, membership

OBJECTIVES = ("sgd", "dp_sgd", "maskdp")
CLASSES = 4


def write_clips(folder: pathlib.Path, records: int) -> layers.Dataset:
    """`records` clips to train on and as many not to: one avatar, a background of large spots, a label by chance."""
    rng = np.random.default_rng(0)

    def clip(number: int) -> layers.TwoLayerClip:
        rgba = np.zeros((2, 16, 16, 4), np.uint8)
        rgba[:, 6:, 6:10] = (200, 120, 60, 255)
        spots = cv2.resize(rng.integers(0, 256, (4, 4, 3), np.uint8), (16, 16), interpolation=cv2.INTER_CUBIC)
        name = f"clip{number:04d}"
        private = np.stack([spots] * 2)
        label = int(rng.integers(CLASSES))
        return layers.TwoLayerClip(rgba, private, label, f"{name}-0", name, name, (name,), "0" * 64, 25.0)

    clips = {"train": [clip(n) for n in range(records)], "test": [clip(n) for n in range(records, 2 * records)]}
    layers.write_dataset(folder, clips, [f"class {n}" for n in range(CLASSES)], private_format="png")
    return layers.Dataset(folder)


def attacked(objective: str, dataset: layers.Dataset, out: pathlib.Path, epsilon: float, steps: int) -> dict:
    """Trains with `objective` and attacks the model."""
    config = settings(
        str(dataset.path.parent),
        str(out / objective),
        data__size=16,
        model__width=64,
        objective__type=objective,
        objective__noise_multiplier="null",
        objective__epsilon=epsilon,
        optim__optimizer="adam",
        optim__learning_rate=2e-3,
        optim__batch=50,
        optim__public_batch=50,
        optim__steps=steps,
        every__log=0,
        every__checkpoint=0,
    )
    trained = checkpoint.load(train.train(config))
    outcome = membership(trained, dataset, "train", "test")
    return {
        "objective": objective,
        "claimed": trained.card["epsilon"],
        "AUC": outcome.auc,
        "p": outcome.p_value,
        "epsilon": outcome.epsilon(1e-5),
        "picked": outcome.picked,
        "picked of others": outcome.picked_absent,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="maskdp-membership-") as folder:
        folder = pathlib.Path(folder)
        dataset = write_clips(folder / "data", given.records)
        rows = [attacked(objective, dataset, folder, given.epsilon, given.steps) for objective in OBJECTIVES]
    if given.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        claim = "no ε claimed" if row["claimed"] is None else f"ε = {row['claimed']:.3g} claimed"
        print(
            f"{row['objective']}: AUC {row['AUC']:.3f} (p = {row['p']:.2g}), ε ≥ {row['epsilon']:.3g} at "
            f"{100 * CONFIDENCE:.0f} %, {claim}; own background picked from {CANDIDATES} for "
            f"{100 * row['picked']:.0f} % of trained and {100 * row['picked of others']:.0f} % of other records"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
