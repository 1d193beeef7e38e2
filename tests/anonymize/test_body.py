import contextlib
import io

import numpy as np
import pytest
import smplx
import torch

from anonymize.avatar.body import EMBEDDED, JOINTS, VERTICES, Body
from anonymize.avatar.pose import Pose
from maskdp.errors import UserError

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def body() -> Body:
    return Body()


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(EMBEDDED, allow_pickle=False) as file:
        return dict(file)


def random_pose(frames: int, seed: int = 0) -> Pose:
    rng = np.random.default_rng(seed)
    return Pose(**{name: 0.4 * rng.standard_normal((frames, width)) for name, width in Pose.WIDTHS.items()})


def test_smplx_loads_the_embedded_model_and_agrees_with_body(body):
    frames, pose = 3, random_pose(3)
    betas = torch.linspace(-1.5, 1.5, 10)
    with contextlib.redirect_stdout(io.StringIO()):
        oracle = smplx.create(
            str(EMBEDDED), "smplx", use_pca=False, flat_hand_mean=True, num_betas=10, batch_size=frames
        )
    expected = oracle(betas=betas.expand(frames, -1), **{k: torch.from_numpy(v) for k, v in pose.arrays().items()})
    mesh = body(betas, pose)
    torch.testing.assert_close(mesh.vertices, expected.vertices.detach(), atol=2e-6, rtol=0)
    torch.testing.assert_close(mesh.joints, expected.joints[:, : JOINTS + 21].detach(), atol=2e-6, rtol=0)
    assert mesh.vertices.shape == (frames, VERTICES, 3)
    assert mesh.vertices.dtype == torch.float32


def test_surface_is_closed_and_faces_outward(body):
    faces = body.faces.numpy()
    edges = faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)
    forward = {tuple(edge) for edge in edges.tolist()}
    assert len(forward) == len(edges)  # each directed edge once...
    assert all((b, a) in forward for a, b in forward)  # ...and its reverse once: watertight
    a, b, c = body.template[body.faces].double().unbind(1)
    volume = (a * torch.linalg.cross(b, c)).sum() / 6
    assert 0.05 < volume < 0.09  # cubic metres
    assert len(np.unique(faces)) == VERTICES


def test_proportions_and_symmetry(body):
    height = np.ptp(body.template[:, 1].numpy())
    assert 1.6 < height < 1.85
    mirrored = body.template * torch.tensor([-1.0, 1, 1])
    gap = torch.cdist(mirrored[::7], body.template).min(1).values
    assert gap.max() < 0.02
    assert gap.mean() < 0.006


def test_joint_regressor_puts_joints_inside_and_moves_them_with_the_shape(body, arrays):
    np.testing.assert_allclose(arrays["J_regressor"].sum(1), 1, atol=1e-5)
    _, joints = body.shaped(torch.zeros(10))
    left, right = joints[[1, 4, 7, 16, 18, 20, 25, 37]], joints[[2, 5, 8, 17, 19, 21, 40, 52]]
    torch.testing.assert_close(left * torch.tensor([-1.0, 1, 1]), right, atol=1e-4, rtol=0)
    tall, _ = body.shaped(torch.eye(10)[0])
    assert np.ptp(tall[:, 1].numpy()) > np.ptp(body.template[:, 1].numpy()) + 0.03


def test_weights_are_a_partition_of_unity_over_few_bones(body):
    assert (body.weights >= 0).all()
    torch.testing.assert_close(body.weights.sum(1), torch.ones(VERTICES))
    assert (body.weights > 0).sum(1).max() <= 4


def test_named_vertices_are_where_they_say(body):
    joints = body(torch.zeros(10), Pose.rest(1)).joints[0]
    nose, right_eye, left_eye, right_ear, left_ear = joints[55:60]
    head = body.template[body.weights[:, 15] > 0.9]
    assert nose[2] > head[:, 2].max() - 0.01
    assert left_eye[0] > 0 > right_eye[0]
    assert left_ear[0] > head[:, 0].max() - 0.02
    assert right_ear[0] < head[:, 0].min() + 0.02
    assert joints[[62, 65], 2].max() < 0 < joints[[60, 63], 2].min()  # heels behind, big toes ahead
    tips, last = joints[66:76], joints[[39, 27, 30, 36, 33, 54, 42, 45, 51, 48]]
    assert (tips - last).norm(dim=1).min() > 0.01
    assert (tips - last).norm(dim=1).max() < 0.04


def test_translation_and_orientation_are_rigid(body):
    pose = random_pose(2)
    moved = Pose(**pose.arrays() | {"transl": pose.transl + np.float32([1, 2, 3])})
    shift = body(torch.zeros(10), moved).vertices - body(torch.zeros(10), pose).vertices
    torch.testing.assert_close(shift, torch.tensor([1.0, 2, 3]).expand_as(shift), atol=1e-5, rtol=0)


def test_forward_is_differentiable_in_shape_and_pose(body):
    tensors = {name: torch.from_numpy(value).requires_grad_() for name, value in random_pose(2).arrays().items()}
    betas = torch.zeros(10, requires_grad=True)
    body.forward(betas, **tensors).vertices.square().sum().backward()
    for value in (betas, *tensors.values()):
        assert value.grad.isfinite().all()
        assert value.grad.abs().sum() > 0


def test_shapes_within_bounds_keep_the_surface_sane(body):
    a, b, c = body.template[body.faces].unbind(1)
    normal = torch.linalg.cross(b - a, c - a)
    rng = np.random.default_rng(0)
    for betas in torch.from_numpy(rng.choice([-1.5, 1.5], (8, 10)).astype(np.float32)):
        a, b, c = body.shaped(betas)[0][body.faces].unbind(1)
        flipped = (torch.linalg.cross(b - a, c - a) * normal).sum(1) < 0
        assert flipped.float().mean() < 0.005


@pytest.mark.parametrize("spoil", ["missing", "text", "key", "shape", "pickle"])
def test_a_bad_model_file_is_one_clear_line(tmp_path, arrays, spoil):
    path = tmp_path / "SMPLX_NEUTRAL.npz"
    if spoil == "text":
        path.write_text("not a model")
    elif spoil != "missing":
        spoilt = dict(arrays)
        if spoil == "key":
            del spoilt["weights"]
        elif spoil == "shape":
            spoilt["v_template"] = spoilt["v_template"][:6890]
        else:
            spoilt["weights"] = np.array({"unpickled": True}, dtype=object)
        np.savez(path, **spoilt)
    with pytest.raises(UserError, match=r"SMPLX_NEUTRAL\.npz: .*SMPL-X") as error:
        Body(path)
    assert "\n" not in str(error.value)


def test_a_model_with_pickled_extras_loads_without_unpickling(tmp_path, arrays):
    path = tmp_path / "SMPLX_NEUTRAL.npz"
    np.savez(path, **arrays, part2num=np.array({"as official files": 1}, dtype=object))
    torch.testing.assert_close(Body(path).template, Body().template)
