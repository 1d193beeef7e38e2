"""The BlazePose finder on rendered people: found, followed, covered; and what it cannot rely on."""

import cv2
import numpy as np
import pytest
import torch

from anonymize.avatar.body import Body
from anonymize.avatar.camera import Camera
from anonymize.avatar.render import render
from anonymize.avatar.wardrobe import Avatar, draw_identity
from anonymize.people.blazepose import models, wheel
from anonymize.people.blazepose.crops import Crop
from anonymize.people.blazepose.finder import ENDS, HIPS, BlazePoseFinder, is_an_arm, joined
from anonymize.people.blazepose.landmarks import NAMES, Sighting
from anonymize.people.blazepose.smooth import one_euro
from anonymize.people.blazepose.tracks import Track
from anonymize.scene.removal import remove
from anonymize.studio import motions

pytestmark = pytest.mark.skipif(
    not wheel.complete(models.default_folder()),
    reason="BlazePose's models are not here: maskdp weights fetch blazepose",
)
FPS = 12.0


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def room(width: int = 256) -> np.ndarray:
    rng = np.random.default_rng(4)
    room = np.full((192, width, 3), (205, 200, 190), float)
    room[136:] = (120, 105, 95)
    room[32:96, 24:72] = (150, 170, 190)
    room[48:160, width - 60 : width - 20] = (160, 130, 100)
    room += cv2.GaussianBlur(rng.normal(0, 60, room.shape), (0, 0), 2)
    return room.clip(0, 255).astype(np.uint8)


def film(paths: list[tuple[float, float, float]], total: int = 24, pan: int = 0):
    """People who walk from x to x at a depth z, in a room that the camera pans over: frames, masks (P, T, H, W)."""
    rng = np.random.default_rng(0)
    camera = Camera.look_at((0, 1.1, 4.2), (0, 0.9, 0), 256, 192, 300)
    wide = room(256 + pan * total)
    meshes = []
    for k, (start, stop, depth) in enumerate(paths):
        shift = np.zeros((total, 3))
        shift[:, 0], shift[:, 2] = np.linspace(start, stop, total), depth
        pose = motions.move(motions.ACTIONS["walk"](rng, total, FPS), shift)
        meshes.append(Avatar(Body(), draw_identity(np.random.default_rng(k + 3))).mesh(pose))
    frames, truth = [], np.zeros((len(paths), total, 192, 256), bool)
    for t in range(total):
        rendering = render(meshes, t, camera)
        alpha = rendering.rgba[..., 3:] / 255
        view = wide[:, pan * t : pan * t + 256]
        frame = view * (1 - alpha) + rendering.rgba[..., :3] * alpha + rng.normal(0, 2, view.shape)
        frames.append(frame.clip(0, 255).astype(np.uint8))
        for k in range(len(paths)):
            truth[k, t] = rendering.person == k
    return np.stack(frames), truth


@pytest.fixture(scope="module")
def finder() -> BlazePoseFinder:
    return BlazePoseFinder()


@pytest.fixture(scope="module")
def crossing(finder):
    frames, truth = film([(-1.1, 1.1, 0.0), (1.1, -1.1, -1.2)])
    return frames, truth, finder.find(frames, FPS)


def test_two_people_who_cross_are_followed_and_covered(crossing):
    _, truth, people = crossing
    assert people.doubt is None
    assert len(people.persons) == 2
    assert people.removal[truth.any(0)].mean() > 0.999
    partners = set()
    for mask in truth:
        visible = np.flatnonzero(mask.sum((1, 2)) > 600)
        overlap = [
            np.mean([(p.masks[t] & mask[t]).sum() / max((p.masks[t] | mask[t]).sum(), 1) for t in visible])
            for p in people.persons
        ]
        partners.add(int(np.argmax(overlap)))
        assert max(overlap) > 0.6
    assert partners == {0, 1}


def test_landmarks_lie_on_the_person_and_absent_frames_have_none(crossing):
    _, truth, people = crossing
    for person in people.persons:
        assert np.isnan(person.landmarks.image[~person.present, :, :2]).all()
        assert not person.landmarks.image[~person.present, :, 2].any()
        assert np.isnan(person.boxes[~person.present]).all()
        assert np.isfinite(person.landmarks.world[person.present]).all()
        for t in np.flatnonzero(person.present):
            hips = person.landmarks.image[t, [NAMES.index("left_hip"), NAMES.index("right_hip")], :2].mean(0)
            near = cv2.dilate(truth.any(0)[t].astype(np.uint8), np.ones((9, 9)))
            assert near[tuple(hips.round().astype(int)[::-1])]
            assert person.masks[t].any()


def test_the_room_is_restored_without_a_person(crossing):
    frames, truth, people = crossing
    result = remove(frames, people)
    assert result.doubt is None
    error = np.abs(result.frames.astype(int) - room()).max(-1)[truth.any(0) & people.known]
    assert np.quantile(error, 0.95) < 20


def test_a_panning_camera_is_no_doubt(finder):
    frames, truth = film([(-0.6, 0.6, 0.0)], total=16, pan=4)
    people = finder.find(frames, FPS)
    assert people.doubt is None
    assert not people.static_camera
    assert len(people.persons) == 1
    assert people.removal[truth[0]].mean() > 0.999


def test_an_empty_room_is_a_doubt(finder):
    frames = np.repeat(room()[None], 12, 0)
    people = finder.find(frames, FPS)
    assert people.doubt == "no person found"
    assert people.removal.mean() < 0.2


# ---------------------------------------------------------------------------------------------- tracks and smoothing


def sighting(x: float, side: float = 60.0) -> Sighting:
    image = np.full((39, 5), 0.9, np.float32)
    image[:, :2] = x, 50
    world, outline = np.zeros((39, 3), np.float32), np.zeros((8, 8), np.uint8)
    return Sighting(0.9, image, world, Crop(np.array([x, 50.0]), side), outline)


def track(**at: float) -> Track:
    new = Track()
    new.sightings = {int(t[1:]): sighting(x) for t, x in at.items()}
    return new


def test_tracks_that_follow_each_other_nearby_are_one_person():
    before, after, far = track(t0=50, t1=52), track(t5=58, t6=60), track(t5=200)
    assert [sorted(one.sightings) for one in joined([before, after, far], gap=6)] == [[0, 1, 5, 6], [5]]
    assert len(joined([track(t0=50), track(t9=52)], gap=6)) == 2
    assert len(joined([track(t0=50), track(t0=52)], gap=6)) == 2


def test_a_track_lost_within_the_picture_is_a_failure_and_one_that_leaves_it_is_not(finder):
    shape = 60, 100, 200, 3
    inside = track(**{f"t{t}": 100 for t in range(30)})
    assert "frame 29" in finder._lost([inside], shape)
    leaving = track(**{f"t{t}": 54 + 5 * t for t in range(30)})
    assert finder._lost([leaving], shape) is None
    whole = track(**{f"t{t}": 100 for t in range(60)})
    assert finder._lost([whole], shape) is None
    assert finder._lost([inside, whole], shape) is None  # the other stands in front


def test_an_arm_taken_for_a_body_gets_no_avatar():
    """Hips above shoulders without hands and feet; a handstand shows those."""
    upright, upside_down, handstand = (track(**{f"t{t}": 100 for t in range(5)}) for _ in range(3))
    for one, up in ((upright, 20), (upside_down, -20), (handstand, -20)):
        for seen in one.sightings.values():
            seen.image[HIPS, 1] += up
            seen.image[ENDS, 3] = 0.9 if one is handstand else 0.1
    assert [is_an_arm(one) for one in (upright, upside_down, handstand)] == [False, True, False]


def test_one_euro_takes_noise_and_leaves_motion():
    rng = np.random.default_rng(0)
    still = rng.normal(0, 1, (60, 4)).astype(np.float32)
    assert one_euro(still, 25.0, 1.5, 0.01).std() < 0.5 * still.std()
    moving = np.linspace(0, 600, 60, dtype=np.float32)[:, None]
    assert np.abs(one_euro(moving, 25.0, 1.5, 0.01) - moving)[5:-5].max() < 6
    assert one_euro(np.ones((3, 2), np.float32), 25.0, 1.5, 0.01).tolist() == [[1, 1]] * 3


def test_the_finder_is_deterministic(finder, crossing):
    frames = crossing[0][:10]
    one, two = finder.find(frames, FPS), BlazePoseFinder().find(frames, FPS)
    assert (one.removal == two.removal).all()
    np.testing.assert_array_equal(one.persons[0].landmarks.image, two.persons[0].landmarks.image)
