"""A decoded frame as it is meant to be seen: one moment in time, upright, square pixels, colours of sRGB."""

import itertools
from collections.abc import Iterable, Iterator

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc, VideoReformatter

_HIGH_DYNAMIC_RANGE = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)  # PQ, HLG
_HD = 720  # lines; from here on, and from 1280 columns on, a frame without a colour tag is taken to be BT.709
_converter = VideoReformatter()


def progressive(frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Frames marked as interlaced are replaced by one of their fields with the lines between interpolated (bwdif).

    One frame out for each frame in, with its time stamp. Other frames pass unchanged.
    """
    kinds = itertools.groupby(frames, lambda f: (f.interlaced_frame, f.width, f.height, f.format.name))
    for (interlaced, *_), group in kinds:
        yield from _deinterlaced(group) if interlaced else group


def _deinterlaced(frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    graph = None
    for frame in frames:
        if graph is None:
            graph = av.filter.Graph()
            source = graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
            )
            graph.link_nodes(source, graph.add("bwdif", "mode=send_frame"), graph.add("buffersink")).configure()
        graph.push(frame)
        yield from _finished(graph)
    graph.push(None)
    yield from _finished(graph)


def _finished(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    """The frames that a filter graph has finished."""
    while True:
        try:
            yield graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return


def orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """How the stored picture is made upright: rows and columns exchanged; then columns, then rows reversed.

    By a display matrix [a b u; c d v; x y w], a pixel (p, q) is shown at (a·p + c·q, b·p + d·q). The nearest of the
    eight combinations of quarter turns and mirrorings is used. A degenerate matrix, which shows no area, is ignored.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).astype(float)
    if abs(a * d - b * c) <= 1e-3 * (a * a + b * b + c * c + d * d):
        return False, False, False
    exchanged = abs(b) + abs(c) > abs(a) + abs(d)
    return (True, c < 0, b < 0) if exchanged else (False, a < 0, d < 0)


def sides(stream: av.VideoStream, frame: av.VideoFrame) -> tuple[int, int]:
    """Width and height in square pixels, as stored; an aspect ratio of 4 or more is ignored."""
    aspect = stream.sample_aspect_ratio or 1
    return (int(frame.width * aspect) if 0.25 < aspect < 4 else frame.width), frame.height


def upright_sides(stream: av.VideoStream, frame: av.VideoFrame) -> tuple[int, int]:
    """Width and height in square pixels, upright."""
    width, height = sides(stream, frame)
    return (height, width) if orientation(frame)[0] else (width, height)


def is_high_dynamic_range(frame: av.VideoFrame) -> bool:
    """Whether its brightness is coded by PQ or HLG (BT.2100)."""
    return frame.color_trc in _HIGH_DYNAMIC_RANGE


def picture(frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
    """The upright picture, uint8 RGB, scaled by area to `size` (width, height of the stored orientation).

    PQ and HLG are converted to sRGB with diffuse white (203 cd/m²) at 255; what is brighter is clipped.

    Raises:
        av.FFmpegError, ValueError: the frame cannot be converted.
    """
    matrix = None
    if frame.colorspace == 2 and (frame.height >= _HD or frame.width >= 1280):  # AVCOL_SPC_UNSPECIFIED
        matrix = Colorspace.ITU709
    if is_high_dynamic_range(frame):
        small = frame.reformat(*size, format="yuv444p10le", src_colorspace=matrix, interpolation="AREA")
        small = _converter.reformat(
            small, format="rgb24", dst_color_trc=ColorTrc.IEC61966_2_1, dst_color_primaries=ColorPrimaries.BT709
        )
    else:
        small = frame.reformat(*size, format="rgb24", src_colorspace=matrix, interpolation="AREA")
    image = small.to_ndarray()
    exchanged, columns_reversed, rows_reversed = orientation(frame)
    if exchanged:
        image = image.transpose(1, 0, 2)
    return image[:: -1 if rows_reversed else 1, :: -1 if columns_reversed else 1]
