"""Two people whose outlines touch are told apart by their necks: joint heat maps of the person network."""

import itertools

import cv2
import numpy as np

LEAST_PEAK = 0.4  # of a neck's heat map
APART = 0.15  # of the outline's longer side, sideways; nearer peaks are one neck
UPRIGHT = 0.25  # what a pixel above or below a neck counts against one beside it: bodies are tall
NEAR = 0.05  # of the outline's height
LASTING = 0.5  # part of the looks; two necks seen more rarely are a mistake, or people who only pass each other


def necks(heat: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The two surest necks (2, 2) x, y in pixels that a heat map (h, w) shows on a mask (H, W) bool; (1, 2) or (0, 2)
    where there are fewer."""
    scale = np.array([mask.shape[1] / heat.shape[1], mask.shape[0] / heat.shape[0]])
    _, _, w, h = cv2.boundingRect(mask.astype(np.uint8))
    smooth = cv2.GaussianBlur(heat.astype(np.float32), (0, 0), 0.7)
    peaks = (smooth >= cv2.dilate(smooth, np.ones((3, 3)))) & (smooth > LEAST_PEAK)
    rows, columns = np.nonzero(peaks & (cv2.resize(mask.astype(np.float32), heat.shape[::-1]) > 0))
    surest = np.argsort(-smooth[rows, columns])
    places = (np.stack([columns, rows], 1)[surest] + 0.5) * scale
    found: list[np.ndarray] = []
    for place in places:
        if len(found) < 2 and all(abs(place[0] - other[0]) > APART * max(w, h) for other in found):
            found.append(place)
    return np.array(found).reshape(-1, 2)


def halves(masks: np.ndarray, times: np.ndarray, seen: list[np.ndarray]) -> list[np.ndarray]:
    """The outlines (T, H, W) bool of the two people whom one outline holds, or that outline alone.

    Args:
        masks: (T, H, W) bool.
        times: (n,) frames that were looked at.
        seen: what `necks` found in each of them.
    """
    looked = [k for k, t in enumerate(times) if masks[t].any()]
    two = np.array([len(seen[k]) == 2 for k in looked])
    if not len(two) or two.mean() < LASTING:
        return [masks]
    pairs = [seen[k].copy() for k, both in zip(looked, two) if both]
    for before, after in itertools.pairwise(pairs):  # each the way round that moves less
        if np.linalg.norm(after - before, axis=1).sum() > np.linalg.norm(after[::-1] - before, axis=1).sum():
            after[:] = after[::-1].copy()
    moments = times[looked]
    paths = [[np.interp(range(len(masks)), moments[two], [p[who, k] for p in pairs]) for k in (0, 1)] for who in (0, 1)]
    places = np.array(paths).transpose(2, 0, 1)  # (T, who, x and y)
    parts = [np.zeros_like(masks) for _ in range(2)]
    for t in np.flatnonzero(masks.any((1, 2))):
        rows, columns = np.nonzero(masks[t])
        aside, above = np.abs(places[t] - np.stack([columns, rows], 1)[:, None]).transpose(2, 0, 1)
        away = aside + UPRIGHT * above
        first = away[:, 0] < away[:, 1]
        near = away.min(0) < NEAR * np.ptp(rows)  # whose neck lies on the outline
        if near.sum() == 1:
            first[:] = near[0]
        parts[0][t, rows[first], columns[first]] = True
        parts[1][t, rows[~first], columns[~first]] = True
    return parts
