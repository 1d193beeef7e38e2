"""Bone directions of a person over time: from landmarks where these are seen, from neighbours in time and from what is
likely where they are not."""

import numpy as np

from anonymize.avatar.camera import Camera
from anonymize.fitting import inverse_kinematics as ik
from anonymize.fitting.smoothing import smoothed, stiffness

_PRIOR = 0.03  # weight of a likely direction against a landmark that is fully seen
_GUESSED = 0.1  # least weight of a direction of the trunk, which the model guesses well where it is out of the picture
_TRUNK_CUTOFF, _LIMB_CUTOFF = 3.5, 8.0  # Hz
_TRUNK = ("torso", "hips", "shoulders", "ears", "face")
_TURN = 15.0  # radians a second; no trunk turns faster
_OUTLIER = 0.5  # chord of the angle to the smoothed direction beyond which a direction loses weight


def to_world(image: np.ndarray, camera: Camera) -> np.ndarray:
    """Rotations (T, 3, 3) that take, from the right, landmarks with the model's axes in the world's.

    The model sees a crop as if the camera were turned to it, so its axes are turned by the angle of the ray through the
    trunk, about the vertical. (On studio videos the error of the facing grows by 0.86 of that angle without this; that
    of the trunk's pitch grows by none of the ray's.)

    Args:
        image: (T, 33, 3) x, y in pixels.
    """
    aside = np.nan_to_num(image[:, (11, 12, 23, 24), 0].mean(1) - camera.width / 2)
    turn = ik.matrix(np.arctan2(aside, camera.focal)[:, None] * [0, 1.0, 0])
    return np.swapaxes(turn, 1, 2) @ camera.rotation


def credible(torso: np.ndarray, fps: float) -> np.ndarray:
    """(T,) bool: frames whose landmarks can be relied on, by the direction of the trunk (T, 3), NaN where unknown.

    Where the trunk turns faster than people do, one side of the jump is wrong, mostly the shorter one. The frames are
    parted at jumps; from the longest part on to both sides, a part is left out that does not go on where the last one
    relied on ended, unless it is half as long as the longest.
    """
    found, good = np.flatnonzero(np.isfinite(torso).all(1)), np.zeros(len(torso), bool)
    if not len(found):
        return good
    most = np.clip(_TURN / fps, 0.5, 1.4)

    def jumps(before: np.ndarray, then: np.ndarray) -> np.ndarray:
        return np.linalg.norm(torso[then] - torso[before], axis=-1) > most * np.sqrt(np.abs(then - before))

    parts = np.split(found, np.flatnonzero(jumps(found[:-1], found[1:])) + 1)
    longest = max(range(len(parts)), key=lambda index: len(parts[index]))
    good[parts[longest]] = True
    for after, near, far in ((True, 0, -1), (False, -1, 0)):
        end = parts[longest][far]
        for part in parts[longest + 1 :] if after else parts[:longest][::-1]:
            if len(part) >= len(parts[longest]) / 2 or not jumps(end, part[near]):
                good[part], end = True, part[far]
    return good


def steady(vectors: dict, seen: dict, fps: float) -> dict[str, np.ndarray]:
    """Directions as `ik.directions` gives them, smooth and known in every frame.

    Frames without landmarks tend to what the nearest frame with landmarks shows. What is hardly seen in a frame tends
    to a relaxed pose: arms hang, thighs continue the trunk, shins hang where the trunk is upright and continue the
    thighs where it is not, the face looks where the chest does.
    """
    out: dict[str, np.ndarray] = {}
    times, lost = np.arange(len(vectors["torso"])), ~np.isfinite(vectors["torso"]).all(1)
    found = np.flatnonzero(~lost)
    nearest = found[np.abs(times[:, None] - found).argmin(1)]

    def settle(name: str, likely: np.ndarray) -> np.ndarray:
        cutoff = _TRUNK_CUTOFF if name in _TRUNK else _LIMB_CUTOFF
        weight = np.where(lost, 0.0, np.maximum(seen[name], _GUESSED if name in _TRUNK else _GUESSED / 5))
        known = np.where(lost[:, None], 0.0, vectors[name])
        likely = np.where(lost[:, None], known[nearest], likely)
        trust = weight
        for _ in range(2):
            total = trust + _PRIOR
            mean = (trust[:, None] * known + _PRIOR * likely) / total[:, None]
            out[name] = ik.unit(smoothed(mean, total, stiffness(cutoff, fps)))
            trust = weight / (1 + (np.linalg.norm(known - out[name], axis=1) / _OUTLIER) ** 4)
        return out[name]

    up = np.array([0, 1.0, 0])
    torso = settle("torso", up)
    hips = settle("hips", ik.unit(np.nanmean(vectors["hips"], 0)))
    shoulders = settle("shoulders", hips)
    forward = ik.unit(np.cross(shoulders, torso))
    ears = settle("ears", shoulders)
    settle("face", ik.unit(np.cross(ears, torso)))
    upright = np.clip(torso[:, 1:2], 0, 1)
    for side, sign in ((0, 1), (1, -1)):
        arm = settle(f"upper_arm{side}", ik.unit(-torso + 0.15 * sign * shoulders))
        forearm = settle(f"forearm{side}", ik.unit(arm + 0.3 * forward))
        settle(f"hand{side}", forearm)
        ahead = np.abs((forearm * forward).sum(1, keepdims=True))
        settle(f"palm{side}", ik.unit((1 - ahead) * forward + ahead * torso))  # thumbs ahead, or up
        thigh = settle(f"thigh{side}", ik.unit(-torso + 0.05 * sign * hips))
        settle(f"shin{side}", ik.unit(-upright * up + (1.01 - upright) * thigh))
        settle(f"foot{side}", ik.unit(np.cross(hips, torso) + 0.1 * sign * hips))
    return out
