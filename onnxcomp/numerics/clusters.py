"""Samples that resemble each other, such as crops of one picture or frames of one speaker."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2

_LARGEST = 16  # clusters
_FEWEST = 4  # samples per cluster on average
_WIDEST = 4096  # columns; more are projected at random, which keeps distances about
_PROJECTED, _COMPONENTS = 64, 16
_ROUNDS = 20
_DIGITS = 9  # of points around 1 in all; what differs below is the same sample again


def clusters(arrays: Sequence[NDArray[Any]], seed: int) -> NDArray[np.int64]:
    """Cluster samples by k-means on the principal components of all their values.

    Args:
        arrays: each of shape (n, ...), n >= 1, of numbers; they count alike, whatever their
            size and scale. Values that are not finite count as 0.
        seed: seed of the projection and of the first centres.

    Returns:
        The cluster of each sample, (n,); at most 16 clusters, and all 0 where there is
        nothing to tell samples apart by.
    """
    rng = np.random.default_rng(seed)
    columns = [part for array in arrays if (part := _columns(array, rng)).any()]
    count = len(arrays[0])
    wanted = min(_LARGEST, count // _FEWEST)
    if wanted < 2 or not columns:
        return np.zeros(count, np.int64)
    left, scale, _ = np.linalg.svd(np.concatenate(columns, axis=1), full_matrices=False)
    points = (left * scale)[:, :_COMPONENTS].round(_DIGITS)
    wanted = min(wanted, len(np.unique(points, axis=0)))  # more would be empty
    _, found = kmeans2(points, wanted, iter=_ROUNDS, minit="++", rng=rng)
    return np.asarray(found, np.int64)


def _columns(array: NDArray[Any], rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the values of an array as (n, d) around their mean, of mean square 1 / d or 0."""
    values = np.nan_to_num(array.reshape(len(array), -1), posinf=0.0, neginf=0.0)
    if values.shape[1] > _WIDEST:
        drawn = rng.standard_normal((values.shape[1], _PROJECTED)).astype(np.float32)
        values = values.astype(np.float32) @ drawn
    centred: NDArray[np.float64] = values - values.mean(axis=0, dtype=np.float64)
    scale = float(np.linalg.norm(centred))
    return centred / scale if scale else centred
