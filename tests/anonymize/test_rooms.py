import numpy as np
import pytest
import torch

from anonymize.avatar.camera import Camera
from anonymize.studio import rooms

CAMERA = Camera.look_at((0.4, 1.3, 3.0), (0, 0.9, 0), 64, 64, 77)


@pytest.mark.parametrize("kind", rooms.KINDS)
def test_every_kind_is_a_lit_and_varied_picture(kind):
    picture = rooms.background(rooms.draw_room(kind, 0), CAMERA)
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8
    assert 60 < picture.mean() < 220
    assert picture.std() > 20


def test_there_are_ten_kinds_that_differ():
    pictures = np.stack([rooms.background(rooms.draw_room(kind, 0), CAMERA).astype(float) for kind in rooms.KINDS])
    assert len(pictures) >= 10
    apart = np.abs(pictures[:, None] - pictures[None]).mean((2, 3, 4))
    assert apart[~np.eye(len(pictures), dtype=bool)].min() > 10


def test_a_room_follows_from_its_seed():
    first, again, other = (rooms.draw_room("kitchen", seed) for seed in (5, 5, 6))
    assert first == again
    assert first != other
    np.testing.assert_array_equal(rooms.background(first, CAMERA), rooms.background(again, CAMERA))


def test_the_floor_is_where_the_camera_projects_it():
    _, floor = rooms.look(rooms.draw_room("park", 1), CAMERA)
    rows, columns = np.nonzero(np.isfinite(floor[..., 0]))
    x, z = floor[rows, columns].T
    pixels = CAMERA.project(torch.tensor(np.stack([x, 0 * x, z], -1), dtype=torch.float64)).numpy()
    np.testing.assert_allclose(pixels, np.stack([columns, rows], -1) + 0.5, atol=1e-2)
    assert len(rows) > 64 * 64 / 4


def test_the_camera_sees_a_box_where_it_stands():
    red = rooms.Box((-0.3, 0, -0.3), (0.3, 1.0, 0.3), rooms.Paint("stripes", (1.0, 0.0, 0.0), (1.0, 0.0, 0.0)))
    plain = rooms.Paint("plain", (0.2, 0.2, 0.2))
    room = rooms.Room("hallway", (red,), plain, plain, 2.5, 2.0, (1.0, -0.5), 1.0)
    picture = rooms.background(room, CAMERA).astype(int)
    seen = picture[..., 0] > 120
    corners = np.array([[x, y, z] for x in (-0.3, 0.3) for y in (0, 1) for z in (-0.3, 0.3)])
    pixels = CAMERA.project(torch.tensor(corners)).numpy()
    rows, columns = np.nonzero(seen)
    assert abs(columns.min() - pixels[:, 0].min()) < 1.5
    assert abs(columns.max() + 1 - pixels[:, 0].max()) < 1.5
    assert abs(rows.min() - pixels[:, 1].min()) < 1.5
    assert abs(rows.max() + 1 - pixels[:, 1].max()) < 1.5
