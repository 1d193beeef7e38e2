"""Places in which the studio's videos happen: furnished rooms and outdoor scenes, ray-cast with procedural textures.

A room is a floor, walls or sky, and boxes and ellipsoids. People stand in front, around the world's origin, on y = 0;
the back wall is at negative z, the camera at positive z.
"""

import colorsys
import dataclasses
from collections.abc import Callable

import cv2
import numpy as np

from anonymize.avatar.camera import Camera

SAMPLES = 3  # rays a pixel, along each side
SEAT_HEIGHT = 0.44  # metres

Colour = tuple[float, float, float]  # linear steps of red, green, blue, 0…1


@dataclasses.dataclass(frozen=True)
class Paint:
    """A texture: the name of a pattern below, its two colours, and the seed of its grain."""

    pattern: str
    colour: Colour
    second: Colour = (0.2, 0.2, 0.2)
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Box:
    """An axis-aligned box between two corners (metres)."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    paint: Paint


@dataclasses.dataclass(frozen=True)
class Ball:
    """An axis-aligned ellipsoid (metres)."""

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    paint: Paint


@dataclasses.dataclass(frozen=True)
class Room:
    """A place.

    Attributes:
        kind: one of `KINDS`.
        objects: what stands in it.
        floor, wall: their paint; no wall means outdoors.
        width, depth: metres from the origin to the side walls and to the back wall.
        seat: (x, z) of the stool every room has.
        light: brightness of the whole.
    """

    kind: str
    objects: tuple[Box | Ball, ...]
    floor: Paint
    wall: Paint | None
    width: float
    depth: float
    seat: tuple[float, float]
    light: float


CEILING = 2.7  # metres


# ---------------------------------------------------------------- textures: (u, v), the face's size (w, h): metres


def _hash(x: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each whole (x, y)."""
    mixed = np.uint32(374761393) * x.astype(np.int64).astype(np.uint32)
    mixed = mixed + np.uint32(668265263) * y.astype(np.int64).astype(np.uint32) + np.uint32(seed * 2654435 % 2**32)
    mixed = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(1274126177)
    return ((mixed ^ (mixed >> np.uint32(16))) & np.uint32(0xFFFFFF)).astype(np.float32) / 0x1000000


def _noise(x: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    """Smooth noise in [0, 1] with cells of size 1."""
    ix, iy = np.floor(x), np.floor(y)
    fx, fy = x - ix, y - iy
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    low = _hash(ix, iy, seed) * (1 - fx) + _hash(ix + 1, iy, seed) * fx
    high = _hash(ix, iy + 1, seed) * (1 - fx) + _hash(ix + 1, iy + 1, seed) * fx
    return low * (1 - fy) + high * fy


def _between(share: np.ndarray, first, second) -> np.ndarray:
    share = np.asarray(share, np.float32)[:, None]
    return np.asarray(first, np.float32) * (1 - share) + np.asarray(second, np.float32) * share


def _plain(u, v, w, h, p):
    return np.asarray(p.colour) * (0.95 + 0.1 * _noise(3 * u, 3 * v, p.seed))[:, None]


def _planks(u, v, w, h, p):
    row = np.floor(v / 0.14)
    along = u / 1.3 + _hash(row, row, p.seed)
    tint = _hash(np.floor(along), row, p.seed + 1)
    gap = (v / 0.14 % 1 < 0.06) | (along % 1 < 0.008)
    grain = 0.88 + 0.10 * _noise(3 * u, 40 * v, p.seed) + 0.16 * tint
    return np.asarray(p.colour) * np.where(gap, 0.6, grain)[:, None]


def _tiles(u, v, w, h, p):
    x, y = u / 0.32, v / 0.32
    shade = 0.93 + 0.1 * _hash(np.floor(x), np.floor(y), p.seed)
    return _between((x % 1 < 0.05) | (y % 1 < 0.05), p.colour, p.second) * shade[:, None]


def _checks(u, v, w, h, p):
    return _between((np.floor(u / 0.4) + np.floor(v / 0.4)) % 2, p.colour, p.second) * 0.97


def _bricks(u, v, w, h, p):
    row = np.floor(v / 0.10)
    x = u / 0.28 + 0.5 * (row % 2)
    shade = 0.8 + 0.3 * _hash(np.floor(x), row, p.seed)
    return _between((x % 1 < 0.06) | (v / 0.10 % 1 < 0.14), np.asarray(p.colour), p.second) * shade[:, None]


def _stripes(u, v, w, h, p):
    return _between(u / 0.3 % 1 < 0.5, p.colour, p.second)


def _wainscot(u, v, w, h, p):
    lower = _between((u / 0.45 % 1 < 0.05) | (np.abs(v - 0.85) < 0.03), p.second, np.asarray(p.second) * 0.75)
    return np.where((v < 0.9)[:, None], lower, _plain(u, v, w, h, p))


def _speckle(u, v, w, h, p):
    grain = 0.5 * _noise(9 * u, 9 * v, p.seed) + 0.5 * _noise(37 * u, 37 * v, p.seed + 1)
    return _between(np.clip(1.6 * grain - 0.3, 0, 1), p.colour, p.second)


def _grass(u, v, w, h, p):
    patches = 0.6 * _noise(0.7 * u, 0.7 * v, p.seed) + 0.4 * _noise(14 * u, 9 * v, p.seed + 1)
    return _between(patches, p.colour, p.second)


def _court(u, v, w, h, p):
    line = (np.abs(np.abs(u) - 2.2) < 0.04) | (np.abs(v + 0.9) < 0.04) | (np.abs(np.hypot(u, v + 0.9) - 1.1) < 0.04)
    return np.where(line[:, None], p.second, _planks(u, v, w, h, p))


def _road(u, v, w, h, p):
    kerb = (v > -1.35) & (v < -1.2)
    dash = (np.abs(v + 4.2) < 0.08) & (u / 1.6 % 1 < 0.55)
    road = _between(_noise(30 * u, 30 * v, p.seed), (0.26, 0.26, 0.28), (0.34, 0.34, 0.36))
    colour = np.where((v < -1.35)[:, None], road, _tiles(u / 1.8, v / 1.8, w, h, p))
    colour = np.where(kerb[:, None], (0.72, 0.72, 0.70), colour)
    return np.where(dash[:, None], (0.9, 0.9, 0.85), colour)


def _shore(u, v, w, h, p):
    edge = -3.2 + 0.35 * np.sin(0.9 * u + p.seed)
    sea = _between(0.5 + 0.5 * np.sin(5 * v + 2 * _noise(u, v, p.seed)), (0.20, 0.52, 0.66), (0.36, 0.66, 0.76))
    colour = np.where((v < edge)[:, None], sea, _speckle(u, v, w, h, p))
    return np.where((np.abs(v - edge) < 0.14)[:, None], (0.95, 0.97, 0.97), colour)


def _books(u, v, w, h, p):
    row, spine = np.floor(v / 0.34), np.floor(u / 0.055)
    hue, tall = _hash(spine, row, p.seed), 0.6 + 0.32 * _hash(spine, row, p.seed + 1)
    spines = 0.28 + 0.5 * np.stack([_hash(spine, row + 50 * k, p.seed + 2) for k in range(3)], -1)
    empty = (v / 0.34 % 1 > tall) | (hue < 0.12) | (u / 0.055 % 1 < 0.08)
    colour = np.where(empty[:, None], np.asarray(p.colour) * 0.45, spines)
    board = (v / 0.34 % 1 < 0.09) | (u < 0.04) | (w - u < 0.04) | (h - v < 0.03)
    return np.where(board[:, None], p.colour, colour)


def _facade(u, v, w, h, p):
    x, y = u / 1.5 % 1, v / 1.9 % 1
    window = (x > 0.28) & (x < 0.75) & (y > 0.3) & (y < 0.8)
    lit = _hash(np.floor(u / 1.5), np.floor(v / 1.9), p.seed) > 0.7
    glass = _between(lit, (0.30, 0.40, 0.50), (0.85, 0.78, 0.55))
    return np.where(window[:, None], glass, _bricks(u, v, w, h, p))


def _doors(u, v, w, h, p):
    count = max(1, round(w / 0.5))
    x = u / w * count % 1
    seam = (x < 0.03) | (x > 0.97) | (v < 0.03) | (h - v < 0.03)
    handle = (np.abs(x - 0.85) < 0.035) & (np.abs(v - 0.6 * h) < 0.08)
    colour = _between(seam, p.colour, np.asarray(p.colour) * 0.6)
    return np.where(handle[:, None], p.second, colour)


def _pane(u, v, w, h, p):
    x, y = u / w, v / h
    outside = _between(np.clip(1.5 * y - 0.2, 0, 1), (0.62, 0.74, 0.58), (0.72, 0.86, 0.97))
    frame = np.minimum(np.minimum(x, 1 - x) * w, np.minimum(y, 1 - y) * h) < 0.06
    bar = (np.abs(x - 0.5) * w < 0.025) | (np.abs(y - 0.55) * h < 0.025)
    return np.where((frame | bar)[:, None], p.colour, outside)


def _picture(u, v, w, h, p):
    shapes = _noise(3.2 * u / w, 3.2 * v / h, p.seed)
    other = _noise(2.3 * u / w + 9, 2.3 * v / h, p.seed + 1)
    colour = np.where((shapes > 0.55)[:, None], p.second, _between(other, p.colour, np.asarray(p.second)[::-1]))
    frame = np.minimum(np.minimum(u, w - u), np.minimum(v, h - v)) < 0.035
    return np.where(frame[:, None], (0.16, 0.13, 0.11), colour)


def _board(u, v, w, h, p):
    row = np.floor(v / 0.11)
    written = (
        (v / 0.11 % 1 < 0.3)
        & (_hash(np.floor(u / 0.05), row, p.seed) > 0.35)
        & (u < w * (0.3 + 0.6 * _hash(row, row, p.seed)))
    )
    written &= (u > 0.12) & (v > 0.25 * h) & (h - v > 0.12)
    frame = np.minimum(np.minimum(u, w - u), np.minimum(v, h - v)) < 0.04
    return np.where(frame[:, None], (0.55, 0.48, 0.40), _between(written, p.colour, p.second))


def _screen(u, v, w, h, p):
    edge = np.minimum(np.minimum(u, w - u), np.minimum(v, h - v)) < 0.025
    glow = _between(_noise(4 * u / w, 6 * v / h, p.seed), p.colour, p.second)
    return np.where(edge[:, None], (0.06, 0.06, 0.07), glow)


PATTERNS: dict[str, Callable] = {
    name[1:]: function
    for name, function in list(globals().items())
    if name
    in {
        *("_plain", "_planks", "_tiles", "_checks", "_bricks", "_stripes", "_wainscot", "_speckle", "_grass", "_court"),
        *("_road", "_shore", "_books", "_facade", "_doors", "_pane", "_picture", "_board", "_screen"),
    }
}


# ---------------------------------------------------------------- furniture


class _Builder:
    """Draws furniture for one room; each method returns what it built, `x` its middle and `z` its back."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.wood = self.colour(0.07, 0.5, (0.35, 0.75), spread=0.02)
        self.accent = self.colour(rng.uniform(), 0.5, (0.45, 0.8), spread=0.05)
        self.pale = self.colour(rng.uniform(), 0.08, (0.8, 0.95))

    def colour(self, hue: float, saturation: float, value: tuple[float, float], spread: float = 0.03) -> Colour:
        hue = (hue + self.rng.normal(0, spread)) % 1
        return colorsys.hsv_to_rgb(
            hue, np.clip(saturation * self.rng.uniform(0.8, 1.2), 0, 1), self.rng.uniform(*value)
        )

    def any(self, saturation: float = 0.55, value: tuple[float, float] = (0.4, 0.85)) -> Colour:
        return self.colour(self.rng.uniform(), saturation, value)

    def paint(self, pattern: str, colour: Colour, second: Colour = (0.2, 0.2, 0.2)) -> Paint:
        return Paint(pattern, colour, second, int(self.rng.integers(1000)))

    def box(self, x, y, z, width, height, depth, colour, pattern="plain", second=(0.2, 0.2, 0.2)) -> Box:
        """A box centred on x, with its bottom at y and its back at z."""
        low, high = (x - width / 2, y, z), (x + width / 2, y + height, z + depth)
        return Box(low, high, self.paint(pattern, colour, second))

    def ball(self, x, y, z, radius, colour, squash: float = 1.0) -> Ball:
        return Ball(
            (x, y, z), (radius, radius * squash, radius), self.paint("speckle", colour, tuple(0.75 * c for c in colour))
        )

    def legs(self, x, z, width, height, depth, colour, thick=0.05) -> list[Box]:
        return [
            self.box(x + dx * (width - thick) / 2, 0, z + dz * (depth - thick), thick, height, thick, colour)
            for dx in (-1, 1)
            for dz in (0, 1)
        ]

    def table(self, x, z, width=1.2, height=0.74, depth=0.65, colour=None) -> list:
        colour = colour or self.wood
        return [
            self.box(x, height - 0.05, z, width, 0.05, depth, colour, "planks"),
            *self.legs(x, z, width, height, depth, colour),
        ]

    def stool(self, x, z) -> list:
        return [
            self.box(x, SEAT_HEIGHT - 0.07, z, 0.42, 0.07, 0.42, self.accent),
            *self.legs(x, z, 0.38, 0.4, 0.4, self.wood, 0.04),
        ]

    def chair(self, x, z) -> list:
        return [
            self.box(x, 0.42, z + 0.05, 0.42, 0.05, 0.42, self.accent),
            self.box(x, 0.47, z, 0.42, 0.45, 0.05, self.accent),
            *self.legs(x, z, 0.42, 0.42, 0.46, self.wood, 0.04),
        ]

    def counter(self, x, z, width=1.6) -> list:
        front = self.pale
        return [
            self.box(x, 0, z, width, 0.86, 0.6, front, "doors"),
            self.box(x, 0.86, z, width + 0.04, 0.05, 0.64, (0.32, 0.31, 0.30), "speckle", (0.5, 0.48, 0.46)),
            self.box(x, 1.45, z, width, 0.65, 0.34, front, "doors"),
            self.box(x - 0.3 * width, 0.91, z + 0.2, 0.18, 0.26, 0.18, self.any()),
            self.ball(x + 0.2 * width, 0.98, z + 0.3, 0.1, self.any(0.8), 0.7),
        ]

    def fridge(self, x, z) -> list:
        white = self.colour(0.55, 0.05, (0.85, 0.97))
        return [self.box(x, 0, z, 0.7, 1.2, 0.65, white, "doors"), self.box(x, 1.22, z, 0.7, 0.6, 0.65, white, "doors")]

    def stove(self, x, z) -> list:
        return [
            self.box(x, 0, z, 0.62, 0.9, 0.6, (0.75, 0.75, 0.76), "doors"),
            self.box(x, 0.25, z + 0.6, 0.46, 0.4, 0.01, (0.1, 0.1, 0.12)),
            self.box(x, 0.9, z, 0.62, 0.02, 0.6, (0.12, 0.12, 0.13)),
            self.box(x, 1.6, z, 0.6, 0.25, 0.4, (0.7, 0.7, 0.72)),
            self.ball(x, 1.0, z + 0.3, 0.13, self.any(0.7), 0.7),
        ]

    def desk(self, x, z) -> list:
        return [
            *self.table(x, z + 0.05, 1.3),
            self.box(x, 0.85, z + 0.2, 0.56, 0.36, 0.04, (0.15, 0.3, 0.5), "screen", (0.5, 0.7, 0.9)),
            self.box(x, 0.74, z + 0.2, 0.08, 0.12, 0.05, (0.1, 0.1, 0.1)),
            self.box(x + 0.45, 0.74, z + 0.2, 0.12, 0.14, 0.12, self.any()),
            self.box(x - 0.48, 0.74, z + 0.15, 0.22, 0.09, 0.3, (0.93, 0.92, 0.88)),
        ]

    def shelf(self, x, z, width=1.0, height=1.9) -> list:
        return [self.box(x, 0, z, width, height, 0.3, self.wood, "books")]

    def plant(self, x, z) -> list:
        leaf = self.colour(0.3, 0.6, (0.3, 0.55))
        size = self.rng.uniform(0.8, 1.3)
        leaves = [
            self.ball(x + dx * size, (0.55 + dy) * size, z + 0.25, 0.2 * size, leaf, 1.1)
            for dx, dy in ((0, 0.3), (0.14, 0.1), (-0.15, 0.08), (0.02, 0.0))
        ]
        return [self.box(x, 0, z + 0.1, 0.3 * size, 0.35 * size, 0.3 * size, self.any(0.6)), *leaves]

    def lamp(self, x, z) -> list:
        shade = self.colour(0.13, 0.3, (0.9, 1.0))
        return [
            self.box(x, 0, z + 0.2, 0.04, 1.5, 0.04, (0.2, 0.2, 0.2)),
            self.ball(x, 1.55, z + 0.22, 0.2, shade, 0.8),
            self.box(x, 0, z + 0.1, 0.26, 0.03, 0.26, (0.2, 0.2, 0.2)),
        ]

    def sofa(self, x, z) -> list:
        colour = self.any(0.45, (0.4, 0.7))
        return [
            self.box(x, 0.05, z, 1.8, 0.37, 0.8, colour, "speckle", tuple(0.85 * c for c in colour)),
            self.box(x, 0.42, z, 1.8, 0.42, 0.2, colour),
            self.box(x - 0.87, 0.05, z, 0.2, 0.55, 0.8, colour),
            self.box(x + 0.87, 0.05, z, 0.2, 0.55, 0.8, colour),
            self.box(x - 0.45, 0.44, z + 0.2, 0.4, 0.34, 0.12, self.any(0.7)),
            self.box(x + 0.5, 0.44, z + 0.2, 0.38, 0.32, 0.12, self.any(0.7)),
        ]

    def television(self, x, z) -> list:
        return [
            self.box(x, 0, z, 1.3, 0.45, 0.4, self.wood, "doors"),
            self.box(x, 0.55, z + 0.1, 1.1, 0.64, 0.05, self.any(), "screen", self.any()),
        ]

    def bed(self, x, z) -> list:
        cover = self.any(0.5)
        return [
            self.box(x, 0, z, 1.5, 0.32, 1.5, self.wood, "planks"),
            self.box(x, 0.32, z, 1.46, 0.2, 1.46, cover, "stripes", tuple(0.8 * c + 0.15 for c in cover)),
            self.box(x, 0, z - 0.06, 1.6, 0.95, 0.08, self.wood),
            self.box(x - 0.36, 0.52, z + 0.05, 0.55, 0.13, 0.35, (0.95, 0.95, 0.93)),
            self.box(x + 0.36, 0.52, z + 0.05, 0.55, 0.13, 0.35, (0.95, 0.95, 0.93)),
        ]

    def wardrobe(self, x, z) -> list:
        return [self.box(x, 0, z, 1.1, 2.0, 0.5, self.wood, "doors")]

    def lockers(self, x, z, width=1.5) -> list:
        return [self.box(x, 0, z, width, 1.85, 0.4, self.any(0.5, (0.4, 0.7)), "doors", (0.8, 0.8, 0.8))]

    def weights(self, x, z) -> list:
        rack = [self.box(x, y, z, 1.3, 0.05, 0.3, (0.2, 0.2, 0.22)) for y in (0.35, 0.75)]
        balls = [
            self.ball(x - 0.52 + 0.21 * k, y + 0.15, z + 0.17, 0.09, self.any(0.75), 1.0)
            for k in range(6)
            for y in (0.35, 0.75)
        ]
        return [*rack, *self.legs(x, z, 1.3, 0.8, 0.3, (0.2, 0.2, 0.22)), *balls]

    def wall_bars(self, x, z) -> list:
        bars = [self.box(x, 0.3 + 0.24 * k, z + 0.06, 0.9, 0.045, 0.05, self.wood) for k in range(9)]
        return [*bars, *(self.box(x + dx, 0, z, 0.07, 2.4, 0.12, self.wood) for dx in (-0.47, 0.47))]

    def big_ball(self, x, z) -> list:
        return [self.ball(x, 0.33, z + 0.4, 0.33, self.any(0.75))]

    def workbench(self, x, z) -> list:
        tools = [
            self.box(
                x - 0.55 + 0.16 * k,
                self.rng.uniform(1.25, 1.5),
                z,
                0.05,
                self.rng.uniform(0.2, 0.4),
                0.03,
                self.any(0.7, (0.3, 0.8)),
            )
            for k in range(8)
        ]
        board = self.box(x, 1.15, z - 0.02, 1.5, 0.8, 0.02, (0.72, 0.62, 0.45))
        crates = [self.box(x + dx, 0.86, z + 0.1, 0.25, 0.18, 0.25, self.any(0.7)) for dx in (-0.4, 0.35)]
        return [*self.table(x, z, 1.5, 0.86, 0.55), board, *tools, *crates]

    def crates(self, x, z) -> list:
        card = self.colour(0.09, 0.45, (0.6, 0.75))
        return [
            self.box(x - 0.2, 0, z, 0.5, 0.45, 0.5, card),
            self.box(x + 0.32, 0, z, 0.42, 0.38, 0.45, card),
            self.box(x - 0.1, 0.45, z, 0.4, 0.35, 0.4, card),
        ]

    def car(self, x, z) -> list:
        colour = self.any(0.75, (0.45, 0.8))
        wheels = [
            Ball((x + dx, 0.3, z + 1.5), (0.3, 0.3, 0.1), self.paint("plain", (0.08, 0.08, 0.08))) for dx in (-1.2, 1.2)
        ]
        return [
            self.box(x, 0.25, z, 3.9, 0.55, 1.5, colour),
            self.box(x - 0.1, 0.8, z + 0.1, 2.0, 0.5, 1.3, (0.28, 0.36, 0.44)),
            self.box(x - 0.1, 1.28, z + 0.1, 1.9, 0.07, 1.3, colour),
            *wheels,
        ]

    def door(self, x, z) -> list:
        return [self.box(x, 0, z, 0.9, 2.05, 0.04, self.wood, "doors", (0.85, 0.75, 0.4))]

    def window(self, x, z) -> list:
        return [self.box(x, 0.95, z, self.rng.uniform(1.0, 1.5), 1.15, 0.04, (0.96, 0.96, 0.94), "pane")]

    def picture(self, x, z) -> list:
        return [
            self.box(
                x,
                self.rng.uniform(1.3, 1.5),
                z,
                self.rng.uniform(0.5, 0.9),
                0.6,
                0.03,
                self.any(),
                "picture",
                self.any(0.8),
            )
        ]

    def blackboard(self, x, z) -> list:
        dark = self.rng.uniform() < 0.5
        colours = ((0.13, 0.28, 0.22), (0.85, 0.88, 0.85)) if dark else ((0.95, 0.96, 0.96), (0.2, 0.3, 0.6))
        return [self.box(x, 0.95, z, 2.0, 1.1, 0.04, colours[0], "board", colours[1])]

    def mirror(self, x, z) -> list:
        return [self.box(x, 0.3, z, 1.6, 1.7, 0.03, (0.7, 0.78, 0.82), "screen", (0.85, 0.9, 0.93))]

    def tree(self, x, z) -> list:
        size = self.rng.uniform(0.9, 1.4)
        leaf = self.colour(0.27, 0.6, (0.35, 0.6), 0.04)
        crown = [
            self.ball(x + dx * size, (1.9 + dy) * size, z, 0.62 * size, leaf)
            for dx, dy in ((0, 0.35), (0.45, 0), (-0.45, 0.02), (0.05, -0.1))
        ]
        return [self.box(x, 0, z - 0.1, 0.2 * size, 1.6 * size, 0.2 * size, (0.38, 0.27, 0.18), "planks"), *crown]

    def bush(self, x, z) -> list:
        leaf = self.colour(0.3, 0.6, (0.28, 0.5), 0.04)
        return [self.ball(x + 0.3 * k, 0.3, z + 0.3, 0.36, leaf) for k in (-1, 0, 1)]

    def bench(self, x, z) -> list:
        return [
            *self.table(x, z, 1.5, 0.45, 0.42),
            self.box(x, 0.6, z, 1.5, 0.1, 0.04, self.wood, "planks"),
            self.box(x, 0.78, z, 1.5, 0.1, 0.04, self.wood, "planks"),
        ]

    def street_lamp(self, x, z) -> list:
        return [self.box(x, 0, z, 0.09, 3.2, 0.09, (0.2, 0.22, 0.22)), self.ball(x, 3.3, z, 0.2, (0.95, 0.93, 0.8))]

    def parasol(self, x, z) -> list:
        cloth = self.any(0.75, (0.7, 0.95))
        return [
            self.box(x, 0, z, 0.06, 2.0, 0.06, (0.85, 0.8, 0.7)),
            Ball((x, 1.95, z), (1.1, 0.32, 1.1), self.paint("stripes", cloth, (0.97, 0.96, 0.93))),
            self.box(x + 0.5, 0.1, z, 0.6, 0.1, 1.2, self.any(), "stripes", (0.95, 0.95, 0.95)),
        ]

    def boat(self, x, z) -> list:
        return [
            self.box(x, 0.0, z, 1.4, 0.35, 0.4, self.any(0.7)),
            self.box(x, 0.35, z + 0.2, 0.05, 1.7, 0.05, self.wood),
            self.box(x + 0.35, 0.5, z + 0.2, 0.6, 1.2, 0.02, (0.97, 0.97, 0.95)),
        ]

    def basin(self, x, z) -> list:
        return [
            self.box(x, 0, z, 0.9, 0.8, 0.45, self.wood, "doors"),
            self.box(x, 0.8, z, 0.95, 0.08, 0.5, (0.97, 0.97, 0.97)),
            self.box(x, 1.15, z, 0.8, 0.75, 0.03, (0.75, 0.83, 0.87), "screen", (0.88, 0.93, 0.95)),
        ]

    def bathtub(self, x, z) -> list:
        return [
            self.box(x, 0, z, 1.6, 0.55, 0.7, (0.96, 0.96, 0.97)),
            self.box(x, 0.552, z + 0.08, 1.4, 0.004, 0.54, (0.62, 0.80, 0.86)),
            self.box(x + 0.65, 0.6, z, 0.9, 1.5, 0.02, self.any(0.4), "stripes", (0.96, 0.96, 0.96)),
        ]


# kind: (floor pattern, its two colours), (wall pattern, its two colours; None outdoors), furniture on the floor, what
# hangs on the wall or stands far behind. Colours: hue, saturation, lowest and highest value.
_Hue = tuple[float, float, float, float]
_KINDS: dict[str, tuple[tuple[str, _Hue, _Hue], tuple[str, _Hue, _Hue] | None, tuple[str, ...], tuple[str, ...]]] = {
    "hallway": (
        ("tiles", (0.1, 0.15, 0.7, 0.85), (0.1, 0.1, 0.5, 0.6)),
        ("wainscot", (0.13, 0.25, 0.8, 0.95), (0.55, 0.25, 0.5, 0.75)),
        ("lamp", "plant", "wardrobe"),
        ("door", "picture", "door"),
    ),
    "classroom": (
        ("planks", (0.09, 0.4, 0.6, 0.75), (0, 0, 0.2, 0.3)),
        ("plain", (0.16, 0.22, 0.85, 0.95), (0, 0, 0.9, 1)),
        ("chair", "desk", "shelf"),
        ("picture", "blackboard", "window"),
    ),
    "kitchen": (
        ("checks", (0.1, 0.08, 0.85, 0.95), (0.55, 0.2, 0.35, 0.6)),
        ("tiles", (0.5, 0.12, 0.85, 0.95), (0, 0, 0.95, 1)),
        ("counter", "stove", "fridge"),
        ("window",),
    ),
    "office": (
        ("speckle", (0.6, 0.25, 0.35, 0.5), (0.6, 0.2, 0.45, 0.55)),
        ("plain", (0.6, 0.06, 0.82, 0.93), (0, 0, 0.9, 1)),
        ("shelf", "desk", "plant", "chair"),
        ("window", "picture"),
    ),
    "living_room": (
        ("planks", (0.07, 0.5, 0.5, 0.7), (0, 0, 0.2, 0.3)),
        ("stripes", (0.12, 0.2, 0.8, 0.92), (0.12, 0.28, 0.75, 0.88)),
        ("lamp", "sofa", "shelf"),
        ("picture", "window", "picture"),
    ),
    "gym": (
        ("court", (0.09, 0.5, 0.7, 0.85), (0, 0, 0.95, 1)),
        ("plain", (0.55, 0.3, 0.6, 0.85), (0, 0, 0.9, 1)),
        ("wall_bars", "weights", "big_ball", "lockers"),
        ("mirror",),
    ),
    "park": (
        ("grass", (0.26, 0.6, 0.4, 0.5), (0.22, 0.6, 0.6, 0.75)),
        None,
        ("bush", "bench"),
        ("tree", "tree", "tree", "bush"),
    ),
    "beach": (
        ("shore", (0.12, 0.3, 0.8, 0.9), (0.11, 0.4, 0.72, 0.82)),
        None,
        ("parasol",),
        ("boat", "boat"),
    ),
    "street": (
        ("road", (0.08, 0.06, 0.6, 0.75), (0, 0, 0.45, 0.55)),
        None,
        ("street_lamp", "bush"),
        ("car",),
    ),
    "garage": (
        ("speckle", (0.1, 0.05, 0.5, 0.6), (0.1, 0.05, 0.6, 0.7)),
        ("bricks", (0.04, 0.45, 0.55, 0.75), (0.1, 0.1, 0.75, 0.85)),
        ("workbench", "crates", "lockers"),
        (),
    ),
    "bedroom": (
        ("speckle", (0.08, 0.3, 0.65, 0.8), (0.08, 0.25, 0.6, 0.7)),
        ("plain", (0.72, 0.22, 0.75, 0.92), (0, 0, 0.9, 1)),
        ("wardrobe", "bed", "lamp"),
        ("picture", "window"),
    ),
    "bathroom": (
        ("tiles", (0.52, 0.15, 0.7, 0.9), (0, 0, 0.9, 1)),
        ("tiles", (0.5, 0.3, 0.75, 0.92), (0, 0, 0.95, 1)),
        ("bathtub", "basin", "plant"),
        ("window",),
    ),
}
KINDS: tuple[str, ...] = tuple(_KINDS)
"""The kinds of place."""


def draw_room(kind: str, seed: int) -> Room:
    """The place of this kind that `seed` names: colours, textures, sizes, and what stands where."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    build = _Builder(rng)
    (floor, *floor_hues), wall, standing, behind = _KINDS[kind]

    def paint(pattern: str, hues) -> Paint:
        first, second = (build.colour(hue, saturation, (low, high)) for hue, saturation, low, high in hues)
        return build.paint(pattern, first, second)

    width, depth = rng.uniform(2.0, 2.6), rng.uniform(1.5, 2.1)
    objects = []
    for row, names in enumerate((standing, behind)):
        names = list(rng.permutation(names))
        for place, name in enumerate(names):
            x = width * ((2 * place + 1) / len(names) - 1) * (0.85 if wall else 1.3) + rng.normal(0, 0.08)
            z = -depth
            if not wall:
                z = -depth * (1.2 if row == 0 else rng.uniform(2.5, 4.0))
                x *= 1 if row == 0 else 1.7
            objects += getattr(build, name)(float(x), float(z))
    if kind == "street":
        objects += [
            build.box(
                x,
                0,
                -12,
                6,
                rng.uniform(6, 10),
                2,
                build.colour(0.06, 0.3, (0.5, 0.8), 0.05),
                "facade",
                (0.8, 0.8, 0.78),
            )
            for x in (-9, -3, 3, 9)
        ]
    seat = (float(rng.choice([-1, 1]) * rng.uniform(0.9, 1.2)), float(rng.uniform(-0.7, -0.4)))
    objects += build.stool(seat[0], seat[1] - 0.21)
    return Room(
        kind,
        tuple(objects),
        paint(floor, floor_hues),
        paint(wall[0], wall[1:]) if wall else None,
        width,
        depth,
        seat,
        float(rng.uniform(0.88, 1.08)),
    )


# ---------------------------------------------------------------- ray casting

_SUN = np.array([0.36, 0.80, 0.48], np.float32)


def _textured(paint: Paint, u, v, w: float, h: float) -> np.ndarray:
    return PATTERNS[paint.pattern](u, v, w, h, paint)


def _rays(camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """The eye (3,) and the direction of each pixel (H, W, 3), in the world."""
    x, y = np.meshgrid(np.arange(camera.width) + 0.5, np.arange(camera.height) + 0.5)
    x, y = (x - camera.width / 2) / camera.focal, (y - camera.height / 2) / camera.focal
    directions = np.stack([x, y, np.ones_like(x)], -1) @ camera.rotation
    return (-camera.rotation.T @ camera.translation).astype(np.float32), directions.astype(np.float32)


def _window(low: np.ndarray, high: np.ndarray, camera: Camera) -> tuple[slice, slice]:
    """The pixels that may see the box: rows, columns."""
    corners = np.array(
        [[(low, high)[i][0], (low, high)[j][1], (low, high)[k][2]] for i in (0, 1) for j in (0, 1) for k in (0, 1)]
    )
    seen = corners @ camera.rotation.T + camera.translation
    if seen[:, 2].min() < 0.1:
        return slice(0, 0 if seen[:, 2].max() < 0.1 else camera.height), slice(0, camera.width)
    pixels = camera.focal * seen[:, :2] / seen[:, 2:] + [camera.width / 2, camera.height / 2]
    (x0, y0), (x1, y1) = np.floor(pixels.min(0)).astype(int), np.ceil(pixels.max(0)).astype(int)
    return slice(max(0, y0), max(0, y1)), slice(max(0, x0), max(0, x1))


def look(room: Room, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """What the camera sees of the empty room.

    Returns:
        (H, W, 3) uint8, and the floor's (H, W, 2) world x, z in metres, NaN where something else is seen.
    """
    fine = camera.scaled(SAMPLES)
    eye, rays = _rays(fine)
    nearest = np.full(rays.shape[:2], np.inf, np.float32)
    colour = np.empty(rays.shape, np.float32)
    floor = np.full((*rays.shape[:2], 2), np.nan, np.float32)
    _cast_surroundings(room, eye, rays.reshape(-1, 3), nearest.reshape(-1), colour.reshape(-1, 3), floor.reshape(-1, 2))
    for item in room.objects:
        if isinstance(item, Box):
            low, high = np.array(item.low), np.array(item.high)
        else:
            low, high = (np.array(item.centre) + sign * np.array(item.radii) for sign in (-1, 1))
        rows, columns = _window(low, high, fine)
        patch = rays[rows, columns].reshape(-1, 3)
        if not len(patch):
            continue
        behind = nearest[rows, columns].reshape(-1)
        distance, paint = (_see_box if isinstance(item, Box) else _see_ball)(item, eye, patch)
        index = np.flatnonzero(distance < behind)
        if not len(index):
            continue
        seen = paint(index)
        target = colour[rows, columns].reshape(-1, 3)
        target[index], behind[index] = seen, distance[index]
        shape = rays[rows, columns].shape[:2]
        colour[rows, columns], nearest[rows, columns] = target.reshape(*shape, 3), behind.reshape(shape)
        floor[rows, columns][(distance == behind).reshape(shape)] = np.nan
    image = cv2.resize(colour, (camera.width, camera.height), interpolation=cv2.INTER_AREA)
    middle = SAMPLES // 2
    return (255 * np.clip(room.light * image, 0, 1)).round().astype(np.uint8), floor[middle::SAMPLES, middle::SAMPLES]


def background(room: Room, camera: Camera) -> np.ndarray:
    """(H, W, 3) uint8: what the camera sees of the empty room."""
    return look(room, camera)[0]


def _see_box(box: Box, eye: np.ndarray, rays: np.ndarray):
    low, high = np.array(box.low, np.float32), np.array(box.high, np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        to_low, to_high = (low - eye) / rays, (high - eye) / rays
    (x, y, z), far = np.minimum(to_low, to_high).T, np.maximum(to_low, to_high).T
    distance = np.maximum(np.maximum(x, y), z)
    axis = np.where(distance == x, 0, np.where(distance == y, 1, 2))
    ahead = (distance < np.minimum(np.minimum(far[0], far[1]), far[2])) & (distance > 0)
    distance = np.where(ahead, distance, np.float32(np.inf))

    def paint(index: np.ndarray) -> np.ndarray:
        point = eye + distance[index, None] * rays[index] - low
        colour = np.empty((len(index), 3), np.float32)
        for normal, (right, up) in enumerate(((2, 1), (0, 2), (0, 1))):
            face = axis[index] == normal
            size = high - low
            textured = _textured(box.paint, point[face, right], point[face, up], size[right], size[up])
            colour[face] = textured * (0.72, 1.0, 0.88)[normal]
        return colour

    return distance, paint


def _see_ball(ball: Ball, eye: np.ndarray, rays: np.ndarray):
    radii, centre = np.array(ball.radii, np.float32), np.array(ball.centre, np.float32)
    start, along = (eye - centre) / radii, rays / radii
    a, b, c = (along**2).sum(1), (along * start).sum(1), (start**2).sum() - 1
    inside = b * b - a * c
    distance = np.where((inside > 0) & (b < 0), (-b - np.sqrt(np.maximum(inside, 0))) / a, np.float32(np.inf))

    def paint(index: np.ndarray) -> np.ndarray:
        point = start + distance[index, None] * along[index]
        normal = point / radii
        normal /= np.linalg.norm(normal, axis=1, keepdims=True)
        light = 0.55 + 0.5 * np.clip(normal @ _SUN, 0, 1)
        u, v = ball.radii[0] * np.arctan2(point[:, 0], point[:, 2]), ball.radii[1] * point[:, 1]
        return _textured(ball.paint, u, v, 1.0, 1.0) * light[:, None]

    return distance, paint


def _cast_surroundings(room: Room, eye, rays, nearest, colour, floor) -> None:
    """Fills in floor and walls, or ground and sky, seen by rays (N, 3)."""
    with np.errstate(divide="ignore"):
        to_floor = np.where(rays[:, 1] < -1e-6, -eye[1] / rays[:, 1], np.inf)
    if room.wall is None:
        ground = to_floor < 60
        up = np.clip(rays[:, 1] / np.linalg.norm(rays, axis=1), 0, 1)
        colour[:] = _between(np.sqrt(up * 1.6).clip(0, 1), (0.86, 0.91, 0.95), (0.42, 0.64, 0.90))
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            low = np.array([-room.width, 0, -room.depth], np.float32)
            high = np.array([room.width, CEILING, 1e3], np.float32)
            x, y, z = np.maximum((low - eye) / rays, (high - eye) / rays).T
        distance = np.minimum(np.minimum(x, y), z)
        axis = np.where(distance == x, 0, np.where(distance == y, 1, 2))
        point = eye + distance[:, None] * rays
        ground = (axis == 1) & (rays[:, 1] < 0)
        for normal, along in ((0, 2), (2, 0)):
            face = axis == normal
            u, v = point[face, along], point[face, 1]
            corner = np.exp(-np.minimum(v, CEILING - v).clip(0) / 0.25) + np.exp(
                -(room.width - np.abs(u) if normal == 2 else u + room.depth).clip(0) / 0.3
            )
            skirting = np.where(v < 0.08, 0.75, 1.0) * (0.80 if normal == 0 else 0.95) * (1 - 0.18 * corner)
            colour[face] = _textured(room.wall, u + 50, v, 100, CEILING) * skirting[:, None]
        colour[(axis == 1) & ~ground] = 0.93
        nearest[:] = distance
    index = np.flatnonzero(ground)
    point = (eye + to_floor[index, None] * rays[index])[:, [0, 2]]
    seen = _textured(room.floor, point[:, 0], point[:, 1], 100, 100) * _shadow_of(room, point)[:, None]
    haze = np.clip(to_floor[index] / 60, 0, 1)[:, None] if room.wall is None else 0
    colour[index] = seen * (1 - haze) + haze * np.array([0.80, 0.87, 0.90])
    floor[index] = point
    nearest[index] = to_floor[index]


def _shadow_of(room: Room, point: np.ndarray) -> np.ndarray:
    """Brightness (N,) of floor points (N, 2) next to walls and things that stand on the floor."""
    light = np.ones(len(point), np.float32)
    for item in room.objects:
        if isinstance(item, Box) and item.low[1] < 0.12:
            low, high = np.array(item.low, np.float32)[[0, 2]], np.array(item.high, np.float32)[[0, 2]]
        elif isinstance(item, Ball) and item.centre[1] - item.radii[1] < 0.12:
            low = high = np.array(item.centre, np.float32)[[0, 2]]
        else:
            continue
        away = np.hypot(*np.maximum(np.maximum(low - point, point - high), 0).T)
        light *= 1 - 0.35 * np.exp(-away / 0.12)
    if room.wall is not None:
        edge = np.minimum(room.width - np.abs(point[:, 0]), point[:, 1] + room.depth).clip(0)
        light *= 1 - 0.25 * np.exp(-edge / 0.3)
    return light
