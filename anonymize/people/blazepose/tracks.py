"""Following people through a clip: landmarks from frame to frame, the detector now and then for who is new or lost.

A person is followed by the crop that the landmarks of the last frame give. At key frames the detector looks at the
whole picture and at tiles; whom no track explains is followed from there in both directions of time, so that a track
starts where the person comes into view and not where the detector first saw them.
"""

import dataclasses

import numpy as np

from anonymize.people.blazepose.crops import Crop
from anonymize.people.blazepose.detector import Detection, Detector, tiles
from anonymize.people.blazepose.landmarks import NAMES, Landmarker, Sighting
from anonymize.vision import cues

PRESENT = 0.5  # presence; below it a person is lost
TRUNK = [NAMES.index(f"{side}_{joint}") for side in ("left", "right") for joint in ("shoulder", "hip")]
BODY = [0, *TRUNK, *(NAMES.index(f"{s}_{j}") for s in ("left", "right") for j in ("elbow", "wrist", "knee", "ankle"))]
SAME = 0.08  # mean distance of body landmarks over the crop's side; two sightings that are closer show one person
SAME_OUTLINE = 0.65, 1.7, 2  # part of the smaller outline in the other, ratio of sides, frames: one person as well
SAME_CROP = 0.2, 1.7  # distance of the centres over the side, ratio of the sides: a detection of a followed person
JUMP = 0.5, 1.8  # the same between neighbouring frames: more is another person or none
LARGEST_CROP = 5  # in short sides of the picture; a person of whom less is in view cannot be followed
CHANGED = 20  # grey levels; a tile in which no place differs more from what was looked at shows what it showed then


class Track:
    """One person: the sightings by frame, and how often the detector looked and agreed."""

    def __init__(self):
        self.sightings: dict[int, Sighting] = {}
        self.looks = self.agreed = 0
        self.lost = False
        self.outlines: dict[int, np.ndarray] = {}

    @property
    def first(self) -> int:
        return min(self.sightings)

    @property
    def last(self) -> int:
        return max(self.sightings)

    def outline(self, t: int, height: int, width: int) -> np.ndarray:
        """The outline in frame t, (h, w) bool at a quarter of the picture's size."""
        if t not in self.outlines:
            seen = self.sightings[t]
            small = dataclasses.replace(seen, crop=Crop(seen.crop.centre / 4, seen.crop.side / 4, seen.crop.angle))
            self.outlines[t] = small.mask(-(-height // 4), -(-width // 4)) > 127
        return self.outlines[t]

    @property
    def trust(self) -> float:
        """How often the detector agreed, smoothed, so that who was seen for long is trusted more."""
        return (self.agreed + 0.5) / (self.looks + 1) * min(len(self.sightings), 30)

    def jump(self, t: int, step: int) -> float:
        """How far the sighting at t lies from where the two before it (in the direction `step`) point, in sides."""
        before = [self.sightings[s].crop.centre for s in (t - step, t - 2 * step) if s in self.sightings]
        if not before:
            return np.inf
        expected = 2 * before[0] - before[1] if len(before) == 2 else before[0]
        here = self.sightings[t].crop
        return float(np.linalg.norm(here.centre - expected)) / here.side


@dataclasses.dataclass
class Followed:
    """What was found in a clip.

    Attributes:
        tracks: everybody who was followed.
        unsure: by frame, what the detector took for a person and the landmark model did not.
    """

    tracks: list[Track]
    unsure: dict[int, list[Sighting]]


class Follower:
    """Follows the people of a clip.

    Args:
        detect, look: the models.
        every: frames between two looks of the detector.
        small: looks at the large tiles for each look at the small ones.
        most: tracks at a time; more are not followed.
    """

    def __init__(self, detect: Detector, look: Landmarker, every: int = 8, small: int = 3, most: int = 10):
        self._detect, self._look = detect, look
        self._every, self._small, self._most = every, small, most
        self._together: dict[tuple[int, int], int] = {}

    def __call__(self, frames: np.ndarray) -> Followed:
        """Everybody in frames (T, H, W, 3) uint8."""
        tracks: list[Track] = []
        unsure: dict[int, list[Sighting]] = {}
        scan = _Scan(self._detect, *frames.shape[1:3])
        self._together.clear()
        for t, frame in enumerate(frames):
            for track in tracks:
                if not track.lost:
                    track.lost = not self._step(track, frame, t, 1)
            self._part(tracks, t, frame.shape[:2])
            key, index = t % self._every == 0 or t == len(frames) - 1, t // self._every
            lost = any(track.lost and track.last == t - 1 for track in tracks)
            if not key and not lost:
                continue
            found = scan(frame, small=key and index % self._small == 0)
            self._explain(frames, t, found, tracks, unsure)
        return Followed(tracks, unsure)

    def _step(self, track: Track, frame: np.ndarray, t: int, step: int) -> bool:
        """Follows one person into frame t; whether they are still seen."""
        before = track.sightings[t - step]
        crop = before.next_crop
        if not _plausible(crop, frame) or _moved(before.crop, crop, *JUMP):
            return False
        seen = self._look(frame, crop)
        if seen.presence < PRESENT or not _plausible(seen.next_crop, frame):
            return False
        track.sightings[t] = seen
        return True

    def _part(self, tracks: list[Track], t: int, size: tuple[int, int]) -> None:
        """Of tracks that follow one and the same person, leaves one: where their landmarks coincide, the one whose way
        there is the steadier; where their outlines do for long, the one that the detector agrees with."""
        here = [track for track in tracks if t in track.sightings and not track.lost]
        for k, track in enumerate(here):
            for other in here[:k]:
                if track.lost or other.lost:
                    continue
                if apart(track.sightings[t], other.sightings[t]) < SAME:
                    worse = max((track, other), key=lambda one: one.jump(t, 1))
                    del worse.sightings[t]
                    worse.lost = True
                    continue
                pair = id(other), id(track)
                inside = self._same_outline(track, other, t, size)
                self._together[pair] = self._together.get(pair, 0) + 1 if inside else 0
                if self._together[pair] > SAME_OUTLINE[2]:
                    min((track, other), key=lambda one: one.trust).lost = True

    def _same_outline(self, track: Track, other: Track, t: int, size: tuple[int, int]) -> bool:
        mine, theirs = track.outline(t, *size), other.outline(t, *size)
        part, ratio, _ = SAME_OUTLINE
        sides = track.sightings[t].crop.side / other.sightings[t].crop.side
        inside = (mine & theirs).sum() > part * max(min(mine.sum(), theirs.sum()), 1)
        return bool(inside and 1 / ratio < sides < ratio)

    def _explain(self, frames, t: int, found: list[Detection], tracks: list[Track], unsure) -> None:
        """Counts the detections that tracks explain, and follows the people of the others."""
        current = [track for track in tracks if t in track.sightings]
        for track in current:
            track.looks += 1
        agreed = set()
        for item in found:
            known = [track for track in current if _agrees(item.crop, track.sightings[t])]
            if known or not _plausible(item.crop, frames[t]):
                agreed.update(map(id, known))
                continue
            seen = self._look(frames[t], item.crop)
            if seen.presence >= PRESENT and _plausible(seen.next_crop, frames[t]):
                again = self._look(frames[t], seen.next_crop)
                seen = again if again.presence >= PRESENT else seen
            new = Track()
            new.sightings[t] = seen
            size = frames.shape[1:3]
            known = [track for track in current if apart(seen, track.sightings[t]) < SAME]
            known += [track for track in current if self._same_outline(new, track, t, size)]
            if known:
                agreed.update(map(id, known))
            elif seen.presence < PRESENT or len(current) >= self._most:
                unsure.setdefault(t, []).append(seen)
            else:
                track = self._trace_back(frames, t, new, tracks)
                track.looks += 1
                current.append(track)
                agreed.add(id(track))
        for track in current:
            track.agreed += id(track) in agreed

    def _trace_back(self, frames: np.ndarray, t: int, track: Track, tracks: list[Track]) -> Track:
        """The track of a person first seen at t, followed back to where they come into view or meet a lost track, which
        then is theirs."""
        for s in range(t - 1, -1, -1):
            if not self._step(track, frames[s], s, -1):
                break
            met = [o for o in tracks if s in o.sightings and apart(o.sightings[s], track.sightings[s]) < SAME]
            if met:
                del track.sightings[s]
                if met[0].lost and met[0].last <= s + 1 and t not in met[0].sightings:
                    met[0].sightings.update(track.sightings)
                    met[0].lost = False
                    return met[0]
                break
        tracks.append(track)
        return track


class _Scan:
    """The detector over a picture and its tiles; tiles that did not change since they were looked at are left out."""

    def __init__(self, detect: Detector, height: int, width: int):
        self._detect = detect
        whole, *rest = tiles(height, width)
        large = min(height, width)
        self._large = [whole, *(tile for tile in rest if tile[0].stop - tile[0].start == large)]
        self._small = [tile for tile in rest if tile[0].stop - tile[0].start != large]
        self._before: dict[int, tuple[np.ndarray, list[Detection]]] = {}

    def __call__(self, frame: np.ndarray, small: bool) -> list[Detection]:
        found = []
        for number, (rows, columns) in enumerate(self._large + self._small if small else self._large):
            tile = frame[rows, columns]
            before = self._before.get(number)
            if before is None or cues.changed(before[0], tile, CHANGED):
                corner = np.array([columns.start, rows.start], np.float32)
                seen = [
                    dataclasses.replace(item, box=item.box + np.tile(corner, 2), points=item.points + corner)
                    for item in self._detect(tile)
                ]
                before = self._before[number] = tile, seen
            found += before[1]
        return sorted(found, key=lambda item: -item.score)


def apart(one: Sighting, other: Sighting) -> float:
    """Mean distance of the body's landmarks, in sides of the larger crop."""
    distance = np.linalg.norm(one.image[BODY, :2] - other.image[BODY, :2], axis=1).mean()
    return float(distance) / max(one.crop.side, other.crop.side)


def _agrees(crop: Crop, seen: Sighting) -> bool:
    return not _moved(seen.next_crop, crop, *SAME_CROP)


def _moved(crop: Crop, other: Crop, distance: float, ratio: float) -> bool:
    sides = crop.side / max(other.side, 1e-6)
    far = np.linalg.norm(crop.centre - other.centre) > distance * max(crop.side, other.side)
    return bool(far or not 1 / ratio < sides < ratio)


def _plausible(crop: Crop, frame: np.ndarray) -> bool:
    """Whether a crop is of a size, and near enough to the picture, to hold a person."""
    height, width = frame.shape[:2]
    x, y = crop.centre
    reach = 0.5 * crop.side
    inside = -reach < x < width + reach and -reach < y < height + reach
    return bool(inside and 8 < crop.side < LARGEST_CROP * min(height, width))
