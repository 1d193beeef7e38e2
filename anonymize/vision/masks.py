"""Boxes and masks: overlap and growth."""

import cv2
import numpy as np

from anonymize.vision import cues


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Overlap of two boxes (4,) xyxy: intersection over union."""
    size = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    if (size <= 0).any():
        return 0.0
    both = size.prod()
    return float(both / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - both))


def grown(mask: np.ndarray, radius: float, down: float = 0) -> np.ndarray:
    """A mask (T, H, W) grown by a radius, and `down` pixels further downwards, where shadows lie."""
    disc, line = cues.disc(radius), np.ones((round(down) + 1, 1), np.uint8)
    return np.stack([cv2.dilate(cv2.dilate(m.astype(np.uint8), disc), line, anchor=(0, round(down))) for m in mask]) > 0
