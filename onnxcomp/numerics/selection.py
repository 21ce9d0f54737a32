"""Greedy elimination of the channels that several linear readers see (optimal brain surgeon).

Removing the columns g of one reader and refitting the others costs, in its damped metric
``S + lam I`` and with ``H = (S + lam I)^-1``,

    delta_g = tr(W_g (H_gg)^-1 W_g^T),

after which ``W <- W - W_g (H_gg)^-1 H_g`` and ``H <- H - H_g^T (H_gg)^-1 H_g``. Each step
removes the channel with the smallest sum over the readers; so the kept sets are nested and
one run gives the whole curve. The refit of any kept set is `Moments.solve(W, columns=...)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import blas, lapack

from onnxcomp.errors import DataError, ParameterError
from onnxcomp.numerics.least_squares import damped_cholesky
from onnxcomp.numerics.moments import Moments, RowMoments

Array: TypeAlias = NDArray[np.float64]

_DELAY = 16  # channels whose update of the inverse is applied in one product,
_DELAYED = 144  # or as many as have this many columns, where that is more
_GRAM_VALUES = 2**24  # float32 values of contributions or products held at a time


@dataclass(frozen=True)
class Reader:
    """One linear map that reads the channels.

    Attributes:
        W: its weights (or refitted target), shape (m, d).
        metric: the moments of its inputs. `RowMoments` select by channel contributions: each
            channel's share of the output is scaled as a whole, not refitted column by column.
        columns: integer, shape (channels, k): the columns that each channel occupies. Columns
            of no channel always stay.
        weight: factor of this reader's loss in the sum.
    """

    W: Array
    metric: Moments | RowMoments
    columns: NDArray[np.integer[Any]]
    weight: float = 1.0


@dataclass(frozen=True)
class Elimination:
    """The order in which channels go, and the price.

    Attributes:
        order: all channels, first removed first, shape (C,).
        losses: the weighted error after the first k removals and the best refit, in the
            damped metric, shape (C + 1,), from 0 upwards.
    """

    order: NDArray[np.intp]
    losses: Array

    def kept(self, count: int) -> NDArray[np.intp]:
        """Return the `count` channels that stay longest, sorted.

        Raises:
            ParameterError: `count` is not within 0..C.
        """
        if not 0 <= count <= len(self.order):
            raise ParameterError.of("kept", "count", f"0 to {len(self.order)}", count)
        return np.sort(self.order[len(self.order) - count :])


def eliminate(
    readers: Sequence[Reader], channels: int, *, damping: float = 1e-3
) -> Elimination:
    """Remove all channels one by one, always the one that costs least.

    Args:
        readers: at least one; their deltas are summed.
        channels: C.
        damping: lam relative to the mean variance of each reader's inputs.

    Raises:
        ParameterError: a reader's columns do not fit its weights or the channels.
        DataError: the damping is too small for inputs that depend on each other.
    """
    if not readers:
        raise ParameterError.of("eliminate", "readers", "at least one reader", len(readers))
    states = [_state(reader, channels, damping) for reader in readers]
    gone = np.zeros(channels, bool)
    order = np.empty(channels, np.intp)
    losses = np.zeros(channels + 1)
    for step in range(channels):
        deltas = np.sum([state.deltas() for state in states], axis=0)
        deltas[gone] = np.inf
        channel = int(np.argmin(deltas))
        for state in states:
            state.remove(channel)
        gone[channel] = True
        order[step] = channel
        losses[step + 1] = losses[step] + deltas[channel]
    return Elimination(order, losses)


class _State:
    """One reader during the elimination, its columns ordered channel by channel.

    The inverse is kept as ``H - V V^T``, H by its lower triangle, and the weights, of shape
    (d, m) here, as ``W - V Z``: a removal fills k columns of V and rows of Z, which join H and
    W when Z is full, and then the removed columns are dropped as well. The diagonal blocks of
    the inverse and of ``W W^T`` are always current.
    """

    def __init__(self, W: Array, H: Array, channels: int, k: int, weight: float) -> None:
        self._W = np.ascontiguousarray(W.T)
        self._H = H
        self._k = k
        self._weight = weight
        self._alive = np.arange(channels)  # channel of every stored block
        self._gone = np.zeros(channels, bool)  # by stored block
        self._Z = np.empty((max(_DELAY, _DELAYED // k) * k, self._W.shape[1]))
        self._V = np.empty((len(H), len(self._Z)))
        self._filled = 0  # columns of V and rows of Z
        blocks = np.arange(channels * k).reshape(channels, k)
        diagonal = np.tril(H[blocks[:, :, None], blocks[:, None, :]])
        self._diagonal = diagonal + np.tril(diagonal, -1).transpose(0, 2, 1)
        self._gram = self._grams()
        self._channels = channels

    def deltas(self) -> Array:
        """Return the weighted cost of removing each channel, shape (C,)."""
        diagonal = self._diagonal.copy()
        diagonal[self._gone] = np.eye(self._k)
        costs = np.zeros(self._channels)
        costs[self._alive] = np.einsum("ckl,clk->c", np.linalg.inv(diagonal), self._gram)
        return self._weight * np.clip(costs, 0.0, None)

    def remove(self, channel: int) -> None:
        """Remove one channel and refit the others."""
        k, filled = self._k, self._filled
        at = int(np.searchsorted(self._alive, channel))
        block = slice(at * k, at * k + k)
        V, Z = self._V[:, :filled], self._Z[:filled]
        rows = np.hstack([self._H[block, : block.stop], self._H[block.stop :, block].T])
        rows -= V[block] @ V.T
        rows[:, block] = self._diagonal[at]
        own = self._W[block] - V[block] @ Z
        try:
            root = np.linalg.cholesky(self._diagonal[at])
        except np.linalg.LinAlgError as error:
            raise DataError(
                f"eliminating channel {channel} of {self._channels}: its inputs are too close"
                " to linear combinations of others; raise the damping"
            ) from error
        # rows^T (H_gg)^-1 rows = update update^T, and the weights lose update change
        update = np.asarray(np.linalg.solve(root, rows).T, np.float64)
        change = np.linalg.solve(root, own)
        product = self._W @ change.T - V @ (Z @ change.T)
        u, p = self._blocks(update), self._blocks(product)
        cross = p @ u.transpose(0, 2, 1)
        self._gram += u @ (change @ change.T) @ u.transpose(0, 2, 1)
        self._gram -= cross + cross.transpose(0, 2, 1)
        self._diagonal -= u @ u.transpose(0, 2, 1)
        self._V[:, filled : filled + k], self._Z[filled : filled + k] = update, change
        self._filled += k
        self._gone[at] = True
        if self._filled == len(self._Z):
            self._flush()

    def _flush(self) -> None:
        n, k = len(self._alive), self._k
        stay = np.append(np.repeat(~self._gone, k), np.ones(len(self._H) - n * k, bool))
        V = self._V[stay]
        self._H = self._H[np.ix_(stay, stay)]
        if V.size:
            lower = {"c": self._H.T, "trans": 1, "overwrite_c": 1}  # as columns go first there
            self._H = blas.dsyrk(-1.0, V.T, beta=1.0, **lower).T
        self._W = self._W[stay]
        self._W -= V @ self._Z
        self._diagonal = self._diagonal[~self._gone]
        self._alive = self._alive[~self._gone]
        self._gone = np.zeros(len(self._alive), bool)
        self._V = np.empty((len(self._H), len(self._Z)))
        self._filled = 0
        self._gram = self._grams()

    def _grams(self) -> Array:
        """Return the products of every channel's weights, shape (channels, k, k)."""
        blocks = self._blocks(self._W)
        return blocks @ blocks.transpose(0, 2, 1)

    def _blocks(self, rows: Array) -> Array:
        """Return the rows of columns that belong to stored channels, channel by channel."""
        n, k = len(self._alive), self._k
        return rows[: n * k].reshape(n, k, rows.shape[1])


def _state(reader: Reader, channels: int, damping: float) -> _State:
    columns, d = np.asarray(reader.columns), reader.metric.d
    flat = columns.reshape(-1)
    if columns.ndim != 2 or len(columns) != channels or len(np.unique(flat)) != len(flat):
        raise ParameterError.of(
            "eliminate", "columns", f"distinct, of shape ({channels}, k)", columns.shape
        )
    if reader.W.shape[1:] != (d,) or flat.min(initial=0) < 0 or flat.max(initial=-1) >= d:
        raise ParameterError.of(
            "eliminate", "W, columns", f"over the {d} inputs of the metric", reader.W.shape
        )
    if isinstance(reader.metric, RowMoments):
        gram = contribution_gram(reader.W, reader.metric, columns)
        H = _inverse(gram, damping)
        return _State(np.ones((1, channels)), H, channels, 1, reader.weight)
    rest = np.setdiff1d(np.arange(d), flat)
    order = np.concatenate([flat, rest])
    H = _inverse(reader.metric.xx[np.ix_(order, order)], damping)
    W = np.asarray(reader.W, np.float64)[:, order]
    return _State(W, H, channels, columns.shape[1], reader.weight)


def _inverse(S: Array, damping: float) -> Array:
    """Return the lower triangle of ``(S + lam I)^-1``, lam = damping * tr(S) / d."""
    factor, _ = damped_cholesky(S, damping)
    inverse, info = lapack.dpotri(factor, lower=1)
    if info:
        raise DataError(f"second moments of size {len(S)} have no inverse; raise the damping")
    return np.ascontiguousarray(inverse)


def contribution_gram(
    W: Array, metric: RowMoments, columns: NDArray[np.integer[Any]]
) -> Array:
    """Return ``M[c, c'] = E <Z_c, Z_c'>`` of the channels' shares ``Z_c = X_c W_c^T``.

    Their sum is the reader's output, so that M is the metric of one scale per channel.

    Args:
        W: shape (m, d).
        metric: the rows.
        columns: integer, shape (C, k).

    Returns:
        float64, shape (C, C).
    """
    if columns.shape[1] ** 2 * (metric.count + len(W)) < metric.count * len(W):
        return _gram_of_columns(W, metric, columns) / metric.count
    count = len(columns)
    blocks = W[:, columns].transpose(1, 2, 0).astype(np.float32)  # (C, k, m)
    gram = np.zeros((count, count))
    rows = max(_GRAM_VALUES // max(count * len(W), 1), 1)
    for first in range(0, metric.count, rows):
        x = metric.x[first : first + rows][:, columns].transpose(1, 0, 2)  # (C, rows, k)
        shares = (x @ blocks).reshape(count, -1)
        gram += shares @ shares.T
    return gram / metric.count


def _gram_of_columns(W: Array, metric: RowMoments, columns: NDArray[np.integer[Any]]) -> Array:
    """Return `contribution_gram` times n, as block sums of ``(X^T X) o (W^T W)``.

    Far cheaper than the shares where a channel has few columns: a layer of 4,096 inputs and
    outputs takes 2 x 4,096**3 operations instead of as many for every row.
    """
    count, k = columns.shape
    flat = columns.reshape(-1)
    x, w = metric.x[:, flat], W[:, flat].astype(np.float32)
    gram = np.zeros((count, count))
    step = max(_GRAM_VALUES // max(k * len(flat), 1), 1)
    for first in range(0, count, step):
        part = slice(first * k, (first + step) * k)
        products = (x[:, part].T @ x) * (w[:, part].T @ w)
        gram[first : first + step] = products.reshape(-1, k, count, k).sum(axis=(1, 3))
    return gram
