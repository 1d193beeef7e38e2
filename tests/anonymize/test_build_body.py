import numpy as np
import pytest

from anonymize.avatar.body import EMBEDDED, JOINTS

build_body = pytest.importorskip("anonymize.make.body", reason="needs the [body] extras", exc_type=ImportError)


@pytest.fixture(scope="module")
def figure():
    joints, named = build_body.skeleton()
    return joints, named, build_body.figure(joints, named)


def test_skeleton_is_symmetric(figure):
    joints, named, _ = figure
    left, right = [1, 4, 7, 10, 13, 16, 18, 20, 23, *range(25, 40)], [2, 5, 8, 11, 14, 17, 19, 21, 24, *range(40, 55)]
    np.testing.assert_allclose(joints[left] * build_body.MIRROR, joints[right], atol=1e-12)
    for name in named:
        if name[0] in "lL":
            twin = {"l": "r", "L": "R"}[name[0]] + name[1:]
            np.testing.assert_allclose(named[name] * build_body.MIRROR, named[twin], atol=1e-12)


def test_a_cone_measures_the_distance_to_its_surface():
    cone = build_body.Cone(np.array([0.0, 0, 0]), np.array([0.0, 2, 0]), 0.5, 0.5, 0)
    np.testing.assert_allclose(cone.distance(np.array([[3.0, 1, 0], [0, -2, 0], [0, 1, 0]])), [2.5, 1.5, -0.5])


def test_smooth_minimum_is_below_the_minimum_by_a_quarter_of_its_radius_at_most():
    a, b = np.random.default_rng(0).uniform(-1, 1, (2, 500))
    smooth = build_body._smooth_minimum(a, b, 0.3)
    low = np.minimum(a, b)
    assert (smooth <= low).all()
    assert (smooth >= low - 0.3 / 4 - 1e-12).all()
    np.testing.assert_array_equal(smooth[np.abs(a - b) > 0.3], low[np.abs(a - b) > 0.3])


def test_pruning_keeps_the_surface(figure):
    solid = figure[2]
    rng = np.random.default_rng(0)
    for centre in figure[0][[0, 15, 18, 28, 10]]:
        points = centre + rng.uniform(-0.02, 0.02, (200, 3))
        near = build_body.prune(solid, centre, np.sqrt(3) * 0.02 + 0.05)
        whole, part = solid.distance(points), near.distance(points)
        close = np.abs(whole) < 0.02
        np.testing.assert_allclose(part[close], whole[close], atol=1e-9)


def test_joints_lie_inside_the_figure(figure):
    joints, named, solid = figure
    assert (solid.distance(joints) < 0).all()
    assert np.abs(solid.distance(np.array(list(named.values())))).max() < 0.03


def test_stretching_is_undone():
    rng = np.random.default_rng(0)  # where the figure is: only the head and neck are above the shoulders
    boxes = (((-0.9, 0, -0.2), (0.9, 1.47, 0.2)), ((-0.1, 1.47, -0.15), (0.1, 1.75, 0.15)))
    points = np.concatenate([rng.uniform(*box, (2000, 3)) for box in boxes])
    there = build_body._stretch(points)
    np.testing.assert_allclose(build_body._stretch(there, back=True), points, atol=1e-6)
    assert np.abs(there - points).max() > 0.1


def test_landmarks_are_on_the_face():
    with np.load(EMBEDDED) as file:
        corners = file["v_template"][file["f"][file["lmk_faces_idx"]]]
        points = (corners * file["lmk_bary_coords"][..., None]).sum(1)
    points[:, 1] += build_body.ORIGIN_HEIGHT
    assert points.shape == (51, 3)
    assert points[:, 2].argmax() in range(10, 19)  # the nose is foremost
    np.testing.assert_allclose(points[19:25].mean(0)[:2], [-0.0315, 1.622], atol=1e-3)  # the right eye
    np.testing.assert_allclose(points[31:51].mean(0)[:2], [0, 1.55], atol=1e-3)  # the mouth


@pytest.mark.slow
def test_building_reproduces_the_embedded_model():
    arrays = build_body.build()
    with np.load(EMBEDDED) as file:
        assert set(file.files) == set(arrays)
        assert arrays["weights"].shape[1] == JOINTS
        for name, value in arrays.items():
            np.testing.assert_allclose(value.astype(float), file[name].astype(float), atol=1e-4, err_msg=name)
