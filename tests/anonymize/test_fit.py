"""Fitted poses stand where the person stood, at their size, and move as they moved."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from anonymize.audit.accuracy import procrustes_error
from anonymize.avatar.body import Body
from anonymize.avatar.camera import Camera
from anonymize.avatar.pose import Pose
from anonymize.avatar.render import silhouette
from anonymize.avatar.wardrobe import Avatar, draw_identity
from anonymize.fitting import fingers, refinement
from anonymize.fitting import fit as fit_module
from anonymize.fitting.fit import FitConfig, Fitter
from anonymize.fitting.pose_library import KEYPOINTS, random_poses, uncrossed
from anonymize.fitting.skeleton import CARRIED, Skeleton
from anonymize.people import Landmarks, Person
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
def fitter(body) -> Fitter:
    return Fitter(body, FitConfig(library=1500))


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


def marked(body: Body, action: str, frames: int = 40, seed: int = 0, camera: Camera = SEEN_BY, turn: float = 0.0):
    """A person of another shape with perfect landmarks and relaxed hands, and the truth about their joints."""
    pose = motions.ACTIONS[action](np.random.default_rng(seed), frames, 25.0)
    if turn:
        about = Rotation.from_euler("y", turn)
        facing = (about * Rotation.from_rotvec(pose.global_orient)).as_rotvec()
        pose = Pose(**pose.arrays() | {"global_orient": facing, "transl": about.apply(pose.transl)})
    truth = body(OTHER, pose)
    masks = np.stack([silhouette(vertices, body.faces, camera).numpy() for vertices in truth.vertices])
    points = np.zeros((frames, 33, 3), np.float32)
    for landmark, (_, joint) in CARRIED.items():
        points[:, landmark] = truth.joints[:, joint]
    image = np.ones((frames, 33, 3), np.float32)
    image[..., :2] = camera.project(torch.from_numpy(points)).numpy()
    middle = points[:, [23, 24]].mean(1, keepdims=True)
    metres = ((points - middle) @ camera.rotation.T).astype(np.float32)
    hands = np.full((frames, 2, 21, 3), np.nan, np.float32)
    marks = Landmarks(image, metres, hands, np.zeros((frames, 2), np.float32))
    return dataclasses.replace(person(masks), landmarks=marks), truth.joints.numpy()


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


@pytest.mark.parametrize("action", ["wave", "walk", "sit_down", "pick_up", "kick"])
@pytest.mark.parametrize("turn", [0.0, 2.5])
def test_landmarks_give_the_pose_from_any_side(body, avatar, fitter, action, turn):
    who, truth = marked(body, action, turn=turn)
    fit = fitter(who, ASSUMED, avatar, 25.0)
    joints = motions.joints(fit.pose, body, avatar.betas)
    assert fit.ok.all()
    assert procrustes_error(joints[:, :22], truth[:, :22]).mean() < 0.04
    across, there = ((j[:, 1] - j[:, 2])[:, [0, 2]] for j in (joints, truth @ SEEN_BY.rotation.T * [1, -1, -1]))
    cosine = (across * there).sum(1) / np.linalg.norm(across, axis=1) / np.linalg.norm(there, axis=1)
    assert np.degrees(np.arccos(cosine.clip(-1, 1))).mean() < 12
    seen = SEEN_BY.project(torch.from_numpy(truth))[:, [15, 20, 21, 7, 8]].numpy()
    mine = ASSUMED.project(torch.from_numpy(joints))[:, [15, 20, 21, 7, 8]].numpy()
    off = np.linalg.norm(mine - seen, axis=2).mean(0) / SIZE
    assert off.max() < 0.01
    assert off[1:3].max() < 0.004  # hands reach what they reached


def test_frames_that_the_landmarks_lose_are_bridged(body, avatar, fitter):
    who, truth = marked(body, "wave")
    full = fitter(who, ASSUMED, avatar, 25.0)
    marks = who.landmarks
    lost = slice(15, 25)
    for values in (marks.image, marks.world):
        values[lost] = np.nan
    fit = fitter(who, ASSUMED, avatar, 25.0)
    assert fit.ok.all()
    assert np.isfinite(fit.iou[lost]).all()
    assert fit.iou[lost].min() > 0.5
    joints = motions.joints(fit.pose, body, avatar.betas)
    assert procrustes_error(joints[:, :22], truth[:, :22])[lost].mean() < 0.12
    there = motions.joints(full.pose, body, avatar.betas)
    assert np.abs(joints - there)[:10].max() < 0.05


def test_a_standing_foot_does_not_slide(body, avatar, fitter, monkeypatch):
    """The landmarks of feet that stand tremble; the avatar's feet do not, and less than without contact."""
    who, _ = marked(body, "wave")
    noise = np.random.default_rng(0).normal(0, 1.2, (40, 6, 2))
    who.landmarks.image[:, 27:, :2] += noise

    def slide(fit) -> float:
        ankles = motions.joints(fit.pose, body, avatar.betas)[:, [7, 8]]
        return float(np.linalg.norm(np.diff(ankles, axis=0), axis=2).mean())

    planted = slide(fitter(who, ASSUMED, avatar, 25.0))
    monkeypatch.setattr(refinement, "_SLIDE", 0.0)
    assert planted < 0.007  # metres a frame
    assert planted < 0.4 * slide(fitter(who, ASSUMED, avatar, 25.0))


def test_long_clips_are_fitted_in_chunks_that_meet(body, avatar, monkeypatch):
    who, _ = marked(body, "wave")
    whole = Fitter(body)(who, ASSUMED, avatar, 25.0)
    monkeypatch.setattr(fit_module, "_CHUNK", 16)
    monkeypatch.setattr(fit_module, "_OVERLAP", 8)
    parts = Fitter(body)(who, ASSUMED, avatar, 25.0)
    joints, pieces = (motions.joints(fit.pose, body, avatar.betas) for fit in (whole, parts))
    apart = np.linalg.norm(joints - pieces, axis=2)
    assert 0 < apart.mean() < 0.01
    assert apart.max() < 0.06


def test_a_seen_hand_is_posed_and_another_is_at_ease(body, avatar, fitter):
    who, _ = marked(body, "wave")
    rest = Skeleton.of(avatar).hands
    easy = [fingers.relaxed(hand.astype(float), side) for side, hand in enumerate(rest)]
    who.landmarks.hands[:, 0] = (rest[0] - rest[0][0]) * [1, -1, -1]  # flat
    who.landmarks.hands_seen[:, 0] = 1
    pose = fitter(who, ASSUMED, avatar, 25.0).pose
    assert np.abs(pose.left_hand_pose).max() < 0.02
    np.testing.assert_allclose(pose.right_hand_pose, np.tile(easy[1], (40, 1)), atol=1e-5)
    assert np.abs(easy[1]).max() > 0.2


def test_the_persons_shape_does_not_reach_the_pose(body, avatar, fitter):
    """Metric landmarks of a person twice as large, seen in the same places, give the same bytes."""
    who, _ = marked(body, "wave")
    marks = who.landmarks
    larger = dataclasses.replace(who, landmarks=dataclasses.replace(marks, world=2 * marks.world))
    one, two = (fitter(p, ASSUMED, avatar, 25.0).pose.arrays() for p in (who, larger))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_the_same_person_gives_the_same_poses(body, avatar, fitter):
    masks, _ = acted(body, "clap")
    one, two = (fitter(person(masks), ASSUMED, avatar).pose.arrays() for _ in range(2))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_short_gaps_are_filled_and_long_ones_are_not(body, avatar):
    masks, _ = acted(body, "walk")
    masks[3:5] = False
    filled = Fitter(body, FitConfig(library=200, steps=2, iou_floor=0.01, max_gap=2))
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
