"""Smoothing of landmarks over time: the one-euro filter (Casiez et al. 2012), run both ways so that nothing lags."""

import numpy as np


def one_euro(values: np.ndarray, fps: float, cutoff: float, beta: float) -> np.ndarray:
    """Values (T, ...) smoothed: the mean of a pass forwards and one backwards.

    Args:
        cutoff: Hz, of what hardly moves.
        beta: how much the cutoff rises with speed (units of `values` a second).
    """
    return (_one_way(values, fps, cutoff, beta) + _one_way(values[::-1], fps, cutoff, beta)[::-1]) / 2


def _one_way(values: np.ndarray, fps: float, cutoff: float, beta: float) -> np.ndarray:
    out, speed = values.astype(np.float32), np.zeros_like(values[0])
    steady = _weight(np.float32(1), fps)
    for t in range(1, len(values)):
        speed = speed + steady * ((values[t] - out[t - 1]) * fps - speed)
        out[t] = out[t - 1] + _weight(cutoff + beta * np.abs(speed), fps) * (values[t] - out[t - 1])
    return out


def _weight(cutoff: np.ndarray, fps: float) -> np.ndarray:
    """The share of a new value in an exponential mean with this cutoff."""
    return 1 / (1 + fps / (2 * np.pi * cutoff))
