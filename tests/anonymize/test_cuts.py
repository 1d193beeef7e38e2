import cv2
import numpy as np
import pytest

from anonymize.vision.cuts import cuts, shots
from anonymize.vision.video import Video


def picture(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return cv2.resize(rng.integers(0, 256, (9, 12, 3), np.uint8), (96, 72), interpolation=cv2.INTER_CUBIC)


def test_a_video_is_parted_at_its_cuts_and_nowhere_else():
    frames = np.stack([picture(0)] * 12 + [picture(1)] * 10 + [picture(2)] * 9)
    assert cuts(frames) == [12, 22]
    parts = list(shots(Video(frames, 25.0, np.arange(100, 131), start=4.0)))
    assert [len(part.frames) for part in parts] == [12, 10, 9]
    assert [part.numbers[0] for part in parts] == [100, 112, 122]
    assert [round(part.start, 2) for part in parts] == [4.0, 4.48, 4.88]
    assert np.array_equal(np.concatenate([part.frames for part in parts]), frames)


@pytest.mark.parametrize("kind", ["pan", "flash", "fade", "runner"])
def test_what_is_no_cut(kind):
    wide = np.concatenate([picture(seed) for seed in range(4)], axis=1)
    frames = np.stack([wide[:, 8 * t : 8 * t + 96] if kind == "pan" else picture(0) for t in range(30)])
    if kind == "flash":
        frames[14] = 255
    if kind == "fade":
        frames = (frames * np.linspace(1, 0.1, 30)[:, None, None, None]).astype(np.uint8)
    if kind == "runner":
        for t in range(30):
            frames[t, :, max(8 * t - 150, 0) : max(8 * t - 100, 0)] = 20
    assert cuts(frames) == []
