"""Procedural human actions as SMPL-X poses.

An action says where the feet, the pelvis and the wrists are and how the trunk bends, over time; joint angles follow by
two-bone inverse kinematics. So feet that stand do not slide or sink, and knees and elbows only bend their own way.

World: y up, the floor at y = 0, an unturned person faces +z with the left hand at +x.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from anonymize.avatar.body import Body, skin
from anonymize.avatar.pose import Pose

LEFT, RIGHT = 1, -1  # also the sign of x on that side
SIDES = (LEFT, RIGHT)
FIST = 1.35  # bend of each finger joint, radians

FARTHEST = 2.2  # metres walked in a clip
SEAT_DROP = 0.40  # metres the pelvis comes down to sit

PELVIS, NECK, HEAD = 0, 12, 15
SPINE = (3, 6, 9)
_LEG = {LEFT: (1, 4, 7, 10), RIGHT: (2, 5, 8, 11)}  # hip, knee, ankle, ball of the foot
_ARM = {LEFT: (13, 16, 18, 20), RIGHT: (14, 17, 19, 21)}  # collar, shoulder, elbow, wrist


@functools.cache
def _standard_body() -> Body:
    return Body()


@functools.cache
def _skeleton() -> tuple[np.ndarray, dict[int, tuple[np.ndarray, np.ndarray]], float]:
    """Rest joints (55, 3); each foot's sole points, those that move with the ankle and those with the toes; the height
    of the pelvis above the floor."""
    body = _standard_body()
    vertices, joints = (value.numpy().astype(float) for value in body.shaped(torch.zeros(10)))
    bone = body.weights.argmax(1).numpy()
    low = vertices[:, 1] < vertices[:, 1].min() + 0.02
    soles = {
        side: (vertices[low & (bone == ankle)] - joints[ankle], vertices[low & (bone == ball)] - joints[ball])
        for side, (_, _, ankle, ball) in _LEG.items()
    }
    return joints, soles, joints[PELVIS, 1] - vertices[:, 1].min()


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


def _smooth(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def _through(progress: np.ndarray, *keys: tuple[float, float | tuple]) -> np.ndarray:
    """Values at `progress` (T,) on a smooth path through (progress, value) keys: (T,) or (T, width)."""
    at = np.array([key for key, _ in keys])
    values = np.array([value for _, value in keys], float)
    index = np.clip(np.searchsorted(at, progress, "right") - 1, 0, len(at) - 2)
    weight = _smooth((progress - at[index]) / (at[index + 1] - at[index]))
    weight = weight.reshape(weight.shape + (1,) * (values.ndim - 1))
    return values[index] * (1 - weight) + values[index + 1] * weight


class _Performance:
    """One performance being written: where each part of the body is at times `t` (seconds, (T,)).

    Attributes (lengths in metres, angles in radians, all arrays over T; x points outward on each side):
        travel: (T, 2) ground position x, z of the whole person; heading: (T,) turn about the vertical.
        pelvis: (T, 3) offset from standing; hips, spine, head: (T, 3) pitch (forward), yaw (left), roll (right).
        foot[side]: (T, 2) ankle's x, z; lift, pitch (heel up), toe_out: (T,) of that foot.
        hand[side]: (T, 3) wrist from the shoulder: outward, up, forward, in the frame of the chest; elbow[side]: (T, 3)
            the direction in which the elbow points; twist[side]: (T,) pronation; curl[side]: (T,) bend of the fingers.
    """

    def __init__(self, rng: np.random.Generator, frames: int, fps: float):
        self.rng = rng
        self.t = np.arange(frames) / fps
        self.length = frames / fps
        zeros = np.zeros(frames)
        self.travel, self.heading = np.zeros((frames, 2)), zeros.copy()
        self.pelvis = np.zeros((frames, 3)) + self.drift(0.008, 3)
        self.pelvis[:, 1] = -rng.uniform(0.004, 0.02)
        self.hips = self.drift(0.02, 3)
        self.spine = self.drift(0.03, 3) + np.array([rng.normal(0.02, 0.04), 0, 0])
        self.head = self.drift(0.07, 3) + np.array([0, rng.normal(0, 0.12), 0])
        width = rng.uniform(0.09, 0.16)
        self.foot = {s: np.tile([width, rng.normal(0, 0.025)], (frames, 1)) for s in SIDES}
        self.lift = {s: zeros.copy() for s in SIDES}
        self.pitch = {s: zeros.copy() for s in SIDES}
        self.toe_out = {s: zeros + rng.uniform(0.05, 0.3) for s in SIDES}
        self.hand, self.elbow = {}, {}
        for s in SIDES:
            self.hand[s] = self.drift(0.012, 3) + rng.normal([0.10, -0.485, 0.05], [0.02, 0.008, 0.025])
            self.elbow[s] = np.tile(rng.normal([0.35, 0, -1], [0.1, 0, 0]), (frames, 1))
        self.twist = {s: zeros + rng.normal(0.25, 0.15) for s in SIDES}
        self.curl = {s: zeros + rng.uniform(0.2, 0.45) for s in SIDES}

    def drift(self, scale: float, width: int) -> np.ndarray:
        """(T, width) slow random sway with standard deviation about `scale`."""
        rate, phase = self.rng.uniform(0.1, 0.6, (3, width)), self.rng.uniform(0, 2 * np.pi, (3, width))
        return scale * np.sin(2 * np.pi * rate * self.t[:, None, None] + phase).sum(1) * np.sqrt(2 / 3)

    def vary(self, value: float, share: float = 0.15) -> float:
        """`value`, times a factor drawn around 1."""
        return value * float(np.clip(self.rng.normal(1, share), 1 - 2 * share, 1 + 2 * share))

    def cycles(self, seconds: float) -> np.ndarray:
        """(T,) repetitions done, from a random phase, each lasting about `seconds`."""
        return self.t / self.vary(seconds) + self.rng.uniform()

    def once(self, seconds: float) -> np.ndarray:
        """(T,) progress 0…1 of something done once, in about `seconds`, wholly inside the clip."""
        seconds = min(self.vary(seconds), 0.92 * self.length)
        return np.clip((self.t - self.rng.uniform(0, self.length - seconds)) / seconds, 0, 1)

    def ready(self) -> np.ndarray:
        """(T,) 0…1: a position is taken at the start of the clip; sometimes it is held from the first frame."""
        if self.rng.uniform() < 0.4:
            return np.ones_like(self.t)
        return _smooth(self.t / min(self.vary(0.5), 0.4 * self.length) - self.rng.uniform(0, 0.5))

    def move_hand(self, side: int, to, weight: np.ndarray | float, *, elbow=None, twist=None, curl=None) -> None:
        """Brings a hand by `weight` (0…1) from where it is to `to`."""
        weight = np.broadcast_to(weight, self.t.shape)
        column = weight[:, None]
        self.hand[side] = self.hand[side] * (1 - column) + np.asarray(to, float) * column
        if elbow is not None:
            self.elbow[side] = self.elbow[side] * (1 - column) + np.asarray(elbow, float) * column
        if twist is not None:
            self.twist[side] = self.twist[side] * (1 - weight) + np.asarray(twist) * weight
        if curl is not None:
            self.curl[side] = self.curl[side] * (1 - weight) + np.asarray(curl) * weight

    def step(self, cycles: np.ndarray, stride: float, height: float, duty: float = 0.6, swing: float = 0.25) -> None:
        """Walking: each foot stands for `duty` of a cycle, moving `stride` back under the body, then swings forward."""
        for s in SIDES:
            phase = (cycles + (0.5 if s == RIGHT else 0)) % 1
            back = phase < duty
            swinging = np.clip((phase - duty) / (1 - duty), 0, 1)
            self.foot[s][:, 1] += stride * np.where(back, 0.5 - phase / duty, _smooth(swinging) - 0.5)
            self.foot[s][:, 0] = 0.085
            self.lift[s] += height * np.sin(np.pi * swinging) * ~back
            push = _smooth((phase / duty - 0.6) / 0.4) * back + (1 - _smooth(swinging * 1.6)) * ~back
            self.pitch[s] += (
                min(1.0, 1.1 * stride + 2 * height) * push
                - 0.25 * min(1, 3 * stride) * _smooth(swinging * 2 - 1) * ~back
            )
            wave = np.sin(2 * np.pi * (cycles + (0.5 if s == RIGHT else 0)))  # the arm goes against its leg
            self.hand[s][:, 2] -= swing * wave
            self.hand[s][:, 1] += 0.35 * swing * wave**2
        self.spine[:, 1] += 0.25 * swing * np.sin(2 * np.pi * cycles)
        self.pelvis[:, 1] -= 0.035 * stride + 0.02 * stride * np.cos(4 * np.pi * cycles)

    def solve(self) -> Pose:
        """The SMPL-X pose of what was written."""
        joints, soles, standing = _skeleton()
        rotations = np.tile(np.eye(3), (len(self.t), 55, 1, 1))
        turn = Rotation.from_rotvec(self.heading[:, None] * [0, 1, 0])
        root = turn * _euler(self.hips)
        rotations[:, PELVIS] = root.as_matrix()
        spine = _euler(self.spine / len(SPINE))
        for joint in SPINE:
            rotations[:, joint] = spine.as_matrix()
        for joint in (NECK, HEAD):
            rotations[:, joint] = _euler(self.head / 2).as_matrix()
        pelvis = self.pelvis + np.array([0, standing, 0])
        pelvis[:, [0, 2]] += self.travel
        pelvis[:, [0, 2]] = turn.apply(pelvis * [1, 0, 1])[:, [0, 2]]

        feet, ankles = {}, {}
        for s in SIDES:
            hip, knee, ankle, ball = _LEG[s]
            feet[s] = turn * _euler(np.stack([self.pitch[s], s * self.toe_out[s], np.zeros_like(self.t)], -1))
            toes = feet[s] * Rotation.from_rotvec(-np.clip(self.pitch[s], 0, 0.9)[:, None] * [1, 0, 0])
            rotations[:, ball] = (feet[s].inv() * toes).as_matrix()
            lowest = np.minimum(
                _rotate(feet[s], soles[s][0])[..., 1].min(1),
                feet[s].apply(joints[ball] - joints[ankle])[:, 1] + _rotate(toes, soles[s][1])[..., 1].min(1),
            )
            place = np.stack([s * self.foot[s][:, 0], np.zeros_like(self.t), self.foot[s][:, 1]], -1)
            place[:, [0, 2]] += self.travel
            ankles[s] = turn.apply(place)
            ankles[s][:, 1] = np.maximum(self.lift[s], 0) - lowest
        for s in SIDES:  # the pelvis comes down until every standing foot is in reach
            hip, knee, ankle, _ = _LEG[s]
            reach = 0.998 * (np.linalg.norm(joints[knee] - joints[hip]) + np.linalg.norm(joints[ankle] - joints[knee]))
            offset = root.apply(joints[hip] - joints[PELVIS])
            aside = np.linalg.norm((pelvis + offset - ankles[s])[:, [0, 2]], axis=-1)
            highest = ankles[s][:, 1] + np.sqrt(np.maximum(reach**2 - aside**2, 0.01)) - offset[:, 1]
            pelvis[:, 1] = np.where(self.lift[s] < 0.03, np.minimum(pelvis[:, 1], highest), pelvis[:, 1])
        for s in SIDES:
            hip, knee, ankle, _ = _LEG[s]
            target = ankles[s] - pelvis - root.apply(joints[hip] - joints[PELVIS])
            hinge = (turn * Rotation.from_rotvec(0.7 * s * self.toe_out[s][:, None] * [0, 1, 0])).apply([1, 0, 0])
            upper, lower = _two_bones(joints[[hip, knee, ankle]], target, hinge, np.array([1.0, 0, 0]))
            rotations[:, hip] = (root.inv() * upper).as_matrix()
            rotations[:, knee] = (upper.inv() * lower).as_matrix()
            rotations[:, ankle] = (lower.inv() * feet[s]).as_matrix()

        for s in SIDES:
            collar, shoulder, elbow, wrist = _ARM[s]
            outward = [s, 1, 1]
            raised = 0.45 * _smooth((self.hand[s][:, 1] + 0.1) / 0.6)
            clavicle = Rotation.from_rotvec(raised[:, None] * [0, 0, s])
            rotations[:, collar] = clavicle.as_matrix()
            moved = clavicle.apply(joints[shoulder] - joints[collar]) - (joints[shoulder] - joints[collar])
            target = self.hand[s] * outward - moved
            hinge = np.cross(self.elbow[s] * outward, target)
            upper, lower = _two_bones(joints[[shoulder, elbow, wrist]], target, hinge, np.array([0.0, -s, 0]))
            half = Rotation.from_rotvec(0.5 * self.twist[s][:, None] * [s, 0, 0])
            rotations[:, shoulder] = (clavicle.inv() * upper).as_matrix()
            rotations[:, elbow] = (upper.inv() * lower * half).as_matrix()
            rotations[:, wrist] = half.as_matrix()
            first = 25 if s == LEFT else 40
            bend = Rotation.from_rotvec(self.curl[s][:, None] * [0, 0, -s]).as_matrix()
            rotations[:, first : first + 12] = bend[:, None]
            thumb = Rotation.from_rotvec(0.4 * self.curl[s][:, None] * [0, s, -0.3 * s]).as_matrix()
            rotations[:, first + 12 : first + 15] = thumb[:, None]
        return _pose(rotations, pelvis - joints[PELVIS])


def _euler(angles: np.ndarray) -> Rotation:
    """Rotation of (T, 3) pitch, yaw, roll."""
    return Rotation.from_euler("YXZ", angles[:, [1, 0, 2]])


def _rotate(rotation: Rotation, points: np.ndarray) -> np.ndarray:
    """Every point (P, 3) by every rotation (T): (T, P, 3)."""
    return np.einsum("tij,pj->tpi", rotation.as_matrix(), points)


def _frame(bone: np.ndarray, hinge: np.ndarray) -> np.ndarray:
    hinge = _unit(hinge - (hinge * bone).sum(-1, keepdims=True) * bone)
    return np.stack([bone, hinge, np.cross(bone, hinge)], -1)


def _two_bones(rest: np.ndarray, target: np.ndarray, hinge: np.ndarray, rest_hinge: np.ndarray):
    """Rotations (T) of the two bones root–middle–end (rest: (3, 3)) that bring the end to `target` (T, 3).

    The middle joint bends about `hinge` (T, 3), by a positive angle, as it bends about `rest_hinge` (3,) at rest. A
    target out of reach is drawn back along its direction.
    """
    first, second = rest[1] - rest[0], rest[2] - rest[1]
    a, b = np.linalg.norm(first), np.linalg.norm(second)
    distance = np.clip(np.linalg.norm(target, axis=-1), 0.3 * (a + b), 0.998 * (a + b))
    along = _unit(target)
    hinge = _unit(hinge - (hinge * along).sum(-1, keepdims=True) * along)
    open_by = np.arccos(np.clip((a**2 + distance**2 - b**2) / (2 * a * distance), -1, 1))
    bend = np.pi - np.arccos(np.clip((a**2 + b**2 - distance**2) / (2 * a * b), -1, 1))
    upper_bone = Rotation.from_rotvec(-open_by[:, None] * hinge).apply(along)
    lower_bone = Rotation.from_rotvec(bend[:, None] * hinge).apply(upper_bone)
    upper = Rotation.from_matrix(_frame(upper_bone, hinge) @ _frame(_unit(first), rest_hinge).T)
    lower = Rotation.from_matrix(_frame(lower_bone, hinge) @ _frame(_unit(second), rest_hinge).T)
    return upper, lower


def _pose(rotations: np.ndarray, transl: np.ndarray) -> Pose:
    frames = len(rotations)
    angles = Rotation.from_matrix(rotations.reshape(-1, 3, 3)).as_rotvec().reshape(frames, 55, 3)
    return Pose(
        global_orient=angles[:, PELVIS],
        body_pose=angles[:, 1:22].reshape(frames, 63),
        transl=transl,
        left_hand_pose=angles[:, 25:40].reshape(frames, 45),
        right_hand_pose=angles[:, 40:55].reshape(frames, 45),
        jaw_pose=angles[:, 22],
    )


# ---------------------------------------------------------------- the actions, written right-handed, facing +z


def _wave(p: _Performance) -> None:
    beat = np.sin(2 * np.pi * p.cycles(0.65))
    height, reach = p.rng.uniform(0.12, 0.32), p.rng.uniform(0.1, 0.17)
    side = p.vary(0.24) + reach * beat
    up = height - 0.25 * np.abs(reach * beat)
    to = np.stack([side, up, np.full_like(beat, p.vary(0.14))], -1)
    p.move_hand(RIGHT, to, p.ready(), elbow=(1, -0.9, -0.1), twist=1.4, curl=0.1)
    p.head[:, 2] += 0.05 * beat


def _clap(p: _Performance) -> None:
    apart = 0.5 + 0.5 * np.sin(2 * np.pi * p.cycles(0.6))
    height, wide = p.rng.uniform(-0.2, 0.0), p.rng.uniform(0.2, 0.32)
    weight = p.ready()
    for s in SIDES:
        to = np.stack([-0.10 + wide * apart, height + 0 * apart, p.vary(0.37, 0.02) + 0 * apart], -1)
        p.move_hand(s, to, weight, elbow=(0.6, -1, -0.4), twist=0.1, curl=0.12)


def _drink(p: _Performance) -> None:
    at = p.once(2.4)
    near = _through(at, (0, 0.0), (0.35, 1.0), (0.65, 1.0), (1, 0.0))
    start = (0.0, p.rng.uniform(-0.3, -0.16), p.vary(0.3))
    p.move_hand(RIGHT, start, 1.0, elbow=(0.4, -0.8, -0.6), twist=0.1, curl=0.9)
    p.move_hand(RIGHT, (-0.11, 0.085, 0.215), near, elbow=(1, -0.45, 0.2), twist=0.4, curl=0.9)
    tip = _through(at, (0, 0.0), (0.35, 0.0), (0.5, 1.0), (0.65, 0.9), (0.8, 0.0), (1, 0.0))
    p.head[:, 0] -= 0.4 * tip
    p.hand[RIGHT][:, 1] += 0.05 * tip


def _phone_call(p: _Performance) -> None:
    weight = p.ready()
    ear = np.array([-0.03, 0.12, 0.11]) + p.rng.normal(0, 0.012, 3)
    p.move_hand(RIGHT, ear, weight, elbow=(0.8, -1, 0.25), twist=-0.3, curl=0.9)
    p.head[:, 2] += p.vary(0.22) * weight
    p.head[:, 0] += 0.12 * weight
    p.head[:, 1] += p.drift(0.15, 1)[:, 0]
    if p.rng.uniform() < 0.4:  # the other hand holds the elbow
        p.move_hand(LEFT, (-0.25, -0.28, 0.2), weight, elbow=(0.6, -1, -0.2))


def _sit_down(p: _Performance) -> None:
    _sit(p, _smooth(p.once(1.7)))


def _stand_up(p: _Performance) -> None:
    _sit(p, 1 - _smooth(p.once(1.6)))


def _sit(p: _Performance, seated: np.ndarray) -> None:
    bowed = np.sin(np.pi * seated)
    p.pelvis[:, 1] -= SEAT_DROP * seated
    p.pelvis[:, 2] -= 0.40 * seated**0.7
    p.spine[:, 0] += p.vary(0.65) * bowed + 0.05 * seated
    p.hips[:, 0] += 0.3 * bowed
    p.head[:, 0] -= 0.35 * bowed
    for s in SIDES:
        p.move_hand(s, (-0.03, -0.38, 0.33), seated, elbow=(0.7, -0.2, -1), twist=0.7)


def _squat(p: _Performance) -> None:
    down = (0.5 - 0.5 * np.cos(2 * np.pi * p.cycles(1.6))) ** 0.8
    depth = p.rng.uniform(0.30, 0.46)
    p.pelvis[:, 1] -= depth * down
    p.pelvis[:, 2] -= 0.45 * depth * down
    p.spine[:, 0] += 0.6 * depth / 0.4 * down
    p.hips[:, 0] += 0.35 * down
    p.head[:, 0] -= 0.45 * down
    for s in SIDES:
        p.foot[s][:, 0] = 0.17
        p.toe_out[s] += 0.25
        p.move_hand(s, (0.0, -0.02, 0.50), 0.15 + 0.85 * down, elbow=(0.8, -0.7, -0.2), twist=0.9)


def _kick(p: _Performance) -> None:
    cycle = p.cycles(1.5) % 1
    back = _through(cycle, (0, 0.0), (0.2, 1.0), (0.42, 0.0), (1, 0.0))
    out = _through(cycle, (0, 0.0), (0.22, 0.0), (0.46, 1.0), (0.56, 0.95), (0.85, 0.0), (1, 0.0))
    high = p.rng.uniform(0.45, 0.85)
    p.foot[RIGHT][:, 1] += p.vary(0.75) * out - 0.35 * back
    p.lift[RIGHT] = high * out + 0.16 * back
    p.pitch[RIGHT] = 0.9 * back - 0.75 * out
    p.pelvis[:, 0] += 0.06 * (out + back)
    p.pelvis[:, 1] -= 0.025 * (out + back)
    p.hips[:, 0] -= 0.3 * out * high / 0.7
    p.spine[:, 0] += 0.12 * back - 0.10 * out
    p.spine[:, 1] += 0.3 * (out - back)
    p.hand[LEFT] += np.outer(out, [0.12, 0.22, 0.28])
    p.hand[RIGHT] += np.outer(out, [0.18, 0.12, -0.25])
    p.hand[LEFT] += np.outer(back, [0.1, 0.1, -0.1])


def _throw(p: _Performance) -> None:
    at = p.once(1.7)
    hand = _through(
        at,
        (0.0, (0.05, -0.25, 0.28)),
        (0.38, (0.26, 0.20, -0.20)),
        (0.52, (0.16, 0.36, 0.12)),
        (0.64, (0.00, 0.10, 0.50)),
        (0.80, (-0.22, -0.32, 0.34)),
        (1.0, (-0.10, -0.42, 0.22)),
    )
    p.move_hand(
        RIGHT,
        hand,
        1.0,
        elbow=(1, -0.35, -0.3),
        twist=0.6,
        curl=_through(at, (0, 0.9), (0.5, 0.9), (0.64, 0.1), (1, 0.3)),
    )
    p.move_hand(LEFT, (0.12, 0.0, 0.42), _through(at, (0, 0.1), (0.36, 1.0), (0.7, 0.1), (1, 0.0)), elbow=(0.6, -1, 0))
    wind = _through(at, (0, 0.0), (0.36, 1.0), (0.66, -1.0), (1, -0.4))
    p.spine[:, 1] -= p.vary(0.65) * wind
    p.spine[:, 0] -= 0.22 * wind
    p.hips[:, 1] -= 0.25 * wind
    p.foot[LEFT][:, 1] += 0.32 * _through(at, (0, 0.0), (0.3, 0.0), (0.5, 1.0), (1, 1.0))
    p.lift[LEFT] = 0.14 * _through(at, (0, 0.0), (0.25, 0.0), (0.38, 1.0), (0.5, 0.0), (1, 0.0))
    p.pelvis[:, 2] += 0.22 * _through(at, (0, 0.0), (0.35, -0.25), (0.65, 1.0), (1, 0.9))
    p.pelvis[:, 1] -= 0.04 * np.sin(np.pi * at)
    p.pitch[RIGHT] = 0.7 * _through(at, (0, 0.0), (0.5, 0.0), (0.7, 1.0), (1, 0.9))


def _walk(p: _Performance) -> None:
    period, stride = p.vary(1.1, 0.12), p.vary(0.55, 0.12)
    stride = min(stride, 0.6 * period * FARTHEST / p.length)
    cycles = p.t / period + p.rng.uniform()
    p.step(cycles, stride, 0.05)
    p.travel[:, 1] = stride / 0.6 * (cycles - cycles.mean())
    p.hips[:, 0] += 0.03


def _pick_up(p: _Performance) -> None:
    at = p.once(2.2)
    down = _through(at, (0, 0.0), (0.42, 1.0), (0.55, 1.0), (1, 0.0))
    p.pelvis[:, 1] -= p.vary(0.36) * down
    p.pelvis[:, 2] -= 0.16 * down
    p.spine[:, 0] += 0.85 * down
    p.hips[:, 0] += 0.55 * down
    p.head[:, 0] += 0.1 * down
    p.foot[RIGHT][:, 1] -= 0.12
    p.pitch[RIGHT] += 0.45 * down
    p.move_hand(RIGHT, (-0.06, -0.36, 0.36), down, elbow=(0.8, 0.2, -1), twist=0.6)
    p.move_hand(LEFT, (0.05, -0.30, 0.30), down, elbow=(0.9, 0.2, -1), twist=0.6)
    carried = _through(at, (0, 0.0), (0.6, 0.0), (1, 1.0))
    p.move_hand(RIGHT, (-0.06, -0.24, 0.32), carried, elbow=(0.5, -1, -0.6), curl=0.9)


def _boxing(p: _Performance) -> None:
    weight = p.ready()
    cycle = p.cycles(0.8)
    for s in SIDES:
        phase = (cycle + (0.5 if s == LEFT else 0)) % 1
        out = _through(phase, (0, 0.0), (0.14, 0.0), (0.32, 1.0), (0.55, 0.0), (1, 0.0))
        p.move_hand(s, (-0.08, 0.02, 0.22), weight, elbow=(0.55, -1, -0.1), twist=0.3, curl=FIST)
        p.move_hand(s, (-0.10, 0.07, 0.52), out * weight, elbow=(0.8, -0.7, 0), twist=1.1, curl=FIST)
        p.spine[:, 1] += -s * 0.38 * out * weight
    p.foot[LEFT][:, 1] += 0.16
    p.foot[RIGHT][:, 1] -= 0.16
    p.pitch[RIGHT] += 0.3
    p.pelvis[:, 1] -= 0.05 + 0.015 * np.sin(4 * np.pi * cycle)
    p.spine[:, 0] += 0.12
    p.head[:, 0] += 0.12


def _jumping_jack(p: _Performance) -> None:
    cycle = p.cycles(0.95)
    wide = 0.5 - 0.5 * np.cos(2 * np.pi * cycle)
    jump = p.vary(0.09) * np.abs(np.sin(2 * np.pi * cycle)) ** 1.2
    p.pelvis[:, 1] += jump - 0.04 * (1 - np.abs(np.sin(2 * np.pi * cycle)))
    angle = -1.35 + p.rng.uniform(2.4, 2.8) * wide
    for s in SIDES:
        p.foot[s][:, 0] = 0.09 + p.rng.uniform(0.26, 0.36) * wide
        p.lift[s] = jump
        p.pitch[s] = np.clip(5 * jump, 0, 0.5)
        arm = np.stack([0.51 * np.cos(angle), 0.51 * np.sin(angle), 0.03 + 0.05 * wide], -1)
        p.move_hand(s, arm, 1.0, elbow=(0.3, -0.2, -1), twist=0.2, curl=0.1)


def _march(p: _Performance) -> None:
    cycles = p.cycles(1.15)
    knee = p.rng.uniform(0.30, 0.45)
    p.step(cycles, 0.04, 0.0, duty=0.5, swing=p.rng.uniform(0.2, 0.3))
    for s in SIDES:
        phase = (cycles + (0.5 if s == RIGHT else 0)) % 1
        raised = np.sin(np.pi * np.clip((phase - 0.5) / 0.5, 0, 1)) ** 0.8
        p.lift[s] = knee * raised
        p.foot[s][:, 1] += 0.24 * raised
        p.pitch[s] = 0.35 * raised


def _jog(p: _Performance) -> None:
    period, stride = p.vary(0.72, 0.1), p.vary(0.62, 0.12)
    stride = min(stride, 0.4 * period * FARTHEST / p.length)
    cycles = p.t / period + p.rng.uniform()
    p.step(cycles, stride, 0.17, duty=0.4, swing=0.12)
    p.travel[:, 1] = p.rng.choice([0.0, 1.0]) * stride / 0.4 * (cycles - cycles.mean())
    p.spine[:, 0] += 0.14
    p.pelvis[:, 1] -= 0.045
    for s in SIDES:
        wave = np.sin(2 * np.pi * (cycles + (0.5 if s == RIGHT else 0)))
        to = np.stack([0.0 * wave, -0.24 - 0.07 * wave, 0.20 - 0.20 * wave], -1)
        p.move_hand(s, to, 1.0, elbow=(0.5, -0.4, -1), twist=0.1, curl=0.9)


def _bow(p: _Performance) -> None:
    down = _through(p.once(2.0), (0, 0.0), (0.4, 1.0), (0.62, 1.0), (1, 0.0))
    depth = p.rng.uniform(0.7, 1.25)
    p.spine[:, 0] += 0.62 * depth * down
    p.hips[:, 0] += 0.5 * depth * down
    p.pelvis[:, 2] -= 0.13 * depth * down
    p.head[:, 0] += 0.15 * down
    if p.rng.uniform() < 0.5:
        for s in SIDES:
            p.move_hand(s, (0.0, -0.42, 0.2), down, elbow=(0.5, 0, -1), twist=0.5)


def _point(p: _Performance) -> None:
    weight = _through(p.once(2.2), (0, 0.0), (0.3, 1.0), (0.8, 1.0), (1, 0.0))
    aside = p.rng.uniform(0.1, 1.3)
    up = p.rng.uniform(-0.02, 0.16)
    p.move_hand(
        RIGHT, (0.5 * np.sin(aside), up, 0.5 * np.cos(aside)), weight, elbow=(0.5, -1, -0.3), twist=1.0, curl=0.7
    )
    p.head[:, 1] -= 0.7 * aside * weight
    p.spine[:, 1] -= 0.15 * aside * weight


def _raise_arms(p: _Performance) -> None:
    weight = _through(p.once(2.2), (0, 0.0), (0.38, 1.0), (0.65, 1.0), (1, 0.0))
    wide = p.rng.uniform(0.05, 0.28)
    for s in SIDES:
        p.move_hand(s, (0.34, 0.02, 0.32), np.minimum(1, 2 * weight), elbow=(0.8, -0.6, -0.4), twist=0.4, curl=0.1)
        p.move_hand(s, (wide, 0.5, 0.06), np.clip(2 * weight - 1, 0, 1), elbow=(1, 0, -0.4), twist=0.2, curl=0.1)
    p.head[:, 0] -= 0.2 * weight
    p.spine[:, 0] -= 0.1 * weight


def _turn_around(p: _Performance) -> None:
    at = p.once(1.8)
    p.heading = p.vary(np.pi, 0.08) * _smooth(at)
    p.head[:, 1] += 0.5 * np.sin(np.pi * at) ** 2
    for s in SIDES:
        p.lift[s] = 0.07 * np.maximum(0, s * np.sin(4 * np.pi * at))
    p.pelvis[:, 1] -= 0.02


def _stretch(p: _Performance) -> None:
    weight = p.ready()
    lean = np.sin(2 * np.pi * p.cycles(2.4))
    for s in SIDES:
        p.move_hand(s, (-0.08, 0.48, 0.04), weight, elbow=(1, 0.1, -0.2), twist=0.3, curl=0.6)
        p.foot[s][:, 0] = 0.19
    p.spine[:, 2] += p.vary(0.55) * lean * weight
    p.hips[:, 2] += 0.10 * lean * weight
    p.pelvis[:, 0] += 0.05 * lean * weight


def _cross_arms(p: _Performance) -> None:
    weight = _through(p.once(1.3), (0, 0.0), (1, 1.0)) if p.rng.uniform() < 0.7 else np.ones_like(p.t)
    p.move_hand(RIGHT, (-0.22, -0.21, 0.20), weight, elbow=(0.7, -1, -0.1), twist=0.2, curl=0.5)
    p.move_hand(LEFT, (-0.20, -0.24, 0.25), weight, elbow=(0.7, -1, -0.1), twist=0.2, curl=0.5)
    p.spine[:, 0] -= 0.06 * weight


def _check_watch(p: _Performance) -> None:
    weight = _through(p.once(1.9), (0, 0.0), (0.35, 1.0), (0.7, 1.0), (1, 0.0))
    p.move_hand(LEFT, (-0.12, -0.12, 0.26), weight, elbow=(1, -0.6, 0), twist=1.0, curl=0.8)
    p.head[:, 0] += 0.45 * weight
    p.head[:, 1] += 0.15 * weight
    if p.rng.uniform() < 0.5:
        p.move_hand(RIGHT, (-0.14, -0.18, 0.28), weight, elbow=(0.8, -1, 0), curl=0.7)


def _golf_swing(p: _Performance) -> None:
    at = p.once(2.0)
    swing = _through(at, (0, 0.0), (0.4, 1.0), (0.5, 0.9), (0.72, -1.0), (1, -0.8))
    angle = 1.9 * swing  # of both hands about the chest, from straight down
    aside, up = 0.46 * np.sin(angle), -0.40 * np.cos(0.8 * angle)
    for s in SIDES:
        together = np.stack([-0.165 - s * 0.75 * aside, up, 0.34 - 0.08 * np.abs(np.sin(angle))], -1)
        p.move_hand(s, together, 1.0, elbow=(0.8, -0.6, -0.4), twist=0.3, curl=FIST)
        p.foot[s][:, 0] = 0.2
    p.spine[:, 1] -= 0.75 * swing
    p.hips[:, 1] -= 0.35 * swing
    p.spine[:, 0] += 0.35
    p.hips[:, 0] += 0.2
    p.pelvis[:, 1] -= 0.05
    p.pelvis[:, 2] -= 0.06
    p.head[:, 1] += 0.5 * swing * (at < 0.6)
    p.head[:, 0] += 0.25
    p.pitch[RIGHT] = 0.6 * np.clip(-swing, 0, 1)


def _side_step(p: _Performance) -> None:
    cycle = p.cycles(1.5)
    for s in SIDES:
        phase = (cycle + (0.5 if s == RIGHT else 0)) % 1
        out = _through(phase, (0, 0.0), (0.25, 1.0), (0.5, 0.0), (1, 0.0))
        moving = np.sin(2 * np.pi * phase) ** 2 * (phase < 0.5)
        p.foot[s][:, 0] = 0.10 + 0.32 * out
        p.lift[s] = 0.06 * moving
        p.pelvis[:, 0] += s * 0.14 * out
        p.move_hand(s, (0.42, 0.03, 0.12), out, elbow=(0.3, -1, -0.6), twist=0.8)
    p.pelvis[:, 1] -= 0.03


_WRITTEN: dict[str, tuple[Callable[[_Performance], None], float]] = {
    # name: (what writes it, how far it may face away from the camera, radians)
    "wave": (_wave, 0.8),
    "clap": (_clap, 0.9),
    "drink": (_drink, 1.0),
    "phone_call": (_phone_call, 1.0),
    "sit_down": (_sit_down, 1.1),
    "squat": (_squat, 1.3),
    "kick": (_kick, 1.4),
    "throw": (_throw, 1.3),
    "walk": (_walk, 1.6),
    "pick_up": (_pick_up, 1.3),
    "stand_up": (_stand_up, 1.1),
    "boxing": (_boxing, 1.3),
    "jumping_jack": (_jumping_jack, 0.8),
    "march": (_march, 1.4),
    "jog": (_jog, 1.6),
    "bow": (_bow, 1.4),
    "point": (_point, 0.9),
    "raise_arms": (_raise_arms, 1.0),
    "turn_around": (_turn_around, 1.5),
    "stretch": (_stretch, 0.7),
    "cross_arms": (_cross_arms, 0.9),
    "check_watch": (_check_watch, 0.9),
    "golf_swing": (_golf_swing, 1.0),
    "side_step": (_side_step, 0.7),
}


def _perform(name: str, rng: np.random.Generator, frames: int, fps: float) -> Pose:
    write, widest = _WRITTEN[name]
    performance = _Performance(rng, frames, fps)
    write(performance)
    pose = performance.solve()
    if rng.uniform() < 0.5:
        pose = mirror(pose)
    return turn(pose, rng.uniform(-widest, widest))


Action = Callable[[np.random.Generator, int, float], Pose]

ACTIONS: dict[str, Action] = {name: functools.partial(_perform, name) for name in _WRITTEN}
"""Every action: `ACTIONS[name](rng, frames, fps)` is a `Pose` of one performance, near the origin, on the floor y = 0.

Speed, amplitude, phase, handedness, stance, direction faced and sway are drawn from `rng`.
"""
PRIVATE_ACTIONS: dict[str, Action] = dict(list(ACTIONS.items())[:10])
"""The actions whose videos are to be protected."""
PUBLIC_ACTIONS: dict[str, Action] = dict(list(ACTIONS.items())[10:])
"""The others, for what may be learnt in public."""
SEATED = frozenset({"sit_down", "stand_up"})
"""The actions that need a seat where the pelvis is lowest."""
TRAVELLING = frozenset({"walk", "jog"})
"""The actions that leave the spot."""


def stand(rng: np.random.Generator, frames: int, fps: float) -> Pose:
    """Someone who stands there and does nothing."""
    return turn(_Performance(rng, frames, fps).solve(), rng.uniform(-1, 1))


def pelvis(pose: Pose) -> np.ndarray:
    """(T, 3) world position of the standard body's pelvis."""
    return pose.transl + _skeleton()[0][PELVIS]


def mirror(pose: Pose) -> Pose:
    """The same performance seen in a mirror: left and right exchanged."""
    flip = np.array([1, -1, -1], np.float32)
    swap = np.array([2, 1, 3, 5, 4, 6, 8, 7, 9, 11, 10, 12, 14, 13, 15, 17, 16, 19, 18, 21, 20]) - 1

    def hand(values: np.ndarray) -> np.ndarray:
        return (values.reshape(-1, 15, 3) * flip).reshape(-1, 45)

    return Pose(
        global_orient=pose.global_orient * flip,
        body_pose=(pose.body_pose.reshape(-1, 21, 3)[:, swap] * flip).reshape(-1, 63),
        transl=pose.transl * [-1, 1, 1],
        left_hand_pose=hand(pose.right_hand_pose),
        right_hand_pose=hand(pose.left_hand_pose),
        jaw_pose=pose.jaw_pose * flip,
    )


def turn(pose: Pose, angle: float) -> Pose:
    """The pose turned left by `angle` radians about the vertical through the world's origin."""
    rotation = Rotation.from_rotvec([0, angle, 0])
    return dataclasses.replace(
        pose,
        global_orient=(rotation * Rotation.from_rotvec(pose.global_orient)).as_rotvec(),
        transl=rotation.apply(pelvis(pose)) - _skeleton()[0][PELVIS],
    )


def move(pose: Pose, offset) -> Pose:
    """The pose moved by `offset` (3,) metres."""
    return dataclasses.replace(pose, transl=pose.transl + np.asarray(offset))


def join(first: Pose, second: Pose, overlap: int) -> Pose:
    """`second` after `first`, with `overlap` frames blended: len(first) + len(second) - overlap frames.

    `first` is moved along the floor so that it ends where `second` begins; blended frames keep a foot on the floor.
    """
    gap = (pelvis(second)[0] - pelvis(first)[-1]) * [1, 0, 1]
    first = move(first, gap)
    weight = (np.arange(overlap) + 1) / (overlap + 1)
    blended = {}
    for name in Pose.WIDTHS:
        a, b = getattr(first, name), getattr(second, name)
        end, start = a[len(a) - overlap :], b[:overlap]
        if name == "transl":
            middle = end + weight[:, None] * (start - end)
        else:
            share = np.repeat(weight, a.shape[1] // 3)[:, None]
            begin = Rotation.from_rotvec(end.reshape(-1, 3))
            turned = (begin.inv() * Rotation.from_rotvec(start.reshape(-1, 3))).as_rotvec()
            middle = (begin * Rotation.from_rotvec(share * turned)).as_rotvec().reshape(overlap, -1)
        blended[name] = np.concatenate([a[: len(a) - overlap], middle, b[overlap:]])
    pose = Pose(**blended)
    height = lowest(pose, _standard_body(), np.zeros(10))
    height[: len(first) - overlap] = height[len(first) :] = 0
    return move(pose, -height[:, None] * [0, 1, 0])


def fit_to_body(pose: Pose, body: Body, betas) -> Pose:
    """The pose for a body of another shape: steps scaled to its legs, and its soles at the height they had.

    The joint angles are unchanged; only `transl` is. `betas`: (10,).
    """
    standard = _skeleton()[0]
    rest = body.shaped(torch.as_tensor(betas, dtype=torch.float32))[1].cpu().numpy()
    ratio = np.ptp(rest[[1, 7], 1]) / np.ptp(standard[[1, 7], 1])
    scaled = dataclasses.replace(pose, transl=ratio * (pose.transl + standard[PELVIS]) - rest[PELVIS])
    rise = ratio * lowest(pose, _standard_body(), np.zeros(10)) - lowest(scaled, body, betas)
    return move(scaled, rise[:, None] * [0, 1, 0])


def lowest(pose: Pose, body: Body, betas) -> np.ndarray:
    """(T,) height of the lowest point of the feet, metres."""
    feet = body.weights[:, [7, 8, 10, 11]].sum(1) > 0.9
    vertices = body.shaped(torch.as_tensor(betas, dtype=torch.float32))[0][feet]
    return skin(vertices, body.weights[feet], _forward(pose, body, betas)[1])[..., 1].amin(1).cpu().numpy()


def joints(pose: Pose, body: Body, betas) -> np.ndarray:
    """(T, 55, 3) world joints; much cheaper than posing the whole body."""
    return _forward(pose, body, betas)[0].cpu().numpy()


def _forward(pose: Pose, body: Body, betas) -> tuple[torch.Tensor, torch.Tensor]:
    rest = body.shaped(torch.as_tensor(betas, dtype=torch.float32))[1]
    still = np.zeros((len(pose), 6), np.float32)  # the eyes
    parts = pose.global_orient, pose.body_pose, pose.jaw_pose, still, pose.left_hand_pose, pose.right_hand_pose
    rotations = Rotation.from_rotvec(np.concatenate(parts, 1).reshape(-1, 3)).as_matrix().reshape(-1, 55, 3, 3)
    return body.transforms(rest, torch.from_numpy(rotations).to(rest), torch.from_numpy(pose.transl).to(rest))
