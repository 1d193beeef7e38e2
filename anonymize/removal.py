"""Taking people out of a scene: what stood behind them, seen when the place was free, else painted from around it."""

import dataclasses

import cv2
import numpy as np

from anonymize import cues, person_net
from anonymize.people import People

MOST_REMOVED = 0.8  # of a frame; beyond it nothing of the scene is left to show
BLANK = cues.GREY
LOOKS = 3  # frames of the result that are looked at again
SEEN_AGAIN = 0.015  # part of a frame; a larger piece that looks like a person at every height is a doubt


@dataclasses.dataclass(frozen=True)
class Removal:
    """The scene without its people.

    Attributes:
        frames: (T, H, W, 3) uint8.
        blanked: (T,) bool, frames that are one flat grey because the removal failed there.
        doubt: why the clip should be quarantined, in one line, or None.
    """

    frames: np.ndarray
    blanked: np.ndarray
    doubt: str | None


def remove(frames: np.ndarray, people: People, most_blanked: float = 0.2) -> Removal:
    """Removes everything that `people.removal` covers.

    With a static camera a removed pixel becomes the temporal median of the frames in which it was free, adjusted to
    the frame's light. Where it never was free long enough, and wherever the camera moves, it is inpainted from the free
    pixels around it (Telea 2004). A frame that is removed almost whole is blanked. The network, HOG and a face detector
    then look at some of the resulting frames: if they still see somebody, that is a doubt.

    Guarantees: the result is a function of the pixels outside `people.removal` and of the mask itself. Whatever the
    removed pixels held, the output's bytes are the same (`people.background` is not read).

    Args:
        frames: (T, H, W, 3) uint8.
        most_blanked: the part of the clip that may be blanked without a doubt.
    """
    busy = people.removal
    blanked = busy.mean((1, 2)) > MOST_REMOVED
    out = np.where(busy[..., None], 0, frames).astype(np.uint8)
    painted = busy
    if people.static_camera and not blanked.all():
        scene, known = cues.background_model(out[~blanked], busy[~blanked])
        painted = busy & ~known
        scene = cues.inpainted(scene, ~known)
        light = cues.light_changes(out, busy, scene)
        for t in np.flatnonzero(~blanked):
            filling = (scene + light[t]).round().clip(0, 255).astype(np.uint8)
            out[t][busy[t]] = filling[busy[t]]
    else:
        for t in np.flatnonzero(~blanked):
            out[t] = cues.inpainted(out[t], busy[t])
    out[blanked] = BLANK
    share = blanked.mean()
    doubt = (
        f"{share:.0%} of the frames had to be blanked" if share > most_blanked else _seen_again(out, blanked, painted)
    )
    return Removal(out, blanked, doubt)


def _seen_again(frames: np.ndarray, blanked: np.ndarray, painted: np.ndarray) -> str | None:
    """Why somebody may still be visible in the finished frames, or None. What was `painted` (T, H, W) is nobody."""
    shown = np.flatnonzero(~blanked)
    for t in shown[cues.sample_times(len(shown), LOOKS)]:
        frame = frames[t]
        likely = (person_net.still_person(person_net.load(), frame) > 0.5) & ~painted[t]
        pieces = cv2.connectedComponentsWithStats(likely.astype(np.uint8))[2][1:, cv2.CC_STAT_AREA]
        if pieces.max(initial=0) > SEEN_AGAIN * likely.size or len(cues.hog_people(frame)) or len(cues.faces(frame)):
            return f"somebody may still be seen in frame {t} after the removal"
    return None
