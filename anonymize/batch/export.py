"""Finished clips as videos to be played, one mp4 a video and view: the pictures of its clips, at their times."""

import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np

from anonymize.vision import video
from maskdp import layers

VIEWS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "composite": layers.composite,
    "public": lambda rgba, private: layers.public_view(rgba),
    "private": lambda rgba, private: private,
}
LAB_ONLY = "LAB ONLY: original | composite"
_STRIP = 20  # pixels; above the pictures, for that line

Layers = Callable[[str], tuple[np.ndarray, np.ndarray]]


def views(folder: pathlib.Path, key: str, records: Sequence[dict[str, Any]], load: Layers) -> None:
    """Writes FOLDER/KEY-composite.mp4, -public.mp4 and -private.mp4; nothing where no clip was written.

    Clips that were not written are grey for as long as they last.

    Args:
        records: of the video's clips, in order.
        load: the two layers of a clip by its name.
    """
    for name, view in VIEWS.items():
        _write(folder / f"{key}-{name}.mp4", records, lambda record, view=view: view(*load(record["clip_id"])))


def beside_original(
    folder: pathlib.Path, key: str, records: Sequence[dict[str, Any]], load: Layers, originals: Iterable[video.Video]
) -> None:
    """Writes FOLDER/KEY.mp4, the original beside the composite, with a line in the picture that says what it is.

    Args:
        originals: the same clips as they were read.
    """
    clips = iter(originals)

    def pictures(record: dict[str, Any]) -> np.ndarray:
        original = next(clips).frames
        result = np.full_like(original, layers.FILL)
        if record["status"] == "written":
            result = layers.composite(*load(record["clip_id"]))
        both = np.concatenate([original, result], 2)
        strip = np.zeros((_STRIP, both.shape[2], 3), np.uint8)
        cv2.putText(strip, LAB_ONLY, (4, _STRIP - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255, 255, 255))
        return np.concatenate([np.broadcast_to(strip, (len(both), *strip.shape)), both], 1)

    _write(folder / f"{key}.mp4", records, pictures, every=True)


def _write(path: pathlib.Path, records, pictures: Callable[[dict[str, Any]], np.ndarray], every: bool = False) -> None:
    written = [record for record in records if record["status"] == "written"]
    if not written:
        return
    path.parent.mkdir(exist_ok=True)
    first = pictures(written[0])[0].shape if not every else None

    def frames() -> Iterator[np.ndarray]:
        shape = first
        for record in records:
            if every or record["status"] == "written":
                clip = pictures(record)
            else:
                clip = np.broadcast_to(np.full(shape, layers.FILL, np.uint8), (record["frames"], *shape))
            shape = shape or clip.shape[1:]
            yield from (_fitted(picture, shape) for picture in clip)

    steps = np.repeat([1 / record["fps"] for record in records], [record["frames"] for record in records])
    video.encode(path, frames(), records[0]["fps"], times=np.cumsum(steps) - steps)


def _fitted(picture: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A picture of another size scaled into the first one's, on grey."""
    if picture.shape == shape:
        return picture
    scale = min(shape[0] / picture.shape[0], shape[1] / picture.shape[1])
    small = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)[: shape[0], : shape[1]]
    out = np.full(shape, layers.FILL, np.uint8)
    out[: small.shape[0], : small.shape[1]] = small
    return out
