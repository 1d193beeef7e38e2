"""Makes the embedded person network: renders pictures of people, then trains on nothing else.

    python -m anonymize.make.person_net --renders DIR --out first.safetensors --pictures 10000 --minutes 66 --bfloat16
    python -m anonymize.make.person_net --renders DIR --out second.safetensors --pictures 15000 --minutes 80 \\
        --bfloat16 --seed 1 --start first.safetensors --threads 1
    python -m anonymize.make.person_net --renders DIR --out net.safetensors --pictures 12000 --minutes 62 \\
        --bfloat16 --seed 2 --start second.safetensors --threads 1

made the weights that are shipped: 7,870 steps of 32 pictures on two CPU cores that had other work, too, 6,950 on one,
and 4,025 on one with other work. In the first two runs joints weighed a third of what they do now, and people were seen
from all round alike: both maps of each pair of joints came out the same.

On the first shard of seed 1 the mask's IoU is 0.715 after the first run and 0.751 after the second, 0.678 and 0.719
with the motion channels at 0; on the first shard of seed 2 it is 0.763 after the second and 0.768 after the third,
0.711 and 0.716 without motion. No run saw the shard it is measured on. On 20 studio videos (seed 21) the median joint
is 5.8 % of the height from nose to feet off (elbows 7 %, wrists 14 %); after the second run it was 11 %. People seen
from behind are mostly taken for people seen from the front. How far a run gets in its minutes depends on the machine,
so weights differ from run to run; the renders do not.

People are our avatars in random poses, seen from near and far, one to three in a picture. They stand in procedural
rooms, landscapes and clutter, with rendered furniture and other upright things that are nobody; some things stand in
front of them. Every picture comes with the empty scene and the frame before as a finder would have them: people who
stand still are in both, people who left remain in the one as ghosts.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import pathlib
import time

import cv2
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation

from anonymize.avatar.body import Body
from anonymize.avatar.camera import Camera
from anonymize.avatar.pose import Pose
from anonymize.avatar.render import Mesh, render
from anonymize.avatar.wardrobe import HAIRS, SKINS, Avatar, draw_identity
from anonymize.fitting.pose_library import KEYPOINTS, random_poses
from anonymize.people.embedded import person_net
from maskdp import atomic, progress

SIDE = 128
SHARD = 250  # pictures
AVATARS, POSES = 10, 40  # in a shard
NOSE = 55  # in `BodyMesh.joints`
MOST_PEOPLE = 3
FRONT = 0.75  # of the people
LIMBS = torch.tensor([2.0 if name.endswith(("elbow", "wrist", "knee")) else 1.0 for name in person_net.JOINTS])


@dataclasses.dataclass(frozen=True)
class Sprite:
    """Something rendered over nothing: colour (S, S, 3) 0..255, coverage (S, S, 1) 0..1, joints (14, 3) or None."""

    colour: np.ndarray
    alpha: np.ndarray
    joints: np.ndarray | None
    distance: float

    def over(self, picture: np.ndarray, shift=(0, 0), part: np.ndarray | float = 1.0) -> np.ndarray:
        """The picture with the sprite on it, moved by `shift` pixels, `part` of it (0..1, or a map) showing."""
        alpha = self.alpha * part if np.ndim(part) == 0 else self.alpha * part[..., None]
        alpha, colour = (_moved(a, shift) for a in (alpha, self.colour))
        alpha = alpha.reshape(SIDE, SIDE, 1)
        return picture * (1 - alpha) + colour * alpha


def _moved(image: np.ndarray, shift) -> np.ndarray:
    if not np.any(shift):
        return image
    return cv2.warpAffine(image, np.array([[1, 0, shift[0]], [0, 1, shift[1]]], np.float32), (SIDE, SIDE))


class People:
    """Avatars in random poses, ready to be rendered."""

    def __init__(self, rng: np.random.Generator):
        body = Body()
        self.meshes, self.joints = [], []
        for _ in range(AVATARS):
            avatar = Avatar(body, draw_identity(rng))
            angles = _facing(rng, random_poses(4 * POSES, int(rng.integers(2**31))))
            hands = np.zeros((POSES, 15, 3))
            curl = rng.uniform(0, 1.0, (POSES, 1))
            hands[:, :12, 2] = -curl
            pose = Pose(
                global_orient=angles[:, :3],
                body_pose=angles[:, 3:],
                transl=np.zeros((POSES, 3)),
                left_hand_pose=hands.reshape(POSES, 45),
                right_hand_pose=-hands.reshape(POSES, 45),
                jaw_pose=np.zeros((POSES, 3)),
            )
            self.meshes.append(avatar.mesh(pose))
            self.joints.append(body(avatar.betas, pose).joints[:, [NOSE, *KEYPOINTS]])

    def draw(self, rng: np.random.Generator, view: str) -> Sprite | None:
        """One of them at a size in the picture: `full`, `small`, `upper` or `head`; None if nothing would show."""
        which, frame = rng.integers(AVATARS), rng.integers(POSES)
        mesh, joints = self.meshes[which], self.joints[which][frame]
        points = mesh.vertices[frame]
        low, high = points.amin(0).numpy(), points.amax(0).numpy()
        size = max(high[1] - low[1], 0.5 * (high[0] - low[0]), 0.8)
        focal = SIDE * rng.uniform(0.7, 1.8)
        if view in ("full", "small"):
            share, centre = rng.uniform(*((0.35, 0.98) if view == "full" else (0.12, 0.35))), (low + high) / 2
        else:
            share, centre = rng.uniform(*((1.1, 2.6) if view == "upper" else (2.6, 6.0))), joints[int(view == "upper")]
            below = rng.uniform(0, max(0.85 / share - 0.25, 0)) if view == "upper" else 0.0
            centre, size = np.asarray(centre) - [0, below, 0], 1.7
        distance = max(focal * size / (share * SIDE), 0.6 + (high - low)[2] / 2)
        pitch = np.clip(rng.normal(0.1, 0.22), -0.4, 1.0)
        spread = (0.45, 0.3) if view in ("full", "small") else (0.3, 0.15)
        centre = centre + rng.uniform(-1, 1, 3) * [spread[0], spread[1], 0] * SIDE / focal * distance
        eye = centre + distance * np.array([0, np.sin(pitch), np.cos(pitch)])
        camera = Camera.look_at(eye, centre, SIDE, SIDE, focal)
        dyed = Mesh(mesh.vertices[frame : frame + 1], mesh.faces, _dyed(rng, mesh.colours))
        found = render([dyed], 0, camera, samples=2)
        if (found.rgba[..., 3] > 0).sum() < 24:
            return None
        seen = camera.to_camera(joints)[:, 2] > 0.1
        projected = torch.cat([camera.project(joints) / SIDE, seen[:, None].float()], 1).numpy()
        return Sprite(*_lit(rng, found.rgba), projected, distance)


def _facing(rng: np.random.Generator, angles: np.ndarray) -> np.ndarray:
    """`POSES` of more poses (N, 66), `FRONT` of them seen from the front, as people mostly are.

    Seen from all round alike, left and right are one to a network: what tells them apart moves a loss only where they
    differ already, and in 15,000 steps they never did.
    """
    front = Rotation.from_rotvec(angles[:, :3]).as_matrix()[:, 2, 2] > 0
    weight = np.where(front, FRONT / front.sum(), (1 - FRONT) / (~front).sum())
    return angles[rng.choice(len(angles), POSES, replace=False, p=weight)]


def _dyed(rng: np.random.Generator, colours: torch.Tensor) -> torch.Tensor:
    """A mesh's colours under another dye and with a fabric's grain, so that the wardrobe's palette is no clue."""
    grain = torch.from_numpy(rng.normal(1, rng.uniform(0, 0.25), (len(colours), 1, 1, 1)).astype(np.float32))
    dye = torch.from_numpy(rng.uniform(0.5, 1.3, 3).astype(np.float32)) if rng.random() < 0.5 else 1.0
    colours = colours * grain * dye
    return (colours.flip(-1) if rng.random() < 0.15 else colours).clamp(0, 1)


def _lit(rng: np.random.Generator, rgba: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colour and coverage of a rendering under a light that falls off across the picture."""
    alpha = (rgba[..., 3:] / 255).astype(np.float32)
    way, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.5)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    fall = 1 + depth * (np.cos(way) * x + np.sin(way) * y)[..., None]
    return (rgba[..., :3] * fall * rng.uniform(0.5, 1.3)).clip(0, 255).astype(np.float32), alpha


# Things that are nobody -----------------------------------------------------------------------------------------------


def _solid(centre, half, round_up: float, round_across: float, turn: np.ndarray | None = None):
    """A superquadric: box (roundness near 0), cylinder (0, 1) or ellipsoid (1, 1); vertices and outward faces."""
    up = np.linspace(-np.pi / 2, np.pi / 2, 13)[:, None]
    around = np.linspace(0, 2 * np.pi, 24, endpoint=False)

    def bent(value, power):
        return np.sign(value) * np.abs(value) ** power

    level, height = bent(np.cos(up), round_up), bent(np.sin(up), round_up)
    x, z = level * bent(np.cos(around), round_across), level * bent(np.sin(around), round_across)
    points = np.stack([x, height + 0 * x, z], -1).reshape(-1, 3) * half
    points = (points if turn is None else points @ turn.T) + centre
    grid = np.arange(13 * 24).reshape(13, 24)
    a, b, c, d = grid[:-1], np.roll(grid[:-1], -1, 1), grid[1:], np.roll(grid[1:], -1, 1)
    faces = np.concatenate([np.stack([a, c, d], -1).reshape(-1, 3), np.stack([a, d, b], -1).reshape(-1, 3)])
    return points, faces


BOX, TUBE, BALL = (0.08, 0.08), (0.08, 1.0), (1.0, 1.0)


def _parts(rng: np.random.Generator) -> list[tuple]:
    """The parts of a piece of furniture or another thing: centre, half sizes, roundness, colour number."""
    u = rng.uniform
    kind = rng.choice(["chair", "sofa", "desk", "bottle", "lamp", "bag", "shelf", "car", "plant", "ball", "heap"])
    parts = []
    if kind in ("chair", "sofa"):
        w, h = (u(0.2, 0.28), u(0.4, 0.5)) if kind == "chair" else (u(0.4, 1.0), u(0.3, 0.45))
        parts = [((0, h, 0), (w, u(0.02, 0.1), 0.24), BOX, 0)]
        parts += [((0, h + u(0.2, 0.4), -0.22), (w, u(0.12, 0.35), u(0.02, 0.1)), BOX if u() < 0.5 else BALL, 1)]
        parts += [((x * w * 0.9, h / 2, z * 0.2), (0.02, h / 2, 0.02), TUBE, 2) for x in (-1, 1) for z in (-1, 1)]
        if u() < 0.5:
            parts += [((x * w, h + 0.2, 0), (0.025, 0.02, 0.2), BOX, 2) for x in (-1, 1)]
    elif kind == "desk":
        w, h = u(0.4, 0.9), u(0.6, 0.9)
        parts = [((0, h, 0), (w, 0.02, u(0.25, 0.45)), BOX, 0)]
        parts += [((x * w * 0.95, h / 2, 0), (0.02, h / 2, u(0.02, 0.25)), BOX, 1) for x in (-1, 1)]
        for x in u(-w, w, rng.integers(0, 4)):
            parts += [((x, h + 0.3, 0), (u(0.12, 0.35), u(0.1, 0.25), 0.02), BOX, 2)]
            parts += [((x, h + 0.06, 0), (0.03, 0.07, 0.03), TUBE, 2)]
    elif kind == "bottle":
        r = u(0.03, 0.3)
        h = r * u(2, 7)
        parts = [((0, h / 2, 0), (r, h / 2, r), TUBE, 0), ((0, h, 0), (r, r * u(0.3, 1.5), r), BALL, 1)]
        parts += [((0, h + r * u(0.8, 1.6), 0), (r * 0.4, r * 0.6, r * 0.4), TUBE, 2)]
    elif kind == "lamp":
        h, r = u(0.8, 2.2), u(0.015, 0.15)
        parts = [((0, h / 2, 0), (r, h / 2, r), TUBE, 0), ((0, 0.02, 0), (0.2, 0.02, 0.2), TUBE, 1)]
        parts += [((0, h, 0), tuple(u(0.05, 0.3, 3)), BALL if u() < 0.5 else TUBE, 2)]
    elif kind == "bag":
        parts = [((0, 0.3, 0), (u(0.15, 0.5), u(0.15, 0.6), u(0.1, 0.4)), BALL, 0)]
        parts += [((u(-0.3, 0.3), u(0.2, 0.8), 0), tuple(u(0.08, 0.3, 3)), BALL, 1)]
    elif kind == "shelf":
        w, h = u(0.3, 0.8), u(0.8, 2.1)
        parts = [((0, h / 2, -0.15), (w, h / 2, 0.02), BOX, 0)]
        parts += [((x * w, h / 2, 0), (0.02, h / 2, 0.15), BOX, 1) for x in (-1, 1)]
        for y in np.linspace(0, h, rng.integers(2, 6)):
            parts += [((0, y, 0), (w, 0.015, 0.15), BOX, 1)]
            parts += [((x, y + 0.12, 0), (u(0.02, 0.2), u(0.05, 0.15), 0.1), BOX, 2) for x in u(-w, w, 2)]
    elif kind == "car":
        parts = [((0, 0.5, 0), (1.8, 0.3, 0.8), BOX, 0), ((u(-0.4, 0.2), 0.95, 0), (1.0, 0.25, 0.7), (0.3, 0.3), 1)]
        parts += [((x * 1.1, 0.3, z * 0.75), (0.3, 0.3, 0.12), BALL, 2) for x in (-1, 1) for z in (-1, 1)]
    elif kind == "plant":
        parts = [((0, 0.2, 0), (0.15, 0.2, 0.15), TUBE, 0)]
        for x, y, z in u((-0.3, 0.5, -0.3), (0.3, 1.4, 0.3), (rng.integers(5, 25), 3)):
            parts += [((x, y, z), (u(0.02, 0.2), u(0.05, 0.3), u(0.02, 0.1)), BALL, rng.integers(1, 3))]
    elif kind == "ball":
        parts = [((0, 0.3, 0), tuple(np.repeat(u(0.08, 0.4), 3)), BALL, 0)]
    else:
        for centre in u((-0.4, 0, -0.3), (0.4, 1.3, 0.3), (rng.integers(2, 8), 3)):
            parts += [(tuple(centre), tuple(u(0.03, 0.4, 3)), (BOX, TUBE, BALL)[rng.integers(3)], rng.integers(0, 3))]
    return parts


def thing(rng: np.random.Generator) -> Sprite | None:
    """A rendered thing anywhere in the picture, or None if nothing of it would show."""
    colours = [_colour(rng) / 255 for _ in range(3)]
    if rng.random() < 0.25:
        colours[0] = np.array((*SKINS, *HAIRS)[rng.integers(len(SKINS) + len(HAIRS))])
    vertices, faces, paints, count = [], [], [], 0
    for centre, half, (up, across), number in _parts(rng):
        points, corners = _solid(centre, half, up, across)
        vertices.append(points)
        faces.append(corners + count)
        paints.append(np.broadcast_to(colours[number], points.shape))
        count += len(points)
    points = np.concatenate(vertices)
    turn = rng.uniform(0, 2 * np.pi)
    points = points @ np.array([[np.cos(turn), 0, np.sin(turn)], [0, 1, 0], [-np.sin(turn), 0, np.cos(turn)]]).T
    if rng.random() < 0.1:
        points = points[:, [1, 0, 2]] * [1, -1, 1]
    low, high = points.min(0), points.max(0)
    focal = SIDE * rng.uniform(0.7, 1.8)
    size = max(high[1] - low[1], 0.7 * (high[0] - low[0]), 0.3)
    distance = max(focal * size / (SIDE * np.exp(rng.uniform(np.log(0.12), np.log(1.1)))), 0.4 + (high - low)[2] / 2)
    pitch = np.clip(rng.normal(0.14, 0.2), -0.25, 1.0)
    centre = (low + high) / 2 + rng.uniform(-0.5, 0.5, 3) * [1, 0.8, 0] * SIDE / focal * distance
    camera = Camera.look_at(centre + distance * np.array([0, np.sin(pitch), np.cos(pitch)]), centre, SIDE, SIDE, focal)
    tensors = (torch.from_numpy(np.concatenate(part)) for part in (faces, paints))
    corners, paint = next(tensors), next(tensors).float()
    found = render([Mesh(torch.from_numpy(points).float()[None], corners, paint)], 0, camera, samples=2)
    if not (found.rgba[..., 3] > 0).any():
        return None
    colour, alpha = _lit(rng, found.rgba)
    if rng.random() < 0.5:
        colour = (colour * (0.4 + 0.6 * _texture(rng, SIDE, SIDE) / 128)).clip(0, 255).astype(np.float32)
    return Sprite(colour, alpha, None, distance)


# Empty scenes ---------------------------------------------------------------------------------------------------------


@functools.cache
def _noises() -> list[np.ndarray]:
    """Fractal noise, 256 pixels square, 0..1, with spectra from rough to smooth."""
    rng = np.random.default_rng(0)
    frequency = np.add.outer(np.fft.fftfreq(256) ** 2, np.fft.fftfreq(256) ** 2)
    frequency[0, 0] = 1
    noises = []
    for slope in np.repeat([0.4, 0.8, 1.0, 1.2, 1.5, 1.9], 6):
        noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((256, 256))) * frequency ** (-slope / 2)).real
        noises.append(np.clip((noise - noise.mean()) / noise.std() / 4 + 0.5, 0, 1).astype(np.float32))
    return noises


def _noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    noise = np.rot90(_noises()[rng.integers(len(_noises()))], rng.integers(4))
    size = rng.integers(40, 257)
    y, x = rng.integers(0, 257 - size, 2)
    return cv2.resize(np.ascontiguousarray(noise[y : y + size, x : x + size]), (width, height))[..., None]


def _colour(rng: np.random.Generator) -> np.ndarray:
    """RGB 0..255: greys, anything, or moderately saturated hues."""
    kind = rng.integers(4)
    if kind == 0:
        return np.clip(rng.uniform(10, 245) + rng.normal(0, 6, 3), 0, 255)
    if kind == 1:
        return rng.uniform(0, 255, 3)
    hsv = np.array([[[rng.integers(180), rng.uniform(20, 220), rng.uniform(20, 250)]]]).astype(np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0].astype(float)


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(height, width, 3) around 0..255: noise between two colours, a ramp, stripes, or a plain grain."""
    one, two, noise, kind = _colour(rng), _colour(rng), _noise(rng, height, width), rng.integers(4)
    if kind == 0:
        return one + (two - one) * np.clip((noise - 0.5) * rng.uniform(0.2, 3) + 0.5, 0, 1)
    y, x = np.mgrid[:height, :width]
    if kind == 1:
        ramp = (x / width if rng.random() < 0.5 else y / height)[..., None]
        return one * (1 + rng.uniform(-0.5, 0.4) * ramp) + (noise - 0.5) * rng.uniform(0, 60)
    if kind == 2:
        way = rng.uniform(0, np.pi)
        stripe = ((x * np.cos(way) + y * np.sin(way)) / rng.uniform(3, 25)) % 1 < rng.uniform(0.1, 0.9)
        other = one * rng.uniform(0.6, 0.95) if rng.random() < 0.6 else two
        return np.where(stripe[..., None], one, other) + (noise - 0.5) * rng.uniform(0, 50)
    return one + (noise - 0.5) * rng.uniform(0, 80)


def _shape(rng: np.random.Generator, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """A random flat shape, mask (S, S) bool, and its colours (S, S, 3)."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    centre = rng.uniform(-0.1, 1.1, 2) * SIDE
    size = SIDE * np.exp(rng.uniform(np.log(0.03), np.log(largest)))
    aspect, kind = np.exp(rng.uniform(-0.7, 0.7)), rng.integers(4)
    axes = (size * aspect, size / aspect)
    if kind == 0:
        half = tuple(int(a / 2) + 1 for a in axes)
        cv2.ellipse(mask, tuple(map(int, centre)), half, rng.uniform(0, 180), 0, 360, 1, -1)
    elif kind == 1:
        angle = 0.0 if rng.random() < 0.6 else rng.uniform(0, 180)
        cv2.fillPoly(mask, [cv2.boxPoints((tuple(map(float, centre)), axes, angle)).astype(np.int32)], 1)
    elif kind == 2:
        corners = (centre + rng.normal(0, size / 3, (rng.integers(3, 7), 2))).astype(np.float32)
        cv2.fillPoly(mask, [cv2.convexHull(corners).astype(np.int32)[:, 0]], 1)
    else:
        width = int(max(2, size * rng.uniform(0.05, 0.3)))
        bends = centre + np.cumsum(rng.normal(0, 0.7 * size, (rng.integers(2, 5), 2)), 0)
        cv2.polylines(mask, [bends.astype(np.int32)], False, 1, width)
    colours = _texture(rng, SIDE, SIDE)
    if rng.random() < 0.5:
        depth = cv2.distanceTransform(mask, cv2.DIST_L2, 3)
        colours = colours * np.clip(0.5 + depth / max(depth.max(), 1), 0, 1.1)[..., None]
    return mask > 0, colours


def empty_scene(rng: np.random.Generator) -> np.ndarray:
    """(S, S, 3) float32, 0..255: a room, a landscape, clutter, a plain wall or a texture, with things in it."""
    kind = rng.choice(["room", "outdoor", "texture", "clutter", "plain"], p=[0.45, 0.2, 0.08, 0.12, 0.15])
    scene = _texture(rng, SIDE, SIDE)
    horizon = int(rng.uniform(0.35, 0.95) * SIDE)
    shapes, largest = rng.integers(0, 6), 0.4
    if kind == "clutter":
        shapes, largest = rng.integers(10, 60), 0.6
    if kind == "plain":
        y, x = np.mgrid[:SIDE, :SIDE] / SIDE
        ramp = (1 + rng.uniform(-0.5, 0.1) * x) * (1 + rng.uniform(-0.5, 0.1) * y)
        scene = _colour(rng) * ramp[..., None] + (_noise(rng, SIDE, SIDE) - 0.5) * rng.uniform(0, 40)
        shapes = 0
    if kind == "room":
        scene = _colour(rng) * np.linspace(*rng.uniform(0.6, 1.1, 2), SIDE)[None, :, None]
        scene = scene + (_noise(rng, SIDE, SIDE) - 0.5) * rng.uniform(0, 50)
        for _ in range(rng.integers(0, 7)):  # windows, doors, pictures, cupboards
            width, height = int(rng.uniform(0.08, 0.45) * SIDE), int(rng.uniform(0.1, 0.7) * SIDE)
            left = int(rng.uniform(-0.1, 0.95) * SIDE)
            top = int(rng.uniform(-0.1, 0.6) * SIDE) if rng.random() < 0.6 else horizon - height
            y0, y1, x0, x1 = max(top, 0), min(top + height, SIDE), max(left, 0), min(left + width, SIDE)
            if y1 - y0 > 3 and x1 - x0 > 3:
                scene[y0:y1, x0:x1] = _texture(rng, y1 - y0, x1 - x0)
                frame = tuple(_colour(rng) * rng.uniform(0.3, 1))
                scene = cv2.rectangle(np.ascontiguousarray(scene), (x0, y0), (x1, y1), frame, int(rng.integers(1, 4)))
                for x in rng.integers(x0, x1, rng.integers(0, 4)):
                    cv2.line(scene, (int(x), y0), (int(x), y1), frame, 1)
        source = np.array([[0, 0], [SIDE, 0], [SIDE, SIDE], [0, SIDE]], np.float32)
        near, far = rng.uniform(0.5, 0.8) * SIDE, rng.uniform(0, 0.3) * SIDE
        target = np.array([[far, horizon], [SIDE - far, horizon], [SIDE + near, SIDE], [-near, SIDE]], np.float32)
        floor = _texture(rng, SIDE, SIDE).astype(np.float32)
        floor = cv2.warpPerspective(
            floor, cv2.getPerspectiveTransform(source, target), (SIDE, SIDE), borderMode=cv2.BORDER_REFLECT
        )
        scene[horizon:] = floor[horizon:]
    if kind == "outdoor":
        horizon = int(rng.uniform(0.15, 0.8) * SIDE)
        fade = np.linspace(0, 1, SIDE)[:, None, None]
        sky = rng.uniform((110, 130, 150), (235, 235, 255)) * (1 - fade) + _colour(rng) * fade
        scene = sky + (_noise(rng, SIDE, SIDE) - 0.5) * rng.uniform(0, 90)
        for _ in range(rng.integers(0, 4)):
            left, width, top = (
                int(rng.uniform(-0.2, 1) * SIDE),
                int(rng.uniform(0.1, 0.5) * SIDE),
                rng.integers(horizon),
            )
            wall = scene[top:horizon, max(left, 0) : left + width]
            wall[:] = _texture(rng, *wall.shape[:2]) if wall.size else 0
        leaves = (
            _noise(rng, SIDE, SIDE)
            * np.exp(-(((np.arange(SIDE) - horizon + 20) / rng.uniform(10, 50)) ** 2))[:, None, None]
        )
        green = rng.uniform((20, 40, 10), (100, 130, 70)) * (0.4 + 1.2 * _noise(rng, SIDE, SIDE))
        scene = np.where((leaves > rng.uniform(0.15, 0.6)), green, scene)
        ground = np.array([[70, 120, 40], [125, 120, 110], [190, 160, 120], [225, 220, 220]])[rng.integers(4)]
        ground = ground * rng.uniform(0.5, 1.2) * (1 + (_noise(rng, SIDE, SIDE) - 0.5) * rng.uniform(0.1, 1.2))
        scene[horizon:] = ground[horizon:]
    for _ in range(shapes):
        mask, colours = _shape(rng, largest)
        scene = np.where(mask[..., None], colours, scene)
    scene = scene.clip(0, 255).astype(np.float32)
    for _ in range(rng.choice([0, 1, 2, 3, 5], p=[0.35, 0.25, 0.2, 0.12, 0.08])):
        found = thing(rng)
        scene = scene if found is None else found.over(scene)
    return scene


# Pictures -------------------------------------------------------------------------------------------------------------


def picture(rng: np.random.Generator, people: People) -> dict[str, np.ndarray]:
    """One training picture.

    Returns:
        `rgb` (S, S, 3), `from_background` (S, S), `from_previous` (S, S) and `mask` (S, S), all uint8;
        `joints` (3, 14, 3) float32, x and y as parts of the side and whether the joint lies before the camera.
    """
    empty = empty_scene(rng)
    now, before, mask = empty.copy(), empty.copy(), np.zeros((SIDE, SIDE, 1), np.float32)
    joints = np.zeros((MOST_PEOPLE, 14, 3), np.float32)
    common = rng.choice(["full", "small", "upper"], p=[0.5, 0.3, 0.2])
    sprites = []
    for _ in range(rng.choice(4, p=[0.12, 0.6, 0.18, 0.1])):
        view = rng.choice(["full", "small", "upper", "head"], p=[0.42, 0.18, 0.27, 0.13])
        sprite = people.draw(rng, view if not sprites or rng.random() < 0.3 else common)
        sprites += [sprite] if sprite else []
    for index, sprite in enumerate(sorted(sprites, key=lambda s: -s.distance)):
        joints[index] = sprite.joints
        if rng.random() < 0.45:
            shadow = cv2.GaussianBlur(_moved(sprite.alpha, rng.uniform(-12, 12, 2)), (0, 0), rng.uniform(1.5, 8))
            shade = 1 - rng.uniform(0.1, 0.6) * shadow[..., None]
            now, before = now * shade, before * shade
            empty = empty * shade if rng.random() < 0.5 else empty
        now, mask = sprite.over(now), np.maximum(mask, sprite.alpha)
        motion, step = rng.choice(["still", "moving", "ghost", "limb"], p=[0.38, 0.34, 0.1, 0.18]), rng.normal(0, 2, 2)
        if motion == "still":
            before, empty = sprite.over(before), sprite.over(empty)
        elif motion == "limb":  # one side of a line moves, the other stands still
            y, x = np.mgrid[:SIDE, :SIDE]
            way = rng.uniform(0, 2 * np.pi)
            along = np.cos(way) * x + np.sin(way) * y
            moving = along > (along * sprite.alpha[..., 0]).sum() / sprite.alpha.sum() + rng.normal(0, 6)
            before = sprite.over(sprite.over(before, part=~moving), step, moving.astype(np.float32))
            empty = sprite.over(sprite.over(empty, part=~moving), rng.normal(0, 4, 2), moving * rng.choice([0.0, 1.0]))
        else:
            before = sprite.over(before, step)
            if motion == "ghost":
                empty = sprite.over(empty, rng.normal(0, 8, 2), rng.uniform(0.4, 1))
    if rng.random() < 0.12 and (absent := people.draw(rng, common)):  # who left is still in the background
        empty = absent.over(empty, part=(1 - mask[..., 0]) * rng.uniform(0.4, 1))
    for _ in range(rng.choice(3, p=[0.65, 0.25, 0.1])):  # things in front, most of them where they always were
        front = thing(rng)
        if front and front.alpha.mean() < 0.3:
            now, mask = front.over(now), mask * (1 - front.alpha)
            empty = front.over(empty) if rng.random() < 0.6 else empty
            before = front.over(before, (0, 0) if rng.random() < 0.7 else rng.normal(0, 2, 2))
    if rng.random() < 0.12:  # the camera moves
        step = rng.normal(0, 2.5, 2)
        before, empty = _moved(now, step), cv2.GaussianBlur(_moved(empty, 3 * step), (0, 0), rng.uniform(0.5, 8))
    now, before, empty = np.split(_filmed(rng, np.concatenate([now, before, empty], 1)), 3, axis=1)
    return {
        "rgb": now,
        "from_background": cv2.absdiff(now, empty).max(-1),
        "from_previous": cv2.absdiff(now, before).max(-1),
        "mask": (mask[..., 0] * 255).astype(np.uint8),
        "joints": joints,
    }


def _filmed(rng: np.random.Generator, film: np.ndarray) -> np.ndarray:
    """Three pictures side by side as a cheap camera and codec leave them; the last, a median, has little noise."""
    if rng.random() < 0.2:
        film = film.mean(-1, keepdims=True).repeat(3, -1)
    film = 255 * (film.clip(0, 255) / 255) ** np.exp(rng.normal(0, 0.3))
    film = (film - 128) * rng.uniform(0.5, 1.15) + 128 + rng.normal(0, 18) + rng.normal(0, 6, 3)
    if rng.random() < 0.5:
        film = cv2.GaussianBlur(film, (0, 0), rng.uniform(0.3, 1.3))
    if rng.random() < 0.15:
        low = int(rng.integers(40, 100))
        film = cv2.resize(cv2.resize(film, (3 * low, low), interpolation=cv2.INTER_AREA), (3 * SIDE, SIDE))
    noise = rng.normal(0, abs(rng.normal(0, 6)), (SIDE, 3 * SIDE, 3 if rng.random() < 0.5 else 1))
    noise[:, 2 * SIDE :] *= 0.3
    film = (film + noise).clip(0, 255).astype(np.uint8)
    if rng.random() < 0.5:
        film = cv2.imdecode(cv2.imencode(".jpg", film, [cv2.IMWRITE_JPEG_QUALITY, int(rng.uniform(15, 80))])[1], 1)
    return film


def render_shard(path: pathlib.Path, seed: int, number: int) -> None:
    """Writes one file of `SHARD` pictures; they depend on the seed and the shard's number alone."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rng = np.random.default_rng([seed, number])
    people = People(rng)
    pictures = [picture(rng, people) for _ in range(SHARD)]
    with atomic.writing(path) as aside:
        np.savez(aside, **{name: np.stack([p[name] for p in pictures]) for name in pictures[0]})


class Renders:
    """The shards of a folder, rendered by worker processes where they are missing, while the training goes on."""

    def __init__(self, pool: concurrent.futures.Executor, folder: pathlib.Path, pictures: int, seed: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.paths = [folder / f"{seed}-{number:04d}.npz" for number in range(-(-pictures // SHARD))]
        numbers = enumerate(self.paths)
        jobs = {path: pool.submit(render_shard, path, seed, n) for n, path in numbers if not path.exists()}
        self._jobs, self._shards = jobs, []

    def data(self, least: int = 1) -> dict[str, torch.Tensor]:
        """Every picture rendered so far, waiting until `least` shards are there."""
        while True:
            for path in self.paths[len(self._shards) :]:
                if path in self._jobs:
                    if not self._jobs[path].done():
                        break
                    self._jobs[path].result()
                with np.load(path) as file:
                    self._shards.append({name: torch.from_numpy(file[name]) for name in file.files})
            if len(self._shards) >= min(least, len(self.paths)):
                return {name: torch.cat([shard[name] for shard in self._shards]) for name in self._shards[0]}
            time.sleep(1)


# Training -------------------------------------------------------------------------------------------------------------


def augmented(batch: dict[str, torch.Tensor], side: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Network input (N, 5, side, side), mask (N, 1, side, side) and joints of a batch.

    Mirrored, tinted, stretched, with and without the motion channels.
    """
    n = len(batch["rgb"])

    def chance(p):
        return torch.rand(n, generator=generator) < p

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator)

    colour = batch["rgb"].float().permute(0, 3, 1, 2) / 127.5 - 1
    motion = torch.stack([batch["from_background"], batch["from_previous"]], 1).float().div(64).clamp(max=2)
    mask, joints = batch["mask"].float()[:, None] / 255, batch["joints"].clone()
    colour = colour * (1 + 0.1 * torch.randn(n, 3, 1, 1, generator=generator))
    colour += 0.1 * torch.randn(n, 3, 1, 1, generator=generator)
    swapped = chance(0.25)
    colour[swapped] = colour[swapped][:, torch.randperm(3, generator=generator)]
    negative = chance(0.08)
    colour[negative] = -colour[negative]

    scale, shift = uniform(0.8, 1.2, n, 2), uniform(-0.15, 0.15, n, 2)
    flip = 1 - 2 * chance(0.5).float()
    matrix = torch.zeros(n, 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, :, 2] = scale[:, 0] * flip, scale[:, 1], shift
    both = torch.cat([colour, motion, mask], 1)
    grid = F.affine_grid(matrix, [n, both.shape[1], side, side], align_corners=False)
    both = F.grid_sample(both, grid, padding_mode="reflection", align_corners=False)
    place = (joints[..., :2] * 2 - 1 - shift[:, None, None]) / torch.diagonal(matrix[..., :2], 0, 1, 2)[:, None, None]
    joints[..., :2] = (place + 1) / 2
    joints[flip < 0] = joints[flip < 0][:, :, list(person_net.MIRRORED)]

    motion = both[:, 3:5] * uniform(0.5, 1.6, n, 2, 1, 1)
    motion[chance(0.35)] = 0
    motion[chance(0.1), 1] = 0
    return torch.cat([person_net.normalised_light(both[:, :3]), motion], 1), both[:, 5:], joints


def heat_maps(joints: torch.Tensor, side: int, sigma: float = 1.3) -> torch.Tensor:
    """(N, 14, side, side): Gaussians at the joints (N, people, 14, 3) of all people, joined by their maximum."""
    place = (torch.arange(side) + 0.5) / side
    x, y = (torch.exp(-(((place - joints[..., k : k + 1]) * side) ** 2) / (2 * sigma**2)) for k in (0, 1))
    return ((y * (joints[..., 2:] > 0))[..., :, None] * x[..., None, :]).amax(1)


def loss_function(logits: torch.Tensor, heat: torch.Tensor, mask: torch.Tensor, joints: torch.Tensor) -> torch.Tensor:
    """Cross-entropy and Dice of the mask, and squared error of the heat maps, weighted towards the joints, and towards
    those of the limbs, which the mask tells least of."""
    found = logits.sigmoid()
    dice = 1 - (2 * (found * mask).sum((1, 2, 3)) + 60) / ((found + mask).sum((1, 2, 3)) + 60)
    target = heat_maps(joints, heat.shape[-1])
    joint = (LIMBS[:, None, None] * (heat - target) ** 2 * (1 + 20 * target)).mean()
    return F.binary_cross_entropy_with_logits(logits, mask) + 0.7 * dice.mean() + 18 * joint


@torch.inference_mode()
def overlap(net: person_net.PersonNet, data: dict[str, torch.Tensor], motion: bool) -> float:
    """IoU of the mask over held-out pictures, with or without the motion channels."""
    net.eval()
    both = either = 0
    for i in range(0, len(data["rgb"]), 50):
        x = person_net.network_input(*(data[k][i : i + 50] for k in ("rgb", "from_background", "from_previous")))
        x[:, 3:] *= motion
        found, true = net(x)[0][:, 0] > 0, data["mask"][i : i + 50] > 127
        both, either = both + (found & true).sum().item(), either + (found | true).sum().item()
    net.train()
    return both / either


def train(
    renders: Renders, minutes: float, seed: int, half: bool, start: pathlib.Path | None, out: pathlib.Path
) -> None:
    """Trains for a time (AdamW, cosine schedule; pictures at 64, then 96, then 128 pixels) and writes the weights.

    `half`: convolutions in bfloat16, a third faster on a CPU that multiplies it. `start`: weights to go on from, at a
    third of the rate and at 128 pixels throughout.

    It starts on the first eighth of the renders and takes in the others as they come; the first shard is held out. What
    is written, at the end and every two minutes, is the exponential mean of the weights.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = person_net.load(start) if start else person_net.PersonNet().to(memory_format=torch.channels_last)
    net.train()
    mean = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995), use_buffers=True
    )
    best, size, growing = 1e-3 if start else 3e-3, 32, not start
    optimizer = torch.optim.AdamW(net.parameters(), lr=best, weight_decay=1e-2)
    data = renders.data(max(len(renders.paths) // 8, 2))
    step, shown, saved, begun = 0, 0, 0, time.monotonic()
    with progress.bar("train", round(60 * minutes), "s") as done:
        while (spent := (time.monotonic() - begun) / (60 * minutes)) < 1:
            rate = best * min(1, step / 100) * (0.5 * (1 + np.cos(np.pi * spent)) + 0.01)
            for group in optimizer.param_groups:
                group["lr"] = rate
            index = torch.randint(SHARD, len(data["rgb"]), (size,), generator=generator)
            side = 64 if growing and spent < 0.25 else 96 if growing and spent < 0.6 else SIDE
            x, mask, joints = augmented({name: values[index] for name, values in data.items()}, side, generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                logits, heat = net(x.contiguous(memory_format=torch.channels_last))
            loss = loss_function(logits.float(), heat.float(), mask, joints)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 5)
            optimizer.step()
            mean.update_parameters(net)
            step += 1
            elapsed = round(60 * minutes * spent)
            note = f"step {step}, loss {loss.item():.3f}"
            if elapsed - saved > 120:
                saved = elapsed
                save(mean.module, out)
                data = renders.data()
                test = {name: values[:SHARD] for name, values in data.items()}
                note += f", IoU {overlap(mean.module, test, True):.3f}, {overlap(mean.module, test, False):.3f} unmoved"
            done(elapsed - shown, note)
            shown = elapsed
    save(mean.module, out)


def save(net: person_net.PersonNet, path: pathlib.Path) -> None:
    """Writes the weights, in half precision."""
    weights = net.state_dict()
    weights = {name: (v.half() if v.is_floating_point() else v).contiguous() for name, v in weights.items()}
    atomic.write_bytes(path, safetensors.torch.save(weights))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--renders", type=pathlib.Path, required=True, help="folder for the rendered pictures")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--pictures", type=int, default=2500)
    parser.add_argument("--minutes", type=float, default=33)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=pathlib.Path, help="weights to go on from")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bfloat16", action="store_true", help="for CPUs that multiply it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with concurrent.futures.ProcessPoolExecutor(arguments.workers) as pool:
        renders = Renders(pool, arguments.renders, arguments.pictures, arguments.seed)
        train(renders, arguments.minutes, arguments.seed, arguments.bfloat16, arguments.start, arguments.out)


if __name__ == "__main__":
    main()
