import cv2
import numpy as np
import pytest

from anonymize.scene import stabilise

SIZE = (160, 120)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    cv2.setNumThreads(1)


@pytest.fixture(scope="module")
def plane():
    rng = np.random.default_rng(0)
    noise = (cv2.GaussianBlur(rng.normal(0, 40 * sigma, (320, 560, 3)), (0, 0), sigma) for sigma in (1.5, 8, 30))
    return (128 + sum(noise)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def pan(plane):
    """A camera that pans, rolls and zooms over the plane: frames, and their homographies into it."""
    rng = np.random.default_rng(1)
    frames, truth = [], []
    for t in range(30):
        roll, zoom = 0.05 * np.sin(t / 5), 1 + 0.15 * np.sin(t / 9)
        c, s = zoom * np.cos(roll), zoom * np.sin(roll)
        truth.append(np.array([[c, -s, 40 + 7.0 * t], [s, c, 60 + 5 * np.sin(t / 4)], [0, 1e-5 * t, 1]]))
        view = cv2.warpPerspective(plane, truth[-1], SIZE, flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP)
        frames.append((view + rng.normal(0, 2, view.shape)).round().clip(0, 255).astype(np.uint8))
    return np.stack(frames), np.stack(truth)


def crossing(total):
    busy = np.zeros((total, SIZE[1], SIZE[0]), bool)
    for t in range(total):
        busy[t, 20:110, 3 * t : 3 * t + 40] = True
    return busy


def everything(frames, busy):
    return list(stabilise.shots(np.where(busy[..., None], 0, frames), busy, np.ones(len(frames), bool)))


def test_the_chain_follows_a_pan_that_rolls_and_zooms(pan):
    frames, truth = pan
    (shot,) = everything(frames, crossing(30))
    assert shot.moves
    assert shot.times.tolist() == list(range(30))
    corners = np.float32([[[0, 0]], [[160, 0]], [[0, 120]], [[160, 120]]])
    first = truth[15] @ np.linalg.inv(shot.to_scene[15])  # from the scene to the plane, by the middle frame
    for mine, true in zip(shot.to_scene, truth):
        error = cv2.perspectiveTransform(corners, first @ mine) - cv2.perspectiveTransform(corners, true)
        assert np.abs(error).max() < 4  # pixels, at the far corners of a chain of 15
    outline = cv2.perspectiveTransform(np.tile(corners, (30, 1, 1)), shot.to_scene[0])
    assert (outline >= -1).all()


def test_a_cut_ends_a_shot_and_frames_that_may_not_be_used_are_in_none(pan, plane):
    frames, _ = pan
    other = np.stack([plane[180 + t : 300 + t, 390 - 3 * t : 550 - 3 * t][::-1] for t in range(10)])
    both = np.concatenate([frames[:10], other])
    busy = np.zeros(both.shape[:3], bool)
    assert [s.times.tolist() for s in stabilise.shots(both, busy, np.ones(20, bool))] == [
        [*range(10)],
        [*range(10, 20)],
    ]
    usable = np.arange(20) != 4
    assert [len(shot.times) for shot in stabilise.shots(both, busy, usable)] == [4, 5, 10]


def test_where_there_is_nothing_to_hold_on_to_no_motion_is_trusted(pan):
    frames, _ = pan
    plain = (np.full_like(frames[:3], 120) + np.random.default_rng(0).integers(0, 2, frames[:3].shape)).astype(np.uint8)
    assert [len(shot.times) for shot in everything(plain, np.zeros(plain.shape[:3], bool))] == [1, 1, 1]
    corner = plain.copy()  # what is known of a small place is not to be stretched over the picture
    corner[:, :35, :35] = frames[:3, :35, :35]
    assert [len(shot.times) for shot in everything(corner, np.zeros(corner.shape[:3], bool))] == [1, 1, 1]
    busy = np.ones((3, 120, 160), bool)
    busy[:, :30, :30] = False
    assert [len(shot.times) for shot in everything(frames[:3], busy)] == [1, 1, 1]


def test_where_most_of_the_picture_moves_its_own_way_no_motion_is_trusted(plane):
    """Four bands at four speeds, as at four depths: no homography holds for most of it."""
    places = [[(30 * band, 100 + speed * t) for band, speed in enumerate((7, -7, 3, -4))] for t in range(3)]
    frames = np.stack([np.vstack([plane[y : y + 30, x : x + 160] for y, x in bands]) for bands in places])
    assert [len(shot.times) for shot in everything(frames, np.zeros(frames.shape[:3], bool))] == [1, 1, 1]


def test_a_long_pan_becomes_several_shots_of_bounded_size(pan, monkeypatch):
    frames, _ = pan
    monkeypatch.setattr(stabilise, "LARGEST", 1.5)
    shots = everything(frames, np.zeros(frames.shape[:3], bool))
    assert len(shots) > 1
    assert np.concatenate([shot.times for shot in shots]).tolist() == list(range(30))
    assert all(np.prod(shot.scene_size) <= 1.5 * 160 * 120 for shot in shots)
