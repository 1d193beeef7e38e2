"""The people of a clip, as every finder returns them, and the choice of finders."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import draccus
import numpy as np

from anonymize.avatar.camera import Camera
from anonymize.avatar.pose import Pose


@dataclasses.dataclass(frozen=True)
class Landmarks:
    """The 33 BlazePose landmarks of a person, in the order of `blazepose.landmarks.NAMES`, and those of the hands.

    Attributes:
        image: (T, 33, 3) float32 x, y in pixels and visibility 0..1; NaN and 0 where the person was not seen.
        world: (T, 33, 3) float32 metres from the middle of the hips, in camera axes: x right, y down, z away.
        hands: (T, 2, 21, 3) float32 metres from the wrist, left and right, in the same axes; NaN where not seen.
        hands_seen: (T, 2) float32 0..1, whether each hand was seen.
    """

    image: np.ndarray
    world: np.ndarray
    hands: np.ndarray
    hands_seen: np.ndarray


@dataclasses.dataclass(frozen=True)
class Person:
    """One person over the T frames of a clip.

    Attributes:
        track_id: number of the track, from 0.
        present: (T,) bool.
        boxes: (T, 4) float32 xyxy in pixels, NaN where absent.
        masks: (T, H, W) bool, the outline where it can be trusted for fitting a pose, empty elsewhere.
        joints: (T, 14, 3) float32 x, y in pixels and confidence 0..1, in the order of `person_net.JOINTS`.
        nearness: (T,) float32, larger for who is nearer among the people of a frame, NaN where unknown; or None.
        pose: where it is known already and need not be fitted, NaN in frames without; or None.
        landmarks: 3-D landmarks, or None where the finder has none.
    """

    track_id: int
    present: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray
    joints: np.ndarray
    nearness: np.ndarray | None = None
    pose: Pose | None = None
    landmarks: Landmarks | None = None


@dataclasses.dataclass(frozen=True)
class People:
    """The people of a clip and what must be removed with them.

    Attributes:
        removal: (T, H, W) bool, everything that must be removed, already dilated.
        static_camera: whether places keep their pixels over time.
        background: (H, W, 3) uint8, the empty scene, or None where the finder made none.
        known: (H, W) bool, where the empty scene was seen, or None.
        doubt: why the clip must be quarantined, in one line, or None.
        notes: figures behind the decision, for the record.
        look: the finder's own detector for the look at finished frames, beside `look.default`; or None.
        camera: what the poses given with the people were made for; None: `Camera.default`.
    """

    persons: tuple[Person, ...]
    removal: np.ndarray
    static_camera: bool
    background: np.ndarray | None
    known: np.ndarray | None
    doubt: str | None
    notes: dict
    look: Callable[[np.ndarray, bool], dict[str, np.ndarray]] | None = None
    camera: Camera | None = None


class PeopleFinder(Protocol):
    """A backend that finds people."""

    def find(self, frames: np.ndarray, fps: float) -> People:
        """Finds the people of a clip, frames (T, H, W, 3) uint8 RGB."""
        ...


@dataclasses.dataclass(frozen=True)
class FinderConfig(draccus.ChoiceRegistry):
    """Base of the finders; `finder.type` chooses."""

    @classmethod
    def default_choice_name(cls) -> str:
        return "auto"

    def chosen(self) -> "FinderConfig":
        """The finder that is meant: what `auto` comes to here, or itself.

        Raises:
            UserError: a folder that it needs is missing or is not what it should be.
        """
        return self

    def pinned(self) -> "FinderConfig":
        """The settings with the contents of their folders in place of the folders' names, for fingerprints."""
        return self
