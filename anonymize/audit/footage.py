"""Stored clips beside the recordings they were made from and, for studio videos, the truth about these."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from anonymize.command import EXTENSIONS
from anonymize.config import AnonymizeConfig
from anonymize.studio import film
from anonymize.vision import video
from anonymize.vision.cues import sample_times
from maskdp import config, layers
from maskdp.errors import UserError


@dataclasses.dataclass(frozen=True)
class Footage:
    """One recorded clip with its truth.

    Attributes:
        frames: (T, H, W, 3) uint8 as `maskdp anonymize` read them.
        truth: what the studio knows of them, in the same size.
        fps: frames a second.
    """

    frames: np.ndarray
    truth: film.Truth
    fps: float

    @property
    def people(self) -> np.ndarray:
        """(T, H, W) bool, where somebody is."""
        return self.truth.masks.any(0)


class Archive:
    """A dataset with the folder of its recordings.

    Args:
        folder: what `maskdp anonymize` wrote.
        originals: folder of the recordings, found by their hash; empty for none.

    Attributes:
        dataset: the stored clips.
        files: recordings by `Record.source`.
        settings: those the dataset was made with.
    """

    def __init__(self, folder: str, originals: str):
        self.dataset = layers.Dataset(folder)
        self.files: dict[str, pathlib.Path] = {}
        if not originals:
            return
        if not pathlib.Path(originals).is_dir():
            raise UserError(f"--originals: {originals}: no such folder")
        settings = self.dataset.path.parent / "config.yaml"
        self.settings = config.parse(AnonymizeConfig, ["--config_path", str(settings)], "audit anonymization")
        found = (path for path in sorted(pathlib.Path(originals).rglob("*")) if path.suffix.lower() in EXTENSIONS)
        self.files = {self.dataset.source_tag(video.sha256(path)): path for path in found}
        if not any(record.source in self.files for record in self.records()):
            raise UserError(f"--originals: {originals}: holds no recording of this dataset")

    def records(self) -> Iterator[layers.Record]:
        """Every stored clip, split by split."""
        for split in self.dataset.splits:
            yield from self.dataset[split]

    def __len__(self) -> int:
        return sum(len(self.dataset[split]) for split in self.dataset.splits)

    @property
    def filmed(self) -> list[pathlib.Path]:
        """The recordings whose truth is known."""
        return [path for path in self.files.values() if _truth(path).exists()]

    def footage(self, record: layers.Record) -> Footage | None:
        """The recording of a stored clip; None where it or its truth is not there."""
        path = self.files.get(record.source)
        return None if path is None else self.film(path, int(record.clip_id.rsplit("-", 1)[1]), record.frames)

    def film(self, path: pathlib.Path, number: int = 0, frames: int | None = None) -> Footage | None:
        """Clip `number` of a recording; None without a truth, or where that does not fit (frames were left out)."""
        file, settings = _truth(path), self.settings.video
        if not file.exists() or settings.fps:
            return None
        parts = video.clips(path, short_side=settings.short_side, max_frames=settings.max_frames)
        clip = next(part for index, part in enumerate(parts) if index == number)
        truth = film.read_truth(file)
        here = slice(number * settings.max_frames, number * settings.max_frames + len(clip.frames))
        size = clip.frames.shape[2:0:-1]
        masks = np.stack([[_resized(mask, size) for mask in person[here]] for person in truth.masks])
        if masks.shape[1] != len(clip.frames) or frames not in (None, len(clip.frames)):
            return None
        truth = film.Truth(
            masks,
            cv2.resize(truth.empty, size, interpolation=cv2.INTER_AREA),
            tuple(pose[here] for pose in truth.poses),
            truth.betas,
            truth.camera,
        )
        return Footage(clip.frames, truth, clip.fps)


def _truth(path: pathlib.Path) -> pathlib.Path:
    return path.parent.parent / "truth" / f"{path.stem}.npz"


def _resized(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0


def mask_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Overlap (T,) of two masks, (T, H, W) or (H, W) bool, in every frame: intersection over union."""
    return (a & b).sum((-2, -1)) / np.maximum((a | b).sum((-2, -1)), 1)


def chosen(items: Sequence, count: int) -> list:
    """At most `count` of the items, spread evenly."""
    return [items[index] for index in sample_times(len(items), count)] if items else []
