import dataclasses
import itertools

import numpy as np
import pytest

from maskdp import layers
from maskdp.errors import UserError
from maskdp_jax import data
from maskdp_jax.config import DataConfig, PrivacyConfig


@pytest.fixture(scope="module")
def clips(dataset):
    return data.Clips(layers.Dataset(dataset), "train", DataConfig(path=str(dataset), frames=4, size=16))


def keys(*rows: tuple[str, str, str, tuple[str, ...]]) -> list[data.Keys]:
    return [
        data.Keys(n, clip_id, 0, video_id, scene_id, people)
        for n, (clip_id, video_id, scene_id, people) in enumerate(rows)
    ]


def test_views_are_the_contract_composed(clips):
    stored = layers.Dataset(clips._config.path)["train"].clip(clips.keys[3].index)
    composite, public = clips.views(3)
    np.testing.assert_array_equal(composite, layers.composite(stored.rgba, stored.private))
    np.testing.assert_array_equal(public, layers.public_view(stored.rgba))


def test_public_view_is_blind_to_the_private_layer(tmp_path, toy):
    rng = np.random.default_rng(0)
    first = toy.clip(0, rng)
    other = dataclasses.replace(first, private=rng.integers(0, 256, first.private.shape, dtype=np.uint8))
    views = []
    for name, clip in (("a", first), ("b", other)):
        layers.write_dataset(tmp_path / name, {"train": [clip]}, toy.LABELS, private_format="png")
        config = DataConfig(path=str(tmp_path / name), frames=3, size=7)
        views.append(data.Clips(layers.Dataset(tmp_path / name), "train", config).views(0))
    (composite_a, public_a), (composite_b, public_b) = views
    np.testing.assert_array_equal(public_a, public_b)
    assert (composite_a != composite_b).any()


@pytest.mark.parametrize(("length", "count", "expected"), [(10, 4, [0, 3, 6, 9]), (2, 4, [0, 0, 1, 1]), (5, 1, [0])])
def test_frames_are_spaced_evenly(length, count, expected):
    assert data.spaced(length, count) == expected


def test_batch_pads_and_averages(clips):
    batch = clips.batch([(0, 1), None, (5,)], 2)
    assert batch.padding.tolist() == [False, True, False]
    assert batch.weight.tolist() == [[0.5, 0.5], [0, 0], [1, 0]]
    np.testing.assert_array_equal(batch.composite[2, 0], clips.views(5)[0])
    assert not batch.composite[1].any()
    assert not batch.public[2, 1].any()


def test_units_partition_the_clips(clips):
    videos = data.units(clips.keys, PrivacyConfig())
    assert sorted(itertools.chain(*videos)) == list(range(40))
    assert len(videos) == 20
    assert len(data.units(clips.keys, PrivacyConfig(unit="scene"))) == 5
    assert {len(record) for record in data.units(clips.keys, PrivacyConfig(unit="subject", clips_per_record=3))} == {3}


def test_one_person_is_in_one_record_at_most():
    shared = keys(
        ("a", "v", "s", ("ann",)),
        ("b", "v", "s", ("ann", "bob")),  # bob has no clip of his own here, but ann has: left out
        ("c", "v", "s", ("cid", "dan")),
        ("d", "v", "s", ("cid", "dan")),
        ("e", "v", "s", ("dan", "eve")),  # one of the two is taken: left out
    )
    records = data.units(shared, PrivacyConfig(unit="subject"))
    assert sorted(records) == [(0,), (2, 3)] or sorted(records) == [(0,), (4,)]
    assert data.contributions(shared, records)["person"] == 1


def test_subject_without_a_name_is_refused():
    with pytest.raises(UserError, match="names no subject"):
        data.units(keys(("a", "v", "s", ())), PrivacyConfig(unit="subject"))


def test_contributions_count_records_of_a_place():
    shared = keys(("a", "v1", "hall", ("ann",)), ("b", "v2", "hall", ("ann",)), ("c", "v3", "attic", ("bob",)))
    assert data.contributions(shared, data.units(shared, PrivacyConfig())) == {"person": 2, "place": 2, "video": 1}


def test_stream_resumes_where_it_is_told_to():
    whole = list(data.stream(lambda t: t * t, 0, 12, 2))
    assert whole == [t * t for t in range(12)]
    assert list(data.stream(lambda t: t * t, 5, 12, 2)) == whole[5:]


def test_split_without_labels_is_refused(tmp_path, toy):
    clip = dataclasses.replace(toy.clip(0, np.random.default_rng(0)), label=-1)
    layers.write_dataset(tmp_path, {"train": [clip]}, toy.LABELS, private_format="png")
    config = DataConfig(path=str(tmp_path))
    with pytest.raises(UserError, match="no labelled clip"):
        data.Clips(layers.Dataset(tmp_path), "train", config)
    assert len(data.Clips(layers.Dataset(tmp_path), "train", config, labelled=False)) == 1


def layers_with_box(height, width, rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    rgba = np.zeros((2, height, width, 4), np.uint8)
    rgba[:, rows, columns] = 255
    return rgba, rng.integers(0, 256, (2, height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(40, 60, slice(10, 20), slice(30, 35)), (40, 60, slice(0, 40), slice(55, 60)), (40, 40, slice(0), slice(0))],
)
def test_the_crop_is_a_square_that_holds_every_avatar_and_follows_from_alpha_alone(height, width, rows, columns):
    rgba, private = layers_with_box(height, width, rows, columns)
    square, scene = data.cropped(rgba, private, 0.25)
    assert square.shape[1] == square.shape[2] == scene.shape[1] == scene.shape[2]
    assert (square[..., 3] > 0).sum() == (rgba[..., 3] > 0).sum()
    other, _ = data.cropped(rgba, 255 - private, 0.25)
    np.testing.assert_array_equal(square, other)
    filled = data.cropped(rgba, np.full_like(private, layers.FILL), 0.25)
    np.testing.assert_array_equal(layers.composite(*filled), layers.public_view(square))


def test_the_crop_keeps_what_lies_around_the_avatar():
    rgba, private = layers_with_box(40, 60, slice(10, 20), slice(30, 40))
    _, scene = data.cropped(rgba, private, 1.0)
    assert scene.shape[1] == 19
    np.testing.assert_array_equal(scene, private[:, 5:24, 25:44])


def records_of(keys, **privacy):
    """The records as sets of clip ids."""
    return {
        frozenset(keys[n].clip_id for n in record)
        for record in data.units(keys, PrivacyConfig(unit="subject", **privacy))
    }


def random_clips(rng, clips=30, people=8):
    return [
        data.Keys(n, f"c{n}", 0, f"v{n}", "", tuple({f"p{p}" for p in rng.integers(people, size=rng.integers(1, 4))}))
        for n in range(clips)
    ]


@pytest.mark.parametrize("most", [0, 2])
def test_one_person_fewer_is_one_record_fewer_and_changes_no_other(most):
    """Under `remove`; 50 random sets of clips, every person left out in turn."""
    privacy = {"adjacency": "remove", "clips_per_record": most}
    for seed in range(50):
        keys = random_clips(np.random.default_rng(seed))
        before = records_of(keys, **privacy)
        for person in sorted({p for key in keys for p in key.subject_ids}):
            if left := [key for key in keys if person not in key.subject_ids]:
                after = records_of(left, **privacy)
                assert after <= before
                assert len(before - after) <= 1


def test_the_assignment_with_clips_of_several_people_would_change_more():
    """With the assignment of `zero_out` a person's absence also changes the records of others."""
    worst = 0
    for seed in range(50):
        keys = random_clips(np.random.default_rng(seed))
        before = records_of(keys, adjacency="zero_out")
        for person in sorted({p for key in keys for p in key.subject_ids}):
            left = [key for key in keys if person not in key.subject_ids]
            worst = max(worst, len(before ^ records_of(left, adjacency="zero_out")))
    assert worst > 1
