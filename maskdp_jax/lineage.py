"""Which records stand behind a run's weights, so that weights trained on protected records are not taken for public.

`lineage.json` in a run folder holds keyed hashes of every record that the run read, and of those behind its start
weights, with the random key they were made with. It stays in the run folder and is not part of an export.
"""

import collections
import hmac
import json
import pathlib
import secrets
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from maskdp import secret_file
from maskdp.errors import UserError
from maskdp_jax.data import Clips

FILE = "lineage.json"


class Source(NamedTuple):
    """One run behind some weights: what it trained with, on which dataset, and tags of the clips it read.

    Attributes:
        objective: of the run.
        dataset: id of its dataset.
        key: of the tags, hex.
        videos, private, public: tags of the clips' video ids and of their stored private and public layers.
    """

    objective: str
    dataset: str
    key: str
    videos: Sequence[str]
    private: Sequence[str]
    public: Sequence[str]


def of_clips(objective: str, dataset: str, clips: Clips) -> Source:
    """The source that a run on `clips` is."""
    key = secrets.token_bytes(32)
    return Source(objective, dataset, key.hex(), *(sorted(set(tags)) for tags in _tags(key, clips)))


def overlap(source: Source, clips: Clips, public_too: bool) -> collections.Counter:
    """How many of `clips` the source read, by what they share: `video ids`, `private layers`, `public layers`.

    A public layer counts only if `public_too`: under `remove` it is protected as well.
    """
    kinds = ("video ids", "private layers", "public layers")[: 3 if public_too else 2]
    known = (source.videos, source.private, source.public)
    tags = _tags(bytes.fromhex(source.key), clips)
    return collections.Counter({kind: len(set(mine) & set(theirs)) for kind, theirs, mine in zip(kinds, known, tags)})


def write(folder: pathlib.Path, sources: Iterable[Source]) -> None:
    """Writes `lineage.json`, mode 0600."""
    secret_file.replace(folder / FILE, (json.dumps([source._asdict() for source in sources]) + "\n").encode())


def read(folder: pathlib.Path) -> list[Source] | None:
    """The sources behind the weights of a run folder; None where it has no `lineage.json`, as an export.

    Raises:
        UserError: the file cannot be read.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        entries: list[dict[str, Any]] = json.loads(secret_file.read(path, "the lineage of a run"))
        return [Source(**entry) for entry in entries]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _tags(key: bytes, clips: Clips) -> tuple[list[str], list[str], list[str]]:
    """Tags of the clips' video ids, private layers and public layers, as they are stored."""
    videos, private, public = [], [], []
    for entry in clips.keys:
        record = clips.record(entry)
        videos.append(hmac.digest(key, b"video" + entry.video_id.encode(), "sha256").hex())
        private.append(_of_frames(key, b"private", record.stored_private))
        public.append(_of_frames(key, b"public", record.stored_public))
    return videos, private, public


def _of_frames(key: bytes, kind: bytes, frames: Iterable[bytes]) -> str:
    state = hmac.new(key, kind, "sha256")
    for frame in frames:
        state.update(len(frame).to_bytes(8, "little") + frame)
    return state.hexdigest()
