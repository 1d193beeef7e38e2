import dataclasses

import numpy as np
import pytest
import torch

from anonymize.avatar.body import Body
from anonymize.avatar.camera import Camera
from anonymize.avatar.pose import Pose
from anonymize.avatar.render import Mesh, render
from anonymize.avatar.wardrobe import HAIR_STYLES, MAX_BETA, Avatar, Identity, Wardrobe, draw_identity

torch.set_num_threads(1)
SECRET = bytes(range(32))


@pytest.fixture(scope="module")
def body() -> Body:
    return Body()


def arms_down(frames: int = 1) -> Pose:
    pose = Pose.rest(frames)
    pose.body_pose[:, [47, 50]] = [-1.1, 1.1]
    return pose


def look(body: Body, identity: Identity) -> np.ndarray:
    camera = Camera.look_at((0.4, -0.2, 3.0), (0, -0.42, 0), 48, 96, 140)
    return render([Avatar(body, identity).mesh(arms_down())], 0, camera).rgba


def test_an_identity_is_a_function_of_secret_and_key_alone():
    first = Wardrobe(SECRET)
    order = [first.identity(key) for key in ("a", "b", "a")]
    np.random.seed(5)  # noqa: NPY002 (the global state must not matter)
    assert order[0] == order[2] == Wardrobe(SECRET).identity("a")
    assert order[1] == Wardrobe(SECRET).identity("b") != order[0]
    assert Wardrobe(SECRET[::-1]).identity("a") != order[0]


def test_the_secret_is_not_shown(caplog):
    wardrobe = Wardrobe(b"correct horse battery staple")
    for text in (repr(wardrobe), str(wardrobe), f"{wardrobe}", repr(wardrobe.identity("k"))):
        assert "horse" not in text
    assert not hasattr(wardrobe, "__dict__")
    with pytest.raises(ValueError, match="secret") as error:
        Wardrobe(b"hunter2")
    assert "hunter2" not in str(error.value)
    assert not caplog.records


def test_every_draw_is_within_bounds():
    rng = np.random.default_rng(0)
    drawn = [draw_identity(rng) for _ in range(200)]
    assert all(max(map(abs, who.betas)) <= MAX_BETA for who in drawn)
    assert {who.hair_style for who in drawn} == set(HAIR_STYLES)
    assert {who.skirt for who in drawn} == {True, False}
    assert len({who.skin for who in drawn}) == len(drawn)


def test_twelve_identities_look_different(body):
    wardrobe = Wardrobe(SECRET)
    looks = [look(body, wardrobe.identity(f"person {k}")).astype(float) for k in range(12)]
    for i, one in enumerate(looks):
        for other in looks[:i]:
            assert np.abs(one - other).mean() > 3


@pytest.mark.parametrize("style", HAIR_STYLES)
def test_avatars_are_whole_in_every_style(body, style):
    who = dataclasses.replace(Wardrobe(SECRET).identity("x"), hair_style=style, skirt=style in ("bob", "long"))
    rng = np.random.default_rng(0)
    pose = Pose(**{name: 0.3 * rng.standard_normal((2, width)) for name, width in Pose.WIDTHS.items()})
    mesh = Avatar(body, who).mesh(pose)
    assert mesh.vertices.shape[0] == 2
    assert mesh.vertices.dtype == torch.float32
    assert mesh.vertices.isfinite().all()
    assert mesh.faces.max() < mesh.vertices.shape[1]
    assert len(mesh.colours) == len(mesh.faces)
    assert mesh.colours.min() >= 0
    assert mesh.colours.max() <= 1


def test_clothes_leave_no_hole_in_the_figure(body):
    """Every pixel that the naked body covers is covered by the dressed one."""
    who = dataclasses.replace(Wardrobe(SECRET).identity("x"), skirt=False, hair_style="short")
    avatar, camera = Avatar(body, who), Camera.look_at((0.8, -0.2, 2.8), (0, -0.42, 0), 96, 160, 190)
    bare = render([avatar_body(body, avatar)], 0, camera).rgba[..., 3] == 255
    dressed = render([avatar.mesh(arms_down())], 0, camera).rgba[..., 3]
    assert (dressed[bare] < 255).mean() < 0.002


def avatar_body(body: Body, avatar: Avatar):
    return Mesh(body(avatar.betas, arms_down()).vertices, body.faces, torch.ones(len(body.template), 3))


def test_equal_identities_give_equal_bytes(body):
    who = Wardrobe(SECRET).identity("x")
    assert look(body, who).tobytes() == look(body, who).tobytes()
