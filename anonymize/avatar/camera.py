"""A pinhole camera with OpenCV axes: x right, y down, z forward."""

import dataclasses

import numpy as np
import torch


@dataclasses.dataclass(frozen=True)
class Camera:
    """`x_cam = rotation @ x_world + translation`; pixel = focal * x / z + centre.

    Attributes:
        width, height: image size in pixels.
        focal: focal length in pixels.
        rotation: (3, 3) world to camera. The default turns the world's y-up axes to OpenCV's.
        translation: (3,) metres, world to camera.
    """

    width: int
    height: int
    focal: float
    rotation: np.ndarray = dataclasses.field(default_factory=lambda: np.diag([1.0, -1.0, -1.0]))
    translation: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(3))

    @classmethod
    def default(cls, width: int, height: int) -> "Camera":
        """The camera assumed where none is known: focal length 1.2 times the longer side, at the world's origin."""
        return cls(width, height, 1.2 * max(width, height))

    @classmethod
    def look_at(cls, eye, target, width: int, height: int, focal: float) -> "Camera":
        """A level camera at `eye` (metres, world) whose optical axis passes through `target`."""
        eye, target = np.asarray(eye, float), np.asarray(target, float)
        forward = (target - eye) / np.linalg.norm(target - eye)
        right = np.cross(forward, [0.0, 1.0, 0.0])
        right /= np.linalg.norm(right)
        rotation = np.stack([right, np.cross(forward, right), forward])
        return cls(width, height, focal, rotation, -rotation @ eye)

    def scaled(self, factor: float) -> "Camera":
        """The same view at `factor` times the resolution (sizes are rounded)."""
        width, height = round(self.width * factor), round(self.height * factor)
        return dataclasses.replace(self, width=width, height=height, focal=self.focal * factor)

    def to_camera(self, points: torch.Tensor) -> torch.Tensor:
        """World points (..., 3) to camera coordinates (..., 3), metres."""
        rotation = torch.as_tensor(self.rotation, dtype=points.dtype, device=points.device)
        return points @ rotation.T + torch.as_tensor(self.translation, dtype=points.dtype, device=points.device)

    def project(self, points: torch.Tensor) -> torch.Tensor:
        """World points (..., 3) to pixels (..., 2), x then y; a pixel's centre is at +0.5. Differentiable."""
        points = self.to_camera(points)
        centre = torch.tensor([self.width / 2, self.height / 2], dtype=points.dtype, device=points.device)
        return self.focal * points[..., :2] / points[..., 2:].clamp_min(1e-3) + centre
