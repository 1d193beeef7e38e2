"""`maskdp anonymize PATH… --out DIR`: videos become a two-layer dataset.

DIR holds `shards/` (the dataset), `manifest.jsonl` (what became of every clip), `sheets/` (contact sheets, to be looked
at), `mp4/` where `--export` asks for it (videos to be played), and what must not leave the lab: `work/` (finished
clips, from which a broken-off run goes on), `lab_only/` (originals beside what became of them), `local_paths.csv`
(which file has which key) and `wardrobe.secret`.
"""

import concurrent.futures
import contextlib
import csv
import dataclasses
import fcntl
import hashlib
import hmac
import io
import itertools
import json
import logging
import multiprocessing
import os
import pathlib
import secrets
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np

from anonymize.batch import export, sheets
from anonymize.batch import ray as on_ray
from anonymize.config import AnonymizeConfig, AutoConfig
from anonymize.people import FinderConfig, choice, precomputed
from anonymize.people.embedded.finder import EmbeddedConfig
from anonymize.vision import cuts, video
from maskdp import __version__, atomic, config, layers, progress
from maskdp.errors import UserError

USAGE = "usage: maskdp anonymize PATH... --out DIR [--config_path FILE] [--key value ...]"
EXTENSIONS = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ogv", ".gif"}
MANIFESTS = {".csv", ".jsonl"}
SECRET_BYTES = 32
WORKERS_LOCK = ".workers.lock"
PREVIEW = 48  # frames of a single video that are shown first


@dataclasses.dataclass(frozen=True)
class Source:
    """A video to be anonymized.

    Attributes:
        path: the file.
        name: what it is called in the input; unique in a run. Its key is made from it and the secret.
        label: its action; None where unknown.
        subjects: the people in it, where known.
        scene: the place, where known.
        split: the split of the dataset it belongs to.
    """

    path: pathlib.Path
    name: str
    label: str | None
    subjects: tuple[str, ...]
    scene: str | None
    split: str


# --------------------------------------------------------------------------------------------------------- the inputs


def gather(paths: Sequence[str], settings) -> tuple[list[Source], list[str]]:
    """The videos of files, folders and manifests, and one line for each path that led to none.

    Args:
        settings: the run's `DatasetConfig`.

    Raises:
        UserError: a manifest cannot be read or lacks what it needs.
    """
    sources, problems = [], []
    for path in map(pathlib.Path, paths):
        if path.is_dir():
            files, unread = _in_folder(path)
            sources += [_from_file(file, str(file.relative_to(path.parent)), settings) for file in files]
            problems += unread or ([] if files else [f"{path}: no video in this folder"])
        elif not path.is_file():
            problems.append(f"{path}: not a file" if path.exists() else f"{path}: no such file or folder")
        elif path.suffix.lower() in MANIFESTS:
            sources += _from_manifest(path, settings)
        else:
            sources.append(_from_file(path, path.name, settings))
    taken = set()
    for index, source in enumerate(sources):
        names = itertools.chain([source.name], (f"{source.name}#{number}" for number in itertools.count(2)))
        name = next(name for name in names if name not in taken)
        taken.add(name)
        sources[index] = dataclasses.replace(source, name=name)
    return sources, problems


def _in_folder(top: pathlib.Path) -> tuple[list[pathlib.Path], list[str]]:
    """Every video under a folder, sorted, and a line for each entry that cannot be read. Links are followed, once."""
    files, problems, seen = [], [], set()

    def unreadable(error: OSError) -> None:
        problems.append(f"{error.filename}: {error.strerror}")

    for folder, folders, names in os.walk(top, onerror=unreadable, followlinks=True):
        if os.path.realpath(folder) in seen:
            folders.clear()  # a link that leads back, or to what is listed already
            continue
        seen.add(os.path.realpath(folder))
        folders.sort()
        for name in names:
            file = pathlib.Path(folder, name)
            if file.suffix.lower() in EXTENSIONS:
                if file.is_file():
                    files.append(file)
                else:
                    problems.append(f"{file}: not a file, or a link that leads nowhere")
    return sorted(files), problems


def _from_file(file: pathlib.Path, name: str, settings) -> Source:
    label = file.resolve().parent.name if settings.label_from == "folder" else None
    return Source(file, name, label, (), None, settings.split)


def _from_manifest(path: pathlib.Path, settings) -> list[Source]:
    """Rows of a csv (with a header) or jsonl: path, and where known label, subject_ids, scene_id, split."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".csv":
            rows = list(csv.DictReader(io.StringIO(text)))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: not a readable manifest ({error})") from None
    sources = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("path"), str) or not row["path"]:
            raise UserError(f"{path}: entry {number} has no path, expected path[,label,subject_ids,scene_id,split]")
        subjects = row.get("subject_ids") or ()
        if isinstance(subjects, str):
            subjects = [subject.strip() for subject in subjects.split(";")]
        elif not isinstance(subjects, list | tuple):
            raise UserError(f"{path}: entry {number} has subject_ids {subjects!r}, expected a list")
        known = _from_file(path.parent / row["path"], row["path"], settings)
        label = row.get("label")
        sources.append(
            dataclasses.replace(
                known,
                label=known.label if label in (None, "") else str(label),
                subjects=tuple(str(subject) for subject in subjects if subject != ""),
                scene=str(row["scene_id"]) if row.get("scene_id") not in (None, "") else None,
                split=str(row.get("split") or settings.split),
            )
        )
    return sources


# ---------------------------------------------------------------------------------------------------------- one video


class Worker:
    """Anonymizes one video after another; the models are loaded once, at the first that needs them."""

    def __init__(self, settings: AnonymizeConfig, secret: bytes):
        import torch

        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        self._settings, self._secret = settings, secret
        self._work, self._sheets = (pathlib.Path(settings.out) / name for name in ("work", "sheets"))
        self._fingerprint = settings.pipeline_fingerprint
        self._anonymizer = None
        self._lock = open(pathlib.Path(settings.out) / WORKERS_LOCK, "a")  # noqa: SIM115, held as long as this lives
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def __call__(
        self, source: Source, advance: Callable[[int], None] = lambda frames: None
    ) -> tuple[list[dict[str, Any]], bool]:
        """Records of the clips of one video, or where it fails one that says so; and whether they were there before.

        `advance` is called with the number of frames of each clip that is finished.
        """
        key = video_key(self._secret, source.name)
        done = self._work / f"{key}.json"
        try:
            state = {"source": video.sha256(source.path), "settings": self._fingerprint, "maskdp": __version__}
            if self._settings.precomputed:
                state["people"] = precomputed.digest(self._settings.precomputed, source.name)
            if done.exists():
                finished = json.loads(done.read_text())
                if finished["state"] == state:
                    self._export(key, source.path, finished["clips"], again=False)
                    return finished["clips"], True
            done.unlink(missing_ok=True)
            given = self._settings.precomputed and precomputed.Precomputed(
                self._settings.precomputed, source.name, source.path
            )
            records = []
            for number, part in enumerate(self._parts(source.path)):
                records.append(self._clip(part, f"{key}-{number:03d}", key, state["source"], source, given))
                advance(len(part.frames))
            if not records:
                raise UserError(f"nothing of it lies in --span {self._settings.span}")
            self._export(key, source.path, records, again=True)
        except UserError as error:
            return [_failed(key, str(error).removeprefix(f"{source.path}: "))], False
        except OSError:  # of the output; what is wrong with the file itself is a UserError
            raise
        except Exception as error:  # one bad file must not end a batch of thousands; it is reported, never written
            logging.getLogger(__name__).exception("%s: internal error", source.path)
            return [_failed(key, f"internal error, {type(error).__name__}")], False
        atomic.write_json(done, {"state": state, "clips": records})
        return records, False

    def _export(self, key: str, path: pathlib.Path, records: list[dict[str, Any]], again: bool) -> None:
        """The videos that `export` asks for; what is there stays, unless the clips were made `again`."""
        out, wanted = pathlib.Path(self._settings.out), self._settings.export

        def load(clip: str) -> tuple[np.ndarray, np.ndarray]:
            return read_work(self._work / f"{clip}.npz")

        if wanted != "none" and (again or not (out / "mp4" / f"{key}-private.mp4").exists()):
            export.views(out / "mp4", key, records, load)
        if wanted == "lab" and (again or not (out / "lab_only" / f"{key}.mp4").exists()):
            export.beside_original(out / "lab_only", key, records, load, self._parts(path))

    def preview(self, source: Source) -> str:
        """Anonymizes the first `PREVIEW` frames alone, for a first look: a line that says what came of it."""
        part = next(self._parts(source.path, PREVIEW), None)
        if part is None:
            return "nothing in --span"
        given = self._settings.precomputed and precomputed.Precomputed(
            self._settings.precomputed, source.name, source.path
        )
        result = self._result(part, video_key(self._secret, source.name), source, given)
        if result.status != "written":
            return f"quarantined, {result.reason}"
        file = pathlib.Path(self._settings.out) / "preview.jpg"
        sheets.write(file, sheets.sheet(result.rgba, result.private))
        return str(file)

    def _parts(self, path: pathlib.Path, most: int | None = None) -> Iterator[video.Video]:
        settings = self._settings.video
        for part in video.clips(
            path,
            short_side=settings.short_side,
            max_frames=min(settings.max_frames, most or settings.max_frames),
            fps=settings.fps or None,
            span=self._settings.seconds,
        ):
            yield from cuts.shots(part)

    def _result(self, part: video.Video, key: str, source: Source, given: precomputed.Precomputed | None):
        """The `ClipResult` of a clip."""
        if self._anonymizer is None:
            from anonymize.pipeline import Anonymizer

            self._anonymizer = Anonymizer(self._settings, self._secret)
        people = given and given.people(part.frames, part.numbers)
        keep, only = (self._places(name, source.path, part) for name in ("keep", "only"))
        return self._anonymizer.clip(part.frames, part.fps, key, source.subjects, people, keep, only)

    def _places(self, key: str, path: pathlib.Path, part: video.Video) -> list[tuple[int, choice.Place]]:
        """The places of `keep` or `only` that lie in a clip, as frame numbers and pixels of it."""
        found = []
        for place in choice.places(key, getattr(self._settings, key)):
            frame = round((place.seconds - part.start) * part.fps)
            if 0 <= frame < len(part.frames):
                found.append((frame, place.scaled(part.frames.shape[2] / video.probe(path).width)))
        return found

    def _clip(
        self,
        part: video.Video,
        clip: str,
        key: str,
        digest: str,
        source: Source,
        given: precomputed.Precomputed | None,
    ) -> dict[str, Any]:
        start = time.monotonic()
        result = self._result(part, key, source, given)
        if result.status == "written":
            write_work(self._work / f"{clip}.npz", result.rgba, result.private)
            if self._settings.sheets != "none":
                original = part.frames if self._settings.sheets == "full" else None
                sheets.write(self._sheets / f"{clip}.jpg", sheets.sheet(result.rgba, result.private, original))
        return {
            "clip_id": clip,
            "video_id": key,
            "source": digest,
            "status": result.status,
            "reason": result.reason,
            "fps": part.fps,
            "people": result.people,
            "people_kept": result.people_kept,
            "frames": result.frames,
            "first_frame": int(part.numbers[0]),
            "frames_without_pose": result.frames_without_pose,
            "frames_blanked": result.frames_blanked,
            "iou": result.iou,
            "seconds": round(time.monotonic() - start, 3),
            "notes": result.notes,
            "input": part.notes,
        }


def video_key(secret: bytes, name: str) -> str:
    """A video's key: nothing of its content, and its name only to who has the secret."""
    return hmac.digest(secret, f"video/{name}".encode(errors="surrogateescape"), hashlib.sha256).hex()[:16]


def _failed(key: str, reason: str) -> dict[str, Any]:
    return {"clip_id": None, "video_id": key, "source": None, "status": "failed", "reason": reason}


def write_work(path: pathlib.Path, rgba: np.ndarray, private: np.ndarray) -> None:
    """Keeps a finished clip: both layers lossless, one PNG a frame, in one step."""
    arrays = {}
    for name, frames, code in (("rgba", rgba, cv2.COLOR_RGBA2BGRA), ("private", private, cv2.COLOR_RGB2BGR)):
        encoded = [cv2.imencode(".png", cv2.cvtColor(f, code), (cv2.IMWRITE_PNG_COMPRESSION, 1))[1] for f in frames]
        arrays[name] = np.concatenate(encoded)
        arrays[f"{name}_ends"] = np.cumsum([len(code) for code in encoded])
    with atomic.writing(path) as aside:
        np.savez(aside, **arrays)


def read_work(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """The two layers that `write_work` kept."""
    layer = []
    with np.load(path, allow_pickle=False) as file:
        for name, code in (("rgba", cv2.COLOR_BGRA2RGBA), ("private", cv2.COLOR_BGR2RGB)):
            pictures = np.split(file[name], file[f"{name}_ends"][:-1])
            layer.append(np.stack([cv2.cvtColor(cv2.imdecode(p, cv2.IMREAD_UNCHANGED), code) for p in pictures]))
    return layer[0], layer[1]


# --------------------------------------------------------------------------------------------------------- the batch

_worker: Worker | None = None
_frames = None  # of all workers together, a `multiprocessing.Value`


def _start_worker(settings: AnonymizeConfig, secret: bytes, frames) -> None:
    global _worker, _frames
    _worker, _frames = Worker(settings, secret), frames
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if not multiprocessing.parent_process().is_alive():  # before the lock was held, so that a later run may be at work
        os._exit(1)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(source: Source) -> tuple[list[dict[str, Any]], bool]:
    def advance(frames: int) -> None:
        with _frames.get_lock():
            _frames.value += frames

    return _worker(source, advance)


def _results(sources: Sequence[Source], settings: AnonymizeConfig, secret: bytes, advance: Callable[[int], None]):
    """Yields (source, what `Worker` returns for it) as videos are finished.

    `advance` is called with numbers of frames as clips are finished; with `--ray`, as videos are.
    """
    if settings.ray:
        for source, (found, known) in on_ray.results(sources, settings, _secret_file(settings)):
            if not known:
                advance(sum(record.get("frames", 0) for record in found))
            yield source, (found, known)
        return
    workers = min(settings.workers, len(sources))
    if workers <= 1:
        work = Worker(settings, secret)
        if len(sources) == 1 and settings.sheets != "none" and _long_and_new(sources[0], settings, secret):
            print(f"preview: {work.preview(sources[0])}", file=sys.stderr)
        yield from ((source, work(source, advance)) for source in sources)
        return
    context = multiprocessing.get_context("spawn")
    frames, told = context.Value("q", 0), 0
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (settings, secret, frames)) as pool:
        jobs = {pool.submit(_work, source): source for source in sources}
        running = set(jobs)
        try:
            while running:
                done, running = concurrent.futures.wait(running, 1.0, concurrent.futures.FIRST_COMPLETED)
                so_far = frames.value
                advance(so_far - told)
                told = so_far
                for job in done:
                    yield jobs[job], job.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError("a worker process died, perhaps of too little memory; run again to go on") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _long_and_new(source: Source, settings: AnonymizeConfig, secret: bytes) -> bool:
    """Whether a video takes so long that a first look at a part of it is worth its time."""
    done = (pathlib.Path(settings.out) / "work" / f"{video_key(secret, source.name)}.json").exists()
    return not done and _length(source, settings) > 3 * PREVIEW


def _length(source: Source, settings: AnonymizeConfig) -> int:
    """How many frames a video has by its header, in `span` and at `video.fps`; 0 where that is not known."""
    try:
        info = video.probe(source.path)
    except UserError:  # said when it is its turn
        return 0
    rate = min(info.fps, settings.video.fps or info.fps)
    seconds = info.seconds or (info.frames or 0) / info.fps
    start, end = settings.seconds or (0.0, seconds)
    return round(max(min(end, seconds) - start, 0) * rate)


def _secret_file(settings: AnonymizeConfig) -> pathlib.Path:
    return pathlib.Path(settings.wardrobe_secret or pathlib.Path(settings.out) / "wardrobe.secret").resolve()


def wardrobe_secret(file: pathlib.Path, create: bool) -> bytes:
    """The secret in `file`; where it may be created and is missing, 32 new bytes from the operating system, mode 0600.

    Raises:
        UserError: missing, or not of 32 bytes.
    """
    if create and not file.exists():
        descriptor, aside = tempfile.mkstemp(prefix=f".{file.name}{atomic.PARTIAL}", dir=file.parent)  # mode 0600
        with open(descriptor, "wb") as opened:
            opened.write(secrets.token_bytes(SECRET_BYTES))
            opened.flush()
            os.fsync(descriptor)
        os.rename(aside, file)
    try:
        secret = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: the wardrobe secret cannot be read ({error.strerror})") from None
    if len(secret) != SECRET_BYTES:
        raise UserError(f"{file}: a wardrobe secret of {len(secret)} bytes, expected {SECRET_BYTES}")
    return secret


@contextlib.contextmanager
def _alone(out: pathlib.Path) -> Iterator[None]:
    """Holds the folder against a second run at the same time, and waits until the workers of a killed one are gone."""
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another maskdp anonymize is writing here") from None
        with open(out / WORKERS_LOCK, "a") as workers:
            fcntl.flock(workers, fcntl.LOCK_EX)
        yield


def anonymize(paths: Sequence[str], settings: AnonymizeConfig) -> int:
    """Anonymizes the videos of `paths` into `settings.out` and returns the exit status: 1 where one could not be read.

    Raises:
        UserError: there is nothing to do, or a manifest, the secret or the output folder is at fault.
    """
    sources, problems = gather(paths, settings.dataset)
    if not sources:
        raise UserError("; ".join(problems) if problems else f"nothing to do\n{USAGE}")
    if (settings.keep or settings.only) and len(sources) > 1:
        raise UserError(f"--keep, --only: a place in one video, expected one video and not {len(sources)}")
    settings = dataclasses.replace(settings, finder=_chosen(settings.finder))
    for problem in problems:
        print(f"maskdp anonymize: {problem}", file=sys.stderr)
    out = pathlib.Path(settings.out)
    try:
        (out / "work").mkdir(parents=True, exist_ok=True)
        with _alone(out):
            for folder in (out, out / "work", out / "sheets"):
                atomic.sweep(folder)
            secret = wardrobe_secret(_secret_file(settings), create=not settings.wardrobe_secret)
            atomic.write_text(out / "config.yaml", config.dump(settings))
            records = _run(sources, settings, secret)
            _write_records(out, sources, records, secret)
            written = _write_shards(out, sources, records, settings, secret)
    except OSError as error:
        place = error.filename or out
        raise UserError(f"{place}: {error.strerror or error}; once it can be written, run again to go on") from None
    counts = Counter(record["status"] for found in records.values() for record in found)
    _say(out, records, counts, written)
    return 1 if problems or counts["failed"] else 0


def _chosen(finder: FinderConfig) -> FinderConfig:
    """The finder that is meant; where that is left to us, one line says which it is and what that costs."""
    chosen = finder.chosen()
    if isinstance(finder, AutoConfig):
        if isinstance(chosen, EmbeddedConfig):
            line = (
                f"embedded, as BlazePose's models are not in {finder.folder} (maskdp weights fetch blazepose): "
                "outlines and poses are coarser, and clips of a moving camera are quarantined"
            )
        else:
            line = f"blazepose, with the models in {chosen.folder}"
        print(f"maskdp anonymize: finder: {line}", file=sys.stderr)
    return chosen


def _run(sources, settings: AnonymizeConfig, secret: bytes) -> dict[str, list[dict[str, Any]]]:
    """Records by name of source. Says at once, in a line each, what failed or was quarantined."""
    records: dict[str, list[dict[str, Any]]] = {}
    lengths = {source.name: _length(source, settings) for source in sources}
    with progress.bar("anonymize", sum(lengths.values()), "frames") as advance:

        def tell(frames: int) -> None:
            advance(frames, f"{len(records)}/{len(sources)} videos")

        for source, (found, known) in _results(sources, settings, secret, tell):
            records[source.name] = found
            for record in found:
                if record["status"] != "written":
                    print(f"{source.path}: {record['status']}, {record['reason']}", file=sys.stderr)
            done = 0 if known else sum(record.get("frames", 0) for record in found)
            advance(lengths[source.name] - done, f"{len(records)}/{len(sources)} videos", known=True)
    return records


def _write_records(out: pathlib.Path, sources, records, secret: bytes) -> None:
    lines = [
        json.dumps({**{k: v for k, v in record.items() if k != "source"}, "label": source.label, "split": source.split})
        for source in sources
        for record in records[source.name]
    ]
    atomic.write_text(out / "manifest.jsonl", "".join(f"{line}\n" for line in lines))
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(("video_id", "path"))
    writer.writerows((video_key(secret, source.name), source.path.resolve()) for source in sources)
    atomic.write_bytes(out / "local_paths.csv", table.getvalue().encode(errors="surrogateescape"))
    os.chmod(out / "local_paths.csv", 0o600)


def _write_shards(out: pathlib.Path, sources, records, settings: AnonymizeConfig, secret: bytes) -> bool:
    """Builds the dataset from the finished work, one clip in memory at a time; False where no clip was written."""
    labels = sorted({source.label for source in sources if source.label is not None}) or ["unknown"]

    first: dict[str, str] = {}  # one file given twice is one video

    def clips(chosen: list[tuple[Source, dict[str, Any]]]) -> Iterator[layers.TwoLayerClip]:
        for source, record in chosen:
            rgba, private = read_work(out / "work" / f"{record['clip_id']}.npz")
            yield layers.TwoLayerClip(
                rgba=rgba,
                private=private,
                label=-1 if source.label is None else labels.index(source.label),
                clip_id=record["clip_id"],
                video_id=first.setdefault(record["source"], record["video_id"]),
                scene_id=source.scene or "",
                subject_ids=source.subjects,
                source=record["source"],
                fps=record["fps"],
            )

    splits: dict[str, list[tuple[Source, dict[str, Any]]]] = {}
    for source in sources:
        for record in records[source.name]:
            if record["status"] == "written":
                splits.setdefault(source.split, []).append((source, record))
    if not splits:
        return False
    counts = Counter(record["status"] for found in records.values() for record in found)
    kept = sum(record["people_kept"] for found in splits.values() for _, record in found)
    layers.write_dataset(
        out,
        {split: clips(chosen) for split, chosen in splits.items()},
        labels,
        context=settings.refine.context,
        private_format=settings.dataset.private_format,
        notes={"settings": settings.pipeline_fingerprint, "clips": dict(counts), "people_kept": kept},
        key=hmac.digest(secret, b"dataset key", hashlib.sha256),
    )
    return True


def _say(out: pathlib.Path, records, counts: Counter, written: bool) -> None:
    print(f"{counts['written']} clips written, {counts['quarantined']} quarantined, {counts['failed']} files failed")
    reasons = Counter(r["reason"] for found in records.values() for r in found if r["status"] == "quarantined")
    for reason, count in reasons.most_common():
        print(f"  quarantined {count}: {reason}")
    print(f"{out / layers.SHARDS}: the dataset" if written else f"{out}: no clip was written, so there is no dataset")
    if written and (out / "sheets").is_dir():
        print(f"{out / 'sheets'}: contact sheets; look at them before anything is released")
    for folder, what in (
        ("mp4", "videos to be played"),
        ("lab_only", "THE ORIGINALS beside them: never release these"),
    ):
        if written and (out / folder).is_dir():
            print(f"{out / folder}: {what}")


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Paths, and options with their values (`--a.b value` or `--a.b=value`), in any order."""
    paths, options = [], []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            paths.append(argument)
            continue
        options.append(argument)
        if "=" not in argument and argument not in ("-h", "--help"):
            options += [value for value in [next(rest, None)] if value is not None]
    return paths, options


def main(arguments: list[str]) -> int:
    """`maskdp anonymize`; see `anonymize`."""
    paths, options = split_arguments(arguments)
    if not arguments:
        raise UserError(f"nothing to do\n{USAGE}")
    settings = config.parse(AnonymizeConfig, options, "anonymize PATH...")
    if not paths:
        raise UserError("no PATH, expected videos, folders or manifests")
    return anonymize(paths, settings)
