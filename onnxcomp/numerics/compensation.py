"""Changing the weights of a linear map column after column, each taking back what came before.

With the metric ``S = R R^T`` (R upper triangular) the error of the changes ``D = W - Q`` is

    tr(D S D^T) = sum_k |sum_{j<=k} D_j R_jk|^2,

so that column k, changed after all before it, can take back what they did: its target is
``t_k = w_k + sum_{j<k} D_j R_jk / R_kk`` and what it leaves is ``R_kk^2 (t_k - q_k)^2``.  This
is the order of SparseGPT and GPTQ (Frantar and Alistarh 2023, arXiv:2301.00774; Frantar et al.
2022, arXiv:2210.17323) without their inverse.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxcomp.numerics.least_squares import damped_cholesky
from onnxcomp.numerics.moments import Moments, RowMoments

Array: TypeAlias = NDArray[np.float64]
Choice: TypeAlias = Callable[[Array, Array], Array]

DAMPING = 1e-2  # of the metric, relative to the mean variance of an input
_BLOCK = 64  # columns whose corrections are formed in one product
_WIDEST = 4096  # columns that correct each other; wider maps are changed part by part


class Compensation:
    """Changes weights of the groups of one linear map in the metric of its inputs.

    Args:
        metrics: moments of each group's inputs, all of the same d.
    """

    def __init__(self, metrics: Sequence[Moments | RowMoments]) -> None:
        d = metrics[0].d
        parts = [slice(i, min(i + _WIDEST, d)) for i in range(0, d, _WIDEST)]
        self._factors = [(p, np.stack([_triangular(m, p) for m in metrics])) for p in parts]

    @property
    def scale(self) -> float:
        """Geometric mean of all ``R_kk^2``."""
        pivots = [np.einsum("gkk->gk", R).reshape(-1) for _, R in self._factors]
        return float(np.exp(2.0 * np.mean(np.log(np.concatenate(pivots)))))

    def change(self, W: Array, choose: Choice) -> tuple[Array, float]:
        """Change weights column after column.

        Args:
            W: shape (groups, m, d).
            choose: gives the new values of a column from its targets (groups, m) and
                ``R_kk`` (groups, 1).

        Returns:
            The new weights Q, and ``tr((W - Q) S (W - Q)^T)`` summed over the groups, in the
            damped metric.
        """
        found = [_sweep(W[:, :, part], R, choose) for part, R in self._factors]
        return np.concatenate([Q for Q, _ in found], axis=2), sum(e for _, e in found)


def _triangular(metric: Moments | RowMoments, part: slice) -> Array:
    """Return R of the damped metric ``S + lam I = R R^T`` of some columns."""
    if isinstance(metric, Moments):
        S = metric.xx[part, part]
    else:
        rows = metric.x[:, part].astype(np.float64)
        S = rows.T @ rows / metric.count
    lower, _ = damped_cholesky(S[::-1, ::-1], DAMPING)
    return np.ascontiguousarray(lower[::-1, ::-1])


def _sweep(W: Array, R: Array, choose: Choice) -> tuple[Array, float]:
    pivots = np.einsum("gkk->gk", R)
    Q, changes, error = np.zeros_like(W), np.zeros_like(W), 0.0
    d = W.shape[2]
    for first in range(0, d, _BLOCK):
        last = min(first + _BLOCK, d)
        carried = changes[:, :, :first] @ R[:, :first, first:last]
        for k in range(first, last):
            inner = changes[:, :, first:k] @ R[:, first:k, k, None]
            pivot = pivots[:, k, None]
            target = W[:, :, k] + (carried[:, :, k - first] + inner[:, :, 0]) / pivot
            Q[:, :, k] = choose(target, pivot)
            changes[:, :, k] = W[:, :, k] - Q[:, :, k]
            error += float(np.sum((pivot * (target - Q[:, :, k])) ** 2))
    return Q, error
