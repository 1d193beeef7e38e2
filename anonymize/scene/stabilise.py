"""Following a moving camera: shots of frames that see one scene, each frame with its homography into that scene.

Guarantees: nothing here reads a pixel that `busy` covers.
"""

import dataclasses
from collections.abc import Iterator

import cv2
import numpy as np

from anonymize.vision import cues

LARGEST = 4.0  # a scene has at most so many times the area of a frame; a longer pan becomes several shots
LEAST_INLIERS = 12
LEAST_SHARE = 0.6  # of the followed corners must obey the homography
_WINDOW = 21  # pixels; of the optical flow


@dataclasses.dataclass(frozen=True)
class Shot:
    """Frames that see one flat or distant scene.

    Attributes:
        times: (n,) frame numbers, ascending.
        to_scene: (n, 3, 3) homographies from pixels of those frames to pixels of the scene's picture.
        frame_size, scene_size: (width, height) of a frame and of the scene's picture.
    """

    times: np.ndarray
    to_scene: np.ndarray
    frame_size: tuple[int, int]
    scene_size: tuple[int, int]

    @classmethod
    def static(cls, frames: np.ndarray, times: np.ndarray) -> "Shot":
        """The shot of a camera that does not move: every pixel stays where it is."""
        size = frames.shape[2], frames.shape[1]
        return cls(times, np.tile(np.eye(3), (len(times), 1, 1)), size, size)

    @property
    def moves(self) -> bool:
        """Whether the camera moves in it."""
        return not (self.to_scene == np.eye(3)).all()

    def laid(self, to_scene: np.ndarray, frame: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A frame laid into the scene, and where what it then shows is free, (H, W) bool of the scene's size."""
        return _warped(frame, to_scene, self.scene_size), _wholly(free, to_scene, self.scene_size)

    def seen(self, to_scene: np.ndarray, scene: np.ndarray) -> np.ndarray:
        """A picture of the scene as a frame sees it."""
        return _warped(scene, np.linalg.inv(to_scene), self.frame_size) if self.moves else scene

    def known(self, to_scene: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Where a frame sees a known place of the scene, (H, W) bool."""
        return _wholly(known, np.linalg.inv(to_scene), self.frame_size) if self.moves else known


def _warped(image: np.ndarray, homography: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return cv2.warpPerspective(image, homography, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)


def _wholly(mask: np.ndarray, homography: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Where a warped mask holds for all the pixels that `_warped` mixes."""
    inside = cv2.erode(mask.astype(np.uint8) * 255, np.ones((5, 5)), borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return cv2.warpPerspective(inside, homography, size, flags=cv2.INTER_NEAREST) > 0


def shots(frames: np.ndarray, busy: np.ndarray, usable: np.ndarray) -> Iterator[Shot]:
    """Splits a moving camera's clip into shots, and chains each frame's motion to the middle frame of its shot.

    The motion between neighbouring frames is the homography that most corners outside `busy` obey (pyramidal
    Lucas-Kanade forth and back, RANSAC). A shot ends where it cannot be trusted (a cut, a blur, nothing to hold on to,
    a depth that no homography explains) or where the scene grows beyond `LARGEST`.

    Args:
        frames: (T, H, W, 3) uint8, with nothing of the people left in it.
        busy: (T, H, W) bool, what may not be read.
        usable: (T,) bool, the frames to be looked at.
    """
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    chain, times = [np.eye(3)], []
    for t in range(len(frames)):
        if times:
            step = motion(gray[t], gray[t - 1], ~busy[t], ~busy[t - 1]) if usable[t] else None
            longer = None if step is None else _shot(frames, [*times, t], [*chain, chain[-1] @ step])
            if longer is not None:
                times, chain = [*times, t], [*chain, chain[-1] @ step]
                continue
            yield _shot(frames, times, chain)
        times, chain = ([t], [np.eye(3)]) if usable[t] else ([], [])
    if times:
        yield _shot(frames, times, chain)


def _shot(frames: np.ndarray, times: list[int], chain: list[np.ndarray]) -> Shot | None:
    """The shot of frames whose homographies to the first one are `chain`; None where the scene would grow too large."""
    height, width = frames.shape[1:3]
    to_scene = np.linalg.inv(chain[len(chain) // 2]) @ np.stack(chain)
    outline = np.array([[0, 0, 1], [width, 0, 1], [0, height, 1], [width, height, 1]], float)
    corners = outline @ to_scene.transpose(0, 2, 1)
    if (corners[..., 2] < 0.2).any():
        return None
    corners = corners[..., :2] / corners[..., 2:]
    low, high = np.floor(corners.min((0, 1))), np.ceil(corners.max((0, 1)))
    if (high - low).prod() > LARGEST * width * height and len(times) > 1:
        return None
    shift = np.array([[1, 0, -low[0]], [0, 1, -low[1]], [0, 0, 1]])
    return Shot(np.array(times), shift @ to_scene, (width, height), tuple((high - low).astype(int).tolist()))


def motion(image: np.ndarray, other: np.ndarray, free: np.ndarray, other_free: np.ndarray) -> np.ndarray | None:
    """The homography (3, 3) from one grey picture to another, judged where both are free; None if not to be trusted."""
    far = cues.dilated(~free, _WINDOW // 2), cues.dilated(~other_free, _WINDOW // 2)
    points = cues.corners(image, ~far[0], each=8, least=3e-5)
    if len(points) < LEAST_INLIERS:
        return None
    flow = {"winSize": (_WINDOW, _WINDOW), "maxLevel": 3}
    there, found, _ = cv2.calcOpticalFlowPyrLK(image, other, points, None, **flow)
    back, found_back, _ = cv2.calcOpticalFlowPyrLK(other, image, there, None, **flow)
    sure = (found[:, 0] > 0) & (found_back[:, 0] > 0) & (np.linalg.norm((back - points)[:, 0], axis=1) < 1)
    sure &= _within(there, ~far[1])
    if sure.sum() < LEAST_INLIERS:
        return None
    cv2.setRNGSeed(0)
    homography, obeys = cv2.findHomography(points[sure], there[sure], cv2.RANSAC, 1.5)
    if homography is None or obeys.sum() < max(LEAST_INLIERS, LEAST_SHARE * sure.sum()):
        return None
    spread = cv2.contourArea(cv2.convexHull(points[sure][obeys[:, 0] > 0]))  # not to be stretched far beyond them
    return homography if spread > 0.15 * free.sum() and _is_camera_motion(homography, image.shape) else None


def _within(points: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """(N,) bool: which points (N, 1, 2) lie on an allowed pixel."""
    x, y = points[:, 0].round().astype(int).T
    inside = (x >= 0) & (y >= 0) & (x < allowed.shape[1]) & (y < allowed.shape[0])
    inside[inside] = allowed[y[inside], x[inside]]
    return inside


def _is_camera_motion(homography: np.ndarray, shape: tuple[int, int]) -> bool:
    """Whether a picture keeps its orientation, about its size and its shape from one frame to the next."""
    height, width = shape
    corners = np.float32([[[0, 0]], [[width, 0]], [[width, height]], [[0, height]]])
    moved = cv2.perspectiveTransform(corners, homography)
    return cv2.isContourConvex(moved) and 0.6 < cv2.contourArea(moved, oriented=True) / (width * height) < 1.6
