"""Finished clips as videos: length, rate and pictures kept, and nothing of an original outside of lab_only."""

import numpy as np
import pytest

from anonymize.batch import export
from anonymize.vision import video
from maskdp import layers


def clip(frames: int, height: int = 48, width: int = 64, seed: int = 0):
    rng = np.random.default_rng(seed)
    rgba = np.zeros((frames, height, width, 4), np.uint8)
    rgba[:, 10:40, 20:30] = (200, 60, 30, 255)
    shade = np.linspace(40, 160, width).astype(np.uint8)
    private = np.tile(shade[:, None], (frames, height, 1, 3)) + rng.integers(0, 2, (frames, height, width, 3), np.uint8)
    return rgba, private


def record(name, frames, fps, status="written"):
    return {"clip_id": name, "frames": frames, "fps": fps, "status": status}


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-6))


@pytest.fixture
def finished():
    clips = {"k-000": clip(20), "k-002": clip(10, 64, 48, 1)}
    records = [record("k-000", 20, 25.0), record("k-001", 10, 25.0, "quarantined"), record("k-002", 10, 12.5)]
    return clips, records


def test_views_keep_length_rate_and_pictures(finished, tmp_path):
    """The middle clip was not written and is grey; the last has another size and half the rate."""
    clips, records = finished
    export.views(tmp_path / "mp4", "k", records, clips.__getitem__)
    assert sorted(file.name for file in (tmp_path / "mp4").iterdir()) == [
        "k-composite.mp4",
        "k-private.mp4",
        "k-public.mp4",
    ]
    rgba, private = clips["k-000"]
    expected = {
        "composite": layers.composite(rgba, private),
        "public": layers.public_view(rgba),
        "private": private,
    }
    for name, pictures in expected.items():
        path = tmp_path / "mp4" / f"k-{name}.mp4"
        spans = (0, 0.79), (0.8, 1.19), (1.2, 9)
        ((first,), (grey,), (last,)) = (list(video.clips(path, max_frames=20, span=span)) for span in spans)
        assert [len(part.frames) for part in (first, grey, last)] == [20, 10, 10]
        assert [part.fps for part in (first, grey, last)] == pytest.approx([25, 25, 12.5], rel=0.02)
        assert psnr(first.frames, pictures) > 28
        assert psnr(grey.frames, np.full_like(grey.frames, layers.FILL)) > 30


def test_the_original_is_shown_beside_the_composite_and_a_line_says_so(finished, tmp_path):
    clips, records = finished
    originals = [video.Video(np.full((n, 48, 64, 3), 220, np.uint8), 25.0, np.arange(n)) for n in (20, 10)]
    export.beside_original(tmp_path / "lab_only", "k", records[:2], clips.__getitem__, originals)
    (both,) = video.clips(tmp_path / "lab_only" / "k.mp4", max_frames=100)
    assert both.frames.shape == (30, 48 + 20, 128, 3)
    assert (both.frames[:, :20] > 150).any((1, 2, 3)).all()  # the line
    assert psnr(both.frames[:, 20:, :64], np.full((30, 48, 64, 3), 220)) > 30
    assert psnr(both.frames[:20, 20:, 64:], layers.composite(*clips["k-000"])) > 30
    assert psnr(both.frames[20:, 24:, 68:], np.full((10, 44, 60, 3), layers.FILL)) > 30


def test_nothing_written_is_no_video(tmp_path):
    export.views(tmp_path / "mp4", "k", [record("k-000", 5, 25.0, "quarantined")], lambda name: None)
    assert not list(tmp_path.iterdir())
