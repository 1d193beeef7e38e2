"""Who an avatar is: an identity drawn from a secret, and the avatar that wears it.

Guarantees: an `Identity` is a function of `(secret, key)` alone. Nothing here ever sees the person who is replaced:
neither their shape, nor their skin, hair or clothes. Whoever lacks the secret cannot tell which identity a key gets.
"""

import dataclasses
import functools
import hashlib
import hmac

import numpy as np
import torch

from anonymize.avatar.body import Body, skin
from anonymize.avatar.pose import Pose
from anonymize.avatar.render import Mesh, vertex_normals

MAX_BETA = 1.5  # shapes beyond this leave what the garments are fitted to
_CELLS = 6  # mesh colours: cells along a face's side

Colour = tuple[float, float, float]

SKINS: tuple[Colour, ...] = (
    (0.96, 0.80, 0.71),
    (0.91, 0.72, 0.60),
    (0.85, 0.64, 0.50),
    (0.76, 0.55, 0.41),
    (0.66, 0.45, 0.32),
    (0.53, 0.35, 0.25),
    (0.42, 0.27, 0.19),
    (0.32, 0.20, 0.15),
)
HAIRS: tuple[Colour, ...] = (
    (0.08, 0.07, 0.07),
    (0.17, 0.11, 0.08),
    (0.30, 0.19, 0.12),
    (0.48, 0.31, 0.17),
    (0.70, 0.54, 0.32),
    (0.52, 0.24, 0.13),
    (0.58, 0.57, 0.56),
)
CLOTHS: tuple[Colour, ...] = (
    (0.90, 0.89, 0.86),
    (0.16, 0.17, 0.19),
    (0.45, 0.47, 0.50),
    (0.13, 0.19, 0.36),
    (0.24, 0.42, 0.66),
    (0.50, 0.68, 0.80),
    (0.62, 0.14, 0.17),
    (0.80, 0.36, 0.30),
    (0.17, 0.38, 0.28),
    (0.47, 0.52, 0.31),
    (0.80, 0.63, 0.22),
    (0.78, 0.70, 0.56),
    (0.42, 0.27, 0.42),
    (0.76, 0.56, 0.64),
    (0.36, 0.25, 0.19),
    (0.15, 0.47, 0.50),
)
DENIMS: tuple[Colour, ...] = ((0.18, 0.24, 0.38), (0.32, 0.42, 0.57), (0.14, 0.15, 0.18), (0.45, 0.40, 0.32))
HAIR_STYLES = ("bald", "cropped", "short", "bob", "long", "bun", "ponytail", "cap")
PATTERNS = ("plain", "stripe", "check", "print")


@dataclasses.dataclass(frozen=True)
class Cloth:
    """A fabric: its ground, a second colour, the pattern that joins them and its repeat in metres."""

    colour: Colour
    second: Colour
    pattern: str
    repeat: float


@dataclasses.dataclass(frozen=True)
class Identity:
    """What an avatar looks like.

    Attributes:
        betas: 10 shape coefficients, each within ±1.5.
        skin, hair, eyes: sRGB colours, 0..1.
        hair_style: one of `HAIR_STYLES`.
        beard: whether the lower face is shaded by one.
        top, bottom, shoes: fabrics; `jacket` is worn open over the top, or None.
        sleeve: where sleeves end, 0 at the shoulder, 1 at the elbow, 2 at the wrist.
        neckline: depth of the neckline in metres.
        skirt: whether the bottom is a skirt rather than trousers.
        leg: where the bottom ends, 0 at the hip, 1 at the knee, 2 at the ankle.
        ease: looseness of the clothes, 0 tight to 1 loose.
    """

    betas: tuple[float, ...]
    skin: Colour
    hair: Colour
    eyes: Colour
    hair_style: str
    beard: bool
    top: Cloth
    jacket: Cloth | None
    bottom: Cloth
    shoes: Cloth
    sleeve: float
    neckline: float
    skirt: bool
    leg: float
    ease: float


def draw_identity(rng: np.random.Generator) -> Identity:
    """An identity drawn from `rng`."""

    def pick(options):
        return options[rng.integers(len(options))]

    def near(colour: Colour, spread: float) -> Colour:
        return tuple(np.clip(np.multiply(colour, rng.uniform(1 - spread, 1 + spread)), 0, 1).tolist())

    def cloth(colours, patterns=(0.5, 0.2, 0.15, 0.15)) -> Cloth:
        colour, second = near(pick(colours), 0.08), pick(CLOTHS)
        while np.abs(np.subtract(colour, second)).sum() < 0.5:
            second = pick(CLOTHS)
        return Cloth(colour, second, rng.choice(PATTERNS, p=patterns).item(), float(rng.uniform(0.035, 0.11)))

    skirt = bool(rng.random() < 0.22)
    hair_style = rng.choice(HAIR_STYLES, p=(0.06, 0.16, 0.24, 0.14, 0.14, 0.09, 0.09, 0.08)).item()
    tone = int(rng.integers(len(SKINS)))
    plain = (1.0, 0.0, 0.0, 0.0)
    return Identity(
        betas=tuple(np.clip(rng.normal(0, 1, 10), -MAX_BETA, MAX_BETA).tolist()),
        skin=near(SKINS[tone], 0.05),
        hair=near(pick(HAIRS if tone < 3 else (*HAIRS[:3], HAIRS[-1])), 0.15),
        eyes=pick(((0.25, 0.15, 0.09), (0.33, 0.22, 0.12), (0.30, 0.42, 0.52), (0.30, 0.38, 0.26))),
        hair_style=hair_style,
        beard=bool(not skirt and hair_style in ("bald", "cropped", "short", "cap") and rng.random() < 0.35),
        top=cloth(CLOTHS),
        jacket=cloth(CLOTHS, plain) if rng.random() < 0.25 else None,
        bottom=cloth(CLOTHS if skirt else DENIMS + CLOTHS[1:4], (0.7, 0.1, 0.1, 0.1) if skirt else plain),
        shoes=cloth(CLOTHS, plain),
        sleeve=float(pick((0.35, 0.55, 0.7, 1.4, 1.93, 1.93))),
        neckline=float(pick((0.0, 0.0, 0.03, 0.09))),
        skirt=skirt,
        leg=float(rng.uniform(0.75, 1.5) if skirt else pick((0.55, 0.85, 1.6, 1.95, 1.95, 1.95, 1.95))),
        ease=float(rng.uniform(0, 1)),
    )


class Wardrobe:
    """Identities by key, from HMAC-SHA256(secret, key).

    Guarantees: equal `(secret, key)` give equal identities on every machine; nothing else enters. The secret is in no
    `repr`, error or log of this class.
    """

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes):
        if len(secret) < 16:
            raise ValueError("a wardrobe's secret: too short, expected 16 bytes or more")
        self._secret = bytes(secret)

    def __repr__(self) -> str:
        return "Wardrobe(secret=...)"

    def identity(self, key: str) -> Identity:
        """The identity of `key`, for instance a track's name within a video."""
        digest = hmac.new(self._secret, key.encode(), hashlib.sha256).digest()
        return draw_identity(np.random.default_rng(np.frombuffer(digest, np.uint32)))


class Avatar:
    """A body that wears an identity. Built once, posed often.

    Garments and short hair are cut out of the body's surface along their hems, so that edges are crisp, and follow it
    at a distance along its normals; skirts and long hair are skinned surfaces of their own. What they cover of the body
    is left out, so nothing pokes through.
    """

    def __init__(self, body: Body, identity: Identity):
        self.body, self.identity = body, identity
        self.betas = torch.tensor(identity.betas, dtype=torch.float32).clamp(-MAX_BETA, MAX_BETA)
        figure = _Figure(body, self.betas)
        layers, loose, hidden = _dress(figure, identity)

        bare = figure.faces[~hidden[figure.faces].all(1)]
        faces, colours = [bare], [_paint(figure.canonical, bare, functools.partial(_skin_paint, figure, identity))]
        count = len(figure.canonical)
        for part in (*layers, *loose):
            faces.append(part.faces + count)
            colours.append(_paint(part.canonical, part.faces, part.paint))
            count += len(part.canonical)

        def tensor(arrays, dtype):
            return torch.from_numpy(np.concatenate(arrays)).to(body.device, dtype)

        self.faces = tensor(faces, torch.int64)
        self.colours = tensor(colours, torch.float32)
        self._from = tensor([np.zeros(0, int), *(layer.start for layer in layers)], torch.int64)
        self._to = tensor([np.zeros(0, int), *(layer.stop for layer in layers)], torch.int64)
        self._along = tensor([np.zeros(0), *(layer.along for layer in layers)], torch.float32)[:, None]
        self._offset = tensor([np.zeros(0), *(layer.offset for layer in layers)], torch.float32)[:, None]
        self._rest = tensor([np.zeros((0, 3)), *(part.canonical for part in loose)], torch.float32)
        self._weights = tensor(
            [np.zeros((0, figure.weights.shape[1])), *(part.weights for part in loose)], torch.float32
        )

    @functools.cached_property
    def skinned(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What shows of the dressed avatar as one skinned surface: (V, 3) in the rest pose, and weights (V, 55).

        `mesh` is the same but for clothes that keep their distance along the posed body's normals.
        """
        own = self.body.weights
        worn = own[self._from].lerp(own[self._to], self._along)
        shown = self.faces.unique()
        rest = self.mesh(Pose.rest(1)).vertices[0]
        return rest[shown], torch.cat([own, worn, self._weights])[shown]

    @torch.no_grad()
    def mesh(self, pose: Pose) -> Mesh:
        """The dressed avatar in every frame of `pose`."""
        posed = self.body(self.betas, pose)
        vertices = posed.vertices
        normals = vertex_normals(vertices, self.body.faces)

        def along(values):
            start = values[:, self._from]
            return start + self._along * (values[:, self._to] - start)

        worn = along(vertices) + self._offset * torch.nn.functional.normalize(along(normals), dim=-1)
        loose = skin(self._rest, self._weights, posed.transforms)
        return Mesh(torch.cat([vertices, worn, loose], 1), self.faces, self.colours)


class _Figure:
    """The rest pose that clothes are cut on: `canonical` is the same for every shape, `shaped` is the identity's."""

    def __init__(self, body: Body, betas: torch.Tensor):
        self.faces = body.faces.cpu().numpy()
        self.weights = body.weights.cpu().numpy().astype(np.float64)
        zero, zero_joints = body.shaped(torch.zeros(10))
        shaped, shaped_joints = body.shaped(betas)
        self.canonical, self.joints = zero.cpu().numpy().astype(np.float64), zero_joints.cpu().numpy().astype(float)
        self.shaped, self.shaped_joints = shaped.cpu().numpy().astype(float), shaped_joints.cpu().numpy().astype(float)
        self.head = self.weights[:, [15, 22, 23, 24]].sum(1)
        self.eyes = self.joints[[23, 24]].mean(0)
        self.pupil_distance = abs(self.joints[23, 0] - self.joints[24, 0])
        head = self.canonical[self.head > 0.5]
        self.crown = head[:, 1].max()
        self.ear = body(torch.zeros(10), Pose.rest(1)).joints[0, 59].cpu().numpy().astype(float)
        self.skull = (head[:, 2].min() + head[:, 2].max()) / 2


@dataclasses.dataclass
class _Layer:
    """A part of the body's surface held off it: vertex k lies `along[k]` of the way from `start[k]` to `stop[k]`."""

    start: np.ndarray
    stop: np.ndarray
    along: np.ndarray
    offset: np.ndarray
    faces: np.ndarray
    canonical: np.ndarray
    paint: object


@dataclasses.dataclass
class _Loose:
    """A skinned surface of its own, given in the identity's rest pose."""

    canonical: np.ndarray
    weights: np.ndarray
    faces: np.ndarray
    paint: object


def _dress(figure: _Figure, who: Identity) -> tuple[list[_Layer], list[_Loose], np.ndarray]:
    """The worn layers, the loose parts, and which of the body's vertices they hide (V,) bool."""
    layers, loose = [], []
    hidden = np.zeros(len(figure.canonical), bool)
    x, y, z = figure.canonical.T
    joints = figure.joints
    body = figure.head < 0.5
    ease = 0.004 + 0.008 * who.ease

    def wear(field, offset, paint, margin=0.012):
        layers.append(_cut(figure, field, np.broadcast_to(offset, x.shape), paint))
        hidden[field > margin] = True

    # Shoes: up to the ankle, on soles.
    ankle = joints[7, 1]
    wear(np.where(body, ankle + 0.012 + 0.25 * (joints[7, 2] - z) - y, -1.0), 0.005, _shoe_paint(figure, who.shoes))

    # Trousers or a skirt.
    hip, knee = joints[1, 1], joints[4, 1]
    waist = joints[3, 1] + 0.01
    hem = np.interp(who.leg, [0, 1, 2], [hip, knee, ankle])
    fabric = functools.partial(_cloth_paint, who.bottom)
    if who.skirt:
        loose.append(_skirt(figure, waist, hem, who.ease, fabric))
        hidden |= (y > hem + 0.05) & (y < waist - 0.02) & (np.abs(x) < 0.3)
    else:
        down = np.clip((hip - y) / (hip - ankle), 0, 1)
        straight = (0.006 + 0.016 * who.ease) * np.sqrt(down)
        wear(np.minimum(waist - y, y - hem), 0.7 * ease + straight, fabric)

    # The top, and a jacket worn open over it.
    shoulder, elbow, wrist = (abs(joints[k, 0]) for k in (16, 18, 20))
    neck = joints[12]

    def collar(depth, radius):
        """> 0 below the neckline, metres."""
        front = np.clip((z - neck[2]) / 0.08, 0, 1.2)
        plane = neck[1] + 0.030 - (0.030 + depth) * front + 5.5 * depth * np.abs(x) - y
        around = np.hypot(x, z - neck[2]) - radius
        return np.logaddexp(plane / 0.008, around / 0.008) * 0.008  # the smooth maximum

    def upper(collar, sleeve, bottom):
        end = np.interp(sleeve, [0, 1, 2], [shoulder, elbow, wrist])
        return np.minimum(np.minimum(collar, end - np.abs(x)), np.where(body, y - bottom, -1.0))

    arm = np.clip((np.abs(x) - shoulder) / (wrist - shoulder), 0, 1)
    hem = waist - 0.06 if who.skirt else hip + 0.01  # tucked into a skirt
    hang = (
        (0.006 + 0.014 * who.ease) * np.exp(-(((y - waist - 0.02) / 0.09) ** 2)) * (np.abs(x) < 0.25) * (not who.skirt)
    )
    loosened = ease + 0.004 + 0.008 * who.ease * arm + hang
    edge = collar(who.neckline, 0.072)
    fitted = loosened * np.clip(0.25 + edge / 0.04, 0, 1)  # clothes lie close at the neck
    wear(upper(edge, who.sleeve, hem), fitted, functools.partial(_cloth_paint, who.top))
    if who.jacket:
        opening = np.where(z > neck[2] - 0.01, np.abs(x) - 0.045 - 0.10 * np.clip(y - joints[9, 1], 0, None), 1.0)
        field = np.minimum(upper(collar(0.0, 0.078), 1.93, waist + 0.015 if who.skirt else hip - 0.02), opening)
        wear(field, fitted + 0.008, functools.partial(_cloth_paint, who.jacket), margin=0.03)

    _hair(figure, who, wear, loose)
    return layers, loose, hidden


def _hair(figure: _Figure, who: Identity, wear, loose: list[_Loose]) -> None:
    """Adds the hair (or cap) of `who`."""
    if who.hair_style == "bald":
        return
    x, y, z = ((figure.canonical - figure.eyes) / figure.pupil_distance).T
    back = figure.skull / figure.pupil_distance - figure.eyes[2] / figure.pupil_distance - z  # > 0 behind the ears
    top = (figure.crown - figure.eyes[1]) / figure.pupil_distance
    paint = functools.partial(_hair_paint, figure, who)
    # The hairline: above the brow in front, around the ears, down to the nape.
    fringe = who.hair_style in ("bob", "long")
    side = np.abs(x)
    front = y - (0.50 if fringe else 0.62) * top + 0.25 * np.clip(side - 0.55, 0, None) + 0.02 * np.sin(23 * x)
    nape = -0.9 if who.hair_style in ("bob", "long", "short", "ponytail", "bun") else -0.5
    rear = np.minimum(y - nape, back - 0.02 + 0.25 * np.clip(y, -1, 1))
    field = np.where(figure.head > 0.3, np.maximum(front, rear), -1.0) * figure.pupil_distance
    if not fringe:  # ears show
        ear = (np.abs(figure.canonical) * [1, 0, 0] + figure.canonical * [0, 1, 1] - figure.ear) / (0.020, 0.036, 0.024)
        field = np.minimum(field, 0.02 * (np.linalg.norm(ear, axis=1) - 1))
    if who.hair_style == "cap":
        wear(field, 0.004, paint)
        field = np.where(figure.head > 0.3, (y - 0.42 * top) * figure.pupil_distance, -1.0)
        wear(field, 0.009, functools.partial(_cloth_paint, who.shoes), margin=0.02)
        loose.append(_brim(figure, who))
        return
    lift = {"cropped": 0.004, "short": 0.011, "bob": 0.018, "long": 0.016, "bun": 0.010, "ponytail": 0.010}
    rise = np.clip(field / 0.05, 0, 1)
    wear(field, 0.003 + lift[who.hair_style] * rise, paint, margin=0.015)
    if who.hair_style in ("bob", "long"):
        loose.append(_curtain(figure, 0.11 if who.hair_style == "bob" else 0.27, paint))
    eyes = figure.shaped_joints[[23, 24]].mean(0)
    if who.hair_style == "bun":
        loose.append(_ball(figure, eyes + np.array([0, 0.055, -0.185]), (0.045, 0.042, 0.040), paint))
    if who.hair_style == "ponytail":
        loose.append(_ball(figure, eyes + np.array([0, -0.055, -0.205]), (0.030, 0.105, 0.030), paint))


def _cut(figure: _Figure, field: np.ndarray, offset: np.ndarray, paint) -> _Layer:
    """The body's surface where `field` (V,) > 0, cut along field = 0, with a rim that runs from the hem to the skin."""
    faces = figure.faces
    inside = field > 0
    count = inside[faces].sum(1)
    whole = faces[count == 3]
    # Turn every cut face so that its odd corner comes first.
    cut = faces[(count == 1) | (count == 2)]
    odd = np.where(inside[cut].sum(1) == 1, inside[cut].argmax(1), (~inside[cut]).argmax(1))
    cut = np.take_along_axis(cut, (odd[:, None] + np.arange(3)) % 3, 1)
    edges = np.concatenate([cut[:, [0, 1]], cut[:, [0, 2]]])
    edges.sort(1)
    edges, which = np.unique(edges, axis=0, return_inverse=True)
    used = np.unique(np.concatenate([faces[count > 0][inside[faces[count > 0]]], np.zeros(0, int)]))
    new = np.full(len(field), -1)
    new[used] = np.arange(len(used))
    p, q = len(used) + which.reshape(2, -1)
    one = inside[cut[:, 0]]
    a, b, c = new[cut].T
    parts = [
        new[whole],
        np.stack([a, p, q], 1)[one],
        np.stack([p, b, c], 1)[~one],
        np.stack([p, c, q], 1)[~one],
    ]
    first, last = np.where(one, p, q), np.where(one, q, p)  # the hem runs first → last along the kept side
    rim = len(edges)
    parts += [np.stack([last, first, first + rim], 1), np.stack([last, first + rim, last + rim], 1)]
    start, stop = (np.concatenate([used, edges[:, k], edges[:, k]]) for k in (0, 1))
    low, high = field[edges[:, 0]], field[edges[:, 1]]
    t = low / (low - high)
    along = np.concatenate([np.zeros(len(used)), t, t])
    height = (1 - along) * offset[start] + along * offset[stop]
    height[len(used) + rim :] = -0.003
    canonical = figure.canonical[start] + along[:, None] * (figure.canonical[stop] - figure.canonical[start])
    return _Layer(start, stop, along, height, np.concatenate(parts), canonical, paint)


def _sheet(rings: np.ndarray, weights: np.ndarray, closed: bool, paint) -> _Loose:
    """A two-sided sheet through `rings` (L, N, 3), top to bottom, counter-clockwise seen from above."""
    levels, around = rings.shape[:2]
    grid = np.arange(levels * around).reshape(levels, around)
    right = np.roll(grid, -1, 1) if closed else grid[:, 1:]
    left = grid if closed else grid[:, :-1]
    a, b, c, d = left[:-1].ravel(), left[1:].ravel(), right[1:].ravel(), right[:-1].ravel()
    outer = np.concatenate([np.stack([a, c, b], 1), np.stack([a, d, c], 1)])
    points = rings.reshape(-1, 3)
    # Turn the faces outward, then add the inner side just beneath.
    centre = rings.mean(1, keepdims=True)
    normal = vertex_normals(torch.from_numpy(points), torch.from_numpy(outer)).numpy()
    if (normal * (rings - centre).reshape(-1, 3)).sum() < 0:
        outer, normal = outer[:, ::-1], -normal
    inner = points - 0.004 * normal
    faces = np.concatenate([outer, outer[:, ::-1] + len(points)])
    return _Loose(np.concatenate([points, inner]), np.concatenate([weights, weights]), faces, paint)


def _skirt(figure: _Figure, waist: float, hem: float, ease: float, paint) -> _Loose:
    """A skirt from `waist` to `hem` (canonical heights), wide enough for the identity's hips."""
    y = figure.canonical[:, 1]
    angles = np.linspace(0, 2 * np.pi, 56, endpoint=False)
    direction = np.stack([np.cos(angles), np.sin(angles)], 1)
    trunk = np.abs(figure.canonical[:, 0]) < 0.3
    rings, reach = [], np.zeros(len(angles))
    levels = np.linspace(waist, hem, 18)
    flare = 0.10 + 0.25 * ease
    for k, level in enumerate(levels):
        points = figure.shaped[trunk & (np.abs(y - level) < 0.03)]
        axis = figure.shaped_joints[0, 2]
        support = (points[:, [0, 2]] - [0, axis]) @ direction.T
        reach = np.maximum(reach + (flare * (levels[0] - levels[1]) if k > 4 else 0), support.max(0) + 0.020)
        ring = reach[:, None] * direction
        height = np.interp(level, np.sort(y[trunk]), np.sort(figure.shaped[trunk, 1]))
        rings.append(np.stack([ring[:, 0], np.full(len(angles), height), ring[:, 1] + axis], 1))
    rings = np.stack(rings)
    down = np.clip((figure.joints[1, 1] + 0.06 - levels) / 0.22, 0, 1)[:, None]
    left = 1 / (1 + np.exp(-rings[..., 0] / 0.045))
    shin = np.clip((figure.joints[4, 1] - levels) / 0.2, 0, 0.8)[:, None]
    weights = np.zeros((*rings.shape[:2], figure.weights.shape[1]))
    weights[..., 0] = 1 - 0.9 * down
    weights[..., 1], weights[..., 2] = 0.9 * down * left * (1 - shin), 0.9 * down * (1 - left) * (1 - shin)
    weights[..., 4], weights[..., 5] = 0.9 * down * left * shin, 0.9 * down * (1 - left) * shin
    return _sheet(rings, weights.reshape(-1, weights.shape[-1]), True, paint)


def _curtain(figure: _Figure, length: float, paint) -> _Loose:
    """Hair that falls from above the ears, around the back of the head, over `length` metres."""
    eyes = figure.shaped_joints[[23, 24]].mean(0)
    head = figure.shaped[figure.head > 0.5]
    middle = (head[:, 2].min() + head[:, 2].max()) / 2
    angles = np.linspace(np.radians(-12), np.radians(192), 40)  # around the back, 90° straight behind
    direction = np.stack([np.cos(angles), -np.sin(angles)], 1)
    rings = []
    drops = np.linspace(0.055, -length, 16)
    reach = np.zeros(len(angles))
    for drop in drops:
        slab = head[np.abs(head[:, 1] - eyes[1] - max(drop, -0.03)) < 0.02]
        support = ((slab[:, [0, 2]] - [0, middle]) @ direction.T).max(0)
        reach = np.maximum(reach, support + np.interp(drop, [-0.03, 0.055], [0.018, 0.002]))
        fall = max(-drop - 0.05, 0)
        wide = reach + 0.10 * fall * np.abs(np.cos(angles))
        ring = wide[:, None] * direction
        rings.append(np.stack([ring[:, 0], np.full(len(angles), eyes[1] + drop), ring[:, 1] + middle - 0.12 * fall], 1))
    rings = np.stack(rings)
    low = np.clip((-drops - 0.06) / 0.2, 0, 0.8)[:, None] * np.ones(len(angles))
    weights = np.zeros((*rings.shape[:2], figure.weights.shape[1]))
    weights[..., 15], weights[..., 12], weights[..., 9] = 1 - low, 0.4 * low, 0.6 * low
    return _sheet(rings, weights.reshape(-1, weights.shape[-1]), False, paint)


def _ball(figure: _Figure, centre: np.ndarray, radii, paint) -> _Loose:
    """An ellipsoid that moves with the head."""
    polar = np.linspace(0.02, np.pi - 0.02, 12)[:, None]
    turn = np.linspace(0, 2 * np.pi, 18, endpoint=False)
    unit = np.stack([np.sin(polar) * np.cos(turn), np.cos(polar) + 0 * turn, np.sin(polar) * np.sin(turn)], -1)
    weights = np.zeros((unit.shape[0] * unit.shape[1], figure.weights.shape[1]))
    weights[:, 15] = 1
    return _sheet(centre + unit * radii, weights, True, paint)


def _brim(figure: _Figure, who: Identity) -> _Loose:
    """The visor of a cap."""
    eyes = figure.shaped_joints[[23, 24]].mean(0)
    head = figure.shaped[figure.head > 0.5]
    level = eyes[1] + 0.43 * (figure.crown - figure.eyes[1])
    slab = head[np.abs(head[:, 1] - level) < 0.02]
    angles = np.linspace(np.radians(35), np.radians(145), 24)
    direction = np.stack([np.cos(angles), np.sin(angles)], 1)
    middle = (head[:, 2].min() + head[:, 2].max()) / 2
    reach = ((slab[:, [0, 2]] - [0, middle]) @ direction.T).max(0)
    rings = []
    ends = np.sqrt(np.clip(1 - (np.cos(angles) / np.cos(angles[0])) ** 2, 0, 1))
    for out in (-0.01, 0.015, 0.035, 0.055):
        ring = (reach + 0.004 + out * ends)[:, None] * direction
        drop = level - 0.30 * out - 0.012 * np.cos(angles) ** 2
        rings.append(np.stack([ring[:, 0], drop, ring[:, 1] + middle], 1))
    rings = np.stack(rings)
    weights = np.zeros((rings.shape[0] * rings.shape[1], figure.weights.shape[1]))
    weights[:, 15] = 1
    return _sheet(rings, weights, False, functools.partial(_cloth_paint, who.shoes))


def _paint(points: np.ndarray, faces: np.ndarray, paint) -> np.ndarray:
    """Mesh colours (F, R, R, 3) of `paint`, a function from points (N, 3) in the canonical rest pose to colours."""
    i, j = np.nonzero(np.add.outer(np.arange(_CELLS), np.arange(_CELLS)) < _CELLS)  # the others lie outside the face
    second, third = (i + 0.5) / _CELLS, (j + 0.5) / _CELLS
    where = np.einsum("nk,fkc->fnc", np.stack([1 - second - third, second, third], 1), points[faces])
    colours = np.zeros((len(faces), _CELLS, _CELLS, 3), np.float32)
    colours[:, i, j] = np.clip(paint(where.reshape(-1, 3)), 0, 1).reshape(where.shape)
    return colours


def _ramp(value: np.ndarray, width: float) -> np.ndarray:
    """0 below 0, 1 above `width`, smooth between."""
    t = np.clip(value / width, 0, 1)
    return (t * t * (3 - 2 * t))[:, None]


def _mix(under: np.ndarray, over, amount: np.ndarray) -> np.ndarray:
    return under + amount * (np.asarray(over) - under)


def _skin_paint(figure: _Figure, who: Identity, points: np.ndarray) -> np.ndarray:
    colour = np.broadcast_to(who.skin, points.shape)
    x, y, z = ((points - figure.eyes) / figure.pupil_distance).T
    face = _ramp(z - (figure.skull - figure.eyes[2]) / figure.pupil_distance - 0.25, 0.1) * _ramp(1.9 - np.abs(y), 0.1)
    side = np.abs(x)
    warm = np.multiply(who.skin, (1.02, 0.84, 0.82))
    colour = _mix(colour, warm, 0.6 * face * _ramp(0.55 - np.hypot(side - 0.55, y + 0.62), 0.45))
    if who.beard:
        jaw = _ramp(-0.78 - y + 0.30 * side, 0.18) * _ramp(y + 1.95, 0.25)
        colour = _mix(colour, np.multiply(who.hair, 0.8), 0.75 * face * jaw)
    # Lips, brows, eyes: white, iris, pupil, lash line.
    mouth = np.abs(x) / 0.40
    lips = _ramp(0.095 * (1 - mouth**2) - np.abs(y + 1.08), 0.03)
    colour = _mix(colour, np.multiply(who.skin, (0.86, 0.56, 0.56)), face * lips)
    colour = _mix(
        colour,
        np.multiply(who.skin, 0.35),
        face * _ramp(0.016 - np.abs(y + 1.08 + 0.03 * mouth**2), 0.016) * _ramp(0.42 - np.abs(x), 0.05),
    )
    arch = 0.33 + 0.09 * np.cos((side - 0.45) * 4.2)
    brow = _ramp(0.055 - np.abs(y - arch) - 0.04 * np.clip(side - 0.5, 0, None), 0.02) * _ramp(
        0.31 - np.abs(side - 0.5), 0.05
    )
    colour = _mix(
        colour,
        np.multiply(who.hair, 0.85) if who.hair_style != "bald" else np.multiply(who.skin, 0.45),
        0.9 * face * brow,
    )
    u, v = (side - 0.5) / 0.225, (y + 0.01) / 0.095
    lid = 1 - u * u
    white = _ramp(lid - np.abs(v), 0.12)
    colour = _mix(colour, np.multiply(who.skin, 0.30), face * _ramp(lid + 0.28 - np.abs(v), 0.1) * _ramp(v + 0.1, 0.5))
    colour = _mix(colour, (0.86, 0.85, 0.83), face * white)
    iris = np.hypot(side - 0.5, y)
    colour = _mix(colour, who.eyes, face * white * _ramp(0.100 - iris, 0.02))
    return _mix(colour, (0.03, 0.03, 0.03), face * white * _ramp(0.05 - iris, 0.02))


def _hair_paint(figure: _Figure, who: Identity, points: np.ndarray) -> np.ndarray:
    x, y, z = (points - figure.eyes).T
    turn = np.arctan2(x, z - figure.skull + figure.eyes[2])  # strands fall from the crown
    strand = np.sin(46 * turn + 0.8 * np.sin(35 * y)) + np.sin(79 * turn + np.sin(23 * y + 1))
    return np.asarray(who.hair) * (1 + 0.09 * strand[:, None])


def _shoe_paint(figure: _Figure, cloth: Cloth):
    ground = figure.canonical[:, 1].min()

    def paint(points: np.ndarray) -> np.ndarray:
        return _mix(_cloth_paint(cloth, points), (0.85, 0.84, 0.82), _ramp(ground + 0.018 - points[:, 1], 0.002))

    return paint


def _cloth_paint(cloth: Cloth, points: np.ndarray) -> np.ndarray:
    x, y, z = points.T
    arm = (np.abs(x) > 0.25) & (y > -0.15)
    along = np.where(arm, np.abs(x), y)  # down the trunk or legs, out along the arms of the rest pose
    around = np.where(arm, y, x)
    period = cloth.repeat
    if cloth.pattern == "stripe":
        second = _ramp(np.abs((along / period) % 1 - 0.5) - 0.28, 0.03)
    elif cloth.pattern == "check":
        second = 0.4 * _ramp(np.abs((along / period) % 1 - 0.5) - 0.26, 0.03)
        second = second + 0.4 * _ramp(np.abs((around / period) % 1 - 0.5) - 0.26, 0.03)
    elif cloth.pattern == "print":
        badge = np.maximum(np.abs(x) - 1.2 * period, np.abs(y + 0.04) - 0.8 * period)
        second = _ramp(-badge, 0.004) * (z > 0)[:, None]
    else:
        second = np.zeros((len(points), 1))
    fold = np.sin(19 * along + 2.5 * np.sin(14 * around + 9 * z)) * np.sin(11 * around + 16 * z + 2 * np.sin(9 * along))
    return _mix(np.broadcast_to(cloth.colour, points.shape), cloth.second, second) * (1 + 0.06 * fold[:, None])
