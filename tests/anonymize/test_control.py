import dataclasses

import numpy as np
import pytest
import torch

from anonymize.avatar.body import Body
from anonymize.avatar.camera import Camera
from anonymize.avatar.pose import Pose
from anonymize.avatar.render import Mesh, render
from anonymize.fitting.fit import Fit
from anonymize.refine import control

CAMERA = Camera.default(160, 160)


@pytest.fixture(scope="module")
def body():
    torch.set_num_threads(1)
    return Body()


def standing(turned: float) -> Fit:
    """Somebody who stands 3 m away, turned about the vertical axis; their pose is known in the first frame only."""
    orient, place = np.tile([0, turned, 0], (2, 1)), np.tile([0, 0.3, -3], (2, 1))
    pose = dataclasses.replace(Pose.rest(2), global_orient=orient.astype(np.float32), transl=place.astype(np.float32))
    return Fit(pose, np.array([True, False]), np.array([1.0, np.nan]))


def seen(body, fit):
    mesh = Mesh(body(np.zeros(10), fit.pose).vertices, body.faces, torch.full((10475, 3), 0.5))
    drawn = [render([mesh], t, CAMERA) for t in range(2)]
    depth = np.stack([picture.depth for picture in drawn])
    return control.keypoints(fit, np.zeros(10, np.float32), body, CAMERA, depth), depth, drawn[0].rgba


def test_keypoints_lie_on_the_avatar_and_the_face_is_seen_only_from_the_front(body):
    points, depth, _ = seen(body, standing(0.0))
    assert points.shape == (2, 18, 2)
    assert np.isnan(points[1]).all()
    x, y = np.floor(points[0]).astype(int).T
    assert np.isfinite(depth[0, y, x]).all()
    nose, neck, right, left, ankles = points[0, 0], points[0, 1], points[0, 2], points[0, 5], points[0, [10, 13]]
    assert nose[1] < neck[1] < ankles[:, 1].min()
    assert right[0] < neck[0] < left[0]  # the right shoulder is on the left of the picture
    away, *_ = seen(body, standing(np.pi))
    assert np.isnan(away[0, [0, 14, 15]]).all()
    assert away[0, 2, 0] > away[0, 5, 0]


def test_a_skeleton_has_the_colours_that_control_nets_learned(body):
    points, *_ = seen(body, standing(0.0))
    front, nobody = control.pose_maps(points[:, None], 160)
    assert not nobody.any()
    for number, colour in ((4, (170, 255, 0)), (7, (0, 255, 85)), (10, (0, 170, 255))):
        x, y = points[0, number].round().astype(int)
        assert tuple(front[y, x]) == colour
    x, y = points[0, [8, 9]].mean(0).round().astype(int)
    assert tuple(front[y, x]) == tuple(int(0.6 * part) for part in (0, 255, 85))


def test_depth_maps_have_one_scale_for_all_frames_and_black_ground():
    depth = np.full((2, 4, 4), np.inf)
    depth[0, 0, 0], depth[0, 1, 1], depth[1, 0, 0] = 2.0, 4.0, 4.0
    maps = control.depth_maps(depth)
    assert maps[0, 0, 0].tolist() == [255] * 3
    assert maps[0, 1, 1].tolist() == maps[1, 0, 0].tolist() == [100] * 3
    assert not maps[0, 2, 2].any()
    assert not control.depth_maps(np.full((1, 4, 4), np.inf)).any()


def test_edges_are_those_of_the_avatar(body):
    *_, rgba = seen(body, standing(0.0))
    (edges,) = control.edge_maps(rgba[None])
    y, x = edges[..., 0].nonzero()
    assert len(y)
    shown = np.argwhere(rgba[..., 3] > 0)
    assert (np.array([y.min(), x.min()]) >= shown.min(0) - 2).all()
    assert (np.array([y.max(), x.max()]) <= shown.max(0) + 2).all()
