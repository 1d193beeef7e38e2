"""Who is nearer: relative depth by Depth Anything (arXiv 2406.09414), and avatars put in that order."""

import pathlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from anonymize import weights
from anonymize.avatar.camera import Camera
from anonymize.avatar.render import Mesh
from anonymize.people.models.model_input import IMAGENET, ModelInput

KINDS = ("depth_anything",)
CLEARANCE = 0.02  # part of the distance by which the farther of two people stays behind the nearer


class Depth:
    """The depth model in `folder`/depth.

    Raises:
        UserError: missing or not such a model.
    """

    def __init__(self, folder: pathlib.Path):
        from transformers import AutoModelForDepthEstimation

        self.model = weights.load(folder, "depth", AutoModelForDepthEstimation, KINDS)
        self.input = ModelInput.read(
            folder / "depth",
            size={"height": 518, "width": 518},
            keep_aspect_ratio=True,
            ensure_multiple_of=14,
            resample=3,
            do_normalize=True,
            **IMAGENET,
        )
        self._sign = -1 if self.model.config.depth_estimation_type == "metric" else 1

    @torch.inference_mode()
    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """Nearness (H, W) float32 of one frame, larger is nearer; only its order within the frame means anything."""
        depth = self.model(pixel_values=self.input(frame[None]).to(self.model.device)).predicted_depth
        depth = F.interpolate(depth[:, None], frame.shape[:2], mode="bilinear", align_corners=False)
        return self._sign * depth[0, 0].float().cpu().numpy()


def in_order(meshes: Sequence[Mesh], nearness: Sequence[float], camera: Camera) -> list[Mesh]:
    """Meshes of one frame moved apart where their distances contradict `nearness` (larger is nearer, NaN unknown).

    A mesh that should be behind another is scaled about the camera's centre until all of it is: its picture stays as it
    is, only its depth changes. Meshes already in order stay where they are.
    """
    known = sorted((i for i in range(len(meshes)) if np.isfinite(nearness[i])), key=lambda i: -nearness[i])
    eye = torch.as_tensor(-camera.rotation.T @ camera.translation, dtype=torch.float32)
    out = list(meshes)
    for place, i in enumerate(known):
        depths = camera.to_camera(out[i].vertices)[..., 2]
        for j in known[:place]:
            before = camera.to_camera(out[j].vertices)[..., 2]
            if float(before.mean()) > float(depths.mean()):
                factor = (1 + CLEARANCE) * before.max() / depths.min()
                vertices = eye + factor * (out[i].vertices - eye)
                out[i] = Mesh(vertices, out[i].faces, out[i].colours)
                depths = depths * factor
    return out
