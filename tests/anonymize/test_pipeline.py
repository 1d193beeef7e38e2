"""One clip through stage 1: non-interference, and what happens where something fails."""

import dataclasses

import numpy as np
import pytest
import torch

from anonymize.avatar.body import Body
from anonymize.avatar.camera import Camera
from anonymize.avatar.pose import Pose
from anonymize.avatar.render import silhouette
from anonymize.avatar.wardrobe import Avatar, Wardrobe
from anonymize.config import AvatarConfig, LimitsConfig, PipelineConfig
from anonymize.fitting.fit import Fit, FitConfig
from anonymize.people import People, Person
from anonymize.pipeline import Anonymizer, identity_key, render_public
from anonymize.refine.refiner import ControlNetConfig
from maskdp import layers

SIZE, FRAMES = 64, 4
CAMERA = Camera.default(SIZE, SIZE)
SECRET = b"\7" * 32
SPARSE = np.zeros((SIZE, SIZE), bool)
SPARSE[::3, ::3] = True


@dataclasses.dataclass
class Fixed:
    """A finder that always finds these people, whatever the pixels."""

    people: People

    def find(self, frames: np.ndarray, fps: float) -> People:
        return self.people


@pytest.fixture(scope="module")
def body() -> Body:
    torch.set_num_threads(1)
    return Body()


@pytest.fixture(scope="module")
def anonymizer() -> Anonymizer:
    return Anonymizer(PipelineConfig(fit=FitConfig(library=400, steps=10, iou_floor=0.2)), SECRET, Fixed(None))


def standing(*positions: tuple[float, float]) -> list[Pose]:
    """People who stand at x, z (metres, camera at the origin looking along -z), arms out."""
    return [
        dataclasses.replace(Pose.rest(FRAMES), transl=np.tile([x, 0.2, z], (FRAMES, 1)).astype(np.float32))
        for x, z in positions
    ]


def people(body: Body, poses: list[Pose], **changes) -> People:
    """What a perfect finder makes of them."""
    persons = []
    for track, pose in enumerate(poses):
        vertices = body(torch.zeros(10), pose).vertices
        masks = np.stack([silhouette(points, body.faces, CAMERA).numpy() for points in vertices])
        boxes = np.zeros((FRAMES, 4), np.float32)
        persons.append(Person(track, masks.any((1, 2)), boxes, masks, np.zeros((FRAMES, 14, 3), np.float32)))
    removal = np.any([person.masks for person in persons], 0)
    background = np.full((SIZE, SIZE, 3), 90, np.uint8)
    found = People(tuple(persons), removal, True, background, np.ones((SIZE, SIZE), bool), None, {})
    return dataclasses.replace(found, **changes)


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (FRAMES, SIZE, SIZE, 3), np.uint8)


def run(anonymizer: Anonymizer, found: People, frames: np.ndarray, **changes):
    anonymizer.finder = Fixed(found)
    anonymizer.config = dataclasses.replace(anonymizer.config, **changes)
    return anonymizer.clip(frames, 25.0, "video")


def test_public_layer_does_not_change_when_every_source_pixel_does(anonymizer, body):
    """Non-interference: the same people in two clips that share no pixel give the same public bytes."""
    found = people(body, standing((0, -3)))
    one, two = run(anonymizer, found, noise(1)), run(anonymizer, found, noise(2))
    assert one.status == two.status == "written"
    assert one.rgba.tobytes() == two.rgba.tobytes()
    assert not np.array_equal(one.private, two.private)
    layers.check_layers(one.rgba, one.private, "clip")


def test_render_public_is_a_function_of_poses_camera_and_avatars_drawn_from_keys(body):
    poses = standing((0, -3))
    fits = [Fit(pose, np.ones(FRAMES, bool), np.ones(FRAMES)) for pose in poses]

    def avatar(key, body=body, secret=SECRET):
        return Avatar(body, Wardrobe(secret).identity(key))

    rgba, *_ = render_public(fits, [avatar("a")], CAMERA)
    again, *_ = render_public(fits, [avatar("a", Body())], CAMERA)
    assert rgba.tobytes() == again.tobytes()
    other, *_ = render_public(fits, [avatar("b")], CAMERA)
    assert not np.array_equal(rgba, other)
    unguessable, *_ = render_public(fits, [avatar("a", secret=b"other" * 8)], CAMERA)
    assert not np.array_equal(rgba, unguessable)


def test_the_nearer_avatar_hides_the_farther_one(body):
    """Whatever the order in which they are given; and a gap in one person's poses hides only that one."""
    near, far = standing((0, -2.5), (0.1, -4))
    ok = np.ones(FRAMES, bool)
    fits = {"near": Fit(near, ok, ok.astype(float)), "far": Fit(far, ok, ok.astype(float))}

    def drawn(*keys):
        avatars = [Avatar(body, Wardrobe(SECRET).identity(key)) for key in keys]
        return render_public([fits[key] for key in keys], avatars, CAMERA)[0]

    both, alone = drawn("near", "far"), drawn("near")
    assert np.array_equal(both, drawn("far", "near"))
    opaque = alone[..., 3] == 255
    assert np.array_equal(both[opaque], alone[opaque])
    assert (both[..., 3] > 0).sum() > (alone[..., 3] > 0).sum()
    fits["far"] = dataclasses.replace(fits["far"], ok=np.array([True, False, True, True]))
    gap = drawn("near", "far")
    assert np.array_equal(gap[1], alone[1])
    assert np.array_equal(gap[[0, 2, 3]], both[[0, 2, 3]])


def test_a_person_without_a_pose_is_removed_and_gets_no_avatar(anonymizer, body):
    found = people(body, standing((0, -3)))
    masks = found.persons[0].masks.copy()
    masks[2] &= SPARSE  # there, but like no body
    found = dataclasses.replace(found, persons=(dataclasses.replace(found.persons[0], masks=masks),))
    frames = np.full((FRAMES, SIZE, SIZE, 3), 90, np.uint8)
    frames[found.removal] = (255, 0, 0)
    result = run(anonymizer, found, frames)
    assert result.reason is None
    assert result.frames_without_pose == 1
    assert not result.rgba[2].any()
    assert result.rgba[[0, 1, 3], ..., 3].any((1, 2)).all()
    assert (result.private[..., 0] < 200).all()  # no red anywhere: removed in every frame


def test_a_clip_over_the_limit_of_frames_without_pose_is_quarantined(anonymizer, body):
    found = people(body, standing((0, -3)))
    masks = found.persons[0].masks.copy()
    masks[1:] &= SPARSE
    found = dataclasses.replace(found, persons=(dataclasses.replace(found.persons[0], masks=masks),))
    result = run(anonymizer, found, noise(0), limits=LimitsConfig(max_without_pose=0.5))
    assert (result.status, result.rgba, result.private) == ("quarantined", None, None)
    assert result.reason == "75% of the frames show a person who could not be re-posed"
    assert run(anonymizer, found, noise(0), limits=LimitsConfig(max_without_pose=0.8)).status == "written"


def test_a_frame_whose_removal_failed_is_blanked_and_too_many_quarantine(anonymizer, body):
    found = people(body, standing((0, -3)))
    found.removal[0] = True
    result = run(anonymizer, found, noise(1), limits=LimitsConfig(max_blanked=0.25))
    assert (result.status, result.frames_blanked, result.reason) == ("written", 1, None)
    assert np.ptp(result.private[0]) == 0
    found.removal[1] = True
    result = run(anonymizer, found, noise(1), limits=LimitsConfig(max_blanked=0.25))
    assert (result.status, result.frames_blanked, result.private) == ("quarantined", 2, None)


@pytest.mark.parametrize(
    ("changes", "reason"), [({"doubt": "a face is left"}, "a face is left"), ({"persons": ()}, "no person found")]
)
def test_doubt_and_emptiness_are_quarantined(anonymizer, body, changes, reason):
    result = run(anonymizer, people(body, standing((0, -3)), **changes), noise(0))
    assert (result.status, result.reason, result.rgba) == ("quarantined", reason, None)


def test_identities_follow_the_track_or_where_asked_the_subject():
    track, subject = AvatarConfig(identity="track"), AvatarConfig(identity="subject")
    assert identity_key("v", 0, ("ann",), track) != identity_key("v", 1, ("ann",), track)
    assert identity_key("v", 0, ("ann",), track) != identity_key("w", 0, ("ann",), track)
    assert identity_key("v", 0, ("ann",), subject) == identity_key("w", 3, ("ann",), subject)
    assert identity_key("v", 0, ("ann", "bob"), subject) == identity_key("v", 0, (), track)


def test_a_refined_public_layer_does_not_change_with_the_source_unless_it_looks_at_the_scene(anonymizer, body, tiny):
    """Non-interference by bytes, with two people and a real ControlNet pipeline; and alpha is the rendered one."""
    found = people(body, standing((-0.4, -3), (0.5, -3.5)))
    rendered = run(anonymizer, found, noise(1))

    def refined(seed: int, context: str):
        refiner = ControlNetConfig(
            folder=tiny("sd_control"), controls=("pose",), steps=1, strength=1.0, size=64, context=context
        )
        anonymizer.refiner = refiner.load()
        try:
            return run(anonymizer, found, noise(seed), refine=refiner)
        finally:
            anonymizer.refiner = None

    one, two = refined(1, "none"), refined(2, "none")
    assert one.rgba.tobytes() == two.rgba.tobytes()
    assert not np.array_equal(one.private, two.private)
    assert np.array_equal(one.rgba[..., 3], rendered.rgba[..., 3])
    assert not np.array_equal(one.rgba, rendered.rgba)
    layers.check_layers(one.rgba, one.private, "clip")
    assert refined(1, "scene").rgba.tobytes() != refined(2, "scene").rgba.tobytes()
