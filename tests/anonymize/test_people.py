import cv2
import numpy as np
import pytest
import torch

from anonymize.avatar.body import Body
from anonymize.avatar.camera import Camera
from anonymize.avatar.render import render
from anonymize.avatar.wardrobe import Avatar, draw_identity
from anonymize.people.embedded import finder as people
from anonymize.people.embedded import person_net
from anonymize.people.embedded.finder import EmbeddedFinder
from anonymize.scene.removal import remove
from anonymize.studio import motions

FPS = 12.0


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


@pytest.fixture(scope="module")
def room():
    rng = np.random.default_rng(4)
    room = np.full((120, 160, 3), (205, 200, 190), float)
    room[85:] = (120, 105, 95)
    room[20:60, 15:45] = (150, 170, 190)
    room[30:100, 120:150] = (160, 130, 100)
    room += cv2.GaussianBlur(rng.normal(0, 40, room.shape), (0, 0), 2)
    return room.clip(0, 255).astype(np.uint8)


def film(room, total=36, start=-1.3, stop=1.3, seed=0):
    """Somebody walks through the room: frames and where they are."""
    rng = np.random.default_rng(seed)
    pose = motions.ACTIONS["walk"](rng, total, FPS)
    walk = np.zeros((total, 3))
    walk[:, 0] = np.linspace(start, stop, total)
    mesh = Avatar(Body(), draw_identity(np.random.default_rng(seed))).mesh(motions.move(pose, walk))
    camera = Camera.look_at((0, 1.1, 4.2), (0, 0.9, 0), 160, 120, 190)
    frames, truth = [], []
    for t in range(total):
        rgba = render([mesh], t, camera).rgba
        alpha = rgba[..., 3:] / 255
        noise = rng.normal(0, 2, room.shape)
        frames.append((room * (1 - alpha) + rgba[..., :3] * alpha + noise).clip(0, 255).astype(np.uint8))
        truth.append(alpha[..., 0] > 0)
    return np.stack(frames), np.stack(truth)


@pytest.fixture(scope="module")
def walk(room):
    frames, truth = film(room)
    return frames, truth, EmbeddedFinder().find(frames, FPS)


def test_a_walker_is_found_and_covered(walk):
    _, truth, people = walk
    assert people.doubt is None
    assert len(people.persons) == 1
    person = people.persons[0]
    assert people.removal[truth].mean() > 0.999
    visible = truth.sum((1, 2)) > 200
    assert person.present[visible].all()
    trusted = person.masks.any((1, 2))
    assert trusted[visible].mean() > 0.8
    overlap = (person.masks & truth)[trusted].sum((1, 2)) / (person.masks | truth)[trusted].sum((1, 2))
    assert np.median(overlap) > 0.7
    assert np.isnan(person.boxes[~person.present]).all()
    assert not person.masks[~person.present].any()


def test_the_room_returns(walk, room):
    frames, _, people = walk
    result = remove(frames, people)
    assert result.doubt is None
    error = np.abs(result.frames.astype(int) - room)[people.removal & people.known & ~result.blanked[:, None, None]]
    assert np.quantile(error, 0.99) <= 8


def test_what_is_found_does_not_change_from_run_to_run(walk):
    frames, _, people = walk
    again = EmbeddedFinder().find(frames, FPS)
    assert (again.removal == people.removal).all()
    assert (again.persons[0].masks == people.persons[0].masks).all()
    assert again.notes == people.notes


def test_an_empty_room_is_a_doubt(room):
    rng = np.random.default_rng(0)
    frames = (room + rng.normal(0, 2, (24, *room.shape))).clip(0, 255).astype(np.uint8)
    assert EmbeddedFinder().find(frames, FPS).doubt == "no person found"


def test_a_moving_camera_is_a_doubt_and_all_is_removed(room):
    wide = np.tile(room, (1, 3, 1))
    people = EmbeddedFinder().find(np.stack([wide[:, 4 * t : 4 * t + 160] for t in range(24)]), FPS)
    assert "camera" in people.doubt
    assert people.removal.all()
    assert not people.static_camera


def test_a_joint_that_is_hardly_seen_is_not_believed():
    heat = np.zeros((len(person_net.JOINTS), 8, 8), np.float32)
    heat[0, 2, 3], heat[1, 5, 4] = 0.9, 0.6
    track = people._Track((1, 16, 16))
    track.add(0, np.ones((16, 16), bool), np.array([0, 0, 16, 16], np.float32), np.ones((16, 16), bool))
    votes = people._Votes(1, np.array([0]), np.zeros((1, 16, 16), np.float16), [heat], 1.0)
    confidence = people._person(track, votes, least_peak=0.75).joints[0, :, 2]
    assert confidence[0] == pytest.approx(0.9)
    assert not confidence[1:].any()


def test_legs_of_who_is_cut_off_by_the_lower_edge_are_not_believed():
    heat = np.full((len(person_net.JOINTS), 8, 8), 0.8, np.float32)
    track = people._Track((2, 16, 16))
    for t, bottom in enumerate((12, 16)):
        track.add(t, np.ones((16, 16), bool), np.array([0, 0, 16, bottom], np.float32), np.ones((16, 16), bool))
    votes = people._Votes(2, np.arange(2), np.zeros((2, 16, 16), np.float16), [heat] * 2, 1.0)
    inside, cut = people._person(track, votes, least_peak=0.3).joints[..., 2]
    assert inside.all()
    assert not cut[people.SHINS].any()
    assert cut[: people.SHINS[0]].all()


def test_what_has_no_joints_is_no_body():
    joints = np.zeros((3, len(person_net.JOINTS), 3), np.float32)
    joints[:, :3, 2] = 0.9
    person = people.Person(0, np.array([True, True, False]), np.zeros((3, 4)), np.zeros((3, 8, 8), bool), joints)
    assert people._is_a_body(person)
    joints[:, 1:, 2] = 0.3
    assert not people._is_a_body(person)
    joints[2] = 1  # nobody is there in that frame
    assert not people._is_a_body(person)


def test_feet_that_the_network_misses_go_with_somebody_who_stays():
    """The outline ends at the shins, and the floor was never seen behind them: a box below is removed, too."""
    frames = np.full((6, 120, 80, 3), 120, np.uint8)
    frames[:, 20:70, 30:50] = (150, 40, 40)
    frames[:, 70:88, 33:37] = frames[:, 70:88, 43:47] = 118  # legs of the floor's colour
    outline = np.zeros((120, 80), bool)
    outline[20:70, 30:50] = True
    track = people._Track(frames.shape[:3])
    for t in range(len(frames)):
        track.add(t, outline, np.array([30, 20, 50, 70], np.float32), outline)
    same = np.broadcast_to(outline, frames.shape[:3])
    still = np.zeros_like(same)
    lasting = people._lasting(frames, track, same, still, margin=1.5)
    assert lasting[20:92, 30:50].all()
    assert not lasting[110:].any()
    left = people._lasting(frames, track, still, still, margin=1.5)  # something else was there at other times
    assert not left.any()
    still[3, 104:108, 34:38] = still[3, 104:108, 10:14] = True  # feet, of theirs and of somebody aside
    lasting = people._lasting(frames, track, same, still, margin=1.5)
    assert lasting[20:108, 30:50].all()
    assert not lasting[110:].any()
    assert not lasting[:, :20].any()


def test_who_stands_still_and_is_found_only_at_first_is_removed_throughout(room, monkeypatch):
    """From then on the network misses them, so they are taken for a part of the scene, where nothing ever moves."""
    frames, truth = film(room, start=-0.3, stop=-0.3)
    frames[:], truth[:] = frames[8], truth[8]
    frames = frames + np.random.default_rng(1).integers(0, 3, frames.shape, dtype=np.uint8)
    likely = cv2.GaussianBlur(truth[0].astype(np.float32), (0, 0), 2)
    times = np.arange(len(frames))
    seen = np.float16(times < 9)[:, None, None] * likely.astype(np.float16)
    heat = np.full((len(person_net.JOINTS), 60, 80), 0.9, np.float32)
    votes = people._Votes(len(frames), times, seen, [heat] * len(times), 1.0)
    monkeypatch.setattr(EmbeddedFinder, "_votes", lambda *_: votes)
    monkeypatch.setattr(people.cues, "stirring", lambda *_: truth)
    monkeypatch.setattr(people.person_net, "still_person", lambda _, image: np.zeros(image.shape[:2], np.float32))
    found = EmbeddedFinder().find(frames, FPS)
    assert found.removal[truth].mean() > 0.99


def test_black_bars_are_left_out_of_the_search_and_outlines_go_on_over_them(walk):
    """A letterboxed clip gives what the picture alone gives; a body that the picture cuts is cut by the bar, too."""
    frames, _, alone = walk
    cut = frames[:, :90]  # at the walker's shins
    barred = np.pad(cut, ((0, 0), (18, 14), (0, 0), (0, 0)), constant_values=3)
    inside, whole = EmbeddedFinder().find(cut, FPS), EmbeddedFinder().find(barred, FPS)
    assert len(whole.persons) == len(inside.persons) == len(alone.persons) == 1
    np.testing.assert_array_equal(whole.removal[:, 18:108], inside.removal)
    mine, theirs = whole.persons[0], inside.persons[0]
    np.testing.assert_array_equal(mine.masks[:, 18:108], theirs.masks)
    np.testing.assert_array_equal(mine.masks[:, 121], theirs.masks[:, 89])
    assert theirs.masks[:, 89].any()
    np.testing.assert_array_equal(mine.boxes, theirs.boxes + np.float32([0, 18, 0, 18]))
    np.testing.assert_array_equal(mine.joints, theirs.joints + np.float32([0, 18, 0]))
    assert whole.background.shape == barred.shape[1:]
    assert whole.known.shape == barred.shape[1:3]
