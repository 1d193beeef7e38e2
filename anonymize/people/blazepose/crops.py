"""Square pieces of a picture as the models take them: turned crops around a person, upright ones with a border."""

import dataclasses

import cv2
import numpy as np

ENLARGED = 1.25  # side of the crop over the diameter of the circle around the body (pose_detection_to_roi.pbtxt)


@dataclasses.dataclass(frozen=True)
class Crop:
    """A turned square of a picture.

    Attributes:
        centre: (2,) x, y in pixels of the picture.
        side: pixels of the picture.
        angle: radians; how far the crop's axes are turned from the picture's, clockwise as seen.
    """

    centre: np.ndarray
    side: float
    angle: float = 0.0

    @classmethod
    def around(cls, centre: np.ndarray, on_circle: np.ndarray) -> "Crop":
        """The crop of a body: its middle at the hips, and a point on the circle around it, in the direction of the
        head, which shall be up."""
        x, y = on_circle - centre
        return cls(np.asarray(centre), 2 * ENLARGED * float(np.hypot(x, y)), float(np.pi / 2 - np.arctan2(-y, x)))

    @property
    def axes(self) -> np.ndarray:
        """(2, 2): columns are the crop's right and down in the picture."""
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        return np.array([[cos, -sin], [sin, cos]])

    def to_picture(self, size: int) -> np.ndarray:
        """(2, 3) affine map from a crop of `size` pixels to the picture."""
        linear = self.axes * (self.side / size)
        return np.column_stack([linear, self.centre - linear @ [size / 2, size / 2]])

    def cut(self, picture: np.ndarray, size: int) -> np.ndarray:
        """(size, size, 3) uint8; black outside the picture."""
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(picture, self.to_picture(size), (size, size), flags=flags)


@dataclasses.dataclass(frozen=True)
class Letterbox:
    """An upright picture in the middle of a square, what remains of it at `border`; `scale` from picture to square."""

    square: np.ndarray
    scale: float
    corner: np.ndarray

    @classmethod
    def of(cls, picture: np.ndarray, size: int) -> "Letterbox":
        """The picture (H, W, 3) uint8 in a square (size, size, 3) float32 in [-1, 1], black around it (0 before the
        range is applied)."""
        height, width = picture.shape[:2]
        scale = size / max(height, width)
        inner = max(round(width * scale), 1), max(round(height * scale), 1)
        small = cv2.resize(picture, inner, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        left, top = (size - inner[0]) // 2, (size - inner[1]) // 2
        square = np.full((size, size, 3), -1, np.float32)
        square[top : top + inner[1], left : left + inner[0]] = small * np.float32(1 / 127.5) - 1
        return cls(square, scale, np.array([left, top], np.float32))

    def to_picture(self, points: np.ndarray) -> np.ndarray:
        """Points (..., 2) of the square, in pixels of the picture."""
        return (points - self.corner) / self.scale
