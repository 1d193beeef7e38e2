"""Detector, tracker, keypoints and depth against the library's own forward passes, on tiny random weights."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers as hf

from anonymize.avatar.camera import Camera
from anonymize.avatar.render import Mesh, render
from anonymize.people.embedded import person_net
from anonymize.people.models.depth import Depth, in_order
from anonymize.people.models.detector import Detector
from anonymize.people.models.keypoints import COCO, Keypoints, as_joints, peaks
from anonymize.people.models.model_input import ModelInput
from anonymize.people.models.tracker import Tracker
from maskdp.errors import UserError
from tests.anonymize import tiny_models

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 48, 72, 3), np.uint8)
SMOOTH = np.stack([np.add.outer(np.arange(48) * 2, np.arange(72) * 2)] * 3, -1).astype(np.uint8)[None]


@pytest.mark.parametrize("family", ["rt_detr", "rt_detr_v2", "d_fine"])
def test_detector_sees_what_the_library_sees(family, folder, tmp_path):
    """The same boxes and scores as the library's post-processing of its own forward pass over our input."""
    torch.manual_seed(1)
    place = tmp_path / "detector"
    tiny_models.detector(family).save_pretrained(place)
    shutil.copy(folder / "detector" / "preprocessor_config.json", place)
    detector = Detector(tmp_path)
    found = detector(FRAMES, 0.0)
    model = hf.AutoModelForObjectDetection.from_pretrained(place).eval()
    with torch.no_grad():
        out = model(pixel_values=detector.input(FRAMES))
    out.logits[..., 0] = -100  # no chairs, or they take places among the library's best
    theirs = hf.RTDetrImageProcessor().post_process_object_detection(out, target_sizes=[(48, 72)] * 5, threshold=0.0)
    for mine, expected in zip(found, theirs):
        assert (expected["labels"] == 1).all()
        np.testing.assert_allclose(mine[:, 4], expected["scores"], atol=1e-5)
        np.testing.assert_allclose(np.sort(mine[:, :4], 0), np.sort(expected["boxes"], 0), atol=1e-3)
    assert len(found[0]) == 10
    assert sum(map(len, detector(FRAMES, float(found[0][0, 4])))) < sum(map(len, found))


@pytest.mark.parametrize(
    ("part", "processor"), [("detector", hf.RTDetrImageProcessor), ("depth", hf.DPTImageProcessor)]
)
def test_input_is_the_librarys_preprocessing(folder, part, processor):
    """Up to the rounding to whole grey levels that the library does between resizing and scaling."""
    mine = ModelInput.read(folder / part)(SMOOTH)
    theirs = processor.from_pretrained(folder / part)(list(SMOOTH), return_tensors="pt")["pixel_values"]
    assert mine.shape == theirs.shape
    assert (mine - theirs).abs().max() < 1.01 / 255 / min(tiny_models.MEANS["image_std"])


def test_input_without_a_preprocessor_config_takes_the_defaults(tmp_path):
    read = ModelInput.read(tmp_path, size={"height": 4, "width": 6}, do_normalize=False)
    assert (read.height, read.width) == (4, 6)
    flat = read(np.full((1, 8, 12, 3), 51, np.uint8))
    assert flat.shape == (1, 3, 4, 6)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.2))


@pytest.mark.parametrize("text", ["{", '{"size": {"shortest_edge": 800}}', '{"resample": 0}', "[]"])
def test_a_preprocessor_config_that_is_not_understood_is_refused(tmp_path, text):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(UserError, match="preprocessor_config"):
        ModelInput.read(tmp_path, do_normalize=False, size={"height": 4, "width": 4})


def test_tracker_outlines_what_the_librarys_session_outlines(folder):
    """Lazily prepared frames and several people in one session: the logits of one eager session a person."""
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

    tracker = Tracker(folder)
    boxes, start = np.array([[5, 5, 30, 40], [30, 10, 60, 40]], np.float32), 2
    logits = tracker(FRAMES, start, boxes)
    assert logits.shape == (2, *FRAMES.shape[:3])
    model = hf.Sam2VideoModel.from_pretrained(folder / "tracker").eval()
    for mine, box in zip(logits, boxes):
        session = Sam2VideoInferenceSession(tracker.input(FRAMES), 48, 72, dtype=torch.float32)
        corners = torch.tensor(box).reshape(1, 1, 2, 2) * torch.tensor([64 / 72, 64 / 48])
        points = {"point_coords": corners, "point_labels": torch.tensor([[[2, 3]]], dtype=torch.int32)}
        session.add_point_inputs(session.obj_id_to_idx(1), start, points)
        session.obj_with_new_inputs = [1]
        seen = set()
        with torch.no_grad():
            model(session, frame_idx=start)
            for reverse in (False, True):
                for out in model.propagate_in_video_iterator(session, start_frame_idx=start, reverse=reverse):
                    full = torch.nn.functional.interpolate(out.pred_masks, (48, 72), mode="bilinear")[0, 0]
                    np.testing.assert_allclose(mine[out.frame_idx], full.clamp(-100, 100), atol=2e-2, rtol=2e-3)
                    seen.add(out.frame_idx)
        assert seen == set(range(5))
    assert np.abs(logits[:, :-1] - logits[:, 1:]).mean() > 0.1  # the frames matter
    assert np.abs(logits[0] - logits[1]).mean() > 0.1  # and so do the boxes


def test_tracker_is_asked_in_the_coordinates_of_its_own_pictures(folder):
    session = Tracker(folder)._session(FRAMES, 3, np.array([[0, 0, 72, 48], [36, 12, 72, 48]], np.float32))
    asked = [session.point_inputs_per_obj[number][3] for number in (0, 1)]
    assert [inputs["point_coords"].tolist() for inputs in asked] == [[[[[0, 0], [64, 64]]]], [[[[32, 16], [64, 64]]]]]
    assert all(inputs["point_labels"].tolist() == [[[2, 3]]] for inputs in asked)  # SAM: upper left, lower right


def test_keypoint_crops_are_the_librarys(folder):
    keypoints = Keypoints(folder)
    box = np.array([20, 8, 50, 44], np.float32)
    crop = keypoints._crop(SMOOTH[0], keypoints._region(box))
    mine = keypoints.input.normalised(torch.from_numpy(crop).permute(2, 0, 1)[None].float())
    processor = hf.VitPoseImageProcessor.from_pretrained(folder / "keypoints")
    theirs = processor(SMOOTH[0], boxes=[[[20, 8, 30, 36]]], return_tensors="pt")["pixel_values"]
    assert mine.shape == theirs.shape
    inside = (slice(None), slice(None), slice(8, -8), slice(2, -2))  # the library fades out beyond the picture's edge
    assert (mine - theirs)[inside].abs().max() < 2 / 255 / min(tiny_models.MEANS["image_std"])


def test_peaks_are_the_librarys_and_exact_for_gaussians(folder):
    rng = np.random.default_rng(3)
    truth = rng.uniform([2, 2], [9, 13], (2, 17, 2))
    y, x = np.mgrid[:16, :12]
    heat = np.exp(-((x - truth[..., 0, None, None]) ** 2 + (y - truth[..., 1, None, None]) ** 2) / 8).astype(np.float32)
    boxes = [[20.0, 8.0, 30.0, 36.0], [3.0, 4.0, 20.0, 20.0]]
    keypoints = Keypoints(folder)
    regions = np.stack([keypoints._region(np.array([a, b, a + w, b + h])) for a, b, w, h in boxes])
    found = peaks(heat, regions)
    placed = regions[:, None, :2] + truth * regions[:, None, 2:] / [11, 15]
    assert np.abs(found[..., :2] - placed).max() < 0.03 * regions[:, 2:].max() / 11
    out = type("Out", (), {"heatmaps": torch.from_numpy(heat)})
    processor = hf.VitPoseImageProcessor.from_pretrained(folder / "keypoints")
    theirs = processor.post_process_pose_estimation(out, boxes=[boxes])[0]
    for mine, expected in zip(found, theirs):
        np.testing.assert_allclose(mine[:, :2], expected["keypoints"], atol=0.1)
        np.testing.assert_allclose(mine[:, 2], expected["scores"], atol=1e-6)


def test_cocos_joints_become_ours_by_name():
    coco = np.random.default_rng(0).uniform(size=(3, 17, 3)).astype(np.float32)
    joints = as_joints(coco)
    for index, name in enumerate(person_net.JOINTS):
        if name != "neck":
            assert np.array_equal(joints[:, index], coco[:, COCO.index(name)]), name
    shoulders = coco[:, [COCO.index("left_shoulder"), COCO.index("right_shoulder")]]
    neck = joints[:, person_net.JOINTS.index("neck")]
    np.testing.assert_allclose(neck[:, :2], shoulders[..., :2].mean(1))
    assert (neck[:, 2] == shoulders[..., 2].min(1)).all()


def test_keypoints_are_the_peaks_of_the_librarys_heat_maps(folder):
    keypoints = Keypoints(folder)
    boxes = np.tile(np.array([5, 5, 40, 45], np.float32), (5, 1))
    regions = np.stack([keypoints._region(box) for box in boxes])
    crops = np.stack([keypoints._crop(f, r) for f, r in zip(FRAMES, regions)])
    model = hf.VitPoseForPoseEstimation.from_pretrained(folder / "keypoints").eval()
    with torch.no_grad():
        pictures = keypoints.input.normalised(torch.from_numpy(crops).permute(0, 3, 1, 2).float())
        heat = model(pixel_values=pictures).heatmaps.numpy()
    np.testing.assert_allclose(keypoints(FRAMES, boxes), as_joints(peaks(heat, regions)), atol=1e-3)


def test_depth_is_the_librarys_and_metric_depth_is_turned_round(folder, tmp_path):
    depth = Depth(folder)
    model = hf.DepthAnythingForDepthEstimation.from_pretrained(folder / "depth").eval()
    with torch.no_grad():
        predicted = model(depth.input(FRAMES[:1])).predicted_depth[:, None]
    expected = torch.nn.functional.interpolate(predicted, (48, 72), mode="bilinear")[0, 0]
    np.testing.assert_allclose(depth(FRAMES[0]), expected, rtol=1e-4, atol=1e-12)
    shutil.copytree(folder / "depth", tmp_path / "depth")
    config = json.loads((tmp_path / "depth" / "config.json").read_text())
    (tmp_path / "depth" / "config.json").write_text(json.dumps({**config, "depth_estimation_type": "metric"}))
    assert (Depth(tmp_path)(FRAMES[0]) <= 0).all()


def square(x: float, z: float, colour: tuple[float, float, float]) -> Mesh:
    corners = torch.tensor([[[x - 0.3, -0.3, z], [x + 0.3, -0.3, z], [x + 0.3, 0.3, z], [x - 0.3, 0.3, z]]])
    return Mesh(corners, torch.tensor([[0, 1, 2], [0, 2, 3]]), torch.tensor([colour] * 4))


def test_order_by_nearness_changes_who_hides_whom_and_nothing_else():
    camera = Camera.default(64, 64)
    pair = [square(0, -2, (1, 0, 0)), square(0.3, -3, (0, 1, 0))]
    asis = render(pair, 0, camera)
    kept = render(in_order(pair, [2.0, 1.0], camera), 0, camera)
    assert np.array_equal(asis.rgba, kept.rgba)
    unknown = render(in_order(pair, [np.nan, 1.0], camera), 0, camera)
    assert np.array_equal(asis.rgba, unknown.rgba)
    turned = render(in_order(pair, [1.0, 2.0], camera), 0, camera)
    alone = [render([mesh], 0, camera).person == 0 for mesh in pair]
    both = alone[0] & alone[1]
    assert both.any()
    assert (asis.person[both] == 0).all()
    assert (turned.person[both] == 1).all()
    assert np.array_equal(turned.rgba[..., 3], asis.rgba[..., 3])
    assert np.array_equal(turned.person[~both], asis.person[~both])


# ------------------------------------------------------------------------------------------------- folders at fault


def edited(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("part", "model", "spoil", "message"),
    [
        ("detector", Detector, shutil.rmtree, "no model here, expected config.json and safetensors"),
        ("tracker", Tracker, lambda place: (place / "model.safetensors").unlink(), "no model here"),
        (
            "keypoints",
            Keypoints,
            lambda place: edited(place, model_type="bert"),
            "holds a bert model, expected vitpose",
        ),
        ("depth", Depth, lambda place: (place / "model.safetensors").write_bytes(b"\0" * 64), "cannot be loaded"),
        ("depth", Depth, lambda place: (place / "config.json").write_text("{"), "cannot be loaded"),
        ("detector", Detector, lambda place: edited(place, id2label={"0": "chair", "1": "cat"}), "no class 'person'"),
        (
            "keypoints",
            Keypoints,
            lambda place: tiny_models.keypoints(21).save_pretrained(place),
            "expected a model of the 17 COCO joints",
        ),
    ],
)
def test_a_folder_at_fault_is_one_clear_line(folder, tmp_path, part, model, spoil, message):
    shutil.copytree(folder / part, tmp_path / part)
    spoil(tmp_path / part)
    with pytest.raises(UserError, match=message) as error:
        model(tmp_path)
    assert str(tmp_path / part) in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_leave_a_layer_at_random_are_refused(folder, tmp_path, capfd):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder / "depth", tmp_path / "depth")
    weights = load_file(tmp_path / "depth" / "model.safetensors")
    weights.pop("head.conv3.weight")
    save_file(weights, tmp_path / "depth" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights .* missing, the first is head\.conv3"):
        Depth(tmp_path)
    assert capfd.readouterr().err == ""


def test_pickled_weights_are_never_loaded(folder, tmp_path):
    shutil.copytree(folder / "depth", tmp_path / "depth")
    model = tiny_models.depth()
    torch.save(model.state_dict(), tmp_path / "depth" / "pytorch_model.bin")
    (tmp_path / "depth" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no model here"):
        Depth(tmp_path)
    shutil.copy(folder / "keypoints" / "model.safetensors", tmp_path / "depth" / "other.safetensors")
    with pytest.raises(UserError, match="cannot be loaded"):
        Depth(tmp_path)
