import cv2
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from anonymize.fitting.pose_library import random_poses
from anonymize.make import person_net as train_person_net
from anonymize.people.embedded import person_net


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return person_net.PersonNet().eval()


def test_a_mirrored_frame_seen_mirrored_is_the_same(net):
    frame, background, previous = np.random.default_rng(0).integers(0, 255, (3, 64, 96, 3)).astype(np.uint8)
    plain = person_net.evaluate(net, frame, background, previous, 64)
    views = (np.ascontiguousarray(image[:, ::-1]) for image in (frame, background, previous))
    mirrored = person_net.evaluate(net, *views, 64, mirror=True)
    np.testing.assert_allclose(mirrored[0][:, ::-1], plain[0], atol=1e-4)
    np.testing.assert_allclose(mirrored[1][list(person_net.MIRRORED)][:, :, ::-1], plain[1], atol=1e-4)


def test_light_does_not_matter(net):
    colour = torch.rand(1, 3, 32, 32) * 0.4
    one, two = (person_net.normalised_light(c) for c in (colour, 1.5 * colour - 0.2))
    torch.testing.assert_close(one, two)


def test_augmentation_moves_masks_and_joints_together():
    rng = np.random.default_rng(0)
    side, count = train_person_net.SIDE, 16
    joints = np.zeros((count, 3, 14, 3), np.float32)
    mask = np.zeros((count, side, side), np.uint8)
    for i, (x, y) in enumerate(rng.uniform(50, 78, (count, 2))):
        cv2.circle(mask[i], (round(x), round(y)), 8, 255, -1)
        joints[i, 0, 2:4] = (round(x) + 0.5) / side, (round(y) + 0.5) / side, 1  # both shoulders
    pictures = {
        "rgb": np.zeros((count, side, side, 3), np.uint8),
        "from_background": mask,
        "from_previous": mask,
        "mask": mask,
        "joints": joints,
    }
    batch = {name: torch.from_numpy(value) for name, value in pictures.items()}
    x, mask, joints = train_person_net.augmented(batch, 96, torch.Generator().manual_seed(0))
    assert x.shape == (count, 5, 96, 96)
    where = (torch.arange(96) + 0.5) / 96
    for i in range(count):
        weight = mask[i, 0] / mask[i, 0].sum()
        centre = torch.stack([(weight.sum(0) * where).sum(), (weight.sum(1) * where).sum()])
        torch.testing.assert_close(joints[i, 0, 2, :2], centre, atol=0.01, rtol=0)


def test_heat_maps_peak_at_the_joints():
    joints = torch.zeros(1, 2, 14, 3)
    joints[0, :, 5] = torch.tensor([[0.25, 0.5, 1], [0.75, 0.125, 1]])
    heat = train_person_net.heat_maps(joints, 64)
    assert heat[0, 5, 32, 16] > 0.8
    assert heat[0, 5, 8, 48] > 0.8
    assert heat[0, 4].max() == 0


def test_pictures_depend_on_the_seed_alone():
    first, second = (train_person_net.empty_scene(np.random.default_rng([5, 1])) for _ in range(2))
    assert (first == second).all()


def test_training_can_go_on_from_saved_weights(tmp_path):
    """What is saved, in half precision, is what `--start` begins with."""
    torch.manual_seed(0)
    net = person_net.PersonNet()
    train_person_net.save(net, tmp_path / "net.safetensors")
    again = person_net.load(tmp_path / "net.safetensors")
    for name, value in net.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=1e-3, rtol=1e-3)


def test_people_are_mostly_seen_from_the_front():
    """Without that the network never learns to tell left from right."""
    rng = np.random.default_rng(0)
    angles = np.concatenate([train_person_net._facing(rng, random_poses(160, seed)) for seed in range(5)])
    front = Rotation.from_rotvec(angles[:, :3]).as_matrix()[:, 2, 2] > 0
    assert 0.65 < front.mean() < 0.85
