"""Re-identification: can a network that was trained for it tell who an avatar stands for?

The attacker knows the anonymizer: it learns from pairs of recordings and treated clips of some people, and is tried on
others, all of whom are tried once (cross-validation over people). A query is a treated clip, the gallery holds
recordings of the same people in other videos and other rooms, so that no background gives the answer away; then the
other way round. Silhouette, pose and place are released by design; masking out keeps them, too, and is what the avatar
must be no worse than. The interval must lie below the margin: with few clips it is too wide, and the check fails
(207 studio clips of 46 people left 4 points on either side, 560 of 123 less than one).
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from anonymize.audit.findings import Finding, interval
from anonymize.audit.treatments import Crops, balanced, network_input
from maskdp import progress
from maskdp.config import positive
from maskdp.errors import UserError

TRIED = ("original", "blurred", "silhouette", "anonymized")
_SHARPNESS = 16.0  # of the cosine classifier


@dataclasses.dataclass(frozen=True)
class ReIDConfig:
    """The attack.

    Attributes:
        folds: groups of people; each is tried by a network that learned from the others.
        repeats: networks a fold, averaged.
        steps, batch, learning_rate: of Adam.
        pictures: of the person in a clip.
        margin: in rank-1, by which the avatar may be found more readily than the black silhouette.
    """

    folds: int = 2
    repeats: int = 2
    steps: int = 250
    batch: int = 48
    learning_rate: float = 2e-3
    pictures: int = 4
    margin: float = 0.03

    def __post_init__(self):
        positive(self, "repeats", "steps", "batch", "learning_rate", "pictures", "margin")
        if self.folds < 2:
            raise UserError(f"reid.folds: {self.folds}, expected 2 or more")


class Embedder(nn.Module):
    """Pictures (N, 3, S, S) to unit vectors (N, 96)."""

    def __init__(self):
        super().__init__()
        widths = (3, 24, 48, 72, 96)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 5 if a == 3 else 3, 2, 2 if a == 3 else 1), nn.GroupNorm(8, b), nn.ReLU())
                for a, b in itertools.pairwise(widths)
            )
        )
        self.last = nn.Linear(2 * widths[-1], 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers(x)
        upper, lower = x[:, :, : x.shape[2] // 2], x[:, :, x.shape[2] // 2 :]  # a shirt is no trousers
        return F.normalize(self.last(torch.cat([upper.mean((2, 3)), lower.mean((2, 3))], 1)), dim=1)


def trained(clips: Sequence[Crops], treatment: str, config: ReIDConfig, seed: int, advance) -> Embedder:
    """An embedder that tells the people of `clips` apart, in recordings and under `treatment` alike."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    people = sorted({clip.subjects[0] for clip in clips})
    who = np.array([people.index(clip.subjects[0]) for clip in clips])
    net = Embedder()
    centres = nn.Parameter(F.normalize(torch.randn(len(people), 96), dim=1))
    optimizer = torch.optim.Adam([*net.parameters(), centres], config.learning_rate)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - step / config.steps)
        picks = balanced(who, rng, config.batch)
        names = [treatment if index % 2 else "original" for index in range(config.batch)]
        pictures = [clips[i].person[name] for i, name in zip(picks, names)]
        x = network_input(np.stack([_varied(p[rng.integers(len(p))], rng) for p in pictures]))
        logits = _SHARPNESS * net(x) @ F.normalize(centres, dim=1).T
        loss = F.cross_entropy(logits, torch.from_numpy(who[picks]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        advance()
    return net.eval()


def _varied(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrored by a coin, moved by up to a twentieth."""
    if rng.uniform() < 0.5:
        picture = picture[:, ::-1]
    reach = len(picture) // 20
    return np.roll(picture, rng.integers(-reach, reach + 1, 2), (0, 1))


@torch.no_grad()
def embedded(net: Embedder, clips: Sequence[Crops], treatment: str) -> np.ndarray:
    """(N, 96) unit vectors, the mean over each clip's pictures."""
    vectors = torch.stack([net(network_input(clip.person[treatment])).mean(0) for clip in clips])
    return F.normalize(vectors, dim=1).numpy()


def ranked(likeness: np.ndarray, right: np.ndarray, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank-1 and average precision of each query; NaN where no allowed entry of the gallery is right.

    Args:
        likeness, right, allowed: (queries, gallery).
    """
    first, precision = np.full(len(likeness), np.nan), np.full(len(likeness), np.nan)
    for q in range(len(likeness)):
        order = np.argsort(-likeness[q][allowed[q]], kind="stable")
        hits = right[q][allowed[q]][order]
        if hits.any():
            first[q] = hits[0]
            precision[q] = (np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean()
    return first, precision


def chance(right: np.ndarray, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `ranked` gives on average where the order is random."""
    total, hits = allowed.sum(1).astype(float), (right & allowed).sum(1).astype(float)
    precision = np.full(len(total), np.nan)
    for q in np.flatnonzero(hits):
        k = np.arange(1, total[q] + 1)
        precision[q] = ((1 + (k - 1) * (hits[q] - 1) / max(total[q] - 1, 1)) / k).sum() / total[q]
    return np.where(hits > 0, hits / np.maximum(total, 1), np.nan), precision


def check(clips: Sequence[Crops], config: ReIDConfig, seed: int) -> list[Finding]:
    """The attack on every treatment. Only clips of one person are used, so that there is no doubt who is meant."""
    clips = [clip for clip in clips if len(clip.subjects) == 1]
    who = np.array([clip.subjects[0] for clip in clips])
    people = np.random.default_rng(seed).permutation(np.unique(who)) if len(clips) else []
    if len(people) < 4 * config.folds:
        return [Finding("re-identification", None, f"not checked: {len(people)} people are too few")]
    fold = {person: index % config.folds for index, person in enumerate(people)}
    scores = {name: np.zeros((2, len(clips))) for name in (*TRIED, "chance")}
    total = len(TRIED) * config.folds * config.repeats * config.steps
    with progress.bar("re-identification", total, "steps") as advance:
        for part in range(config.folds):
            tried = np.array([fold[person] == part for person in who])
            test = [clip for clip, chosen in zip(clips, tried) if chosen]
            train = [clip for clip, chosen in zip(clips, tried) if not chosen]
            right, allowed = _pairs(test)
            scores["chance"][:, tried] = chance(right, allowed)
            for name in TRIED:
                for repeat in range(config.repeats):
                    net = trained(train, name, config, seed + 1000 * part + repeat, advance)
                    likeness = embedded(net, test, name) @ embedded(net, test, "original").T
                    for direction in (likeness, likeness.T):
                        scores[name][:, tried] += np.array(ranked(direction, right, allowed)) / (2 * config.repeats)
    valid = np.isfinite(scores["chance"][0])
    who, scores = who[valid], {name: values[:, valid] for name, values in scores.items()}
    if len(np.unique(who)) < 2:
        return [Finding("re-identification", None, "not checked: too few people are seen in two rooms")]
    return _findings(scores, who, config)


def _pairs(clips: Sequence[Crops]) -> tuple[np.ndarray, np.ndarray]:
    """(N, N) bool twice: the same person; neither the same video nor the same room."""
    who, video, scene = (
        np.array([values]) for values in zip(*((clip.subjects[0], clip.video, clip.scene) for clip in clips))
    )
    return who == who.T, (video != video.T) & (scene != scene.T)


def _findings(scores: dict[str, np.ndarray], who: np.ndarray, config: ReIDConfig) -> list[Finding]:
    findings = []
    for name, (first, precision) in scores.items():
        rank1, mean = interval(first, who), interval(precision, who)
        findings.append(
            Finding(
                f"re-identification of people, {name}",
                None,
                f"rank-1 {rank1}, mAP {mean}",
                {"rank1": dataclasses.asdict(rank1), "map": dataclasses.asdict(mean), "queries": len(who)},
            )
        )
    control = interval(scores["original"][0] - scores["chance"][0], who)
    more = interval(scores["anonymized"][0] - scores["silhouette"][0], who)
    powerful = control.low > config.margin
    findings.append(
        Finding(
            f"avatars re-identified no better than black silhouettes (rank-1, margin {100 * config.margin:g} points)",
            powerful and more.high <= config.margin,
            f"difference {more}, {len(who)} queries, {len(np.unique(who))} people"
            + ("; equivalent, too" if more.low >= -config.margin and more.high <= config.margin else "")
            + ("" if powerful else "; the attack fails on the recordings, too, so this proves nothing"),
            {"difference": dataclasses.asdict(more), "queries": len(who), "people": len(np.unique(who))},
        )
    )
    return findings
