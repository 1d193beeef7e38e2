"""Control maps for diffusion models, drawn from the rendered avatars and nothing else: depth, edges, skeleton."""

import cv2
import numpy as np
import torch

from anonymize.avatar.body import Body
from anonymize.avatar.camera import Camera
from anonymize.fitting.fit import Fit
from maskdp import layers

CONTROLS = ("depth", "canny", "pose")

SMPLX_KEYPOINTS = (55, 12, 17, 19, 21, 16, 18, 20, 2, 5, 8, 1, 4, 7, 56, 57, 58, 59)
"""The 18 OpenPose keypoints among the joints that `Body` returns: nose, neck, right arm, left arm, right leg, left leg,
right and left eye, right and left ear."""

NECK, SHOULDERS, FACE = 1, (2, 5), (0, 14, 15, 16, 17)
_LIMBS = (
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10)),
    *((1, 11), (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),
)
_COLOURS = (
    *((255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85)),
    *((0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255)),
    *((255, 0, 255), (255, 0, 170), (255, 0, 85)),
)  # of the keypoints; a limb has the colour of the same number, as the ControlNets learned it


def keypoints(fit: Fit, betas: np.ndarray, body: Body, camera: Camera, depth: np.ndarray) -> np.ndarray:
    """Where an avatar's keypoints are seen: (T, 18, 2) pixels, NaN outside the picture and where it is not shown.

    Those of the face are NaN, too, where the rendered surface (`depth` (T, H, W) metres) hides them; limbs show
    through, as pose estimators guess them.
    """
    joints = [
        body(betas, fit.pose[start : start + 32]).joints[:, SMPLX_KEYPOINTS] for start in range(0, len(fit.ok), 32)
    ]
    joints = torch.cat(joints)
    joints[:, NECK] = joints[:, SHOULDERS].mean(1)
    points, distance = camera.project(joints).cpu().numpy(), camera.to_camera(joints)[..., 2].cpu().numpy()
    x, y = np.moveaxis(np.floor(points).astype(int), -1, 0)
    shown = (x >= 0) & (y >= 0) & (x < camera.width) & (y < camera.height) & fit.ok[:, None]
    surface = depth[np.arange(len(depth))[:, None], y.clip(0, camera.height - 1), x.clip(0, camera.width - 1)]
    shown[:, FACE] &= (distance < surface + 0.03)[:, FACE]
    return np.where(shown[..., None], points, np.nan)


def depth_maps(depth: np.ndarray) -> np.ndarray:
    """Nearness, as depth ControlNets expect it: (T, H, W, 3) uint8, white nearest, black where nothing is.

    Args:
        depth: (T, H, W) metres, infinite where nothing is. One scale serves all frames, or the map would flicker.
    """
    shown = np.isfinite(depth)
    near, far = (depth[shown].min(), depth[shown].max()) if shown.any() else (0.0, 1.0)
    nearness = 255 - 155 * (np.where(shown, depth, near) - near) / max(far - near, 1e-6)
    return np.repeat(np.where(shown, nearness, 0).astype(np.uint8)[..., None], 3, -1)


def edge_maps(rgba: np.ndarray) -> np.ndarray:
    """Canny edges of the avatars over a constant: (T, H, W, 3) uint8."""
    return np.stack([np.repeat(cv2.Canny(view, 60, 140)[..., None], 3, 2) for view in layers.public_view(rgba)])


def pose_maps(keypoints: np.ndarray, size: int) -> np.ndarray:
    """OpenPose skeletons on black: (T, size, size, 3) uint8.

    Args:
        keypoints: (T, P, 18, 2) pixels, NaN where a keypoint is hidden or somebody absent.
    """
    return np.stack([_skeletons(frame, size) for frame in keypoints])


def _skeletons(people: np.ndarray, size: int) -> np.ndarray:
    picture = np.zeros((size, size, 3), np.uint8)
    thick = max(size // 128, 1)
    for points in people:
        for (a, b), colour in zip(_LIMBS, _COLOURS):
            if np.isfinite(points[[a, b]]).all():
                middle, along = points[[a, b]].mean(0), points[b] - points[a]
                axes = (round(float(np.hypot(*along)) / 2), thick)
                angle = float(np.degrees(np.arctan2(along[1], along[0])))
                outline = cv2.ellipse2Poly(middle.round().astype(int).tolist(), axes, round(angle), 0, 360, 5)
                cv2.fillConvexPoly(picture, outline, [0.6 * part for part in colour])
        for point, colour in zip(points, _COLOURS):
            if np.isfinite(point).all():
                cv2.circle(picture, point.round().astype(int).tolist(), thick, colour, -1)
    return picture
