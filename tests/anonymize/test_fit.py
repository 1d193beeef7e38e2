"""Fitted poses stand where the person stood, at their size, and move as they moved."""

import numpy as np
import pytest
import torch

from anonymize.avatar.body import Body
from anonymize.avatar.camera import Camera
from anonymize.avatar.render import silhouette
from anonymize.avatar.wardrobe import Avatar, draw_identity
from anonymize.fitting.fit import FitConfig, SilhouetteFitter
from anonymize.fitting.pose_library import KEYPOINTS, random_poses, uncrossed
from anonymize.people import Person
from anonymize.studio import motions
from maskdp.errors import UserError

SIZE, FRAMES = 112, 8
SEEN_BY = Camera.look_at((0, 1.3, 3.4), (0, 0.9, 0), SIZE, SIZE, 1.2 * SIZE)
ASSUMED = Camera.default(SIZE, SIZE)
OTHER = torch.tensor([-0.5, 0.8, -0.3] + 7 * [0.0])


@pytest.fixture(scope="module")
def body() -> Body:
    torch.set_num_threads(1)
    return Body()


@pytest.fixture(scope="module")
def avatar(body) -> Avatar:
    return Avatar(body, draw_identity(np.random.default_rng(0)))


@pytest.fixture(scope="module")
def fitter(body) -> SilhouetteFitter:
    return SilhouetteFitter(body, FitConfig(library=1500))


def acted(body: Body, action: str, seed: int = 0, camera: Camera = SEEN_BY):
    """Silhouettes of an action by a body of another shape, and the keypoints in the picture."""
    truth = body(OTHER, motions.ACTIONS[action](np.random.default_rng(seed), FRAMES, 8.0))
    masks = np.stack([silhouette(vertices, body.faces, camera).numpy() for vertices in truth.vertices])
    return masks, camera.project(truth.joints[:, [55, *KEYPOINTS]]).numpy()


def person(masks: np.ndarray, keypoints: np.ndarray | None = None) -> Person:
    present = masks.any((1, 2))
    joints = np.zeros((len(masks), 14, 3), np.float32)
    if keypoints is not None:
        joints[..., :2], joints[..., 2] = keypoints, present[:, None]
    return Person(0, present, np.zeros((len(masks), 4), np.float32), masks, joints)


def box(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1], rows[-1]])


@pytest.mark.parametrize("action", ["wave", "walk", "squat"])
def test_avatar_stands_where_the_person_stood_at_their_size(body, avatar, fitter, action):
    masks, _ = acted(body, action)
    fit = fitter(person(masks), ASSUMED, avatar)
    assert fit.ok.all()
    assert fit.iou.mean() > 0.6
    for vertices, mask in zip(avatar.mesh(fit.pose).vertices, masks):
        mine = box(silhouette(vertices, avatar.faces, ASSUMED).numpy())
        assert np.abs(mine - box(mask)).max() < 0.12 * SIZE  # no edge of the box is far off


def test_a_raised_arm_is_raised(body, avatar, fitter):
    """Action survives: where the person's hand rises by most, the avatar's does too."""
    masks, keypoints = acted(body, "raise_arms")
    fit = fitter(person(masks, keypoints), ASSUMED, avatar)
    wrists = ASSUMED.project(body(avatar.betas, fit.pose).joints[:, [20, 21]]).numpy()[..., 1]
    truth = keypoints[:, [6, 7], 1]
    assert np.corrcoef(wrists.ravel(), truth.ravel())[0, 1] > 0.9
    assert np.abs(wrists - truth).mean() < 0.06 * SIZE


def test_left_taken_for_right_changes_little(body, avatar, fitter):
    """The embedded network often swaps arms or legs: a pair counts the way round that fits the rest."""
    masks, keypoints = acted(body, "raise_arms")
    crossed = keypoints.copy()
    crossed[::2, 2:8] = crossed[::2][:, [3, 2, 5, 4, 7, 6]]
    plain, swapped = (
        ASSUMED.project(body(avatar.betas, fitter(person(masks, k), ASSUMED, avatar).pose).joints[:, [55, *KEYPOINTS]])
        for k in (keypoints, crossed)
    )
    assert np.median(np.linalg.norm(plain - swapped, axis=2)) < 0.03 * SIZE


def test_pairs_are_uncrossed_one_by_one():
    posed = torch.rand(3, 14, 2, generator=torch.Generator().manual_seed(0))
    joints = torch.cat([posed, torch.rand(3, 14, 1)], 2)
    crossed = joints.clone()
    crossed[1, [4, 5]] = joints[1, [5, 4]]
    crossed[2, [12, 13]] = joints[2, [13, 12]]
    assert torch.equal(uncrossed(crossed, posed), joints)
    assert not torch.equal(crossed, joints)


def test_half_a_body_cut_by_the_picture_is_not_made_small(body, avatar, fitter):
    """Seen from the waist up, the avatar goes on below the picture's edge instead of shrinking into it."""
    near = Camera.look_at((0, 1.45, 1.3), (0, 1.4, 0), SIZE, SIZE, 1.2 * SIZE)
    masks, _ = acted(body, "wave", camera=near)
    assert masks[:, -1].any()
    fit = fitter(person(masks), ASSUMED, avatar)
    ankles = ASSUMED.project(body(avatar.betas, fit.pose).joints[:, [7, 8]])[..., 1]
    assert (ankles > 1.2 * SIZE).all()
    assert fit.iou.mean() > 0.6


def test_the_same_person_gives_the_same_poses(body, avatar, fitter):
    masks, _ = acted(body, "clap")
    one, two = (fitter(person(masks), ASSUMED, avatar).pose.arrays() for _ in range(2))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_short_gaps_are_filled_and_long_ones_are_not(body, avatar):
    masks, _ = acted(body, "walk")
    masks[3:5] = False
    filled = SilhouetteFitter(body, FitConfig(library=200, steps=2, iou_floor=0.01, max_gap=2))
    fit = filled(person(masks), ASSUMED, avatar)
    assert fit.ok.all()
    assert np.isnan(fit.iou[3:5]).all()
    x = fit.pose.transl
    np.testing.assert_allclose(x[3], x[2] + (x[5] - x[2]) / 3, atol=1e-6)
    filled.config = FitConfig(library=200, steps=2, iou_floor=0.01, max_gap=1)
    assert filled(person(masks), ASSUMED, avatar).ok.tolist() == [True] * 3 + [False] * 2 + [True] * 3


def test_what_is_no_body_gets_no_avatar(body, avatar, fitter):
    """Scattered dots overlap no body well enough, and nobody at all is no one to pose."""
    dots = np.zeros((FRAMES, SIZE, SIZE), bool)
    dots[:, ::8, ::8] = True
    assert not fitter(person(dots), ASSUMED, avatar).ok.any()
    assert not fitter(person(np.zeros_like(dots)), ASSUMED, avatar).ok.any()


def test_library_poses_are_joints_within_reach_and_reproducible():
    poses = random_poses(500)
    assert np.array_equal(poses, random_poses(500))
    knees = poses.reshape(-1, 22, 3)[:, [4, 5]]
    assert (knees[..., 0] >= 0).all()  # knees bend backwards only
    assert np.abs(poses).max() <= np.pi + 1e-5


def test_config_refuses_nonsense():
    with pytest.raises(UserError, match="steps"):
        FitConfig(steps=0)
