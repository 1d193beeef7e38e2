"""What BlazePose's detectors take for people in a single frame; for the look at finished frames."""

import pathlib

import cv2
import numpy as np

from anonymize.people.blazepose.detector import Detection, Detector, tiles
from anonymize.people.blazepose.faces import FaceDetector
from anonymize.people.blazepose.landmarks import Landmarker
from anonymize.people.blazepose.tracks import PRESENT
from anonymize.people.embedded.person_net import pieces as network
from anonymize.vision.masks import body_below, filled

TRUNK = 0.35  # width of a body over the radius of the circle around it


class BlazePoseLook:
    """The pose detector (confirmed by the landmarks) and the face detector; `thorough`: also on squares of the short
    side, and the embedded network, which sees smaller people."""

    def __init__(self, folder: pathlib.Path | None = None):
        self._detect, self._faces, self._landmarks = Detector(folder), FaceDetector(folder), Landmarker(folder)

    def __call__(self, frame: np.ndarray, thorough: bool = True) -> dict[str, np.ndarray]:
        """Masks (H, W) bool by detector."""
        height, width = frame.shape[:2]
        places = list(tiles(height, width, levels=1 if thorough else 0))
        poses = np.zeros((height, width), np.uint8)
        for item in self._detect.tiled(frame, places):
            seen = self._landmarks(frame, item.crop)
            if seen.presence >= PRESENT:
                seen = self._landmarks(frame, seen.next_crop)
            if seen.presence >= PRESENT:
                poses |= (seen.mask(height, width) > 127).astype(np.uint8)
                stick(poses, item)
        faces = np.array([face.box for face in self._faces(frame)]).reshape(-1, 4)
        found = {"BlazePose": poses > 0, "faces": filled((height, width), body_below(faces))}
        return {**found, "network": network(frame)} if thorough else found


def stick(mask: np.ndarray, item: Detection) -> None:
    """Draws a detected person onto a mask (H, W) uint8: a line from head to foot as thick as a trunk."""
    middle, top = item.points[:2]
    reach = top - middle
    ends = [(middle + part * reach).round().astype(int).tolist() for part in (0.8, -0.6)]
    cv2.line(mask, *ends, 1, max(round(TRUNK * float(np.hypot(*reach))), 1))
