"""Makes the embedded body: `python -m anonymize.make.body --out FILE` (needs the `[body]` extras).

An SMPL-X *format* model that owes nothing to the licensed one: a figure of average adult proportions is modelled as
smoothly blended solids, its surface is triangulated and simplified to SMPL-X's number of vertices, and skinning
weights, joint regressor, shape and expression directions are computed from the solids. The vertices smplx addresses
by number (nose, eyes, ears, toes, heels, finger tips) are put at those numbers. Equal inputs give equal arrays.

Build space: metres, y up from the floor, z forward, x to the figure's left; a T-pose with the palms down.
"""
# ruff: noqa: RUF005 (arrays are added here, not lists)

import argparse
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Sequence

import fast_simplification
import numpy as np
import scipy.interpolate
import scipy.optimize
import scipy.sparse
import scipy.sparse.linalg
import scipy.spatial
import trimesh
from skimage.measure import marching_cubes
from smplx.vertex_ids import vertex_ids

from anonymize.avatar.body import JOINTS, VERTICES
from maskdp import atomic, progress

PARENTS = np.array(
    [-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 15, 15, 15]
    + [20, 25, 26, 20, 28, 29, 20, 31, 32, 20, 34, 35, 20, 37, 38]
    + [21, 40, 41, 21, 43, 44, 21, 46, 47, 21, 49, 50, 21, 52, 53]
)
ORIGIN_HEIGHT = 1.295  # the model's origin above the floor: near SMPL-X's, whose pelvis is 0.35 m below the origin
HAND = {1: 25, -1: 40}  # first hand joint of either side; fingers in SMPL-X order
FINGERS = ("index", "middle", "pinky", "ring", "thumb")
MIRROR = np.array([-1.0, 1.0, 1.0])


# ---------------------------------------------------------------------------------------------------- solids


@dataclasses.dataclass(frozen=True)
class Cone:
    """A cone with round ends of radii `ra` at `a` and `rb` at `b`."""

    a: np.ndarray
    b: np.ndarray
    ra: float
    rb: float
    bone: int

    def distance(self, p: np.ndarray) -> np.ndarray:
        axis = self.b - self.a
        t = np.clip((p - self.a) @ axis / (axis @ axis), 0, 1)
        return np.linalg.norm(p - self.a - t[..., None] * axis, axis=-1) - (self.ra + (self.rb - self.ra) * t)


@dataclasses.dataclass(frozen=True)
class Ellipsoid:
    """An ellipsoid, turned by `tilt` radians about the x axis; its distance is a first-order estimate."""

    centre: np.ndarray
    radii: np.ndarray
    bone: int
    tilt: float = 0.0

    def distance(self, p: np.ndarray) -> np.ndarray:
        p = p - self.centre
        if self.tilt:
            c, s = np.cos(self.tilt), np.sin(self.tilt)
            p = np.stack([p[..., 0], c * p[..., 1] + s * p[..., 2], c * p[..., 2] - s * p[..., 1]], -1)
        near = np.linalg.norm(p / self.radii, axis=-1)
        return near * (near - 1) / (np.linalg.norm(p / self.radii**2, axis=-1) + 1e-9)


@dataclasses.dataclass(frozen=True)
class Trunk:
    """The trunk: ellipses stacked by height. `profile` rows: height, half width, half depth, centre z."""

    profile: np.ndarray
    bone: int

    @functools.cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        heights = np.linspace(self.profile[0, 0], self.profile[-1, 0], 1000)
        return heights, scipy.interpolate.PchipInterpolator(self.profile[:, 0], self.profile[:, 1:])(heights).T

    def distance(self, p: np.ndarray) -> np.ndarray:
        low, high = self.profile[0, 0], self.profile[-1, 0]
        y = np.clip(p[..., 1], low, high)
        heights, sizes = self._table
        width, depth, centre = (np.interp(y, heights, column) for column in sizes)
        x, z = p[..., 0], p[..., 2] - centre
        near = np.hypot(x / width, z / depth)
        aside = near * (near - 1) / (np.hypot(x / width**2, z / depth**2) + 1e-9)
        beyond = np.abs(p[..., 1] - y)
        return np.where(beyond > 0, np.hypot(beyond, np.maximum(aside, 0)), aside)


@dataclasses.dataclass(frozen=True)
class Blend:
    """The smooth union (quadratic, Quilez) of `parts` with blending radius `k`; k = 0 is the plain union."""

    k: float
    parts: Sequence["Solid"]

    def distance(self, p: np.ndarray) -> np.ndarray:
        total = self.parts[0].distance(p)
        for part in self.parts[1:]:
            total = _smooth_minimum(total, part.distance(p), self.k)
        return total


@dataclasses.dataclass(frozen=True)
class Carve:
    """`base` without `tool`, with the edge rounded by `k`."""

    k: float
    base: "Solid"
    tool: "Solid"

    def distance(self, p: np.ndarray) -> np.ndarray:
        return -_smooth_minimum(-self.base.distance(p), self.tool.distance(p), self.k)


Solid = Cone | Ellipsoid | Trunk | Blend | Carve


def _smooth_minimum(a: np.ndarray, b: np.ndarray, k: float) -> np.ndarray:
    if k == 0:
        return np.minimum(a, b)
    h = np.maximum(k - np.abs(a - b), 0) / k
    return np.minimum(a, b) - h * h * k / 4


def primitives(solid: Solid) -> list[Solid]:
    """The leaves that add matter."""
    if isinstance(solid, Blend):
        return [leaf for part in solid.parts for leaf in primitives(part)]
    return primitives(solid.base) if isinstance(solid, Carve) else [solid]


def prune(solid: Solid, centre: np.ndarray, reach: float) -> Solid | None:
    """`solid` without the parts farther than `reach` from `centre`."""
    if isinstance(solid, Blend):
        parts = [part for part in (prune(part, centre, reach) for part in solid.parts) if part is not None]
        return None if not parts else parts[0] if len(parts) == 1 else Blend(solid.k, parts)
    if isinstance(solid, Carve):
        base = prune(solid.base, centre, reach)
        tool = None if base is None else prune(solid.tool, centre, reach)
        return base if tool is None else Carve(solid.k, base, tool)
    return solid if solid.distance(centre[None])[0] < reach else None


# ---------------------------------------------------------------------------------------------------- the figure


def skeleton() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Joints (55, 3) in build space, and the points on the skin that smplx addresses by name."""
    joints = np.zeros((JOINTS, 3))
    joints[[0, 3, 6, 9, 12, 15, 22]] = [
        (0, 0.945, 0.0),
        (0, 1.045, -0.012),
        (0, 1.165, -0.015),
        (0, 1.255, -0.005),
        (0, 1.445, -0.025),
        (0, 1.535, -0.005),
        (0, 1.590, 0.010),
    ]
    points = {"nose": np.array([0, 1.583, 0.117])}
    for side, l in ((1, 0), (-1, 1)):
        mirror = np.array([side, 1, 1])
        arm = {1: (0.085, 0.890, 0.0), 4: (0.095, 0.485, 0.006), 7: (0.100, 0.085, -0.030), 10: (0.113, 0.022, 0.085)}
        arm |= {13: (0.06, 1.395, -0.012), 16: (0.170, 1.405, -0.022), 18: (0.435, 1.405, -0.030)}
        arm |= {20: (0.685, 1.405, -0.022), 23: (0.0315, 1.622, 0.0725)}
        for joint, where in arm.items():
            joints[joint + l] = where * mirror
        wrist, first, letter = joints[20 + l], HAND[side], "lr"[l]
        # Finger: knuckle, and the vectors of its three phalanges.
        fingers = {
            0: ((0.092, 0.003, 0.027), (0.043, 0.026, 0.022), 0.16),
            1: ((0.096, 0.006, 0.004), (0.048, 0.030, 0.024), 0.03),
            2: ((0.080, -0.003, -0.040), (0.034, 0.021, 0.019), -0.26),
            3: ((0.090, 0.003, -0.019), (0.044, 0.028, 0.023), -0.10),
        }
        for finger, (knuckle, lengths, spread) in fingers.items():
            along = np.array([np.cos(spread), -0.05, np.sin(spread)])
            at = np.array(knuckle)
            for phalanx, length in enumerate(lengths):
                joints[first + 3 * finger + phalanx] = wrist + at * mirror
                at = at + length * along
            points[letter + FINGERS[finger]] = wrist + at * mirror
        thumb = [(0.020, -0.010, 0.024), (0.056, -0.018, 0.050), (0.085, -0.022, 0.067), (0.112, -0.025, 0.080)]
        for phalanx, at in enumerate(thumb[:3]):
            joints[first + 12 + phalanx] = wrist + np.array(at) * mirror
        points[letter + "thumb"] = wrist + np.array(thumb[3]) * mirror
        points[letter + "eye"] = joints[23 + l] + [0, 0, 0.013]
        points[letter + "ear"] = np.array([side * 0.088, 1.612, -0.012])
        toe, heel = joints[10 + l], joints[7 + l]
        points["LR"[l] + "BigToe"] = toe + np.array([-side * 0.018, -0.005, 0.080])
        points["LR"[l] + "SmallToe"] = toe + np.array([side * 0.034, -0.008, 0.052])
        points["LR"[l] + "Heel"] = heel + np.array([0, -0.060, -0.050])
    return joints, points


def _ellipsoid(centre, radii, bone: int, tilt: float = 0.0) -> Ellipsoid:
    return Ellipsoid(np.asarray(centre, float), np.asarray(radii, float), bone, tilt)


def _hand(joints: np.ndarray, tips: dict[str, np.ndarray], side: int) -> Solid:
    wrist, first, bone, letter = (
        joints[20 if side > 0 else 21],
        HAND[side],
        20 if side > 0 else 21,
        "l" if side > 0 else "r",
    )

    def at(x, y, z):
        return wrist + np.array([side * x, y, z])

    radii = {0: (0.0098, 0.0085, 0.0078, 0.0066), 1: (0.0100, 0.0087, 0.0080, 0.0067)}
    radii |= {2: (0.0083, 0.0072, 0.0066, 0.0056), 3: (0.0095, 0.0083, 0.0076, 0.0064)}
    palm = [_ellipsoid(at(0.004, 0, 0), (0.026, 0.0195, 0.027), bone)]
    palm += [
        Cone(at(0.018, -0.002, 0.55 * (joints[first + 3 * f] - wrist)[2]), joints[first + 3 * f], 0.0135, 0.0115, bone)
        for f in range(4)
    ]
    palm += [
        _ellipsoid(at(0.046, -0.008, 0.027), (0.034, 0.0140, 0.016), bone),  # ball of the thumb
        _ellipsoid(at(0.048, -0.007, -0.026), (0.036, 0.0125, 0.013), bone),
    ]
    palm = Blend(0.012, palm)
    branches = []
    for finger in range(4):
        chain = [*joints[first + 3 * finger : first + 3 * finger + 3], tips[letter + FINGERS[finger]]]
        r = radii[finger]
        chain[3] = chain[3] - (chain[3] - chain[2]) / np.linalg.norm(chain[3] - chain[2]) * r[3]
        phalanges = [Cone(chain[k], chain[k + 1], r[k], r[k + 1], first + 3 * finger + k) for k in range(3)]
        branches.append(Blend(0.008, [palm, Blend(0.003, phalanges)]))
    chain, r = [*joints[first + 12 : first + 15], tips[letter + "thumb"]], (0.0140, 0.0112, 0.0102, 0.0078)
    chain[3] = chain[3] - (chain[3] - chain[2]) / np.linalg.norm(chain[3] - chain[2]) * r[3]
    thumb = Blend(0.004, [Cone(chain[k], chain[k + 1], r[k], r[k + 1], first + 12 + k) for k in range(3)])
    return Blend(0, [*branches, Blend(0.012, [palm, thumb])])


def _head(joints: np.ndarray) -> Solid:
    head, jaw = 15, 22
    solids: list[Solid] = [
        _ellipsoid((0, 1.648, -0.014), (0.0765, 0.086, 0.097), head),  # cranium
        _ellipsoid((0, 1.632, 0.026), (0.064, 0.078, 0.064), head),  # forehead and middle face
        _ellipsoid((0, 1.570, 0.040), (0.050, 0.058, 0.050), head),  # lower face
        _ellipsoid((0, 1.580, 0.060), (0.036, 0.030, 0.033), head),  # upper jaw
    ]
    fine: list[Solid] = []
    for side in (1, -1):
        solids += [
            _ellipsoid((side * 0.043, 1.600, 0.053), (0.024, 0.019, 0.025), head),  # cheek bone
            _ellipsoid((side * 0.036, 1.572, 0.044), (0.027, 0.034, 0.033), head),  # cheek
            Cone(np.array([side * 0.053, 1.578, 0.004]), np.array([side * 0.018, 1.524, 0.066]), 0.015, 0.013, jaw),
        ]
        fine += [
            Cone(np.array([side * 0.014, 1.641, 0.083]), np.array([side * 0.044, 1.640, 0.066]), 0.0075, 0.007, head),
            _ellipsoid((side * 0.0110, 1.5785, 0.0960), (0.0075, 0.0065, 0.0095), head),  # wing of the nose
        ]
    solids.append(_ellipsoid((0, 1.523, 0.076), (0.022, 0.016, 0.016), jaw))  # chin
    skull = Blend(0.022, solids)
    nose = [
        Cone(np.array([0, 1.626, 0.083]), np.array([0, 1.590, 0.1030]), 0.0068, 0.0085, head),
        _ellipsoid((0, 1.5835, 0.1045), (0.0105, 0.009, 0.0115), head),
    ]
    face: Solid = Blend(0.010, [skull, *nose, *fine])
    lips = [
        _ellipsoid((0, 1.5550, 0.0870), (0.0235, 0.0050, 0.0085), head),
        _ellipsoid((0, 1.5455, 0.0860), (0.0205, 0.0058, 0.0085), jaw),
    ]
    face = Blend(0.0045, [face, *lips])
    for side in (1, -1):
        face = Carve(0.012, face, _ellipsoid((side * 0.0325, 1.6222, 0.0975), (0.0175, 0.0095, 0.0140), head))
    eyes = [_ellipsoid(joints[23 + l], (0.0130,) * 3, 23 + l) for l in (0, 1)]
    ears = []
    for side in (1, -1):
        ear = _ellipsoid((side * 0.079, 1.612, -0.010), (0.0085, 0.031, 0.0175), head, tilt=-0.18)
        ears.append(
            Carve(0.004, ear, _ellipsoid((side * 0.089, 1.614, -0.003), (0.0065, 0.019, 0.009), head, tilt=-0.18))
        )
    return Blend(0.003, [face, *eyes, *ears])


def figure(joints: np.ndarray, tips: dict[str, np.ndarray]) -> Solid:
    """The whole body as one solid."""
    profile = np.array(
        [
            (0.810, 0.080, 0.060, -0.008),
            (0.845, 0.140, 0.092, -0.010),
            (0.910, 0.169, 0.106, -0.012),
            (0.980, 0.158, 0.103, -0.006),
            (1.050, 0.141, 0.096, 0.000),
            (1.110, 0.134, 0.094, 0.002),
            (1.190, 0.142, 0.100, 0.002),
            (1.280, 0.158, 0.110, -0.002),
            (1.345, 0.162, 0.104, -0.010),
            (1.400, 0.130, 0.084, -0.018),
            (1.440, 0.085, 0.064, -0.022),
            (1.465, 0.055, 0.052, -0.024),
        ]
    )
    trunk: list[Solid] = [
        Trunk(profile, 0),
        Cone(np.array([0, 1.40, -0.030]), np.array([0, 1.560, -0.010]), 0.058, 0.049, 12),
    ]
    branches: list[Solid] = []
    for side, l in ((1, 0), (-1, 1)):

        def mirrored(x, y, z, side=side):
            return np.array([side * x, y, z])

        trunk += [
            _ellipsoid(mirrored(0.075, 0.905, -0.060), (0.078, 0.085, 0.066), 0),  # buttock
            _ellipsoid(mirrored(0.078, 1.318, 0.070), (0.070, 0.050, 0.028), 9),  # chest
            _ellipsoid(mirrored(0.085, 1.320, -0.082), (0.062, 0.080, 0.026), 9),  # shoulder blade
            Cone(mirrored(0.030, 1.495, -0.032), mirrored(0.150, 1.432, -0.026), 0.030, 0.026, 13 + l),  # trapezius
            Cone(mirrored(0.060, 1.385, -0.015), mirrored(0.155, 1.395, -0.020), 0.050, 0.050, 13 + l),
        ]
        hip, knee, ankle, toe = joints[[1 + l, 4 + l, 7 + l, 10 + l]]
        leg = Blend(
            0.018,
            [
                Cone(hip + [0, -0.01, 0], knee + [0, 0.01, 0.004], 0.086, 0.051, 1 + l),
                _ellipsoid(hip + [side * 0.012, -0.14, 0.016], (0.076, 0.17, 0.078), 1 + l),
                Cone(knee, ankle + [0, 0.02, 0], 0.049, 0.035, 4 + l),
                _ellipsoid(knee + [0, -0.125, -0.026], (0.050, 0.115, 0.046), 4 + l),  # calf
                _ellipsoid(knee + [0, 0.002, 0.020], (0.040, 0.048, 0.036), 4 + l),  # knee cap
            ],
        )
        foot = Blend(
            0.022,
            [
                _ellipsoid(ankle + [0, -0.042, -0.022], (0.033, 0.040, 0.034), 7 + l),  # heel
                Cone(ankle + [0, -0.010, 0.004], toe + [0, 0.010, -0.012], 0.036, 0.025, 7 + l),
                Cone(ankle + [0, -0.058, -0.010], toe + [side * 0.010, -0.006, 0.0], 0.026, 0.022, 7 + l),
                _ellipsoid(toe + [side * 0.002, -0.002, 0.028], (0.044, 0.018, 0.054), 10 + l),
            ],
        )
        branches.append(Blend(0.02, [leg, foot]))
        shoulder, elbow, wrist = joints[[16 + l, 18 + l, 20 + l]]
        arm = Blend(
            0.016,
            [
                _ellipsoid(shoulder + mirrored(0.012, 0.0, 0.0), (0.068, 0.056, 0.054), 16 + l),  # deltoid
                Cone(shoulder, elbow, 0.046, 0.037, 16 + l),
                _ellipsoid(shoulder + mirrored(0.145, -0.002, 0.006), (0.085, 0.044, 0.044), 16 + l),  # biceps
                Cone(elbow, wrist, 0.037, 0.025, 18 + l),
                _ellipsoid(elbow + mirrored(0.070, 0.0, 0.002), (0.085, 0.040, 0.043), 18 + l),
            ],
        )
        branches.append(Blend(0.014, [arm, _hand(joints, tips, side)]))
    trunk = Blend(0.045, trunk)
    neck_up = Blend(0.020, [trunk, _head(joints)])
    return Blend(0, [neck_up, *(Blend(0.040, [trunk, branch]) for branch in branches)])


# ---------------------------------------------------------------------------------------------------- the surface


def _axis(*pieces: tuple[float, float]) -> np.ndarray:
    """Grid coordinates from (end, step) pieces; the first piece is (start, 0)."""
    values = [np.array([pieces[0][0]])]
    for (start, _), (end, step) in itertools.pairwise(pieces):
        values.append(np.linspace(start, end, max(2, round((end - start) / step) + 1))[1:])
    return np.concatenate(values)


def triangulate(solid: Solid) -> tuple[np.ndarray, np.ndarray]:
    """The surface of `solid` on a grid that is finer at the head and the hands: vertices, faces (outward)."""
    half = ((0.0, 0), (0.096, 0.0024), (0.66, 0.006), (0.93, 0.0021))
    x = _axis(*half)
    x = np.concatenate([-x[:0:-1], x])
    y = _axis((-0.03, 0), (1.355, 0.006), (1.450, 0.0022), (1.50, 0.005), (1.76, 0.0022))
    z = _axis((-0.175, 0), (-0.085, 0.005), (0.125, 0.0022), (0.205, 0.005))
    volume = np.full((len(x), len(y), len(z)), 1, np.float32)

    def fill(part: Solid, starts: tuple[int, ...], size: int) -> None:
        """An octree: boxes wholly inside or outside get their sign only."""
        box = tuple(slice(start, start + size) for start in starts)
        grid = [axis[cut] for axis, cut in zip((x, y, z), box)]
        if not all(map(len, grid)):
            return
        low, high = np.array([[axis[0], axis[-1]] for axis in grid]).T
        centre, reach = (low + high) / 2, np.linalg.norm(high - low) / 2
        part = prune(part, centre, reach + 0.05)
        if part is None:
            return
        if size <= 8:
            volume[box] = part.distance(np.stack(np.meshgrid(*grid, indexing="ij"), -1))
        elif part.distance(centre[None])[0] < -2 * reach - 0.02:
            volume[box] = -1
        else:
            for corner in np.ndindex(2, 2, 2):
                fill(part, tuple(start + bit * size // 2 for start, bit in zip(starts, corner)), size // 2)

    corners = list(itertools.product(*(range(0, count, 64) for count in volume.shape)))
    with progress.bar("solids", len(corners), "boxes") as advance:
        for corner in corners:
            fill(solid, corner, 64)
            advance()
    vertices, faces, _, _ = marching_cubes(volume, 0.0, gradient_direction="ascent")
    vertices = np.stack([np.interp(v, np.arange(len(a)), a) for v, a in zip(vertices.T, (x, y, z))], -1)
    mesh = trimesh.Trimesh(vertices, faces, process=True)
    mesh = max(mesh.split(only_watertight=False), key=lambda part: len(part.vertices))
    if mesh.volume < 0:
        mesh.invert()
    return np.asarray(mesh.vertices), np.asarray(mesh.faces)


def _stretch(points: np.ndarray, back: bool = False) -> np.ndarray:
    """Enlarges hands and head (or undoes it), so that simplification leaves them more vertices."""
    out = points.copy()
    grid = np.linspace(0, 3, 6001)
    for axis, start, full, factor, centre in (
        (0, 0.63, 0.70, 2.6, (0, 1.40, -0.02)),
        (1, 1.48, 1.55, 2.7, (0, 0, 0.0)),
    ):
        scale = 1 + (factor - 1) * np.clip((grid - start) / (full - start), 0, 1)
        moved = np.concatenate([[0], np.cumsum((scale[1:] + scale[:-1]) / 2 * np.diff(grid))])
        value = np.abs(points[:, axis])
        if axis == 1:
            value = np.where(np.abs(points[:, 0]) < 0.3, value, 0)
        source = np.interp(value, moved, grid) if back else value
        factor = np.interp(source, grid, scale)
        target = source if back else np.interp(value, grid, moved)
        for other in range(3):
            if other != axis:
                shift = (points[:, other] - centre[other]) * (1 / factor - 1 if back else factor - 1)
                out[:, other] += np.where(value > 0, shift, 0)
        out[:, axis] = np.where(value > 0, np.sign(points[:, axis]) * target, out[:, axis])
    return out


def simplify(vertices: np.ndarray, faces: np.ndarray, solid: Solid) -> tuple[np.ndarray, np.ndarray]:
    """A closed mesh of exactly 10,475 vertices on the surface of `solid`."""
    few, small = fast_simplification.simplify(
        _stretch(vertices).astype(np.float32), faces.astype(np.int32), target_count=2 * VERTICES - 4, agg=4
    )
    mesh = trimesh.Trimesh(_stretch(few.astype(float), back=True), small, process=True)
    mesh.update_faces(mesh.nondegenerate_faces())
    mesh.remove_unreferenced_vertices()
    points, faces = np.array(mesh.vertices), np.array(mesh.faces)
    if not mesh.is_watertight or len(points) > VERTICES:
        raise RuntimeError(f"simplification gave {len(points)} vertices, watertight: {mesh.is_watertight}")
    while len(points) < VERTICES:  # split the longest edge
        edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), 1)
        a, b = edges[np.linalg.norm(points[edges[:, 0]] - points[edges[:, 1]], axis=1).argmax()]
        points = np.vstack([points, (points[a] + points[b]) / 2])
        both = (faces == a).any(1) & (faces == b).any(1)
        new = len(points) - 1
        halves = [np.where(faces[both] == old, new, faces[both]) for old in (a, b)]
        faces = np.concatenate([faces[~both], *halves])
    # Even the triangles out along the surface, and put them back on it.
    for step in range(4):
        if step < 3:
            mean = _adjacency(faces) @ points
            normal = _gradient(solid, points)
            normal /= np.linalg.norm(normal, axis=1, keepdims=True)
            move = mean - points
            points = points + 0.35 * (move - (move * normal).sum(1, keepdims=True) * normal)
        gradient = _gradient(solid, points)
        square = np.maximum((gradient**2).sum(1), 0.25)
        points = points - np.clip(solid.distance(points) / square, -0.004, 0.004)[:, None] * gradient
    return points, faces


def _gradient(solid: Solid, points: np.ndarray) -> np.ndarray:
    step = 5e-4 * np.eye(3)
    return np.stack([(solid.distance(points + s) - solid.distance(points - s)) / 1e-3 for s in step], -1)


def _adjacency(faces: np.ndarray) -> scipy.sparse.csr_matrix:
    """Row-normalised adjacency (V, V)."""
    rows, columns = faces.ravel(), np.roll(faces, 1, 1).ravel()
    ones = scipy.sparse.coo_matrix((np.ones(len(rows)), (rows, columns)), (VERTICES, VERTICES))
    both = ((ones + ones.T) > 0).astype(float)
    return scipy.sparse.diags(1 / np.asarray(both.sum(1)).ravel()) @ both.tocsr()


def number(points: np.ndarray, faces: np.ndarray, named: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Renumbers the vertices so that those smplx addresses by number lie where their names say."""
    tree = scipy.spatial.cKDTree(points)
    order = np.arange(VERTICES)  # order[new] = old
    for name, where in named.items():
        old, new = int(tree.query(where)[1]), vertex_ids["smplx"][name]
        at = int(np.flatnonzero(order == old)[0])
        order[at], order[new] = order[new], order[at]
    inverse = np.empty(VERTICES, int)
    inverse[order] = np.arange(VERTICES)
    return points[order], inverse[faces]


# ---------------------------------------------------------------------------------------------------- the rig


def skinning(points: np.ndarray, faces: np.ndarray, joints: np.ndarray, solid: Solid) -> np.ndarray:
    """Skinning weights (V, 55): each vertex goes to the nearest solid's bone, then weights diffuse over the surface."""
    leaves = primitives(solid)
    distance = np.full((VERTICES, JOINTS), np.inf)
    for leaf in leaves:
        distance[:, leaf.bone] = np.minimum(distance[:, leaf.bone], leaf.distance(points))
    bone = distance.argmin(1)
    for eye in (23, 24):
        bone[distance[:, eye] < 0.0006] = eye
    trunk = np.isin(bone, (0, 3, 6, 9))
    levels = joints[[3, 6, 9], 1] - [0.01, 0.0, 0.0]
    bone[trunk] = np.array([0, 3, 6, 9])[np.searchsorted(levels, points[trunk, 1])]
    bone[(bone == 12) & (points[:, 1] > 1.535 - 0.6 * points[:, 2])] = 15
    hard = np.eye(JOINTS)[bone]
    # Implicit heat diffusion, (M + L) W = M W0, over a length that suits the limb.
    length = np.full(JOINTS, 0.030)
    length[[0, 1, 2, 3, 6, 9]] = 0.040
    length[[13, 14, 16, 17]] = 0.034
    length[[12, 15]] = 0.018
    length[[22, 23, 24]] = (0.010, 0.001, 0.001)
    length[[20, 21]] = 0.014
    length[25:] = 0.0055
    near = _adjacency(faces)
    spread = length[bone]
    for _ in range(3):
        spread = near @ spread
    a, b, c = points[faces].transpose(1, 0, 2)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    mass = np.bincount(faces.ravel(), np.repeat(area, 3), VERTICES) / 3
    rows, columns, values = [], [], []
    for corner in range(3):
        i, j, k = (faces[:, (corner + n) % 3] for n in range(3))
        u, v = points[j] - points[i], points[k] - points[i]
        cotangent = (u * v).sum(1) / np.linalg.norm(np.cross(u, v), axis=1)
        weight = np.clip(cotangent, 0.05, 5) / 2 * spread[j] * spread[k]
        rows += [j, k, j, k]
        columns += [k, j, j, k]
        values += [-weight, -weight, weight, weight]
    system = scipy.sparse.coo_matrix((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))))
    system = (system + scipy.sparse.diags(mass)).tocsc()
    weights = scipy.sparse.linalg.splu(system).solve(mass[:, None] * hard)
    kept = np.argsort(-weights, 1, kind="stable")[:, :4]
    out = np.zeros_like(weights)
    np.put_along_axis(out, kept, np.clip(np.take_along_axis(weights, kept, 1), 0, None), 1)
    out[out < 0.004] = 0
    return out / out.sum(1, keepdims=True)


def regressor(points: np.ndarray, joints: np.ndarray) -> np.ndarray:
    """Joint regressor (55, V): weights of nearby vertices, positive where the joint lies within them, sum 1."""
    out = np.zeros((JOINTS, VERTICES))
    tree = scipy.spatial.cKDTree(points)
    for joint, where in enumerate(joints):
        count = 160 if joint < 22 else 40
        near = np.sort(tree.query(where, count)[1])
        exact = np.vstack([points[near].T - where[:, None], np.ones(count)]) * 100
        target = np.array([0, 0, 0, 100.0])
        weights, _ = scipy.optimize.nnls(
            np.vstack([exact, np.eye(count)]), np.concatenate([target, np.full(count, 1 / count)])
        )
        # What is left of the error is removed by the smallest correction.
        weights = weights + exact.T @ np.linalg.solve(exact @ exact.T, target - exact @ weights)
        out[joint, near] = weights
    return out


def directions(points: np.ndarray, faces: np.ndarray, joints: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Shape (10) and expression (10) directions, (V, 3, 20); one unit is about one standard deviation."""
    normal = np.array(trimesh.Trimesh(points, faces, process=False).vertex_normals)
    x, y, _ = points.T

    def share(*bones):
        return weights[:, list(bones)].sum(1)

    def bump(centre, width):
        """A soft bump at a point and at its mirror image."""
        centre = np.asarray(centre, float)
        each = [np.exp(-(((points - c) / width) ** 2).sum(1)) for c in (centre, centre * MIRROR)]
        return each[0] + each[1]

    trunk, legs, arms = share(0, 3, 6, 9, 13, 14), share(1, 2, 4, 5, 7, 8), share(16, 17, 18, 19)
    fat = 0.013 * trunk + 0.009 * legs + 0.0055 * arms + 0.002 * share(12, 15, 22)
    wrist = abs(joints[20, 0])
    out = np.zeros((VERTICES, 3, 20))
    out[:, :, 0] = (points - joints[0]) * 0.034  # stature
    out[:, :, 1] = normal * fat[:, None]  # girth
    out[:, 1, 2] = -0.05 * np.clip(joints[0, 1] - y, 0, None)  # legs
    out[:, 0, 3] = np.sign(x) * 0.05 * np.clip(np.abs(x) - 0.175, 0, wrist - 0.175)  # arms
    out[:, :, 4] = (
        normal * (0.016 * np.exp(-(((y - 1.08) / 0.10) ** 2)) * np.clip(normal[:, 2] + 0.2, 0, 1) * trunk)[:, None]
    )  # belly
    wide = np.clip(np.abs(x) / 0.15, 0, 1)
    out[:, 0, 5] = (
        np.sign(x) * 0.011 * wide * np.clip((y - 1.18) / 0.2, 0, 1) * np.clip((1.50 - y) / 0.06, 0, 1)
    )  # shoulders
    out[:, 0, 6] = np.sign(x) * 0.011 * wide * np.exp(-(((y - 0.92) / 0.11) ** 2))  # hips
    out[:, :, 7] = (points - joints[12]) * (0.035 * share(15, 22, 23, 24))[:, None]  # head
    out[:, 2, 8] = 0.016 * bump((0.080, 1.295, 0.105), 0.060) * trunk  # chest
    out[:, :, 9] = normal * (0.006 * arms + 0.007 * legs + 0.004 * share(13, 14))[:, None]  # limbs
    mouth = bump((0.024, 1.549, 0.085), 0.014)
    lower = bump((0, 1.540, 0.085), 0.020) / 2
    out[:, 1, 10] = -0.008 * lower * (y < 1.5505)  # mouth open
    out[:, 1, 11], out[:, 0, 11] = 0.004 * mouth, 0.003 * mouth * np.sign(x)  # smile
    out[:, 1, 12] = 0.004 * bump((0.030, 1.642, 0.080), 0.018)  # brows
    out[:, 0, 13], out[:, 2, 13] = -0.004 * mouth * np.sign(x), 0.003 * mouth  # pucker
    return out


def landmarks(points: np.ndarray, faces: np.ndarray) -> dict[str, np.ndarray]:
    """The 51 face landmarks of smplx (brows, nose, eyes, mouth) and a jaw line of 17."""

    def row(xs, ys):
        return np.stack(np.broadcast_arrays(xs, ys), -1).reshape(-1, 2)

    def ring(cx, cy, rx, ry, count, start=np.pi):
        turn = start - np.arange(count) * 2 * np.pi / count
        return row(cx + rx * np.cos(turn), cy + ry * np.sin(turn))

    brow = np.linspace(0.014, 0.048, 5)
    wanted = np.concatenate(
        [
            row(-brow[::-1], 1.642),
            row(brow, 1.642),
            row(0.0, np.linspace(1.625, 1.585, 4)),
            row(np.linspace(-0.013, 0.013, 5), 1.574),
            ring(-0.0315, 1.622, 0.013, 0.005, 6),
            ring(0.0315, 1.622, 0.013, 0.005, 6),
            ring(0.0, 1.550, 0.024, 0.009, 12),
            ring(0.0, 1.550, 0.017, 0.003, 8),
        ]
    )
    turn = np.linspace(np.pi, 2 * np.pi, 17)
    jaw = row(0.062 * np.cos(turn), 1.590 + 0.070 * np.sin(turn))
    corner = points[faces]
    front = np.flatnonzero((corner[:, :, 1].min(1) > 1.49) & (np.abs(corner[:, :, 0]).max(1) < 0.1))
    a, b, c = corner[front][:, :, :2].transpose(1, 0, 2)

    def find(target):
        u, v, w = b - a, c - a, target - a
        area = u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]
        beta = (w[:, 0] * v[:, 1] - w[:, 1] * v[:, 0]) / area
        gamma = (u[:, 0] * w[:, 1] - u[:, 1] * w[:, 0]) / area
        inside = (area > 0) & (beta >= 0) & (gamma >= 0) & (beta + gamma <= 1)
        best = np.flatnonzero(inside)[corner[front[inside], :, 2].mean(1).argmax()]
        return front[best], (1 - beta[best] - gamma[best], beta[best], gamma[best])

    (face, weights), (jaw_face, jaw_weights) = (
        map(np.array, zip(*(find(target) for target in group))) for group in (wanted, jaw)
    )
    return {
        "lmk_faces_idx": face,
        "lmk_bary_coords": weights.astype(np.float32),
        "dynamic_lmk_faces_idx": np.repeat(jaw_face[None], 79, 0),
        "dynamic_lmk_bary_coords": np.repeat(jaw_weights[None], 79, 0).astype(np.float32),
    }


def build() -> dict[str, np.ndarray]:
    """The arrays of an SMPL-X model file."""
    joints, named = skeleton()
    solid = figure(joints, named)
    points, faces = simplify(*triangulate(solid), solid)
    points, faces = number(points, faces, named)
    weights = skinning(points, faces, joints, solid)
    tree = np.stack([PARENTS, np.arange(JOINTS)])
    tree[0, 0] = 2**32 - 1
    return {
        "v_template": (points - [0, ORIGIN_HEIGHT, 0]).astype(np.float32),
        "f": faces.astype(np.uint32),
        "shapedirs": directions(points, faces, joints, weights).astype(np.float16),
        "posedirs": np.zeros((VERTICES, 3, 9 * (JOINTS - 1)), np.float16),
        "J_regressor": regressor(points, joints).astype(np.float32),
        "kintree_table": tree.astype(np.int64),
        "weights": weights.astype(np.float32),
        "hands_componentsl": np.eye(45, dtype=np.float32),
        "hands_componentsr": np.eye(45, dtype=np.float32),
        "hands_meanl": np.zeros(45, np.float32),
        "hands_meanr": np.zeros(45, np.float32),
        **landmarks(points, faces),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the embedded SMPL-X-format body.")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the .npz file to write")
    with atomic.writing(parser.parse_args().out) as aside:
        np.savez_compressed(aside, **build())


if __name__ == "__main__":
    main()
