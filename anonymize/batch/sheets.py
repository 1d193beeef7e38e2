"""Contact sheets: what became of a clip, for a person to look at."""

import os

import cv2
import numpy as np

from maskdp import atomic, layers

_CHECKER = 8  # pixels


def sheet(rgba: np.ndarray, private: np.ndarray, original: np.ndarray | None = None, columns: int = 6) -> np.ndarray:
    """A picture (h, w, 3): rows original (where given), private layer, public layer, composite; columns over time.

    Args:
        rgba: (T, H, W, 4) uint8; private, original: (T, H, W, 3) uint8.
    """
    times = np.linspace(0, len(rgba) - 1, min(columns, len(rgba))).round().astype(int)
    rgba, private = rgba[times], private[times]
    rows = [] if original is None else [original[times]]
    rows += [private, layers.composite(rgba, _checkerboard(private.shape)), layers.composite(rgba, private)]
    return np.concatenate([np.concatenate(list(row), 1) for row in rows], 0)


def write(path: str | os.PathLike, picture: np.ndarray) -> None:
    """Writes a picture (h, w, 3) as JPEG, in one step."""
    encoded = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), (cv2.IMWRITE_JPEG_QUALITY, 88))[1]
    atomic.write_bytes(path, encoded.tobytes())


def _checkerboard(shape: tuple[int, ...]) -> np.ndarray:
    """What stands for transparency."""
    y, x = np.indices(shape[1:3]) // _CHECKER
    return np.broadcast_to(np.where((x + y) % 2, 214, 236).astype(np.uint8)[..., None], shape)
