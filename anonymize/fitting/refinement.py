"""A few gradient steps over all frames of a person at once, from poses that are nearly right."""

import dataclasses

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from anonymize.avatar.camera import Camera
from anonymize.fitting.skeleton import BODY_JOINTS, Skeleton

_OFF = 0.1  # of the person's extent: a landmark that far off its place counts half
_PICTURE, _OUTLINE, _KEPT, _BENT, _SMOOTH, _SLIDE = 60.0, 40.0, 0.25, 0.15, 30.0, 300.0
# How readily each joint leaves its start: limbs freely, trunk and head hardly.
_STIFF = torch.tensor([4, 1, 1, 6, 1, 1, 6, 4, 4, 6, 4, 4, 6, 3, 3, 4, 1, 1, 1, 1, 4, 4.0])
_TARGETS = 160  # pixels of a silhouette that must have a surface point near
_LARGEST = 96  # pixels; masks are compared at this size
_AGAIN = 3  # steps between two look-ups of the nearest surface points


@dataclasses.dataclass(frozen=True)
class Outlines:
    """Silhouettes to fit.

    Attributes:
        distance: (T, 1, h, w) float32: distance to the nearest pixel of the mask, 0 inside; in pixels of the picture.
        targets: (T, n, 2) float32 pixels of the mask, x then y, half of them on its edge.
        weights: (T,) float32, 0 where there is no mask.
    """

    distance: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, masks: np.ndarray, weights: np.ndarray) -> "Outlines":
        """Of masks (T, H, W) bool."""
        size = masks.shape[2:0:-1]
        scale = min(1.0, _LARGEST / max(size))
        small = tuple(max(round(side * scale), 1) for side in size)
        rng = np.random.default_rng(0)
        maps, targets = [], []
        for mask in masks:
            part = cv2.resize(mask.astype(np.float32), small, interpolation=cv2.INTER_AREA) >= 0.5
            away = cv2.distanceTransform((~part).view(np.uint8), cv2.DIST_L2, 3)
            maps.append(away.clip(max=max(size)) / scale)  # an empty mask is infinitely far
            rim = part & ~cv2.erode(part.view(np.uint8), np.ones((3, 3), np.uint8), borderValue=1).view(bool)
            picks = [np.argwhere(chosen) for chosen in (rim if rim.any() else part, part)]
            drawn = [
                p[rng.integers(len(p), size=_TARGETS // 2)] if len(p) else np.zeros((_TARGETS // 2, 2)) for p in picks
            ]
            targets.append((np.concatenate(drawn)[:, ::-1] + 0.5) * np.divide(size, small))
        known = weights * np.array([mask.any() for mask in masks])
        maps, targets = (torch.from_numpy(np.stack(values)).float() for values in (maps, targets))
        return cls(maps[:, None], targets, torch.from_numpy(known).float())


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What the picture shows of a person.

    Attributes:
        seen: (T, K, 2) float32 pixels, where the skeleton's landmarks are seen.
        weights: (T, K) float32 0..1.
        planted: (T - 1, K) float32 0..1, whether a landmark stays in its place from one frame to the next.
        extent: (T,) float32 pixels, the size of the person.
        outlines: silhouettes; None: none are known.
    """

    seen: torch.Tensor
    weights: torch.Tensor
    planted: torch.Tensor
    extent: torch.Tensor
    outlines: Outlines | None = None


def refine(
    skeleton: Skeleton, rotations: np.ndarray, transl: np.ndarray, evidence: Evidence, camera: Camera, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """World rotations (T, 22, 3, 3) and translations (T, 3) with a smaller sum of: landmarks off their places in the
    picture, the surface outside of the silhouette and the silhouette without surface, change of bones' directions,
    joints bent otherwise than at the start, acceleration that the start has not, and planted landmarks that slide.

    Each joint turns in the world, so that a limb moves without carrying those below out of their directions. Lengths in
    the picture are measured in extents of the person, so that no weight depends on the resolution.
    """
    start = torch.from_numpy(rotations).float()
    place = torch.from_numpy(transl).float()
    parents = torch.from_numpy(skeleton.parents[1:BODY_JOINTS])
    depth = camera.to_camera(place)[:, 2:].abs()
    extent = evidence.extent[:, None]
    turn, shift = torch.zeros(len(start), BODY_JOINTS, 3), torch.zeros(len(start), 3)
    turn.requires_grad_(), shift.requires_grad_()
    with torch.no_grad():
        first = skeleton.posed(start, place)[1]
    adam, nearest = Adam([turn, shift], [0.05, 0.05]), None
    for step in range(steps):
        turned, placed = small_rotations(turn) @ start, place + 0.1 * shift * depth
        joints, landmarks = skeleton.posed(turned, placed)
        error = ((camera.project(landmarks) - evidence.seen) / extent[..., None]).square().sum(2)
        loss = _PICTURE * (evidence.weights * error / (1 + error / _OFF**2)).sum()
        if evidence.outlines is not None:
            pixels = camera.project(skeleton.surface(turned, joints))
            if step % _AGAIN == 0:
                with torch.no_grad():
                    nearest = torch.cdist(evidence.outlines.targets, pixels).argmin(2, keepdim=True).expand(-1, -1, 2)
            loss = loss + _OUTLINE * _off_outline(pixels, nearest, evidence.outlines, extent, camera)
        loss = loss + _KEPT * (_STIFF[:, None] * turn.square()).sum()
        loss = loss + _BENT * (turn[:, 1:] - turn[:, parents]).square().sum()
        moved = landmarks - first
        loss = loss + _SMOOTH * (moved[2:] - 2 * moved[1:-1] + moved[:-2]).square().sum(2).mean(1).sum()
        slid = (landmarks[1:] - landmarks[:-1]).square().sum(2)
        loss = loss + _SLIDE * (evidence.planted * slid).sum()
        adam.step(torch.autograd.grad(loss, [turn, shift]), 0.55 + 0.45 * np.cos(np.pi * step / steps))
    with torch.no_grad():
        return (small_rotations(turn) @ start).numpy().astype(float), (place + 0.1 * shift * depth).numpy().astype(
            float
        )


def _off_outline(pixels, nearest, outlines: Outlines, extent: torch.Tensor, camera: Camera) -> torch.Tensor:
    """How far the surface lies outside the silhouettes, and these beyond the surface."""
    size = torch.tensor([camera.width, camera.height], dtype=torch.float32)
    grid = (2 * pixels / size - 1).clamp(-1, 1)
    outside = F.grid_sample(outlines.distance, grid[:, :, None], align_corners=False, padding_mode="border")[:, 0, :, 0]
    gap = (outlines.targets - pixels.gather(1, nearest)).square().sum(2)
    outside, gap = outside / extent, (gap / extent.square() + 1e-8).sqrt()
    per_frame = (outside + 10 * outside.square()).mean(1) + (gap + 10 * gap.square()).mean(1)
    return (outlines.weights * per_frame).sum()


def small_rotations(vectors: torch.Tensor) -> torch.Tensor:
    """Rotations (..., 3, 3) of quaternions (1, v / 2): for small vectors (..., 3) those of the rotation vectors."""
    half = vectors / 2
    x, y, z = (half / (1 + half.square().sum(-1, keepdim=True)).sqrt()).unbind(-1)
    w = (1 + half.square().sum(-1)).rsqrt()
    rows = [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        *(2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        *(2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


class Adam:
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
