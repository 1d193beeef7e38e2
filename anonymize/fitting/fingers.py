"""Rotations of wrists and fingers from hand landmarks, in closed form."""

import numpy as np

from anonymize.fitting import inverse_kinematics as ik
from anonymize.fitting.smoothing import smoothed, stiffness

WRIST = 0
# First joint of each finger on the left hand (SMPL-X's order, each with the two after it) and its first landmark.
_FINGERS = {"index": (25, 5), "middle": (28, 9), "pinky": (31, 17), "ring": (34, 13), "thumb": (37, 1)}
_FIRST, _COUNT = (25, 40), 15  # SMPL-X joints of a hand
_BEND = ((-0.3, 1.6), (0.0, 1.9), (0.0, 1.4))  # radians, of a finger's joints from the knuckle on
_SPREAD = 0.4  # radians to either side, of a finger at its knuckle
_THUMB = (1.0, 0.9, 1.2)  # radians: the thumb's joints turn freely, but no further
_RELAXED = (0.25, 0.35, 0.25)  # bend of a finger that is not seen
_CUTOFF = 7.0  # Hz
_PRIOR = 0.03  # weight of the relaxed pose against a hand that is fully seen


def palm(hands: np.ndarray) -> np.ndarray:
    """Orientation (T, 3, 3) of palms with landmarks (T, 21, 3): columns from the wrist to the middle of the outer
    knuckles, from the little finger's knuckle to the index finger's, and their cross product."""
    return ik.frame((hands[:, 5] + hands[:, 17]) / 2 - hands[:, WRIST], hands[:, 5] - hands[:, 17])


def bends(hands: np.ndarray, rest: np.ndarray, side: int) -> np.ndarray:
    """Finger rotations (T, 45), as `Pose.left_hand_pose`, of hands with landmarks (T, 21, 3), any orientation.

    Fingers bend at their knuckles toward the palm and sideways, at their other joints toward the palm only, all within
    the reach of hands; the thumb's joints turn by the least rotation.

    Args:
        rest: (21, 3) the hand's landmarks in the rest pose (`Skeleton.hands`).
    """
    still = palm(rest[None])[0]
    turned = palm(hands) @ still.T  # of the wrist
    out = np.zeros((len(hands), _COUNT, 3))
    inward = still[:, 2] * (1 - 2 * side)  # the way the palm faces
    for name, (joint, landmark) in _FINGERS.items():
        above = turned
        for part in range(3):
            start = ik.unit(rest[landmark + part + 1] - rest[landmark + part])
            end = ik.unit(hands[:, landmark + part + 1] - hands[:, landmark + part])
            end = (end[:, None] @ above)[:, 0]  # in the axes of the joint above, as at rest
            if name == "thumb":
                turn = ik.limited(ik.rotvec(ik.swing(start, end)), _THUMB[part])
            else:
                turn = _hinged(start, end, inward, _BEND[part], 0.0 if part else _SPREAD)
            out[:, joint - _FIRST[0] + part] = turn
            above = above @ ik.matrix(turn)
    return out.reshape(len(hands), -1)


def _hinged(start: np.ndarray, end: np.ndarray, inward: np.ndarray, reach: tuple, spread: float) -> np.ndarray:
    """Rotation vectors (T, 3) that take the bone's direction `start` (3,) toward `end` (T, 3): sideways by at most
    `spread`, then inward within `reach`."""
    axis = ik.unit(np.cross(start, inward))  # a finger bends about it
    inward = np.cross(axis, start)
    along, across, down = end @ start, end @ axis, end @ inward
    aside = np.clip(np.arctan2(across, np.hypot(along, down)), -spread, spread)
    bend = np.arctan2(down, along)
    bend = np.clip(np.where(bend < -2.2, np.pi, bend), *reach)  # far back is a closed fist, misread
    turn = ik.matrix(bend[:, None] * axis) @ ik.matrix(aside[:, None] * -inward)
    return ik.rotvec(turn)


def relaxed(rest: np.ndarray, side: int) -> np.ndarray:
    """(45,) finger rotations of a hand at ease."""
    out = np.zeros((_COUNT, 3))
    inward = palm(rest[None])[0][:, 2] * (1 - 2 * side)
    for name, (joint, landmark) in _FINGERS.items():
        for part in range(3):
            start = ik.unit(rest[landmark + part + 1] - rest[landmark + part])
            if name != "thumb":
                out[joint - _FIRST[0] + part] = _RELAXED[part] * ik.unit(np.cross(start, inward))
    return out.ravel()


def steady(angles: np.ndarray, seen: np.ndarray, likely: np.ndarray, fps: float) -> np.ndarray:
    """Finger rotations (T, 45), smooth in time, `likely` (45,) where a hand is not seen for long."""
    weight = np.where(np.isfinite(angles).all(1), seen, 0.0)
    known = np.where(weight[:, None] > 0, angles, 0.0)
    mean = (weight[:, None] * known + _PRIOR * likely) / (weight + _PRIOR)[:, None]
    return smoothed(mean, weight + _PRIOR, stiffness(_CUTOFF, fps))
