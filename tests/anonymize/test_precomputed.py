"""Masks and poses from files through the real command, and one clear line for whatever does not fit the video."""

import dataclasses
import fractions
import json
import pathlib

import av
import numpy as np
import pytest
import torch
from PIL import Image

from anonymize.avatar.body import Body
from anonymize.avatar.camera import Camera
from anonymize.avatar.render import silhouette
from anonymize.people import precomputed
from anonymize.people.precomputed import Precomputed, PrecomputedConfig, decode_rle
from anonymize.studio import motions
from anonymize.vision import video
from maskdp import cli, layers
from maskdp.errors import UserError

WIDTH, HEIGHT, FRAMES = 96, 64, 6
SMALL = ["--video.short_side", "64", "--dataset.private_format", "png"]


def encode_rle(mask: np.ndarray, as_text: bool) -> dict:
    """The encoder by COCO's definition, one run after another."""
    flat = mask.T.reshape(-1)
    runs, value, count = [], False, 0
    for pixel in flat:
        if pixel == value:
            count += 1
        else:
            runs.append(count)
            value, count = pixel, 1
    runs.append(count)
    if not as_text:
        return {"size": list(mask.shape), "counts": runs}
    text = ""
    for index, run in enumerate(runs):
        rest, more = run - runs[index - 2] if index > 2 else run, True
        while more:
            digit, rest = rest & 31, rest >> 5
            more = rest != (-1 if digit & 16 else 0)
            text += chr(48 + digit + 32 * more)
    return {"size": list(mask.shape), "counts": text}


@pytest.fixture(scope="module")
def actor():
    """The poses of somebody who waves, 3 m away, and their masks at the video's size."""
    torch.set_num_threads(1)
    body, camera = Body(), Camera.default(WIDTH, HEIGHT)
    pose = motions.ACTIONS["wave"](np.random.default_rng(0), FRAMES, 10.0)
    pose = motions.move(pose, np.tile([0.0, -1.0, -3.0], (FRAMES, 1)))
    masks = np.stack([silhouette(v, body.faces, camera).numpy() for v in body(torch.zeros(10), pose).vertices])
    return pose, masks


def give(place: pathlib.Path, masks: np.ndarray, pose=None, form: str = "png") -> pathlib.Path:
    """The folder of one video."""
    place.mkdir(parents=True)
    if form == "png":
        (place / "masks").mkdir()
        for t, mask in enumerate(masks):
            picture = Image.fromarray(mask.astype(np.uint8) * 3).convert("P")
            picture.save(place / "masks" / f"{t:06d}.png")
    else:
        coded = [encode_rle(mask, form == "text") if mask.any() else None for mask in masks]
        (place / "masks.json").write_text(json.dumps({"annotations": [{"id": 3, "segmentations": coded}]}))
    if pose is not None:
        (place / "poses").mkdir()
        poses = np.concatenate([pose.global_orient, pose.body_pose, pose.left_hand_pose, pose.right_hand_pose], 1)
        given = {"poses": poses, "trans": pose.transl, "betas": np.full(16, 9.0), "mocap_framerate": 10.0}
        np.savez(place / "poses" / "3.npz", **given)
    return place


def film(path: pathlib.Path, masks: np.ndarray, seed: int) -> pathlib.Path:
    """A video that has nothing but the masks in common with any other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.random.default_rng(seed).integers(0, 256, (len(masks), HEIGHT, WIDTH, 3), np.uint8)
    frames[masks] = (110 * seed, 20, 20)
    video.encode(path, frames, 10.0, crf=8)
    return path


def run(*arguments: object) -> int:
    return cli.main(["anonymize", *map(str, arguments), "--finder.type", "precomputed", *SMALL])


def test_masks_and_poses_lead_to_avatars_and_no_source_pixel_reaches_them(actor, tmp_path, capfd):
    """Two videos of one name that share the masks and poses alone: the same public bytes, other private ones.

    The third frame has no pose, and so no avatar. What is given is part of the work that a re-run takes up.
    """
    pose, masks = actor
    body_pose = pose.body_pose.copy()
    body_pose[2] = np.nan
    place = give(tmp_path / "given" / "a", masks, dataclasses.replace(pose, body_pose=body_pose), "text")
    secret = tmp_path / "secret"
    secret.write_bytes(b"\5" * 32)
    options = ("--finder.folder", place.parent, "--wardrobe_secret", secret)
    clips = []
    for seed in (1, 2):
        path, out = film(tmp_path / str(seed) / "a.mp4", masks, seed), tmp_path / f"out{seed}"
        assert run(path, "--out", out, *options) == 0
        clips.append(layers.Dataset(out)["train"].clip(0))
    one, two = clips
    assert one.rgba.tobytes() == two.rgba.tobytes()
    assert not np.array_equal(one.private, two.private)
    assert one.rgba[..., 3].any((1, 2)).tolist() == [True, True, False, True, True, True]
    assert json.loads((out / "manifest.jsonl").read_text())["frames_without_pose"] == 1
    posed = np.arange(FRAMES) != 2
    shown, there = one.rgba[posed, ..., 3] > 127, masks[posed]
    assert (shown & there).sum() > 0.6 * (shown | there).sum()  # the avatar's own shape, where the person was
    person = abs(two.private.astype(int) - (220, 20, 20)).max(-1) < 40
    assert person[masks].mean() < 0.05

    work = next((out / "work").glob("*.npz"))
    first = work.stat().st_mtime_ns
    assert run(path, "--out", out, *options) == 0
    assert work.stat().st_mtime_ns == first
    (place / "camera.json").write_text(json.dumps({"focal": 1.1 * WIDTH}))
    assert run(path, "--out", out, *options) == 0
    assert work.stat().st_mtime_ns > first
    assert "finder:" not in capfd.readouterr().err  # that line is for `auto` alone


def people(tmp_path, masks, numbers=None, size=(HEIGHT, WIDTH)):
    path = tmp_path / "a.mp4"
    if not path.exists():
        film(path, masks, 1)
    numbers = np.arange(len(masks)) if numbers is None else numbers
    frames = np.zeros((len(numbers), *size, 3), np.uint8)
    return Precomputed(PrecomputedConfig(folder=str(tmp_path / "given")), "a.mp4", path).people(frames, numbers)


def test_masks_and_poses_are_those_of_the_frames_asked_for_at_their_size(actor, tmp_path):
    pose, masks = actor
    give(tmp_path / "given" / "a", masks, pose)
    (tmp_path / "given" / "a" / "camera.json").write_text(json.dumps({"focal": 200}))
    numbers = np.array([1, 3, 5])
    found = people(tmp_path, masks, numbers, (HEIGHT // 2, WIDTH // 2))
    (person,) = found.persons
    blocks = masks[numbers].reshape(3, HEIGHT // 2, 2, WIDTH // 2, 2).sum((2, 4))
    assert np.array_equal(person.masks, blocks >= 2)
    assert found.removal[blocks > 0].all()
    assert np.array_equal(person.pose.body_pose, pose.body_pose[numbers])
    assert np.array_equal(person.pose.right_hand_pose, pose.right_hand_pose[numbers])
    assert np.array_equal(person.pose.transl, pose.transl[numbers])
    assert (found.camera.focal, found.camera.width, found.camera.height) == (100, WIDTH // 2, HEIGHT // 2)


def test_masks_in_either_form_are_the_same_people(actor, tmp_path):
    found = []
    for form in ("png", "text", "list"):
        given = give(tmp_path / form / "given" / "a", actor[1], form=form)
        found.append(people(given.parent.parent, actor[1]))
    for other in found[1:]:
        assert np.array_equal(other.persons[0].masks, found[0].persons[0].masks)
        assert np.array_equal(other.removal, found[0].removal)
    assert found[0].persons[0].masks.any()


@pytest.mark.parametrize(
    ("width", "left", "right", "jaw"), [(66, 0, 0, 0), (72, 0, 0, 0), (156, 66, 111, 0), (165, 75, 120, 66)]
)
def test_each_width_of_poses_is_taken_apart_in_its_own_order(tmp_path, width, left, right, jaw):
    """SMPL and SMPL-H: pelvis, body, hands; SMPL-X: pelvis, body, jaw, eyes, hands. What is not there is at rest."""
    rows = np.arange(2 * width, dtype=np.float32).reshape(2, width)
    np.savez(tmp_path / "1.npz", poses=rows, trans=np.ones((2, 3)))
    pose = precomputed._read_poses(tmp_path / "1.npz")
    assert np.array_equal(np.concatenate([pose.global_orient, pose.body_pose], 1), rows[:, :66])
    for found, start in ((pose.left_hand_pose, left), (pose.right_hand_pose, right), (pose.jaw_pose, jaw)):
        assert np.array_equal(found, rows[:, start : start + found.shape[1]] if start else np.zeros_like(found))


@pytest.mark.parametrize("as_text", [True, False])
def test_rle_is_read_back(as_text):
    rng = np.random.default_rng(0)
    for density in (0.0, 0.02, 0.5, 1.0):
        mask = rng.uniform(size=(37, 53)) < density
        mask[5:30, 10:12] |= density > 0
        assert np.array_equal(decode_rle(encode_rle(mask, as_text)), mask)


def test_rle_of_pycocotools_is_read():
    mask = np.zeros((9, 7), bool)
    mask[2:6, 1:5] = mask[0, 6] = True
    assert np.array_equal(decode_rle({"size": [9, 7], "counts": ";45000007ML"}), mask)


@pytest.mark.parametrize("code", [{"size": [2, 2], "counts": [3]}, {"size": [2, 2], "counts": [5, -1]}])
def test_runs_that_do_not_fill_the_mask_are_refused(code):
    with pytest.raises(ValueError, match="runs of"):
        decode_rle(code)


def save_poses(place, **changes):
    arrays = {"poses": np.zeros((FRAMES, 156)), "trans": np.zeros((FRAMES, 3)), **changes}
    (place / "poses").mkdir(exist_ok=True)
    np.savez(place / "poses" / "3.npz", **arrays)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda place: [f.unlink() for f in (place / "masks").iterdir()], "expected masks/*.png or masks.json"),
        (lambda place: (place / "masks" / "000005.png").unlink(), "masks: 5 frames, expected the 6 that are decoded"),
        (lambda place: Image.new("L", (9, 9)).save(place / "masks" / "000002.png"), "000002.png: 9x9 pixels, expected"),
        (lambda place: Image.new("RGB", (96, 64)).save(place / "masks" / "000002.png"), "mode RGB, expected grey"),
        (lambda place: (place / "masks" / "000002.png").write_bytes(b"no"), "000002.png: not a readable PNG"),
        (
            lambda place: save_poses(place, poses=np.zeros((5, 156)), trans=np.zeros((5, 3))),
            "3.npz: 5 frames, expected",
        ),
        (lambda place: save_poses(place, poses=np.zeros((6, 100))), "3.npz: poses (6, 100)"),
        (lambda place: save_poses(place, poses=np.array([None])), "3.npz: expected an npz with poses and trans"),
        (
            lambda place: (save_poses(place), (place / "poses" / "3.npz").rename(place / "poses" / "4.npz")),
            "4.npz: poses of a person without masks",
        ),
        (lambda place: (place / "camera.json").write_text('{"focal": 0}'), "expected a focal length above 0"),
        (lambda place: (place / "camera.json").write_text("{}"), "camera.json: expected focal"),
        (lambda place: (place / "masks.json").write_text("{}"), "masks/*.png or masks.json, and not both"),
        (lambda place: place.rename(place.with_name("b")), "a: no such folder, expected the masks of this video"),
    ],
)
def test_what_does_not_fit_is_one_line_and_the_video_fails(actor, tmp_path, spoil, message, capfd):
    spoil(give(tmp_path / "given" / "a", actor[1]))
    path = film(tmp_path / "a.mp4", actor[1], 1)
    assert run(path, "--out", tmp_path / "out", "--finder.folder", tmp_path / "given") == 1
    said = capfd.readouterr()
    assert message in said.err
    assert "Traceback" not in said.err
    assert "1 files failed" in said.out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "masks.json: expected annotations with id and segmentations"),
        (
            '{"annotations": [{"id": 1, "segmentations": [null]}]}',
            "person 1: 1 frames, expected the 6 that are decoded",
        ),
        (
            json.dumps({"annotations": [{"id": 1, "segmentations": [{"size": [9, 9], "counts": [81]}] * 6}]}),
            "9x9 pixels",
        ),
        (
            json.dumps({"annotations": [{"id": 1, "segmentations": [{"size": [9, 9], "counts": "~"}] * 6}]}),
            "not a COCO RLE",
        ),
        (json.dumps({"annotations": [{"id": 1, "segmentations": [None] * 6}] * 2}), "an id occurs twice"),
    ],
)
def test_rle_that_does_not_fit_is_one_line(actor, tmp_path, content, message):
    (tmp_path / "given" / "a").mkdir(parents=True)
    (tmp_path / "given" / "a" / "masks.json").write_text(content)
    with pytest.raises(UserError) as error:
        people(tmp_path, actor[1])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_missing_ends_the_run_and_no_name_leads_out_of_it(tmp_path, capfd):
    path = tmp_path / "a.mp4"
    path.touch()
    assert run(path, "--out", tmp_path / "out", "--finder.folder", tmp_path / "none") == 2
    assert "is no folder, expected one of masks and poses" in capfd.readouterr().err
    (tmp_path / "given").mkdir()
    with pytest.raises(UserError, match="outside of"):
        Precomputed(PrecomputedConfig(folder=str(tmp_path / "given")), "../a.mp4", path)


def test_masks_must_be_as_many_as_the_frames_that_are_decoded(actor, tmp_path):
    """An edit list leaves out two of the eight frames that the header counts: eight masks would lie two frames off."""
    masks = np.concatenate([actor[1], actor[1][:2]])
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for t, mask in enumerate([*masks, None]):
            frame = None if mask is None else av.VideoFrame.from_ndarray(mask.astype(np.uint8) * 200, format="gray")
            if frame:
                frame.pts, frame.time_base = t - 2, fractions.Fraction(1, 10)
            container.mux(stream.encode(frame and frame.reformat(format="yuv420p")))
    assert video.probe(path).frames == 8
    for number in (8, 6):
        give(tmp_path / str(number) / "given" / "a", masks[8 - number :])
    with pytest.raises(UserError, match="8 frames, expected the 6 that are decoded"):
        Precomputed(PrecomputedConfig(folder=str(tmp_path / "8" / "given")), "a.mp4", path)
    found = Precomputed(PrecomputedConfig(folder=str(tmp_path / "6" / "given")), "a.mp4", path)
    (clip,) = video.clips(path, max_frames=100)
    (person,) = found.people(clip.frames, clip.numbers).persons
    assert ((clip.frames[..., 0] > 100) ^ person.masks).mean() < 0.01


def test_masks_of_one_size_are_refused_for_pictures_of_two(actor, tmp_path):
    data = b""
    for size in ((HEIGHT, WIDTH), (WIDTH, HEIGHT)):
        with av.open(str(tmp_path / "part.ts"), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            (stream.height, stream.width), stream.pix_fmt = size, "yuv420p"
            for _ in range(FRAMES // 2):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((*size, 3), np.uint8), format="rgb24")))
            container.mux(stream.encode(None))
        data += (tmp_path / "part.ts").read_bytes()
    (tmp_path / "a.ts").write_bytes(data)
    give(tmp_path / "given" / "a", actor[1])
    with pytest.raises(UserError, match="the pictures change their size"):
        Precomputed(PrecomputedConfig(folder=str(tmp_path / "given")), "a.ts", tmp_path / "a.ts")
