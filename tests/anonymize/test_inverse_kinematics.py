"""Poses from landmarks in closed form: exact where they can be, likely where nothing is seen."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from anonymize.avatar.body import Body
from anonymize.avatar.camera import Camera
from anonymize.fitting import fingers, landmarks
from anonymize.fitting import inverse_kinematics as ik
from anonymize.fitting.placement import place
from anonymize.fitting.pose_library import random_poses
from anonymize.fitting.skeleton import Skeleton, local, world
from anonymize.fitting.smoothing import smoothed, stiffness

COUNT = 60
CAMERA = Camera.default(128, 128)


@pytest.fixture(scope="module")
def skeleton() -> Skeleton:
    torch.set_num_threads(1)
    body = Body()
    return Skeleton(body, torch.zeros(10), (body.template, body.weights))


def landmarks_of(skeleton: Skeleton, turned: np.ndarray) -> np.ndarray:
    """All 33 landmarks (T, 33, 3); those that the skeleton does not have are at the origin."""
    points = np.zeros((len(turned), 33, 3))
    points[:, skeleton.landmarks] = skeleton.posed(torch.from_numpy(turned).float(), torch.zeros(len(turned), 3))[1]
    return points


def random_rotations(skeleton: Skeleton, straight_back: bool = True) -> np.ndarray:
    """World rotations (COUNT, 22, 3, 3) of random poses, wrists bent too."""
    angles = random_poses(COUNT).reshape(COUNT, 22, 3).astype(float)
    if straight_back:
        angles[:, [3, 6, 9, 13, 14]] = 0
    angles[:, [20, 21]] = np.random.default_rng(0).normal(0, 0.2, (COUNT, 2, 3))
    return world(ik.matrix(angles), skeleton.parents[:22])


def solved(skeleton: Skeleton, points: np.ndarray) -> np.ndarray:
    return ik.solve(skeleton, ik.directions(points, np.ones(points.shape[:2]))[0])


def test_joints_come_back_from_their_landmarks(skeleton):
    truth = random_rotations(skeleton)
    points = landmarks_of(skeleton, truth)
    again = landmarks_of(skeleton, solved(skeleton, points))
    arms_and_legs = [11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28]
    assert np.abs(again - points)[:, arms_and_legs].max() < 1e-4
    feet_and_face = [0, 7, 8, 29, 30, 31, 32]
    assert np.linalg.norm(again - points, axis=2)[:, feet_and_face].mean() < 0.01


def test_a_bent_back_keeps_every_limb_in_its_direction(skeleton):
    points = landmarks_of(skeleton, random_rotations(skeleton, straight_back=False))
    there = ik.directions(points, np.ones(points.shape[:2]))[0]
    again = ik.directions(landmarks_of(skeleton, solved(skeleton, points)), np.ones(points.shape[:2]))[0]
    for name in (f"{limb}{side}" for limb in ("upper_arm", "forearm", "thigh", "shin", "foot") for side in (0, 1)):
        assert (there[name] * again[name]).sum(1).min() > 1 - 1e-6, name


def test_knees_and_elbows_turn_about_their_hinges(skeleton):
    """A bent limb is not wrung: its joint's rotation is about the hinge, the way the joint bends."""
    angles = np.zeros((1, 22, 3))
    angles[0, [4, 5], 0] = 1.2
    angles[0, 18, 1], angles[0, 19, 1] = -1.4, 1.4
    angles[0, 16], angles[0, 1] = [0.3, -0.5, -0.8], [-1.0, 0.2, 0.1]
    turned = solved(skeleton, landmarks_of(skeleton, world(ik.matrix(angles), skeleton.parents[:22])))
    found = ik.rotvec(local(turned, skeleton.parents[:22]))
    np.testing.assert_allclose(found[0, [1, 4, 5, 16]], angles[0, [1, 4, 5, 16]], atol=0.02)
    # The forearm takes half of what the hand is turned about it, here nothing.
    np.testing.assert_allclose(found[0, [18, 19]], angles[0, [18, 19]], atol=0.02)


def test_left_is_left_and_a_back_is_a_back(skeleton):
    """Mirroring or turning the landmarks mirrors or turns the body."""
    truth = random_rotations(skeleton)
    points = landmarks_of(skeleton, truth)
    about = Rotation.from_euler("y", 2.1).as_matrix()
    np.testing.assert_allclose(solved(skeleton, points @ about.T), about @ solved(skeleton, points), atol=1e-5)
    pairs = np.arange(33)
    pairs[7:33] = pairs[7:33].reshape(-1, 2)[:, ::-1].ravel()
    pairs[9:11] = 9, 10
    pairs[[7, 8]] = 8, 7
    mirrored = (points * [-1, 1, 1])[:, pairs]
    joints = landmarks_of(skeleton, solved(skeleton, mirrored))
    there = (landmarks_of(skeleton, solved(skeleton, points)) * [-1, 1, 1])[:, pairs]
    assert np.abs(joints - there)[:, 11:17].max() < 0.01


def test_the_size_of_the_person_does_not_enter(skeleton):
    """Bone lengths are the avatar's: landmarks of a person of another size and proportions give the same pose."""
    points = landmarks_of(skeleton, random_rotations(skeleton))
    longer = points.copy()
    for start, end in ((11, 13), (12, 14)):
        longer[:, [end, end + 2, end + 4, end + 6]] += 0.4 * (points[:, [end]] - points[:, [start]])
    np.testing.assert_allclose(solved(skeleton, 1.3 * points), solved(skeleton, points), atol=1e-6)
    np.testing.assert_allclose(
        solved(skeleton, longer)[:, [16, 17, 18, 19]], solved(skeleton, points)[:, [16, 17, 18, 19]], atol=1e-6
    )


# ---------------------------------------------------------------- what is not seen


def test_unseen_legs_stand_and_unseen_arms_hang(skeleton):
    points = landmarks_of(skeleton, np.tile(np.eye(3), (10, 22, 1, 1)))
    rng = np.random.default_rng(0)
    points[:, 25:] += rng.normal(0, 0.3, points[:, 25:].shape)  # wild guesses below the hips
    points[:, [13, 14, 15, 16]] += rng.normal(0, 0.3, (10, 4, 3))
    visible = np.ones((10, 33))
    visible[:, 25:] = visible[:, 13:23] = 0
    toward = landmarks.steady(*ik.directions(points, visible), fps=25)
    for side in (0, 1):
        for limb in ("upper_arm", "thigh", "shin"):
            assert toward[f"{limb}{side}"][:, 1].max() < -0.8, limb


def test_a_gap_is_bridged_and_the_ends_are_held(skeleton):
    angles = np.zeros((30, 22, 3))
    angles[:, 16, 2] = np.linspace(-1.2, 0.6, 30)
    points = landmarks_of(skeleton, world(ik.matrix(angles), skeleton.parents[:22]))
    truth = ik.directions(points, np.ones((30, 33)))[0]["upper_arm0"]
    points[12:18], points[27:] = np.nan, np.nan
    found = landmarks.steady(*ik.directions(points, np.ones((30, 33))), fps=25)["upper_arm0"]
    assert (found[12:18] * truth[12:18]).sum(1).min() > 0.99
    assert (found[27:] * truth[26]).sum(1).min() > 0.97


def test_a_trunk_that_flips_is_not_believed_but_one_that_falls_is():
    angle = np.linspace(0, 1.6, 60)
    falling = np.stack([np.sin(angle), np.cos(angle), 0 * angle], 1)
    assert landmarks.credible(falling, 25.0).all()
    falling[:8], falling[20], falling[40:43] = [0, -1, 0], [0.6, 0, 0.8], np.nan
    falling[50:53] = [0, -1, 0]
    wrong = np.zeros(60, bool)
    wrong[:8] = wrong[20] = wrong[40:43] = wrong[50:53] = True
    assert (landmarks.credible(falling, 25.0) == ~wrong).all()


def test_smoothing_has_the_gain_it_states():
    t = np.arange(2000)
    for frequency in (0.5, 3.0, 6.0):
        omega = 2 * np.pi * frequency / 25
        found = smoothed(np.sin(omega * t), np.ones(len(t)), stiffness(3.0, 25))[500:1500]
        assert np.abs(found).max() == pytest.approx(
            1 / (1 + (np.sin(omega / 2) / np.sin(np.pi * 3 / 25)) ** 4), abs=0.01
        )


# ---------------------------------------------------------------- placement


def test_a_body_is_placed_where_its_landmarks_are_seen(skeleton):
    points = landmarks_of(skeleton, random_rotations(skeleton))[:, skeleton.landmarks]
    there = np.stack([np.linspace(-1, 1, COUNT), np.full(COUNT, 0.2), np.linspace(-4, -3, COUNT)], 1)
    seen = CAMERA.project(torch.from_numpy(points + there[:, None])).numpy()
    weights = np.ones(points.shape[:2])
    np.testing.assert_allclose(place(points, seen, weights, CAMERA, 25.0), there, atol=0.03)


def test_who_is_cut_off_keeps_the_distance(skeleton):
    """With the legs out of the picture and the trunk misjudged, the distance of the other frames holds."""
    points = landmarks_of(skeleton, random_rotations(skeleton))[:, skeleton.landmarks]
    there = np.tile([0.0, 0.0, -3.0], (COUNT, 1))
    seen = CAMERA.project(torch.from_numpy(points + there[:, None])).numpy()
    weights = np.ones(points.shape[:2])
    cut = slice(20, 30)
    weights[cut][:, skeleton.landmarks > 12] = 0
    centre = seen[cut].mean(1, keepdims=True)
    seen[cut] = centre + 1.5 * (seen[cut] - centre)
    assert np.abs(place(points, seen, weights, CAMERA, 25.0)[:, 2] + 3).max() < 0.45


# ---------------------------------------------------------------- hands


def hand_landmarks(skeleton: Skeleton, side: int, angles: np.ndarray) -> np.ndarray:
    """Landmarks (T, 21, 3) of hands with finger rotations (T, 45)."""
    points = np.tile(skeleton.hands[side].astype(float), (len(angles), 1, 1))
    turns = ik.matrix(angles.reshape(-1, 15, 3))
    for joint, landmark in fingers._FINGERS.values():
        turn = np.tile(np.eye(3), (len(angles), 1, 1))
        for part in range(3):
            turn = turn @ turns[:, joint - 25 + part]
            bone = skeleton.hands[side][landmark + part + 1] - skeleton.hands[side][landmark + part]
            points[:, landmark + part + 1] = points[:, landmark + part] + turn @ bone
    return points


@pytest.mark.parametrize("side", [0, 1])
def test_fingers_come_back_from_their_landmarks(skeleton, side):
    """Bends up to a fist and spread fingers, whatever way the hand is turned."""
    rng = np.random.default_rng(side)
    axis = fingers.relaxed(skeleton.hands[side].astype(float), side).reshape(15, 3)
    axis = axis / np.maximum(np.linalg.norm(axis, axis=1, keepdims=True), 1e-9)  # zero for the thumb
    angles = (rng.uniform(0, 1.3, (40, 15, 1)) * axis).reshape(40, 45)
    points = hand_landmarks(skeleton, side, angles)
    turned = points @ Rotation.random(40, random_state=0).as_matrix()
    found = fingers.bends(turned, skeleton.hands[side].astype(float), side)
    np.testing.assert_allclose(found[:, :36], angles[:, :36], atol=1e-5)
    assert np.abs(found[:, 36:]).max() < 1e-5


@pytest.mark.parametrize("side", [0, 1])
def test_fingers_do_not_break(skeleton, side):
    """Whatever the landmarks are, fingers stay within their reach: none bends back over the hand."""
    points = np.random.default_rng(0).normal(0, 0.05, (50, 21, 3))
    found = fingers.bends(points, skeleton.hands[side].astype(float), side).reshape(50, 15, 3)
    assert np.isfinite(found).all()
    assert np.linalg.norm(found, axis=2).max() < 2.0
    tips = hand_landmarks(skeleton, side, found.reshape(50, 45))[:, [8, 12, 16, 20]]
    assert (tips[..., 1] - skeleton.hands[side][0, 1]).max() < 0.06  # the palm faces down


@pytest.mark.parametrize("side", [0, 1])
def test_a_turned_palm_turns_forearm_and_wrist_half_each(skeleton, side):
    """Palm up instead of down, the arm held out to the side: half a circle outward, without a wrung wrist."""
    points = landmarks_of(skeleton, np.tile(np.eye(3), (1, 22, 1, 1)))
    toward = ik.directions(points, np.ones((1, 33)))[0]
    toward[f"palm{side}"] = toward[f"palm{side}"] * [1, -1, -1]
    found = ik.rotvec(local(ik.solve(skeleton, toward), skeleton.parents[:22]))[0]
    for joint in (18 + side, 20 + side):
        assert found[joint] @ [-1, 0, 0] == pytest.approx(1.5, abs=0.1)
