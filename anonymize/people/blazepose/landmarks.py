"""Landmarks, 3-D pose and mask of one person in a crop.

Tensors and post-processing: mediapipe's `pose_landmark_by_roi_cpu.pbtxt` and
`tensors_to_pose_landmarks_and_segmentation.pbtxt` (Bazarevsky et al. 2020, arXiv 2006.10204).
"""

import dataclasses
import pathlib

import cv2
import numpy as np
from scipy.special import expit

from anonymize.people.blazepose.crops import Crop
from anonymize.people.blazepose.models import POSE_LANDMARKS, Model

COUNT = 33
# fmt: off
NAMES = (
    "nose", "left_eye_inner", "left_eye", "left_eye_outer", "right_eye_inner", "right_eye", "right_eye_outer",
    "left_ear", "right_ear", "mouth_left", "mouth_right", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_pinky", "right_pinky", "left_index", "right_index",
    "left_thumb", "right_thumb", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle",
    "left_heel", "right_heel", "left_foot_index", "right_foot_index",
)
# fmt: on
MIDDLE, ON_CIRCLE = 33, 34  # auxiliary landmarks: the crop of the next frame
_REACH = 3  # cells around a landmark in which its heat map refines it
_LEAST_HEAT = 0.5  # below this peak a landmark is not refined


@dataclasses.dataclass(frozen=True)
class Sighting:
    """One person seen in one crop.

    Attributes:
        presence: 0..1, whether the crop shows a person.
        image: (39, 5) float32: x, y in pixels of the picture, z in pixels (smaller is nearer, 0 at the hips),
            visibility and presence 0..1.
        world: (39, 3) float32 metres, origin in the middle of the hips, x right, y down, z away.
        crop: where it was looked for.
        outline: (S, S) uint8 probability of a person times 255, in the crop.
    """

    presence: float
    image: np.ndarray
    world: np.ndarray
    crop: Crop
    outline: np.ndarray

    @property
    def next_crop(self) -> Crop:
        """Where to look in the next frame, or once more in this one."""
        return Crop.around(self.image[MIDDLE, :2], self.image[ON_CIRCLE, :2])

    def mask(self, height: int, width: int) -> np.ndarray:
        """(height, width) uint8 probability times 255 in the picture, 0 outside the crop."""
        return cv2.warpAffine(self.outline, self.crop.to_picture(len(self.outline)), (width, height))


class Landmarker:
    """The landmark model."""

    def __init__(self, folder: pathlib.Path | None = None):
        self._model = Model(POSE_LANDMARKS, folder)

    def __call__(self, picture: np.ndarray, crop: Crop) -> Sighting:
        """What a crop of a picture (H, W, 3) uint8 shows."""
        size = self._model.size
        out = self._model(crop.cut(picture, size) * np.float32(1 / 255))
        image = out["Identity"].reshape(-1, 5).copy()
        image[:, 3:] = expit(image[:, 3:])
        image[:, :2] = refined(image[:, :2] / size, out["Identity_3"]) * size
        to_picture = crop.to_picture(size)
        image[:, :2] = image[:, :2] @ to_picture[:, :2].T + to_picture[:, 2]
        image[:, 2] *= crop.side / size
        world = out["Identity_4"].reshape(-1, 3).copy()
        world[:, :2] = world[:, :2] @ crop.axes.T
        outline = (255 * expit(out["Identity_2"][..., 0])).astype(np.uint8)
        return Sighting(float(out["Identity_1"][0]), image, world, crop, outline)


def refined(points: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Landmarks (N, 2) x, y in parts of the crop, moved to the mean of their heat map's (S, S, N) logits around them,
    where that has a peak."""
    size, count = heat.shape[0], len(points)
    x, y = (points * size).astype(int).T
    around = np.arange(-_REACH, _REACH + 1)
    rows, columns = y[:, None, None] + around[:, None], x[:, None, None] + around
    inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    near = heat[rows.clip(0, size - 1), columns.clip(0, size - 1), np.arange(count)[:, None, None]]
    weight = np.where(inside, expit(near), 0)
    peak = weight.max((1, 2)) * ((x >= 0) & (x < size) & (y >= 0) & (y < size)) >= _LEAST_HEAT
    total = np.maximum(weight.sum((1, 2)), 1e-6)
    mean = np.stack([(weight * columns).sum((1, 2)) / total, (weight * rows).sum((1, 2)) / total], 1) / size
    return np.where(peak[:, None], mean, points).astype(points.dtype)
