"""Joints of people in their boxes by ViTPose (arXiv 2204.12484)."""

import pathlib

import cv2
import numpy as np
import torch

from anonymize import weights
from anonymize.people.embedded import person_net
from anonymize.people.models.model_input import IMAGENET, ModelInput
from maskdp.errors import UserError

KINDS = ("vitpose",)
COCO = (
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow"),
    *("right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle"),
    "right_ankle",
)
_SHOULDERS = [COCO.index("left_shoulder"), COCO.index("right_shoulder")]
_PADDING = 1.25  # a crop is so much larger than the box, as in the model's training
_SMOOTHING = 0.8  # standard deviation on the heat map's grid, before its peak is refined
_BATCH = 32


class Keypoints:
    """The pose model in `folder`/keypoints.

    Raises:
        UserError: missing, not such a model, or one of other joints.
    """

    def __init__(self, folder: pathlib.Path):
        from transformers import VitPoseForPoseEstimation

        self.model = weights.load(folder, "keypoints", VitPoseForPoseEstimation, KINDS)
        place = folder / "keypoints"
        if self.model.config.num_labels != len(COCO) or self.model.config.backbone_config.num_experts > 1:
            raise UserError(f"{place}: expected a model of the {len(COCO)} COCO joints with one expert")
        height, width = self.model.config.backbone_config.image_size
        self.input = ModelInput.read(place, size={"height": height, "width": width}, do_normalize=True, **IMAGENET)

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """Joints of one person, whose box in each of (N, H, W, 3) uint8 is `boxes` (N, 4) xyxy.

        Returns:
            (N, 14, 3) float32: x, y in pixels and confidence, in the order of `person_net.JOINTS`.
        """
        found = []
        for start in range(0, len(frames), _BATCH):
            part = slice(start, start + _BATCH)
            regions = np.stack([self._region(box) for box in boxes[part]])
            crops = np.stack([self._crop(frame, region) for frame, region in zip(frames[part], regions)])
            pictures = self.input.normalised(torch.from_numpy(crops).permute(0, 3, 1, 2).float())
            heat = self.model(pixel_values=pictures.to(self.model.device)).heatmaps
            found.append(peaks(heat.float().cpu().numpy(), regions))
        return as_joints(np.concatenate(found))

    def _region(self, box: np.ndarray) -> np.ndarray:
        """The part of the picture (x, y, width, height) to look at: the padded box in the model's proportions."""
        size = box[2:] - box[:2]
        aspect = self.input.width / self.input.height
        size = _PADDING * np.array([max(size[0], size[1] * aspect), max(size[1], size[0] / aspect)])
        return np.concatenate([(box[:2] + box[2:] - size) / 2, size])

    def _crop(self, frame: np.ndarray, region: np.ndarray) -> np.ndarray:
        """The region in the model's size; first pixel on its left edge, last on its right (arXiv 1911.07524)."""
        scale = (np.array([self.input.width, self.input.height]) - 1) / region[2:]
        matrix = np.array([[scale[0], 0, -scale[0] * region[0]], [0, scale[1], -scale[1] * region[1]]])
        return cv2.warpAffine(frame, matrix, (self.input.width, self.input.height), flags=cv2.INTER_LINEAR)


def peaks(heat: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """Peaks of heat maps (N, K, h, w) in the picture: (N, K, 3) x, y in pixels and height.

    The peak of the logarithm is refined by one Newton step, exact for a Gaussian (DARK, arXiv 1910.06278).

    Args:
        regions: (N, 4) x, y, width, height of what each heat map covers.
    """
    count, joints, height, width = heat.shape
    flat = heat.reshape(count * joints, height, width)
    rows, columns = np.divmod(flat.reshape(len(flat), -1).argmax(1), width)
    found = np.zeros((len(flat), 3), np.float32)
    for index, (values, row, column) in enumerate(zip(flat, rows, columns)):
        smooth = np.log(np.clip(cv2.GaussianBlur(values, (3, 3), _SMOOTHING), 1e-3, 50))
        near = np.pad(smooth, 1, mode="edge")[row : row + 3, column : column + 3]
        slope = np.array([near[1, 2] - near[1, 0], near[2, 1] - near[0, 1]]) / 2
        cross = (near[2, 2] - near[1, 2] - near[2, 1] + 2 * near[1, 1] - near[1, 0] - near[0, 1] + near[0, 0]) / 2
        curve = np.array(
            [
                [near[1, 2] - 2 * near[1, 1] + near[1, 0], cross],
                [cross, near[2, 1] - 2 * near[1, 1] + near[0, 1]],
            ]
        )
        peaked = curve[0, 0] < 0 and np.linalg.det(curve) > 0
        shift = -np.linalg.solve(curve, slope).clip(-1, 1) if peaked else np.zeros(2)
        found[index] = (column + shift[0], row + shift[1], values[row, column])
    found = found.reshape(count, joints, 3)
    found[..., :2] *= regions[:, None, 2:] / (np.array([width, height]) - 1)
    found[..., :2] += regions[:, None, :2]
    found[..., 2] = found[..., 2].clip(0, 1)
    return found


def as_joints(coco: np.ndarray) -> np.ndarray:
    """COCO's 17 joints (N, 17, 3) as the 14 of `person_net.JOINTS`; the neck is the middle of the shoulders."""
    named = {name: coco[:, index] for index, name in enumerate(COCO)}
    shoulders = coco[:, _SHOULDERS]
    named["neck"] = np.concatenate([shoulders[..., :2].mean(1), shoulders[..., 2:].min(1)], 1)
    return np.stack([named[name] for name in person_net.JOINTS], 1)
