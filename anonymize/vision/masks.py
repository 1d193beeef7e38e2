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


BODY_BELOW = 1.5, 1.0, 5.0  # body of a face: face widths to each side, face heights above and below its middle


def body_below(faces: np.ndarray) -> np.ndarray:
    """(N, 4) xyxy: where the bodies of faces (N, 4) xyxy may be."""
    middle, size = (faces[:, :2] + faces[:, 2:]) / 2, faces[:, 2:] - faces[:, :2]
    beside, above, below = BODY_BELOW
    return np.concatenate([middle - size * [beside, above], middle + size * [beside, below]], 1)


def filled(size: tuple[int, int], boxes: np.ndarray) -> np.ndarray:
    """(H, W) bool: the places within any of the boxes (N, 4) xyxy."""
    mask = np.zeros(size, bool)
    for x0, y0, x1, y1 in boxes.round().astype(int).clip(0):
        mask[y0:y1, x0:x1] = True
    return mask


def grown(mask: np.ndarray, radius: float, down: float = 0) -> np.ndarray:
    """A mask (T, H, W) grown by a radius, and `down` pixels further downwards, where shadows lie."""
    disc, line = cues.disc(radius), np.ones((round(down) + 1, 1), np.uint8)
    return np.stack([cv2.dilate(cv2.dilate(m.astype(np.uint8), disc), line, anchor=(0, round(down))) for m in mask]) > 0


def whole(unseen: np.ndarray, margin: float) -> np.ndarray:
    """Places never seen free, (H, W) bool, closed, without holes, grown by the margin; specks are left as they are."""
    closed = cv2.morphologyEx(unseen.astype(np.uint8), cv2.MORPH_CLOSE, cues.disc(3 * margin))
    outlines, _ = cv2.findContours(closed, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    large = [outline for outline in outlines if cv2.contourArea(outline) > 0.002 * unseen.size]
    filled = cv2.drawContours(np.zeros(unseen.shape, np.uint8), large, -1, 1, cv2.FILLED)
    return cues.dilated(filled, margin) | unseen
