"""`maskdp anonymize` as a user runs it: bad files beside good ones, broken-off runs, secrets.

The finder here takes whatever is red for a person, so that the videos can be small; everything else is the real thing.
"""

import csv
import dataclasses
import fractions
import itertools
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import threading
import time

import av
import cv2
import numpy as np
import pytest
import torch

from anonymize import command, pipeline
from anonymize.avatar.body import Body
from anonymize.avatar.camera import Camera
from anonymize.avatar.render import silhouette
from anonymize.fitting.fit import FitConfig
from anonymize.people import FinderConfig, People, Person
from anonymize.studio import motions
from anonymize.vision import video
from maskdp import cli, layers
from maskdp.errors import UserError

WIDTH, HEIGHT, FRAMES = 96, 64, 6
SMALL = ["--fit.library", "300", "--fit.steps", "4", "--video.short_side", "64"]


class RedFinder:
    """Takes whatever is red for one person."""

    def __init__(self, config: FinderConfig):
        pass

    def find(self, frames: np.ndarray, fps: float) -> People:
        masks = frames[..., 0].astype(int) - frames[..., 1] > 60
        masks = np.stack([cv2.medianBlur(mask.astype(np.uint8), 3) > 0 for mask in masks])
        removal = np.stack([cv2.dilate(mask.astype(np.uint8), np.ones((9, 9))) > 0 for mask in masks])
        joints, boxes = np.zeros((len(masks), 14, 3), np.float32), np.zeros((len(masks), 4), np.float32)
        person = Person(0, masks.any((1, 2)), boxes, masks, joints)
        return People((person,) if masks.any() else (), removal, True, None, None, None, {"removed": removal.mean()})


@pytest.fixture(autouse=True)
def red_people(monkeypatch):
    for name in ("BlazePoseFinder", "EmbeddedFinder"):
        monkeypatch.setattr(pipeline, name, RedFinder)


def film(path: pathlib.Path, action: str | None = "wave", seed: int = 0, frames: int = FRAMES) -> pathlib.Path:
    """A video of a red figure in a grey room; of the room alone where there is no action."""
    scene = np.tile(np.linspace(60, 150, WIDTH, dtype=np.uint8)[:, None], (HEIGHT, 1, 3))
    pictures = np.repeat(scene[None], frames, 0)
    if action:
        body = Body()
        camera = Camera.look_at((0, 1.2, 4), (0, 0.9, 0), WIDTH, HEIGHT, 1.2 * WIDTH)
        posed = body(torch.zeros(10), motions.ACTIONS[action](np.random.default_rng(seed), frames, 10.0))
        for picture, vertices in zip(pictures, posed.vertices):
            picture[silhouette(vertices, body.faces, camera).numpy()] = (220, 20, 20)
    video.encode(path, pictures, 10.0, crf=8)
    return path


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("films")
    for action in ("wave", "squat", "walk"):
        (folder / action).mkdir()
        film(folder / action / "a.mp4", action)
    return folder


def records(out: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def test_bad_files_beside_a_good_one(tmp_path, capfd):
    """Each gives one clear line, the good one is finished, and the exit status is 1."""
    good = film(tmp_path / "good.mp4")
    whole = film(tmp_path / "whole.mp4", "walk", frames=30).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    middle = whole.index(b"mdat") + (whole.index(b"moov") - whole.index(b"mdat")) // 2
    noise = np.random.default_rng(0).bytes(200)
    (tmp_path / "damaged.mp4").write_bytes(whole[:middle] + noise + whole[middle + len(noise) :])
    (tmp_path / "text.mp4").write_text("this is not a video\n" * 50)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with av.open(str(tmp_path / "frameless.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        container.start_encoding()
    film(tmp_path / "nobody.mp4", None)
    names = ("cut.mp4", "damaged.mp4", "text.mp4", "sound.mp4", "frameless.mkv", "nobody.mp4", "missing.mp4")
    bad = [str(tmp_path / name) for name in names]
    out = tmp_path / "out"
    assert cli.main(["anonymize", *bad, str(good), "--out", str(out), *SMALL]) == 1
    said = capfd.readouterr()
    assert "Traceback" not in said.err
    for path in bad:
        assert len([line for line in said.err.splitlines() if path in line]) == 1, path
    assert "1 clips written, 1 quarantined, 5 files failed" in said.out
    assert "quarantined 1: no person found" in said.out
    dataset = layers.Dataset(out)
    assert [clip.source for clip in dataset["train"]] == [dataset.source_tag(video.sha256(good))]
    assert not list((out / "work").glob(".*"))  # nothing half written is left
    assert sorted(r["status"] for r in records(out)) == ["failed"] * 5 + ["quarantined", "written"]
    assert str(tmp_path) not in (out / "manifest.jsonl").read_text()
    assert (out / "sheets" / f"{dataset['train'][0].clip_id}.jpg").exists()


def record(path: pathlib.Path, pictures: np.ndarray, codec="ffv1", pixels="bgr0", times=None, rate=10) -> pathlib.Path:
    """Writes pictures (T, H, W, 3) as they are; `times` in frames at `rate`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], pixels
        stream.time_base = stream.codec_context.time_base = fractions.Fraction(1, rate)
        for time, picture in zip(times if times is not None else range(len(pictures)), pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = time, stream.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def red_block(frames: int, height: int, width: int) -> np.ndarray:
    """A red upright block that goes from left to right through a grey room."""
    scene = np.tile(np.linspace(60, 150, width, dtype=np.uint8)[:, None], (height, 1, 3))
    pictures = np.repeat(scene[None], frames, 0)
    for t, picture in enumerate(pictures):
        left = (t + 1) * width // (frames + 3)
        picture[height // 5 : -height // 6, left : left + width // 6] = (220, 20, 20)
    return pictures


def test_unusual_videos_are_anonymized_as_they_are_meant_to_be_seen(tmp_path, capfd):
    """Turned ones upright, odd sides made even, 4K scaled, a changing rate evened, whatever their names."""
    folder = tmp_path / "ビデオ ö"
    folder.mkdir()
    film(folder / "turned.mp4")
    stored = (folder / "turned.mp4").read_bytes()
    upright = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    quarter = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, HEIGHT << 16, 0, 1 << 30)
    (folder / "turned.mp4").write_bytes(stored.replace(upright, quarter, 1))
    record(folder / "odd.mkv", red_block(3, 71, 93))
    record(folder / "4K.mkv", red_block(2, 2160, 3840), "libx264", "yuv420p")
    record(folder / "uneven.mkv", red_block(6, 64, 96), "libx264", "yuv420p", times=(0, 1, 2, 6, 10, 14))
    record(folder / "one frame.mkv", red_block(1, 64, 96))
    record(folder / "naïve 视频.mkv", red_block(3, 64, 96))
    record(folder / "grey.mkv", red_block(4, 64, 96), pixels="gray")
    os.rename(folder / "one frame.mkv", os.fsencode(folder) + b"/\xff.mkv")  # a name in no encoding
    out = tmp_path / "aus gäbe"
    assert cli.main(["anonymize", str(folder), "--out", str(out), *SMALL, "--limits.max_without_pose", "1"]) == 0
    said = capfd.readouterr()
    assert "Traceback" not in said.err
    assert "grey.mkv: quarantined, no person found" in said.err
    with open(out / "local_paths.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        names = {row["video_id"]: pathlib.Path(row["path"]).name for row in csv.DictReader(file)}
    found = {names[r["video_id"]]: r for r in records(out)}
    assert found["grey.mkv"]["frames"] == 4
    assert {name: r["status"] for name, r in found.items() if r["status"] != "written"} == {"grey.mkv": "quarantined"}
    clips = {names[r.video_id]: r.clip() for r in layers.Dataset(out)["train"]}
    sizes = {name: clip.rgba.shape[:3] for name, clip in clips.items()}
    assert sizes == {
        "turned.mp4": (6, 96, 64),
        "odd.mkv": (3, 64, 82),
        "4K.mkv": (2, 64, 112),
        "uneven.mkv": (6, 64, 96),
        "\udcff.mkv": (1, 64, 96),
        "naïve 视频.mkv": (3, 64, 96),
    }
    assert clips["uneven.mkv"].fps == pytest.approx(5 / 1.4, rel=0.01)


def test_whatever_a_folder_holds_its_videos_are_found_once(tmp_path):
    """Links are followed, loops are not gone round, and what cannot be read is said."""
    folder = tmp_path / "films"
    (folder / "inner").mkdir(parents=True)
    for file in (folder / "a.mp4", folder / "inner" / "b.MP4", tmp_path / "elsewhere" / "c.mp4"):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    (folder / "inner" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "out").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (folder / "round.mp4").symlink_to("round.mp4")
    (folder / "gone.mp4").symlink_to("nowhere.mp4")
    os.mkfifo(folder / "pipe.mp4")
    settings = command.AnonymizeConfig(out="x").dataset
    sources, problems = command.gather([str(folder), str(folder / "pipe.mp4"), str(folder / "round.mp4")], settings)
    assert [source.name for source in sources] == ["films/a.mp4", "films/inner/b.MP4", "films/out/c.mp4"]
    assert sorted(line.split(": ")[0] for line in problems) == sorted(
        str(folder / name) for name in ("gone.mp4", "pipe.mp4", "pipe.mp4", "round.mp4", "round.mp4")
    )


@pytest.mark.parametrize(
    ("entry", "message"),
    [({"path": 5}, "entry 1 has no path"), ({"path": "a", "subject_ids": 3}, "subject_ids 3"), ("a", "has no path")],
)
def test_a_manifest_of_other_types_is_one_line(tmp_path, entry, message):
    (tmp_path / "list.jsonl").write_text(json.dumps(entry))
    with pytest.raises(UserError, match=message):
        command.gather([str(tmp_path / "list.jsonl")], command.AnonymizeConfig(out="x").dataset)


def test_a_manifest_of_a_spreadsheet_is_read(tmp_path):
    (tmp_path / "list.csv").write_text("path,label\nfilm ö.mp4,wave\n", encoding="utf-8-sig")
    (source,), _ = command.gather([str(tmp_path / "list.csv")], command.AnonymizeConfig(out="x").dataset)
    assert (source.name, source.label) == ("film ö.mp4", "wave")


@pytest.mark.skipif(not os.path.isdir("/sys"), reason="a folder that nobody can write, root neither: /sys of Linux")
def test_a_folder_that_cannot_be_written_is_one_line(films, capfd):
    assert cli.main(["anonymize", str(films), "--out", "/sys/out", "--finder.type", "embedded"]) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith("maskdp anonymize: /sys/out: ")


@pytest.mark.slow
def test_ten_thousand_frames_take_no_more_memory_than_a_thousand(tmp_path):
    peaks = []
    for frames in (1_000, 10_000):
        file = tmp_path / f"{frames}.mp4"
        scene = np.random.default_rng(0).integers(90, 120, (10, 64, 96, 3), np.uint8)
        video.encode(file, itertools.islice(itertools.cycle(scene), frames), 25.0)
        code = f"""
import resource, runpy, sys
sys.argv[1:] = {[str(file), "--out", str(tmp_path / str(frames)), "--video.max_frames", "100", *SMALL]}
try:
    runpy.run_path({__file__!r}, run_name="__main__")
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert f"{frames // 100} quarantined" in said
        peaks.append(int(said.splitlines()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 60  # MB; the decoded frames alone are 184


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, and a function that gives it so many kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here: needs root")
    yield folder, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}k", folder], check=True)
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line_and_with_more_room_the_run_goes_on(films, disk, capfd, workers):
    """First no clip can be kept, then all can but no shard be written."""
    folder, resize = disk
    out = folder / "out"
    arguments = ["anonymize", str(films), "--out", str(out), "--workers", workers, *SMALL]
    arguments += ["--dataset.private_format", "png", "--finder.type", "embedded"]

    def anonymize() -> int:
        return cli.main(arguments) if workers == "1" else run(*arguments[1:]).wait()

    for size, place, kept in ((24, out, 0), (160, out / layers.SHARDS, 3)):
        resize(size)
        assert anonymize() == 2
        said = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("anonymize: ")]
        assert said == [
            f"maskdp anonymize: {place}: No space left on device; once it can be written, run again to go on"
        ]
        assert len(list((out / "work").glob("*.npz"))) == kept
        assert not [left for left in out.rglob(".*") if not left.name.endswith("lock")]
    kept = {file: file.stat().st_mtime_ns for file in (out / "work").glob("*.npz")}
    resize(1000)
    assert anonymize() == 0
    assert {file: file.stat().st_mtime_ns for file in (out / "work").glob("*.npz")} == kept
    assert len(layers.Dataset(out)["train"]) == 3


def test_one_video_is_shown_soon_exported_and_its_progress_counted_in_frames(tmp_path, capfd, monkeypatch):
    """A span of it; a second run makes only what is missing."""
    monkeypatch.setattr(command, "PREVIEW", 3)
    path, out = film(tmp_path / "one.mp4", "wave", frames=20), tmp_path / "out"
    options = ["--span", "0.5-1.64", "--video.max_frames", "8", "--export", "mp4", *SMALL]
    assert cli.main(["anonymize", str(path), "--out", str(out), *options]) == 0
    said = capfd.readouterr()
    assert f"preview: {out / 'preview.jpg'}" in said.err
    assert cv2.imread(str(out / "preview.jpg")).shape[1] == 3 * WIDTH
    assert "anonymize: 11/11 in" in said.err
    first, second = records(out)
    assert [first["frames"], second["frames"]] == [8, 4]
    made = {file: file.stat().st_mtime_ns for file in (out / "mp4").iterdir()}
    assert len(made) == 3
    (shown,) = video.clips(next(file for file in made if "composite" in file.name), max_frames=1000)
    assert (len(shown.frames), shown.fps) == (12, 10)
    assert not (out / "lab_only").exists()
    options[options.index("mp4")] = "lab"
    assert cli.main(["anonymize", str(path), "--out", str(out), *options]) == 0
    said = capfd.readouterr()
    assert {file: file.stat().st_mtime_ns for file in made} == made
    assert "never release" in said.out
    assert "preview" not in said.err
    assert len(list((out / "lab_only").iterdir())) == 1
    assert all(record["people_kept"] == 0 for record in records(out))


class HalvesFinder(RedFinder):
    """Takes what is red in the left and in the right half for two people."""

    def find(self, frames: np.ndarray, fps: float) -> People:
        found = super().find(frames, fps)
        (both,), persons = found.persons, []
        for track, half in enumerate((slice(0, WIDTH), slice(WIDTH, None))):
            masks = np.zeros_like(both.masks)
            masks[:, :, half] = both.masks[:, :, half]
            boxes = np.tile(np.float32([half.start, 0, half.stop or 2 * WIDTH, HEIGHT]), (len(masks), 1))
            persons.append(dataclasses.replace(both, track_id=track, masks=masks, boxes=boxes))
        return dataclasses.replace(found, persons=tuple(persons))


def test_who_is_kept_is_recorded_and_only_in_one_video(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(pipeline, "BlazePoseFinder", HalvesFinder)
    (alone,) = video.clips(film(tmp_path / "alone.mp4"), max_frames=100)
    path, out = tmp_path / "two.mp4", tmp_path / "out"
    video.encode(path, np.concatenate([alone.frames, alone.frames[:, :, ::-1]], 2), 10.0, crf=8)

    def anonymize(*options: str) -> int:
        return cli.main(["anonymize", str(path), "--out", str(out), *SMALL, *options])

    assert anonymize("--keep", f"0.2@{WIDTH // 2},{HEIGHT // 2}") == 0
    assert [record["people_kept"] for record in records(out)] == [1]
    dataset = layers.Dataset(out)
    assert dataset.metadata["people_kept"] == 1
    clip = dataset["train"].clip(0)
    red = (clip.private[..., 0].astype(int) - clip.private[..., 1]) > 60
    assert red[:, :, :WIDTH].any((1, 2)).all()
    assert not red[:, :, WIDTH:].any()
    assert not clip.rgba[:, :, : WIDTH // 2].any()
    assert clip.rgba[:, :, WIDTH:].any((1, 2, 3)).all()
    assert anonymize("--only", f"0.2@{WIDTH},0,{2 * WIDTH},{HEIGHT}") == 0
    assert np.array_equal(layers.Dataset(out)["train"].clip(0).private, clip.private)
    capfd.readouterr()
    assert anonymize("--keep", "0.2@5000,2") == 1
    assert "failed, no person at 0.2 s where --keep" in capfd.readouterr().err
    assert cli.main(["anonymize", str(path), str(path), "--out", str(out), "--only", "0@1,1"]) == 2


def test_quarantine_alone_is_no_failure(tmp_path, capfd):
    out = tmp_path / "out"
    assert cli.main(["anonymize", str(film(tmp_path / "nobody.mp4", None)), "--out", str(out), *SMALL]) == 0
    said = capfd.readouterr()
    assert "0 clips written, 1 quarantined" in said.out
    assert not (out / layers.SHARDS).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do"),
        (["--out", "OUT"], "no PATH"),
        (["missing.mp4"], "--out: missing"),
        (["missing.mp4", "--out", "OUT"], "missing.mp4: no such file"),
        (["missing.mp4", "--out", "OUT", "--colour", "red"], "--colour"),
        (["missing.mp4", "--out", "OUT", "--fit.steps", "0"], "FitConfig.steps: 0"),
        (["missing.mp4", "--out", "OUT", "--limits.max_blanked", "7"], "limits.max_blanked: 7"),
        (["missing.mp4", "--out", "OUT", "--span", "7-3"], "--span: '7-3', expected two times"),
        (["missing.mp4", "--out", "OUT", "--keep", "left"], "--keep: 'left', expected SECONDS@X,Y"),
        (["broken.csv", "--out", "OUT", "--export", "avi"], "export: 'avi', expected"),
        (["missing.mp4", "--out", "OUT", "--config_path", "none.yaml"], "none.yaml: no such config file"),
        (["broken.csv", "--out", "OUT"], "entry 1 has no path"),
        (["EMPTY", "--out", "OUT"], "no video in this folder"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(tmp_path, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("EMPTY").mkdir()
    pathlib.Path("broken.csv").write_text("file,label\na.mp4,wave\n")
    assert cli.main(["anonymize", *arguments]) == 2
    said = capfd.readouterr()
    assert message in said.err
    assert "Traceback" not in said.err
    assert not pathlib.Path("OUT").exists()


def test_manifest_gives_labels_subjects_scenes_and_splits(films, tmp_path):
    rows = [
        {"path": "wave/a.mp4", "label": "wave", "subject_ids": "ann;bob", "scene_id": "hall", "split": "test"},
        {"path": "squat/a.mp4", "label": "squat", "subject_ids": "", "scene_id": "", "split": ""},
    ]
    with open(films / "list.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (films / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    taken = [
        command.gather([str(films / name)], command.AnonymizeConfig(out="x").dataset)
        for name in ("list.csv", "list.jsonl")
    ]
    assert taken[0] == taken[1]
    out = tmp_path / "out"
    assert cli.main(["anonymize", str(films / "list.csv"), "--out", str(out), *SMALL]) == 0
    dataset = layers.Dataset(out)
    assert dataset.labels == ["squat", "wave"]
    (wave,), (squat,) = dataset["test"], dataset["train"]
    assert (wave.label, wave.subject_ids, wave.scene_id) == (1, ("ann", "bob"), "hall")
    assert (squat.label, squat.subject_ids, squat.scene_id) == (0, (), "")


def test_folders_label_where_asked_and_long_videos_become_several_clips(films, tmp_path):
    out = tmp_path / "out"
    options = ["--dataset.label_from", "folder", "--video.max_frames", "4", "--dataset.private_format", "png"]
    assert cli.main(["anonymize", str(films), "--out", str(out), *SMALL, *options]) == 0
    dataset = layers.Dataset(out)
    assert dataset.labels == ["squat", "walk", "wave"]
    assert sorted((clip.label, clip.frames) for clip in dataset["train"]) == [(i, n) for i in range(3) for n in (2, 4)]
    assert len({clip.video_id for clip in dataset["train"]}) == 3
    for record in records(out):
        work = command.read_work(out / "work" / f"{record['clip_id']}.npz")
        clip = next(c for c in dataset["train"] if c.clip_id == record["clip_id"]).clip()
        assert np.array_equal(work[0], clip.rgba)  # lossless all the way
        assert np.array_equal(work[1], clip.private)


def test_public_shards_do_not_change_when_the_scene_does(tmp_path):
    """Non-interference through the command: other background pixels, the same person, the same public bytes."""
    layer = []
    for shade in (0, 60):
        folder = tmp_path / str(shade)
        folder.mkdir()
        body, camera = Body(), Camera.look_at((0, 1.2, 4), (0, 0.9, 0), WIDTH, HEIGHT, 1.2 * WIDTH)
        posed = body(torch.zeros(10), motions.ACTIONS["wave"](np.random.default_rng(0), 3, 10.0))
        pictures = np.random.default_rng(shade).integers(shade, shade + 30, (3, HEIGHT, WIDTH, 1), np.uint8)
        pictures = np.repeat(pictures, 3, 3)
        for picture, vertices in zip(pictures, posed.vertices):
            picture[silhouette(vertices, body.faces, camera).numpy()] = (255, 20, 20)
        with av.open(str(folder / "a.mkv"), "w") as container:
            stream = container.add_stream("ffv1", rate=10)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "bgr0"
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
        secret = tmp_path / "secret"
        secret.write_bytes(bytes(range(32)))
        arguments = [str(folder / "a.mkv"), "--out", str(folder / "out"), "--wardrobe_secret", str(secret), *SMALL]
        assert cli.main(["anonymize", *arguments]) == 0
        layer.append(layers.Dataset(folder / "out")["train"].clip(0))
    assert layer[0].rgba.tobytes() == layer[1].rgba.tobytes()
    assert not np.array_equal(layer[0].private, layer[1].private)
    assert layer[0].source != layer[1].source


def run(*arguments, **options) -> subprocess.Popen:
    """The command in a process of its own, with the finder of this file."""
    return subprocess.Popen([sys.executable, __file__, *map(str, arguments)], **options)


def kill_at(number: int, out: str) -> None:
    """This process is killed just before it opens, makes, renames or removes something in `out` for the n-th time."""
    events = open(f"{out}.events", "w")  # noqa: SIM115
    seen = itertools.count()

    def before(event: str, arguments: tuple) -> None:
        if event.startswith(("open", "os.")) and arguments and str(arguments[0]).startswith(f"{out}/"):
            if next(seen) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            events.write(f"{event} {arguments[0]}\n")
            events.flush()

    sys.addaudithook(before)


def test_a_killed_run_goes_on_to_the_same_shards_and_the_secret_stays_where_it_is(films, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert cli.main(["anonymize", str(films), "--out", str(whole), *SMALL]) == 0
    secret = (whole / "wardrobe.secret").read_bytes()
    assert (whole / "wardrobe.secret").stat().st_mode & 0o777 == 0o600
    broken.mkdir()
    command.wardrobe_secret(broken / "wardrobe.secret", create=True)
    (broken / "wardrobe.secret").write_bytes(secret)

    child = run(films, "--out", broken, "--workers", 2, *SMALL)
    while not list((broken / "work").glob("[0-9a-f]*.json")):
        assert child.poll() is None
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    finished = list((broken / "work").glob("[0-9a-f]*.json"))
    first = {file: file.stat().st_mtime_ns for video in finished for file in video.parent.glob(f"{video.stem}-*.npz")}
    assert first
    assert not (broken / layers.SHARDS).exists()
    assert cli.main(["anonymize", str(films), "--out", str(broken), *SMALL]) == 0
    assert all(file.stat().st_mtime_ns == then for file, then in first.items())
    assert layers.Dataset(broken).contents_tag() == layers.Dataset(whole).contents_tag()
    for file in whole.rglob("*"):
        if file.is_file() and file.name != "wardrobe.secret":
            data = file.read_bytes()
            assert secret not in data, file
            assert secret.hex().encode() not in data.lower(), file


@pytest.fixture(scope="module")
def uninterrupted(films, tmp_path_factory) -> pathlib.Path:
    """What a run leaves that nothing disturbs."""
    out = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "BlazePoseFinder", RedFinder)
        patch.setattr(pipeline, "EmbeddedFinder", RedFinder)
        assert cli.main(["anonymize", str(films), "--out", str(out), *SMALL]) == 0
    return out


def same(out: pathlib.Path, whole: pathlib.Path) -> bool:
    """The same shards to the byte, the same clips in the manifest, and nothing half written beside them."""
    clips = [[{**r, "seconds": None} for r in records(folder)] for folder in (out, whole)]
    left = {file.name for file in out.rglob(".*")}
    data = [layers.Dataset(folder).contents_tag() for folder in (out, whole)]
    return clips[0] == clips[1] and data[0] == data[1] and left == {".lock", command.WORKERS_LOCK}


@pytest.mark.slow
def test_killed_before_any_of_its_writes_a_run_goes_on_to_the_same_shards(films, uninterrupted, tmp_path):
    """At sixteen of the moments at which it opens, renames or makes a file, half of them while it writes shards."""

    def killed_at(number: int) -> tuple[pathlib.Path, int]:
        out = tmp_path / str(number)
        out.mkdir()
        (out / "wardrobe.secret").write_bytes((uninterrupted / "wardrobe.secret").read_bytes())
        child = run(films, "--out", out, *SMALL, env={**os.environ, "KILL_AT": str(number), "COUNT": str(out)})
        return out, child.wait()

    out, status = killed_at(10**9)
    assert status == 0
    assert same(out, uninterrupted)
    events = (out.parent / f"{out.name}.events").read_text().splitlines()
    shards = next(i for i, event in enumerate(events) if ".shards" in event)
    rng = np.random.default_rng(0)
    moments = [*rng.choice(np.arange(1, shards), 8, False), *rng.choice(np.arange(shards, len(events)), 8, False)]
    for moment in moments:
        out, status = killed_at(moment)
        assert status == -signal.SIGKILL
        assert cli.main(["anonymize", str(films), "--out", str(out), *SMALL]) == 0
        assert same(out, uninterrupted), events[moment]


@pytest.mark.slow
def test_runs_killed_one_after_the_other_meet_no_worker_of_their_elders(films, uninterrupted, tmp_path):
    """Twelve with other settings and two workers each, at random moments; then one that is let be."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "wardrobe.secret").write_bytes((uninterrupted / "wardrobe.secret").read_bytes())
    for wait in np.random.default_rng(1).uniform(1, 8, 12):
        child = run(films, "--out", out, "--workers", 2, *SMALL, "--fit.steps", 30)
        time.sleep(wait)
        child.kill()
        child.wait()
    assert cli.main(["anonymize", str(films), "--out", str(out), *SMALL]) == 0
    assert same(out, uninterrupted)


def test_a_run_waits_for_the_workers_of_a_killed_one(films, tmp_path):
    out = tmp_path / "out"
    (out / "work").mkdir(parents=True)
    settings = command.AnonymizeConfig(out=str(out))
    left = command.Worker(settings, bytes(32))
    entered = threading.Event()

    def later() -> None:
        with command._alone(out):
            entered.set()

    thread = threading.Thread(target=later)
    thread.start()
    assert not entered.wait(0.3)
    del left
    assert entered.wait(5)
    thread.join()


def test_other_settings_or_another_file_are_not_taken_for_finished_work(films, tmp_path):
    out, file = tmp_path / "out", tmp_path / "a.mp4"
    file.write_bytes((films / "wave" / "a.mp4").read_bytes())
    arguments = ["anonymize", str(file), "--out", str(out), *SMALL]
    assert cli.main(arguments) == 0
    work = next((out / "work").glob("*.npz"))
    first = work.stat().st_mtime_ns
    assert cli.main(arguments) == 0
    assert work.stat().st_mtime_ns == first
    assert cli.main([*arguments, "--fit.steps", "5"]) == 0
    second = work.stat().st_mtime_ns
    assert second > first
    file.write_bytes((films / "walk" / "a.mp4").read_bytes())
    assert cli.main([*arguments, "--fit.steps", "5"]) == 0
    assert work.stat().st_mtime_ns > second
    dataset = layers.Dataset(out)
    assert dataset["train"][0].source == dataset.source_tag(video.sha256(file))


def test_two_runs_do_not_write_into_one_folder(films, tmp_path, capfd):
    out = tmp_path / "out"
    out.mkdir()
    with command._alone(out):
        assert cli.main(["anonymize", str(films), "--out", str(out)]) == 2
    assert "another maskdp anonymize is writing here" in capfd.readouterr().err


def test_equal_names_in_two_folders_get_two_keys(films):
    settings = command.AnonymizeConfig(out="x").dataset
    sources, problems = command.gather([str(films / "wave"), str(films / "wave")], settings)
    assert not problems
    assert len({source.name for source in sources}) == len(sources) == 2
    assert command.video_key(b"s" * 32, "a") != command.video_key(b"t" * 32, "a")


def test_a_secret_of_another_length_is_refused(films, tmp_path, capfd):
    (tmp_path / "secret").write_bytes(b"short")
    arguments = ["--out", str(tmp_path / "out"), "--wardrobe_secret", str(tmp_path / "secret")]
    assert cli.main(["anonymize", str(films), *arguments]) == 2
    assert "5 bytes, expected 32" in capfd.readouterr().err


def test_settings_survive_a_round_trip_through_the_written_config(films, tmp_path):
    out = tmp_path / "out"
    assert cli.main(["anonymize", str(films / "wave"), "--out", str(out), *SMALL]) == 0
    written = command.config.parse(command.AnonymizeConfig, ["--config_path", str(out / "config.yaml")], "anonymize")
    assert (written.out, written.fit.steps, written.video.short_side) == (str(out), 4, 64)
    assert written.pipeline_fingerprint == dataclasses.replace(written, workers=3).pipeline_fingerprint
    assert written.pipeline_fingerprint != dataclasses.replace(written, fit=FitConfig()).pipeline_fingerprint


if __name__ in ("__main__", "__mp_main__"):  # a process of `run`, or a worker of it
    pipeline.BlazePoseFinder = pipeline.EmbeddedFinder = RedFinder
if __name__ == "__main__":
    if "KILL_AT" in os.environ:
        kill_at(int(os.environ["KILL_AT"]), os.environ["COUNT"])
    sys.exit(cli.main(["anonymize", *sys.argv[1:]]))
