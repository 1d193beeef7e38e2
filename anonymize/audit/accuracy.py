"""The finder and the fitter against the studio's truth, run again on recordings, quarantined ones among them."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from anonymize.audit.findings import Finding, interval
from anonymize.audit.footage import Footage, mask_iou
from anonymize.avatar.camera import Camera
from anonymize.config import PipelineConfig
from anonymize.pipeline import Anonymizer, identity_key
from anonymize.studio import motions
from maskdp import progress

BODY_JOINTS = 22
COVERED = 0.95  # of a person's pixels; a frame in which less is removed is one in which the person was missed


def procrustes_error(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean distance (T,) of joints (T, J, 3), metres, after the best rotation, scale and shift of each frame (Umeyama
    1991)."""
    a, b = found - found.mean(1, keepdims=True), truth - truth.mean(1, keepdims=True)
    u, s, vt = np.linalg.svd(np.swapaxes(a, 1, 2) @ b)
    flip = np.ones_like(s)
    flip[:, -1] = np.sign(np.linalg.det(u @ vt))
    rotation = u @ (flip[..., None] * vt)
    scale = (s * flip).sum(1) / np.maximum((a**2).sum((1, 2)), 1e-12)
    return np.linalg.norm(scale[:, None, None] * (a @ rotation) - b, axis=2).mean(1)


@dataclasses.dataclass(frozen=True)
class Scores:
    """One recording: per person and frame whether removed, whether tracked, the mask's IoU, and the joints' error."""

    removed: list[float]
    tracked: list[float]
    iou: list[float]
    error: list[float]
    doubt: bool


def score(anonymizer: Anonymizer, film: Footage) -> Scores:
    """Finds and fits the people of a recording. Found people are matched to true ones by the overlap of their masks."""
    people = anonymizer.finder.find(film.frames, film.fps)
    truth = film.truth
    removed, tracked, ious, errors = [], [], [], []
    overlap = np.array(
        [[mask_iou(person.masks, mask).mean() for person in people.persons] for mask in truth.masks]
    ).reshape(len(truth.masks), len(people.persons))
    partner = dict(zip(*linear_sum_assignment(-overlap)))
    camera = Camera.default(film.frames.shape[2], film.frames.shape[1])
    for index, mask in enumerate(truth.masks):
        there = mask.any((1, 2))
        covered = (people.removal & mask).sum((1, 2)) / np.maximum(mask.sum((1, 2)), 1)
        removed += (covered[there] >= COVERED).tolist()
        if index not in partner:
            tracked += [0.0] * int(there.sum())
            continue
        person = people.persons[partner[index]]
        tracked += person.present[there].astype(float).tolist()
        outlined = there & person.masks.any((1, 2))
        ious += mask_iou(person.masks[outlined], mask[outlined]).tolist()
        key = identity_key("audit", person.track_id, (), anonymizer.config.avatar)
        avatar = anonymizer.avatar(key)
        fit = anonymizer.fitter(person, camera, avatar, film.fps)
        good = there & fit.ok
        if good.any():
            mine, theirs = (
                motions.joints(pose, anonymizer.body, shape)[good, :BODY_JOINTS]
                for pose, shape in ((fit.pose, avatar.betas), (truth.poses[index], truth.betas[index]))
            )
            errors += procrustes_error(mine, theirs).tolist()
    return Scores(removed, tracked, ious, errors, people.doubt is not None)


def check(films: Iterable[Footage], count: int, settings: PipelineConfig, secret: bytes) -> list[Finding]:
    """Recall, mask IoU and PA-MPJPE over at most `count` recordings."""
    anonymizer = Anonymizer(settings, secret)
    scores = []
    with progress.bar("finder and fitter against the truth", count, "videos") as advance:
        for film in films:
            scores.append(score(anonymizer, film))
            advance()
    doubted = sum(one.doubt for one in scores)

    def mean(name: str, chosen: Sequence[Scores]):
        values = [getattr(one, name) for one in chosen]
        groups = np.repeat(np.arange(len(chosen)), [len(one) for one in values])
        return interval(np.concatenate(values), groups) if len(groups) else None

    sure = [one for one in scores if not one.doubt]
    recall, kept, tracked = mean("removed", scores), mean("removed", sure), mean("tracked", scores)
    iou, error = mean("iou", scores), mean("error", scores)
    said = [f"{recall} in {len(scores)} videos"]
    if kept:
        said.append(f"{kept} without the {doubted} in doubt, which are never written")
    return [
        Finding(
            f"person recall per frame ({COVERED:.0%} of a person's pixels removed): 99 % or more",
            recall.mean >= 0.99,
            "; ".join([*said, f"tracked {tracked}"]),
            {"all": dataclasses.asdict(recall), "not_in_doubt": kept and dataclasses.asdict(kept), "doubted": doubted}
            | {"tracked": dataclasses.asdict(tracked), "videos": len(scores)},
        ),
        Finding(
            "mask IoU of found and true people",
            None,
            f"{iou}" if iou else "nobody was outlined",
            dataclasses.asdict(iou) if iou else {},
        ),
        Finding(
            "PA-MPJPE of the avatars' 22 body joints",
            None,
            f"{1000 * error.mean:.0f} mm ({1000 * error.low:.0f} to {1000 * error.high:.0f})" if error else "no pose",
            dataclasses.asdict(error) if error else {},
        ),
    ]
