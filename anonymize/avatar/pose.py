"""`Pose`: the SMPL-X parameters of one person over time."""

import dataclasses
from typing import ClassVar

import numpy as np


@dataclasses.dataclass(frozen=True)
class Pose:
    """SMPL-X parameters of one person over T frames: axis-angle in radians, translation in metres (world, y up).

    Attributes:
        global_orient: (T, 3) rotation of the pelvis.
        body_pose: (T, 63) the 21 body joints, in SMPL-X order.
        transl: (T, 3) translation of the model's origin.
        left_hand_pose, right_hand_pose: (T, 45) 15 joints each, full axis-angle (no PCA).
        jaw_pose: (T, 3).
    """

    global_orient: np.ndarray
    body_pose: np.ndarray
    transl: np.ndarray
    left_hand_pose: np.ndarray
    right_hand_pose: np.ndarray
    jaw_pose: np.ndarray

    WIDTHS: ClassVar = dict(global_orient=3, body_pose=63, transl=3, left_hand_pose=45, right_hand_pose=45, jaw_pose=3)

    def __post_init__(self):
        for name, width in self.WIDTHS.items():
            value = np.asarray(getattr(self, name), np.float32)
            if value.shape != (len(self.global_orient), width):
                raise ValueError(f"Pose.{name}: shape {value.shape}, expected {(len(self.global_orient), width)}")
            object.__setattr__(self, name, value)

    @classmethod
    def rest(cls, frames: int) -> "Pose":
        """The T-pose at the origin, for `frames` frames."""
        return cls(**{name: np.zeros((frames, width), np.float32) for name, width in cls.WIDTHS.items()})

    def __len__(self) -> int:
        return len(self.global_orient)

    def __getitem__(self, index: slice) -> "Pose":
        return Pose(**{name: getattr(self, name)[index] for name in self.WIDTHS})

    def arrays(self) -> dict[str, np.ndarray]:
        """The parameters by name, as for `np.savez`."""
        return {name: getattr(self, name) for name in self.WIDTHS}
