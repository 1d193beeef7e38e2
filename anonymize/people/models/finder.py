"""Finding people with real models: detector, tracker, keypoints and depth, joined.

The finder fails closed. Everything that the tracker outlines or the detector so much as suspects is removed; where the
two disagree about who is there, `People.doubt` says so, and the clip must be quarantined. The detector looks again at
the finished frames.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np
from scipy.ndimage import median_filter

from anonymize import weights
from anonymize.people import FinderConfig, People, Person
from anonymize.people.coverage import cover
from anonymize.vision import cues
from anonymize.vision.masks import filled, grown, iou
from maskdp.config import positive
from maskdp.errors import UserError

LEAST_AREA = 2e-4  # part of the picture; smaller outlines are removed, but they are nobody
DETECTOR_BATCH = 8  # frames

Detect = Callable[[np.ndarray, float], list[np.ndarray]]
Follow = Callable[[np.ndarray, int, np.ndarray], np.ndarray]
Joints = Callable[[np.ndarray, np.ndarray], np.ndarray]
Nearness = Callable[[np.ndarray], np.ndarray]


@FinderConfig.register_subclass("models")
@dataclasses.dataclass(frozen=True)
class ModelsConfig(FinderConfig):
    """Settings of `ModelFinder`.

    Attributes:
        weights: folder of the parts (`weights.PARTS`); empty: where `maskdp weights fetch` puts them.
        every: the detector looks at one frame in so many.
        threshold: detections of at least this score are removed.
        sure: detections of at least this score are people, and must be followed.
        margin: removal is grown by this part of the frame's short side.
        max_people: more are not told apart with confidence.
        max_removed: mean part of the picture that may be removed.
        max_alone: part of the looks in which the tracker may see somebody whom the detector does not.
        max_same: part of the frames in which two tracks may claim the same outline.
    """

    weights: str = ""
    every: int = 3
    threshold: float = 0.3
    sure: float = 0.5
    margin: float = 0.02
    max_people: int = 8
    max_removed: float = 0.7
    max_alone: float = 0.4
    max_same: float = 0.1

    def __post_init__(self):
        positive(self, "every", "threshold", "margin", "max_people", "max_removed")
        if not self.threshold <= self.sure < 1:
            raise UserError(f"finder.sure: {self.sure}, expected from finder.threshold = {self.threshold} to below 1")

    @property
    def folder(self) -> pathlib.Path:
        """Where the weights are."""
        return pathlib.Path(self.weights) if self.weights else weights.default_folder()

    def chosen(self) -> FinderConfig:
        weights.check(self.folder)
        return self

    def pinned(self) -> FinderConfig:
        return dataclasses.replace(self, weights=weights.check(self.folder))


class ModelFinder:
    """Joins what four models see.

    Args:
        config: the settings.
        detect, follow, joints, nearness: `Detector`, `Tracker`, `Keypoints` and `Depth`, or what does the same.
    """

    def __init__(self, config: ModelsConfig, detect: Detect, follow: Follow, joints: Joints, nearness: Nearness):
        self.config = config
        self._detect, self._follow, self._joints, self._nearness = detect, follow, joints, nearness

    @classmethod
    def load(cls, config: ModelsConfig) -> "ModelFinder":
        """With the models of `config.folder`.

        Raises:
            UserError: a part is missing, changed or of another kind.
        """
        from anonymize.people.models.depth import Depth
        from anonymize.people.models.detector import Detector
        from anonymize.people.models.keypoints import Keypoints
        from anonymize.people.models.tracker import Tracker

        return cls(config, *(part(config.folder) for part in (Detector, Tracker, Keypoints, Depth)))

    def find(self, frames: np.ndarray, fps: float) -> People:
        """Finds the people of a clip; see `People` for what comes back."""
        config = self.config
        margin = config.margin * min(frames.shape[1:3])
        seen = self._look(frames)
        logits = self._tracks(frames, seen)
        claims = logits > 0
        foremost = logits.argmax(0) if len(logits) else -1
        masks = claims & (foremost == np.arange(len(logits))[:, None, None, None])
        agreed, stray = _compare(seen, masks, config.sure)
        removal = grown(claims.any(0) | _boxes(seen, masks), margin, down=margin)
        persons = tuple(
            self._person(number, frames, mask, looks, margin)
            for number, (mask, looks) in enumerate(zip(masks, agreed))
            if mask.any()
        )
        for person in persons:
            cover(removal, person, margin)
        if len(persons) > 1:
            persons = self._ordered(persons, frames, sorted(seen))
        notes = {"removed": round(float(removal.mean()), 4), "looks": len(seen), **_figures(agreed, claims)}
        doubt = self._doubt(persons, stray, notes)
        moving = cues.camera_motion(frames)
        return People(persons, removal, not moving, None, None, doubt, notes, self.look)

    def _look(self, frames: np.ndarray) -> dict[int, np.ndarray]:
        """What the detector sees, (M, 5) boxes and scores, by frame; the first and the last frame are among them."""
        times = np.unique([*range(0, len(frames), self.config.every), len(frames) - 1])
        seen = {}
        for start in range(0, len(times), DETECTOR_BATCH):
            batch = times[start : start + DETECTOR_BATCH]
            seen.update(zip(map(int, batch), self._detect(frames[batch], self.config.threshold)))
        return seen

    def _tracks(self, frames: np.ndarray, seen: dict[int, np.ndarray]) -> np.ndarray:
        """Logits (P, T, H, W) of everybody: the tracker starts from the frame with most people not followed yet, until
        all are, or no start leads to an outline that fills its box."""
        logits = np.zeros((0, *frames.shape[:3]), np.float16)
        tried: set[int] = set()
        while len(logits) <= self.config.max_people:
            free = {}
            for t in seen.keys() - tried:
                free[t] = _unexplained(seen[t], logits[:, t] > 0, self.config.sure)
            start = max(sorted(free), key=lambda t: (len(free[t]), free[t][:, 4].sum()), default=None)
            if start is None or not len(free[start]):
                break
            tried.add(start)
            boxes = _distinct(free[start][:, :4])[: self.config.max_people + 1]
            logits = np.concatenate([logits, self._follow(frames, start, boxes)])
        return logits

    def _person(
        self, number: int, frames: np.ndarray, mask: np.ndarray, looks: dict[int, bool], margin: float
    ) -> Person:
        """One track with its joints. The outline is trusted where the look nearest in time agreed with it."""
        present = mask.mean((1, 2)) > LEAST_AREA
        boxes = np.full((len(mask), 4), np.nan, np.float32)
        for t in np.flatnonzero(present):
            boxes[t] = _box(mask[t])
        joints = np.zeros((len(mask), 14, 3), np.float32)
        if present.any():
            joints[present] = self._joints(frames[present], boxes[present])
        for t in np.flatnonzero(present):  # in a crowd the pose model may take a joint of somebody else
            x, y = joints[t, :, :2].astype(int).T
            inside = (x >= 0) & (y >= 0) & (x < mask.shape[2]) & (y < mask.shape[1])
            near = cues.dilated(mask[t], 2 * margin)
            inside[inside] = near[y[inside], x[inside]]
            joints[t, ~inside, 2] = 0
        times, trusted = np.array(sorted(looks)), np.zeros(len(mask), bool)
        if len(times):
            nearest = times[np.abs(np.arange(len(mask))[:, None] - times).argmin(1)]
            trusted = np.array([looks[t] for t in nearest]) & present
        return Person(number, present, boxes, mask & trusted[:, None, None], joints)

    def _ordered(self, persons: tuple[Person, ...], frames: np.ndarray, looks: list[int]) -> tuple[Person, ...]:
        """The persons with their nearness: the median of the depth model inside each outline, steady over time."""
        values = np.full((len(persons), len(looks)), np.nan, np.float32)
        for column, t in enumerate(looks):
            inside = [i for i, person in enumerate(persons) if person.masks[t].any()]
            if len(inside) > 1:
                near = self._nearness(frames[t])
                values[inside, column] = [np.median(near[persons[i].masks[t]]) for i in inside]
        out = []
        for person, row in zip(persons, values):
            known = np.flatnonzero(np.isfinite(row))
            nearness = np.full(len(frames), np.nan, np.float32)
            if len(known):
                steady = median_filter(row[known], 3, mode="nearest")
                nearness[:] = np.interp(np.arange(len(frames)), np.array(looks)[known], steady)
            out.append(dataclasses.replace(person, nearness=nearness))
        return tuple(out)

    def _doubt(self, persons: tuple[Person, ...], stray: int | None, notes: dict) -> str | None:
        """Why these finds cannot be relied on, in one line, or None."""
        config = self.config
        if stray is not None:
            return f"the detector sees somebody in frame {stray} whom the tracker does not follow"
        if not persons:
            return "no person found"
        if len(persons) > config.max_people:
            return f"{len(persons)} people, more than can be told apart"
        if notes["alone"] > config.max_alone:
            return f"the tracker follows somebody whom the detector does not see in {notes['alone']:.0%} of the looks"
        if notes["same"] > config.max_same:
            return "two tracks follow one person"
        if notes["removed"] > config.max_removed:
            return f"{notes['removed']:.0%} of the picture would be removed"
        return None

    def look(self, frame: np.ndarray, thorough: bool = True) -> dict[str, np.ndarray]:
        """Where the detector is sure of a person in a single frame, (H, W) bool; for the look at finished frames."""
        (people,) = self._detect(frame[None], self.config.threshold)
        return {"detector": filled(frame.shape[:2], people[people[:, 4] >= self.config.sure, :4])}


def _box(mask: np.ndarray) -> np.ndarray:
    """The box (4,) xyxy around a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def _agrees(mask: np.ndarray, box: np.ndarray) -> bool:
    """Whether an outline and a detection are one person: it lies in the box and spans a third of it at least.

    Somebody half hidden is outlined where seen and boxed as a whole, so overlap alone would be too strict.
    """
    x0, y0, x1, y1 = box[:4].round().astype(int).clip(0)
    inside = mask[y0:y1, x0:x1]
    if not inside.any() or inside.sum() < 0.8 * mask.sum():
        return False
    spans = _box(inside)
    return bool((spans[2] - spans[0]) * (spans[3] - spans[1]) > inside.size / 3)


def _spans(outlined: np.ndarray, box: np.ndarray) -> bool:
    """Whether what is outlined reaches from side to side of a detection, within a tenth: else a part may be missed."""
    x0, y0, x1, y1 = box[:4].round().astype(int).clip(0)
    inside = outlined[y0:y1, x0:x1]
    spans = _box(inside) if inside.any() else np.zeros(4)
    return bool((spans[2:] - spans[:2] >= 0.9 * np.array(inside.shape[::-1])).all())


def _unexplained(people: np.ndarray, masks: np.ndarray, sure: float) -> np.ndarray:
    """The sure detections (M, 5) of a frame that no outline (P, H, W) of it agrees with."""
    alone = [p[4] >= sure and not any(_agrees(mask, p) for mask in masks) for p in people]
    return people[np.array(alone, bool)]


def _distinct(boxes: np.ndarray) -> np.ndarray:
    """Boxes (M, 4), the surest first, without those that are nearly the same as a surer one."""
    kept: list[np.ndarray] = []
    for box in boxes:
        if all(iou(box, other) < 0.7 for other in kept):
            kept.append(box)
    return np.stack(kept)


def _compare(seen: dict[int, np.ndarray], masks: np.ndarray, sure: float) -> tuple[list[dict[int, bool]], int | None]:
    """For each track whether a detection agrees with its outline, at every look that has one; and the first look at
    which a sure detection agrees with no outline, or None."""
    agreed = [
        {t: any(_agrees(mask[t], person) for person in people) for t, people in seen.items() if mask[t].any()}
        for mask in masks
    ]
    stray = next((t for t, people in sorted(seen.items()) if len(_unexplained(people, masks[:, t], sure))), None)
    return agreed, stray


def _boxes(seen: dict[int, np.ndarray], masks: np.ndarray) -> np.ndarray:
    """(T, H, W) bool: whole boxes of detections that no outline agrees with or that all outlines together do not span,
    from the look before to the look after."""
    covered = np.zeros(masks.shape[1:], bool)
    looks = sorted(seen)
    for before, t, after in zip([0, *looks], looks, [*looks[1:], masks.shape[1] - 1]):
        loose = [p for p in seen[t] if not _spans(masks[:, t].any(0), p)]
        for box in (*_unexplained(seen[t], masks[:, t], 0.0), *loose):
            x0, y0 = np.floor(box[:2]).astype(int).clip(0)
            x1, y1 = np.ceil(box[2:4]).astype(int).clip(0)
            covered[before : after + 1, y0:y1, x0:x1] = True
    return covered


def _figures(agreed: list[dict[int, bool]], claims: np.ndarray) -> dict[str, float]:
    """`alone`: the largest part of a track's looks at which no detection agrees; `same`: the largest part of a track's
    frames in which another one claims the same."""
    alone = max((1 - float(np.mean(list(looks.values()))) for looks in agreed if looks), default=0.0)
    same = 0.0
    for a in range(len(claims)):
        for b in range(a):
            both, either = (claims[a] & claims[b]).sum((1, 2)), (claims[a] | claims[b]).sum((1, 2))
            frames = min(claims[a].any((1, 2)).sum(), claims[b].any((1, 2)).sum())
            same = max(same, float((both > 0.6 * np.maximum(either, 1)).sum() / max(frames, 1)))
    return {"alone": round(alone, 4), "same": round(same, 4)}
