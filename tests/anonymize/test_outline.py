"""Outlines take in what has the person's colours and leave out what has the surroundings'."""

import numpy as np
import pytest

from anonymize.people.embedded.outline import sharpened

SIDE, FRAMES = 64, 6


@pytest.fixture
def scene():
    """A red person with two legs before a green wall, noisy, and their outline."""
    rng = np.random.default_rng(0)
    truth = np.zeros((FRAMES, SIDE, SIDE), bool)
    truth[:, 10:40, 24:40] = True
    truth[:, 40:60, 24:30] = truth[:, 40:60, 34:40] = True
    frames = np.where(truth[..., None], (180, 60, 50), (70, 150, 90)) + rng.normal(0, 8, (FRAMES, SIDE, SIDE, 3))
    return frames.clip(0, 255).astype(np.uint8), truth


def unsure(truth: np.ndarray, *, frames=slice(None), missed=(slice(40, 60), slice(34, 40)), halo=3) -> np.ndarray:
    """A network's probability: too wide by `halo` columns, and not sure of one leg."""
    likely = np.where(truth, 0.95, 0.02).astype(np.float32)
    for shift in range(1, halo + 1):
        for side in (-shift, shift):
            likely = np.maximum(likely, np.where(np.roll(truth, side, 2), 0.6, 0).astype(np.float32))
    likely[(frames, *missed)] = 0.2
    return likely


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def test_a_limb_of_the_persons_colour_is_found_and_a_halo_of_the_walls_is_dropped(scene):
    frames, truth = scene
    likely = unsure(truth)
    first = likely > 0.5
    out = sharpened(frames, first, likely.__getitem__, np.zeros_like(first))
    assert overlap(first, truth) < 0.75
    assert overlap(out, truth) > 0.97


def test_nobody_else_is_taken_in(scene):
    """Someone in the same clothes, right beside, is another person's outline."""
    frames, truth = scene
    frames[:, 10:40, 44:56] = frames[:, 10:40, 26:38]
    likely = unsure(truth)
    likely[:, 10:40, 44:56] = 0.95
    others = np.zeros_like(truth)
    others[:, 10:40, 44:56] = True
    out = sharpened(frames, (likely > 0.5) & ~others, likely.__getitem__, others)
    assert not (out & others).any()


def test_frames_without_an_outline_stay_without(scene):
    frames, truth = scene
    likely = unsure(truth)
    first = likely > 0.5
    first[2] = False
    out = sharpened(frames, first, likely.__getitem__, np.zeros_like(first))
    assert not out[2].any()
    assert out[[0, 1, 3, 4, 5]].any((1, 2)).all()
    nobody = np.zeros_like(first)
    assert not sharpened(frames, nobody, likely.__getitem__, nobody).any()


def test_colours_that_both_have_leave_the_network_its_say(scene):
    """Grey on grey: the outline is the network's."""
    frames, truth = scene
    likely = unsure(truth)
    out = sharpened(np.full_like(frames, 128), likely > 0.5, likely.__getitem__, np.zeros_like(truth))
    assert overlap(out, likely > 0.5) > 0.97
