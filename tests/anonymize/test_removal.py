import cv2
import numpy as np
import pytest

from anonymize.cues import inpainted
from anonymize.people import People
from anonymize.removal import BLANK, remove


def people(removal, static_camera=True):
    return People((), removal, static_camera, None, None, None, {})


@pytest.fixture
def scene():
    rng = np.random.default_rng(0)
    return cv2.resize(rng.integers(0, 255, (12, 16, 3)).astype(np.uint8), (80, 60), interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def crossing():
    """A place that is removed while something crosses the picture, and a corner that is never free."""
    removal = np.zeros((30, 60, 80), bool)
    for t in range(30):
        removal[t, 20:50, 2 * t : 2 * t + 15] = True
    removal[:, :8, :8] = True
    removal[4] = True
    return removal


@pytest.mark.parametrize("static_camera", [True, False])
def test_removed_pixels_leave_no_trace(scene, crossing, static_camera):
    rng = np.random.default_rng(1)
    frames = np.repeat(scene[None], 30, 0) + rng.integers(0, 3, (30, 60, 80, 3)).astype(np.uint8)
    canary = np.where(crossing[..., None], rng.integers(0, 256, frames.shape), frames).astype(np.uint8)
    one, two = (remove(f, people(crossing, static_camera)) for f in (frames, canary))
    assert (one.frames == two.frames).all()
    assert (one.blanked == two.blanked).all()
    assert one.doubt == two.doubt


def test_the_scene_returns_where_it_was_seen(scene, crossing):
    frames = np.repeat(scene[None], 30, 0)
    frames[crossing] = 255
    result = remove(frames, people(crossing))
    kept = ~result.blanked
    error = np.abs(result.frames[kept].astype(int) - scene)
    error[:, :8, :8] = 0
    assert error.max() <= 1
    assert (result.frames[~crossing] == frames[~crossing]).all()


def test_the_filling_follows_the_light(scene, crossing):
    crossing[4] = False
    light = np.arange(30) // 2
    frames = (np.repeat((scene // 2 + 40)[None], 30, 0) + light[:, None, None, None]).astype(np.uint8)
    covered = np.where(crossing[..., None], 0, frames)
    error = np.abs(remove(covered, people(crossing)).frames.astype(int) - frames)
    error[:, :8, :8] = 0
    assert error.max() <= 3


def test_a_frame_removed_almost_whole_is_blanked_and_too_many_are_a_doubt(scene, crossing):
    result = remove(np.repeat(scene[None], 30, 0), people(crossing))
    assert result.blanked.tolist() == [t == 4 for t in range(30)]
    assert (result.frames[4] == BLANK).all()
    crossing[:10] = True
    assert "blanked" in remove(np.repeat(scene[None], 30, 0), people(crossing)).doubt


def test_inpainting_reads_nothing_inside_the_hole(scene):
    hole = np.zeros((60, 80), bool)
    hole[20:40, 30:50] = True
    other = scene.copy()
    other[hole] = 7
    assert (inpainted(scene, hole) == inpainted(other, hole)).all()
    assert (inpainted(scene, hole)[~hole] == scene[~hole]).all()
    assert (inpainted(scene, np.ones_like(hole)) == BLANK).all()
