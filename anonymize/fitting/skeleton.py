"""The SMPL-X skeleton of one body shape, posed by the world rotations of its joints."""

import numpy as np
import torch

from anonymize.avatar.body import Body
from anonymize.avatar.pose import Pose
from anonymize.avatar.wardrobe import Avatar

BODY_JOINTS = 22
"""The pelvis and the 21 body joints."""

# Landmarks of the body (`anonymize.people.Landmarks`) that SMPL-X has: the joint that carries each, and its number in
# `BodyMesh.joints`.
CARRIED = {
    **{0: (15, 55), 2: (15, 57), 5: (15, 56), 7: (15, 59), 8: (15, 58)},  # nose, eyes, ears
    **{11: (16, 16), 12: (17, 17), 13: (18, 18), 14: (19, 19), 15: (20, 20), 16: (21, 21)},  # arms
    **{17: (20, 31), 18: (21, 46), 19: (20, 25), 20: (21, 40)},  # knuckles of the little and the index finger
    **{23: (1, 1), 24: (2, 2), 25: (4, 4), 26: (5, 5), 27: (7, 7), 28: (8, 8)},  # legs
    **{29: (7, 62), 30: (8, 65), 31: (7, 60), 32: (8, 63)},  # heels, toes
}


# The landmarks of the left and the right hand: wrist, then thumb, index, middle, ring and little finger from the palm.
_HANDS = tuple(
    (20 + side, *(k for finger, tip in zip((37, 25, 28, 34, 31), range(66, 71)) for k in (
        *range(finger + 15 * side, finger + 15 * side + 3), tip + 5 * side
    )))
    for side in (0, 1)
)  # fmt: skip
_POINTS = 200  # of the surface


class Skeleton:
    """Joints, landmarks and some points of a skinned surface on a body of fixed shape.

    Args:
        skinned: the surface in the rest pose (V, 3), and its weights (V, 55), as `Avatar.skinned`.
        count: points of it.

    Attributes:
        rest: (55, 3) float32, the joints in the rest pose.
        parents: (55,) int.
        landmarks: numbers of the landmarks that it has, ascending.
        at_rest: (len(landmarks), 3) float32, these in the rest pose.
        hands: (21, 3) float32 landmarks of the left and the right hand in the rest pose.
    """

    def __init__(
        self, body: Body, betas: torch.Tensor, skinned: tuple[torch.Tensor, torch.Tensor], count: int = _POINTS
    ):
        named = body(betas, Pose.rest(1)).joints[0].cpu().numpy()
        self.rest, self.parents = named[:55], body.parents.cpu().numpy()
        self.hands = tuple(named[list(numbers)] for numbers in _HANDS)
        self.landmarks = np.array(sorted(CARRIED))
        carriers = np.array([CARRIED[k][0] for k in self.landmarks])
        self.at_rest = named[[CARRIED[k][1] for k in self.landmarks]]
        self._carriers = torch.from_numpy(carriers)
        self._offsets = torch.from_numpy(self.at_rest - self.rest[carriers])
        steps = self.rest - np.where(self.parents[:, None] >= 0, self.rest[self.parents], 0)
        self._steps = torch.from_numpy(steps[1:BODY_JOINTS])
        self._from = torch.from_numpy(self.parents[1:BODY_JOINTS])
        chain = np.zeros((BODY_JOINTS, BODY_JOINTS - 1), np.float32)  # joint k lies at the end of these bones
        for joint in range(1, BODY_JOINTS):
            chain[joint] = chain[self.parents[joint]]
            chain[joint, joint - 1] = 1
        self._chain = torch.from_numpy(chain)
        points, weights = skinned
        chosen = spread(points, count)
        points, weights = points[chosen], weights[chosen].clone()
        for joint, carried in ((15, slice(22, 25)), (20, slice(25, 40)), (21, slice(40, 55))):
            weights[:, joint] += weights[:, carried].sum(1)  # head, wrists
        self._weights = weights[:, :BODY_JOINTS]
        # A point is the sum over joints of weight * (joint + rotation @ (point - joint at rest)).
        relative = points[:, None] - torch.from_numpy(self.rest[:BODY_JOINTS])
        self._carried = (self._weights[..., None] * relative).permute(1, 2, 0).contiguous()

    @classmethod
    def of(cls, avatar: Avatar) -> "Skeleton":
        """That of a dressed avatar."""
        return cls(avatar.body, avatar.betas, avatar.skinned)

    def posed(self, rotations: torch.Tensor, transl: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """World rotations (T, 22, 3, 3), translation (T, 3) → joints (T, 22, 3), landmarks (T, len(landmarks), 3)."""
        bones = (rotations[:, self._from] @ self._steps[..., None])[..., 0]
        joints = self._chain @ bones + (transl + torch.from_numpy(self.rest[0]))[:, None]
        carried = (rotations[:, self._carriers] @ self._offsets[..., None])[..., 0]
        return joints, joints[:, self._carriers] + carried

    def surface(self, rotations: torch.Tensor, joints: torch.Tensor) -> torch.Tensor:
        """World rotations (T, 22, 3, 3) and joints (T, 22, 3) → points of the avatar's surface (T, count, 3)."""
        turned = rotations.permute(0, 2, 1, 3).flatten(2) @ self._carried.flatten(0, 1)
        return turned.transpose(1, 2) + self._weights @ joints


def spread(points: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of `count` evenly spread points, in farthest-point order."""
    chosen = torch.zeros(count, dtype=torch.long)
    distance = torch.full((len(points),), torch.inf)
    for i in range(1, count):
        distance = torch.minimum(distance, (points - points[chosen[i - 1]]).square().sum(1))
        chosen[i] = distance.argmax()
    return chosen


def local(rotations: np.ndarray, parents: np.ndarray) -> np.ndarray:
    """World rotations (T, J, 3, 3) → each relative to its parent's."""
    relative = np.swapaxes(rotations[:, np.maximum(parents, 0)], 2, 3) @ rotations
    relative[:, parents < 0] = rotations[:, parents < 0]
    return relative


def world(rotations: np.ndarray, parents: np.ndarray) -> np.ndarray:
    """Rotations (T, J, 3, 3) relative to the parents' → in the world."""
    out = rotations.copy()
    for joint, parent in enumerate(parents):
        if parent >= 0:
            out[:, joint] = out[:, parent] @ rotations[:, joint]
    return out
