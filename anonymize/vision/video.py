"""Video files: decoding clip by clip in bounded memory, encoding, hashing (PyAV)."""

import contextlib
import dataclasses
import fractions
import hashlib
import itertools
import os
import pathlib
from collections import Counter
from collections.abc import Iterable, Iterator

import av
import numpy as np

from anonymize.vision import display
from maskdp import atomic
from maskdp.errors import UserError

PAUSE_SECONDS = 2.0
_DISORDER = 10  # frames; time stamps that go back further start another recording


@dataclasses.dataclass(frozen=True)
class Video:
    """Consecutive frames of a video.

    Attributes:
        frames: (T, H, W, 3) uint8 RGB.
        fps: frames a second.
        numbers: (T,) int, which of the decoded frames of the file these are, from 0.
        notes: what was unusual about the file up to here and what was done about it, one line each.
        start: seconds from the first frame of the file to the first of these.
    """

    frames: np.ndarray
    fps: float
    numbers: np.ndarray
    notes: tuple[str, ...] = ()
    start: float = 0.0


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a file's header says: upright size in square pixels, rate, and length where the header states it."""

    width: int
    height: int
    fps: float
    frames: int | None
    seconds: float | None


@contextlib.contextmanager
def _opened(path: os.PathLike | str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    path = pathlib.Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected a video file")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: cannot be read, permission denied")
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a video that can be opened, or cut off ({_reason(error)})") from None
    with container:
        streams = [stream for stream in container.streams.video if not _is_cover(stream)]
        if not streams:
            raise UserError(f"{path}: holds no video stream, expected one")
        if streams[0].codec_context is None:
            raise UserError(f"{path}: damaged, or coded in a way that no decoder here knows")
        yield container, streams[0]


def _is_cover(stream: av.VideoStream) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _size(sides: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """The sides scaled down until the shorter is at most `short_side`, and made even."""
    short = min(sides)
    limit = short if short_side is None else min(short, short_side)
    width, height = (max(2, side * limit // short // 2 * 2) for side in sides)
    return width, height


def _fps(times: list[float], average_rate: fractions.Fraction | None) -> float:
    """The rate of the time stamps, or the header's where it agrees within 5 % (time stamps may be rounded)."""
    header = float(average_rate or 0)
    span = max(times) - min(times)
    measured = (len(times) - 1) / span if span > 0 else 0.0
    if header and (not measured or abs(measured / header - 1) < 0.05):
        return header
    return measured or 25.0


def _evenly(times: list[float]) -> np.ndarray:
    """Of frames shown at `times` (seconds): the indices that keep their timing when shown at the constant mean rate.

    All in turn where each lies within one frame's time of its even tick, and where the times are not in order; else,
    of a variable rate, those nearest to the ticks, as many as there are frames: of fast parts some are left out, of
    slow parts some repeated.
    """
    times = np.asarray(times)
    ticks, step = np.linspace(times[0], times[-1], len(times), retstep=True)
    if len(times) < 2 or (np.diff(times) < 0).any() or np.abs(times - ticks).max() <= step:
        return np.arange(len(times))
    return np.searchsorted((times[1:] + times[:-1]) / 2, ticks)


def _decode(
    path, container: av.container.InputContainer, stream: av.VideoStream, notes: set[str]
) -> Iterator[av.VideoFrame]:
    """Every frame of the stream from its first key frame on, de-interlaced.

    Frames come in the decoder's order; those that an edit list leaves out, or that depend on what the file does not
    hold, do not come.

    Raises:
        UserError: decoding breaks, or the file ends before its header says.
    """
    return display.progressive(_decode_as_stored(path, container, stream, notes))


def _decode_as_stored(path, container, stream, notes: set[str]) -> Iterator[av.VideoFrame]:
    stream.thread_type = "AUTO"
    count, end, step, keyed = 0, 0.0, 0.04, False

    def broken(reason: str) -> UserError:
        return UserError(f"{path}: broken after {count} frames ({reason}), expected a whole video")

    try:
        for packet in _packets(container, stream, broken, notes):
            keyed = keyed or (packet.is_keyframe and packet.is_discard)  # decoded, and left out by an edit list
            for frame in packet.decode():
                keyed = keyed or frame.key_frame
                if not keyed:
                    notes.add("starts without a key frame; what comes before the first one is left out")
                    continue
                if frame.is_corrupt:
                    raise broken("corrupt frame")
                if frame.interlaced_frame:
                    notes.add("interlaced; one field of each frame is left out")
                yield frame
                count += 1
                if frame.time is not None:
                    step = float(frame.duration * frame.time_base) if frame.duration else step
                    end = max(end, frame.time + step)
    except (av.FFmpegError, OSError) as error:
        raise broken(_reason(error)) from None
    if not count:
        raise UserError(f"{path}: holds no frames, expected at least one")
    expected, slack = _expected_end(container, stream)
    if expected and end < expected - max(slack, 2.5 * step):
        raise broken(f"ends at {end:.2f} s of {expected:.2f} s")


def _packets(container, stream, broken, notes: set[str]) -> Iterator[av.Packet]:
    """The stream's packets; a corrupt one is accepted only at the end of a recording to which another was appended.

    A transport stream counts its packets, and the count is off where two are joined: the demuxer marks the last packet
    before it, or the last but one. Right after it the decoding time goes back, or leaps by more than a pause.
    """
    held: list[av.Packet] = []
    for packet in container.demux(stream):
        if held or packet.is_corrupt:
            held.append(packet)
        else:
            yield packet
        if len(held) > 1 and _leaps(held[-2], held[-1]):
            notes.add("several recordings joined; each becomes clips of its own")
            yield from held
            held.clear()
        elif len(held) > 2:
            break
    if held:
        raise broken("corrupt packet")


def _leaps(before: av.Packet, after: av.Packet) -> bool:
    if before.dts is None or after.dts is None:
        return False
    return not 0 <= (after.dts - before.dts) * after.time_base <= PAUSE_SECONDS


def _expected_end(container: av.container.InputContainer, stream: av.VideoStream) -> tuple[float, float]:
    """Seconds at which the header says the stream ends (0: unknown), and how far to trust it.

    A stream's own length is exact; the container's is that of its longest stream, which may be the sound.
    """
    if stream.duration:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base), 0.0
    if container.duration:
        counts_from_zero = container.format.name.startswith("matroska")
        start = 0 if counts_from_zero else container.start_time or 0
        seconds = (start + container.duration) / av.time_base
        return seconds, 0.0 if len(container.streams) == 1 else max(1.0, 0.1 * seconds)
    return 0.0, 0.0


def _timed(
    frames: Iterable[av.VideoFrame], stream: av.VideoStream, notes: set[str]
) -> Iterator[tuple[av.VideoFrame, float | None, bool]]:
    """Each frame with its time in seconds (None: unknown), and whether another recording or a pause starts with it.

    Where a time goes back a little, time stamps are those of decoding, not of display: the decoder's order is
    trusted, and frames are counted at the header's rate from there on.
    """
    rate = float(stream.average_rate or 25)
    latest = first = None
    since, disordered = 0, False
    for frame in frames:
        time, leap = frame.time, False
        if time is not None:
            leap = latest is not None and not latest - _DISORDER / rate <= time <= latest + max(
                PAUSE_SECONDS, 10 / rate
            )
            if first is None or leap:
                first, since, disordered, latest = time, 0, False, time
            if time < latest and not disordered:
                notes.add("time stamps are not in order; frames are taken in the decoder's order, at the header's rate")
                disordered = True
            latest = max(time, latest)
            time = first + since / rate if disordered else time
        yield frame, time, leap
        since += 1


def clips(
    path: os.PathLike | str,
    *,
    short_side: int | None = None,
    max_frames: int,
    fps: float | None = None,
    span: tuple[float, float] | None = None,
) -> Iterator[Video]:
    """Consecutive clips of at most `max_frames` frames; no more than one clip is held in memory.

    Frames are de-interlaced, upright, have square pixels and even sides, sRGB colours (see `display`), and are scaled
    down (area filter) until the shorter side is at most `short_side` pixels; None keeps the size. With `fps` only so
    many frames a second are kept, those at or first after each tick; None keeps all. With `span` only frames between
    two times, in seconds from the first frame, and what comes after is not decoded. A variable rate becomes a constant
    one, see `_evenly`. A clip ends at a pause, longer than `PAUSE_SECONDS` and ten frames, where another recording was
    appended, and where the size or orientation of the pictures changes.

    Raises:
        UserError: missing, unreadable, not a video, no frames, or broken before its end. Frames before the break have
            then been yielded already: a caller must not take them for the whole video.
    """
    if max_frames < 1 or (short_side is not None and short_side < 2) or (fps is not None and not fps > 0):
        raise ValueError(f"clips: max_frames {max_frames}, short_side {short_side}, fps {fps}; expected 1, 2, above 0")
    frames: list[np.ndarray] = []
    numbers: list[int] = []
    times: list[float] = []
    begins: list[float] = []  # of the frames, seconds from the first frame of the file
    notes: set[str] = set()
    shape = start = zero = None
    ticks, elapsed = 0, 0.0

    def clip() -> Iterator[Video]:
        if frames:
            order = list(_evenly(times) if len(times) == len(frames) else range(len(frames)))
            rate = _fps(times or [0.0], stream.average_rate)
            pictures = np.stack([frames[i] for i in order])
            yield Video(pictures, rate, np.array(numbers)[order], tuple(sorted(notes)), begins[0])
        frames.clear()
        begins.clear()
        numbers.clear()
        times.clear()

    with _opened(path) as (container, stream):
        if not _expected_end(container, stream)[0]:
            notes.add("the header states no length; an end that was cut off cannot be noticed")
        decoded = _decode(path, container, stream, notes)
        for number, (frame, time, leap) in enumerate(_timed(decoded, stream, notes)):
            if leap:
                yield from clip()
                start, ticks = None, 0
            if time is not None:
                if zero is None or (leap and time < zero + elapsed):
                    zero = time - elapsed
                elapsed = time - zero
            if span and elapsed > span[1]:
                break
            if span and elapsed < span[0]:
                continue
            now = frame.width, frame.height, display.sides(stream, frame), display.orientation(frame)
            if shape != now:
                yield from clip()
                if shape is not None:
                    notes.add("the size or orientation of the pictures changes; clips end there")
                shape, size = now, _size(display.sides(stream, frame), short_side)
            if fps is not None and time is not None:
                start = time if start is None else start
                if (time - start) * fps < ticks - 1e-3:
                    continue
                ticks = int((time - start) * fps + 1e-3) + 1
            if display.is_high_dynamic_range(frame):
                notes.add("high dynamic range; converted to sRGB, highlights clipped")
            try:
                frames.append(display.picture(frame, size))
            except (av.FFmpegError, ValueError) as error:
                raise UserError(f"{path}: pictures that cannot be converted ({_reason(error)})") from None
            numbers.append(number)
            begins.append(elapsed)
            if time is not None:
                times.append(time)
            if len(frames) == max_frames:
                yield from clip()
        yield from clip()


def sizes(path: os.PathLike | str) -> Counter[tuple[int, int]]:
    """How many frames `clips` decodes of each upright size (width, height); the whole file is decoded, not its header.

    Raises:
        UserError: as `clips`.
    """
    with _opened(path) as (container, stream):
        return Counter(display.upright_sides(stream, frame) for frame in _decode(path, container, stream, set()))


def probe(path: os.PathLike | str) -> VideoInfo:
    """Size, rate and length of a video, from its header and first frame.

    Raises:
        UserError: missing, unreadable, not a video, or without frames.
    """
    with _opened(path) as (container, stream):
        width, height = display.upright_sides(stream, next(_decode(path, container, stream, set())))
        seconds, slack = _expected_end(container, stream)
        length = seconds if seconds and not slack else None
        return VideoInfo(width, height, _fps([0.0], stream.average_rate), stream.frames or None, length)


def encode(
    path: os.PathLike | str,
    frames: Iterable[np.ndarray],
    fps: float,
    *,
    crf: int = 18,
    times: Iterable[float] | None = None,
) -> None:
    """Writes an H.264 mp4 (4:2:0), whole or not at all; the same frames give the same bytes.

    Args:
        frames: (H, W, 3) uint8 RGB each. H.264 wants even sides: an odd side is padded by repeating its last pixel.
        fps: frames a second; where `times` are given, only the rate that the header names.
        times: when each frame is shown, seconds.
        crf: x264's constant rate factor; 0 is the best, 51 the worst.

    Raises:
        ValueError: no frames.
    """
    with atomic.writing(path) as aside, av.open(str(aside), "w", format="mp4") as container:
        stream, clock = None, fractions.Fraction(1, 90_000)
        for frame, time in zip(frames, itertools.repeat(None) if times is None else times):
            height, width = frame.shape[:2]
            if height % 2 or width % 2:
                frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if stream is None:
                rate = fractions.Fraction(fps).limit_denominator(1001)
                # x264's macroblock tree is not repeatable on AVX-512, and its output depends on the number of threads.
                options = {"crf": str(crf), "preset": "veryfast", "mbtree": "0"}
                stream = container.add_stream("libx264", rate=rate, options=options)
                stream.height, stream.width, stream.pix_fmt = *frame.shape[:2], "yuv420p"
                stream.codec_context.thread_count = 1
                if times is not None:
                    stream.time_base = stream.codec_context.time_base = clock
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if time is not None:
                picture.pts, picture.time_base = round(time / float(clock)), clock
            container.mux(stream.encode(picture))
        if stream is None:
            raise ValueError(f"{path}: no frames to encode")
        container.mux(stream.encode(None))


def sha256(path: os.PathLike | str) -> str:
    """Hash of a file's bytes, hex: the name a source goes by in a dataset.

    Raises:
        UserError: the file is missing, a folder or unreadable.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {_reason(error)}") from None
