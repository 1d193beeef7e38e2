"""People who were found already: masks and, where there are, poses from files instead of from a finder.

One folder a video, named as the input names the video, without the file's extension (docs/extending.md):

    masks/000000.png …   one picture a frame; the pixel values are the numbers of the people, 0 is nobody
    masks.json           instead: COCO RLE, a list `annotations` of people with `id` and `segmentations`, one a frame
    poses/3.npz          person 3 in AMASS's form: `poses` (T, 66 | 72 | 156 | 165) and `trans` (T, 3), NaN for no pose
    camera.json          what the poses were made for: `focal` in the video's pixels, `rotation`, `translation`

The body's shape (`betas`) is not read: an avatar's shape is the wardrobe's. Everything must have one entry a frame
that is decoded of the file (`video.sizes`; its header may count others) and the file's upright size.
"""

import dataclasses
import hashlib
import json
import pathlib
import zipfile

import cv2
import numpy as np
from PIL import Image

from anonymize import weights
from anonymize.avatar.camera import Camera
from anonymize.avatar.pose import Pose
from anonymize.people import FinderConfig, People, Person
from anonymize.vision import cues, video
from anonymize.vision.masks import grown
from maskdp.config import positive
from maskdp.errors import UserError

# Where AMASS-style rows hold what a `Pose` holds, by their width; hands are at rest where they are missing.
_BODY = {"global_orient": slice(0, 3), "body_pose": slice(3, 66)}
_LAYOUTS = {
    66: _BODY,
    72: _BODY,  # SMPL; its two hand joints are not ours
    156: {**_BODY, "left_hand_pose": slice(66, 111), "right_hand_pose": slice(111, 156)},  # SMPL-H
    165: {**_BODY, "jaw_pose": slice(66, 69), "left_hand_pose": slice(75, 120), "right_hand_pose": slice(120, 165)},
}


@FinderConfig.register_subclass("precomputed")
@dataclasses.dataclass(frozen=True)
class PrecomputedConfig(FinderConfig):
    """Settings of `Precomputed`.

    Attributes:
        folder: holds one folder a video.
        margin: removal is grown by this part of the frame's short side.
    """

    folder: str = ""
    margin: float = 0.02

    def __post_init__(self):
        positive(self, "margin")

    def chosen(self) -> FinderConfig:
        if not self.folder or not pathlib.Path(self.folder).is_dir():
            raise UserError(f"finder.folder: {self.folder!r} is no folder, expected one of masks and poses")
        return self

    def pinned(self) -> FinderConfig:
        return dataclasses.replace(self, folder="")  # what it holds is part of each video's own state: `digest`


class Precomputed:
    """The people of one video.

    Args:
        config: the settings.
        name: what the input calls the video.
        path: the video.

    Raises:
        UserError: a file is missing or unreadable, or its size, length or people are not the video's.
    """

    def __init__(self, config: PrecomputedConfig, name: str, path: pathlib.Path):
        self._margin = config.margin
        self.place = _place(config, name)
        sizes = video.sizes(path)
        if len(sizes) > 1:
            raise UserError(f"{path}: the pictures change their size, which masks of one size cannot follow")
        ((width, height), self._frames) = next(iter(sizes.items()))
        self._size = height, width
        self._pictures = sorted((self.place / "masks").glob("*.png"))
        rle = self.place / "masks.json"
        if bool(self._pictures) == rle.is_file():
            raise UserError(f"{self.place}: expected masks/*.png or masks.json, and not both")
        self._rle = None if self._pictures else _read_rle(rle)
        lengths = (
            {self.place / "masks": len(self._pictures)}
            if self._rle is None
            else {f"{rle}, person {person}": len(given) for person, given in self._rle.items()}
        )
        files = sorted((self.place / "poses").glob("*.npz"))
        self._poses = {file.stem: _read_poses(file) for file in files}
        lengths |= {file: len(self._poses[file.stem]) for file in files}
        for what, length in lengths.items():
            self._check_length(what, length)
        self._length = min(lengths.values(), default=0)
        self._numbers = self._all_numbers()
        for file in files:
            if file.stem not in map(str, self._numbers):
                raise UserError(f"{file}: poses of a person without masks, expected one of {self._numbers}")
        self._camera = _read_camera(self.place / "camera.json", self._size)

    def people(self, frames: np.ndarray, numbers: np.ndarray) -> People:
        """The people in consecutive frames (T, H, W, 3) uint8, whose numbers in the file are `numbers` (T,)."""
        if numbers[-1] >= self._length:
            raise UserError(f"{self.place}: ends after {self._length} frames, the video goes on")
        height, width = frames.shape[1:3]
        masks = {person: np.zeros(frames.shape[:3], bool) for person in self._numbers}
        any_part = np.zeros(frames.shape[:3], bool)
        for t, number in enumerate(numbers):
            for person, mask in self._masks(int(number)).items():
                part = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
                masks[person][t], any_part[t] = part >= 0.5, any_part[t] | (part > 0)
        margin = self._margin * min(height, width)
        removal = grown(any_part, margin, down=margin)
        persons = tuple(
            self._person(track, str(person), masks[person], numbers) for track, person in enumerate(self._numbers)
        )
        persons = tuple(person for person in persons if person.present.any())
        camera = self._camera and self._camera.scaled(width / self._size[1])
        camera = camera and dataclasses.replace(camera, width=width, height=height)
        notes = {"removed": round(float(removal.mean()), 4)}
        doubt = None if persons else "no person found"
        return People(persons, removal, not cues.camera_motion(frames), None, None, doubt, notes, camera=camera)

    def _person(self, track: int, name: str, mask: np.ndarray, numbers: np.ndarray) -> Person:
        present = mask.any((1, 2))
        boxes = np.full((len(mask), 4), np.nan, np.float32)
        for t in np.flatnonzero(present):
            x, y, w, h = cv2.boundingRect(mask[t].astype(np.uint8))
            boxes[t] = (x, y, x + w, y + h)
        pose = self._poses.get(name)
        chosen = pose and Pose(**{part: values[numbers] for part, values in pose.arrays().items()})
        return Person(track, present, boxes, mask, np.zeros((len(mask), 14, 3), np.float32), pose=chosen)

    def _check_length(self, what: object, length: int) -> None:
        if length != self._frames:
            raise UserError(f"{what}: {length} frames, expected the {self._frames} that are decoded of the video")

    def _all_numbers(self) -> list[int]:
        if self._rle is not None:
            return sorted(self._rle)
        return sorted({person for number in range(len(self._pictures)) for person in self._masks(number)})

    def _masks(self, number: int) -> dict[int, np.ndarray]:
        """Masks (H, W) bool of who is in one frame of the file."""
        if self._rle is not None:
            coded = {person: given[number] for person, given in self._rle.items() if given[number]}
            return {person: self._decoded(person, number, code) for person, code in coded.items()}
        file = self._pictures[number]
        try:
            with Image.open(file) as picture:
                if picture.mode not in ("1", "L", "P"):
                    raise UserError(f"{file}: a picture of mode {picture.mode}, expected grey or palette, 8 bits")
                values = np.asarray(picture).astype(np.uint8)
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{file}: not a readable PNG ({error})") from None
        self._check_size(file, values.shape)
        return {int(person): values == person for person in np.unique(values) if person}

    def _decoded(self, person: int, number: int, code: dict) -> np.ndarray:
        what = f"{self.place / 'masks.json'}, person {person}, frame {number}"
        try:
            mask = decode_rle(code)
        except (ValueError, TypeError, LookupError, OverflowError) as error:
            raise UserError(f"{what}: not a COCO RLE ({error})") from None
        self._check_size(what, mask.shape)
        return mask

    def _check_size(self, what: object, shape: tuple[int, ...]) -> None:
        if shape != self._size:
            raise UserError(f"{what}: {shape[1]}x{shape[0]} pixels, expected {self._size[1]}x{self._size[0]}")


def digest(config: PrecomputedConfig, name: str) -> str:
    """SHA-256 over what is given of a video, hex.

    Raises:
        UserError: there is no folder for it.
    """
    place = _place(config, name)
    files = sorted(file for file in place.rglob("*") if file.is_file())
    return hashlib.sha256(repr([(str(f.relative_to(place)), weights.sha256(f)) for f in files]).encode()).hexdigest()


def _place(config: PrecomputedConfig, name: str) -> pathlib.Path:
    root = pathlib.Path(config.folder).resolve()
    place = (root / name).with_suffix("").resolve()
    if not place.is_relative_to(root):
        raise UserError(f"{name}: lies outside of finder.folder, expected a name that leads to a folder in it")
    if not place.is_dir():
        raise UserError(f"{place}: no such folder, expected the masks of this video")
    return place


def _read_rle(file: pathlib.Path) -> dict[int, list]:
    """The RLEs (None: not there) of each person, one a frame."""
    try:
        annotations = json.loads(file.read_text())["annotations"]
        given = {int(annotation["id"]): list(annotation["segmentations"]) for annotation in annotations}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{file}: expected annotations with id and segmentations ({error})") from None
    if len(given) != len(annotations):
        raise UserError(f"{file}: an id occurs twice, expected one entry a person")
    return given


def decode_rle(code: dict) -> np.ndarray:
    """A COCO run-length encoding, {"size": [H, W], "counts": list or string}, as a mask (H, W) bool.

    Runs alternate from 0 and go down the columns. The string holds each run in digits of 5 bits (plus a bit for more to
    come, plus 48), the lowest first, in two's complement; from the fourth run on as the difference to the last but one.

    Raises:
        ValueError: the runs do not fill the mask.
    """
    height, width = (int(side) for side in code["size"])
    counts = code["counts"]
    if isinstance(counts, str):
        runs, value, shift = [], 0, 0
        for digit in (ord(letter) - 48 for letter in counts):
            value |= (digit & 31) << shift
            shift += 5
            if not digit & 32:
                value -= (digit & 16) << (shift - 4)
                runs.append(value + (runs[-2] if len(runs) > 2 else 0))
                value, shift = 0, 0
        counts = runs
    counts = np.asarray(counts, np.int64)
    if (counts < 0).any() or counts.sum() != height * width:
        raise ValueError(f"runs of {counts.sum()} pixels for a mask of {height * width}")
    return np.repeat(np.arange(len(counts)) % 2 > 0, counts).reshape(width, height).T


def _read_poses(file: pathlib.Path) -> Pose:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            poses, trans = (np.asarray(arrays[name], np.float32) for name in ("poses", "trans"))
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise UserError(f"{file}: expected an npz with poses and trans ({error})") from None
    if poses.ndim != 2 or poses.shape[1] not in _LAYOUTS or trans.shape != (len(poses), 3):
        raise UserError(f"{file}: poses {poses.shape}, trans {trans.shape}; expected (T, 66, 72, 156 or 165), (T, 3)")
    pose = Pose.rest(len(poses)).arrays()
    pose |= {part: poses[:, where] for part, where in _LAYOUTS[poses.shape[1]].items()}
    return Pose(**{**pose, "transl": trans})


def _read_camera(file: pathlib.Path, size: tuple[int, int]) -> Camera | None:
    if not file.exists():
        return None
    default = Camera.default(size[1], size[0])
    try:
        given = json.loads(file.read_text())
        camera = dataclasses.replace(
            default,
            focal=float(given["focal"]),
            rotation=np.asarray(given.get("rotation", default.rotation), float).reshape(3, 3),
            translation=np.asarray(given.get("translation", default.translation), float).reshape(3),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: expected focal, and where given rotation (3, 3), translation (3) ({error})") from None
    if not camera.focal > 0 or not np.allclose(camera.rotation @ camera.rotation.T, np.eye(3), atol=1e-3):
        raise UserError(f"{file}: expected a focal length above 0 and a rotation")
    return camera
