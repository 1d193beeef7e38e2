"""Detecting faces up to some five metres away: mediapipe's full-range face detector."""

import pathlib

import numpy as np

from anonymize.people.blazepose.crops import Letterbox
from anonymize.people.blazepose.detector import Detection, anchors, decoded
from anonymize.people.blazepose.models import FACE_DETECTION, Model


class FaceDetector:
    """The face detector.

    Args:
        folder: where the models lie.
        least: score above which something counts as a face.
    """

    def __init__(self, folder: pathlib.Path | None = None, least: float = 0.6):
        self._model, self._least = Model(FACE_DETECTION, folder), least
        self._anchors = anchors(self._model.size, ((4, 1),))

    def __call__(self, picture: np.ndarray) -> list[Detection]:
        """Faces in a picture (H, W, 3) uint8, surest first; points: right eye, left eye, nose, mouth, right ear, left
        ear."""
        boxed = Letterbox.of(picture, self._model.size)
        out = self._model(boxed.square)
        raw, logits = sorted(out.values(), key=lambda values: -values.shape[1])
        return decoded(raw, np.ascontiguousarray(logits[:, 0]), self._anchors, boxed, self._least)
