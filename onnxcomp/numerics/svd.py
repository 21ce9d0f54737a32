"""Low-rank forms of one convolution kernel in the metric of its input patches.

A kernel W of shape (m, c, kh, kw) is the matrix (m, d) on patches of d = c * kh * kw values,
ordered (c, kh, kw). With the patches' covariance S a form W' loses

    error = E ||W x - W' x||^2 = tr((W - W') S (W - W')^T),

summed over the outputs. ``metric=None`` means S = I: the weights alone. A matrix (Gemm,
MatMul) is a kernel of shape (m, d, 1, 1). W may be a refitted target W* (`Metric.solve`).

    output_basis   kh x kw to r channels, then 1 x 1   one eigenproblem, optimal at every rank
    input_basis    1 x 1 to r channels, then kh x kw
    spatial        kh x 1 to r channels, then 1 x kw
    tucker2        1 x 1, kh x kw, 1 x 1

Every form splits the energy of each inner channel evenly between the two sides.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh, qr, solve_triangular, svd, svdvals

from onnxcomp.errors import DataError, ParameterError
from onnxcomp.numerics.factorization import (
    Factorization,
    PatchMetric,
    balanced,
    dense_metric,
)
from onnxcomp.numerics.least_squares import (
    EXACT,
    basis_cross,
    basis_gram,
    damped_cholesky,
    fit_first,
    fit_last,
    offset_mean,
    symmetric,
    top_eigen,
)
from onnxcomp.numerics.moments import RowMoments

Array: TypeAlias = NDArray[np.float64]
Shape: TypeAlias = tuple[int, int, int, int]
_ROUGHLY = 3e-2  # tolerance of a round's first factor: to 1e-5 no digit of four changes


def tucker_ranks(rank: int, in_channels: int, out_channels: int) -> tuple[int, int]:
    """Return Tucker's (input rank q, output rank p) at equal shares of their channels.

    `rank` counts on the wider side: 0 to max(in_channels, out_channels).
    """
    wide = max(in_channels, out_channels)
    return -(-rank * in_channels // wide), -(-rank * out_channels // wide)


# ---------------------------------------------------------------------------- output basis


def output_basis(W: Array, metric: PatchMetric | None, rank: int) -> Factorization:
    """Return the optimal kh x kw convolution to `rank` channels followed by a 1 x 1.

    With U the top eigenvectors of ``K = W S W^T``: ``B = U^T W``, ``A = U``; the error is the
    sum of the other eigenvalues. S is never inverted.
    """
    kernel, matrix = _matrix(W, metric, rank, "output_basis")
    Q, R = _spanned(matrix)
    outputs = _few_outputs(R, metric, rank)
    if outputs is not None:
        _, roots, modes = svd(outputs, full_matrices=False)
        energy, V = roots[:rank] ** 2, modes[:rank].T
    else:
        energy, V = top_eigen(_outputs(R, metric), rank)
    U = Q @ V
    B = (U.T @ matrix).reshape(rank, *kernel.shape[1:])
    return balanced("output_basis", (B, U[:, :, None, None]), (energy,))


def output_basis_errors(W: Array, metric: PatchMetric | None, top: int | None = None) -> Array:
    """Return the exact error at every rank 0..min(m, d), or only up to `top`."""
    _, matrix = _matrix(W, metric, 1, "output_basis")
    _, R = _spanned(matrix)
    outputs = _few_outputs(R, metric, 0)
    if outputs is not None:
        energy = np.zeros(len(R))
        energy[: len(outputs)] = svdvals(outputs) ** 2
    else:
        energy = np.clip(eigh(_outputs(R, metric), eigvals_only=True)[::-1], 0.0, None)
    return _tail(energy)[: None if top is None else top + 1]


# ------------------------------------------------------- a basis repeated at every offset


def input_basis(
    W: Array, metric: PatchMetric | None, rank: int, *, rounds: int = 0
) -> Factorization:
    """Return a 1 x 1 convolution to `rank` channels followed by a kh x kw.

    The basis is that of the channel metric averaged over the offsets; the second factor is
    the exact least squares given the basis; `rounds` as in `spatial`.
    """
    kernel, _ = _matrix(W, metric, rank, "input_basis")
    m, c, kh, kw = kernel.shape
    B, A, energy = _separated(kernel.reshape(m, c, kh * kw), metric, rank, rounds)
    kernels = (B.reshape(rank, c, 1, 1), A.reshape(m, rank, kh, kw))
    return balanced("input_basis", kernels, (energy,))


def input_basis_errors(W: Array, metric: PatchMetric | None, top: int | None = None) -> Array:
    """Return the exact error of `input_basis` without rounds at the ranks 0..max, or `top`."""
    kernel, _ = _matrix(W, metric, 1, "input_basis")
    m, c, kh, kw = kernel.shape
    return _separated_errors(kernel.reshape(m, c, kh * kw), metric, top)


def spatial(
    W: Array, metric: PatchMetric | None, rank: int, *, rounds: int = 2
) -> Factorization:
    """Return a kh x 1 convolution to `rank` channels followed by a 1 x kw.

    As `input_basis`, over (channel, row) inputs repeated at kw offsets. Each of the `rounds`
    refits the first factor exactly, then the second; a round that does not lower the error is
    dropped and ends the rounds.
    """
    kernel, _ = _matrix(W, metric, rank, "spatial")
    m, c, kh, kw = kernel.shape
    B, A, energy = _separated(kernel.reshape(m, c * kh, kw), metric, rank, rounds)
    kernels = (B.reshape(rank, c, kh, 1), A.reshape(m, rank, 1, kw))
    return balanced("spatial", kernels, (energy,))


def spatial_errors(W: Array, metric: PatchMetric | None, top: int | None = None) -> Array:
    """Return an upper bound at every rank 0..max, or `top`: the error before the rounds."""
    kernel, _ = _matrix(W, metric, 1, "spatial")
    m, c, kh, kw = kernel.shape
    return _separated_errors(kernel.reshape(m, c * kh, kw), metric, top)


# ----------------------------------------------------------------------------------- Tucker


def tucker2(W: Array, metric: PatchMetric | None, ranks: tuple[int, int]) -> Factorization:
    """Return 1 x 1 to q, kh x kw to p, 1 x 1, for ``ranks = (q, p)``.

    The input basis as in `input_basis`; with the exact least squares ``W_B`` given that basis,
    the output side is `output_basis` of ``W_B`` in the metric of the q channels.
    """
    q, p = ranks
    kernel, _ = _matrix(W, metric, q, "input_basis")
    m, c, kh, kw = kernel.shape
    if not 1 <= p <= min(m, q * kh * kw):
        raise ParameterError.of("tucker2", "ranks[1]", f"1 to {min(m, q * kh * kw)}", p)
    blocks = kernel.reshape(m, c, kh * kw)
    B, W_B, first_energy = _separated(blocks, metric, q, 0)
    flat = W_B.reshape(m, -1)
    K = (
        flat @ flat.T
        if metric is None
        else flat @ basis_gram(B, dense_metric(metric)) @ flat.T
    )
    energy, U = top_eigen(K, p)
    core = (U.T @ flat).reshape(p, q, kh, kw)
    kernels = (B.reshape(q, c, 1, 1), core, U[:, :, None, None])
    return balanced("tucker2", kernels, (first_energy, energy))


def tucker2_errors(W: Array, metric: PatchMetric | None, top: int | None = None) -> Array:
    """Return an upper bound at every rank 0..max(m, c), or `top`, of `tucker_ranks`.

    The sum of the input basis' error at q and the output basis' error at p: restricting the
    input only lowers ``K = W S W^T``, hence also its tail.
    """
    m, c = W.shape[:2]
    top = max(m, c) if top is None else top
    ranks = np.array([tucker_ranks(r, c, m) for r in range(top + 1)])
    inputs = input_basis_errors(W, metric, int(ranks[-1, 0]))
    outputs = output_basis_errors(W, metric, int(ranks[-1, 1]))
    q = np.minimum(ranks[:, 0], len(inputs) - 1)
    p = np.minimum(ranks[:, 1], len(outputs) - 1)
    return np.asarray(np.minimum(inputs[q] + outputs[p], outputs[0]))


# ------------------------------------------------------------------------------------ table


@dataclass(frozen=True)
class Form:
    """What a pass needs of one low-rank form.

    Attributes:
        build: (W, metric, rank) to the factorization.
        errors: (W, metric, top) to the errors of the ranks 0..top, exact or an upper bound.
        shapes: (shape of W, rank) to the factors' shapes.
        max_rank: shape of W to the largest rank that still changes the error.
        applies: whether the form differs from the simpler ones at W's shape.
    """

    build: Callable[[Array, PatchMetric | None, int], Factorization]
    errors: Callable[[Array, PatchMetric | None, int | None], Array]
    shapes: Callable[[Shape, int], tuple[Shape, ...]]
    max_rank: Callable[[Shape], int]
    applies: Callable[[Shape], bool]


def _output_basis_shapes(shape: Shape, r: int) -> tuple[Shape, ...]:
    m, c, kh, kw = shape
    return (r, c, kh, kw), (m, r, 1, 1)


def _input_basis_shapes(shape: Shape, r: int) -> tuple[Shape, ...]:
    m, c, kh, kw = shape
    return (r, c, 1, 1), (m, r, kh, kw)


def _spatial_shapes(shape: Shape, r: int) -> tuple[Shape, ...]:
    m, c, kh, kw = shape
    return (r, c, kh, 1), (m, r, 1, kw)


def _tucker2_ranks(shape: Shape, r: int) -> tuple[int, int]:
    """Return `tucker_ranks` without the channels that cannot carry anything."""
    m, c, kh, kw = shape
    q, p = tucker_ranks(r, c, m)
    q = min(q, m * kh * kw)
    return q, min(p, q * kh * kw)


def _tucker2_shapes(shape: Shape, r: int) -> tuple[Shape, ...]:
    m, c, kh, kw = shape
    q, p = _tucker2_ranks(shape, r)
    return (q, c, 1, 1), (p, q, kh, kw), (m, p, 1, 1)


def _tucker2_at(W: Array, metric: PatchMetric | None, rank: int) -> Factorization:
    m, c, kh, kw = W.shape
    return tucker2(W, metric, _tucker2_ranks((m, c, kh, kw), rank))


FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "output_basis": Form(
            output_basis,
            output_basis_errors,
            _output_basis_shapes,
            lambda s: min(s[0], s[1] * s[2] * s[3]),
            lambda s: True,
        ),
        "input_basis": Form(
            input_basis,
            input_basis_errors,
            _input_basis_shapes,
            lambda s: min(s[1], s[0] * s[2] * s[3]),
            lambda s: s[2] * s[3] > 1,
        ),
        "spatial": Form(
            spatial,
            spatial_errors,
            _spatial_shapes,
            lambda s: min(s[1] * s[2], s[0] * s[3]),
            lambda s: s[2] > 1 and s[3] > 1,
        ),
        "tucker2": Form(
            _tucker2_at,
            tucker2_errors,
            _tucker2_shapes,
            lambda s: max(s[0], s[1]),
            lambda s: s[2] * s[3] > 1,
        ),
    }
)


# ---------------------------------------------------------------------------------- helpers


def _matrix(W: Array, metric: PatchMetric | None, rank: int, form: str) -> tuple[Array, Array]:
    """Return W in float64 as (m, c, kh, kw) and as (m, d) after checking it and the rank."""
    kernel = np.asarray(W, np.float64)
    if kernel.ndim != 4 or not kernel.size:
        raise ParameterError.of(form, "W", "a kernel (m, c, kh, kw)", kernel.shape)
    m, c, kh, kw = kernel.shape
    top = FORMS[form].max_rank((m, c, kh, kw))
    if not 1 <= rank <= top:
        raise ParameterError.of(form, "rank", f"1 to {top}", rank)
    d = c * kh * kw
    size = getattr(metric, "d", d)
    if size != d:
        raise ParameterError.of(form, "metric", f"over {d} inputs", size)
    return kernel, kernel.reshape(m, d)


def _spanned(matrix: Array) -> tuple[Array, Array]:
    """Return Q with orthonormal columns and R of at most (d, d) with ``Q R`` the matrix.

    ``K = W S W^T`` has the eigenvalues of ``R S R^T`` and no others but zeros.
    """
    m, d = matrix.shape
    if m <= d:
        return np.eye(m), matrix
    Q, R = np.linalg.qr(matrix)
    return Q, R


def _few_outputs(matrix: Array, metric: PatchMetric | None, rank: int) -> Array | None:
    """Return O with ``O^T O = matrix S matrix^T``, or None.

    Where S is of few rows, O's singular vectors are less work than that product's
    eigenvectors; there are no more than rows.
    """
    if not isinstance(metric, RowMoments):
        return None
    if metric.count < rank or 2 * metric.count > len(matrix):
        return None
    return np.asarray(metric.outputs(matrix) / np.sqrt(metric.count))


def _outputs(matrix: Array, metric: PatchMetric | None) -> Array:
    return np.asarray(matrix @ matrix.T) if metric is None else metric.quadratic(matrix)


def _tail(energy: Array) -> Array:
    """Return the sums of all but the first 0, 1, ... energies."""
    return np.append(np.cumsum(energy[::-1])[::-1], 0.0)


def _mode_basis(blocks: Array, metric: PatchMetric | None, rank: int) -> tuple[Array, Array]:
    """Return the best nested basis (rank, u) in the offset-averaged metric, and its energies.

    With ``S_u = L L^T`` and the unfolding M (m v, u): Q the top eigenvectors of
    ``L^T M^T M L``, ``B = Q^T L^T M^T M`` with its rows orthonormalised; no inverse of S_u.
    """
    m, u, v = blocks.shape
    M = blocks.transpose(0, 2, 1).reshape(m * v, u)
    G = M.T @ M
    if metric is None:
        energy, Q = top_eigen(G, rank)
        return np.ascontiguousarray(Q.T), energy
    values, vectors = top_eigen(offset_mean(dense_metric(metric), v))
    L = vectors * np.sqrt(values)
    energy, Q = top_eigen(symmetric(L.T @ G @ L), rank)
    B, _ = qr((Q.T @ L.T @ G).T, mode="economic")
    return np.ascontiguousarray(B.T), energy


def _separated(
    blocks: Array, metric: PatchMetric | None, rank: int, rounds: int
) -> tuple[Array, Array, Array]:
    """Return the basis (r, u), the second factor (m, r, v), and the inner energies (r,)."""
    m, _, v = blocks.shape
    B = _mode_basis(blocks, metric, rank)[0]
    A = np.einsum("muv,ru->mrv", blocks, B, optimize=True).reshape(m, -1)
    if metric is None:
        return B, A.reshape(m, rank, v), np.ones(rank)  # the rows of B are orthonormal
    S, WS = dense_metric(metric), metric.times(blocks.reshape(m, -1))

    def solved(first: Array, prior: Array) -> tuple[Array, float]:
        """Return the least-squares second factor, and its error less that of no form."""
        cross, gram = basis_cross(first, WS), basis_gram(first, S)
        second = fit_last(cross, gram, prior)
        return second, float(np.vdot(second, second @ gram - 2 * cross))

    A, best = solved(B, A)
    for _ in range(rounds):
        first = fit_first(WS, S, A, B, tolerance=_ROUGHLY)
        try:
            second, achieved = solved(first, A)
        except DataError:  # it grew along directions that no sample shows
            break
        if achieved >= best:
            break
        B, A, best = first, second, achieved
    energy = np.einsum("ru,ru->r", B @ offset_mean(S, v), B)
    return B, A.reshape(m, rank, v), energy


def _separated_errors(blocks: Array, metric: PatchMetric | None, top: int | None) -> Array:
    """Return the error of every leading part of the basis from one Cholesky decomposition.

    With ``Phi S Phi^T = C C^T`` for the full basis and ``Y = W S Phi^T C^-T``, the leading
    r v columns of Y hold all that the least squares on r basis rows explains.
    """
    m, u, v = blocks.shape
    whole = min(u, m * v)
    top = whole if top is None else min(top, whole)
    B, energy = _mode_basis(blocks, metric, whole if metric is None else top)
    if metric is None:
        return _tail(energy)[: top + 1]
    matrix = blocks.reshape(m, -1)
    WS = metric.times(matrix)
    C, _ = damped_cholesky(basis_gram(B, dense_metric(metric)), EXACT)
    Y = solve_triangular(C, basis_cross(B, WS).T, lower=True)
    explained = np.square(Y).sum(axis=1).reshape(top, v).sum(axis=1)
    total = float(np.vdot(WS, matrix))
    return np.clip(total - np.append(0.0, np.cumsum(explained)), 0.0, None)
