"""The models as functions of pictures: where they lie, loading them checked, running them on the CPU."""

import contextlib
import functools
import os
import pathlib
import sys
from collections.abc import Iterator

import numpy as np

from anonymize import weights
from anonymize.people.blazepose import wheel
from maskdp.errors import UserError

CHECKSUMS = {pathlib.PurePath(name).name: checksum for name, checksum in wheel.MODELS.items()}
POSE_DETECTION = "pose_detection.tflite"
POSE_LANDMARKS = "pose_landmark_full.tflite"
HAND_LANDMARKS = "hand_landmark_full.tflite"
HAND_RECROP = "hand_recrop.tflite"
FACE_DETECTION = "face_detection_full_range_sparse.tflite"


def default_folder() -> pathlib.Path:
    """Where `maskdp weights fetch blazepose` puts the models."""
    return weights.default_folder() / "blazepose"


@functools.cache
def _checked(file: pathlib.Path) -> bytes:
    if not file.is_file():
        raise UserError(f"{file}: no such model, expected what `maskdp weights fetch blazepose` brings")
    data = file.read_bytes()
    if weights.sha256(file) != CHECKSUMS[file.name]:
        raise UserError(f"{file}: is not the model of {wheel.REQUIREMENT}, its SHA-256 differs")
    return data


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the runtime's C++ part writes to standard error; it has no setting for that."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class Model:
    """One model, on one thread: several videos at once use the cores better than several threads do.

    Args:
        name: one of `CHECKSUMS`.
        folder: where the models lie; `default_folder()` where None.

    Raises:
        UserError: the model is missing or not the pinned file.
    """

    def __init__(self, name: str, folder: pathlib.Path | None = None):
        from ai_edge_litert.interpreter import Interpreter

        data = _checked((folder or default_folder()) / name)
        with _quiet():
            self._interpreter = Interpreter(model_content=data, num_threads=1)
            self._interpreter.allocate_tensors()
        (entry,) = self._interpreter.get_input_details()
        self._input = entry["index"]
        self.size = int(entry["shape"][1])
        """Side in pixels of the square picture it takes."""
        self._outputs = {item["name"]: item["index"] for item in self._interpreter.get_output_details()}

    def __call__(self, picture: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs by tensor name, without the batch axis, of a picture (size, size, 3) float32 in the model's range."""
        self._interpreter.set_tensor(self._input, picture[None])
        self._interpreter.invoke()
        return {name: self._interpreter.get_tensor(index)[0] for name, index in self._outputs.items()}
