import fractions
import struct

import av
import numpy as np
import pytest

from anonymize.vision import video
from maskdp.errors import UserError


def moving_bars(frames=20, height=48, width=64):
    y, x, t = np.mgrid[:height, :width, :frames].transpose(0, 3, 1, 2)
    channels = [127 + 100 * np.sin(x / 9 + t / 5), 127 + 100 * np.cos(y / 7 - t / 6), 4 * y]
    return np.stack(channels, -1).clip(0, 255).astype(np.uint8)


def psnr(a, b):
    return 10 * np.log10(255**2 / max(1e-6, np.mean((a.astype(float) - b) ** 2)))


def read(path, **options):
    return list(video.clips(path, **{"max_frames": 1000, **options}))


def test_round_trip(tmp_path):
    frames = moving_bars()
    video.encode(tmp_path / "a.mp4", frames, 12.5)
    (clip,) = read(tmp_path / "a.mp4")
    assert clip.frames.shape == frames.shape
    assert clip.frames.dtype == np.uint8
    assert clip.fps == 12.5
    assert psnr(clip.frames, frames) > 32


def test_the_same_frames_give_the_same_bytes(tmp_path):
    for name in "ab":
        video.encode(tmp_path / f"{name}.mp4", moving_bars(), 25)
    assert video.sha256(tmp_path / "a.mp4") == video.sha256(tmp_path / "b.mp4")


def test_odd_sides_are_padded_by_the_last_pixel(tmp_path):
    frames = moving_bars(height=47, width=63)
    video.encode(tmp_path / "a.mp4", frames, 25, crf=8)
    (clip,) = read(tmp_path / "a.mp4")
    assert clip.frames.shape == (20, 48, 64, 3)
    assert psnr(clip.frames[:, :47, :63], frames) > 32


def test_clips_are_consecutive_and_bounded(tmp_path):
    video.encode(tmp_path / "a.mp4", moving_bars(), 25)
    (whole,) = read(tmp_path / "a.mp4")
    parts = read(tmp_path / "a.mp4", max_frames=8)
    assert [len(part.frames) for part in parts] == [8, 8, 4]
    np.testing.assert_array_equal(np.concatenate([part.frames for part in parts]), whole.frames)


@pytest.mark.parametrize(
    ("fps", "kept"), [(25, range(20)), (12.5, range(0, 20, 2)), (10, [0, 3, 5, 8, 10, 13, 15, 18])]
)
def test_fewer_frames_a_second_keeps_the_first_at_or_after_each_tick(tmp_path, fps, kept):
    video.encode(tmp_path / "a.mp4", moving_bars(), 25)
    (whole,) = read(tmp_path / "a.mp4")
    (clip,) = read(tmp_path / "a.mp4", fps=fps)
    np.testing.assert_array_equal(clip.frames, whole.frames[list(kept)])
    assert clip.fps == pytest.approx(fps, rel=0.03)


@pytest.mark.parametrize(("short_side", "size"), [(24, (24, 32)), (25, (24, 32)), (500, (48, 64)), (None, (48, 64))])
def test_short_side(tmp_path, short_side, size):
    video.encode(tmp_path / "a.mp4", moving_bars(), 25)
    (clip,) = read(tmp_path / "a.mp4", short_side=short_side)
    assert clip.frames.shape[1:3] == size


def test_scaling_is_by_area(tmp_path):
    video.encode(tmp_path / "a.mp4", moving_bars(), 25, crf=5)
    (whole,), (half,) = read(tmp_path / "a.mp4"), read(tmp_path / "a.mp4", short_side=24)
    means = whole.frames.reshape(20, 24, 2, 32, 2, 3).mean((2, 4))
    assert psnr(half.frames, means) > 30


def test_probe(tmp_path):
    video.encode(tmp_path / "a.mp4", moving_bars(), 30000 / 1001)
    info = video.probe(tmp_path / "a.mp4")
    assert (info.width, info.height, info.frames) == (64, 48, 20)
    assert info.fps == pytest.approx(29.97, abs=0.01)
    assert info.seconds == pytest.approx(20 / 29.97, abs=0.01)


def test_rotation_metadata(tmp_path):
    path = tmp_path / "a.mp4"
    video.encode(path, moving_bars(), 25)
    (stored,) = read(path)
    data = path.read_bytes()
    upright = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    quarter = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 48 << 16, 0, 1 << 30)  # as a phone held upright writes
    start = data.index(b"tkhd")
    path.write_bytes(data[:start] + data[start:].replace(upright, quarter, 1))
    (clip,) = read(path)
    np.testing.assert_array_equal(clip.frames, np.rot90(stored.frames, -1, axes=(1, 2)))
    info = video.probe(path)
    assert (info.width, info.height) == (48, 64)


@pytest.mark.parametrize("pixels", ["gray", "yuv420p10le", "bgr0"])
def test_other_pixel_formats(tmp_path, pixels):
    frames = moving_bars()[..., :1].repeat(3, -1)
    write(tmp_path / "a.mkv", frames, "ffv1", pixels)
    (clip,) = read(tmp_path / "a.mkv")
    assert psnr(clip.frames, frames) > 35


def write(path, frames, codec, pixels="yuv420p", gaps=1, times=None, **options):
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        stream.time_base = stream.codec_context.time_base = fractions.Fraction(1, 25)
        for i, frame in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = i * gaps if times is None else times[i], fractions.Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_fps_comes_from_the_time_stamps(tmp_path):
    write(tmp_path / "a.mkv", moving_bars(), "libx264", gaps=5)
    (clip,) = read(tmp_path / "a.mkv")
    assert clip.fps == pytest.approx(5, rel=0.01)


def test_a_variable_rate_keeps_its_timing(tmp_path):
    """At each moment, the frame that was then to be seen, to within a frame's time."""
    times = np.cumsum([0, *np.random.default_rng(0).choice([1, 2, 9], 59)])
    write(tmp_path / "a.mkv", moving_bars(60), "libx264", times=times, crf="8")
    frames = moving_bars(60)
    (clip,) = read(tmp_path / "a.mkv")
    assert len(clip.frames) == 60
    assert clip.fps == pytest.approx(25 * 59 / times[-1], rel=0.01)
    for i, picture in enumerate(clip.frames):
        shown = np.argmin([np.abs(frame.astype(int) - picture).mean() for frame in frames])
        near = np.abs(times - 25 * i / clip.fps)
        assert near[shown] <= near.min() + 1e-6


def test_rounded_time_stamps_leave_every_frame_in_its_place(tmp_path):
    """Matroska's are of milliseconds."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=fractions.Fraction(60000, 1001))
        stream.height, stream.width, stream.pix_fmt = 48, 64, "bgr0"
        for frame in moving_bars(60):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    (clip,) = read(tmp_path / "a.mkv")
    np.testing.assert_array_equal(clip.frames, moving_bars(60))


def test_a_pause_ends_a_clip(tmp_path):
    write(tmp_path / "a.mkv", moving_bars(20), "libx264", times=[*range(12), *range(500, 508)])
    parts = read(tmp_path / "a.mkv")
    assert [len(part.frames) for part in parts] == [12, 8]
    assert [part.fps for part in parts] == pytest.approx([25, 25], rel=0.01)


def expect_one_line(path, *words):
    with pytest.raises(UserError) as raised:
        read(path)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    for word in words:
        assert word in message


def test_missing_folder_and_text(tmp_path):
    expect_one_line(tmp_path / "none.mp4", "no such file")
    expect_one_line(tmp_path, "folder")
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    expect_one_line(tmp_path / "text.mp4", "not a video")
    (tmp_path / "empty.mp4").touch()
    expect_one_line(tmp_path / "empty.mp4", "not a video")
    for path in (tmp_path / "none.mp4", tmp_path):
        with pytest.raises(UserError):
            video.sha256(path)


def test_truncated_without_index(tmp_path):
    video.encode(tmp_path / "a.mp4", moving_bars(), 25)
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: data.index(b"moov") - 10])
    expect_one_line(tmp_path / "cut.mp4", "cut off")


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
@pytest.mark.parametrize("kept", [0.5, 0.8])
def test_cut_halfway_is_not_taken_for_the_whole(tmp_path, suffix, kept):
    options = {"movflags": "faststart"} if suffix == "mp4" else {}
    path = tmp_path / f"cut.{suffix}"
    write(path, moving_bars(100), "mpeg4" if suffix == "avi" else "libx264", **options)
    assert sum(len(clip.frames) for clip in read(path)) == 100
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    expect_one_line(path, "broken after")


def test_damaged_in_the_middle(tmp_path):
    path = tmp_path / "a.mp4"
    video.encode(path, moving_bars(100), 25)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat")
    middle = (start + data.index(b"moov")) // 2
    data[middle : middle + 200] = np.random.default_rng(0).bytes(200)
    path.write_bytes(bytes(data))
    expect_one_line(path, "broken after")


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_no_damage_shows_as_anything_but_one_line(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    write(path, moving_bars(30), "mpeg4" if suffix == "avi" else "libx264")
    whole, messages = path.read_bytes(), []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        data, at = bytearray(whole), rng.integers(len(whole))
        data[at : at + 30] = rng.bytes(30)
        path.write_bytes(bytes(data))
        try:  # the damage may be in a part that does not matter
            read(path)
            video.probe(path)
        except UserError as error:
            messages.append(str(error))
    assert messages
    assert "\n" not in "".join(messages)


def test_no_frames_and_sound_only(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    expect_one_line(tmp_path / "sound.mp4", "no video stream")
    with av.open(str(tmp_path / "none.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        container.start_encoding()
    expect_one_line(tmp_path / "none.mkv")


def test_encode_leaves_nothing_behind_when_it_fails(tmp_path):
    def frames():
        yield moving_bars()[0]
        raise RuntimeError("camera unplugged")

    with pytest.raises(RuntimeError):
        video.encode(tmp_path / "a.mp4", frames(), 25)
    with pytest.raises(ValueError, match="no frames"):
        video.encode(tmp_path / "a.mp4", [], 25)
    assert not list(tmp_path.iterdir())
