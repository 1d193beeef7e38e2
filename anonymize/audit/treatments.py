"""What can be done to a recording: nothing, blur, a black silhouette, a black box, an avatar; as crops."""

import dataclasses
from collections.abc import Iterable

import cv2
import numpy as np

from anonymize.audit.footage import Archive, Footage
from anonymize.vision.cues import sample_times
from maskdp import layers, progress

TREATMENTS = ("original", "blurred", "silhouette", "box", "anonymized")
_AROUND = 0.08  # of the person's larger side, kept around it
_BLUR = 1 / 12  # of the person's larger side


@dataclasses.dataclass(frozen=True)
class Crops:
    """A clip as the attackers and pupils of the audit see it.

    Attributes:
        person: by treatment, (n, S, S, 3) uint8, the actor filling each picture.
        action: by treatment, (m, S, S, 3) uint8, one place for the whole clip.
        subjects, video, scene, label, split: of the clip.
    """

    person: dict[str, np.ndarray]
    action: dict[str, np.ndarray]
    subjects: tuple[str, ...]
    video: str
    scene: str
    label: int
    split: str


def treated(footage: Footage, clip: layers.TwoLayerClip) -> dict[str, np.ndarray]:
    """The recording (T, H, W, 3) under each treatment. Outlines are the true ones, so that no baseline is helped or
    hurt by the finder; the avatar alone is what the dataset holds."""
    people = footage.people[..., None]
    blurred, boxed = footage.frames.copy(), footage.frames.copy()
    for t, mask in enumerate(footage.people):
        if not mask.any():
            continue
        x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
        boxed[t, y : y + h, x : x + w] = 0
        soft = cv2.GaussianBlur(footage.frames[t], (0, 0), max(1.0, _BLUR * max(w, h)))
        near = cv2.dilate(mask.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        blurred[t][near] = soft[near]
    return {
        "original": footage.frames,
        "blurred": blurred,
        "silhouette": np.where(people, 0, footage.frames).astype(np.uint8),
        "box": boxed,
        "anonymized": layers.composite(clip.rgba, clip.private),
    }


def crops(archive: Archive, side: int, pictures: int, frames: int) -> list[Crops]:
    """Every stored clip whose truth is known, cropped to `side` pixels: `pictures` of the actor and `frames`."""
    found = []
    with progress.bar("reading clips", len(archive), "clips") as advance:
        for split in archive.dataset.splits:
            for record in archive.dataset[split]:
                footage = archive.footage(record)
                if footage is not None and footage.truth.masks[0].any((1, 2)).any():
                    found.append(_crop(footage, record.clip(), split, side, pictures, frames))
                advance()
    return found


def _crop(footage: Footage, clip: layers.TwoLayerClip, split: str, side: int, pictures: int, frames: int) -> Crops:
    versions = treated(footage, clip)
    actor = footage.truth.masks[0]
    seen = np.flatnonzero(actor.any((1, 2)))
    portraits = seen[sample_times(len(seen), pictures)]
    times = np.linspace(0, len(actor) - 1, frames).round().astype(int)
    whole = actor.any(0)
    return Crops(
        {name: np.stack([_square(video[t], actor[t], side) for t in portraits]) for name, video in versions.items()},
        {name: np.stack([_square(video[t], whole, side) for t in times]) for name, video in versions.items()},
        clip.subject_ids,
        clip.video_id,
        clip.scene_id,
        clip.label,
        split,
    )


def _square(frame: np.ndarray, mask: np.ndarray, side: int) -> np.ndarray:
    """The square around a mask, `side` pixels wide; grey beyond the picture."""
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    half = max(w, h) * (0.5 + _AROUND)
    scale = side / (2 * half)
    move = np.float32([[scale, 0, side / 2 - scale * (x + w / 2)], [0, scale, side / 2 - scale * (y + h / 2)]])
    if scale < 1:
        frame = cv2.blur(frame, (round(1 / scale),) * 2) if scale < 0.67 else frame
    return cv2.warpAffine(
        frame, move, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=(128,) * 3
    )


def network_input(pictures: np.ndarray):
    """(..., S, S, 3) uint8 to a float tensor (..., 3, S, S), −1 to 1."""
    import torch

    return torch.from_numpy(pictures).movedim(-1, -3).float() / 127.5 - 1


def balanced(groups: Iterable, rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` indices into `groups`, each group equally often on average."""
    groups = np.asarray(list(groups))
    names, inverse = np.unique(groups, return_inverse=True)
    weight = 1 / np.bincount(inverse)[inverse] / len(names)
    return rng.choice(len(groups), count, p=weight)
