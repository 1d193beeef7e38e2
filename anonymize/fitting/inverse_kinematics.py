"""World rotations of the SMPL-X body joints from the directions of its bones, in closed form."""

import numpy as np

from anonymize.fitting.skeleton import BODY_JOINTS, Skeleton

Array = np.ndarray

# Joints (and what turns them) per side: left, right.
HIPS, KNEES, ANKLES, FEET = (1, 2), (4, 5), (7, 8), (10, 11)
COLLARS, SHOULDERS, ELBOWS, WRISTS = (13, 14), (16, 17), (18, 19), (20, 21)
SPINE, NECK, HEAD = (3, 6, 9), 12, 15

# Directions by name; those of limbs for (left, right). Each is the difference of two landmarks, or of two means.
_DIRECTIONS = {
    "hips": ((23,), (24,)),
    "shoulders": ((11,), (12,)),
    "torso": ((11, 12), (23, 24)),
    "ears": ((7,), (8,)),
    "face": ((0,), (7, 8)),
    **{f"{name}{side}": ((to + side,), (start + side,)) for side in (0, 1) for name, start, to in (
        ("upper_arm", 11, 13), ("forearm", 13, 15), ("thigh", 23, 25), ("shin", 25, 27), ("foot", 29, 31),
    )},
    **{f"hand{side}": ((17 + side, 19 + side), (15 + side,)) for side in (0, 1)},
    **{f"palm{side}": ((19 + side,), (17 + side,)) for side in (0, 1)},
}  # fmt: skip


def directions(points: Array, visibility: Array) -> tuple[dict[str, Array], dict[str, Array]]:
    """Unit vectors (T, 3) between landmarks (T, 33, 3) by name, and how well each is seen (T,), 0..1.

    The names: `hips`, `shoulders`, `ears` point to the person's left; `torso`, `face` (from between the ears to the
    nose); and per side 0, 1 `upper_arm`, `forearm`, `thigh`, `shin`, `foot` (heel to toe), `hand` (wrist to knuckles),
    `palm` (little finger to index).
    """
    vectors, seen = {}, {}
    for name, (to, start) in _DIRECTIONS.items():
        vectors[name] = unit(points[:, to].mean(1) - points[:, start].mean(1))
        seen[name] = np.minimum(visibility[:, to].min(1), visibility[:, start].min(1))
    return vectors, seen


def solve(skeleton: Skeleton, toward: dict[str, Array]) -> Array:
    """World rotations (T, 22, 3, 3) of the joints so that bones point in these directions (T, 3), as `directions` gives
    them.

    Bones of arms, legs and feet point exactly there. Elbows and knees bend about their hinges; where a limb is nearly
    straight and does not show its hinge, it is twisted as little as possible. Pelvis and chest share their direction;
    the difference of hips and shoulders is spread over the spine, that of chest and head over neck and head.
    """
    rest = _rest_directions(skeleton)
    turn = np.empty((len(toward["torso"]), BODY_JOINTS, 3, 3))
    turn[:, 0] = _aligned("hips", "torso", toward, rest)
    chest = _aligned("shoulders", "torso", toward, rest, primary=1)
    third = rotvec(_transposed(turn[:, 0]) @ chest) / 3
    for below, joint in zip((0, *SPINE), SPINE):
        turn[:, joint] = turn[:, below] @ matrix(third)
    chest = turn[:, SPINE[-1]]
    head = _aligned("ears", "face", toward, rest)
    nod = limited(rotvec(_transposed(chest) @ head), MOST_NOD) / 2
    turn[:, NECK] = chest @ matrix(nod)
    turn[:, HEAD] = turn[:, NECK] @ matrix(nod)
    for side in (0, 1):
        turn[:, COLLARS[side]] = chest
        elbow = np.array([0, 2 * side - 1, 0.0])  # hinge: left arms bend about -y, right arms about +y
        upper, lower = _limb(chest, toward, rest, f"upper_arm{side}", f"forearm{side}", elbow, None)
        turn[:, SHOULDERS[side]] = upper
        hand = _aligned(f"hand{side}", f"palm{side}", toward, rest)
        turn[:, ELBOWS[side]], turn[:, WRISTS[side]] = _wrist(lower, hand, rest[f"forearm{side}"], side)
        along = np.cross(toward[f"foot{side}"], toward[f"shin{side}"])
        knee = np.array([1.0, 0, 0])
        upper, lower = _limb(turn[:, 0], toward, rest, f"thigh{side}", f"shin{side}", knee, along)
        turn[:, HIPS[side]], turn[:, KNEES[side]] = upper, lower
        turn[:, ANKLES[side]] = _aligned(f"shin{side}", f"foot{side}", toward, rest, primary=1)
        turn[:, FEET[side]] = turn[:, ANKLES[side]]
    return turn


MOST_NOD = 1.3  # radians between chest and head


def _rest_directions(skeleton: Skeleton) -> dict[str, Array]:
    """The directions in the rest pose, (3,) each."""
    points = np.zeros((1, 33, 3))
    points[:, skeleton.landmarks] = skeleton.at_rest
    return {name: vector[0] for name, vector in directions(points, np.ones((1, 33)))[0].items()}


def _aligned(first: str, second: str, toward: dict, rest: dict, primary: int = 0) -> Array:
    """Rotations (T, 3, 3) that take the rest pose's directions `first` and `second` there; exactly so the primary."""
    names = (first, second) if primary == 0 else (second, first)
    return frame(toward[names[0]], toward[names[1]]) @ frame(rest[names[0]], rest[names[1]]).T


def _limb(parent: Array, toward: dict, rest: dict, upper: str, lower: str, hinge: Array, sideways: Array | None):
    """World rotations of the upper and lower joint of a limb.

    Args:
        parent: (T, 3, 3) of the joint it hangs on.
        hinge: (3,) the axis in the rest pose about which the lower joint bends.
        sideways: (T, 3) where the axis points if the limb is straight; None: where the least twist puts it.
    """
    along, bent = toward[upper], np.cross(toward[upper], toward[lower])
    least = swing(parent @ rest[upper], along) @ parent
    usual = least @ hinge
    if sideways is not None:
        usual = unit(usual + sideways)
    sure = smoothstep(np.linalg.norm(bent, axis=1), *BENT)
    sure = sure * smoothstep((unit(bent) * usual).sum(1), -0.9, -0.3)  # no limb bends the other way
    axis = unit(sure[:, None] * unit(bent) + (1 - sure[:, None]) * usual)
    above = frame(along, axis) @ frame(rest[upper], hinge).T
    return above, swing(above @ rest[lower], toward[lower]) @ above


def _wrist(lower: Array, hand: Array, along: Array, side: int) -> tuple[Array, Array]:
    """World rotations of elbow and wrist for a hand that is turned so in the world, as far as forearms and wrists turn.

    Half of the twist about the forearm, `along` (3,) at rest, is the elbow's, or the skin at the wrist would wring. The
    rest pose holds the palm down, nearly as far as it turns inward; from there it turns outward by half a circle.
    """
    relative = _transposed(lower) @ hand
    bend = swing(along, relative @ along)
    twist = (rotvec(_transposed(bend) @ relative) @ along) * (2 * side - 1)  # outward
    middle = (OUTWARD[0] + OUTWARD[1]) / 2
    twist = np.clip((twist - middle + np.pi) % (2 * np.pi) - np.pi + middle, *OUTWARD) * (2 * side - 1)
    bend = matrix(limited(rotvec(bend), MOST_WRIST))
    wrist = lower @ bend @ matrix(twist[:, None] * along)
    return lower @ matrix(twist[:, None] / 2 * along), wrist


OUTWARD = (-0.5, 3.0)  # radians of twist of the forearm from the rest pose
MOST_WRIST = 1.2  # radians that a wrist bends
BENT = (0.15, 0.5)  # sine of the angle at which a limb begins to show its hinge, and shows it fully


# ---------------------------------------------------------------- rotations, all of (..., 3) and (..., 3, 3)


def unit(vectors: Array) -> Array:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


def frame(first: Array, second: Array) -> Array:
    """The rotation whose columns are `first`, what of `second` is perpendicular to it, and their cross product."""
    first = unit(first)
    second = unit(second - (second * first).sum(-1, keepdims=True) * first)
    return np.stack([first, second, np.cross(first, second)], -1)


def swing(start: Array, end: Array) -> Array:
    """The smallest rotation that takes the direction `start` to `end`."""
    start, end = np.broadcast_arrays(unit(start), unit(end))
    axis, cosine = np.cross(start, end), (start * end).sum(-1)
    spare = np.cross(start, np.where(np.abs(start[..., :1]) < 0.8, [1.0, 0, 0], [0, 1.0, 0]))  # for opposite ones
    opposite = cosine < -0.999999
    axis = np.where(opposite[..., None], unit(spare), unit(axis))
    return matrix(axis * np.arccos(np.clip(cosine, -1, 1))[..., None])


def matrix(rotvec: Array) -> Array:
    """Rodrigues' formula."""
    angle = np.linalg.norm(rotvec, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(unit(rotvec), -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*x.shape, 3, 3)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def rotvec(rotation: Array) -> Array:
    from scipy.spatial.transform import Rotation

    return Rotation.from_matrix(rotation.reshape(-1, 3, 3)).as_rotvec().reshape(*rotation.shape[:-2], 3)


def limited(vectors: Array, most: float) -> Array:
    """Rotation vectors no longer than `most` radians."""
    return vectors * np.minimum(1, most / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9))


def smoothstep(value: Array, low: float, high: float) -> Array:
    """0 up to `low`, 1 from `high` on, smooth between."""
    part = np.clip((value - low) / (high - low), 0, 1)
    return part * part * (3 - 2 * part)


def _transposed(rotation: Array) -> Array:
    return np.swapaxes(rotation, -1, -2)
