import numpy as np
import pytest
import torch

from anonymize.avatar.body import Body
from anonymize.studio import motions

torch.set_num_threads(1)
AIRBORNE = {"jumping_jack": 0.15, "jog": 0.15}  # metres; every other action keeps a foot on the floor
KNEES, ELBOWS = {4: 1, 5: 1}, {18: -1, 19: 1}  # joint: sign of its bend, about x and about y


@pytest.fixture(scope="module")
def body():
    return Body()


@pytest.mark.parametrize("name", motions.ACTIONS)
def test_every_action_is_plausible(name, body):
    for seed in range(3):
        pose = motions.ACTIONS[name](np.random.default_rng(seed), 20, 10.0)
        assert len(pose) == 20
        angles = np.concatenate([pose.global_orient, pose.body_pose], 1).reshape(20, 22, 3)
        assert np.isfinite(angles).all()
        assert np.isfinite(pose.transl).all()
        assert np.linalg.norm(angles[:, 1:], axis=-1).max() < 2.95
        for knee, sign in KNEES.items():
            assert (sign * angles[:, knee, 0] > 0).all()
            assert np.abs(angles[:, knee, 1:]).max() < 0.2
        for elbow, sign in ELBOWS.items():
            assert (sign * angles[:, elbow, 1] > -0.05).all()
        sole = motions.lowest(pose, body, np.zeros(10))
        assert np.abs(sole.clip(max=0)).max() < 2e-3
        assert sole.max() < AIRBORNE.get(name, 2e-3)
        joints = motions.joints(pose, body, np.zeros(10))
        assert np.linalg.norm(np.diff(joints[:, :22], axis=0), axis=-1).max() * 10 < 9  # m/s
        assert np.abs(motions.pelvis(pose)[:, [0, 2]]).max() < 2


def test_registries_are_disjoint():
    assert len(motions.PRIVATE_ACTIONS) == 10
    assert len(motions.PUBLIC_ACTIONS) >= 8
    assert not motions.PRIVATE_ACTIONS.keys() & motions.PUBLIC_ACTIONS.keys()
    assert motions.PRIVATE_ACTIONS | motions.PUBLIC_ACTIONS == motions.ACTIONS


def test_actions_follow_from_the_generator():
    first, again, other = (motions.ACTIONS["throw"](np.random.default_rng(seed), 8, 8.0) for seed in (1, 1, 2))
    for name, value in first.arrays().items():
        np.testing.assert_array_equal(value, again.arrays()[name])
    assert not np.array_equal(first.body_pose, other.body_pose)


def test_joints_agree_with_the_body(body):
    pose = motions.ACTIONS["kick"](np.random.default_rng(0), 4, 4.0)
    betas = np.full(10, 0.5, np.float32)
    posed = body(betas, pose)
    np.testing.assert_allclose(motions.joints(pose, body, betas), posed.joints[:, :55], atol=1e-5)
    np.testing.assert_allclose(motions.lowest(pose, body, betas), posed.vertices[..., 1].amin(1), atol=1e-3)


def test_mirror_is_a_reflection(body):
    pose = motions.ACTIONS["kick"](np.random.default_rng(0), 4, 4.0)
    mirrored = motions.mirror(pose)
    swap = [0, 2, 1, 3, 5, 4, 6, 8, 7, 9, 11, 10, 12, 14, 13, 15, 17, 16, 19, 18, 21, 20]
    joints, reflected = (motions.joints(p, body, np.zeros(10))[:, :22] for p in (pose, mirrored))
    np.testing.assert_allclose(reflected[:, swap], joints * [-1, 1, 1], atol=2e-4)  # the model is symmetric to this
    for name, value in motions.mirror(mirrored).arrays().items():
        np.testing.assert_array_equal(value, pose.arrays()[name])


def test_turn_is_a_rotation_about_the_vertical(body):
    pose = motions.ACTIONS["walk"](np.random.default_rng(0), 4, 4.0)
    joints, turned = (motions.joints(p, body, np.zeros(10)) for p in (pose, motions.turn(pose, np.pi / 2)))
    np.testing.assert_allclose(turned, np.stack([joints[..., 2], joints[..., 1], -joints[..., 0]], -1), atol=1e-5)


def test_standing_feet_do_not_slide(body):
    pose = motions.ACTIONS["bow"](np.random.default_rng(3), 12, 6.0)
    ankles = motions.joints(pose, body, np.zeros(10))[:, [7, 8]]
    assert np.ptp(ankles, axis=0).max() < 5e-3


@pytest.mark.parametrize("stature", [-1.5, 1.5])
def test_any_body_stands_on_the_floor(stature, body):
    betas = np.array([stature, 1, stature, 0, 0, 0, 0, 0, 0, 0], np.float32)
    for name in ("walk", "squat", "jumping_jack"):
        pose = motions.ACTIONS[name](np.random.default_rng(0), 12, 8.0)
        fitted = motions.fit_to_body(pose, body, betas)
        legs = [
            np.ptp(body.shaped(torch.tensor(b, dtype=torch.float32))[1][[1, 7], 1].numpy())
            for b in (betas, np.zeros(10))
        ]
        wanted = motions.lowest(pose, body, np.zeros(10)) * legs[0] / legs[1]
        np.testing.assert_allclose(motions.lowest(fitted, body, betas), wanted, atol=1e-5)
        np.testing.assert_array_equal(fitted.body_pose, pose.body_pose)


def test_join_meets_and_stays_on_the_floor(body):
    rng = np.random.default_rng(0)
    walk, wave = motions.ACTIONS["walk"](rng, 8, 8.0), motions.ACTIONS["wave"](rng, 10, 8.0)
    joined = motions.join(walk, wave, 2)
    assert len(joined) == 16
    np.testing.assert_array_equal(joined.body_pose[:6], walk.body_pose[:6])
    np.testing.assert_array_equal(joined.body_pose[8:], wave.body_pose[2:])
    assert np.abs(motions.lowest(joined, body, np.zeros(10))).max() < 2e-3
    assert np.linalg.norm(np.diff(motions.pelvis(joined), axis=0), axis=1).max() * 8 < 2  # m/s
