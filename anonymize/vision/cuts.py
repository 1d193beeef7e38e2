"""Cuts: the frames at which a video shows another shot. A clip never holds two."""

import dataclasses
import itertools
from collections.abc import Iterator

import cv2
import numpy as np

from anonymize.vision.video import Video

SMALL = 16, 12  # pixels; the size at which frames are compared
LEAST = 18.0  # grey levels, mean over the picture; a smaller change is no cut
OVER_USUAL = 3.0  # times the usual change of the frames around
AROUND = 6  # frames before and after that say what is usual
FLASH = 0.6  # of the change; if the frames before and after differ by less, it was a flash
SHORTEST = 8  # frames; shots that would be shorter are not parted from the next


def cuts(frames: np.ndarray) -> list[int]:
    """The frames (T, H, W, 3) uint8 with which another shot begins, ascending; the first frame is none."""
    small = np.stack([cv2.resize(frame, SMALL, interpolation=cv2.INTER_AREA) for frame in frames]).astype(np.int16)
    change = np.abs(np.diff(small, axis=0)).mean((1, 2, 3))
    found = []
    for t in np.flatnonzero(change > LEAST) + 1:
        around = np.delete(change[max(t - 1 - AROUND, 0) : t + AROUND], min(t - 1, AROUND))
        usual = np.median(around) if len(around) else 0.0
        across = [np.abs(small[s + 1] - small[s - 1]).mean() for s in (t - 1, t) if 0 < s < len(small) - 1]
        flash = min(across, default=np.inf) < FLASH * change[t - 1]
        far = t - (found[-1] if found else 0) >= SHORTEST and len(frames) - t >= SHORTEST
        if change[t - 1] > OVER_USUAL * usual and not flash and far:
            found.append(int(t))
    return found


def shots(video: Video) -> Iterator[Video]:
    """The parts of a video between its cuts."""
    starts = [0, *cuts(video.frames), len(video.frames)]
    for start, stop in itertools.pairwise(starts):
        part = slice(start, stop)
        seconds = video.start + start / video.fps
        yield dataclasses.replace(video, frames=video.frames[part], numbers=video.numbers[part], start=seconds)
