import numpy as np
import pytest
import torch

from anonymize.avatar.body import Body
from anonymize.avatar.camera import Camera
from anonymize.avatar.pose import Pose
from anonymize.avatar.render import Mesh, render, silhouette, vertex_normals

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def body_mesh() -> Mesh:
    body = Body()
    colours = torch.rand(len(body.template), 3, generator=torch.Generator().manual_seed(0))
    return Mesh(body(torch.zeros(10), Pose.rest(2)).vertices, body.faces, colours)


def square(z: float, half: float, colour, x: float = 0.0) -> Mesh:
    """A square that faces the default camera, `z` metres before it."""
    corners = torch.tensor([[-half, -half], [half, -half], [half, half], [-half, half]])
    vertices = torch.cat([corners + torch.tensor([x, 0.0]), torch.full((4, 1), -z)], 1)[None]
    return Mesh(vertices, torch.tensor([[0, 1, 2], [0, 2, 3]]), torch.tensor([colour] * 4, dtype=torch.float32))


def camera_before(width: int = 96, height: int = 64) -> Camera:
    return Camera.look_at((0.5, 0.1, 2.8), (0, -0.4, 0), width, height, 1.1 * height)


def test_rgb_is_zero_where_alpha_is_zero_and_the_layers_agree(body_mesh):
    seen = render([body_mesh], 0, camera_before())
    alpha = seen.rgba[..., 3]
    assert seen.rgba.shape == (64, 96, 4)
    assert seen.rgba.dtype == np.uint8
    assert (seen.rgba[alpha == 0] == 0).all()
    assert 0 < (alpha == 255).sum() < alpha.size
    np.testing.assert_array_equal(np.isfinite(seen.depth), alpha > 0)
    np.testing.assert_array_equal(seen.person == 0, alpha > 0)
    assert set(np.unique(alpha)) <= {0, 64, 128, 191, 255}  # coverage by 2 x 2 samples


def test_coverage_agrees_with_camera_project():
    rng = np.random.default_rng(1)
    camera = Camera.default(40, 30)
    y, x = np.mgrid[:30, :40] + 0.5
    for _ in range(20):
        vertices = np.concatenate([rng.uniform(-1.5, 1.5, (3, 2)), rng.uniform(-5, -1, (3, 1))], 1).astype(np.float32)
        vertices = torch.from_numpy(vertices)
        projected = camera.project(vertices).double().numpy()
        (ax, ay), (bx, by), (cx, cy) = projected
        if (bx - ax) * (cy - ay) - (cx - ax) * (by - ay) > 0:
            vertices, projected = vertices[[0, 2, 1]], projected[[0, 2, 1]]
        points = np.stack([x, y], -1)
        edge = [projected[(k + 1) % 3] - projected[k] for k in range(3)]
        turn = np.stack([e[0] * (points - p)[..., 1] - e[1] * (points - p)[..., 0] for e, p in zip(edge, projected)])
        expected, clear = (turn < 0).all(0), (np.abs(turn) > 1e-3).all(0)
        mesh = Mesh(vertices[None], torch.tensor([[0, 1, 2]]), torch.ones(3, 3))
        seen = render([mesh], 0, camera, samples=1)
        np.testing.assert_array_equal((seen.rgba[..., 3] > 0)[clear], expected[clear])
        np.testing.assert_array_equal(silhouette(vertices, mesh.faces, camera).numpy(), seen.rgba[..., 3] > 0)


def test_adjacent_faces_leave_neither_gap_nor_overlap():
    # A fan of slivers around a vertex tiles the square exactly, so its silhouette is that of the square.
    turn = np.linspace(0, 2 * np.pi, 258)[:-1]
    rim = np.stack([np.cos(turn), np.sin(turn)], 1) / np.abs([np.cos(turn), np.sin(turn)]).max(0)[:, None]
    vertices = np.concatenate([[[0.03, -0.07]], rim]).astype(np.float32)
    vertices = torch.from_numpy(np.concatenate([vertices, np.full((258, 1), -2.0, np.float32)], 1))
    ring = torch.arange(257) + 1
    faces = torch.stack([torch.zeros(257, dtype=torch.int64), ring, ring.roll(-1)], 1)
    camera = Camera(64, 64, 60.3)
    alpha = render([Mesh(vertices[None], faces, torch.ones(258, 3))], 0, camera).rgba[..., 3]
    rows, columns = np.nonzero(alpha == 255)
    assert (alpha[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] == 255).all()
    assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)


def test_the_nearer_person_covers_the_farther_in_any_order():
    near, far = square(2.0, 0.3, (1, 0, 0)), square(3.0, 1.0, (0, 1, 0))
    camera = Camera(64, 64, 60)
    one, two = render([near, far], 0, camera), render([far, near], 0, camera)
    np.testing.assert_array_equal(one.rgba, two.rgba)
    np.testing.assert_array_equal(one.depth, two.depth)
    assert one.person[32, 32] == 0
    assert two.person[32, 32] == 1
    assert one.person[32, 15] == 1
    np.testing.assert_allclose(one.depth[32, 32], 2, rtol=1e-5)
    np.testing.assert_allclose(one.depth[32, 15], 3, rtol=1e-5)
    assert one.rgba[32, 32, 0] > 0 == one.rgba[32, 32, 1]


def test_depth_is_that_of_the_plane_under_perspective():
    vertices = torch.tensor([[[-1.0, -1, -2], [1, -1, -2], [1, 1, -6], [-1, 1, -6]]])  # a ramp: z = 4 + 2 y
    mesh = Mesh(vertices, torch.tensor([[0, 1, 2], [0, 2, 3]]), torch.ones(4, 3))
    camera = Camera(50, 50, 60)
    seen = render([mesh], 0, camera, samples=1)
    rows, columns = np.nonzero(seen.rgba[..., 3])
    up = (25 - rows - 0.5) / 60
    np.testing.assert_allclose(seen.depth[rows, columns], 4 / (1 - 2 * up), rtol=1e-4)


def test_alpha_is_coverage():
    camera = Camera(10, 10, 10)
    mesh = square(1.0, 0.275, (1, 1, 1))  # 2.75 pixels either way from the centre
    alpha = render([mesh], 0, camera, samples=8).rgba[..., 3] / 255
    np.testing.assert_allclose(alpha.sum(), 5.5**2, rtol=0.01)
    np.testing.assert_allclose(alpha[5, 2], 0.75, atol=0.01)


def test_colour_is_straight_not_premultiplied():
    rgba = render([square(1.0, 0.275, (1, 0.5, 0.2))], 0, Camera(10, 10, 10), samples=8).rgba
    partial = rgba[(rgba[..., 3] > 0) & (rgba[..., 3] < 255), :3].astype(int)
    assert len(partial)
    assert np.abs(partial - rgba[5, 5, :3]).max() <= 1


def test_mesh_colours_are_looked_up_by_cell():
    mesh = square(1.0, 0.5, (1, 1, 1))
    colours = torch.zeros(2, 2, 2, 3)
    colours[0, 1, 0] = torch.tensor([1.0, 0, 0])  # first face, around its second corner: bottom right
    seen = render([Mesh(mesh.vertices, mesh.faces, colours)], 0, Camera(40, 40, 40), samples=1)
    red = seen.rgba[..., 0] > 0
    assert red[35, 37]
    assert not red[:20].any()
    assert not red[:, :18].any()


@pytest.mark.parametrize("target", [(0, -0.4, 6.0), (3.0, -0.4, 0), (0, 2.5, 0)])
def test_people_behind_or_beside_the_camera_do_no_harm(body_mesh, target):
    camera = Camera.look_at((0, -0.4, 1.0), target, 48, 80, 60)
    seen = render([body_mesh], 1, camera)
    assert (seen.rgba[seen.rgba[..., 3] == 0] == 0).all()
    assert not (seen.depth <= 0).any()


def test_a_camera_inside_the_body_and_an_empty_scene(body_mesh):
    render([body_mesh], 0, Camera.look_at((0, -0.3, 0.0), (0, -0.3, 1.0), 64, 64, 60))
    seen = render([], 0, Camera.default(8, 4))
    assert seen.rgba.shape == (4, 8, 4)
    assert not seen.rgba.any()
    assert np.isinf(seen.depth).all()
    assert (seen.person == -1).all()


def test_equal_input_gives_equal_bytes(body_mesh):
    one, two = (render([body_mesh, square(3, 2, (0, 0, 1))], 0, camera_before()) for _ in range(2))
    for name in ("rgba", "depth", "person"):
        assert getattr(one, name).tobytes() == getattr(two, name).tobytes()


def test_the_back_of_a_face_is_not_drawn():
    mesh = square(2.0, 0.5, (1, 1, 1))
    flipped = Mesh(mesh.vertices, mesh.faces[:, [0, 2, 1]], mesh.colours)
    assert render([mesh], 0, Camera(32, 32, 32)).rgba.any()
    assert not render([flipped], 0, Camera(32, 32, 32)).rgba.any()


def test_normals_of_a_plane_and_a_body(body_mesh):
    plane = square(2.0, 0.5, (1, 1, 1))
    torch.testing.assert_close(vertex_normals(plane.vertices[0], plane.faces), torch.tensor([[0.0, 0, 1]] * 4))
    normals = vertex_normals(body_mesh.vertices[0], body_mesh.faces)
    torch.testing.assert_close(normals.norm(dim=1), torch.ones(len(normals)))
