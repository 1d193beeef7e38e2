"""The two-layer contract: what is written is what is read, and what breaks the contract is refused."""

import dataclasses
import hashlib
import json
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from maskdp import layers
from maskdp.errors import UserError


def make_clip(index: int, frames: int = 4, height: int = 24, width: int = 32) -> layers.TwoLayerClip:
    rng = np.random.default_rng(index)
    rgba = rng.integers(0, 256, (frames, height, width, 4), np.uint8)
    rgba[:, : height // 2] = 0
    rgba[rgba[..., 3] == 0] = 0
    private = np.broadcast_to(rng.integers(0, 256, (1, 1, 1, 3), np.uint8), (frames, height, width, 3)).copy()
    return layers.TwoLayerClip(
        rgba, private, index % 2, f"v{index}-000", f"v{index}", "room", ("ann", "bob"), f"{index:064x}", 12.5
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    clips = {"train": [make_clip(i) for i in range(5)], "test": [make_clip(9, frames=2)]}
    layers.write_dataset(folder, clips, ["wave", "clap"], notes={"note": 1})
    return folder


def test_public_layer_survives_byte_for_byte_and_private_nearly(folder):
    dataset = layers.Dataset(folder)
    assert dataset.labels == ["wave", "clap"]
    assert dataset.metadata["context"] == "none"
    assert dataset.metadata["note"] == 1
    read = {clip.clip_id: clip for clip in (record.clip() for record in dataset["train"])}
    assert len(read) == 5
    for index in range(5):
        expected, clip = make_clip(index), read[f"v{index}-000"]
        np.testing.assert_array_equal(clip.rgba, expected.rgba)
        assert np.abs(clip.private.astype(int) - expected.private).max() <= 4
        keys = ("label", "video_id", "scene_id", "subject_ids", "fps")
        assert all(getattr(clip, key) == getattr(expected, key) for key in keys)
        assert clip.source == dataset.source_tag(expected.source) != expected.source


def test_chosen_frames_equal_those_of_the_whole_clip(folder):
    record = layers.Dataset(folder)["train"][2]
    rgba, private = record.layers([3, 1])
    np.testing.assert_array_equal(rgba, record.clip().rgba[[3, 1]])
    np.testing.assert_array_equal(private, record.clip().private[[3, 1]])


def test_opens_with_plain_tfds_and_no_tensorflow(folder):
    code = (
        "import sys, tensorflow_datasets as tfds\n"
        f"source = tfds.builder_from_directory({str(folder / 'shards')!r}).as_data_source(split='train')\n"
        "layers = [source[0][a][b] for a, b in (('public', 'rgba'), ('private', 'rgb'))]\n"
        "print(len(source), *[(len(layer), *layer[0].shape) for layer in layers], 'tensorflow' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split("\n")[-2] == "5 (4, 24, 32, 4) (4, 24, 32, 3) False"
    assert tfds.builder_from_directory(folder / "shards").info.splits["test"].num_examples == 1


def test_composite_is_exact_at_both_ends_and_between_them_elsewhere():
    clip = make_clip(0)
    view = layers.composite(clip.rgba, clip.private)
    alpha = clip.rgba[..., 3]
    np.testing.assert_array_equal(view[alpha == 0], clip.private[alpha == 0])
    np.testing.assert_array_equal(view[alpha == 255], clip.rgba[..., :3][alpha == 255])
    exact = (alpha[..., None] * 1.0 * clip.rgba[..., :3] + (255.0 - alpha[..., None]) * clip.private) / 255
    assert np.abs(view - exact).max() <= 0.5


def test_zeroing_the_private_layer_gives_the_public_view_exactly():
    clip = make_clip(1)
    filled = np.full_like(clip.private, layers.FILL)
    np.testing.assert_array_equal(layers.composite(clip.rgba, filled), layers.public_view(clip.rgba))


def test_public_view_does_not_depend_on_the_private_layer(folder):
    a, b = make_clip(1), dataclasses.replace(make_clip(1), private=make_clip(2).private)
    np.testing.assert_array_equal(layers.public_view(a.rgba), layers.public_view(b.rgba))
    assert (layers.composite(a.rgba, a.private) != layers.composite(b.rgba, b.private)).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: dict(rgba=np.where(np.arange(4) == 3, 0, c.rgba | 1).astype(np.uint8)), "colour where alpha is 0"),
        (lambda c: dict(rgba=c.rgba.astype(np.int32)), "expected uint8"),
        (lambda c: dict(private=c.private[:-1]), "expected"),
        (lambda c: dict(rgba=c.rgba[:0], private=c.private[:0]), "expected"),
    ],
)
def test_a_clip_that_breaks_the_contract_is_refused(change, message):
    clip = make_clip(3)
    with pytest.raises(UserError, match=message):
        dataclasses.replace(clip, **change(clip))


def test_a_failed_write_leaves_the_old_dataset_and_no_rubbish(tmp_path):
    layers.write_dataset(tmp_path, {"train": [make_clip(0)]}, ["wave", "clap"])

    def broken():
        yield make_clip(1)
        raise RuntimeError("disk on fire")

    with pytest.raises(Exception, match="disk on fire"):
        layers.write_dataset(tmp_path, {"train": broken()}, ["wave", "clap"])
    assert [record.clip_id for record in layers.Dataset(tmp_path)["train"]] == ["v0-000"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset.secret", "shards"]


def write_one(folder, index, **options) -> layers.Dataset:
    return layers.Dataset(layers.write_dataset(folder, {"train": [make_clip(index)]}, ["a", "b"], **options))


def test_contents_tag_follows_the_contents_under_one_key(tmp_path):
    tags = [
        write_one(tmp_path / name, index, key=key).contents_tag()
        for name, index, key in (
            ("x", 0, bytes(32)),
            ("y", 0, bytes(32)),
            ("z", 1, bytes(32)),
            ("k", 0, bytes([1] * 32)),
        )
    ]
    assert tags[0] == tags[1]
    assert len(set(tags)) == 3


def test_id_is_random_and_stays_as_long_as_the_contents(tmp_path):
    first, elsewhere = write_one(tmp_path / "x", 0).id, write_one(tmp_path / "y", 0).id
    assert first != elsewhere
    assert write_one(tmp_path / "x", 0).id == first
    noted = write_one(tmp_path / "x", 0, notes={"a": 1}).id
    assert noted != first
    assert write_one(tmp_path / "x", 1).id not in (first, noted)


def test_a_copy_without_its_secret_gets_an_id_and_a_key_of_its_own(tmp_path):
    """Its ledger is empty, so a run on it must not seem to be the first on the original."""
    dataset = write_one(tmp_path / "x", 0)
    shutil.copytree(dataset.path, tmp_path / "copy" / "shards")
    copy = layers.Dataset(tmp_path / "copy")
    assert copy.id != dataset.id
    assert layers.Dataset(tmp_path / "copy").id == copy.id
    assert copy.contents_tag() != dataset.contents_tag()


def test_secret_of_another_version_is_refused(tmp_path):
    dataset = write_one(tmp_path / "x", 0)
    other = write_one(tmp_path / "y", 1)
    shutil.copy(other.folder / "dataset.secret", dataset.folder / "dataset.secret")
    with pytest.raises(UserError, match="not the secret of this version"):
        layers.Dataset(tmp_path / "x").contents_tag()


def test_dataset_secret_is_readable_by_its_owner_alone(tmp_path):
    path = write_one(tmp_path / "x", 0).folder / "dataset.secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text())["key"] not in repr(layers.Dataset(tmp_path / "x").identity)
    path.chmod(0o644)
    with pytest.raises(UserError, match="mode 0644"):
        layers.Dataset(tmp_path / "x").contents_tag()
    path.chmod(0o600)
    path.write_text("{}")
    with pytest.raises(UserError, match="expected a 'maskdp dataset secret 1' file"):
        layers.Dataset(tmp_path / "x").contents_tag()


def test_no_hash_of_contents_or_recording_is_stored_with_the_shards(tmp_path):
    dataset = write_one(tmp_path / "x", 5)
    digests = [hashlib.sha256(file.read_bytes()) for file in dataset.path.iterdir()]
    needles = [make_clip(5).source, *(digest.hexdigest() for digest in digests)]
    stored = b"".join(file.read_bytes() for file in dataset.path.iterdir()) + dataset["train"]._source[0]
    assert not any(needle.encode() in stored or bytes.fromhex(needle) in stored for needle in needles)


def test_features_are_stored_in_the_order_of_their_names(folder):
    """Protobuf's own order differs from process to process, and so would the bytes of a run that was broken off."""
    for split in layers.Dataset(folder).splits:
        for serialized in layers.Dataset(folder)[split]._source:
            names = (b"clip_id", b"fps", b"frames", b"label", b"private/rgb", b"public/rgba", b"scene_id", b"video_id")
            places = [serialized.index(bytes([len(name)]) + name) for name in names]
            assert places == sorted(places)


def test_what_is_not_a_dataset_says_so(tmp_path):
    with pytest.raises(UserError, match="not a two-layer dataset"):
        layers.Dataset(tmp_path)
