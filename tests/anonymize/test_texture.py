"""Holes filled from around them: identities of the two methods, and that nothing inside a hole is read."""

import cv2
import numpy as np
import pytest

from anonymize.scene import texture
from anonymize.vision import cues


@pytest.fixture(autouse=True)
def one_thread():
    cv2.setNumThreads(1)


@pytest.fixture(scope="module")
def hole():
    return cv2.ellipse(np.zeros((96, 128), np.uint8), (64, 50), (16, 30), 10, 0, 360, 1, -1) > 0


@pytest.fixture(scope="module")
def cloth():
    """Noise that repeats every 16 pixels along both sides."""
    tile = np.random.default_rng(0).integers(40, 216, (16, 16, 3))
    return np.tile(tile, (6, 8, 1)).astype(np.uint8)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def test_a_linear_ramp_is_continued_exactly(hole):
    """It is harmonic; Telea's method leaves streaks in it."""
    y, x = np.indices(hole.shape)
    ramp = np.stack([40 + x, 60 + y, 200 - x / 2 - y / 2], -1)
    assert np.abs(texture.harmonic(np.where(hole[..., None], 0, ramp), ~hole) - ramp).max() < 1e-6
    picture = ramp.round().astype(np.uint8)
    assert np.abs(texture.filled(picture, hole).astype(int) - picture).max() <= 1
    assert np.abs(cues.inpainted(picture, hole).astype(int) - picture).max() > 2


def test_a_texture_is_continued(cloth, hole):
    filled = texture.filled(cloth, hole)
    assert psnr(filled[hole], cloth[hole]) > psnr(cues.inpainted(cloth, hole)[hole], cloth[hole]) + 6
    assert filled[hole].std() > 0.8 * cloth[hole].std()


@pytest.mark.parametrize("kind", ["texture", "ramp"])
def test_nothing_inside_the_hole_is_read_and_nothing_outside_it_changes(cloth, hole, kind):
    picture = cloth if kind == "texture" else np.tile(np.arange(128, dtype=np.uint8)[:, None], (96, 1, 3))
    noise = picture.copy()
    noise[hole] = np.random.default_rng(1).integers(0, 256, noise[hole].shape)
    filled = texture.filled(picture, hole)
    assert texture.filled(noise, hole).tobytes() == filled.tobytes()
    assert np.array_equal(filled[~hole], picture[~hole])


def test_the_same_bytes_whatever_was_drawn_before(cloth, hole):
    filled = texture.filled(cloth, hole)
    cv2.setRNGSeed(77)
    cv2.randu(np.zeros((5, 5)), 0, 1)
    assert texture.filled(cloth, hole).tobytes() == filled.tobytes()


def test_a_large_hole_is_not_filled_with_furniture(cloth):
    hole = np.zeros(cloth.shape[:2], bool)
    hole[:, 20:100] = True
    filled = texture.filled(cloth, hole)
    assert np.array_equal(filled, texture.harmonic(cloth, ~hole).round())
    assert np.array_equal(texture.filled(cloth, np.ones_like(hole)), np.full_like(cloth, cues.GREY))


def test_a_different_light_at_the_rim_is_levelled(hole):
    """Copies from a bright part of a plain wall, laid into a dark part, leave no outline."""
    clean = np.full((*hole.shape, 3), 100, np.uint8)
    levelled = texture._levelled(clean, hole, clean + 15)
    assert np.abs(levelled[hole].astype(int) - 100).max() <= 2
    edge = texture._levelled(clean, hole, clean + 120)  # an edge of the scene stays one
    assert np.array_equal(edge[hole], (clean + 120)[hole])


@pytest.mark.parametrize("shape", [(1, 1), (2, 40), (40, 2), (9, 9)])
def test_any_hole_in_any_picture_is_filled(shape):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (*shape, 3), np.uint8)
    for share in (0.0, 0.1, 0.5, 1.0):
        hole = rng.uniform(size=shape) < share
        filled = texture.filled(picture, hole)
        assert np.array_equal(filled[~hole], picture[~hole])
        assert filled.shape == picture.shape
