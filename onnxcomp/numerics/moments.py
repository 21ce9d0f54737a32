"""Second moments of one linear map ``y = W x + b`` and the refits they answer.

Rows of x are input patches (im2col), rows of y the targets. With the centred moments
``S = E[x x^T]`` and ``T = E[y x^T]`` every linear map W' with its best bias has the error

    E ||y - W' x - b'||^2 = const + tr((W* - W') S (W* - W')^T),    W* = T S^-1.

`Moments` holds S and T; `RowMoments` holds the rows themselves and solves in their (n, n)
dual, for few rows of many columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_solve

from onnxcomp.errors import DataError, ParameterError
from onnxcomp.numerics.least_squares import EXACT, damped_cholesky, symmetric

Array: TypeAlias = NDArray[np.float64]
Rows: TypeAlias = NDArray[np.floating[Any]]
Columns: TypeAlias = NDArray[np.integer[Any]]

_BLOCK_ROWS = 2**15  # rows summed in float32 before they join the float64 sums
_BLOCK_COLUMNS = 4096  # columns of float32 rows raised to float64 at a time


class Metric(Protocol):
    """What inputs and targets of a linear map say about its weights."""

    @property
    def d(self) -> int:
        """Number of inputs."""

    @property
    def m(self) -> int:
        """Number of outputs."""

    @property
    def mean_energy(self) -> float:
        """Mean variance of an input, ``tr(S) / d``."""

    @property
    def target_energy(self) -> float:
        """Variance of the targets, summed over the outputs."""

    def times(self, W: Array) -> Array:
        """Return ``W S``, shape (rows of W, d)."""

    def quadratic(self, W: Array) -> Array:
        """Return ``W S W^T``, symmetric."""

    def column_energy(self) -> Array:
        """Return the variance of every input, the diagonal of S, shape (d,)."""

    def solve(
        self, prior: Array, damping: float = 1e-3, columns: Columns | None = None
    ) -> Array:
        """Return the best W, damped towards `prior`.

        ``W* = (T + lam P)(S + lam I)^-1`` with ``lam = damping * mean_energy``.

        Args:
            prior: the known weights of all inputs, shape (m, d).
            damping: lam relative to `mean_energy`; raised tenfold where Cholesky fails.
            columns: inputs that are kept, shape (k,); the others are removed.

        Returns:
            float64, shape (m, d) or (m, k).
        """

    def bias(self, W: Array, columns: Columns | None = None) -> Array:
        """Return the best bias of W, ``mean(y) - W mean(x)``, shape (m,)."""

    def error(self, W: Array, columns: Columns | None = None) -> float:
        """Return ``E ||y - W x - b||^2`` on the seen rows with the best bias."""


@dataclass(frozen=True)
class Moments:
    """Dense second moments.

    Attributes:
        count: rows seen.
        x_mean, y_mean: shapes (d,) and (m,).
        xx: the metric S, shape (d, d): the centred covariance of x, shrunk by `shrinkage`.
        yx: centred cross covariance T, shape (m, d), never shrunk.
        yy: centred variance of every output, shape (m,).
        shrinkage: rho of ``S = (1 - rho) S_rows + rho diag(S_rows)``.
    """

    count: int
    x_mean: Array
    y_mean: Array
    xx: Array
    yx: Array
    yy: Array
    shrinkage: float = 0.0

    @property
    def d(self) -> int:
        """Number of inputs."""
        return len(self.x_mean)

    @property
    def m(self) -> int:
        """Number of outputs."""
        return len(self.y_mean)

    @property
    def mean_energy(self) -> float:
        """Mean variance of an input."""
        return float(np.trace(self.xx)) / self.d

    @property
    def target_energy(self) -> float:
        """Variance of the targets, summed over the outputs."""
        return float(self.yy.sum())

    def times(self, W: Array) -> Array:
        """Return ``W S``."""
        return np.asarray(W @ self.xx)

    def quadratic(self, W: Array) -> Array:
        """Return ``W S W^T``."""
        return symmetric(W @ self.xx @ W.T)

    def column_energy(self) -> Array:
        """Return the diagonal of S."""
        return np.diag(self.xx).copy()

    def solve(
        self, prior: Array, damping: float = 1e-3, columns: Columns | None = None
    ) -> Array:
        """Return the best W, damped towards `prior` (see `Metric.solve`).

        Shrinking S changes what S explains, so T is replaced by ``T + P (S - S_rows)``: the
        residual ``y - P x`` is regressed, and a prior that is already exact stays.
        """
        prior = _weights(prior, self.m, self.d)
        kept = slice(None) if columns is None else columns
        start = prior[:, kept]
        S = self.xx[:, kept][kept, :]
        residual = self.yx[:, kept] - start @ S
        if self.shrinkage:
            residual += (prior @ (self.xx - self._rows_xx()))[:, kept]
        factor, _ = damped_cholesky(S, _relative(damping, self.mean_energy, S))
        return start + cho_solve((factor, True), residual.T).T

    def bias(self, W: Array, columns: Columns | None = None) -> Array:
        """Return the best bias of W."""
        x_mean = self.x_mean if columns is None else self.x_mean[columns]
        return np.asarray(self.y_mean - W @ x_mean)

    def error(self, W: Array, columns: Columns | None = None) -> float:
        """Return ``E ||y - W x - b||^2`` on the seen rows with the best bias."""
        kept = slice(None) if columns is None else columns
        S = self._rows_xx()[:, kept][kept, :]
        explained = float(np.vdot(W, 2 * self.yx[:, kept] - W @ S))
        return max(self.target_energy - explained, 0.0)

    def _rows_xx(self) -> Array:
        """Return the covariance of the rows, before shrinking."""
        if not self.shrinkage:
            return self.xx
        xx = self.xx / (1 - self.shrinkage)
        np.fill_diagonal(xx, np.diag(self.xx))
        return xx


class MomentsBuilder:
    """Sums blocks of rows to `Moments`.

    Products are formed in the blocks' own precision, at most 2^15 rows at a time, and summed
    in float64. The first block's mean is subtracted from all rows, against cancellation.
    """

    def __init__(self, d: int, m: int) -> None:
        """Start empty, for rows of d inputs and m targets."""
        self._count = 0
        self._x = np.zeros(d)
        self._y = np.zeros(m)
        self._xx = np.zeros((d, d))
        self._yx = np.zeros((m, d))
        self._yy = np.zeros(m)
        self._shift: tuple[Rows, Rows] | None = None

    @property
    def begun(self) -> bool:
        """Whether rows were seen whose mean all others are shifted by."""
        return self._shift is not None

    def add(self, x: ArrayLike, y: ArrayLike) -> None:
        """Add rows x (n, d) and targets y (n, m), float32 or float64.

        Raises:
            ParameterError: the shapes do not fit each other or the builder.
        """
        self.summed(x, y)()

    @np.errstate(over="ignore", invalid="ignore")  # `finish` refuses what comes of it
    def summed(self, x: ArrayLike, y: ArrayLike) -> Callable[[], None]:
        """Sum rows, in any thread once some have `begun`, and return what adds the sums.

        Raises:
            ParameterError: the shapes do not fit each other or the builder.
        """
        x, y = _floating(x), _floating(y)
        if x.shape != (len(y), len(self._x)) or y.shape != (len(x), len(self._y)):
            raise ParameterError.of(
                "MomentsBuilder.add",
                "x, y",
                f"arrays of shapes (n, {len(self._x)}) and (n, {len(self._y)})",
                (x.shape, y.shape),
            )
        if not len(x):
            return partial(self._merge, [])
        if self._shift is None:
            self._shift = x.mean(axis=0), y.mean(axis=0)
        x_shift, y_shift = self._shift
        blocks = (slice(i, i + _BLOCK_ROWS) for i in range(0, len(x), _BLOCK_ROWS))
        sums = [_sums(x[rows] - x_shift, y[rows] - y_shift) for rows in blocks]
        return partial(self._merge, sums)

    @np.errstate(over="ignore", invalid="ignore")
    def _merge(self, parts: Sequence["_Sums"]) -> None:
        for part in parts:
            self._count += part.count
            self._x += part.x
            self._y += part.y
            self._xx += part.xx
            self._yx += part.yx
            self._yy += part.yy

    def finish(self) -> Moments:
        """Return the moments; S is shrunk by rho = d / (d + rows) where rows < 10 d.

        Raises:
            DataError: no rows were added, or they hold values that are not finite.
        """
        if self._shift is None:
            raise DataError("no rows to take moments of; the layer saw no samples")
        n, d = self._count, len(self._x)
        x_mean, y_mean = self._x / n, self._y / n
        xx = symmetric(self._xx / n - np.outer(x_mean, x_mean))
        yx = self._yx / n - np.outer(y_mean, x_mean)
        yy = np.clip(self._yy / n - y_mean**2, 0.0, None)
        np.fill_diagonal(xx, np.clip(np.diag(xx), 0.0, None))
        if not (np.isfinite(np.trace(xx) + yy.sum()) and np.isfinite(yx).all()):
            raise DataError(f"{n} rows hold NaN or Inf; look for them in the samples")
        shrinkage = d / (d + n) if n < 10 * d else 0.0
        if shrinkage:
            variances = np.diag(xx).copy()
            xx *= 1 - shrinkage
            np.fill_diagonal(xx, variances)
        x_shift, y_shift = self._shift
        return Moments(n, x_mean + x_shift, y_mean + y_shift, xx, yx, yy, shrinkage)


@dataclass(frozen=True)
class _Sums:
    """Sums over one block of rows, less the builder's shift."""

    count: int
    x: Array
    y: Array
    xx: Rows
    yx: Rows
    yy: Array


def _sums(x: Rows, y: Rows) -> _Sums:
    yy = np.einsum("nm,nm->m", y, y, dtype=np.float64)
    x_sum, y_sum = (a.sum(axis=0, dtype=np.float64) for a in (x, y))
    return _Sums(len(x), x_sum, y_sum, x.T @ x, y.T @ x, yy)


@dataclass(frozen=True)
class RowMoments:
    """The centred rows themselves: the dual form for few rows of many columns.

    Attributes:
        x: float32, shape (n, d), centred.
        y: float64, shape (n, m), centred.
        x_mean, y_mean: float64, shapes (d,) and (m,).
        count: n.
    """

    x: NDArray[np.float32]
    y: Array
    x_mean: Array
    y_mean: Array
    count: int

    @classmethod
    def of(cls, x: ArrayLike, y: ArrayLike) -> "RowMoments":
        """Centre rows x (n, d) and targets y (n, m).

        Raises:
            DataError: there are no rows, or they hold values that are not finite.
        """
        x, y = _floating(x), np.asarray(y, np.float64)
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
            raise ParameterError.of(
                "RowMoments.of", "x, y", "arrays (n, d) and (n, m)", (x.shape, y.shape)
            )
        if not len(x):
            raise DataError("no rows to take moments of; the layer saw no samples")
        x_mean, y_mean = x.mean(axis=0, dtype=np.float64), y.mean(axis=0)
        if not (np.isfinite(x_mean).all() and np.isfinite(y_mean).all()):
            raise DataError(f"{len(x)} rows hold NaN or Inf; look for them in the samples")
        centred = (x - x_mean.astype(x.dtype)).astype(np.float32, copy=False)
        return cls(centred, y - y_mean, x_mean, y_mean, len(x))

    @property
    def d(self) -> int:
        """Number of inputs."""
        return len(self.x_mean)

    @property
    def m(self) -> int:
        """Number of outputs."""
        return len(self.y_mean)

    @property
    def mean_energy(self) -> float:
        """Mean variance of an input."""
        return float(self.column_energy().mean())

    @property
    def target_energy(self) -> float:
        """Variance of the targets, summed over the outputs."""
        return float(np.vdot(self.y, self.y)) / self.count

    def outputs(self, W: Array) -> Array:
        """Return ``O = X W^T`` of shape (n, rows of W): ``O^T O = n W S W^T``."""
        return self._outputs(W, self.x)

    def times(self, W: Array) -> Array:
        """Return ``W S``."""
        return self._back(self.outputs(W)) / self.count

    def quadratic(self, W: Array) -> Array:
        """Return ``W S W^T``."""
        outputs = self.outputs(W)
        return symmetric(outputs.T @ outputs) / self.count

    def column_energy(self) -> Array:
        """Return the diagonal of S."""
        energy = np.einsum("nd,nd->d", self.x, self.x, dtype=np.float64)
        return np.asarray(energy) / self.count

    def solve(
        self, prior: Array, damping: float = 1e-3, columns: Columns | None = None
    ) -> Array:
        """Return the best W, damped towards `prior` (see `Metric.solve`).

        ``W* = P + R^T (X X^T + n lam I)^-1 X`` with the residual rows ``R = Y - X P^T``.
        """
        prior = _weights(prior, self.m, self.d)
        start = prior if columns is None else prior[:, columns]
        x = self.x if columns is None else self.x[:, columns]
        residual = self.y - self._outputs(start, x)
        gram = np.zeros((self.count, self.count))
        for part in _column_blocks(x):
            block = x[:, part].astype(np.float64)
            gram += block @ block.T
        lam = self.count * self.mean_energy
        factor, _ = damped_cholesky(gram, _relative(damping, lam, gram))
        return np.asarray(start + self._back(cho_solve((factor, True), residual), x))

    def bias(self, W: Array, columns: Columns | None = None) -> Array:
        """Return the best bias of W."""
        x_mean = self.x_mean if columns is None else self.x_mean[columns]
        return np.asarray(self.y_mean - W @ x_mean)

    def error(self, W: Array, columns: Columns | None = None) -> float:
        """Return ``E ||y - W x - b||^2`` with the best bias."""
        x = self.x if columns is None else self.x[:, columns]
        residual = self.y - self._outputs(W, x)
        return float(np.vdot(residual, residual)) / self.count

    @staticmethod
    def _outputs(W: Array, x: NDArray[np.float32]) -> Array:
        """Return ``X W^T`` in float64, shape (n, rows of W)."""
        total = np.zeros((len(x), len(W)))
        for part in _column_blocks(x):
            total += x[:, part].astype(np.float64) @ W[:, part].T
        return total

    def _back(self, Z: Array, x: NDArray[np.float32] | None = None) -> Array:
        """Return ``Z^T X`` in float64, shape (columns of Z, d)."""
        x = self.x if x is None else x
        parts = [Z.T @ x[:, part].astype(np.float64) for part in _column_blocks(x)]
        return np.concatenate(parts, axis=1)


def _column_blocks(x: Rows) -> list[slice]:
    return [slice(i, i + _BLOCK_COLUMNS) for i in range(0, x.shape[1], _BLOCK_COLUMNS)]


def _floating(values: ArrayLike) -> Rows:
    values = np.asarray(values)
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float32)


def _weights(W: Array, m: int, d: int) -> Array:
    if np.shape(W) != (m, d):
        raise ParameterError.of("solve", "prior", f"an array of shape ({m}, {d})", np.shape(W))
    return np.asarray(W, np.float64)


def _relative(damping: float, energy: float, S: Array) -> float:
    """Return lam = damping * energy relative to the mean of S's own diagonal."""
    own = float(np.trace(S)) / max(len(S), 1)
    return max(damping * energy / own, EXACT) if own > 0 else EXACT
