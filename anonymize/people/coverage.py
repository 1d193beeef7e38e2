"""What must be removed with a person."""

import cv2
import numpy as np

from anonymize.people import Person


def cover(removal: np.ndarray, track: Person, margin: float) -> None:
    """Adds the convex hull of a person's outline, or the whole grown box where there is none that can be trusted."""
    for t in np.flatnonzero(track.present):
        if track.masks[t].any():
            hull = cv2.convexHull(cv2.findNonZero(track.masks[t].astype(np.uint8)))
            removal[t] |= cv2.fillConvexPoly(np.zeros(removal.shape[1:], np.uint8), hull, 1) > 0
        else:
            x0, y0 = np.floor(track.boxes[t, :2] - 2 * margin).astype(int).clip(0)
            x1, y1 = np.ceil(track.boxes[t, 2:] + 2 * margin).astype(int)
            removal[t, y0:y1, x0:x1] = True
