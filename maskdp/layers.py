"""The contract between the two stages: a clip is two layers, never one finished video.

`public/rgba` holds the rendered avatars over nothing, lossless; `private/rgb` the scene with the people removed. A
model sees the composite `x = α·A + (1−α)·B`; the public view `x̃ = α·A + (1−α)·fill` has a constant for the scene.

Stored as TFDS shards in ArrayRecord files; neither writing nor reading needs TensorFlow.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from maskdp import __version__, atomic
from maskdp import identity as identities
from maskdp.errors import UserError

FILL = 128
"""The constant that stands for the private layer in the public view."""

FORMAT = "maskdp two-layer 1"
SHARDS = "shards"
CONTEXTS = ("none", "scene")
"""What the public layer was drawn from: `none` of the scene, or the `scene` (no masked-DP ε is stated for it)."""

_METADATA = "metadata.json"
_OWN_FILES = (identities.SECRET, "ledger.jsonl")
_NAME = "two_layer"
_VERSION = "1.0.0"


@dataclasses.dataclass(frozen=True)
class TwoLayerClip:
    """One clip in two layers.

    Attributes:
        rgba: public layer; straight (not premultiplied) colour, 0 wherever alpha is 0.
        private: private layer, the scene with the people removed.
        label: class index; -1 where unknown.
        clip_id: unique key of the clip, `video_id` and a running number.
        video_id, scene_id: keys of the privacy unit: the video, and the place it was filmed in.
        subject_ids: every person in the clip.
        source: SHA-256 of the source file, never a path; stored as a tag under the dataset's key.
        fps: frames per second.
    """

    rgba: UInt8[np.ndarray, "t h w 4"]
    private: UInt8[np.ndarray, "t h w 3"]
    label: int
    clip_id: str
    video_id: str
    scene_id: str
    subject_ids: tuple[str, ...]
    source: str
    fps: float

    def __post_init__(self):
        check_layers(self.rgba, self.private, self.clip_id)


def check_layers(rgba: np.ndarray, private: np.ndarray, clip_id: str) -> None:
    """Raises UserError unless both layers keep the contract: shapes, types, and no colour where alpha is 0.

    The last is a privacy rule: hidden colour in the public layer would hand out the scene.
    """
    if rgba.dtype != np.uint8 or private.dtype != np.uint8:
        raise UserError(f"clip {clip_id}: layers of {rgba.dtype} and {private.dtype}, expected uint8")
    if rgba.ndim != 4 or rgba.shape[3] != 4 or private.shape != (*rgba.shape[:3], 3) or not rgba.size:
        raise UserError(f"clip {clip_id}: layers {rgba.shape} and {private.shape}, expected (T, H, W, 4), (T, H, W, 3)")
    if rgba[rgba[..., 3] == 0].any():
        raise UserError(f"clip {clip_id}: public layer has colour where alpha is 0, expected 0")


def composite(rgba: UInt8[np.ndarray, "*t h w 4"], private: UInt8[np.ndarray, "*t h w 3"]) -> np.ndarray:
    """`x = α·A + (1−α)·B`, rounded to uint8. Pixels with α = 255 equal A exactly, with α = 0 equal B exactly."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((alpha * rgba[..., :3] + (255 - alpha) * private + 127) // 255).astype(np.uint8)


def public_view(rgba: UInt8[np.ndarray, "*t h w 4"], fill: int = FILL) -> np.ndarray:
    """`x̃ = α·A + (1−α)·fill`: the composite over a private layer of the constant `fill`, by the same arithmetic."""
    return composite(rgba, np.full((*rgba.shape[:-1], 3), fill, np.uint8))


def _features(labels: Sequence[str], private_format: str):
    import tensorflow_datasets as tfds

    image = tfds.features.Image
    return tfds.features.FeaturesDict(
        {
            "public": {"rgba": tfds.features.Sequence(image(shape=(None, None, 4), encoding_format="png"))},
            "private": {"rgb": tfds.features.Sequence(image(shape=(None, None, 3), encoding_format=private_format))},
            "label": tfds.features.ClassLabel(names=list(labels)),
            "clip_id": tfds.features.Text(),
            "video_id": tfds.features.Text(),
            "scene_id": tfds.features.Text(),
            "subject_ids": tfds.features.Sequence(tfds.features.Text()),
            "source": tfds.features.Text(),
            "fps": np.float32,
            "frames": np.int32,
        }
    )


def _encode(frames: np.ndarray, extension: str, options: Sequence[int] = ()) -> list[io.BytesIO]:
    code = cv2.COLOR_RGBA2BGRA if frames.shape[-1] == 4 else cv2.COLOR_RGB2BGR
    return [io.BytesIO(cv2.imencode(extension, cv2.cvtColor(frame, code), options)[1]) for frame in frames]


def _example(clip: TwoLayerClip, private_format: str, identity: identities.Identity) -> dict[str, Any]:
    quality = (cv2.IMWRITE_JPEG_QUALITY, 92) if private_format == "jpeg" else ()
    return {
        "public": {"rgba": _encode(clip.rgba, ".png")},
        "private": {"rgb": _encode(clip.private, f".{private_format}", quality)},
        "label": clip.label,
        "clip_id": clip.clip_id,
        "video_id": clip.video_id,
        "scene_id": clip.scene_id,
        "subject_ids": list(clip.subject_ids),
        "source": _source_tag(identity, clip.source),
        "fps": clip.fps,
        "frames": len(clip.rgba),
    }


def _source_tag(identity: identities.Identity, digest: str) -> str:
    return identity.tag("source", digest.encode())


def _in_order(serialized: bytes) -> bytes:
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(serialized).SerializeToString(deterministic=True)


@functools.cache
def _builder_class():
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()

    class RepeatableWriter(tfds.core.ExampleWriter):
        """Writes the features of an example in the order of their names; protobuf's differs from process to process."""

        def write(self, path, examples):
            return super().write(path, ((key, _in_order(example)) for key, example in examples))

    class TwoLayer(tfds.core.GeneratorBasedBuilder):
        name = _NAME
        VERSION = tfds.core.Version(_VERSION)

        def __init__(self, *, clips, labels, metadata, private_format, identity, **options):
            self._clips, self._labels, self._metadata = clips, labels, metadata
            self._private_format, self._identity = private_format, identity
            super().__init__(**options)

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description="Clips in two layers: synthetic avatars (public) over the scene (private).",
                features=_features(self._labels, self._private_format),
                metadata=tfds.core.MetadataDict(self._metadata),
            )

        def _example_writer(self):
            return RepeatableWriter(self.info.file_format)

        def _split_generators(self, _):
            return {split: self._generate_examples(clips) for split, clips in self._clips.items()}

        def _generate_examples(self, clips):
            for clip in clips:
                yield clip.clip_id, _example(clip, self._private_format, self._identity)

    return TwoLayer


def write_dataset(
    folder: str | pathlib.Path,
    clips: Mapping[str, Iterable[TwoLayerClip]],
    labels: Sequence[str],
    *,
    context: str = "none",
    private_format: str = "jpeg",
    notes: Mapping[str, Any] | None = None,
    key: bytes | None = None,
) -> pathlib.Path:
    """Writes `clips` (split name → clips, consumed one at a time) as TFDS shards to `folder/shards`, in one step.

    `folder/dataset.secret` holds the dataset's random id and key (`maskdp.identity`). The id stays as long as the
    contents do.

    Args:
        folder: where `shards/` appears, whole, once every clip is written; an older one there is replaced.
        labels: class names; a clip's label indexes it.
        context: what the public layer was drawn from, one of CONTEXTS; recorded in the metadata.
        private_format: `jpeg` (lossy, quality 92) or `png`, for the private layer only. The public one is always PNG.
        notes: further metadata of plain JSON types.
        key: 32 secret bytes for a folder without `dataset.secret`; by default from the operating system.

    Guarantees: the same clips under the same key give the same bytes in any process, but for the random id.

    Raises:
        OSError: they cannot be written; an older dataset stays.

    Returns:
        The path `folder/shards`, which opens with `tfds.builder_from_directory`.
    """
    if context not in CONTEXTS:
        raise ValueError(f"context: {context!r}, expected one of {CONTEXTS}")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": FORMAT, "context": context, "fill": FILL, "maskdp": __version__, **(notes or {})}
    final = folder / SHARDS
    identity = identities.Identity.at(folder, key=key)
    with tempfile.TemporaryDirectory(prefix=f".{SHARDS}{atomic.PARTIAL}", dir=folder) as building:
        builder = _builder_class()(
            clips=clips,
            labels=labels,
            metadata=metadata,
            private_format=private_format,
            identity=identity,
            data_dir=building,
            file_format="array_record",
        )
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download that is none
                builder.download_and_prepare()
        except RuntimeError as error:  # "... write() failed: No space left on device; writing ..."
            if not (reason := re.search(r"\(\) failed: ([^;]+)", str(error))):
                raise
            raise OSError(None, reason[1], str(final)) from None
        built = pathlib.Path(building) / _NAME / _VERSION
        identity = identity.of_contents(_digest(built))
        (built / _METADATA).write_text(json.dumps({"dataset_id": identity.id, **metadata}))
        # A reader sees the old shards, none, or the new ones; never a mixture.
        old = pathlib.Path(building) / "old"
        if final.exists():
            final.rename(old)
        with atomic.folder(final) as aside:
            for file in built.iterdir():
                shutil.move(file, aside / file.name)
    return final


def _digest(path: pathlib.Path) -> bytes:
    """Unkeyed digest of what is stored in a folder of shards, but for the random id. It never leaves this process."""
    files = [file for file in path.iterdir() if file.is_file() and file.name not in (_METADATA, *_OWN_FILES)]
    metadata = json.loads((path / _METADATA).read_text()) if (path / _METADATA).exists() else {}
    metadata.pop("dataset_id", None)
    return hashlib.sha256(identities.of_files(files) + json.dumps(metadata, sort_keys=True).encode()).digest()


class Dataset:
    """A written two-layer dataset: random access to clips, with images decoded only when asked for.

    Attributes:
        path: the folder of the shards.
        labels: class names.
        metadata: what `write_dataset` recorded (`context`, `fill`, notes).
        folder: where what belongs to the dataset lies beside its shards: secret, ledger, manifest, sheets.
    """

    def __init__(self, folder: str | pathlib.Path):
        import tensorflow_datasets as tfds

        folder = pathlib.Path(folder)
        self.path = folder / SHARDS if (folder / SHARDS).is_dir() else folder
        if not (self.path / "dataset_info.json").exists():
            raise UserError(f"{folder}: not a two-layer dataset, expected a folder that `maskdp anonymize` wrote")
        self._builder = tfds.builder_from_directory(self.path)
        self.metadata = dict(self._builder.info.metadata or {})
        if self.metadata.get("format") != FORMAT:
            raise UserError(f"{folder}: format {self.metadata.get('format')!r}, expected {FORMAT!r}")
        self.labels: list[str] = self._builder.info.features["label"].names
        self.folder = self.path.parent if self.path.name == SHARDS else self.path

    @property
    def splits(self) -> list[str]:
        """Names of the splits."""
        return sorted(self._builder.info.splits)

    def __getitem__(self, split: str) -> "Split":
        if split not in self._builder.info.splits:
            raise UserError(f"{self.path}: no split {split!r}, expected one of {', '.join(self.splits)}")
        return Split(self._builder, split)

    @functools.cached_property
    def identity(self) -> identities.Identity:
        """The dataset's random id, and the key for comparisons on this machine.

        A dataset that was copied without its secret gets a new key and a new id: its ledger is another.

        Raises:
            UserError: the secret cannot be read or made, or belongs to other contents.
        """
        written = self.metadata.get("dataset_id", "")
        identity = identities.Identity.at(self.folder, written)
        if written not in (identity.id, identity.written):
            raise UserError(
                f"{identity.path}: not the secret of this version of {self.path}; expected its own, or write it again"
            )
        return identity

    @property
    def id(self) -> str:
        """The random id: the only name of the dataset that may be released."""
        return self.identity.id

    def contents_tag(self) -> str:
        """Keyed hash over every file of the dataset: equal as long as nothing in it changes. For this machine only."""
        return self.identity.tag("contents", _digest(self.path))

    def source_tag(self, digest: str) -> str:
        """`Record.source` of clips made from the file with this SHA-256 (hex)."""
        return _source_tag(self.identity, digest)


class Split:
    """One split of a dataset, a sequence of records. `records[i]` decodes no image; `clip(i)` decodes all of them."""

    def __init__(self, builder, split: str):
        import tensorflow_datasets as tfds

        self.name = split
        self._source = builder.as_data_source(split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> "Record":
        return Record(self._source[index])

    def __iter__(self) -> Iterator["Record"]:
        return (self[index] for index in range(len(self)))

    def clip(self, index: int) -> TwoLayerClip:
        """Clip `index`, every frame decoded and the contract checked."""
        return self[index].clip()


class Record:
    """One stored clip: its keys at once, its frames on demand."""

    def __init__(self, serialized: bytes):
        from tensorflow_datasets.proto import tf_example_pb2

        feature = tf_example_pb2.Example.FromString(serialized).features.feature
        self._public = feature["public/rgba"].bytes_list.value
        self._private = feature["private/rgb"].bytes_list.value
        self.clip_id, self.video_id, self.scene_id, self.source = (
            feature[key].bytes_list.value[0].decode() for key in ("clip_id", "video_id", "scene_id", "source")
        )
        self.subject_ids = tuple(subject.decode() for subject in feature["subject_ids"].bytes_list.value)
        self.label, self.frames = (int(feature[key].int64_list.value[0]) for key in ("label", "frames"))
        self.fps = float(feature["fps"].float_list.value[0])

    def layers(self, frames: Sequence[int]) -> tuple[UInt8[np.ndarray, "t h w 4"], UInt8[np.ndarray, "t h w 3"]]:
        """The public and the private layer of the frames with these indices, contract checked."""
        rgba = np.stack([_decode(self._public[i], cv2.COLOR_BGRA2RGBA) for i in frames])
        private = np.stack([_decode(self._private[i], cv2.COLOR_BGR2RGB) for i in frames])
        check_layers(rgba, private, self.clip_id)
        return rgba, private

    @property
    def stored_public(self) -> Sequence[bytes]:
        """The encoded frames of the public layer."""
        return self._public

    @property
    def stored_private(self) -> Sequence[bytes]:
        """The encoded frames of the private layer."""
        return self._private

    def clip(self) -> TwoLayerClip:
        """The whole clip."""
        rgba, private = self.layers(range(self.frames))
        names = ("label", "clip_id", "video_id", "scene_id", "subject_ids", "source", "fps")
        return TwoLayerClip(rgba, private, **{name: getattr(self, name) for name in names})


def _decode(encoded: bytes, code: int) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
    return cv2.cvtColor(image, code)
