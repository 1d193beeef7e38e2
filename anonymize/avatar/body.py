"""The SMPL-X body: shape and pose parameters to vertices and joints, through the `smplx` package."""

import contextlib
import dataclasses
import io
import os
import pathlib
import tempfile
import zipfile

import numpy as np
import smplx
import torch
from smplx.lbs import batch_rigid_transform, batch_rodrigues

from anonymize.avatar.pose import Pose
from maskdp.errors import UserError

EMBEDDED = pathlib.Path(__file__).parent.parent / "assets" / "SMPLX_NEUTRAL.npz"
JOINTS = 55
VERTICES = 10475

# What smplx reads from a model file, with the shape an SMPL-X model must have (None: any length).
_ARRAYS = {
    "v_template": (VERTICES, 3),
    "f": (None, 3),
    "shapedirs": (VERTICES, 3, None),
    "posedirs": (VERTICES, 3, 9 * (JOINTS - 1)),
    "J_regressor": (JOINTS, VERTICES),
    "kintree_table": (2, JOINTS),
    "weights": (VERTICES, JOINTS),
    "hands_componentsl": (None, 45),
    "hands_componentsr": (None, 45),
    "hands_meanl": (45,),
    "hands_meanr": (45,),
    "lmk_faces_idx": (None,),
    "lmk_bary_coords": (None, 3),
}


@dataclasses.dataclass(frozen=True)
class BodyMesh:
    """A posed body over T frames, in world metres.

    Attributes:
        vertices: (T, 10475, 3) float32.
        joints: (T, 76, 3) float32: the 55 SMPL-X joints, then the 21 vertices smplx names (nose, right eye, left eye,
            right ear, left ear, toes and heels, finger tips), in smplx's order.
        transforms: (T, 55, 3, 4) float32: what takes a point of the shaped rest pose to the world with each joint.
    """

    vertices: torch.Tensor
    joints: torch.Tensor
    transforms: torch.Tensor


class Body:
    """An SMPL-X model. The embedded one is our own work (see `build_body`) and needs no licence.

    Args:
        model_path: the user's official `SMPLX_*.npz` instead of the embedded model.
        device: where the model and its results live.

    Attributes:
        faces: (F, 3) int64, counter-clockwise seen from outside.
        template: (10475, 3) the rest pose at zero betas.
        weights: (10475, 55) linear blend skinning weights.

    Raises:
        UserError: `model_path` is missing or is not an SMPL-X `.npz` model.
    """

    def __init__(self, model_path: str | os.PathLike | None = None, device: str | torch.device = "cpu"):
        self.path = pathlib.Path(model_path or EMBEDDED)
        self.device = torch.device(device)
        model = _load(self.path).to(self.device)
        self.faces: torch.Tensor = model.faces_tensor
        self.template: torch.Tensor = model.v_template
        self.weights: torch.Tensor = model.lbs_weights
        self.parents: torch.Tensor = model.parents
        self._shapes = torch.cat([model.shapedirs, model.expr_dirs], -1)
        self._regressor = model.J_regressor
        self._joint_shapes = torch.einsum("jv,vcs->jcs", self._regressor, self._shapes)
        self._joint_template = self._regressor @ self.template
        self._correctives = model.posedirs if bool(model.posedirs.any()) else None
        self._named = model.vertex_joint_selector.extra_joints_idxs
        self.model = model

    def shaped(self, betas: torch.Tensor, expression: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Rest-pose vertices (..., 10475, 3) and joints (..., 55, 3) of betas (..., 10), expression (..., 10)."""
        betas = torch.as_tensor(betas, dtype=torch.float32, device=self.device)
        if expression is None:
            expression = torch.zeros_like(betas)
        both = torch.cat([betas, expression], -1)
        vertices = self.template + torch.einsum("vcs,...s->...vc", self._shapes, both)
        return vertices, self._joint_template + torch.einsum("jcs,...s->...jc", self._joint_shapes, both)

    def transforms(self, rest_joints: torch.Tensor, rotations: torch.Tensor, transl: torch.Tensor):
        """World joints (T, 55, 3) and rest-to-world transforms (T, 55, 3, 4) of joint rotations (T, 55, 3, 3)."""
        joints, matrices = batch_rigid_transform(rotations, rest_joints.expand(len(rotations), -1, -1), self.parents)
        matrices = matrices[:, :, :3]
        shift = transl[:, None]
        return joints + shift, torch.cat([matrices[..., :3], matrices[..., 3:] + shift[..., None]], -1)

    def forward(
        self,
        betas: torch.Tensor,
        *,
        global_orient: torch.Tensor,
        body_pose: torch.Tensor,
        transl: torch.Tensor,
        left_hand_pose: torch.Tensor | None = None,
        right_hand_pose: torch.Tensor | None = None,
        jaw_pose: torch.Tensor | None = None,
        expression: torch.Tensor | None = None,
    ) -> BodyMesh:
        """The SMPL-X function on tensors; differentiable in all of them. Equals `smplx.SMPLX.forward`.

        Shapes: betas (10,) or (T, 10); the others as in `Pose`, (T, ·); a hand, jaw or expression left out is at rest.
        """
        frames = len(global_orient)

        def given(value, width):
            return global_orient.new_zeros(frames, width) if value is None else value

        angles = torch.cat(
            [
                global_orient,
                body_pose,
                given(jaw_pose, 3),
                global_orient.new_zeros(frames, 6),
                given(left_hand_pose, 45),
                given(right_hand_pose, 45),
            ],
            -1,
        )
        rotations = batch_rodrigues(angles.reshape(-1, 3)).view(frames, JOINTS, 3, 3)
        vertices, rest_joints = self.shaped(betas, expression)
        if self._correctives is not None:
            feature = rotations[:, 1:] - torch.eye(3, device=self.device)
            vertices = vertices + (feature.reshape(frames, -1) @ self._correctives).view(frames, VERTICES, 3)
        joints, transforms = self.transforms(rest_joints, rotations, transl)
        vertices = skin(vertices, self.weights, transforms)
        return BodyMesh(vertices, torch.cat([joints, vertices[:, self._named]], 1), transforms)

    @torch.no_grad()
    def __call__(self, betas: torch.Tensor | np.ndarray, pose: Pose) -> BodyMesh:
        """The body with shape `betas` (10,) in every frame of `pose`."""
        betas = torch.as_tensor(betas, dtype=torch.float32, device=self.device)
        return self.forward(betas, **{name: torch.from_numpy(v).to(self.device) for name, v in pose.arrays().items()})


def skin(vertices: torch.Tensor, weights: torch.Tensor, transforms: torch.Tensor) -> torch.Tensor:
    """Linear blend skinning: rest vertices (V, 3) or (T, V, 3), weights (V, J), transforms (T, J, 3, 4) → (T, V, 3)."""
    blended = (weights @ transforms.flatten(2)).unflatten(-1, (3, 4))
    return (blended[..., :3] * vertices[..., None, :]).sum(-1) + blended[..., 3]


def _load(path: pathlib.Path) -> smplx.SMPLX:
    """The smplx model of `path`. smplx unpickles what it reads, so it is given a copy of the plain arrays alone."""
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected an SMPL-X model (SMPLX_NEUTRAL.npz)")
    arrays = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in (*_ARRAYS, "dynamic_lmk_faces_idx", "dynamic_lmk_bary_coords"):
                arrays[name] = file[name]
    except KeyError as error:
        raise UserError(f"{path}: has no array {error.args[0].split()[0]!r}, expected an SMPL-X model") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError, TypeError):
        raise UserError(f"{path}: not a readable .npz file, expected an SMPL-X model in .npz form") from None
    for name, shape in _ARRAYS.items():
        found = arrays[name].shape
        if len(found) != len(shape) or any(want not in (None, have) for have, want in zip(found, shape)):
            raise UserError(f"{path}: array {name!r} has shape {found}, expected {shape} of an SMPL-X model")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        plain = os.path.join(folder, "SMPLX_NEUTRAL.npz")
        np.savez(plain, **arrays)
        model = smplx.create(plain, "smplx", use_pca=False, flat_hand_mean=True, num_betas=10)
    return model.eval().requires_grad_(False)
