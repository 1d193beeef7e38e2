"""Classical cues about people in a video: camera motion, motion against a modelled background, HOG and face votes,
GrabCut outlines (OpenCV). None of them needs weights from outside the installed packages.

Guarantees: `background_model` and `light_changes` read no pixel that `busy` covers, `inpainted` none of the hole.
"""

import functools
import pathlib

import cv2
import numpy as np

MOTION_SIDE = 120  # pixels; the short side at which camera motion is judged
GREY = 127  # what is shown where nothing is known
UNSEEN = np.iinfo(np.int16).max


def sample_times(total: int, count: int) -> np.ndarray:
    """At most `count` frame indices spread evenly over `total` frames, first and last among them."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int))


def disc(radius: float) -> np.ndarray:
    """The round structuring element of a radius in pixels."""
    size = 2 * max(round(radius), 0) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))


def dilated(mask: np.ndarray, radius: float) -> np.ndarray:
    """A mask (H, W) bool grown by `radius` pixels."""
    return cv2.dilate(mask.astype(np.uint8), disc(radius)) > 0


def without_holes(mask: np.ndarray, largest: float) -> np.ndarray:
    """A mask (H, W) bool with what it encloses closed, up to so many pixels (and what the picture's edge cuts off)."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats((~mask).astype(np.uint8), connectivity=4)
    small = stats[:, cv2.CC_STAT_AREA] < largest
    return mask | small[labels]


def lit_area(frames: np.ndarray, dark: int = 28, least: float = 0.02) -> tuple[slice, slice]:
    """Rows and columns of a clip (T, H, W, 3) within its black bars: outside them hardly anything is ever brighter than
    `dark` in `least` of a row or column. The whole picture where half or more of it would go."""
    brightest = largest(frames[sample_times(len(frames), 16)].max(0)) > dark
    area = []
    for axis in (1, 0):
        lit = np.flatnonzero(brightest.mean(axis) > least)
        low, high = (lit[0], lit[-1] + 1) if len(lit) else (0, 0)
        size = brightest.shape[1 - axis]
        area.append(slice(int(low), int(high)) if high - low > size / 2 else slice(0, size))
    return tuple(area)


def camera_motion(frames: np.ndarray, samples: int = 16) -> str | None:
    """Why the camera cannot be taken as static, or None where it can, for the price of some 20 small frames.

    Two things are measured at a short side of 120 pixels: the part of the picture that differs from the temporal
    median, and the part of the corners (followed from the first frame by pyramidal Lucas-Kanade, forth and back) that
    stays in place. A cut or a moving camera changes most of the picture, or displaces its corners and changes a good
    part of it. A slight sway before a plain background changes nothing and passes.
    """
    scale = MOTION_SIDE / min(frames.shape[1:3])
    size = (round(frames.shape[2] * scale), round(frames.shape[1] * scale))
    times = sample_times(len(frames), samples)
    small = [cv2.resize(frames[t], size, interpolation=cv2.INTER_AREA) for t in times]
    median = np.median(small, axis=0).astype(np.uint8)
    changed = [(largest(cv2.absdiff(image, median)) > 26).mean() for image in small]
    if np.quantile(changed, 0.75) > 0.4:
        return "most of the picture changes: the camera moves or the scene cuts"
    gray = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in small]
    points = corners(gray[0])
    if len(points) < 6:
        return None
    followed = [_followed(gray[0], image, points) for image in gray[1:]]
    found, staying, shift = np.median(followed, axis=0)
    if staying < 0.3 and (found < 0.2 or shift > 4 or np.median(changed) > 0.1) and np.median(changed) > 0.03:
        return "the camera moves or the scene cuts"
    return None


def _followed(first: np.ndarray, image: np.ndarray, points: np.ndarray) -> tuple[float, float, float]:
    """The part of the corners found again, the part of those that moved less than 0.7 pixels, and the shift in pixels
    (at the farthest corner of the picture) of the similarity that most of them follow."""
    there, seen, _ = cv2.calcOpticalFlowPyrLK(first, image, points, None, winSize=(13, 13), maxLevel=2)
    back, seen_back, _ = cv2.calcOpticalFlowPyrLK(image, first, there, None, winSize=(13, 13), maxLevel=2)
    sure = (seen[:, 0] > 0) & (seen_back[:, 0] > 0) & (np.linalg.norm((back - points)[:, 0], axis=1) < 0.5)
    if sure.sum() < 6:
        return sure.mean(), 0.0, 0.0
    staying = (np.linalg.norm((there - points)[sure, 0], axis=1) < 0.7).mean()
    motion, _ = cv2.estimateAffinePartial2D(points[sure], there[sure], ransacReprojThreshold=0.7)
    if motion is None:
        return sure.mean(), staying, 0.0
    height, width = first.shape
    frame = np.array([[0, 0], [width, 0], [0, height], [width, height]], float)
    return sure.mean(), staying, np.linalg.norm(frame @ motion[:, :2].T + motion[:, 2] - frame, axis=1).max()


def corners(
    image: np.ndarray, allowed: np.ndarray | None = None, each: int = 4, least: float = 3e-4, cells: int = 6
) -> np.ndarray:
    """Up to `each` corners in every cell of a grid, (N, 1, 2) float32: in allowed (H, W) places, of at least this
    strength (`cv2.cornerMinEigenVal`) and 3 % of that of the strong ones."""
    height, width = image.shape
    strength = cv2.cornerMinEigenVal(image, 5)
    allowed = np.ones(image.shape, np.uint8) if allowed is None else allowed.astype(np.uint8)
    points = []
    for rows in np.array_split(np.arange(height), cells):
        for columns in np.array_split(np.arange(width), cells):
            cell = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
            mask = np.ascontiguousarray(allowed[cell])
            found = cv2.goodFeaturesToTrack(np.ascontiguousarray(image[cell]), each, 0.2, 4, mask=mask)
            if found is not None:
                points.append(found + np.float32([columns[0], rows[0]]))
    if not points:
        return np.zeros((0, 1, 2), np.float32)
    points = np.concatenate(points)
    x, y = points[:, 0].round().astype(int).T
    strong = strength[y.clip(0, height - 1), x.clip(0, width - 1)]
    return np.ascontiguousarray(points[strong > max(least, 0.03 * np.quantile(strong, 0.9))])


def changed(before: np.ndarray, now: np.ndarray, levels: float) -> bool:
    """Whether any square of 8 pixels of a picture (H, W, 3) uint8 differs by more than that number of grey levels."""
    thin = (cv2.resize(picture, None, fx=0.125, fy=0.125, interpolation=cv2.INTER_AREA) for picture in (before, now))
    return bool((cv2.absdiff(*thin) > levels).any())


def largest(colours: np.ndarray) -> np.ndarray:
    """The largest of three channels (..., 3); numpy's own takes 25 times as long over an axis so short."""
    return np.maximum(np.maximum(colours[..., 0], colours[..., 1]), colours[..., 2])


def light_changes(frames: np.ndarray, busy: np.ndarray, background: np.ndarray, step: int = 4) -> np.ndarray:
    """What each frame's light adds to the background's: (T, 3) float32, the median difference over free pixels."""
    thin, free = frames[:, ::step, ::step].astype(np.int16), ~busy[:, ::step, ::step]
    difference = thin - background[None, ::step, ::step].astype(np.int16)
    return np.stack([np.median(d[f], axis=0) if f.sum() > 50 else np.zeros(3) for d, f in zip(difference, free)])


def background_model(
    frames: np.ndarray, busy: np.ndarray, samples: int = 60, tolerance: float = 26.0, agreement: float = 0.8
) -> tuple[np.ndarray, np.ndarray]:
    """The empty scene of a static camera: the temporal median of each pixel over the frames where it is free.

    A place counts as known where it was free in at least 3 sampled frames and 8 % of them, and where those samples
    agree: `agreement` of them within `tolerance` of the median. Two stable values mean that something stood there and
    was missed, and then neither is trusted.

    Args:
        frames: (T, H, W, 3) uint8.
        busy: (T, H, W) bool, what may not be read.

    Returns:
        background (H, W, 3) uint8 (0 where never free) and known (H, W) bool.
    """
    times = sample_times(len(frames), samples)
    free = ~busy[times]
    first, _ = _median_over_free(frames[times].astype(np.int16), free, tolerance, agreement)
    light = light_changes(frames[times], ~free, first).round().astype(np.int16)
    return _median_over_free(frames[times] - light[:, None, None], free, tolerance, agreement)


def _median_over_free(stack: np.ndarray, free: np.ndarray, tolerance: float, agreement: float):
    counts = free.sum(0)
    values = np.where(free[..., None], stack, UNSEEN).astype(np.int16)
    ordered = np.ascontiguousarray(values.transpose(1, 2, 3, 0))
    ordered.sort(axis=-1)
    middle = ((counts - 1).clip(0) // 2)[..., None, None].repeat(3, axis=2)
    median = np.take_along_axis(ordered, middle, -1)[..., 0]
    near = (largest(np.abs(values - median[None])) <= tolerance) & free
    known = (counts >= max(3, 0.08 * len(stack))) & (near.sum(0) >= agreement * counts)
    return np.where(counts[..., None] > 0, median, 0).clip(0, 255).astype(np.uint8), known


def foreground(
    frames: np.ndarray,
    background: np.ndarray,
    known: np.ndarray,
    light: np.ndarray,
    weak: float = 13,
    strong: float = 26,
) -> np.ndarray:
    """(T, H, W) bool: what differs from the empty scene, by hysteresis (weak differences that touch a strong one).

    Args:
        light: (T, 3) of `light_changes`.
    """
    out = np.zeros(frames.shape[:3], bool)
    reference = background.astype(np.float32)
    for t, frame in enumerate(frames):
        difference = largest(np.abs(frame - reference - light[t].astype(np.float32)))
        difference = cv2.blur(difference, (3, 3)) * known
        loose = cv2.morphologyEx((difference > weak).astype(np.uint8), cv2.MORPH_CLOSE, disc(1))
        _, labels = cv2.connectedComponents(loose, connectivity=8)
        counts = np.bincount(labels[difference > strong], minlength=labels.max() + 1)
        keep = counts >= 4
        keep[0] = False
        out[t] = keep[labels]
    return out


def touching(mask: np.ndarray, seed: np.ndarray) -> np.ndarray:
    """The pieces of a mask (H, W) bool that touch the seed, and the seed."""
    _, labels = cv2.connectedComponents((mask | seed).astype(np.uint8), connectivity=8)
    keep = np.zeros(labels.max() + 1, bool)
    keep[labels[seed]] = True
    return keep[labels]


def stirring(frames: np.ndarray, fps: float, seconds: float = 0.25, threshold: float = 14) -> np.ndarray:
    """(T, H, W) bool: what changed within a short time; furniture does not, and even who stands still sways."""
    lag = max(round(seconds * fps), 1)
    earlier = np.maximum(np.arange(len(frames)) - lag, 0)
    earlier[:lag] = np.minimum(np.arange(lag) + lag, len(frames) - 1)[: len(frames)]
    return np.stack(
        [largest(cv2.blur(cv2.absdiff(frames[t], frames[e]), (3, 3))) > threshold for t, e in enumerate(earlier)]
    )


def ghosts(frames: np.ndarray, background: np.ndarray, moved: np.ndarray, samples: int = 16) -> np.ndarray:
    """(H, W) bool: places where the supposed background holds what left, rather than the frame what came.

    The outline of something present is an edge of the frame; the outline of something that is gone but was taken into
    the background is an edge of the background. Blobs of `moved` (T, H, W) whose outline is more of an edge in the
    background than in the frame are ghosts; places that are ghosts in a quarter of the frames that differ are returned.
    """
    found, different = (np.zeros(frames.shape[1:3], int) for _ in range(2))
    behind = _edges(background)
    for t in sample_times(len(frames), samples):
        count, labels, stats, _ = cv2.connectedComponentsWithStats(moved[t].astype(np.uint8), connectivity=8)
        present = _edges(frames[t])
        different += moved[t]
        for label in np.flatnonzero(stats[1:count, cv2.CC_STAT_AREA] > 0.002 * moved[t].size) + 1:
            blob = (labels == label).astype(np.uint8)
            outline = cv2.morphologyEx(blob, cv2.MORPH_GRADIENT, disc(1)) > 0
            if behind[outline].mean() > 1.2 * present[outline].mean():
                found += blob
    return (found > 0) & (4 * found >= different)


def _edges(image: np.ndarray) -> np.ndarray:
    """Strength of the edges, (H, W) float32."""
    gray = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (0, 0), 1).astype(np.float32)
    return cv2.magnitude(cv2.Sobel(gray, cv2.CV_32F, 1, 0), cv2.Sobel(gray, cv2.CV_32F, 0, 1))


def inpainted(image: np.ndarray, hole: np.ndarray, radius: float = 5.0) -> np.ndarray:
    """(H, W, 3) uint8 with the hole (H, W) bool painted from its surroundings; grey where there are none."""
    if hole.all():
        return np.full_like(image, GREY)
    clean = np.where(hole[..., None], 0, image).astype(np.uint8)
    return cv2.inpaint(clean, hole.astype(np.uint8), radius, cv2.INPAINT_TELEA) if hole.any() else clean


@functools.cache
def _hog() -> cv2.HOGDescriptor:
    hog = cv2.HOGDescriptor()
    hog.setSVMDetector(cv2.HOGDescriptor_getDefaultPeopleDetector())
    return hog


def hog_people(frame: np.ndarray, least_weight: float = 0.6) -> np.ndarray:
    """Boxes (N, 4) xyxy of upright people by OpenCV's HOG detector, looked for at a height of at least 240 pixels.

    The detector's windows are wider than people; the boxes are their inner part.
    """
    scale = max(1.0, 240 / frame.shape[0])
    boxes, weights = _hog().detectMultiScale(
        cv2.resize(frame, None, fx=scale, fy=scale), winStride=(8, 8), padding=(16, 16), scale=1.06
    )
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)[np.asarray(weights).ravel() > least_weight] / scale
    return np.concatenate([boxes[:, :2] + boxes[:, 2:] * [0.22, 0.1], boxes[:, :2] + boxes[:, 2:] * [0.78, 0.92]], 1)


@functools.cache
def _face_cascade() -> cv2.CascadeClassifier:
    return cv2.CascadeClassifier(str(pathlib.Path(cv2.data.haarcascades) / "haarcascade_frontalface_alt.xml"))


def faces(frame: np.ndarray) -> np.ndarray:
    """Boxes (N, 4) xyxy of frontal faces by OpenCV's Haar cascade (it comes with the opencv wheel)."""
    scale = max(1.0, 240 / frame.shape[0])
    gray = cv2.cvtColor(cv2.resize(frame, None, fx=scale, fy=scale), cv2.COLOR_RGB2GRAY)
    boxes = _face_cascade().detectMultiScale(gray, 1.1, 4, minSize=(16, 16))
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4) / scale
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def grabcut(frame: np.ndarray, probability: np.ndarray, rounds: int = 2, side: int = 120) -> np.ndarray:
    """The outline that colour models of inside and outside draw around a person probability, (H, W) bool.

    Sure inside above 0.9, probable above 0.5, sure outside below 0.03 (Rother et al. 2004), at a short side of `side`.
    """
    scale = min(1.0, side / min(frame.shape[:2]))
    small = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    seed = cv2.resize(probability, small.shape[1::-1], interpolation=cv2.INTER_AREA)
    labels = np.full(seed.shape, cv2.GC_PR_BGD, np.uint8)
    labels[seed < 0.03], labels[seed > 0.5], labels[seed > 0.9] = cv2.GC_BGD, cv2.GC_PR_FGD, cv2.GC_FGD
    inside = labels % 2 == 1
    if inside.sum() < 20 or (~inside).sum() < 20:
        return probability > 0.5
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(0)
    cv2.grabCut(small, labels, None, *models, rounds, cv2.GC_INIT_WITH_MASK)
    outline = (labels % 2 == 1).astype(np.float32)
    return cv2.resize(outline, frame.shape[1::-1], interpolation=cv2.INTER_LINEAR) > 0.5
