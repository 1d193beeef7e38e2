import numpy as np
import pytest

from anonymize.people.embedded import joints, person_net

LEFT, RIGHT = (person_net.JOINTS.index(f"{side}_wrist") for side in ("left", "right"))
WHOLE = np.array([0, 0, 128, 96], np.float32)  # a picture of 96 rows and 128 columns; the maps have half of each


def bump(row, column, height=1.0):
    rows, columns = np.ogrid[:48, :64]
    return height * np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * 1.3**2))


def read(left, right, box=WHOLE):
    heat = np.zeros((len(person_net.JOINTS), 48, 64), np.float32)
    heat[LEFT], heat[RIGHT] = left, right
    found = joints.read(heat, box, (96, 128))
    return found[LEFT], found[RIGHT]


def test_each_joint_is_where_its_map_peaks():
    left, right = read(bump(10, 50, 0.9), bump(30, 8, 0.8))
    np.testing.assert_allclose(left, [101, 21, 0.9], atol=0.01)
    np.testing.assert_allclose(right, [17, 61, 0.8], atol=0.01)


def test_maps_that_cannot_tell_left_from_right_give_both_places():
    """Alone, each map would say the same place, the slightly higher one."""
    either = bump(10, 50, 0.5) + bump(30, 8, 0.45)
    found = read(either, either)
    assert sorted(tuple(joint[:2]) for joint in found) == [(17, 61), (101, 21)]
    assert min(joint[2] for joint in found) == pytest.approx(0.9, abs=0.01)


def test_a_slight_difference_tells_the_sides():
    here, there = bump(10, 50), bump(30, 8)
    left, right = read(0.5 * here + 0.4 * there, 0.42 * here + 0.45 * there)
    assert (left[:2], right[:2]) == (pytest.approx([101, 21]), pytest.approx([17, 61]))
    left, right = read(0.42 * here + 0.45 * there, 0.5 * here + 0.4 * there)
    assert (left[:2], right[:2]) == (pytest.approx([17, 61]), pytest.approx([101, 21]))


def test_joints_in_one_place_stay_there():
    left, right = read(bump(20, 30, 0.8), bump(20, 30, 0.8) + bump(40, 60, 0.1))
    assert tuple(left[:2]) == tuple(right[:2]) == (61, 41)


def test_nothing_outside_the_box_is_read():
    left, right = read(bump(10, 50), bump(30, 8, 0.6), np.array([0, 40, 60, 96], np.float32))
    assert (right[:2], right[2]) == (pytest.approx([17, 61]), pytest.approx(0.6, abs=0.01))
    assert left[0] < 60
    assert left[1] > 40
    assert left[2] < 0.1
