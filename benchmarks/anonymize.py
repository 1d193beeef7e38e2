"""What anonymizing costs beside decoding alone, and where the time goes: `python -m benchmarks.anonymize [VIDEO...]`.

The embedded path on one core, at most 256 px, on studio videos where none are given. Only the ratios of one run mean
something: both sides are measured in turn on the same machine in the same state. `--json` prints the figures as JSON.
"""

import argparse
import functools
import json
import pathlib
import tempfile
import time
from collections import Counter

import cv2
import tensorflow_datasets  # noqa: F401, its import is not to be counted
import torch

from anonymize import command, pipeline
from anonymize.config import AnonymizeConfig
from anonymize.studio import film
from anonymize.vision import video
from maskdp import layers

SHORT_SIDE, MAX_FRAMES = 256, 300
STAGES = ("decode", "find", "remove", "fit", "render", "encode", "the rest")


def spent_in(seconds: Counter, stage: str, function):
    """`function`, whose processor time is counted under `stage`."""

    @functools.wraps(function)
    def counted(*arguments, **options):
        start = time.process_time()
        try:
            return function(*arguments, **options)
        finally:
            seconds[stage] += time.process_time() - start

    return counted


def frames_of(path: pathlib.Path) -> int:
    return sum(len(clip.frames) for clip in video.clips(path, short_side=SHORT_SIDE, max_frames=MAX_FRAMES))


def measure(paths: list[pathlib.Path], out: pathlib.Path) -> dict:
    """Seconds of processor time of each stage, of decoding alone, and the frames there were."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    settings = AnonymizeConfig(out=str(out), sheets="none")
    seconds = Counter()
    anonymizer = pipeline.Anonymizer(settings, bytes(32))
    anonymizer.finder.find = spent_in(seconds, "find", anonymizer.finder.find)
    anonymizer.fitter = spent_in(seconds, "fit", anonymizer.fitter)
    pipeline.remove = spent_in(seconds, "remove", pipeline.remove)
    pipeline.render_public = spent_in(seconds, "render", pipeline.render_public)
    frames = sum(map(spent_in(seconds, "decode", frames_of), paths))
    keep, write = (spent_in(seconds, "encode", f) for f in (command.write_work, layers.write_dataset))
    written = []

    def clips():
        for name, fps in written:
            layer = command.read_work(out / f"{name}.npz")
            yield layers.TwoLayerClip(*layer, 0, name, name, "", (), "", fps)

    start = time.process_time()
    for path in paths:
        for number, part in enumerate(video.clips(path, short_side=SHORT_SIDE, max_frames=MAX_FRAMES)):
            name = f"{path.stem}-{number}"
            result = anonymizer.clip(part.frames, part.fps, name)
            if result.status == "written":
                written.append((name, part.fps))
                keep(out / f"{name}.npz", result.rgba, result.private)
    write(out, {"train": clips()}, ["unknown"])
    total = time.process_time() - start
    seconds["the rest"] = total - sum(seconds.values())
    return {
        "videos": len(paths),
        "frames": frames,
        "clips_written": len(written),
        "seconds": dict(seconds),
        "total_seconds": total,
        "ratio_to_decoding": total / seconds["decode"],
        "frames_per_second": frames / total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("videos", nargs="*", type=pathlib.Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = options.videos
        if not paths:
            film.main(["--out", f"{folder}/studio", "--videos", "4", "--frames", "48", "--size", "256", "--seed", "1"])
            paths = sorted(pathlib.Path(folder, "studio").rglob("*.mp4"))
        figures = measure(paths, pathlib.Path(folder))
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    print(f"{figures['videos']} videos, {figures['frames']} frames, {figures['clips_written']} clips written")
    print(
        f"{figures['ratio_to_decoding']:.0f} times decoding alone, {figures['frames_per_second']:.1f} frames/s a core"
    )
    for stage in STAGES:
        print(f"  {stage:<9}{1000 * figures['seconds'][stage] / figures['frames']:9.1f} ms a frame")


if __name__ == "__main__":
    main()
