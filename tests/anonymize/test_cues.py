import cv2
import numpy as np
import pytest

from anonymize.vision import cues


@pytest.fixture
def scene():
    rng = np.random.default_rng(0)
    return cv2.resize(rng.integers(0, 255, (40, 60, 3)).astype(np.uint8), (160, 120), interpolation=cv2.INTER_CUBIC)


def film(scene, total=24):
    """A noisy film of the scene with a bright block of 20 by 50 pixels that crosses it, and where the block is."""
    rng = np.random.default_rng(1)
    frames = np.repeat(scene[None], total, 0).astype(int) + rng.normal(0, 2, (total, 1, 1, 3)).round().astype(int)
    block = np.zeros(frames.shape[:3], bool)
    for t in range(total):
        block[t, 40:90, 6 * t : 6 * t + 20] = True
    frames[block] = 250
    return frames.clip(0, 255).astype(np.uint8), block


def test_a_static_camera_with_a_large_mover_passes(scene):
    assert cues.camera_motion(film(scene)[0]) is None


@pytest.mark.parametrize("step", [(3, 0), (0, 2), (-2, 1)])
def test_a_panning_camera_is_seen(scene, step):
    wide = np.tile(scene, (3, 3, 1))
    frames = np.stack([wide[y : y + 120, x : x + 160] for x, y in (100 + np.outer(np.arange(24), step))])
    assert cues.camera_motion(frames) is not None


def test_a_cut_is_seen(scene):
    assert cues.camera_motion(np.stack([scene] * 12 + [255 - scene[::-1]] * 12)) is not None


def test_background_is_the_median_over_free_samples(scene):
    frames, block = film(scene)
    busy = np.stack([cues.dilated(b, 1) for b in block])
    background, known = cues.background_model(frames, busy)
    assert known.all()
    assert np.abs(background.astype(int) - scene).max() <= 3


def test_background_never_reads_busy_pixels(scene):
    frames, block = film(scene)
    block[:, :10, :10] = True
    other = np.where(block[..., None], np.random.default_rng(2).integers(0, 255, frames.shape), frames).astype(np.uint8)
    for one, two in zip(cues.background_model(frames, block), cues.background_model(other, block)):
        assert (one == two).all()
    assert not cues.background_model(frames, block)[1][:10, :10].any()


def test_two_stable_values_are_not_a_background(scene):
    frames = np.repeat(scene[None], 30, 0)
    frames[:12, 40:60, 40:60] = 255 - scene[40:60, 40:60]  # somebody stood here for 40 % of the time, and was missed
    moved = (np.abs(frames[0].astype(int) - scene).max(-1) > 30)[40:60, 40:60]
    _, known = cues.background_model(frames, np.zeros(frames.shape[:3], bool))
    assert not known[40:60, 40:60][moved].any()
    assert known[:40].all()


def test_foreground_is_the_mover_under_changing_light(scene):
    frames, block = film(scene)
    busy = np.stack([cues.dilated(b, 1) for b in block])
    background, known = cues.background_model(frames, busy)
    light = cues.light_changes(frames, busy, background)
    found = cues.foreground(frames, background, known, light)
    differs = block & (np.abs(frames.astype(int) - scene).max(-1) > 40)
    assert found[differs].mean() > 0.99
    assert (found & ~np.stack([cues.dilated(b, 3) for b in block])).mean() < 1e-3


def test_who_left_is_a_ghost_and_who_came_is_not():
    rng = np.random.default_rng(3)
    scene = np.full((120, 160, 3), 120) + cv2.GaussianBlur(rng.normal(0, 20, (120, 160, 3)), (0, 0), 2)
    scene = scene.clip(0, 255).astype(np.uint8)
    there = scene.copy()
    there[30:90, 40:60] = 230
    moved = np.zeros((20, 120, 160), bool)
    moved[10:, 30:90, 40:60] = True
    left, came = np.stack([there] * 10 + [scene] * 10), np.stack([scene] * 10 + [there] * 10)
    assert cues.ghosts(left, there, moved)[30:90, 40:60].all()
    assert not cues.ghosts(came, scene, moved).any()


def test_largest_is_the_maximum_over_the_colours():
    values = np.random.default_rng(0).integers(-300, 300, (5, 7, 9, 3)).astype(np.int16)
    np.testing.assert_array_equal(cues.largest(values), values.max(-1))


@pytest.mark.parametrize("bars", [(0, 0, 0, 0), (12, 12, 0, 0), (0, 7, 20, 0)])
def test_bars_are_told_from_the_picture(scene, bars):
    above, below, left, right = bars
    frames = np.pad(film(scene)[0], ((0, 0), (above, below), (left, right), (0, 0)), constant_values=16)
    rows, columns = cues.lit_area(frames)
    assert (rows.start, rows.stop) == (above, above + 120)
    assert (columns.start, columns.stop) == (left, left + 160)


def test_a_dark_film_is_no_bar():
    assert cues.lit_area(np.zeros((5, 40, 60, 3), np.uint8)) == (slice(0, 40), slice(0, 60))


def test_small_holes_are_closed_and_large_ones_stay():
    mask = np.zeros((40, 40), bool)
    mask[2:38, 2:38] = True
    mask[5:8, 5:8] = mask[15:30, 15:30] = False
    closed = cues.without_holes(mask, 10)
    assert closed[5:8, 5:8].all()
    assert not closed[15:30, 15:30].any()
    assert not closed[:2].any()
    assert not mask[5:8, 5:8].any()
