"""The hand models on rendered hands: which way palms face, and whether fingers are bent."""

import numpy as np
import pytest
import torch

from anonymize.avatar.body import Body
from anonymize.avatar.camera import Camera
from anonymize.avatar.pose import Pose
from anonymize.avatar.render import render
from anonymize.avatar.wardrobe import Avatar, draw_identity
from anonymize.fitting import fingers
from anonymize.fitting.skeleton import CARRIED, Skeleton
from anonymize.people.blazepose import models, wheel
from anonymize.people.blazepose.hands import HandFinder

pytestmark = pytest.mark.skipif(
    not wheel.complete(models.default_folder()),
    reason="BlazePose's models are not here: maskdp weights fetch blazepose",
)
CAMERA = Camera.look_at((0, 0.15, 1.6), (0, 0.1, 0), 256, 256, 300)


@pytest.fixture(scope="module")
def avatar() -> Avatar:
    torch.set_num_threads(1)
    return Avatar(Body(), draw_identity(np.random.default_rng(2)))


def hands_up(avatar: Avatar, bend: float, frames: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of a person who shows both palms to the camera, fingers bent by `bend` at each joint; landmarks."""
    body = np.zeros((frames, 21, 3))
    body[:, 17, 1], body[:, 18, 1] = -0.3, 0.3  # elbows forward a little
    body[:, 17, 2], body[:, 18, 2] = 1.4, -1.4  # and up
    body[:, 15, 2], body[:, 16, 2] = -0.9, 0.9
    body[:, 19, 0] = body[:, 20, 0] = -1.5
    hands = []
    for side, hand in enumerate(Skeleton.of(avatar).hands):
        axes = fingers.relaxed(hand.astype(float), side).reshape(15, 3)
        hands.append(
            np.tile(bend * axes / np.maximum(np.linalg.norm(axes, axis=1, keepdims=True), 1e-9), (frames, 1, 1))
        )
    rest = Pose.rest(frames).arrays()
    pose = Pose(
        **rest
        | {"body_pose": body.reshape(frames, -1)}
        | {name: hand.reshape(frames, -1) for name, hand in zip(("left_hand_pose", "right_hand_pose"), hands)}
    )
    mesh = avatar.mesh(pose)
    grey = np.full((frames, 256, 256, 3), 150, np.uint8)
    for t in range(frames):
        rgba = render([mesh], t, CAMERA).rgba
        alpha = rgba[..., 3:] / 255
        grey[t] = rgba[..., :3] * alpha + 150 * (1 - alpha)
    joints = avatar.body(avatar.betas, pose).joints
    image = np.full((frames, 33, 3), np.nan, np.float32)
    for landmark, (_, joint) in CARRIED.items():
        image[:, landmark] = np.column_stack([CAMERA.project(joints[:, joint]).numpy(), np.ones(frames)])
    return grey, image


def test_hands_are_found_and_bent_fingers_are_told_from_straight_ones(avatar):
    bends = {}
    for bend in (0.0, 1.3):
        frames, image = hands_up(avatar, bend)
        hands, seen = HandFinder()(frames, image)
        assert seen.min() > 0.5
        assert np.abs(hands[:, :, 0]).max() == 0
        rest = Skeleton.of(avatar).hands
        found = [fingers.bends(hands[:, side].astype(float) * [1, -1, -1], rest[side], side) for side in (0, 1)]
        bends[bend] = np.linalg.norm(np.stack(found, 1).reshape(-1, 2, 15, 3)[:, :, :12], axis=3).mean((0, 2))
    assert (bends[0.0] < 0.3).all()
    assert (bends[1.3] > 0.5).all()
    assert bends[1.3].mean() > 0.7


def test_the_finder_follows_a_turned_picture(avatar):
    """A picture turned by a quarter circle gives hands turned by it."""
    frames, image = hands_up(avatar, 0.3, 2)
    hands, _ = HandFinder()(frames, image)
    turned = np.ascontiguousarray(np.rot90(frames, axes=(1, 2)))
    moved = image.copy()
    moved[..., 0], moved[..., 1] = image[..., 1], 256 - image[..., 0]
    there, seen = HandFinder()(turned, moved)
    assert seen.min() > 0.5
    expected = np.stack([hands[..., 1], -hands[..., 0], hands[..., 2]], -1)
    assert np.linalg.norm(there - expected, axis=-1).mean() < 0.006


def test_an_unknown_wrist_is_not_looked_for(avatar):
    frames, image = hands_up(avatar, 0.0, 2)
    image[1] = np.nan
    image[:, [16, 18, 20]] += np.float32([400, 0, 0])  # out of the picture
    hands, seen = HandFinder()(frames, image)
    assert (seen > 0).tolist() == [[True, False], [False, False]]
    assert np.isnan(hands[seen == 0]).all()
