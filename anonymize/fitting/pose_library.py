"""A library of random plausible poses, searched by silhouette: where the fit of a person's pose begins."""

import dataclasses
import functools
from collections.abc import Callable

import cv2
import numpy as np
import torch
from scipy.spatial.transform import Rotation

from anonymize.avatar.camera import Camera
from anonymize.fitting.skeleton import BODY_JOINTS
from anonymize.people.embedded.person_net import PAIRS

KEYPOINTS = (12, 16, 17, 18, 19, 20, 21, 1, 2, 4, 5, 7, 8)
"""SMPL-X joints of a person's keypoints (`person_net.JOINTS`) after the first, the nose, which is no joint."""

_SEED = 7
_SIDE, _MARGIN = 32, 2  # of the canvas on which silhouettes are compared, pixels
_IN_VIEW = (0.72, 0.55, 0.42, 0.3)  # share of the height in view, where the picture's lower edge cuts the person
_UNUSUAL = 0.1  # weight of the prior against overlap
_CUT = 0.08  # cost of taking the picture's lower edge to hide the rest of a body
_ELSEWHERE, _DEPTHS = 0.4, 0.15  # cost of another distance than usual, beyond a difference, in natural units
_OFTEN = 0.75  # of the frames; who is cut off more often is cut off in all, and an outline that ends above is wrong
_HIDDEN = 0.3  # cost a radian of bending legs that nobody sees
_CROSSED = 0.1  # cost, in extents, of taking a finder's left for right
_CANDIDATES = 40  # poses kept a frame
EDGE = 2  # pixels; who is this near to the picture's edge is taken to be cut off by it

SurfaceFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Angles (N, 66), pelvis first → surface points (N, P, 3), joints (N, 22, 3), nose (N, 3), without translation."""


def random_poses(count: int, seed: int = _SEED) -> np.ndarray:
    """Plausible body poses seen from all round: (count, 66) axis-angle, pelvis first, facing any way.

    Drawn from broad ranges of joint angles (standing, striding, kicking, squatting, sitting, bending, lying; each arm
    hanging or anywhere within reach), not from any recorded motion.
    """
    rng = np.random.default_rng(seed)
    angles = np.zeros((count, BODY_JOINTS, 3))
    kind = rng.choice(5, count, p=(0.5, 0.12, 0.14, 0.12, 0.12))  # upright, kick, squat or sit, bend, lie or fall
    side = rng.random(count) < 0.5

    def uniform(low, high, where=None):
        value = rng.uniform(low, high, count)
        return value if where is None else np.where(where, value, 0.0)

    def about(axis, angle):
        return Rotation.from_rotvec(np.eye(3)["xyz".index(axis)] * np.asarray(angle)[:, None])

    stride = uniform(-0.6, 0.6)
    for leg, sign in ((0, 1), (1, -1)):
        hip, knee = 1 + leg, 4 + leg
        lifted = (kind == 1) & (side == bool(leg))
        flexed = sign * stride * (kind != 2) + uniform(-0.1, 0.15)
        flexed += uniform(0.4, 1.7, lifted) + np.where(kind == 2, 0.6 + rng.random(count) * 1.2, 0.0)
        bend = np.abs(rng.normal(0, 0.3, count)) + uniform(0.0, 1.6, lifted) + uniform(0.5, 2.0, kind == 2)
        bend += uniform(0.0, 1.2, (kind == 4) & (rng.random(count) < 0.5))
        angles[:, hip, 0] = -flexed
        angles[:, hip, 2] = sign * (np.abs(rng.normal(0.04, 0.12, count)) + uniform(0.0, 0.6, lifted))
        angles[:, knee, 0] = bend
    bent = uniform(-0.05, 0.15) + uniform(0.3, 1.5, kind == 3) + uniform(0.0, 0.7, kind == 2)
    twist, lean = rng.normal(0, 0.12, count), rng.normal(0, 0.06, count)
    for joint in (3, 6, 9):
        angles[:, joint] = np.stack([bent / 3, twist / 3, lean / 3], 1)
    bow = uniform(0.0, 0.8, kind == 3)
    angles[:, 1:3, 0] -= bow[:, None]  # the pelvis tips forward and the legs stay
    angles[:, 15] = rng.normal(0, 0.12, (count, 3))

    for arm, sign in ((0, 1), (1, -1)):
        shoulder, elbow = 16 + arm, 18 + arm
        hanging = rng.random(count) < 0.45
        down = np.where(hanging, rng.uniform(1.1, 1.45, count), rng.uniform(-1.45, 1.4, count))
        forward = np.where(hanging, rng.normal(0, 0.3, count), rng.uniform(-0.3, 1.5, count))
        swing = about("y", -sign * forward * np.where(hanging, 0, 1))
        drop = about("z", -sign * down)
        pitch = about("x", -forward * hanging)
        roll = about("x", rng.uniform(-1.2, 0.6, count))
        angles[:, shoulder] = (pitch * swing * drop * roll).as_rotvec()
        flex = np.where(rng.random(count) < 0.5, rng.uniform(0, 0.5, count), rng.uniform(0.3, 2.4, count))
        angles[:, elbow, 1] = -sign * flex

    facing = about("y", rng.uniform(-np.pi, np.pi, count))
    tip = about("x", bow)
    fall = np.where(kind == 4, rng.uniform(0.5, 1.7, count), np.abs(rng.normal(0, 0.07, count)))
    way = rng.uniform(0, 2 * np.pi, count)
    tilt = Rotation.from_rotvec(np.stack([np.cos(way), np.zeros(count), np.sin(way)], 1) * fall[:, None])
    angles[:, 0] = (tilt * facing * tip).as_rotvec()
    return angles.reshape(count, -1).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Found:
    """A person's pose in every frame, as found in the library.

    Attributes:
        angles: (T, 66) axis-angle, pelvis first.
        transl: (T, 3) metres, world.
        extent: (T,) the longer side of the person's box, pixels.
    """

    angles: torch.Tensor
    transl: torch.Tensor
    extent: torch.Tensor


@dataclasses.dataclass(frozen=True)
class _View:
    """Silhouettes of the library's poses, orthographic, each scaled to fill the canvas.

    Attributes:
        shapes: (N, 32 * 32) float32, 0 or 1.
        centre: (N, 2) of the silhouette's box; metres from the model's origin, x right, y down.
        extent: (N,) metres, the box's longer side.
        keypoints: (N, 14, 2) relative to the centre, in extents.
    """

    shapes: torch.Tensor
    centre: torch.Tensor
    extent: torch.Tensor
    keypoints: torch.Tensor


class PoseLibrary:
    """`count` random poses of `body` and their silhouettes: whole, and cut off below as by a picture's lower edge."""

    @torch.no_grad()
    def __init__(self, body: SurfaceFunction, count: int):
        self.angles = torch.from_numpy(random_poses(count))
        parts = [body(angles) for angles in self.angles.split(500)]
        points, self.joints, nose = (torch.cat(part) for part in zip(*parts))
        flip = torch.tensor([1.0, -1.0])
        pelvis = torch.from_numpy(Rotation.from_rotvec(self.angles[:, :3].numpy()).as_matrix()).float()
        self._facing = pelvis[:, :, 2]
        self._legs = self.angles.view(-1, BODY_JOINTS, 3)[:, [1, 2, 4, 5]].norm(dim=-1).mean(1)
        self._prior = _prior(self._legs, pelvis)
        self._points = points[..., :2] * flip
        self._keypoints = keypoints(self.joints, nose)[..., :2] * flip
        self._whole = _view(self._points, self._keypoints, 1.0)

    @functools.cached_property
    def _cut(self) -> list[_View]:
        return [_view(self._points, self._keypoints, share) for share in _IN_VIEW]

    @torch.no_grad()
    def search(self, masks: np.ndarray, joints: np.ndarray | None, camera: Camera) -> Found:
        """The sequence of poses that overlaps `masks` (T, H, W) best and moves least (dynamic programming).

        Args:
            joints: (T, 14, 3) x, y in pixels and confidence, or None.
        """
        boxes = np.array([cv2.boundingRect(mask.view(np.uint8)) for mask in masks], np.float32)
        centre = torch.from_numpy(boxes[:, :2] + boxes[:, 2:] / 2)
        extent = torch.from_numpy(boxes[:, 2:].max(1))
        shapes = torch.stack([_normalised_mask(mask, *box) for mask, box in zip(masks, zip(centre, extent))])
        cut = boxes[:, 1] + boxes[:, 3] >= camera.height - EDGE
        cut |= cut.mean() > _OFTEN
        views = [self._whole, *self._cut] if cut.any() else [self._whole]
        costs = []
        for index, view in enumerate(views):
            inside = shapes @ view.shapes.T
            cost = self._prior + 1 - inside / (shapes.sum(1)[:, None] + view.shapes.sum(1) - inside)
            if joints is not None:
                cost += _keypoint_cost(torch.as_tensor(joints, dtype=torch.float32), centre, extent, view.keypoints)
            if index:
                cost = (cost + _CUT + _HIDDEN * self._legs).masked_fill(torch.from_numpy(~cut)[:, None], torch.inf)
            costs.append(cost)
        cost, candidate = torch.cat(costs, 1).topk(_CANDIDATES, largest=False)
        count = len(self.angles)
        pose = candidate % count
        metres = torch.cat([view.extent for view in views])[candidate]
        offset = torch.cat([view.centre for view in views])[candidate]

        depth = camera.focal * metres / extent[:, None]
        middle = (centre - torch.tensor([camera.width / 2, camera.height / 2]))[:, None] / camera.focal
        in_camera = torch.cat([middle * depth[..., None] - offset, depth[..., None]], -1)
        path = _best_path(cost, self.joints[pose], self._facing[pose], depth.log())[:, None]
        if cut.any():  # who is cut off is as far away as where they are seen whole, or else throughout
            whole = torch.from_numpy(~cut)
            far = _usual(cost, depth.log()) if cut.all() else depth.log().gather(1, path)[whole].median()
            cost = cost + _elsewhere(depth.log(), far)
            path = _best_path(cost, self.joints[pose], self._facing[pose], depth.log())[:, None]
        chosen = in_camera.gather(1, path[..., None].expand(-1, -1, 3))[:, 0]
        rotation, translation = (torch.as_tensor(x, dtype=torch.float32) for x in (camera.rotation, camera.translation))
        return Found(self.angles[pose.gather(1, path)[:, 0]], (chosen - translation) @ rotation, extent)


def _elsewhere(log_depth: torch.Tensor, usual: torch.Tensor) -> torch.Tensor:
    """What it costs to be at another distance than usual."""
    return _ELSEWHERE * ((log_depth - usual).abs() - _DEPTHS).relu()


def _usual(cost: torch.Tensor, log_depth: torch.Tensor) -> torch.Tensor:
    """The log distance at which poses fit best in all the frames together; costs and log depths (T, K)."""
    tried = torch.linspace(log_depth.min(), log_depth.max(), 20)
    return tried[torch.stack([(cost + _elsewhere(log_depth, far)).amin(1).sum() for far in tried]).argmin()]


def _prior(legs: torch.Tensor, pelvis: torch.Tensor) -> torch.Tensor:
    """What a pose with so bent `legs` (N,), radians, costs beforehand (N,): people mostly stand upright and face the
    camera (silhouettes cannot tell)."""
    up, front = pelvis[:, 1, 1], pelvis[:, 2, 2]
    return _UNUSUAL * (0.5 * (1 - up) + 0.25 * (1 - front) + 0.3 * legs)


def _view(points: torch.Tensor, keypoints: torch.Tensor, share: float) -> _View:
    """Silhouettes of points (N, P, 2), x right and y down, of which the upper `share` of the height is in view."""
    top, height = points[..., 1].amin(1), points[..., 1].amax(1) - points[..., 1].amin(1)
    shown = points[..., 1] <= (top + share * height)[:, None] + 1e-6
    hidden = ~shown[..., None]
    low = points.masked_fill(hidden, torch.inf).amin(1)
    high = points.masked_fill(hidden, -torch.inf).amax(1)
    centre, extent = (low + high) / 2, (high - low).amax(1)
    fine = 2 * _SIDE  # points would fatten a silhouette drawn at the canvas's own resolution
    scale = (fine - 4 * _MARGIN) / extent
    cell = ((points - centre[:, None]) * scale[:, None, None] + fine / 2).long().clamp_(0, fine - 1)
    canvas = torch.zeros(len(points), fine * fine + 1, dtype=torch.uint8)
    canvas.scatter_(1, torch.where(shown, cell[..., 1] * fine + cell[..., 0], fine * fine), 255)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    drawn = canvas[:, :-1].reshape(-1, fine, fine).numpy()
    closed = (cv2.morphologyEx(shape, cv2.MORPH_CLOSE, kernel) for shape in drawn)
    small = np.stack([cv2.resize(shape, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA) for shape in closed])
    shapes = torch.from_numpy((small >= 128).astype(np.float32)).flatten(1)
    keypoints = (keypoints - centre[:, None]) / extent[:, None, None]
    return _View(shapes, centre, extent, keypoints)


def _normalised_mask(mask: np.ndarray, centre: torch.Tensor, extent: torch.Tensor) -> torch.Tensor:
    """A mask (H, W) moved and scaled to fill the canvas as the library's silhouettes do: (32 * 32,), 0 or 1."""
    scale = float((_SIDE - 2 * _MARGIN) / extent)
    shift = _SIDE / 2 - scale * centre.numpy()
    smooth = cv2.blur(mask.astype(np.float32), (2 * int(0.5 / scale) + 1,) * 2)
    matrix = np.array([[scale, 0, shift[0] - 0.5 + scale / 2], [0, scale, shift[1] - 0.5 + scale / 2]], np.float32)
    small = cv2.warpAffine(smooth, matrix, (_SIDE, _SIDE))
    return torch.from_numpy((small >= 0.5).astype(np.float32)).flatten()


def _keypoint_cost(joints: torch.Tensor, centre: torch.Tensor, extent: torch.Tensor, library: torch.Tensor):
    """Mean distance (T, N) between found and library keypoints, in extents, weighted by confidence.

    A finder sees well where a limb is and less well whose left it is: each pair counts the way round that fits.
    """
    found = (joints[..., :2] - centre[:, None]) / extent[:, None, None]
    weight = joints[..., 2].clamp(0, 1)
    found = found.masked_fill(weight[..., None] == 0, 0.0)

    def cost(k: int, of: int) -> torch.Tensor:
        return weight[:, k, None] * torch.cdist(found[:, k], library[:, of]).clamp_max(0.5)

    total = cost(0, 0) + cost(1, 1)
    for left, right in PAIRS:
        crossed = cost(left, right) + cost(right, left) + _CROSSED * weight[:, [left, right]].sum(1, keepdim=True)
        total += torch.minimum(cost(left, left) + cost(right, right), crossed)
    return 3 * total / found.shape[1]


def keypoints(joints: torch.Tensor, nose: torch.Tensor) -> torch.Tensor:
    """The keypoints (N, 14, 3) of bodies with joints (N, 22, 3) and noses (N, 3)."""
    return torch.cat([nose[:, None], joints[:, KEYPOINTS]], 1)


def uncrossed(joints: torch.Tensor, posed: torch.Tensor) -> torch.Tensor:
    """Found keypoints (T, 14, 3) with every pair the way round that is nearer to those of a pose, (T, 14, 2) pixels."""
    joints = joints.clone()
    for pair in PAIRS:
        here, there = joints[:, pair, :2], posed[:, pair]
        turned = (here.flip(1) - there).norm(dim=2).sum(1) < (here - there).norm(dim=2).sum(1)
        joints[:, pair] = torch.where(turned[:, None, None], joints[:, pair].flip(1), joints[:, pair])
    return joints


def _best_path(cost: torch.Tensor, joints: torch.Tensor, facing: torch.Tensor, log_depth: torch.Tensor):
    """Viterbi: candidate of each frame (T,); costs (T, K), joints (T, K, 22, 3), facing (T, K, 3), log depth (T, K).

    Small changes are free: the library is coarse, and the refinement smooths.
    """
    frames = len(cost)
    total, came_from = cost[0], []
    for t in range(1, frames):
        moved = torch.cdist(joints[t - 1].flatten(1), joints[t].flatten(1)) / BODY_JOINTS**0.5
        turned = 1 - facing[t - 1] @ facing[t].T
        nearer = (log_depth[t - 1][:, None] - log_depth[t]).abs()
        step = 0.3 * (moved - 0.15).relu() + 0.2 * (turned - 0.3).relu() + (nearer - 0.05).clamp(0, 1)
        best, origin = (total[:, None] + step).min(0)
        total = best + cost[t]
        came_from.append(origin)
    path = [int(total.argmin())]
    for origin in reversed(came_from):
        path.append(int(origin[path[-1]]))
    return torch.tensor(path[::-1])
