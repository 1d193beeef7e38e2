"""A triangle rasteriser in plain torch: RGBA, depth and who is where, with no GL and the same bytes on every run.

Faces become scanline spans, spans become samples, and the nearest sample of each place wins (`amax` over a key that
holds inverse depth, then face number). Only winners are shaded. A span holds the samples whose centres lie in
[left edge, right edge), so that faces sharing an edge leave neither gap nor overlap.

The light is fixed to the camera and knows nothing of any scene.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from anonymize.avatar.camera import Camera

NEAR = 0.05  # metres; a face that reaches nearer is left out
_KEY_LIGHT = (-0.42, -0.66, -0.62)  # towards the light, camera axes (x right, y down, z forward)
_FACE_BITS = 32


@dataclasses.dataclass(frozen=True)
class Mesh:
    """A moving surface.

    Attributes:
        vertices: (T, V, 3) float32, world metres.
        faces: (F, 3) int64, counter-clockwise seen from the side that shows; the other side is not drawn.
        colours: 0..1, one of: (V, 3) per vertex; (F, R, R, 3) mesh colours, cell [i, j] of a face holding the colour
            where the weights of its second and third corners are i/R and j/R (Yuksel et al., 2010).
    """

    vertices: torch.Tensor
    faces: torch.Tensor
    colours: torch.Tensor

    def __len__(self) -> int:
        return len(self.vertices)


@dataclasses.dataclass(frozen=True)
class Rendering:
    """What a camera sees.

    Attributes:
        rgba: (H, W, 4) uint8, straight colour; alpha is coverage and RGB is 0 wherever alpha is 0.
        depth: (H, W) float32, metres along the optical axis, of the nearest surface; infinite where nothing is.
        person: (H, W) int16, index of the mesh nearest to the camera; -1 where nothing is.
    """

    rgba: np.ndarray
    depth: np.ndarray
    person: np.ndarray


@torch.no_grad()
def render(meshes: Sequence[Mesh], frame: int, camera: Camera, samples: int = 2) -> Rendering:
    """Draws `meshes` at `frame`, nearer ones over farther ones, with `samples`² samples a pixel."""
    height, width = camera.height, camera.width
    rgba = np.zeros((height, width, 4), np.uint8)
    depth = np.full((height, width), np.inf, np.float32)
    person = np.full((height, width), -1, np.int16)
    if not meshes:
        return Rendering(rgba, depth, person)

    screen = [_project(mesh.vertices[frame], camera, samples) for mesh in meshes]
    shown = [_facing(*points, mesh.faces) for points, mesh in zip(screen, meshes)]
    offsets = np.cumsum([0] + [len(mesh.vertices[0]) for mesh in meshes])
    corners = torch.cat([mesh.faces[kept] + int(start) for mesh, kept, start in zip(meshes, shown, offsets)])
    xy, inverse = (torch.cat(parts) for parts in zip(*screen))
    sample, winner = _nearest(xy, inverse, corners, width * samples, height * samples)
    if not len(sample):
        return Rendering(rgba, depth, person)

    y, x = sample // (width * samples), sample % (width * samples)
    corner = corners.index_select(0, winner)
    weights = _weights(xy, inverse, corner, x, y)
    light = torch.cat([_light(mesh.vertices[frame], mesh.faces[kept], camera) for mesh, kept in zip(meshes, shown)])
    ends = torch.tensor([len(kept) for kept in shown], device=xy.device).cumsum(0)
    mesh_of = torch.bucketize(winner, ends, right=True)
    colour = torch.empty(len(sample), 3, device=xy.device)
    for index, (mesh, kept) in enumerate(zip(meshes, shown)):
        mine = slice(None) if len(meshes) == 1 else (mesh_of == index).nonzero()[:, 0]
        first = int(ends[index]) - len(kept)
        colour[mine] = _colour(mesh, kept[winner[mine] - first], weights[mine])
    colour *= (light[corner] * weights).sum(1, keepdim=True)

    pixel = (y // samples) * width + x // samples
    total = torch.zeros(height * width, 4, device=xy.device)
    total.index_add_(0, pixel, torch.cat([colour.clamp_(0, 1), colour.new_ones(len(colour), 1)], 1))
    seen = total[:, 3].nonzero()[:, 0]
    total = total[seen]
    total[:, :3] /= total[:, 3:]
    total[:, 3] /= samples**2
    seen = seen.cpu().numpy()
    rgba.reshape(-1, 4)[seen] = (total * 255 + 0.5).to(torch.uint8).cpu().numpy()

    # The nearest sample of a pixel names its depth and its mesh.
    nearness = 1 / (weights / inverse[corner]).sum(1)
    key = nearness.view(torch.int32).long() << _FACE_BITS | mesh_of
    best = torch.zeros(height * width, dtype=torch.int64, device=xy.device).scatter_reduce_(0, pixel, key, "amax")
    best = best.cpu().numpy()[seen]
    depth.reshape(-1)[seen] = 1 / (best >> _FACE_BITS).astype(np.int32).view(np.float32)
    person.reshape(-1)[seen] = best & 0x7FFF
    return Rendering(rgba, depth, person)


@torch.no_grad()
def silhouette(vertices: torch.Tensor, faces: torch.Tensor, camera: Camera) -> torch.Tensor:
    """Whether a pixel's centre is covered: vertices (V, 3), faces (F, 3) → (H, W) bool."""
    xy, inverse = _project(vertices, camera, 1)
    corners = faces[_facing(xy, inverse, faces)]
    _, row, start, stop = _spans(_corner_columns(xy, corners), camera.width, camera.height)
    step = torch.zeros(camera.height * (camera.width + 1), dtype=torch.int32, device=vertices.device)
    step += torch.bincount(row * (camera.width + 1) + start, minlength=len(step))
    step -= torch.bincount(row * (camera.width + 1) + stop, minlength=len(step))
    return step.view(camera.height, -1).cumsum(1)[:, :-1] > 0


def vertex_normals(vertices: torch.Tensor, faces: torch.Tensor) -> torch.Tensor:
    """Unit normals of vertices (..., V, 3): the mean of the adjacent faces' normals, weighted by their areas."""
    a, b, c = vertices.index_select(-2, faces.T.reshape(-1)).unflatten(-2, (3, -1)).unbind(-3)
    normal = torch.linalg.cross(b - a, c - a)
    total = torch.zeros_like(vertices)
    for corner in range(3):
        total.index_add_(-2, faces[:, corner], normal)
    return torch.nn.functional.normalize(total, dim=-1)


def _project(vertices: torch.Tensor, camera: Camera, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample coordinates (V, 2) and inverse depths (V,), 0 for what is nearer than `NEAR` or behind the camera."""
    x, y, z = camera.to_camera(vertices).unbind(1)
    inverse = torch.where(z > NEAR, 1 / z, 0.0)
    scale = camera.focal * samples * inverse
    centre = camera.width * samples / 2, camera.height * samples / 2
    return torch.stack([x * scale + centre[0], y * scale + centre[1]], 1), inverse


def _facing(xy: torch.Tensor, inverse: torch.Tensor, faces: torch.Tensor) -> torch.Tensor:
    """Numbers of the faces wholly in front of the camera that turn their outside to it."""
    corner = faces.T.reshape(-1)
    (ax, bx, cx), (ay, by, cy), (ai, bi, ci) = (
        value.index_select(0, corner).view(3, -1) for value in (*xy.T.contiguous(), inverse)
    )
    area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
    return ((area < 0) & (ai * bi * ci > 0)).nonzero()[:, 0]


def _spans(columns: tuple[torch.Tensor, ...], width: int, height: int) -> tuple[torch.Tensor, ...]:
    """The faces' scanline spans: face (S,), row (S,), first column (S,), last column + 1 (S,)."""
    ax, ay, bx, by, cx, cy = columns

    def ordered(px, py, qx, qy):
        swap = qy < py
        return (
            torch.where(swap, qx, px),
            torch.where(swap, qy, py),
            torch.where(swap, px, qx),
            torch.where(swap, py, qy),
        )

    ax, ay, bx, by = ordered(ax, ay, bx, by)
    bx, by, cx, cy = ordered(bx, by, cx, cy)
    ax, ay, bx, by = ordered(ax, ay, bx, by)

    first, last = (y.sub(0.5).ceil_().clamp_(0, height).long() for y in (ay, cy))
    face, index = _expand(last - first)
    row = first[face] + index
    y = row + 0.5
    # From top to bottom along the long side, and along whichever of the other two sides crosses this row.
    ax, ay, bx, by, cx, cy = _take(face, ax, ay, bx, by, cx, cy)
    upper = y < by
    px, py = torch.where(upper, ax, bx), torch.where(upper, ay, by)
    qx, qy = torch.where(upper, bx, cx), torch.where(upper, by, cy)
    one = ax + (y - ay) * ((cx - ax) / (cy - ay))
    two = px + (y - py) * ((qx - px) / (qy - py))
    start = torch.minimum(one, two).sub_(0.5).ceil_().clamp_(0, width).long()
    stop = torch.maximum(one, two).sub_(0.5).ceil_().clamp_(0, width).long()
    kept = (stop > start).nonzero()[:, 0]
    return tuple(_take(kept, face, row, start, stop))


def _take(index: torch.Tensor, *columns: torch.Tensor) -> list[torch.Tensor]:
    """`column[index]` of each (several times faster than indexing)."""
    return [column.index_select(0, index) for column in columns]


def _corner_columns(xy: torch.Tensor, corners: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """ax, ay, bx, by, cx, cy, each (F,), of the corners (F, 3)."""
    index = corners.T.reshape(-1)
    (ax, bx, cx), (ay, by, cy) = (column.view(3, -1) for column in _take(index, *xy.T.contiguous()))
    return ax, ay, bx, by, cx, cy


def _expand(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For item i repeated counts[i] times: the item (N,) and which of its repeats (N,)."""
    item = torch.repeat_interleave(counts)
    first = (counts.cumsum(0) - counts).index_select(0, item)
    return item, torch.arange(len(item), device=counts.device) - first


def _nearest(xy: torch.Tensor, inverse: torch.Tensor, corners: torch.Tensor, width: int, height: int):
    """The covered samples (N,), as row * width + column in ascending order, and the face (N,) that each shows."""
    ax, ay, bx, by, cx, cy = columns = _corner_columns(xy, corners)
    face, row, start, stop = _spans(columns, width, height)
    ai, bi, ci = _take(corners.T.reshape(-1), inverse)[0].view(3, -1)
    # Inverse depth is affine on the screen.
    area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
    across = ((bi - ai) * (cy - ay) - (ci - ai) * (by - ay)) / area
    down = ((ci - ai) * (bx - ax) - (bi - ai) * (cx - ax)) / area
    low, high = torch.minimum(torch.minimum(ai, bi), ci), torch.maximum(torch.maximum(ai, bi), ci)
    ai, ax, ay, across, down, low, high = _take(face, ai, ax, ay, across, down, low, high)
    base = ai + across * (start + 0.5 - ax) + down * (row + 0.5 - ay)
    span, index = _expand(stop - start)
    base, across, low, high, face, start = _take(span, base, across, low, high, face, row * width + start)
    value = torch.addcmul(base, across, index.float()).clamp_(low, high)
    key = value.view(torch.int32).long() << _FACE_BITS | face
    sample = start + index
    buffer = torch.zeros(width * height, dtype=torch.int64, device=xy.device).scatter_reduce_(0, sample, key, "amax")
    covered = buffer.nonzero()[:, 0]
    return covered, buffer[covered] & (1 << _FACE_BITS) - 1


def _weights(xy: torch.Tensor, inverse: torch.Tensor, corner: torch.Tensor, x: torch.Tensor, y: torch.Tensor):
    """Perspective-correct barycentric weights (N, 3) of sample centres in their faces' corners (N, 3)."""
    ax, ay, bx, by, cx, cy = _corner_columns(xy, corner)
    px, py = x + 0.5 - ax, y + 0.5 - ay
    bx, by, cx, cy = bx - ax, by - ay, cx - ax, cy - ay
    area = bx * cy - cx * by
    b = ((px * cy - cx * py) / area).clamp_(0, 1)
    c = ((bx * py - px * by) / area).clamp_(0, 1)
    weights = torch.stack([(1 - b - c).clamp_(0, 1), b, c], 1) * inverse[corner]
    return weights / weights.sum(1, keepdim=True)


def _light(vertices: torch.Tensor, faces: torch.Tensor, camera: Camera) -> torch.Tensor:
    """Light received at each vertex (V,): a soft key light above the camera's left shoulder, and light from above."""
    rotation = torch.as_tensor(camera.rotation, dtype=vertices.dtype, device=vertices.device)
    key = torch.tensor(_KEY_LIGHT, dtype=vertices.dtype, device=vertices.device)
    normals = vertex_normals(vertices, faces)
    lit = normals @ (rotation.T @ (key / key.norm()))
    return 0.40 + 0.10 * normals[:, 1] + 0.62 * (0.5 + 0.5 * lit).clamp_(0, 1).square_()


def _colour(mesh: Mesh, face: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Unlit colours (N, 3) at barycentric `weights` (N, 3) of the faces (N,)."""
    if mesh.colours.ndim == 2:
        corner = mesh.faces.index_select(0, face).view(-1)
        return (mesh.colours.index_select(0, corner).view(-1, 3, 3) * weights[..., None]).sum(1)
    side = mesh.colours.shape[1]
    i, j = (weights[:, 1:] * side).long().unbind(1)
    i = i.clamp_(max=side - 1)
    j = torch.minimum(j, side - 1 - i)  # a sample on the far side of a face stays within it
    return mesh.colours.view(-1, 3).index_select(0, (face * side + i) * side + j)
