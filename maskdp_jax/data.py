"""Shards → records of the privacy unit → padded batches of both views, read ahead by grain."""

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import grain
import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

from maskdp import layers
from maskdp.errors import UserError
from maskdp_jax.config import DataConfig, PrivacyConfig


class Views(NamedTuple):
    """Records as a model sees them: B records of at most K clips.

    Attributes:
        composite: `x`, the avatars over the real scene.
        public: `x̃`, the avatars over the fill.
        label: class of each clip.
        weight: one over the record's number of clips; 0 in empty places.
        padding: rows that hold no record.
    """

    composite: UInt8[np.ndarray, "b k t h w 3"]
    public: UInt8[np.ndarray, "b k t h w 3"]
    label: Int32[np.ndarray, "b k"]
    weight: Float32[np.ndarray, "b k"]
    padding: Bool[np.ndarray, " b"]


@dataclasses.dataclass(frozen=True)
class Keys:
    """What a clip is sorted by: released side information, no pixels."""

    index: int
    clip_id: str
    label: int
    video_id: str
    scene_id: str
    subject_ids: tuple[str, ...]


class Clips:
    """The clips of one split, as pairs of views.

    Attributes:
        keys: of every clip (if `labelled`, every one with a label); a position in this list is a clip's number below.
        labels: class names.
    """

    def __init__(self, dataset: layers.Dataset, split: str, config: DataConfig, labelled: bool = True):
        self._records, self._config, self._memory = dataset[split], config, {}
        self.labels = list(dataset.labels)
        self.keys = [
            Keys(index, record.clip_id, record.label, record.video_id, record.scene_id, record.subject_ids)
            for index, record in enumerate(self._records)
            if record.label >= 0 or not labelled
        ]
        if not self.keys:
            raise UserError(f"{dataset.path}: split {split} has no {'labelled ' * labelled}clip")

    def __len__(self) -> int:
        return len(self.keys)

    def record(self, key: Keys) -> layers.Record:
        """The stored clip that `key` is of."""
        return self._records[key.index]

    def views(self, number: int) -> tuple[UInt8[np.ndarray, "t h w 3"], UInt8[np.ndarray, "t h w 3"]]:
        """Composite and public view of one clip, composed at full size, cropped and brought to `size` alike."""
        if (kept := self._memory.get(number)) is not None:
            return kept
        record = self.record(self.keys[number])
        rgba, private = record.layers(spaced(record.frames, self._config.frames))
        if self._config.crop:
            rgba, private = cropped(rgba, private, self._config.crop)
        made = tuple(
            resize(view, self._config.size) for view in (layers.composite(rgba, private), layers.public_view(rgba))
        )
        if self._config.cache:
            self._memory[number] = made
        return made

    def batch(self, records: Sequence[tuple[int, ...] | None], clips: int) -> Views:
        """Views of records, each a tuple of at most `clips` clip numbers, or None for a padding row."""
        config, rows = self._config, len(records)
        shape = (rows, clips, config.frames, config.size, config.size, 3)
        made = Views(
            np.zeros(shape, np.uint8),
            np.zeros(shape, np.uint8),
            np.zeros((rows, clips), np.int32),
            np.zeros((rows, clips), np.float32),
            np.array([record is None for record in records], bool),
        )
        for row, record in enumerate(records):
            for place, number in enumerate(record or ()):
                made.composite[row, place], made.public[row, place] = self.views(number)
                made.label[row, place] = self.keys[number].label
                made.weight[row, place] = 1 / len(record)
        return made


def spaced(length: int, count: int) -> list[int]:
    """`count` frame indices spaced evenly over a clip of `length`, its first and last included."""
    return np.linspace(0, length - 1, count).round().astype(int).tolist()


def cropped(
    rgba: UInt8[np.ndarray, "t h w 4"], private: UInt8[np.ndarray, "t h w 3"], margin: float
) -> tuple[UInt8[np.ndarray, "t s s 4"], UInt8[np.ndarray, "t s s 3"]]:
    """Both layers cut to one square around all avatars, wider than they are by `margin` of its side.

    Guarantees:
        The square follows from α alone, which is released side information; no private pixel moves it. Where it leaves
        the frame there is nothing: α = 0 over the fill. Without an avatar it is the largest one in the middle.
    """
    height, width = rgba.shape[1:3]
    covered = (rgba[..., 3] > 0).any(axis=0)
    if covered.any():
        rows, columns = np.flatnonzero(covered.any(axis=1)), np.flatnonzero(covered.any(axis=0))
        side = round((1 + margin) * max(np.ptp(rows), np.ptp(columns)) + 1)
        middle = (rows[0] + rows[-1]) / 2, (columns[0] + columns[-1]) / 2
    else:
        side, middle = min(height, width), (height / 2, width / 2)
    top, left = (
        round(min(max(centre - side / 2, 0), max(length - side, 0))) for centre, length in zip(middle, (height, width))
    )
    shape = (len(rgba), side, side)
    square, scene = np.zeros((*shape, 4), np.uint8), np.full((*shape, 3), layers.FILL, np.uint8)
    seen = np.s_[:, : min(side, height - top), : min(side, width - left)]
    taken = np.s_[:, top : top + side, left : left + side]
    square[seen], scene[seen] = rgba[taken], private[taken]
    return square, scene


def resize(frames: UInt8[np.ndarray, "t h w 3"], size: int) -> UInt8[np.ndarray, "t s s 3"]:
    """Every frame as a square of side `size`, by area."""
    return np.stack([cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA) for frame in frames])


def units(keys: Sequence[Keys], privacy: PrivacyConfig) -> list[tuple[int, ...]]:
    """The records: for each unit the numbers of the clips it contributes.

    Guarantees:
        Every clip is in at most one record, and with `subject` every clip of one person is in one and the same record
        or in none: clips of several people whose records differ are left out. Which clips count, and which are left
        out beyond `clips_per_record`, follows from a hash of the ids alone and never from a pixel.
        Under `zero_out` and `replace` the ids, hence the records, are the same in neighbouring datasets. Under `remove`
        a person's clips may leave: there `subject` leaves out every clip of several people, so that one person fewer is
        one record fewer and no other record changes. (With such clips, a person's absence would free theirs for
        others, and up to three records could change.)

    Raises:
        UserError: the unit is `subject` or `scene`, and a clip does not say whose or where it is.
    """
    order = sorted(range(len(keys)), key=lambda n: _hash(keys[n].clip_id))
    if privacy.unit == "subject":
        alone = privacy.adjacency == "remove"
        groups = _by_subject(keys, sorted(order, key=lambda n: len(keys[n].subject_ids)), alone)
        if not groups:
            raise UserError(
                "privacy.unit: subject under remove leaves out clips of several people; there are no others"
            )
    else:
        groups = {}
        for number in order:
            key = getattr(keys[number], f"{privacy.unit}_id")
            if not key:
                raise UserError(
                    f"clip {keys[number].clip_id}: no {privacy.unit}_id, which privacy.unit {privacy.unit} needs"
                )
            groups.setdefault(key, []).append(number)
    most = privacy.clips_per_record or None
    return [tuple(sorted(numbers[:most])) for _, numbers in sorted(groups.items(), key=lambda item: str(item[0]))]


def _by_subject(keys: Sequence[Keys], order: Sequence[int], alone: bool) -> dict[Any, list[int]]:
    """Record → clips. A clip joins the record that owns all its subjects; a clip with only new subjects starts one.

    With `alone`, clips of several people are left out.
    """
    owner: dict[str, tuple[str, ...]] = {}
    groups: dict[Any, list[int]] = {}
    for number in order:
        people = tuple(sorted(set(keys[number].subject_ids)))
        if not people:
            raise UserError(f"clip {keys[number].clip_id}: names no subject, which privacy.unit subject needs")
        if alone and len(people) > 1:
            continue
        if not any(person in owner for person in people):
            owner |= dict.fromkeys(people, people)
        records = {owner.get(person) for person in people}
        if len(records) == 1 and None not in records:
            groups.setdefault(records.pop(), []).append(number)
    return groups


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def shared_units(privacy: PrivacyConfig, train: Sequence[Keys], other: Sequence[Keys]) -> list[str]:
    """Units of `privacy.unit` that have clips in both, sorted; videos count whatever the unit."""

    def of(keys: Sequence[Keys]) -> set[str]:
        found = {f"video {key.video_id}" for key in keys}
        if privacy.unit == "subject":
            found |= {f"subject {subject}" for key in keys for subject in key.subject_ids}
        if privacy.unit == "scene":
            found |= {f"scene {key.scene_id}" for key in keys if key.scene_id}
        return found

    return sorted(of(train) & of(other))


def contributions(keys: Sequence[Keys], records: Sequence[tuple[int, ...]]) -> dict[str, int | None]:
    """Most records one person, one place and one video have: how far ε for one record is from ε for them.

    None where a clip does not say who is in it or where it was filmed: any of the records may then share them.
    """
    tally: dict[str, Counter] = {"person": Counter(), "place": Counter(), "video": Counter()}
    for record in records:
        tally["person"].update({person for number in record for person in keys[number].subject_ids})
        tally["place"].update({keys[number].scene_id for number in record})
        tally["video"].update({keys[number].video_id for number in record})
    used = [keys[number] for record in records for number in record]
    known = {"person": all(k.subject_ids for k in used), "place": all(k.scene_id for k in used), "video": True}
    return {name: max(count.values(), default=0) if known[name] else None for name, count in tally.items()}


def stream(load: Callable[[int], Any], start: int, stop: int, threads: int) -> Iterator[Any]:
    """`load(start)` … `load(stop - 1)`, read ahead by grain's threads; a run resumes by its `start`."""
    steps = grain.MapDataset.range(start, stop).map(functools.partial(_loaded, load))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(steps.to_iter_dataset(options))


def _loaded(load: Callable[[int], Any], step: int) -> Any:
    return load(int(step))
