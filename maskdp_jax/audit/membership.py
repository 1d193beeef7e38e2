"""Attacks on the trained model alone: was this background trained on, and which background belongs to this avatar?

The adversary has the released weights, the public layer and label of a record, and backgrounds to choose from. The
score of a background is how much lower the loss is over it than over backgrounds of records that were not trained on.
"""

import dataclasses

import cv2
import jax
import numpy as np
from jax_privacy.auditing import CanaryScoreAuditor
from jaxtyping import Float
from scipy import stats

from maskdp import layers
from maskdp_jax.audit.findings import CONFIDENCE, Finding
from maskdp_jax.checkpoint import Trained
from maskdp_jax.config import DataConfig
from maskdp_jax.data import cropped, resize, spaced

CANDIDATES = 8
DECOYS = CANDIDATES - 1  # an evaluation split of no more records is too small for the attack
"""Backgrounds that the adversary chooses from."""

_MOST_RECORDS = 200


@dataclasses.dataclass(frozen=True)
class Membership:
    """Outcome of both attacks.

    Attributes:
        there, absent: scores of records that were trained on, and of others.
        picked, picked_absent: shares of them whose own background was picked from CANDIDATES.
    """

    there: Float[np.ndarray, " n"]
    absent: Float[np.ndarray, " m"]
    picked: float
    picked_absent: float

    @property
    def auc(self) -> float:
        """Area under the curve of true against false positives; 0.5 is chance."""
        return float(CanaryScoreAuditor(self.there, self.absent).attack_auroc())

    @property
    def p_value(self) -> float:
        """Of the null hypothesis that the scores of both groups have one law (Mann and Whitney)."""
        return float(stats.mannwhitneyu(self.there, self.absent, alternative="greater").pvalue)

    def epsilon(self, delta: float) -> float:
        """ε at least, by Clopper and Pearson."""
        return float(CanaryScoreAuditor(self.there, self.absent).epsilon_clopper_pearson(1 - CONFIDENCE, delta))


def membership(trained: Trained, dataset: layers.Dataset, trained_on: str, not_trained_on: str) -> Membership:
    """Attacks `trained` with the records of two splits of `dataset`, equally many of each."""
    logits = jax.jit(trained.objective.logits)
    groups = [_layers(dataset, split, trained.views) for split in (trained_on, not_trained_on)]
    count = min(map(len, groups))
    rng = np.random.default_rng(0)
    decoys = [private for _, private, _ in groups[1]]
    scores, picked = [], []
    for group in groups:
        chosen = [group[index] for index in rng.permutation(len(group))[:count]]
        losses = []
        for rgba, private, label in chosen:
            others = [decoy for decoy in decoys if decoy is not private]
            others = [others[index] for index in rng.permutation(len(others))[:DECOYS]]
            composite = np.stack(
                [
                    resize(layers.composite(rgba, scene), trained.views.size)
                    for scene in (private, *_like(private, others))
                ]
            )
            public = np.broadcast_to(resize(layers.public_view(rgba), trained.views.size), composite.shape)
            found = np.asarray(jax.nn.log_softmax(logits(trained.weights, composite, public)))[:, label]
            losses.append(-found)
        losses = np.array(losses)
        scores.append(losses[:, 1:].mean(axis=1) - losses[:, 0])
        picked.append(float(np.mean(losses[:, 0] < losses[:, 1:].min(axis=1))))
    return Membership(*scores, *picked)


def _layers(dataset: layers.Dataset, split: str, config: DataConfig) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Both layers, of one size, and the label of the first records of a split."""
    found = []
    for record in dataset[split]:
        if record.label < 0:
            continue
        rgba, private = record.layers(spaced(record.frames, config.frames))
        if config.crop:
            rgba, private = cropped(rgba, private, config.crop)
        found.append((rgba, private, record.label))
        if len(found) == _MOST_RECORDS:
            break
    return found


def _like(private: np.ndarray, others: list[np.ndarray]) -> list[np.ndarray]:
    """Other private layers at the size of `private`."""
    height, width = private.shape[1:3]
    return [np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in o]) for o in others]


def finding(trained: Trained, dataset: layers.Dataset, trained_on: str, not_trained_on: str) -> Finding:
    """Whether the attack refutes the ε on the card; what it finds where there is none."""
    outcome = membership(trained, dataset, trained_on, not_trained_on)
    epsilon, delta = trained.card.get("epsilon"), trained.card.get("delta") or 0.0
    found = outcome.epsilon(delta)
    return Finding(
        "the model alone does not give away which backgrounds it was trained on",
        found <= epsilon if epsilon is not None else True,
        f"AUC {outcome.auc:.3f} (p = {outcome.p_value:.2g}, {len(outcome.there)} records each), ε ≥ {found:.3g} at "
        f"{100 * CONFIDENCE:.0f} %; own background picked from {CANDIDATES} for {100 * outcome.picked:.0f} % of "
        f"trained and {100 * outcome.picked_absent:.0f} % of other records",
        "no ε" if epsilon is None else f"ε = {epsilon:.4g}",
        private=True,
    )
