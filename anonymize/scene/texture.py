"""Holes of a scene filled from around them: textured ones by copies (He & Sun 2012), plain and large ones smoothly."""

import cv2
import numpy as np
from scipy import sparse
from scipy.sparse import linalg

from anonymize.vision import cues

LARGEST = 0.3  # of the picture; copies would fill a larger hole with furniture that stands elsewhere
SMALLEST = 0.001  # of the picture; in a smaller hole no texture is seen
PLAIN = 1.0  # grey levels; mean distance to the blurred surroundings, below which a wall has no texture
STEP = 24  # grey levels; a larger difference at a hole's rim is an edge of the scene, not a seam
WORKED = 65_000  # pixels; more are scaled down for the search of copies, whose time grows with them


def filled(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 with the hole (H, W) bool filled; grey where there is nothing else.

    Each piece of the hole becomes copies of what surrounds it (shift map), levelled where they meet the rest; if it is
    large, tiny or in plain surroundings, or no copies are found, the harmonic function that its rim determines.

    Guarantees: a function of the hole and the pixels outside it, which stay as they are; the same ones give the same
    bytes.
    """
    if hole.all():
        return np.full_like(picture, cues.GREY)
    clean = np.where(hole[..., None], 0, picture).astype(np.uint8)
    out = harmonic(clean, ~hole).round().clip(0, 255).astype(np.uint8)
    side = min(hole.shape)
    _, labels = cv2.connectedComponents(cues.dilated(hole, 0.02 * side).astype(np.uint8))
    for label in np.unique(labels[hole]):
        piece = hole & (labels == label)
        if SMALLEST < piece.mean() < LARGEST and _roughness(clean, hole, piece) > PLAIN:
            x, y, width, height = cv2.boundingRect(piece.astype(np.uint8))
            margin = round(0.1 * side + 0.3 * max(width, height))
            around = slice(max(y - margin, 0), y + height + margin), slice(max(x - margin, 0), x + width + margin)
            copies = _copied(clean[around], hole[around])
            if copies is not None:
                out[around][piece[around]] = _levelled(clean[around], hole[around], copies)[piece[around]]
    return out


def harmonic(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Values (H, W, C) float64 whose unknown ones are each the mean of their neighbours: the smoothest continuation.

    Args:
        known: (H, W) bool, True somewhere.
    """
    out = values.astype(np.float64)
    number = np.cumsum(~known).reshape(known.shape) - 1
    total = int(number[-1, -1]) + 1
    right, neighbours, count = np.zeros((total, out.shape[2])), [], np.zeros(total)
    for axis in (0, 1):
        places = np.arange(known.size).reshape(known.shape)
        a, b = (places[:-1], places[1:]) if axis == 0 else (places[:, :-1], places[:, 1:])
        for here, there in ((a.ravel(), b.ravel()), (b.ravel(), a.ravel())):
            here, there = here[~known.flat[here]], there[~known.flat[here]]
            place, given = number.flat[here], known.flat[there]
            count += np.bincount(place, minlength=total)
            np.add.at(right, place[given], out.reshape(-1, out.shape[2])[there[given]])
            neighbours.append((place[~given], number.flat[there[~given]]))
    if total:
        rows, columns = map(np.concatenate, zip(*neighbours))
        links = sparse.csc_matrix((np.ones(len(rows)), (rows, columns)), shape=(total, total))
        out[~known] = linalg.splu(sparse.diags(count, format="csc") - links).solve(right)
    return out


def _roughness(clean: np.ndarray, hole: np.ndarray, piece: np.ndarray) -> float:
    """How far the pixels around a piece of the hole are from their blurred surroundings, grey levels on average."""
    free = (~hole).astype(np.float32)
    blurred = (
        cv2.GaussianBlur(clean.astype(np.float32), (0, 0), 2) / (cv2.GaussianBlur(free, (0, 0), 2) + 1e-3)[..., None]
    )
    ring = cues.dilated(piece, 0.08 * min(hole.shape)) & ~hole
    return float(np.abs(clean - blurred)[ring].mean()) if ring.any() else 0.0


def _copied(clean: np.ndarray, hole: np.ndarray) -> np.ndarray | None:
    """The picture with its hole filled by copies from outside it; None where none are found."""
    height, width = hole.shape
    scale = min(1.0, (WORKED / hole.size) ** 0.5)
    small = cv2.resize(clean, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    free = cv2.resize((~hole).astype(np.float32), small.shape[1::-1], interpolation=cv2.INTER_AREA) >= 1
    lab = cv2.cvtColor(np.where(free[..., None], small, 0).astype(np.uint8), cv2.COLOR_RGB2LAB)
    copies = np.zeros_like(lab)
    cv2.setRNGSeed(0)
    try:
        cv2.xphoto.inpaint(lab, free.astype(np.uint8) * 255, copies, cv2.xphoto.INPAINT_SHIFTMAP)
    except cv2.error:  # too little is free
        return None
    if not copies.any():
        return None
    return cv2.resize(cv2.cvtColor(copies, cv2.COLOR_LAB2RGB), (width, height), interpolation=cv2.INTER_CUBIC)


def _levelled(clean: np.ndarray, hole: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """The copies, with the light that differs at the rim of the hole carried on into it."""

    def near(picture: np.ndarray, where: np.ndarray) -> np.ndarray:
        part = where.astype(np.float32)
        return cv2.blur(picture * part[..., None], (5, 5)) / (cv2.blur(part, (5, 5)) + 1e-6)[..., None]

    rim = hole & cues.dilated(~hole, 1)
    difference = near(clean, ~hole) - near(copies, hole)
    difference[~rim | (cues.largest(np.abs(difference)) > STEP)] = 0
    return (copies + harmonic(difference, rim | ~hole)).round().clip(0, 255).astype(np.uint8)
