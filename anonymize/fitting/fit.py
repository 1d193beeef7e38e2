"""SMPL-X poses of a tracked person.

1. *Start*: from metric landmarks by inverse kinematics in closed form (`landmarks`, `inverse_kinematics`, `placement`);
   for who has none, from the library pose whose silhouette and joints fit best (`pose_library`).
2. *Refinement*: gradient steps over all frames at once onto landmarks and silhouettes in the picture (`refinement`).
3. *Hands*: from hand landmarks in closed form (`fingers`), relaxed where they are not seen.

The body's shape is the avatar's and never the person's, so the person's size becomes the avatar's distance.
"""

import dataclasses
import functools
import itertools

import cv2
import numpy as np
import torch
from scipy.spatial.transform import Rotation

from anonymize.avatar.body import Body
from anonymize.avatar.camera import Camera
from anonymize.avatar.pose import Pose
from anonymize.avatar.render import silhouette
from anonymize.avatar.wardrobe import Avatar
from anonymize.fitting import fingers, landmarks
from anonymize.fitting import inverse_kinematics as ik
from anonymize.fitting.placement import place
from anonymize.fitting.pose_library import KEYPOINTS, PoseLibrary, keypoints, uncrossed
from anonymize.fitting.refinement import Evidence, Outlines, refine
from anonymize.fitting.skeleton import BODY_JOINTS, Skeleton, local, world
from anonymize.fitting.smoothing import smoothed, stiffness
from anonymize.people import Landmarks, Person
from maskdp import config as settings

_LIBRARY_POINTS = 1200
_VISIBLE = (0.05, 0.5)  # visibility at which a landmark begins to count, and counts fully
_ALONE = 3.0  # weight of a silhouette where there are no landmarks
_KNUCKLES = 0.3  # weight of the body's knuckle landmarks for the turn of a hand, against those of the hand model
_CHUNK, _OVERLAP = 256, 16  # frames refined at once, and those refined twice where chunks meet
_EVERY = 10  # frames between two measurements of the overlap where there are landmarks
_FEET = (27, 28, 29, 30, 31, 32)  # landmarks
_ENDS = {15: 3.0, 16: 3.0, 27: 2.0, 28: 2.0}  # weights in the refinement: hands shall reach what they reached
_PLANTED = (0.12, 0.3)  # extents a second: a foot that moves slower stands, one that moves faster does not
_FOOT_CUTOFF = 3.0  # Hz, for their speed


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How poses are fitted.

    Attributes:
        library: number of random poses searched for people without landmarks.
        steps: gradient steps of the refinement.
        iou_floor: a frame without landmarks gets no avatar where the silhouettes overlap less.
        max_gap: as many frames in which a person was lost from view are interpolated.
    """

    library: int = 4000
    steps: int = 40
    iou_floor: float = 0.35
    max_gap: int = 8

    def __post_init__(self):
        settings.positive(self, "library", "steps", "iou_floor")


@dataclasses.dataclass(frozen=True)
class Fit:
    """A person's poses.

    Attributes:
        pose: SMPL-X parameters in every frame; of no meaning where `ok` is False.
        ok: (T,) bool, whether the avatar is to be shown.
        iou: (T,) float32, overlap of the fitted and the found silhouette inside the picture; NaN where it was not
            measured.
    """

    pose: Pose
    ok: np.ndarray
    iou: np.ndarray


class Fitter:
    """Fits poses of one body model.

    Args:
        body: the body model.
        config: how to fit.
    """

    def __init__(self, body: Body, config: FitConfig | None = None):
        self.body = body
        self.config = config or FitConfig()

    @functools.cached_property
    def _library(self) -> PoseLibrary:
        bare = Skeleton(self.body, torch.zeros(10), (self.body.template, self.body.weights), _LIBRARY_POINTS)

        def posed(angles: torch.Tensor):
            turned = torch.from_numpy(_world(angles.numpy())).float()
            joints, marks = bare.posed(turned, torch.zeros(len(angles), 3))
            return bare.surface(turned, joints), joints, marks[:, 0]

        return PoseLibrary(posed, self.config.library)

    def __call__(self, person: Person, camera: Camera, avatar: Avatar, fps: float = 25.0) -> Fit:
        """Poses of `avatar`: what `person` does, where they did it.

        Deterministic. Sees the person's masks, joints and landmarks alone, no pixel of the video.
        """
        total = len(person.present)
        marked, masks = np.zeros(total, bool), person.masks
        if person.landmarks is not None:
            torso = ik.directions(person.landmarks.world, np.ones((total, 33)))[0]["torso"]
            marked = person.present & landmarks.credible(torso, fps)
            masks = masks & (marked | np.isnan(torso).any(1))[:, None, None]
        outlined = person.present & masks.any((1, 2))
        iou = np.full(total, np.nan, np.float32)
        if not (outlined | marked).any():
            return Fit(Pose.rest(total), np.zeros(total, bool), iou)
        skeleton = Skeleton.of(avatar)
        if marked.any():
            times = np.arange(total)
            start = _from_landmarks(skeleton, person.landmarks, masks, marked, camera, fps)
            seen, weights = _landmarks_seen(person.landmarks, marked, skeleton)
        else:
            times = np.flatnonzero(outlined)
            found = self._library.search(np.ascontiguousarray(masks[times]), person.joints[times], camera)
            start = _world(found.angles.numpy()), found.transl.numpy().astype(float)
            seen, weights = _joints_seen(person.joints[times], skeleton, *start, camera)
        turned, transl = _refined(
            skeleton, *start, seen, weights, masks[times], marked[times], camera, fps, self.config
        )
        hands = (
            _hands(skeleton, person.landmarks, marked, camera, fps) if marked.any() else _relaxed(skeleton, len(times))
        )
        pose = _pose(turned, transl, hands, skeleton)
        measured = outlined[times] & (~marked[times] | (times % _EVERY == 0))
        iou[times[measured]] = _overlap(pose, avatar, masks[times], np.flatnonzero(measured), camera)
        good = marked | (iou >= self.config.iou_floor)
        refused = np.isfinite(iou) & ~good & ~marked.any()  # landmarks before and after tell more than a mask
        pose, ok = _fill_gaps(pose, times, good, refused, self.config.max_gap)
        return Fit(pose, ok, iou)


# ---------------------------------------------------------------- the start


def _from_landmarks(
    skeleton: Skeleton, marks: Landmarks, masks: np.ndarray, marked: np.ndarray, camera: Camera, fps: float
) -> tuple[np.ndarray, np.ndarray]:
    """World rotations (T, 22, 3, 3) and translations (T, 3) in all frames; those without landmarks go on as their
    neighbours do, in the middle of the mask where there is one."""
    visible = _confidence(marks.image[..., 2])
    turn = landmarks.to_world(marks.image, camera)
    points = np.where(marked[:, None, None], marks.world.astype(float) @ turn, np.nan)
    toward, seen = ik.directions(points, visible)
    for side in (0, 1):
        palm = fingers.palm(marks.hands[:, side].astype(float) @ turn)
        sure = np.where(np.isfinite(palm).all((1, 2)), marks.hands_seen[:, side], 0.0)
        for column, name in enumerate((f"hand{side}", f"palm{side}")):
            toward[name] = np.where(sure[:, None] > 0, palm[..., column], toward[name])
            seen[name] = np.maximum(sure, _KNUCKLES * seen[name] * (sure == 0))
    turned = ik.solve(skeleton, landmarks.steady(toward, seen, fps))
    posed = _posed(skeleton, turned, np.zeros((len(turned), 3)))
    pixels, weights = _landmarks_seen(marks, marked, skeleton)
    transl = place(posed, pixels, weights, camera, fps)
    for t in np.flatnonzero(~marked & masks.any((1, 2))):
        rows, columns = np.nonzero(masks[t])
        there = camera.project(torch.from_numpy(posed[t] + transl[t])).mean(0).numpy()
        aside = np.append([columns.mean() + 0.5, rows.mean() + 0.5] - there, 0.0) / camera.focal
        depth = abs(float(camera.to_camera(torch.from_numpy(transl[t]))[2]))
        transl[t] += aside * depth @ camera.rotation
    return turned, transl


def _confidence(visibility: np.ndarray) -> np.ndarray:
    return ik.smoothstep(np.nan_to_num(visibility.astype(float)), *_VISIBLE)


def _landmarks_seen(marks: Landmarks, marked: np.ndarray, skeleton: Skeleton) -> tuple[np.ndarray, np.ndarray]:
    """Where the skeleton's landmarks are seen (T, K, 2), and their weights (T, K): knuckles have none, since those of
    the body model are vague."""
    image = marks.image[:, skeleton.landmarks]
    weights = _confidence(image[..., 2]) * np.isfinite(image[..., :2]).all(-1) * marked[:, None]
    weights[:, np.isin(skeleton.landmarks, (17, 18, 19, 20))] = 0
    return np.nan_to_num(image[..., :2].astype(float)), weights


def _joints_seen(
    joints: np.ndarray, skeleton: Skeleton, turned: np.ndarray, transl: np.ndarray, camera: Camera
) -> tuple[np.ndarray, np.ndarray]:
    """The same of a finder's 14 joints (T, 14, 3), every pair of them the way round that is nearer to the start."""
    posed, marks = skeleton.posed(torch.from_numpy(turned).float(), torch.from_numpy(transl).float())
    there = camera.project(keypoints(posed, marks[:, 0]))
    joints = uncrossed(torch.as_tensor(joints, dtype=torch.float32), there).numpy()
    seen, weights = np.zeros((len(joints), 33, 2)), np.zeros((len(joints), 33))
    for index, joint in enumerate((0, *KEYPOINTS)):
        mark = {16: 11, 17: 12, 18: 13, 19: 14, 20: 15, 21: 16, 1: 23, 2: 24, 4: 25, 5: 26, 7: 27, 8: 28, 0: 0}.get(
            joint
        )
        if mark is not None:
            seen[:, mark] = joints[:, index, :2]
            weights[:, mark] = joints[:, index, 2].clip(0, 1) ** 2
    seen[weights == 0] = 0
    return seen[:, skeleton.landmarks], weights[:, skeleton.landmarks]


# ---------------------------------------------------------------- the refinement


def _refined(skeleton, turned, transl, seen, weights, masks, marked, camera, fps, config):
    """The start refined, in chunks that overlap, so that memory does not grow with the clip."""
    posed = _posed(skeleton, turned, transl)
    pixels = camera.project(torch.from_numpy(posed)).numpy()
    extent = np.ptp(pixels, axis=1).max(1).clip(8, None)
    planted = _planted(skeleton, seen, weights, extent, fps)
    weights = weights * [_ENDS.get(landmark, 1.0) for landmark in skeleton.landmarks]
    out = turned.copy(), transl.copy()
    for begin in range(0, len(turned), _CHUNK):
        part = slice(max(begin - _OVERLAP, 0), begin + _CHUNK + _OVERLAP)
        links = slice(part.start, min(part.stop, len(turned)) - 1)
        evidence = Evidence(
            *(torch.from_numpy(values[part]).float() for values in (seen, weights)),
            torch.from_numpy(planted[links]).float(),
            torch.from_numpy(extent[part]).float(),
            Outlines.of(masks[part], np.where(marked[part], 1.0, _ALONE)) if masks[part].any() else None,
        )
        found = refine(skeleton, turned[part], transl[part], evidence, camera, config.steps)
        for target, values in zip(out, found):
            target[begin : begin + _CHUNK] = values[begin - part.start :][:_CHUNK]
    return out


def _planted(skeleton: Skeleton, seen: np.ndarray, weights: np.ndarray, extent: np.ndarray, fps: float) -> np.ndarray:
    """Whether a landmark of a foot stays in its place from one frame to the next, (T - 1, K) 0..1."""
    planted = np.zeros((len(seen) - 1, seen.shape[1]))
    for k in np.flatnonzero(np.isin(skeleton.landmarks, _FEET)):
        known = weights[:, k] > 0
        if known.any():
            path = smoothed(seen[:, k], known.astype(float), stiffness(_FOOT_CUTOFF, fps))
            speed = np.linalg.norm(np.diff(path, axis=0), axis=1) * fps / extent[1:]
            planted[:, k] = (1 - ik.smoothstep(speed, *_PLANTED)) * np.minimum(weights[1:, k], weights[:-1, k])
    return planted


def _posed(skeleton: Skeleton, turned: np.ndarray, transl: np.ndarray) -> np.ndarray:
    """The skeleton's landmarks (T, K, 3)."""
    return skeleton.posed(torch.from_numpy(turned).float(), torch.from_numpy(transl).float())[1].numpy().astype(float)


# ---------------------------------------------------------------- the pose


def _hands(skeleton: Skeleton, marks: Landmarks, marked: np.ndarray, camera: Camera, fps: float) -> list[np.ndarray]:
    """Finger rotations (T, 45) of the left and the right hand."""
    out = []
    for side in (0, 1):
        rest, seen = skeleton.hands[side].astype(float), np.where(marked, marks.hands_seen[:, side], 0.0)
        known = (seen > 0) & np.isfinite(marks.hands[:, side]).all((1, 2))
        angles = np.full((len(seen), 45), np.nan)
        if known.any():
            angles[known] = fingers.bends(marks.hands[known, side].astype(float) * [1, -1, -1], rest, side)
        out.append(fingers.steady(angles, seen, fingers.relaxed(rest, side), fps))
    return out


def _relaxed(skeleton: Skeleton, count: int) -> list[np.ndarray]:
    return [np.tile(fingers.relaxed(skeleton.hands[side].astype(float), side), (count, 1)) for side in (0, 1)]


def _pose(turned: np.ndarray, transl: np.ndarray, hands: list[np.ndarray], skeleton: Skeleton) -> Pose:
    angles = ik.rotvec(local(turned, skeleton.parents[:BODY_JOINTS])).reshape(len(turned), -1)
    body = {"global_orient": angles[:, :3], "body_pose": angles[:, 3:], "transl": transl}
    return Pose(**{**Pose.rest(len(turned)).arrays(), **body, "left_hand_pose": hands[0], "right_hand_pose": hands[1]})


def _world(angles: np.ndarray) -> np.ndarray:
    """Angles (N, 66), pelvis first → world rotations (N, 22, 3, 3)."""
    return world(ik.matrix(angles.reshape(len(angles), BODY_JOINTS, 3).astype(float)), _PARENTS)


_PARENTS = np.array([-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19])  # SMPL-X, 22 joints


def _overlap(pose: Pose, avatar: Avatar, masks: np.ndarray, times: np.ndarray, camera: Camera) -> np.ndarray:
    """Intersection over union of the avatar's silhouette and the mask at these times, at reduced resolution."""
    small = camera.scaled(min(1.0, 96 / max(camera.width, camera.height)))
    overlap = []
    for t in times:
        mine = silhouette(avatar.mesh(pose[t : t + 1]).vertices[0], avatar.faces, small).numpy()
        theirs = cv2.resize(masks[t].astype(np.float32), mine.shape[::-1], interpolation=cv2.INTER_AREA) >= 0.5
        overlap.append((mine & theirs).sum() / max((mine | theirs).sum(), 1))
    return np.array(overlap, np.float32)


def _fill_gaps(
    fitted: Pose, times: np.ndarray, good: np.ndarray, refused: np.ndarray, max_gap: int
) -> tuple[Pose, np.ndarray]:
    """Poses and `ok` of all frames from those fitted at `times`: gaps of at most `max_gap` frames between two good ones
    are shown too, but for refused frames; poses that were not fitted are interpolated."""
    total = len(good)
    frames, shown = np.arange(total), np.flatnonzero(good)
    ok = good.copy()
    for before, after in itertools.pairwise(shown):
        if after - before - 1 <= max_gap:
            ok[before:after] = ~refused[before:after]
    left = np.clip(np.searchsorted(times, frames, side="right") - 1, 0, None)
    right = np.clip(left + 1, None, len(times) - 1)
    between = (frames > times[left]) & (frames < times[right])
    weight = np.where(between, (frames - times[left]) / np.maximum(times[right] - times[left], 1), 0.0)
    values = {}
    for name, value in fitted.arrays().items():
        a, b = value[left], value[right]
        if name == "transl":
            values[name] = a + weight[:, None] * (b - a)
        else:  # along the shortest rotation from a to b
            turn = (_rotation(a).inv() * _rotation(b)).as_rotvec() * np.repeat(weight, value.shape[1] // 3)[:, None]
            values[name] = (_rotation(a) * Rotation.from_rotvec(turn)).as_rotvec().reshape(total, -1)
    return Pose(**values), ok


def _rotation(angles: np.ndarray) -> Rotation:
    return Rotation.from_rotvec(angles.reshape(-1, 3).astype(np.float64))
