"""Where a posed body stands, from where its landmarks are seen in the picture."""

import numpy as np

from anonymize.avatar.camera import Camera
from anonymize.fitting.smoothing import smoothed, stiffness

_DEPTH_CUTOFF, _CUTOFF = 0.4, 5.0  # Hz: people move slowly along the optical axis, and little else tells their distance
_OFF = 0.12  # of the person's extent in the picture: a landmark that far off its place counts half
_NEAREST = 0.3  # metres
_ROUNDS = 4


def place(points: np.ndarray, seen: np.ndarray, weights: np.ndarray, camera: Camera, fps: float) -> np.ndarray:
    """Translations (T, 3), world metres, at which `points` project onto `seen`, smooth in time.

    The distance of who is cut off is that of the frames that show more of them.

    Args:
        points: (T, K, 3) world metres.
        seen: (T, K, 2) pixels.
        weights: (T, K) 0..1; frames without any are filled from their neighbours.
    """
    turned = points @ camera.rotation.T
    rays = (seen - [camera.width / 2, camera.height / 2]) / camera.focal
    rays = np.where(weights[..., None] > 0, rays, 0.0)
    known = (weights > 0.05).sum(1) >= 3
    if not known.any():
        return np.zeros((len(points), 3))
    trust = weights
    for _ in range(_ROUNDS):
        depth, certain = _depth(turned, rays, trust)
        usual = max(float(np.median(depth[known])), _NEAREST)
        certain = np.where(known, certain / max(np.median(certain[known]), 1e-9), 0.0)
        log_depth = np.log(np.clip(depth, max(usual / 6, _NEAREST), usual * 6))
        log_depth = smoothed(log_depth, np.minimum(certain, 2.0), stiffness(_DEPTH_CUTOFF, fps))
        away = np.exp(log_depth)
        at = turned[..., 2] + away[:, None]
        offset = rays * at[..., None] - turned[..., :2]
        total = trust.sum(1)
        across = (trust[..., None] * offset).sum(1) / np.maximum(total, 1e-9)[:, None]
        across = smoothed(across, np.where(known, np.minimum(total / 6, 1.0), 0.0), stiffness(_CUTOFF, fps))
        error = np.linalg.norm(offset - across[:, None], axis=2) / np.ptp(turned[..., :2], axis=1).max(1)[:, None]
        trust = weights / (1 + (error / _OFF) ** 2)
    found = np.concatenate([across, away[:, None]], 1)
    return (found - camera.translation) @ camera.rotation


def _depth(points: np.ndarray, rays: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares distance (T,) of points (T, K, 3), camera axes, that are seen along rays (T, K, 2), and how well
    they determine it."""

    def spread(values: np.ndarray) -> np.ndarray:
        mean = (weights[..., None] * values).sum(1) / np.maximum(weights.sum(1), 1e-9)[:, None]
        return values - mean[:, None]

    # rays * (z + depth) = x + across for each landmark; `across` is eliminated by taking the mean away.
    left, right = spread(rays), spread(points[..., :2] - rays * points[..., 2:])
    certain = (weights[..., None] * left**2).sum((1, 2))
    return (weights[..., None] * left * right).sum((1, 2)) / np.maximum(certain, 1e-12), certain
