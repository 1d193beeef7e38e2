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


def write(path, frames, codec, pixels="yuv420p", gaps=1, times=None, coder=None, matrix=None, mux=None, **options):
    """Encodes and muxes frames, arrays or `av.VideoFrame`s; `mux(packet)` may change a packet or, by False, drop it."""
    with av.open(str(path), "w", options=options) as container:
        repeatable = {"mbtree": "0"} if codec == "libx264" else {}
        stream = container.add_stream(codec, rate=25, options=repeatable | (coder or {}))
        stream.codec_context.thread_count = 1
        first = frames[0]
        stream.height, stream.width = (first.height, first.width) if hasattr(first, "height") else first.shape[:2]
        stream.pix_fmt = pixels
        stream.time_base = stream.codec_context.time_base = fractions.Fraction(1, 25)
        if hasattr(first, "color_trc"):
            stream.codec_context.color_trc, stream.codec_context.color_primaries = (
                first.color_trc,
                first.color_primaries,
            )
            stream.codec_context.colorspace = first.colorspace
        if matrix:
            stream.set_display_matrix(matrix)
        for i, frame in enumerate([*frames, None]):
            if isinstance(frame, np.ndarray):
                frame = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pixels)
            if frame:
                frame.pts, frame.time_base = i * gaps if times is None else times[i], fractions.Fraction(1, 25)
            container.mux([packet for packet in stream.encode(frame) if not mux or mux(packet) is not False])


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


# --------------------------------------------------------------------------------------- videos as people have them


ONE = 65536


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((ONE, 0, 0, ONE), lambda f: f),
        ((-ONE, 0, 0, ONE), lambda f: f[:, :, ::-1]),  # a front camera
        ((ONE, 0, 0, -ONE), lambda f: f[:, ::-1]),
        ((-ONE, 0, 0, -ONE), lambda f: f[:, ::-1, ::-1]),
        ((0, ONE, ONE, 0), lambda f: f.transpose(0, 2, 1, 3)),  # mirrored and turned
        ((0, -ONE, -ONE, 0), lambda f: f.transpose(0, 2, 1, 3)[:, ::-1, ::-1]),
        ((0, ONE, -ONE, 0), lambda f: np.rot90(f, -1, (1, 2))),
        ((0, -ONE, ONE, 0), lambda f: np.rot90(f, 1, (1, 2))),
        ((3 * ONE, 100, -100, 3 * ONE), lambda f: f),  # scaled, hardly turned
        ((0, 0, 0, 0), lambda f: f),  # degenerate: shows no area
        ((ONE, ONE, ONE, ONE), lambda f: f),
        ((0, ONE, 0, 0), lambda f: f),
    ],
)
def test_display_matrices_turn_and_mirror_and_degenerate_ones_are_ignored(tmp_path, matrix, shown):
    a, b, c, d = matrix
    write(tmp_path / "stored.mp4", moving_bars(4), "libx264")
    write(tmp_path / "a.mp4", moving_bars(4), "libx264", matrix=[a, b, 0, c, d, 0, 0, 0, 1 << 30])
    (stored,), (clip,) = read(tmp_path / "stored.mp4"), read(tmp_path / "a.mp4")
    assert np.array_equal(clip.frames, shown(stored.frames))


def decode_time_for_display_time(packet):
    packet.pts = packet.dts


@pytest.mark.parametrize("fps", [None, 12.5])
@pytest.mark.parametrize(
    ("name", "mux"), [("a.avi", None), ("a.mkv", decode_time_for_display_time), ("a.mp4", decode_time_for_display_time)]
)
def test_time_stamps_in_the_order_of_decoding_neither_drop_nor_double_a_frame(tmp_path, name, mux, fps):
    """AVI stores no display times; with B-frames those that are made up for it go forth and back."""
    write(tmp_path / name, moving_bars(100), "libx264", coder={"bf": "3"}, mux=mux)
    (clip,) = read(tmp_path / name, fps=fps)
    steps = np.diff(clip.numbers)
    assert set(steps[2:]) == {2 if fps else 1}
    assert clip.fps == pytest.approx(fps or 25, rel=0.03)
    assert any("not in order" in note for note in clip.notes)


def test_a_clip_ends_where_the_size_of_the_pictures_changes(tmp_path):
    small, large = moving_bars(10, 48, 64), moving_bars(10, 64, 48)
    for name, frames in (("small", small), ("large", large)):
        write(tmp_path / f"{name}.ts", frames, "libx264", coder={"crf": "8"})
    data = [(tmp_path / f"{name}.ts").read_bytes() for name in ("small", "large")]
    (tmp_path / "a.ts").write_bytes(b"".join(data))
    one, two = read(tmp_path / "a.ts")
    assert psnr(one.frames, small) > 32
    assert psnr(two.frames, large) > 32
    assert np.array_equal(two.numbers, np.arange(10, 20))
    assert video.sizes(tmp_path / "a.ts") == {(64, 48): 10, (48, 64): 10}


@pytest.mark.parametrize(("name", "codec"), [("a.ts", "libx264"), ("a.mpg", "mpeg2video")])
def test_joined_recordings_become_clips_of_their_own(tmp_path, name, codec):
    write(tmp_path / name, moving_bars(30), codec, coder={"bf": "2"})
    (alone,) = read(tmp_path / name)
    (tmp_path / name).write_bytes(2 * (tmp_path / name).read_bytes())
    parts = read(tmp_path / name)
    assert [len(part.frames) for part in parts] == [30, 30]
    assert [part.fps for part in parts] == [25, 25]
    assert np.array_equal(parts[0].frames, alone.frames)
    assert np.array_equal(parts[1].frames[1:], alone.frames[1:])


def test_a_transport_stream_with_a_packet_lost_is_damaged(tmp_path):
    write(tmp_path / "a.ts", moving_bars(100), "libx264")
    data = (tmp_path / "a.ts").read_bytes()
    ours = [start for start in range(0, len(data), 188) if (data[start + 1] & 31) * 256 + data[start + 2] == 256]
    lost = ours[len(ours) // 2]
    (tmp_path / "a.ts").write_bytes(data[:lost] + data[lost + 188 :])
    expect_one_line(tmp_path / "a.ts", "corrupt packet")


def test_frames_that_an_edit_list_leaves_out_do_not_count(tmp_path):
    """The header says 24, of which the first five are to be decoded and not shown."""
    write(tmp_path / "a.mp4", moving_bars(24), "libx264", times=range(-5, 19), coder={"bf": "0", "crf": "8"})
    (clip,) = read(tmp_path / "a.mp4")
    assert video.probe(tmp_path / "a.mp4").frames == 24
    assert video.sizes(tmp_path / "a.mp4") == {(64, 48): 19}
    assert np.array_equal(clip.numbers, np.arange(19))
    assert psnr(clip.frames, moving_bars(24)[5:]) > 32


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.mp4", "libx264"), ("a.ts", "mpeg2video")]
)
def test_what_comes_before_the_first_key_frame_is_left_out(tmp_path, name, codec):
    """It depends on what the file does not hold: some decoders show grey smear for it."""
    number = iter(range(1000))
    coder = {"g": "12", "bf": "0", "crf": "8"} if codec == "libx264" else {"g": "12", "bf": "0", "b": "4000000"}
    write(tmp_path / name, moving_bars(48), codec, coder=coder, mux=lambda packet: next(number) >= 5)
    (clip,) = read(tmp_path / name)
    assert np.array_equal(clip.numbers, np.arange(36))
    assert psnr(clip.frames, moving_bars(48)[12:]) > 30
    assert video.sizes(tmp_path / name).total() == 36


def test_interlaced_frames_lose_their_combing(tmp_path):
    """A bar that moves 4 pixels a frame: its two fields, half a frame apart, make a comb of every upright edge."""
    moments = np.full((40, 64, 96, 3), 40, np.uint8)
    for t, moment in enumerate(moments):
        moment[:, 2 * t : 2 * t + 12] = 220
    woven = moments[::2].copy()
    woven[:, 1::2] = moments[1::2, 1::2]
    write(tmp_path / "a.mkv", woven, "libx264", coder={"x264-params": "tff=1", "crf": "4"})
    (clip,) = read(tmp_path / "a.mkv")
    assert clip.frames.shape == woven.shape
    assert np.array_equal(clip.numbers, np.arange(20))
    assert clip.fps == 25

    def combing(frames):
        return np.abs(frames[:, 2:].astype(int) - 2 * frames[:, 1:-1].astype(int) + frames[:, :-2]).mean()

    assert combing(clip.frames) < 0.1 * combing(woven)
    assert max(psnr(clip.frames[1:-1], moments[field:][2:-2:2]) for field in (0, 1)) > 25
    assert any("interlaced" in note for note in clip.notes)


def high_dynamic_range(greys, trc):
    """A frame of upright stripes, each of one grey: code values 0..1 at 10 bits, BT.2020."""
    frame = av.VideoFrame(32 * len(greys), 64, "yuv420p10le")
    for plane, values in zip(frame.planes, ([64 + 876 * grey for grey in greys], [512], [512])):
        row = np.repeat(np.round(values).astype(np.uint16), plane.width // len(values))
        padded = np.zeros((plane.height, plane.line_size // 2), np.uint16)
        padded[:, : plane.width] = row
        plane.update(padded.tobytes())
    frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc = 9, 1, 9, trc
    return frame


def test_high_dynamic_range_is_converted(tmp_path):
    """PQ (SMPTE ST 2084): white of 203 cd/m² is white, and half its light is half the light in sRGB, too."""
    light = np.array([203.0, 101.5, 20.3, 4000.0])
    power = (light / 1e4) ** (2610 / 16384)
    greys = ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)
    frames = [high_dynamic_range(greys, 16) for _ in range(3)]
    write(tmp_path / "a.mkv", frames, "ffv1", "yuv420p10le")
    (clip,) = read(tmp_path / "a.mkv", short_side=32)
    shown = clip.frames[1, 16, 8::16].mean(-1) / 255
    linear = np.where(shown < 0.04045, shown / 12.92, ((shown + 0.055) / 1.055) ** 2.4)
    assert linear == pytest.approx([1, 0.5, 0.1, 1], abs=0.03)
    assert any("high dynamic range" in note for note in clip.notes)


@pytest.mark.parametrize(("height", "matrix"), [(720, "ITU709"), (480, "ITU601")])
def test_without_a_colour_tag_hd_is_taken_for_bt709_and_smaller_for_bt601(tmp_path, height, matrix):
    colour = np.full((height, 640, 3), (200, 40, 40), np.uint8)
    frame = av.VideoFrame.from_ndarray(colour, format="rgb24").reformat(format="yuv420p", dst_colorspace=matrix)
    frame.colorspace = 2  # unspecified
    write(tmp_path / "a.mkv", [frame] * 2, "ffv1")
    with av.open(str(tmp_path / "a.mkv")) as container:
        assert next(container.decode(video=0)).colorspace == 2
    (clip,) = read(tmp_path / "a.mkv", short_side=64)
    assert np.abs(clip.frames.astype(int) - (200, 40, 40)).max() <= 4


def test_a_live_recording_states_no_length_and_that_is_noted(tmp_path):
    write(tmp_path / "live.mkv", moving_bars(30), "libx264", live="1")
    write(tmp_path / "whole.mkv", moving_bars(30), "libx264")
    (live,), (whole,) = read(tmp_path / "live.mkv"), read(tmp_path / "whole.mkv")
    assert np.array_equal(live.frames, whole.frames)
    assert whole.notes == ()
    (note,) = live.notes
    assert "no length" in note


def test_a_recording_that_starts_late_is_whole(tmp_path):
    """Matroska's length counts from zero, wherever the first frame lies."""
    write(tmp_path / "a.mkv", moving_bars(30), "libx264", times=range(50, 80), avoid_negative_ts="disabled")
    (clip,) = read(tmp_path / "a.mkv")
    assert len(clip.frames) == 30


@pytest.mark.parametrize("fps", [None, 12.5])
def test_a_span_is_what_lies_between_two_times(tmp_path, fps):
    write(tmp_path / "a.mkv", moving_bars(50), "libx264", times=range(7, 57))
    (whole,) = read(tmp_path / "a.mkv")
    (part,) = read(tmp_path / "a.mkv", span=(0.4, 1.2), fps=fps)
    kept = range(10, 31, 2 if fps else 1)
    assert np.array_equal(part.numbers, kept)
    assert np.array_equal(part.frames, whole.frames[list(kept)])
    assert (whole.start, part.start) == pytest.approx((0, 0.4))
    assert read(tmp_path / "a.mkv", span=(9.0, 10.0)) == []


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
