import csv
import dataclasses

import numpy as np
import pytest
import torch

from anonymize.avatar.render import render
from anonymize.avatar.wardrobe import Avatar
from anonymize.studio import film, motions
from anonymize.vision import video
from maskdp import layers
from maskdp.errors import UserError

torch.set_num_threads(1)
SMALL = film.StudioConfig(
    out="", videos=4, identities=4, rooms=4, frames=4, fps=4.0, size=64, second_person=1.0, test_fraction=0.5
)


def config(folder, **changes):
    return dataclasses.replace(SMALL, out=str(folder), **changes)


@pytest.fixture(scope="module")
def filmed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studio")
    film.generate(config(folder))
    return folder


def test_the_plan_is_balanced_and_keeps_subjects_apart():
    big = dataclasses.replace(SMALL, videos=400, identities=12, rooms=24, second_person=0.1, test_fraction=0.25)
    takes = film.plan(big)
    assert takes[:50] == film.plan(dataclasses.replace(big, videos=50))
    for split, share in (("train", 30), ("test", 10)):
        counts = [
            sum(take.split == split and take.action == action for take in takes) for action in motions.PRIVATE_ACTIONS
        ]
        assert counts == [share] * 10
    people = {split: {s for take in takes if take.split == split for s in take.subjects} for split in ("train", "test")}
    assert not people["train"] & people["test"]
    assert len(people["train"] | people["test"]) == 12
    assert 0.05 < np.mean([len(take.subjects) == 2 for take in takes]) < 0.16


@pytest.mark.parametrize("correlation", [0.0, 0.6, 1.0])
def test_the_scene_tells_the_action_as_often_as_asked(correlation):
    big = dataclasses.replace(SMALL, videos=600, rooms=24, scene_correlation=correlation)
    own = [film.rooms.KINDS[take.room % 12] == film.HOME[take.action] for take in film.plan(big)]
    assert np.mean(own) == pytest.approx(correlation + (1 - correlation) / 12, abs=0.06)


def test_manifest_and_videos(filmed):
    rows = list(csv.DictReader((filmed / "manifest.csv").read_text().splitlines()))
    assert list(rows[0]) == ["path", "label", "subject_ids", "scene_id", "split"]
    assert len(rows) == 4
    for row, take in zip(rows, film.plan(config(filmed))):
        assert row["label"] == take.action
        assert row["split"] in ("train", "test")
        assert len(row["subject_ids"].split(";")) == 2
        (clip,) = video.clips(filmed / row["path"], max_frames=100)
        assert clip.frames.shape == (4, 64, 64, 3)
        assert clip.fps == 4


def test_films_follow_from_the_seed():
    take = film.plan(SMALL)[0]
    film._avatar.cache_clear()
    first, again = film.film(SMALL, take), film.film(SMALL, take)
    np.testing.assert_array_equal(first.frames, again.frames)
    other = dataclasses.replace(SMALL, seed=1)
    assert not np.array_equal(first.frames, film.film(other, film.plan(other)[0]).frames)


def test_the_truth_renders_to_its_masks(filmed):
    take = film.plan(config(filmed))[1]
    truth = film.read_truth(filmed / "truth" / f"{take.video_id}.npz")
    assert truth.masks.shape == (2, 4, 64, 64)
    assert truth.masks.dtype == bool
    assert not (truth.masks[0] & truth.masks[1]).any()
    avatars = [film._avatar(SMALL.seed, subject) for subject in take.subjects]
    np.testing.assert_array_equal(truth.betas, [avatar.betas for avatar in avatars])
    meshes = [Avatar.mesh(avatar, pose) for avatar, pose in zip(avatars, truth.poses)]
    for frame in range(4):
        picture = render(meshes, frame, truth.camera)
        np.testing.assert_array_equal(truth.masks[:, frame].any(0), picture.rgba[..., 3] >= 128)


def test_outside_people_and_shadows_the_video_is_the_empty_room():
    shot = film.film(SMALL, film.plan(SMALL)[2])
    wall = np.broadcast_to((shot.rgba[..., 3] == 0).all(0), shot.frames.shape[:3]).copy()
    wall[:, 32:] = False  # the floor, where shadows fall
    difference = shot.frames.astype(float) - shot.empty
    assert np.abs(difference[wall]).mean() < 4
    assert np.abs(difference[shot.masks.any(0)]).mean() > 15


def test_people_have_natural_size_and_are_wholly_in_the_picture():
    single = dataclasses.replace(SMALL, second_person=0.0, videos=20)
    for take in film.plan(single)[:10]:
        masks = film.film(single, take).masks[0]
        assert masks.any((1, 2)).all()
        rows, columns = (np.nonzero(masks.any(axes))[0] for axes in ((0, 2), (0, 1)))
        assert min(rows[0], columns[0]) > 0
        assert max(rows[-1], columns[-1]) < 63
        assert 0.38 < (rows[-1] - rows[0]) / 64 < 0.95


def test_finished_videos_are_kept_and_damaged_sets_completed(filmed):
    paths = sorted((filmed / "videos").iterdir())
    before = {path: (path.stat().st_mtime_ns, video.sha256(path)) for path in paths}
    paths[0].unlink()
    film.generate(config(filmed))
    assert video.sha256(paths[0]) == before[paths[0]][1]
    assert all(path.stat().st_mtime_ns == before[path][0] for path in paths[1:])


def test_another_config_is_refused(filmed):
    with pytest.raises(UserError, match="seed"):
        film.generate(config(filmed, seed=3))


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="is a file"):
        film.generate(config(tmp_path / "out"))


def test_two_layer_dataset(tmp_path):
    small = config(tmp_path, videos=3, actions="public", layers=True, second_person=0.0)
    film.generate(small)
    dataset = layers.Dataset(tmp_path)
    clip = dataset["train"].clip(0)
    take = next(take for take in film.plan(small) if take.video_id == clip.video_id)
    assert list(film.ACTIONS["public"])[clip.label] == take.action
    np.testing.assert_array_equal(clip.rgba, film.film(small, take).rgba)
    assert np.abs(clip.private.astype(float) - film.film(small, take).empty).mean() < 6


@pytest.mark.parametrize(
    "arguments",
    [["--actions", "secret"], ["--size", "33"], ["--videos", "0"], ["--scene_correlation", "2"], ["--colour", "1"]],
)
def test_mistakes_are_one_line(tmp_path, arguments):
    with pytest.raises(UserError) as raised:
        film.main(["--out", str(tmp_path / "out"), *arguments])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
