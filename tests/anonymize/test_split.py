"""Two people in one outline are told apart by their necks, where they stand side by side for long."""

import numpy as np
import pytest

from anonymize.people.embedded.split import halves, necks

H, W, FRAMES = 80, 100, 9


def body(x: int, width: int = 14) -> np.ndarray:
    mask = np.zeros((H, W), bool)
    mask[10:70, x - width // 2 : x + width // 2] = True
    return mask


def heat(*places: tuple[int, int], height: float = 0.8) -> np.ndarray:
    """A heat map at half the size with a Gaussian at each place (x, y in pixels)."""
    y, x = np.mgrid[: H // 2, : W // 2] + 0.5
    bumps = [np.exp(-((2 * x - px) ** 2 + (2 * y - py) ** 2) / (2 * 2.6**2)) for px, py in places]
    return height * np.max([*bumps, np.zeros((H // 2, W // 2))], 0)


def test_necks_are_found_on_the_outline_alone():
    both = body(40) | body(56)
    found = necks(heat((40, 20), (56, 22), (90, 20)), both)
    np.testing.assert_allclose(found[found[:, 0].argsort()], [[40, 20], [56, 22]], atol=1.5)
    assert len(necks(heat((40, 20), (56, 22)), body(40))) == 1
    assert len(necks(heat((40, 20), height=0.2), body(40))) == 0
    assert len(necks(heat((40, 20)), np.zeros((H, W), bool))) == 0


def test_one_neck_over_another_is_one_person():
    assert len(necks(heat((48, 20), (50, 44)), body(48))) == 1


@pytest.fixture
def pair():
    """Two who sway side by side, and their joint outline."""
    one = np.stack([body(40 + t % 3) for t in range(FRAMES)])
    two = np.stack([body(55 - t % 2) & ~one[t] for t in range(FRAMES)])
    return one, two


def looked(one: np.ndarray, two: np.ndarray, times: np.ndarray) -> list[np.ndarray]:
    places = ([(np.flatnonzero(mask[t].any(0)).mean(), 20) for mask in (one, two) if mask[t].any()] for t in times)
    return [np.array(p, float).reshape(-1, 2)[:: 1 if k % 2 else -1] for k, p in enumerate(places)]


def test_both_get_their_outline_in_every_frame(pair):
    one, two = pair
    times = np.array([0, 3, 6, 8])
    parts = halves(one | two, times, looked(one, two, times))
    assert len(parts) == 2
    parts.sort(key=lambda part: np.flatnonzero(part.any((0, 1))).mean())
    for part, truth in zip(parts, pair):
        assert ((part & truth).sum((1, 2)) / (part | truth).sum((1, 2))).min() > 0.8


def test_who_is_left_alone_is_one_person(pair):
    one, two = pair
    two[6:] = False
    times = np.array([0, 2, 4, 6, 8])
    parts = halves(one | two, times, looked(one, two, times))
    parts.sort(key=lambda part: np.flatnonzero(part.any((0, 1))).mean())
    np.testing.assert_array_equal(parts[0][6:], one[6:])
    assert not parts[1][6:].any()


def test_two_necks_seen_now_and_then_are_no_two_people(pair):
    one, two = pair
    times = np.arange(FRAMES)
    seen = [both if k % 3 == 0 else both[:1] for k, both in enumerate(looked(one, two, times))]
    assert len(halves(one | two, times, seen)) == 1
