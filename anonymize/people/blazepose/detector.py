"""Detecting people in a picture, several of them: the pose detector on the whole and on tiles at several scales.

Tensors, anchors and thresholds: mediapipe's `pose_detection_cpu.pbtxt` and `pose_detection_to_roi.pbtxt`.
"""

import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np
from scipy.special import expit

from anonymize.people.blazepose.crops import Crop, Letterbox
from anonymize.people.blazepose.models import POSE_DETECTION, Model

LAYERS = ((8, 2), (16, 2), (32, 6))  # stride in pixels, anchors a cell
OVERLAP = 0.3  # IoU; detections that overlap more are one
OVERLAPPING_TILES = 1.5  # tiles a side over what would cover it without overlap


@dataclasses.dataclass(frozen=True)
class Detection:
    """One detected person.

    Attributes:
        score: 0..1.
        box: (4,) xyxy, pixels, of the face (not of the person).
        points: (4, 2) pixels: middle of the hips, a point on the circle around the whole body, and the same two of the
            upper body.
    """

    score: float
    box: np.ndarray
    points: np.ndarray

    @property
    def crop(self) -> Crop:
        """The crop that holds the whole body."""
        return Crop.around(self.points[0], self.points[1])


def anchors(size: int, layers=LAYERS) -> np.ndarray:
    """Anchor centres (N, 2) x, y in parts of a picture `size` pixels wide, row by row."""
    centres = []
    for stride, count in layers:
        cells = size // stride
        y, x = np.mgrid[:cells, :cells]
        centres.append(np.repeat(np.stack([x.ravel() + 0.5, y.ravel() + 0.5], 1) / cells, count, axis=0))
    return np.concatenate(centres).astype(np.float32)


class Detector:
    """The pose detector.

    Args:
        folder: where the models lie.
        least: score above which something counts as a person.
    """

    def __init__(self, folder: pathlib.Path | None = None, least: float = 0.5):
        self._model, self._least = Model(POSE_DETECTION, folder), least
        self._anchors = anchors(self._model.size)

    def __call__(self, picture: np.ndarray) -> list[Detection]:
        """People in a picture (H, W, 3) uint8, surest first."""
        boxed = Letterbox.of(picture, self._model.size)
        out = self._model(boxed.square)
        return decoded(out["Identity"], out["Identity_1"][:, 0], self._anchors, boxed, self._least)

    def tiled(self, picture: np.ndarray, tiles: list[tuple[slice, slice]]) -> list[Detection]:
        """People in tiles (rows, columns) of a picture, those that overlap joined."""
        found = []
        for rows, columns in tiles:
            corner = np.array([columns.start, rows.start], np.float32)
            for item in self(picture[rows, columns]):
                box, points = item.box + np.tile(corner, 2), item.points + corner
                found.append(dataclasses.replace(item, box=box, points=points))
        return joined(found)


def tiles(height: int, width: int, levels: int = 2) -> Iterator[tuple[slice, slice]]:
    """The whole picture, then overlapping squares of its short side, of half of it, and so on, `levels` sizes."""
    yield slice(0, height), slice(0, width)
    for level in range(levels):
        side = min(height, width) >> level
        tops, lefts = (_starts(length, side) for length in (height, width))
        for top in tops:
            for left in lefts:
                if (side, side) != (height, width):
                    yield slice(top, top + side), slice(left, left + side)


def _starts(length: int, side: int) -> list[int]:
    count = 1 if length == side else int(np.ceil(OVERLAPPING_TILES * length / side))
    return np.unique(np.linspace(0, length - side, max(count, 1)).round().astype(int)).tolist()


def decoded(
    raw: np.ndarray, logits: np.ndarray, centres: np.ndarray, boxed: Letterbox, least: float
) -> list[Detection]:
    """Detections of a single-shot network, joined, in pixels of the picture.

    Args:
        raw: (N, 4 + 2 K) box centre, size and K points, in pixels of the square, relative to the anchors.
        logits: (N,) scores.
        centres: (N, 2) anchors.
    """
    score = expit(logits)
    sure = np.flatnonzero(score >= least)
    size = boxed.square.shape[0]
    values = raw[sure].reshape(len(sure), raw.shape[1] // 2, 2)
    values[:, [0, *range(2, values.shape[1])]] += centres[sure, None] * size
    low, high = values[:, 0] - values[:, 1] / 2, values[:, 0] + values[:, 1] / 2
    boxes = np.concatenate([boxed.to_picture(low), boxed.to_picture(high)], 1)
    points = boxed.to_picture(values[:, 2:])
    return joined([Detection(float(s), b, p) for s, b, p in zip(score[sure], boxes, points)])


def joined(found: list[Detection]) -> list[Detection]:
    """Detections that overlap made one, surest first: boxes and points averaged by score (weighted non-maximum
    suppression)."""
    rest = sorted(found, key=lambda item: -item.score)
    kept = []
    while rest:
        boxes = np.stack([item.box for item in rest])
        same = overlap(boxes[:1], boxes)[0] >= OVERLAP
        same[0] = True
        group = [item for item, is_same in zip(rest, same) if is_same]
        weight = np.array([item.score for item in group])
        box = np.average([item.box for item in group], axis=0, weights=weight)
        points = np.average([item.points for item in group], axis=0, weights=weight)
        kept.append(Detection(rest[0].score, box, points))
        rest = [item for item, is_same in zip(rest, same) if not is_same]
    return kept


def overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union (N, M) of boxes (N, 4) and (M, 4) xyxy."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    both = (high - low).clip(0).prod(2)
    areas = [(these[:, 2:] - these[:, :2]).clip(0).prod(1) for these in (boxes, others)]
    return both / np.maximum(areas[0][:, None] + areas[1][None] - both, 1e-6)
