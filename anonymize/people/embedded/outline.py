"""A person's outline, sharpened by the colours that the person and what is around them have throughout a clip.

The person network is unsure of thin limbs and of who stands still, and it looks at one frame in a few. A shin in the
colour of the other shin, or of the same one a second later, is the person's all the same.
"""

import cv2
import numpy as np

from anonymize.vision import cues

BINS = 16  # of each of three colours
AROUND = 0.07  # of the short side: how far from the first outline, or from what may be a person, the person may reach
MAYBE = 0.25  # the network's probability of what may be a person
LEAST = 1e-5  # part of the pixels; colours rarer than this tell nothing
CAP = 4.0  # natural units; no colour tells more
SPECK = 0.01  # of the outline's area; a smaller hole is none, such as a print on a shirt; those that arms enclose are
SAMPLES = 40  # frames that colours are counted in
NETWORK, COLOUR = 0.77, 0.85
"""Weights of the network's log-odds and of the colours' log-likelihood ratio, by logistic regression on 30 studio
videos (seed 5); on 20 others (seed 21) overlap with the truth rose from 0.79 to 0.85."""


def sharpened(frames: np.ndarray, masks: np.ndarray, probability, others: np.ndarray) -> np.ndarray:
    """Outlines (T, H, W) bool of one person, near the first ones and empty where those are.

    Args:
        frames: (T, H, W, 3) uint8.
        masks: (T, H, W) bool, the first outlines.
        probability: that a pixel shows a person: from a frame's number to (H, W) float32.
        others: (T, H, W) bool, who or what else is there and cannot be this person.
    """
    seen = np.flatnonzero(masks.any((1, 2)))
    if not len(seen):
        return masks
    radius = AROUND * min(masks.shape[1:])

    def place(t: int, likely: np.ndarray) -> np.ndarray:
        return cues.dilated(masks[t] | (likely > MAYBE), radius) & ~others[t]

    size = BINS**3
    person, around = np.zeros(size), np.zeros(size)
    for t in seen[cues.sample_times(len(seen), SAMPLES)]:
        likely = probability(t)
        near = place(t, likely)
        index = _bin(frames[t])
        person += _counts(index, likely, near & masks[t] & (likely > 0.5))
        around += _counts(index, 1 - likely, near & ~masks[t] & (likely < 0.2))
    ratio = (np.log(_shares(person)) - np.log(_shares(around))).clip(-CAP, CAP).astype(np.float32)
    out = np.zeros_like(masks)
    for t in seen:
        likely = probability(t).clip(1e-3, 1 - 1e-3)
        score = NETWORK * np.log(likely / (1 - likely)) + COLOUR * ratio[_bin(frames[t])]
        mine = (score > 0) & place(t, likely)
        mine = cues.touching(mine, mine & masks[t])
        out[t] = cues.without_holes(mine, SPECK * mine.sum()) & ~others[t]
    return out


def _bin(frame: np.ndarray) -> np.ndarray:
    """Number of the colour cell of each pixel, (H, W)."""
    red, green, blue = np.moveaxis(frame.astype(np.int32) * BINS // 256, -1, 0)
    return (red * BINS + green) * BINS + blue


def _counts(index: np.ndarray, weight: np.ndarray, where: np.ndarray) -> np.ndarray:
    return np.bincount(index[where], weight[where], BINS**3)


def _shares(counts: np.ndarray) -> np.ndarray:
    """Counts by colour cell as smoothed shares, never 0."""
    cells = counts.reshape(BINS, BINS, BINS)
    for axis in range(3):
        plane = np.moveaxis(cells, axis, 0).reshape(BINS, -1)
        plane = cv2.GaussianBlur(plane, (1, 5), 0.8, borderType=cv2.BORDER_REFLECT)
        cells = np.moveaxis(plane.reshape(BINS, BINS, BINS), 0, axis)
    return cells.ravel() / max(counts.sum(), 1) + LEAST
