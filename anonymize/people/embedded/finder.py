"""Finding every person of a clip: the network, motion against a modelled background and HOG votes, joined.

The finder fails closed. With a static camera everything that differs from the empty scene is removed, whether or not it
looks like a person, and a place is shown only where the empty scene was seen; the network, HOG and a face detector
then look at what would be shown. Where they disagree or see somebody, `People.doubt` says why, and the clip must be
quarantined.
"""

import dataclasses

import cv2
import numpy as np

from anonymize.fitting.pose_library import EDGE
from anonymize.people import FinderConfig, People, Person
from anonymize.people.coverage import cover
from anonymize.people.embedded import joints, person_net, split
from anonymize.people.embedded.outline import sharpened
from anonymize.vision import cues
from anonymize.vision.masks import grown, iou, whole
from maskdp.config import positive

_BELOW = 0.45  # of their height: what may be missing below the outline of somebody who stays: all below the knees
SHINS = [k for k, name in enumerate(person_net.JOINTS) if name.endswith(("knee", "ankle"))]
_LEGS = 2  # of the height of what is seen of them: how much farther down somebody's feet may be
MOST_ENCLOSED = 0.02  # part of the picture; a smaller place that the removal encloses goes with it
FEW_JOINTS, LEAST_JOINTS = 4, 0.5  # so many joints of a person are seen with this mean confidence
LEAST_STIR = 0.05  # part of a person's outline that changes within a quarter of a second, on average


@FinderConfig.register_subclass("embedded")
@dataclasses.dataclass(frozen=True)
class EmbeddedConfig(FinderConfig):
    """Settings of `EmbeddedFinder`.

    Attributes:
        every: the network looks at one frame in so many.
        heights: pixels; the heights at which it looks (the second mirrored).
        threshold: person probability above which a pixel is removed.
        sure: person probability above which a pixel counts as seen for a track.
        margin: removal is grown by this part of the frame's short side.
        max_people: more are not told apart with confidence.
        max_removed: mean part of the picture that may be removed.
        max_elsewhere: mean part of the picture that may move away from any person.
        least_agreement: overlap (IoU) of what the network sees at its two heights.
        looks: frames in which HOG and the face detector look for people.
        least_peak: a joint whose heat map peaks lower is not believed.
    """

    every: int = 3
    heights: tuple[int, int] = (128, 192)
    threshold: float = 0.25
    sure: float = 0.5
    margin: float = 0.015
    max_people: int = 4
    max_removed: float = 0.55
    max_elsewhere: float = 0.02
    least_agreement: float = 0.3
    looks: int = 6
    least_peak: float = 0.3

    def __post_init__(self):
        positive(self, "every", "threshold", "sure", "margin", "max_people", "max_removed")


class EmbeddedFinder:
    """Finds people with nothing but the embedded network and OpenCV, in clips of a static camera."""

    def __init__(self, config: EmbeddedConfig = EmbeddedConfig()):
        self.config = config

    def find(self, frames: np.ndarray, fps: float) -> People:
        """Finds the people of a clip; see `People` for what comes back.

        A moving camera or a cut ends the search at once, with a doubt and everything marked for removal. Black bars
        beside the picture are left out of the search: their edge is the picture's, where a body is cut off.
        """
        rows, columns = cues.lit_area(frames)
        found = self._find(np.ascontiguousarray(frames[:, rows, columns]), fps)
        return _framed(found, frames.shape[1:3], rows, columns)

    def _find(self, frames: np.ndarray, fps: float) -> People:
        moving = cues.camera_motion(frames)
        if moving:
            return People((), np.ones(frames.shape[:3], bool), False, None, None, moving, {})
        config = self.config
        margin = config.margin * min(frames.shape[1:3])
        votes = self._votes(frames, margin)
        likely = votes.between(config.threshold)
        busy = grown(likely, margin)
        background, known = cues.background_model(frames, busy)
        light = cues.light_changes(frames, busy, background)
        moved = cues.foreground(frames, background, known, light)
        known &= ~cues.ghosts(frames, background, moved)
        moved &= known
        upright = {t: cues.hog_people(frames[t]) for t in cues.sample_times(len(frames), config.looks)}
        tracks, others = _tracks(votes, likely, moved, upright, cues.stirring(frames, fps), config, fps)
        removal = grown(likely | moved, margin, down=margin) | whole(~known, margin)
        everybody = np.any([track.masks for track in tracks], axis=0)
        for track in tracks:
            cover(removal, track, margin)
            track.outlined(sharpened(frames, track.masks, votes.at, everybody & ~track.masks))
            cover(removal, track, margin)
        same, still = ~moved, likely & ~moved
        for track in (*tracks, *others):
            removal |= _lasting(frames, track, same, still, margin)
        removal = np.stack([cues.without_holes(mask, MOST_ENCLOSED * mask.size) for mask in removal])
        background, known = cues.background_model(frames, removal)
        removal |= ~known | _left_behind(background, known, margin)
        background, known = cues.background_model(frames, removal)
        bodies = (_person(track, votes, config.least_peak) for track in tracks)
        bodies = (body for body in bodies if _is_a_body(body))
        persons = tuple(dataclasses.replace(body, track_id=number) for number, body in enumerate(bodies))
        notes = {
            "removed": round(float(removal.mean()), 4),
            "known": round(float(known.mean()), 4),
            "moved_elsewhere": round(float((moved & ~grown(likely, 4 * margin)).mean()), 4),
            "agreement": round(votes.agreement, 4),
        }
        doubt = self._doubt(frames, persons, upright, removal, notes)
        return People(persons, removal, True, background, known, doubt, notes)

    def _votes(self, frames: np.ndarray, margin: float) -> "_Votes":
        """Two rounds: a few frames against the temporal median, then more against the background those leave free."""
        net = person_net.load()
        first, second = self.config.heights
        few = cues.sample_times(len(frames), 10)
        median = np.median(frames[few], axis=0).astype(np.uint8)
        rough = np.stack([person_net.evaluate(net, frames[t], median, frames[max(t - 2, 0)], first)[0] for t in few])
        background, known = cues.background_model(frames[few], grown(rough > self.config.threshold, margin))
        background = np.where(known[..., None], background, median)
        times = cues.sample_times(len(frames), max(-(-len(frames) // self.config.every), 12))
        probability, heat, overlap, union = [], [], 0, 0
        for t in times:
            previous = frames[max(t - 2, 0)]
            near, coarse = person_net.evaluate(net, frames[t], background, previous, first)
            far, fine = person_net.evaluate(net, frames[t], background, previous, second, mirror=True)
            probability.append(((near + far) / 2).astype(np.float16))
            resized = (cv2.resize(values, coarse.shape[:0:-1], interpolation=cv2.INTER_AREA) for values in fine)
            heat.append((coarse + np.stack(list(resized))) / 2)
            overlap += ((near > 0.5) & (far > 0.5)).sum()
            union += ((near > 0.5) | (far > 0.5)).sum()
        return _Votes(len(frames), times, np.stack(probability), heat, float(overlap / max(union, 1)))

    def _doubt(
        self, frames: np.ndarray, persons: tuple[Person, ...], upright: dict, removal: np.ndarray, notes: dict
    ) -> str | None:
        """Why these finds cannot be relied on, in one line, or None."""
        config = self.config
        if not persons:
            return "no person found"
        most = int(sum(person.present.astype(int) for person in persons).max())
        if most > config.max_people:
            return f"{most} people at once, more than can be told apart"
        if notes["removed"] > config.max_removed:
            return f"{notes['removed']:.0%} of the picture would be removed"
        if notes["moved_elsewhere"] > config.max_elsewhere:
            return f"{notes['moved_elsewhere']:.1%} of the picture moves where no person was seen"
        if notes["agreement"] < config.least_agreement:
            return "the person network disagrees with itself between scales"
        for t, boxes in upright.items():
            for x0, y0, x1, y1 in np.concatenate([boxes, cues.faces(frames[t])]).round().astype(int).clip(0):
                if removal[t, y0:y1, x0:x1].mean() < 0.4:
                    return f"a person or face seen in frame {t} is not covered"
        return None


@dataclasses.dataclass(frozen=True)
class _Votes:
    """The network's person probability (n, H, W) float16 and joint heat maps at the n frames `times` of T."""

    total: int
    times: np.ndarray
    probability: np.ndarray
    heat: list[np.ndarray]
    agreement: float

    def neighbours(self, t: int) -> tuple[int, int, float]:
        """The samples before and after frame t, and how far t is from the first to the second."""
        after = int(np.searchsorted(self.times, t))
        before = max(after - 1, 0) if self.times[after] != t else after
        span = self.times[after] - self.times[before]
        return before, after, float((t - self.times[before]) / span) if span else 0.0

    def at(self, t: int) -> np.ndarray:
        """The probability at any frame, (H, W) float32, linear between the samples."""
        before, after, part = self.neighbours(t)
        return (1 - part) * self.probability[before].astype(np.float32) + part * self.probability[after]

    def between(self, threshold: float) -> np.ndarray:
        """(T, H, W) bool: above the threshold in the sample before or after."""
        above = self.probability > threshold
        pairs = [self.neighbours(t)[:2] for t in range(self.total)]
        return np.stack([above[before] | above[after] for before, after in pairs])


class _Track:
    """One person's boxes and outlines as they are gathered over time."""

    def __init__(self, shape: tuple[int, int, int]):
        self.present = np.zeros(shape[0], bool)
        self.boxes = np.full((shape[0], 4), np.nan, np.float32)
        self.masks = np.zeros(shape, bool)
        self.last = -1
        self._support: list[float] = []

    def add(self, t: int, mask: np.ndarray, box: np.ndarray, sure: np.ndarray) -> None:
        self.present[t], self.boxes[t], self.masks[t], self.last = True, box, mask, t
        self._support.append(float((mask & sure).sum() / mask.sum()))

    def is_person(self, upright: dict[int, np.ndarray], stirring: np.ndarray) -> bool:
        """Whether the network is sure of a good part of it over time, or a HOG box lies on it, and it is alive."""
        seen = any(self.present[t] and iou(box, self.boxes[t]) > 0.3 for t, boxes in upright.items() for box in boxes)
        alive = np.mean([stirring[t][self.masks[t]].mean() for t in np.flatnonzero(self.masks.any((1, 2)))])
        return alive > LEAST_STIR and (seen or float(np.mean(self._support)) > 0.15)

    def bridge(self) -> None:
        """Fills the frames between the first and the last with boxes interpolated in time and no outline."""
        seen = np.flatnonzero(self.present)
        inside = np.arange(seen[0], seen[-1] + 1)
        for side in range(4):
            self.boxes[inside, side] = np.interp(inside, seen, self.boxes[seen, side])
        self.present[inside] = True

    def outlined(self, masks: np.ndarray) -> None:
        """Takes other outlines, near the first ones; boxes grow to hold both."""
        self.masks = masks
        for t in np.flatnonzero(masks.any((1, 2))):
            box, sides = _box(masks[t]), self.boxes[t]
            self.boxes[t] = np.concatenate([np.minimum(box[:2], sides[:2]), np.maximum(box[2:], sides[2:])])

    def distrust_jumps(self) -> None:
        """Empties outlines whose area is far from the track's usual around that time (a running median)."""
        seen = np.flatnonzero(self.masks.any((1, 2)))
        area = self.masks[seen].sum((1, 2)).astype(float)
        for index, t in enumerate(seen):
            usual = np.median(area[max(index - 10, 0) : index + 11])
            if not 0.5 < area[index] / usual < 1.8:
                self.masks[t] = False


def _framed(people: People, size: tuple[int, int], rows: slice, columns: slice) -> People:
    """People found in a part of a picture of this size (H, W), in the whole; at its edges outlines go on as they are,
    since bodies do."""
    around = ((rows.start, size[0] - rows.stop), (columns.start, size[1] - columns.stop))
    if not np.any(around):
        return people

    def padded(values: np.ndarray | None, extra: tuple) -> np.ndarray | None:
        return None if values is None else np.pad(values, extra, mode="edge")

    corner = np.array([columns.start, rows.start], np.float32)
    persons = tuple(
        dataclasses.replace(
            person,
            boxes=person.boxes + np.tile(corner, 2),
            masks=padded(person.masks, ((0, 0), *around)),
            joints=person.joints + np.append(corner, np.float32(0)),
        )
        for person in people.persons
    )
    return dataclasses.replace(
        people,
        persons=persons,
        removal=padded(people.removal, ((0, 0), *around)),
        background=padded(people.background, (*around, (0, 0))),
        known=padded(people.known, around),
    )


def _tracks(
    votes: _Votes,
    likely: np.ndarray,
    moved: np.ndarray,
    upright: dict[int, np.ndarray],
    stirring: np.ndarray,
    config: EmbeddedConfig,
    fps: float,
) -> tuple[list[_Track], list[_Track]]:
    """Blobs of each frame joined over time; those that hold several people are parted (`split`) and joined again.

    A track is a person where it is alive, and the network is sure of a good part of it or HOG sees somebody there
    (`upright`: boxes by frame). The others come second: they are removed all the same, but get no avatar.
    """
    margin = config.margin * min(likely.shape[1:])
    gap, least = max(round(fps), 1), max(round(0.3 * fps), 2)
    seen = (votes.at(t) > config.sure for t in range(votes.total))
    near = (m & cues.dilated(maybe, margin) for m, maybe in zip(moved, likely))
    tracks = _linked([_blobs(sure | also, margin) for sure, also in zip(seen, near)], votes, config.sure, gap)
    parts = [part for track in tracks for part in _parted(track.masks, votes, config.max_people)]
    if len(parts) > len(tracks):
        blobs = [[(part[t], _box(part[t])) for part in parts if part[t].any()] for t in range(votes.total)]
        tracks = _linked(blobs, votes, config.sure, gap)
    people, others = [], []
    for track in tracks:
        if track.present.sum() >= least:
            (people if track.is_person(upright, stirring) else others).append(track)
    for track in people:
        track.bridge()
        track.distrust_jumps()
    return people, others


def _linked(blobs: list[list[tuple[np.ndarray, np.ndarray]]], votes: _Votes, sure: float, gap: int) -> list[_Track]:
    """Blobs (mask, box) of each frame joined by the overlap of their boxes, over gaps of at most so many frames."""
    tracks: list[_Track] = []
    for t, there in enumerate(blobs):
        certain = votes.at(t) > sure
        current = [track for track in tracks if t - track.last <= gap]
        pairs = [
            (iou(box, track.boxes[track.last]), k, b)
            for k, track in enumerate(current)
            for b, (_, box) in enumerate(there)
        ]
        free = set(range(len(there)))
        for overlap, k, b in sorted(pairs, reverse=True):
            if overlap > 0.1 and b in free and current[k].last < t:
                current[k].add(t, *there[b], certain)
                free.remove(b)
        for b in sorted(free):
            tracks.append(_Track((votes.total, *certain.shape)))
            tracks[-1].add(t, *there[b], certain)
    return tracks


def _parted(masks: np.ndarray, votes: _Votes, most: int) -> list[np.ndarray]:
    """The outlines (T, H, W) of the people, `most` at the most, who stand so close that a track holds all of them."""
    neck = person_net.JOINTS.index("neck")
    seen = [split.necks(heat[neck], masks[t]) for t, heat in zip(votes.times, votes.heat)]
    parts = split.halves(masks, votes.times, seen) if most > 1 else [masks]
    return parts if len(parts) == 1 else [piece for part in parts for piece in _parted(part, votes, most - 1)]


def _box(mask: np.ndarray) -> np.ndarray:
    """(4,) xyxy of a mask."""
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    return np.array([x, y, x + w, y + h], np.float32)


def _blobs(mask: np.ndarray, margin: float, least: float = 0.002) -> list[tuple[np.ndarray, np.ndarray]]:
    """Masks and boxes (xyxy) of a mask's pieces of at least this part of the picture; near pieces are one."""
    count, labels = cv2.connectedComponents(cues.dilated(mask, margin).astype(np.uint8))
    found = []
    for label in range(1, count):
        piece = (labels == label) & mask
        if piece.sum() > least * mask.size:
            found.append((piece, _box(piece)))
    return found


def _left_behind(background: np.ndarray, known: np.ndarray, margin: float) -> np.ndarray:
    """(H, W) bool: what still looks like a person in the empty scene, where it was seen; specks are left out."""
    scene = cues.inpainted(background, ~known)
    likely = (person_net.still_person(person_net.load(), scene) > 0.4) & known
    _, labels, stats, _ = cv2.connectedComponentsWithStats(likely.astype(np.uint8))
    large = stats[:, cv2.CC_STAT_AREA] > 0.002 * likely.size
    large[0] = False
    return cues.dilated(large[labels], 2 * margin)


def _lasting(
    frames: np.ndarray, track: _Track, same: np.ndarray, still: np.ndarray, margin: float, least: float = 0.01
) -> np.ndarray:
    """(H, W) bool: the whole of somebody large who stays where they are: nothing else was ever seen there, `same`
    (T, H, W) bool, be it because they were seen all the time, or because they were missed and taken for the scene.

    There motion does not correct the network, so GrabCut adds what continues the outline in colour, and what reaches
    near the lower edge of the picture is taken to reach it. Shins, feet and hems are what the network misses first, so
    a box of `_BELOW` of the person's height is added below, or down to where feet are `still` (T, H, W) seen, which
    may be those of the same person. Empty for those who leave their place.
    """
    height, width = same.shape[1:]
    whole, below = np.zeros((2, height, width), bool)
    times = np.flatnonzero(track.masks.any((1, 2)))
    for t in times[cues.sample_times(len(times), 3)] if len(times) else ():
        mask = track.masks[t]
        if (mask & same[t]).sum() < 0.4 * mask.sum() or mask.mean() < least:
            continue
        core = cv2.erode(mask.astype(np.uint8), cues.disc(2 * margin)) > 0
        near = cues.dilated(mask, 8 * margin)
        seed = np.select([core, mask, near], [0.95, 0.6, 0.3], 0.0).astype(np.float32)
        seed[~near & (np.arange(height)[:, None] > 0.85 * height) & near.any(0)] = 0.3
        whole |= cues.dilated(cues.grabcut(frames[t], seed), 2 * margin)
        rows = np.flatnonzero(mask.any(1))
        tall, low = np.ptp(rows), rows[-1]
        shins = _BELOW * tall
        columns = np.flatnonzero(mask[int(low - shins) :].any(0))
        left, right = int(max(columns[0] - 3 * margin, 0)), int(columns[-1] + 3 * margin) + 1
        feet = np.flatnonzero(still[:, low : low + round(_LEGS * tall), left:right].any((0, 2)))
        below[int(low - shins) : int(low + max([shins, *feet])) + 1, left:right] = True
    reach = whole & (np.arange(height)[:, None] > 0.8 * height)
    return whole | below | np.maximum.accumulate(reach, axis=0)


def _person(track: _Track, votes: _Votes, least_peak: float) -> Person:
    """The finished track with its joints: of no confidence are those below `least_peak`, and knees and ankles of who is
    cut off by the picture's lower edge, since the network likes to see them at the lower end of anybody."""
    found = np.zeros((len(track.present), len(person_net.JOINTS), 3), np.float32)
    for t in np.flatnonzero(track.present):
        before, after, part = votes.neighbours(t)
        found[t] = joints.read(votes.heat[after if part > 0.5 else before], track.boxes[t], track.masks.shape[1:])
    found[..., 2] *= found[..., 2] >= least_peak
    cut = track.boxes[:, 3] >= track.masks.shape[1] - EDGE
    found[np.ix_(cut, SHINS, [2])] = 0
    return Person(0, track.present, track.boxes, track.masks, found)


def _is_a_body(person: Person) -> bool:
    """Whether the network finds a few joints there, as in a part of a body; a moving shadow or bow has none. What is no
    body is removed all the same, but gets no avatar."""
    surest = np.sort(person.joints[person.present, :, 2])[:, -FEW_JOINTS:]
    return float(surest.mean()) > LEAST_JOINTS
