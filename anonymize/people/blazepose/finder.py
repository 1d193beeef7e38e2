"""Finding every person of a clip with BlazePose's models, motion and faces, joined.

The models are never the only eye: they were made for one person near the camera. What is removed is the union of their
outlines, of limbs drawn from landmarks, of whatever differs from the empty scene of a static camera, of bodies below
faces that no outline covers, and of what the embedded network sees beside; each is grown in space and held over
neighbouring frames. Only who was followed for a while and agreed upon gets an avatar.
"""

import dataclasses
import pathlib

import cv2
import numpy as np

from anonymize.people import FinderConfig, Landmarks, People, Person
from anonymize.people.blazepose import models, wheel
from anonymize.people.blazepose.detector import Detector
from anonymize.people.blazepose.faces import FaceDetector
from anonymize.people.blazepose.hands import HandFinder
from anonymize.people.blazepose.landmarks import COUNT, NAMES, Landmarker, Sighting
from anonymize.people.blazepose.smooth import one_euro
from anonymize.people.blazepose.tracks import BODY, Follower, Track
from anonymize.people.embedded import person_net
from anonymize.people.embedded.person_net import JOINTS
from anonymize.vision import cues
from anonymize.vision.masks import body_below, filled, grown, whole
from maskdp.config import positive
from maskdp.errors import UserError

LIMBS = tuple(
    (NAMES.index(a), NAMES.index(b))
    for a, b in (
        *((f"{s}_{a}", f"{s}_{b}") for s in ("left", "right") for a, b in (("shoulder", "elbow"), ("elbow", "wrist"))),
        *((f"{s}_{a}", f"{s}_{b}") for s in ("left", "right") for a, b in (("hip", "knee"), ("knee", "ankle"))),
        *(
            (f"{s}_{a}", f"{s}_{b}")
            for s in ("left", "right")
            for a, b in (("ankle", "foot_index"), ("wrist", "index"))
        ),
        *((f"{s}_shoulder", f"{s}_hip") for s in ("left", "right")),
        ("left_shoulder", "right_shoulder"),
        ("left_hip", "right_hip"),
    )
)
SHOULDERS, HIPS = ([NAMES.index(f"{s}_{joint}") for s in ("left", "right")] for joint in ("shoulder", "hip"))
ENDS = [NAMES.index(f"{s}_{joint}") for s in ("left", "right") for joint in ("wrist", "ankle")]
HEAD = range(11)  # landmarks of the face
LIMB, SKULL = 0.035, 0.06  # sides of the crop: thickness of a drawn limb, radius of a drawn head with its hair
GROWN = 0.012  # sides of the crop by which an outline grows, besides the margin
SEEN = 0.3  # visibility above which a landmark counts
LEAST_LIFE = 4  # frames; shorter tracks are false unless a person is seen there in the finished frames
LEAST_COVERED = 0.6  # fraction of a face that must be removed already; below it the person was missed
MOST_VISIBLE, LEAST_VISIBLE = 12, 0.75  # number of best seen landmarks, and the mean visibility they need
LEAST_SMALL = 0.0008  # part of the picture; smaller pieces that only the embedded network sees are ignored
MOST_SMALL = 0.2  # of the looks; a moving camera's clip with more of such people is in doubt
EDGE = 0.04  # of the short side; who reaches as near to the border of the picture may leave it
HOLD_FRAMES = 8  # frames at the ends of a clip in which a track may begin or end anywhere
BACKGROUND_SAMPLES = 30  # frames that the empty scene is made from, for motion
HOLD = 0.4  # seconds for which the last outline of a track stays removed
GAP = 1.5  # seconds; tracks no farther apart in time and near in space are one person
IMAGE_SMOOTHING = 3.0, 0.05  # Hz, and Hz a pixel a second at a crop of 256 pixels
WORLD_SMOOTHING = 3.0, 10.0  # Hz, and Hz a metre a second


@FinderConfig.register_subclass("blazepose")
@dataclasses.dataclass(frozen=True)
class BlazePoseConfig(FinderConfig):
    """Settings of `BlazePoseFinder`.

    Attributes:
        weights: folder of the models; empty: where `maskdp weights fetch blazepose` puts them.
        every: frames between two looks of the detectors.
        threshold: person probability above which a pixel is removed.
        margin: removal is grown by this part of the frame's short side.
        least_seconds: who is followed for less gets no avatar.
        least_presence: mean presence that a followed person needs for an avatar.
        max_people: more at once are a crowd, and not told apart with confidence.
        max_removed: mean part of the picture that may be removed.
    """

    weights: str = ""
    every: int = 8
    threshold: float = 0.2
    margin: float = 0.015
    least_seconds: float = 0.3
    least_presence: float = 0.75
    max_people: int = 6
    max_removed: float = 0.9

    def __post_init__(self):
        positive(self, "every", "threshold", "margin", "max_people", "max_removed")

    @property
    def folder(self) -> pathlib.Path:
        """Where the models are."""
        return pathlib.Path(self.weights) if self.weights else models.default_folder()

    def chosen(self) -> FinderConfig:
        if not wheel.complete(self.folder):
            raise UserError(f"{self.folder}: BlazePose's models are not here (maskdp weights fetch blazepose)")
        return self

    def pinned(self) -> FinderConfig:
        return dataclasses.replace(self, weights=wheel.SHA256)


class BlazePoseFinder:
    """Finds people with BlazePose's models, in clips of static and moving cameras."""

    def __init__(self, config: BlazePoseConfig = BlazePoseConfig()):
        self.config = config
        self._detect = Detector(config.folder)
        self._faces = FaceDetector(config.folder)
        self._follow = Follower(self._detect, Landmarker(config.folder), config.every)
        self._hands = HandFinder(config.folder)

    def find(self, frames: np.ndarray, fps: float) -> People:
        """Finds the people of a clip; see `People` for what comes back."""
        config, size = self.config, frames.shape[1:3]
        margin = config.margin * min(size)
        followed = self._follow(frames)
        people, others = self._chosen(followed.tracks, fps)
        removal = np.zeros(frames.shape[:3], bool)
        hold = round(HOLD * fps)
        for track in (*people, *others):
            self._cover(removal, track.sightings, margin, hold)
        self._cover_faces(removal, frames)
        moving = cues.camera_motion(frames)
        small = self._cover_small(removal, frames, margin, config.every if moving else 2 * config.every)
        background = known = None
        if not moving:
            background, known = cues.background_model(frames, removal, BACKGROUND_SAMPLES)
            light = cues.light_changes(frames, removal, background)
            moved = cues.foreground(frames, background, known, light)
            known &= ~cues.ghosts(frames, background, moved)
            moved &= known
            removal |= grown(moved, margin, down=margin)
            removal |= whole(~known, margin)
        persons = tuple(self._person(number, track, frames, fps) for number, track in enumerate(people))
        persons = _apart(persons)
        notes = {
            "removed": round(float(removal.mean()), 4),
            "tracks": len(followed.tracks),
            "small": round(small, 4),
            "camera": "moves" if moving else "static",
        }
        doubt = self._doubt(persons, notes)
        if moving and not doubt:
            doubt = self._lost(people, frames.shape)
        return People(persons, removal, not moving, background, known, doubt, notes)

    def _chosen(self, tracks: list[Track], fps: float) -> tuple[list[Track], list[Track]]:
        """Who gets an avatar, and the other tracks."""
        least = max(round(self.config.least_seconds * fps), 3)
        people, others = [], []
        for track in joined(tracks, round(GAP * fps)):
            presence = np.mean([seen.presence for seen in track.sightings.values()])
            seen = np.stack([seen.image[:COUNT, 3] * seen.image[:COUNT, 4] for seen in track.sightings.values()])
            visible = np.sort(seen, axis=1)[:, -MOST_VISIBLE:].mean()
            agreed = track.agreed >= max(2, 0.1 * track.looks)
            sure = len(track.sightings) >= least and presence >= self.config.least_presence and agreed
            sure = sure and visible >= LEAST_VISIBLE and not is_an_arm(track)
            if sure:
                people.append(track)
            elif len(track.sightings) >= LEAST_LIFE and presence > 0.6:
                others.append(track)
        return people, others

    def _cover(self, removal: np.ndarray, sightings: dict[int, Sighting], margin: float, hold: int) -> None:
        """Adds a person's outlines, limbs and head, grown; neighbouring frames and gaps are covered with them."""
        height, width = removal.shape[1:]
        times = sorted(sightings)
        before = None
        for t in times:
            seen = sightings[t]
            mask = (seen.mask(height, width) > 255 * self.config.threshold).astype(np.uint8)
            drawn(mask, seen)
            mask = cv2.dilate(mask, cues.disc(margin + GROWN * seen.crop.side)) > 0
            start = max(t - (hold if t == times[0] else 1), 0)
            removal[start : t + (hold if t == times[-1] else 1) + 1] |= mask
            if before is not None and t - before[0] > 2:
                removal[before[0] : t] |= _hull(before[1] | mask)
            before = t, mask

    def _cover_faces(self, removal: np.ndarray, frames: np.ndarray) -> None:
        """Adds the bodies below faces that are not covered yet."""
        height, width = removal.shape[1:]
        for t in np.unique([*range(0, len(frames), self.config.every), len(frames) - 1]):
            for face in self._faces(frames[t]):
                x0, y0, x1, y1 = face.box.round().astype(int).clip(0)
                if x0 < x1 and y0 < y1 and removal[t, y0:y1, x0:x1].mean() < LEAST_COVERED:
                    near = slice(max(t - self.config.every, 0), t + self.config.every + 1)
                    removal[near] |= filled((height, width), body_below(face.box[None]))

    def _cover_small(self, removal: np.ndarray, frames: np.ndarray, margin: float, every: int) -> float:
        """Adds what the embedded network sees beside everybody, as a rule people too small for the models; the part of
        the looks that showed such."""
        times = np.unique([*range(0, len(frames), every), len(frames) - 1])
        looks = 0
        for t in times:
            seen = person_net.pieces(frames[t], least=LEAST_SMALL)
            _, labels = cv2.connectedComponents(seen.astype(np.uint8))
            sizes = np.bincount(labels.ravel())
            outside = np.bincount(labels[~removal[t]], minlength=len(sizes)) > 0.5 * sizes
            outside[0] = False
            if outside.any():
                looks += 1
                removal[max(t - every, 0) : t + every + 1] |= cues.dilated(outside[labels], 2 * margin)
        return looks / len(times)

    def _lost(self, people: list[Track], shape: tuple[int, ...]) -> str | None:
        """Failure reason under a moving camera, where motion is no cue: a track that begins or ends within the
        picture although no other person is near who may hide it."""
        total, height, width = shape[:3]
        for track in people:
            for t, end in ((track.first, 0), (track.last, total - 1)):
                seen = track.sightings[t]
                low, high = seen.image[BODY, :2].min(0), seen.image[BODY, :2].max(0)
                edge = EDGE * min(height, width)
                leaves = (low < edge).any() or (high > np.array([width, height]) - edge).any()
                others = [o.sightings[t] for o in people if o is not track and t in o.sightings]
                hidden = any(np.linalg.norm(o.crop.centre - seen.crop.centre) < 0.4 * o.crop.side for o in others)
                if abs(t - end) > HOLD_FRAMES and not leaves and not hidden:
                    return f"a person is lost from view within the picture in frame {t}, and the camera moves"
        return None

    def _person(self, number: int, track: Track, frames: np.ndarray, fps: float) -> Person:
        total, height, width = shape = frames.shape[:3]
        present = np.zeros(total, bool)
        image = np.full((total, COUNT, 3), np.nan, np.float32)
        image[..., 2] = 0
        world = np.full((total, COUNT, 3), np.nan, np.float32)
        masks = np.zeros(shape, bool)
        boxes = np.full((total, 4), np.nan, np.float32)
        for run in _runs(sorted(track.sightings)):
            seen = [track.sightings[t] for t in run]
            side = np.median([one.crop.side for one in seen])
            cutoff, beta = IMAGE_SMOOTHING
            image[run, :, :2] = one_euro(np.stack([s.image[:COUNT, :2] for s in seen]), fps, cutoff, beta * 256 / side)
            image[run, :, 2] = [s.image[:COUNT, 3] * s.image[:COUNT, 4] for s in seen]
            world[run] = one_euro(np.stack([s.world[:COUNT] for s in seen]), fps, *WORLD_SMOOTHING)
            for t, sighting in zip(run, seen):
                masks[t] = sighting.mask(height, width) > 127
                boxes[t] = _box(masks[t], image[t], (width, height))
            present[run] = True
        landmarks = Landmarks(image, world, *self._hands(frames, image))
        return Person(number, present, boxes, masks, joints(image), landmarks=landmarks)

    def _doubt(self, persons: tuple[Person, ...], notes: dict) -> str | None:
        """Why these finds cannot be relied on, in one line, or None."""
        if not persons:
            return "no person found"
        most = int(sum(person.present.astype(int) for person in persons).max())
        if most > self.config.max_people:
            return f"{most} people at once, more than can be told apart"
        if notes["small"] > MOST_SMALL and notes["camera"] == "moves":
            return f"people too small to be followed in {notes['small']:.0%} of the looks, and the camera moves"
        if notes["removed"] > self.config.max_removed:
            return f"{notes['removed']:.0%} of the picture would be removed"
        return None


def joined(tracks: list[Track], gap: int) -> list[Track]:
    """Tracks that follow each other in time (at most `gap` frames later) and place made one."""
    out: list[Track] = []
    for track in sorted((track for track in tracks if track.sightings), key=lambda one: one.first):
        first = track.sightings[track.first].crop
        best = None
        for other in out:
            last = other.sightings[other.last].crop
            distance = np.linalg.norm(first.centre - last.centre) / max(first.side, last.side)
            ratio = max(first.side, last.side) / min(first.side, last.side)
            if 0 < track.first - other.last <= gap and distance < 0.4 and ratio < 1.8:
                best = min(best or (distance, other), (distance, other), key=lambda pair: pair[0])
        if best is None:
            out.append(track)
        else:
            best[1].sightings.update(track.sightings)
            best[1].looks += track.looks
            best[1].agreed += track.agreed
    return out


def is_an_arm(track: Track) -> bool:
    """Whether the model took something else for a body, as a rule the arm of a person whose head is out of view: hips
    above the shoulders in most frames, and neither hands nor feet."""
    seen = np.stack([sighting.image[:COUNT] for sighting in track.sightings.values()])
    upside_down = np.median(seen[:, HIPS, 1].mean(1) - seen[:, SHOULDERS, 1].mean(1)) < 0
    ends = (seen[:, ENDS, 3] * seen[:, ENDS, 4]).mean()
    return bool(upside_down and ends < SEEN)


def drawn(mask: np.ndarray, seen: Sighting) -> None:
    """Adds limbs and head to a mask (H, W) uint8, where their landmarks are visible."""
    points = seen.image[:COUNT, :2].round().astype(int)
    visible = seen.image[:COUNT, 3] * seen.image[:COUNT, 4] > SEEN
    thickness = max(round(LIMB * seen.crop.side), 1)
    for a, b in LIMBS:
        if visible[a] and visible[b]:
            cv2.line(mask, points[a].tolist(), points[b].tolist(), 1, thickness)
    head = [k for k in HEAD if visible[k]]
    if head:
        x, y = seen.image[head, :2].mean(0).round().astype(int).tolist()
        cv2.circle(mask, (x, y), max(round(SKULL * seen.crop.side), 1), 1, -1)


def joints(image: np.ndarray) -> np.ndarray:
    """Landmarks (T, 33, 3) as the joints (T, 14, 3) of `JOINTS`; the neck lies between the shoulders."""
    out = np.zeros((len(image), len(JOINTS), 3), np.float32)
    for k, name in enumerate(JOINTS):
        if name == "neck":
            shoulders = image[:, [NAMES.index("left_shoulder"), NAMES.index("right_shoulder")]]
            out[:, k, :2], out[:, k, 2] = shoulders[..., :2].mean(1), shoulders[..., 2].min(1)
        else:
            out[:, k] = image[:, NAMES.index(name)]
    return np.nan_to_num(out)


def _apart(persons: tuple[Person, ...]) -> tuple[Person, ...]:
    """Persons whose outlines share no pixel: what several claim goes to the one with the smaller outline, who is in
    front more often than not, since masks of a person behind grow into the one before."""
    for t in range(len(persons[0].present)) if len(persons) > 1 else ():
        here = sorted((p for p in persons if p.present[t]), key=lambda p: p.masks[t].sum())
        for k, person in enumerate(here):
            for other in here[:k]:
                person.masks[t] &= ~other.masks[t]
    return persons


def _box(mask: np.ndarray, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(4,) xyxy of the mask and the visible landmarks within the picture (width, height)."""
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    corners = [np.array([[x, y], [x + w, y + h]], np.float32)] if w else []
    points = image[image[:, 2] > SEEN, :2]
    points = np.concatenate([*corners, points if len(points) or corners else image[:, :2]]).clip(0, size)
    return np.concatenate([points.min(0), points.max(0)])


def _runs(times: list[int]) -> list[np.ndarray]:
    """Frame numbers split where one is missing."""
    times = np.array(times)
    return np.split(times, np.flatnonzero(np.diff(times) > 1) + 1)


def _hull(mask: np.ndarray) -> np.ndarray:
    points = cv2.findNonZero(mask.astype(np.uint8))
    if points is None:
        return mask
    return cv2.fillConvexPoly(np.zeros(mask.shape, np.uint8), cv2.convexHull(points), 1) > 0
