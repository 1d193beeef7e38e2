"""Canary and non-interference: the anonymizer is run again on recordings that were tampered with.

*Canary*: a pattern of coin flips, one a block, is painted on the people of a recording, where the truth says they are.
What is stored of that recording is then correlated with the pattern.

*Non-interference*: the people found are held fixed and every pixel of the recording becomes noise. The bytes of the
public layer must not change.
"""

import dataclasses
import math
import tempfile
from collections.abc import Iterable

import cv2
import numpy as np

from anonymize.audit.findings import Finding
from anonymize.audit.footage import Footage
from anonymize.config import PipelineConfig
from anonymize.people import People, PeopleFinder
from anonymize.pipeline import Anonymizer
from maskdp import layers, progress
from maskdp.config import positive

_SMOOTH = 9  # pixels; slower changes of the picture are no pattern


@dataclasses.dataclass(frozen=True)
class CanaryConfig:
    """The pattern, and how surely it must be absent.

    Attributes:
        videos: recordings that are painted.
        amplitude: of the pattern, in grey levels.
        block: side of a block in pixels.
        shift: the pattern is looked for within so many pixels of its place.
        false_alarm: the probability of an alarm where nothing leaks is at most this.
    """

    videos: int = 12
    amplitude: float = 40.0
    block: int = 2
    shift: int = 6
    false_alarm: float = 1e-6

    def __post_init__(self):
        positive(self, "videos", "amplitude", "block", "false_alarm")


class Correlator:
    """Sums the evidence of several recordings for one place where a pattern may be stored.

    Guarantees: where the stored pixels do not depend on the coins, `false_alarm` is at most p with probability at most
    p. A correlation is then a sum of fixed numbers with random signs, for which P(|z| ≥ c) ≤ 2 exp(−c²/2) (Hoeffding
    1963), and a union bound covers the shifts.
    """

    def __init__(self, config: CanaryConfig):
        self._config = config
        steps = range(-config.shift, config.shift + 1)
        self._shifts = [(dy, dx) for dy in steps for dx in steps]
        self._products = np.zeros(len(self._shifts))
        self._squares = np.zeros(len(self._shifts))
        self._signs = np.zeros(len(self._shifts), int)

    def add(self, coins: np.ndarray, layer: np.ndarray, where: np.ndarray) -> None:
        """Looks for coins (h, w) of ±1 in a layer (T, H, W) around the painted pixels `where` (T, H, W) bool."""
        config, total = self._config, np.zeros(layer.shape[1:])
        for picture, mask in zip(layer.astype(np.float32), where):
            around = cv2.dilate(mask.astype(np.uint8), np.ones((2 * config.shift + 1,) * 2, np.uint8))
            total += (picture - cv2.blur(picture, (_SMOOTH, _SMOOTH))) * around
        total = np.pad(total, config.shift)
        height, width = layer.shape[1:]
        for index, (dy, dx) in enumerate(self._shifts):
            y, x = config.shift + dy, config.shift + dx
            blocks = _block_sums(total[y : y + height, x : x + width], config.block)
            self._products[index] += (coins * blocks).sum()
            self._squares[index] += (blocks**2).sum()
            self._signs[index] += np.count_nonzero(blocks)

    @property
    def strongest(self) -> int:
        """Index of the shift with the strongest correlation."""
        return int(np.argmax(np.abs(self._products) / np.sqrt(np.maximum(self._squares, 1e-12))))

    @property
    def correlation(self) -> float:
        """The strongest normalised correlation, −1 to 1."""
        best = self.strongest
        return float(self._products[best] / math.sqrt(max(self._squares[best] * self._signs[best], 1e-12)))

    @property
    def false_alarm(self) -> float:
        """Bound on the probability of a correlation as strong as this one where nothing leaks."""
        best = self.strongest
        z2 = self._products[best] ** 2 / max(self._squares[best], 1e-12)
        return min(1.0, 2 * len(self._shifts) * math.exp(-z2 / 2))


def _block_sums(picture: np.ndarray, block: int) -> np.ndarray:
    height, width = (side // block * block for side in picture.shape)
    return picture[:height, :width].reshape(height // block, block, width // block, block).sum((1, 3))


def painted(footage: Footage, coins: np.ndarray, config: CanaryConfig) -> np.ndarray:
    """The recording (T, H, W, 3) with `amplitude` added or taken from its people, block by block."""
    pattern = np.kron(coins, np.full((config.block, config.block), config.amplitude))
    height, width = footage.frames.shape[1:3]
    pattern = np.pad(pattern, ((0, height - pattern.shape[0]), (0, width - pattern.shape[1])))
    changed = footage.frames + pattern[None, :, :, None] * footage.people[..., None]
    return changed.round().clip(0, 255).astype(np.uint8)


def stored(rgba: np.ndarray, private: np.ndarray, fps: float, private_format: str) -> layers.TwoLayerClip:
    """The layers as a reader gets them, after whatever the encoding does to them."""
    clip = layers.TwoLayerClip(rgba, private, -1, "canary-000", "canary", "", (), "0" * 64, fps)
    with tempfile.TemporaryDirectory() as folder:
        layers.write_dataset(folder, {"train": [clip]}, ["unknown"], private_format=private_format)
        return layers.Dataset(folder)["train"].clip(0)


def noise(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Frames of random colours without fine detail, in which no detector takes a speck for somebody."""
    coarse = rng.integers(0, 256, (shape[0], 3, 3, 3), np.uint8)
    return np.stack([cv2.resize(picture, shape[2:0:-1], interpolation=cv2.INTER_LINEAR) for picture in coarse])


class Remembered:
    """A finder that looks once and then gives the same answer whatever the pixels."""

    def __init__(self, finder: PeopleFinder):
        self._finder, self._people = finder, None

    def find(self, frames: np.ndarray, fps: float) -> People:
        """What was found at the first call."""
        if self._people is None:
            self._people = self._finder.find(frames, fps)
        return self._people


def check(
    films: Iterable[Footage],
    count: int,
    settings: PipelineConfig,
    private_format: str,
    secret: bytes,
    config: CanaryConfig,
    seed: int,
) -> list[Finding]:
    """Both checks on the same (at most `count`) recordings, with the settings and the encoding of the dataset."""
    anonymizer = Anonymizer(settings, secret)
    finder = anonymizer.finder
    places = {name: Correlator(config) for name in ("recording", "public colour", "alpha", "private layer")}
    rng = np.random.default_rng(seed)
    total = written = same = compared = 0
    with progress.bar("canary and non-interference", count, "videos") as advance:
        for film in films:
            total += 1
            coins = rng.choice([-1.0, 1.0], [side // config.block for side in film.frames.shape[1:3]])
            changed = painted(film, coins, config)
            anonymizer.finder = finder
            result = anonymizer.clip(changed, film.fps, "canary")
            if result.status == "written":
                written += 1
                clip = stored(result.rgba, result.private, film.fps, private_format)
                scene = film.truth.empty.astype(np.float32)
                for name, layer in (
                    ("recording", changed - scene),
                    ("public colour", clip.rgba[..., :3]),
                    ("alpha", clip.rgba[..., 3:]),
                    ("private layer", clip.private - scene),
                ):
                    places[name].add(coins, layer.mean(-1), film.people)
            anonymizer.finder = Remembered(finder)
            one = anonymizer.clip(film.frames, film.fps, "canary")
            two = anonymizer.clip(noise(film.frames.shape, rng), film.fps, "canary")
            if one.status == two.status == "written":
                compared += 1
                same += one.rgba.tobytes() == two.rgba.tobytes()
            advance()
    control = places.pop("recording")
    powerful = control.false_alarm <= config.false_alarm
    findings = [
        Finding(
            f"canary painted on people, in the {name}: not found (false alarms: {config.false_alarm:g})",
            powerful and place.false_alarm > config.false_alarm,
            f"correlation {place.correlation:+.4f}, false alarm ≤ {place.false_alarm:.2g}"
            + ("" if powerful else "; the recordings do not show it either, so this proves nothing"),
            {"correlation": place.correlation, "false_alarm": place.false_alarm, "videos": written},
        )
        for name, place in places.items()
    ]
    findings.append(
        Finding(
            "the same canary in the recordings themselves: found",
            powerful,
            f"correlation {control.correlation:+.4f}, false alarm ≤ {control.false_alarm:.2g}; "
            f"{written} of {total} painted videos are written",
            {"correlation": control.correlation, "false_alarm": control.false_alarm, "videos": written},
        )
    )
    findings.append(
        Finding(
            "every pixel of the recording made noise, people held fixed: the same public bytes",
            compared > 0 and same == compared,
            f"{same} of {compared} clips the same; {total - compared} quarantined, not compared",
            {"same": same, "compared": compared, "videos": total},
        )
    )
    return findings
