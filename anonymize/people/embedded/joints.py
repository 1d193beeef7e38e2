"""A person's joints read from the heat maps of the person network."""

import numpy as np

from anonymize.people.embedded.person_net import PAIRS

SPREAD = 2.0  # cells; what a peak takes up of a heat map


def read(heat: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The joints of the person in a box of a picture.

    Where the network cannot tell left from right, the maps of both joints of a pair peak at both places, and the
    highest peaks of the two may be one place. So the two are read together: the highest place of their sum, then the
    highest of what is left of the sum beside one joint there. Each is the one whose map it fits.

    Args:
        heat: (14, h, w) maps of the whole picture, in the order of `person_net.JOINTS`.
        box: (4,) xyxy in pixels.
        size: height and width of the picture.

    Returns:
        (14, 3) float32: x, y in pixels and how sure it is that the joint, or its fellow, is there, 0..1.
    """
    scale = np.array([size[1] / heat.shape[2], size[0] / heat.shape[1]])
    x0, y0 = np.floor(box[:2] / scale).astype(int).clip(0)
    x1, y1 = np.ceil(box[2:] / scale).astype(int)
    inside = heat[:, y0:y1, x0:x1].astype(np.float32)
    places, sure = [_peak(values) for values in inside], inside.max((1, 2))
    for left, right in PAIRS:
        both, rather_right = inside[left] + inside[right], inside[right] - inside[left]
        first = _peak(both)
        beside = both - max(sure[left], sure[right]) * _bump(both.shape, first)
        second = _peak(beside)
        turned = rather_right[first] > (rather_right[second] if second != first else 0)
        here, there = (right, left) if turned else (left, right)
        places[here], places[there], sure[here], sure[there] = first, second, both[first], beside[second]
    pixels = (np.array(places)[:, ::-1] + [x0 + 0.5, y0 + 0.5]) * scale
    return np.column_stack([pixels, sure.clip(0, 1)]).astype(np.float32)


def _peak(values: np.ndarray) -> tuple[int, int]:
    """Row and column of the largest value."""
    return np.unravel_index(values.argmax(), values.shape)


def _bump(shape: tuple[int, int], place: tuple[int, int]) -> np.ndarray:
    """A Gaussian of height 1 at a row and column."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return np.exp(-((rows - place[0]) ** 2 + (columns - place[1]) ** 2) / (2 * SPREAD**2))
