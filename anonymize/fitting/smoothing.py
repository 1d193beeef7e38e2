"""Values over time, smoothed where they are noisy and filled in where they are unknown."""

import numpy as np
from scipy.linalg import solveh_banded

_LEAST = 0.01  # weight of what is between the neighbours of an unknown value


def smoothed(values: np.ndarray, weights: np.ndarray, stiffness: float) -> np.ndarray:
    """The sequence x that minimises Σ weights_t |x_t − values_t|² + stiffness Σ |x_{t−1} − 2 x_t + x_{t+1}|².

    (Whittaker 1923.) Unknown values are pulled a little to the line between their neighbours, and beyond the first and
    the last known value to that one. With weight 1 the amplitude of a sine of ω radians a frame is multiplied by
    1 / (1 + 16 stiffness sin⁴(ω / 2)).

    Args:
        values: (T, ...); of no meaning, and possibly NaN, where the weight is 0.
        weights: (T,) 0 or more; 0 where the value is unknown.
    """
    total = len(values)
    flat = np.where(weights[:, None] > 0, values.reshape(total, -1), 0.0).astype(np.float64)
    if total < 3 or not (weights > 0).any():
        return flat.reshape(values.shape)
    times, known = np.arange(total), weights > 0
    for column in range(flat.shape[1]):
        flat[~known, column] = np.interp(times[~known], times[known], flat[known, column])
    weights = np.where(known, weights, _LEAST)
    bands = np.zeros((3, total))  # of the symmetric matrix: second, first upper diagonal, diagonal
    bands[2] = weights
    for shift, factor in enumerate((1.0, -2.0, 1.0)):
        bands[2, shift : total - 2 + shift] += stiffness * factor**2
    bands[1, 1 : total - 1] -= 2 * stiffness
    bands[1, 2:total] -= 2 * stiffness
    bands[0, 2:] += stiffness
    return solveh_banded(bands, weights[:, None] * flat).reshape(values.shape)


def stiffness(cutoff: float, fps: float) -> float:
    """The stiffness at which `smoothed` halves a sine of `cutoff` Hz at `fps` frames a second."""
    return 1 / (16 * np.sin(min(np.pi * cutoff / fps, np.pi / 2)) ** 4)
