"""Looking for people in finished frames, with whatever detectors there are."""

import functools
from collections.abc import Callable

import numpy as np

from anonymize.people.blazepose import models, wheel
from anonymize.people.embedded import person_net
from anonymize.vision import cues
from anonymize.vision.masks import body_below, filled

Look = Callable[[np.ndarray, bool], dict[str, np.ndarray]]
"""From a frame (H, W, 3) uint8, and whether to look thoroughly, to what each detector takes for people, (H, W) bool by
the detector's name."""

THOROUGH = 4  # looks from one thorough look to the next; the first look is thorough
CHANGED = 16  # grey levels; a frame in which no place differs more from one looked at before shows the same


@functools.cache
def default() -> Look:
    """BlazePose's detectors where their models are, else the embedded network, HOG and Haar faces."""
    if wheel.complete(models.default_folder()):
        from anonymize.people.blazepose.look import BlazePoseLook

        return BlazePoseLook()
    return embedded


def embedded(frame: np.ndarray, thorough: bool = True) -> dict[str, np.ndarray]:
    """What the embedded network, HOG and the Haar cascade see."""
    return {
        "network": person_net.pieces(frame),
        "HOG": filled(frame.shape[:2], cues.hog_people(frame)),
        "faces": filled(frame.shape[:2], body_below(cues.faces(frame))),
    }


def everywhere(frames: np.ndarray, shown: np.ndarray, looks: tuple[Look, ...]) -> dict[str, np.ndarray]:
    """What each detector sees in every frame (T, H, W, 3) that is `shown` (T,): masks (T, H, W) bool by name.

    A frame that equals an earlier one up to noise is not looked at again: it shows what that one does.
    """
    seen: dict[str, np.ndarray] = {}
    before, count = None, 0
    for t in np.flatnonzero(shown):
        if before is None or cues.changed(frames[before], frames[t], CHANGED):
            before = t
            thorough = count % THOROUGH == 0
            masks = {name: mask for look in looks for name, mask in look(frames[t], thorough).items()}
            count += 1
        for name, mask in masks.items():
            if mask.any():
                seen.setdefault(name, np.zeros(frames.shape[:3], bool))[t] = mask
    return seen
