"""Hand landmarks of people whose body landmarks are known: 21 points a hand, in metres.

A hand is searched in a square around wrist, index and little finger of the body landmarks, which the re-crop model
centres on the hand; from then on the square follows the hand's own landmarks while they stay near the wrist.
"""

import dataclasses
import pathlib

import numpy as np

from anonymize.people.blazepose.crops import Crop
from anonymize.people.blazepose.models import HAND_LANDMARKS, HAND_RECROP, Model

WRISTS, INDICES, PINKIES = (15, 16), (19, 20), (17, 18)  # body landmarks, left and right
_PALM = (0, 1, 2, 3, 5, 6, 9, 10, 13, 14, 17, 18)  # the landmarks that span the square of the next frame
_FROM_BODY, _FROM_HAND, _SHIFT = 2.7, 2.0, -0.1  # sides of the squares in sizes of what spans them; shift in sides
_LEAST_PRESENCE = 0.5
_LEAST_SIDE = 32.0  # pixels; a smaller square shows no fingers
_PATIENCE = 3  # frames until a hand that was not found is looked for again
_MOST_APART = 0.35  # distance of the hand's wrist from the body's wrist, in sides of the square from the body


class HandFinder:
    """The hand models, for people followed from frame to frame.

    Args:
        folder: where the models lie; `models.default_folder()` where None.
    """

    def __init__(self, folder: pathlib.Path | None = None):
        self._landmarks, self._recrop = Model(HAND_LANDMARKS, folder), Model(HAND_RECROP, folder)

    def __call__(self, frames: np.ndarray, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Both hands of one person.

        Args:
            frames: (T, H, W, 3) uint8.
            image: (T, 33, 3) body landmarks: x, y in pixels and visibility; NaN where the person was not found.

        Returns:
            `Landmarks.hands` (T, 2, 21, 3) and `Landmarks.hands_seen` (T, 2): the presence that the model gives a hand.
        """
        hands = np.full((len(frames), 2, 21, 3), np.nan, np.float32)
        seen = np.zeros((len(frames), 2), np.float32)
        for side in range(2):
            region, again = None, 0
            for t, (frame, body) in enumerate(zip(frames, image)):
                start = _from_body(*body[[WRISTS[side], INDICES[side], PINKIES[side]], :2])
                if start is None or t < again or not _touches(start, frame):
                    region = None
                    continue
                followed = region is not None and np.hypot(*(region.centre - start.centre)) < 0.5 * start.side
                if not followed:
                    region = self._centred(frame, start)
                found = self._look(frame, region)
                apart = np.hypot(*(found.pixels[0] - body[WRISTS[side], :2]))
                if found.presence < _LEAST_PRESENCE or apart > _MOST_APART * start.side:
                    again = t + (1 if followed else _PATIENCE)
                    region = None
                    continue
                hands[t, side], seen[t, side] = found.world - found.world[0], found.presence
                region = _from_hand(found.pixels)
        return hands, seen

    def _centred(self, frame: np.ndarray, region: Crop) -> Crop:
        """The region moved, turned and scaled to the hand in it."""
        size = self._recrop.size
        points = self._recrop(region.cut(frame, size) * np.float32(1 / 255))["output_crop"].reshape(2, 2)
        centre, wrist = _in_picture(points, region, size)
        angle = _upward(centre - wrist)
        return _shifted(centre, 2 * float(np.hypot(*(centre - wrist))), angle)

    def _look(self, frame: np.ndarray, region: Crop) -> "_Found":
        size = self._landmarks.size
        out = self._landmarks(region.cut(frame, size) * np.float32(1 / 255))
        world = out["Identity_3"].reshape(21, 3).copy()
        world[:, :2] = world[:, :2] @ region.axes.T
        pixels = _in_picture(out["Identity"].reshape(21, 3)[:, :2], region, size)
        return _Found(pixels, world, float(out["Identity_1"][0]))


@dataclasses.dataclass(frozen=True)
class _Found:
    """21 landmarks in pixels (21, 2) and metres (21, 3), and how sure the model is that they are a hand."""

    pixels: np.ndarray
    world: np.ndarray
    presence: float


def _in_picture(points: np.ndarray, region: Crop, size: int) -> np.ndarray:
    """Points (N, 2) of a region resampled to `size`, in pixels of the picture."""
    matrix = region.to_picture(size)
    return points @ matrix[:, :2].T + matrix[:, 2]


def _shifted(centre: np.ndarray, side: float, angle: float) -> Crop:
    """A crop moved a little toward its top, where the fingers are."""
    crop = Crop(centre, side, angle)
    return Crop(centre + crop.axes @ [0, _SHIFT * side], side, angle)


def _upward(along: np.ndarray) -> float:
    """The angle of a square in which the direction `along` points up."""
    return float(np.arctan2(along[0], -along[1]))


def _from_body(wrist: np.ndarray, index: np.ndarray, pinky: np.ndarray) -> Crop | None:
    """Where to look for a hand; None where the wrist is unknown or the hand too small."""
    middle = (2 * index + pinky) / 3
    side = _FROM_BODY * 2 * np.hypot(*(middle - wrist))
    if not side >= _LEAST_SIDE:
        return None
    return _shifted(middle, side, _upward(middle - wrist))


def _from_hand(pixels: np.ndarray) -> Crop:
    """Where to look in the next frame."""
    along = (pixels[5] + 2 * pixels[9] + pixels[13]) / 4 - pixels[0]
    angle = _upward(along)
    axes = Crop(pixels[0], 1.0, angle).axes
    local = pixels[list(_PALM)] @ axes
    low, high = local.min(0), local.max(0)
    return _shifted(axes @ (low + high) / 2, _FROM_HAND * float((high - low).max()), angle)


def _touches(region: Crop, frame: np.ndarray) -> bool:
    """Whether the square's centre lies in the picture."""
    return bool((region.centre >= 0).all() and (region.centre < frame.shape[1::-1]).all())
