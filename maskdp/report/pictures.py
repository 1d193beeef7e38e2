"""The layers of a clip as moving pictures: one WebP sprite sheet a layer; CSS steps play them, so all keep time."""

import base64
import dataclasses
import hashlib
import io
import pathlib
from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from maskdp import layers

ORIGINAL = "original"

HEIGHT = 192
"""Pixels a frame is scaled down to."""
FRAMES = 16
"""Frames of a sprite sheet, spread evenly over the clip."""
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")


@dataclasses.dataclass(frozen=True)
class Panel:
    """One moving picture: `title`, and the frames side by side as a `data:` address."""

    title: str
    sheet: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Filmstrip:
    """The panels of one clip.

    Attributes:
        name: what the clip shows (its class).
        panels: in reading order.
        frames: frames of every sheet.
        seconds: time of one round.
        ratio: width over height.
    """

    name: str
    panels: tuple[Panel, ...]
    frames: int
    seconds: float
    ratio: float


def sprite_sheet(frames: UInt8[np.ndarray, "t h w c"], height: int = HEIGHT, quality: int = 62) -> str:
    """The frames side by side in one WebP image (alpha kept), as a `data:` address."""
    width = max(1, round(frames.shape[2] * height / frames.shape[1]))
    # Premultiplied while scaling, or the black under alpha = 0 would darken the avatar's edge.
    scaled = np.concatenate([_scaled(frame, width, height) for frame in frames], axis=1)
    file = io.BytesIO()
    Image.fromarray(scaled).save(file, "WEBP", quality=quality, method=6)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _scaled(frame: np.ndarray, width: int, height: int) -> np.ndarray:
    if frame.shape[2] == 3:
        return cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
    alpha = frame[..., 3:].astype(np.float32)
    premultiplied = np.concatenate([frame[..., :3] * (alpha / 255), alpha], axis=2)
    small = cv2.resize(premultiplied, (width, height), interpolation=cv2.INTER_AREA)
    colour = small[..., :3] / np.maximum(small[..., 3:] / 255, 1e-6)
    return np.concatenate([colour, small[..., 3:]], axis=2).round().clip(0, 255).astype(np.uint8)


def filmstrip(
    record: layers.Record, name: str, original: UInt8[np.ndarray, "t h w 3"] | None = None, count: int = FRAMES
) -> Filmstrip:
    """The panels of one stored clip, led by the `original` frames (one for each frame of the clip) where given."""
    chosen = np.linspace(0, record.frames - 1, min(count, record.frames)).round().astype(int)
    rgba, private = record.layers(chosen.tolist())
    panels = [
        Panel("private layer", sprite_sheet(private), "the scene, people removed"),
        Panel("public layer", sprite_sheet(rgba), "synthetic avatars over nothing"),
        Panel("composite", sprite_sheet(layers.composite(rgba, private)), "what the model sees"),
        Panel("public view", sprite_sheet(layers.public_view(rgba)), "free of any cost in ε"),
    ]
    if original is not None:
        panels.insert(0, Panel(ORIGINAL, sprite_sheet(original[chosen]), "the recording"))
    seconds = max(record.frames / record.fps, 0.5) if record.fps > 0 else 2.0
    return Filmstrip(name, tuple(panels), len(chosen), seconds, rgba.shape[2] / rgba.shape[1])


def videos_by_source(
    dataset: layers.Dataset, folder: str | pathlib.Path | None, records: Sequence[layers.Record]
) -> dict[str, pathlib.Path]:
    """`Record.source` → file, for the video files under `folder` that `records` were made from."""
    found: dict[str, pathlib.Path] = {}
    wanted = {record.source for record in records}
    for path in sorted(pathlib.Path(folder).rglob("*")) if folder else ():
        if len(found) == len(wanted):
            break
        if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
            with open(path, "rb") as file:
                source = dataset.source_tag(hashlib.file_digest(file, "sha256").hexdigest())
            if source in wanted:
                found[source] = path
    return found


def varied(split: Iterable[layers.Record], count: int) -> list[layers.Record]:
    """`count` records, of as many different labels as there are, in stored order."""
    records = list(split)
    first: dict[int, layers.Record] = {}
    for record in records:
        first.setdefault(record.label, record)
    rest = [record for record in records if all(record is not chosen for chosen in first.values())]
    return [*first.values(), *rest][:count]


def filmstrips(dataset: layers.Dataset, videos: str | pathlib.Path | None, count: int) -> list[Filmstrip]:
    """The first clips of `count` videos of different classes, test videos first.

    The originals lead where every one of them was found in `videos`.
    """
    splits = sorted(dataset.splits, key=lambda name: name != "test")
    clips = (record for split in splits for record in dataset[split])
    records = varied((record for record in clips if clip_number(record) == 0), count)
    found = videos_by_source(dataset, videos, records)
    originals = [source_frames(found.get(record.source), record) for record in records]
    if any(original is None for original in originals):
        originals = [None] * len(records)
    names = [dataset.labels[record.label] if record.label >= 0 else record.video_id for record in records]
    return [filmstrip(*each) for each in zip(records, names, originals)]


def clip_number(record: layers.Record) -> int:
    """Place of the clip in its video: the running number that ends its id."""
    digits = record.clip_id.rsplit("-", 1)[-1]
    return int(digits) if digits.isdigit() else 0


def source_frames(path: pathlib.Path | None, record: layers.Record) -> UInt8[np.ndarray, "t h w 3"] | None:
    """The frames of the source that the video's first clip was made of."""
    if path is None:
        return None
    from anonymize.vision import video

    frames = next(video.clips(path, short_side=2 * HEIGHT, max_frames=record.frames)).frames
    return frames if len(frames) == record.frames else None
