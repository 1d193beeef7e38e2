"""SMPL-X poses of a tracked person from silhouettes, and from 2-D joints where the finder gives them.

1. *Search*: the poses of a library whose silhouettes overlap the person's best and move least (`pose_library`).
2. *Refinement*: gradient steps move a few hundred points of the dressed avatar's surface into the silhouette and over
   all of it, and joints onto joints, smoothly in time.

The body's shape is the avatar's and never the person's, so the person's size becomes the avatar's distance.
"""

import dataclasses
import functools

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation
from smplx.lbs import batch_rigid_transform, batch_rodrigues

from anonymize.avatar.body import Body
from anonymize.avatar.camera import Camera
from anonymize.avatar.pose import Pose
from anonymize.avatar.render import silhouette
from anonymize.avatar.wardrobe import Avatar
from anonymize.fitting.pose_library import BODY_JOINTS, Found, PoseLibrary, keypoints, uncrossed
from anonymize.people import Person
from maskdp import config as settings

_LIBRARY_POINTS, _POINTS = 1200, 400
_TARGETS = 320  # pixels of a silhouette that must have a surface point near
_NOSE = 55  # in BodyMesh.joints

# How readily each of the 21 body joints leaves the library's pose: limbs freely, trunk, feet and collars hardly.
_STIFFNESS = torch.tensor([0.3, 0.3, 3, 0.3, 0.3, 3, 4, 4, 3, 6, 6, 4, 4, 4, 4, 0.15, 0.15, 0.15, 0.15, 4, 4])


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How poses are fitted.

    Attributes:
        library: number of random poses searched.
        steps: gradient steps of the refinement.
        iou_floor: a frame whose fitted silhouette overlaps the person's less gets no avatar.
        max_gap: as many frames in which a person was lost from view are interpolated.
    """

    library: int = 4000
    steps: int = 60
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
        iou: (T,) float32, overlap of the fitted and the found silhouette inside the picture; NaN where the person was
            not seen.
    """

    pose: Pose
    ok: np.ndarray
    iou: np.ndarray


class SilhouetteFitter:
    """Fits poses of one body model. The first call makes the pose library.

    Args:
        body: the body model.
        config: how to fit.
    """

    def __init__(self, body: Body, config: FitConfig | None = None):
        self.body = body
        self.config = config or FitConfig()
        nose = body(torch.zeros(10), Pose.rest(1)).joints[0, _NOSE]
        self._nose = (body.template - nose).square().sum(1).argmin()

    @functools.cached_property
    def _library(self) -> PoseLibrary:
        bare = self.body.template, self.body.weights
        return PoseLibrary(_Surface(self.body, torch.zeros(10), bare, self._nose, _LIBRARY_POINTS), self.config.library)

    def __call__(self, person: Person, camera: Camera, avatar: Avatar) -> Fit:
        """Poses of `avatar`: where `person` stood, its clothed outline as near to the person's as it comes.

        Deterministic. Sees the person's masks and joints alone, no pixel of the video.
        """
        total = len(person.present)
        seen = np.flatnonzero(person.present & person.masks.any((1, 2)))
        iou = np.full(total, np.nan, np.float32)
        if not len(seen):
            return Fit(Pose.rest(total), np.zeros(total, bool), iou)
        masks = np.ascontiguousarray(person.masks[seen])
        joints = None if person.joints is None else person.joints[seen]
        found = self._library.search(masks, joints, camera)
        surface = _Surface(self.body, avatar.betas, avatar.skinned, self._nose, _POINTS)
        fitted = _refine(surface, found, seen, masks, joints, camera, self.config.steps)
        iou[seen] = _overlap(fitted, avatar, masks, camera)
        pose, ok = _fill_gaps(fitted, seen, iou[seen] >= self.config.iou_floor, total, self.config.max_gap)
        return Fit(pose, ok, iou)


def _overlap(pose: Pose, avatar: Avatar, masks: np.ndarray, camera: Camera) -> np.ndarray:
    """Intersection over union (T,) of the avatar's silhouette and `masks`, at reduced resolution."""
    small = camera.scaled(min(1.0, 96 / max(camera.width, camera.height)))
    overlap = []
    for t, mask in enumerate(masks):
        mine = silhouette(avatar.mesh(pose[t : t + 1]).vertices[0], avatar.faces, small).numpy()
        theirs = cv2.resize(mask.astype(np.float32), mine.shape[::-1], interpolation=cv2.INTER_AREA) >= 0.5
        overlap.append((mine & theirs).sum() / max((mine | theirs).sum(), 1))
    return np.array(overlap, np.float32)


class _Surface:
    """`count` points of a skinned surface on a body of fixed shape, with 22 joints; hands and jaw stay at rest.

    Args:
        skinned: the surface in the rest pose (V, 3), and its weights (V, 55).
        nose: number of the body's vertex that is the keypoint.
    """

    def __init__(self, body: Body, betas: torch.Tensor, skinned: tuple[torch.Tensor, torch.Tensor], nose, count: int):
        vertices, joints = body.shaped(betas)
        points, weights = skinned
        chosen = _spread(points, count)
        points = torch.cat([points[chosen], vertices[nose][None]])
        weights = torch.cat([weights[chosen], body.weights[nose][None]])
        for joint, carried in ((15, slice(22, 25)), (20, slice(25, 40)), (21, slice(40, 55))):
            weights[:, joint] += weights[:, carried].sum(1)  # head, wrists
        self._points, self._weights = points, weights[:, :BODY_JOINTS]
        self._joints, self._parents = joints[:BODY_JOINTS], body.parents[:BODY_JOINTS]

    def __call__(self, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Angles (N, 66), pelvis first → surface points (N, P, 3), joints (N, 22, 3), nose (N, 3); no translation."""
        count = len(angles)
        rotations = batch_rodrigues(angles.reshape(-1, 3)).view(count, BODY_JOINTS, 3, 3)
        joints, matrices = batch_rigid_transform(rotations, self._joints.expand(count, -1, -1), self._parents)
        blended = (self._weights @ matrices[:, :, :3].flatten(2)).unflatten(-1, (3, 4))
        points = (blended[..., :3] * self._points[:, None]).sum(-1) + blended[..., 3]
        return points[:, :-1], joints, points[:, -1]


def _spread(points: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of `count` evenly spread points, in farthest-point order, so that any prefix is evenly spread too."""
    chosen = torch.zeros(count, dtype=torch.long)
    distance = torch.full((len(points),), torch.inf)
    for i in range(1, count):
        distance = torch.minimum(distance, (points - points[chosen[i - 1]]).square().sum(1))
        chosen[i] = distance.argmax()
    return chosen


def _refine(
    surface: _Surface,
    found: Found,
    times: np.ndarray,
    masks: np.ndarray,
    joints: np.ndarray | None,
    camera: Camera,
    steps: int,
) -> Pose:
    """Adam on the sum of: surface outside the mask, mask without surface, joints off, unrest in time, change of pose.

    Lengths in the picture are measured in extents of the person, so that no weight depends on the resolution.
    """
    outside, targets = _distance_maps(masks), _mask_pixels(masks)
    extent = found.extent[:, None]
    size = torch.tensor([camera.width, camera.height], dtype=torch.float32)
    if joints is not None:
        with torch.no_grad():
            _, body_joints, nose = surface(found.angles)
            posed = camera.project(keypoints(body_joints, nose) + found.transl[:, None])
            joints = uncrossed(torch.as_tensor(joints, dtype=torch.float32), posed)
        confidence = joints[..., 2].clamp(0, 1)
        joints = joints[..., :2].masked_fill(confidence[..., None] == 0, 0.0)
    adjacent = torch.from_numpy(np.diff(times) == 1).float()[:, None, None]
    smooth = adjacent[1:] * adjacent[:-1]
    stiffness = _STIFFNESS[:, None]

    # One unit of each variable is a comparable step: radians, and translation in hundredths of the distance.
    distance = camera.to_camera(found.transl)[:, 2:].abs()
    turn, shift = (torch.zeros_like(start, requires_grad=True) for start in (found.angles, found.transl))
    adam = _Adam([turn, shift], [0.06, 0.15])
    for step in range(steps):
        angles, transl = found.angles + turn, found.transl + 0.1 * shift * distance
        points, body_joints, nose = surface(angles)
        pixels = camera.project(points + transl[:, None])
        grid = (2 * pixels / size - 1).clamp(-1, 1)
        off = F.grid_sample(outside, grid[:, :, None], align_corners=False, padding_mode="border")[:, 0, :, 0] / extent
        with torch.no_grad():
            nearest = torch.cdist(targets, pixels).argmin(2, keepdim=True).expand(-1, -1, 2)
        gap = (targets - pixels.gather(1, nearest)).square().sum(2) / extent.square()
        loss = 12 * off.mean(1).sum() + 120 * off.square().mean(1).sum()
        loss = loss + 12 * (gap + 1e-8).sqrt().mean(1).sum() + 120 * gap.mean(1).sum()
        if joints is not None:
            posed = camera.project(keypoints(body_joints, nose) + transl[:, None])
            error = ((posed - joints) / extent[..., None]).square().sum(2)
            loss = loss + 0.8 * (confidence.square() * (error / (error + 0.06))).mean(1).sum()
        placed = body_joints + transl[:, None]
        velocity = placed[1:] - placed[:-1]
        loss = loss + 0.1 * (adjacent * velocity).square().sum(2).mean(1).sum()
        loss = loss + (smooth * (velocity[1:] - velocity[:-1])).square().sum(2).mean(1).sum()
        change = turn.view(len(turn), BODY_JOINTS, 3).square()
        loss = loss + 0.03 * (stiffness * change[:, 1:]).sum() + 0.05 * change[:, 0].sum()
        adam.step(torch.autograd.grad(loss, [turn, shift]), 0.55 + 0.45 * np.cos(np.pi * step / steps))
    angles, transl = (found.angles + turn).detach().numpy(), (found.transl + 0.1 * shift * distance).detach().numpy()
    rest = Pose.rest(len(angles)).arrays()
    return Pose(**{**rest, "global_orient": angles[:, :3], "body_pose": angles[:, 3:], "transl": transl})


class _Adam:
    """Kingma and Ba, arXiv 1412.6980, with β = (0.9, 0.95). (`torch.optim` alone takes seconds to import.)"""

    def __init__(self, parameters: list[torch.Tensor], rates: list[float]):
        self._states = [(p, rate, torch.zeros_like(p), torch.zeros_like(p)) for p, rate in zip(parameters, rates)]
        self._count = 0

    @torch.no_grad()
    def step(self, gradients: tuple[torch.Tensor, ...], factor: float) -> None:
        """One update, at `factor` times the learning rates."""
        self._count += 1
        for (parameter, rate, mean, square), gradient in zip(self._states, gradients):
            mean.lerp_(gradient, 0.1)
            square.lerp_(gradient.square(), 0.05)
            size = (square / (1 - 0.95**self._count)).sqrt_().add_(1e-8)
            parameter.addcdiv_(mean, size, value=-factor * rate / (1 - 0.9**self._count))


def _distance_maps(masks: np.ndarray) -> torch.Tensor:
    """Masks (T, H, W) → (T, 1, H, W) float32: pixels to the nearest pixel of the mask, 0 inside."""
    maps = [cv2.distanceTransform((~mask).view(np.uint8), cv2.DIST_L2, 3) for mask in masks]
    return torch.from_numpy(np.stack(maps))[:, None]


def _mask_pixels(masks: np.ndarray) -> torch.Tensor:
    """For each mask `_TARGETS` of its pixel centres, half of them on its contour: (T, n, 2), x then y."""
    rng = np.random.default_rng(0)

    def drawn(mask: np.ndarray) -> np.ndarray:
        rim = mask & ~cv2.erode(mask.view(np.uint8), np.ones((3, 3), np.uint8), borderValue=1).view(bool)
        picks = [np.argwhere(part) for part in (rim if rim.any() else mask, mask)]
        return np.concatenate([points[rng.integers(len(points), size=_TARGETS // 2)] for points in picks])[:, ::-1]

    return torch.from_numpy(np.stack([drawn(mask) for mask in masks])).float() + 0.5


def _fill_gaps(fitted: Pose, seen: np.ndarray, good: np.ndarray, total: int, max_gap: int) -> tuple[Pose, np.ndarray]:
    """Poses and `ok` of all frames: gaps of at most `max_gap` unseen frames between two good ones are interpolated."""
    ok = np.zeros(total, bool)
    ok[seen[good]] = True
    left = np.clip(np.searchsorted(seen, np.arange(total), side="right") - 1, 0, None)
    right = np.clip(left + 1, None, len(seen) - 1)
    between = (np.arange(total) > seen[left]) & (np.arange(total) < seen[right])
    short = between & (seen[right] - seen[left] - 1 <= max_gap)
    ok |= short & good[left] & good[right]
    weight = np.where(between, (np.arange(total) - seen[left]) / np.maximum(seen[right] - seen[left], 1), 0.0)
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
