"""Lighter operators in the place of one convolution, each in closed form.

A kernel W of shape (m, c, k), k its positions, is approximated by a W' of the same shape that
some lighter operator computes.  With the covariance S of the input patches, ordered (c, k),
the error is ``tr((W - W') S (W - W')^T)`` as in `svd`; ``metric=None`` means S = I.  All forms
are solved in `damped` S: else they make up for what they lack with huge weights of channels
that the samples hardly move, and new inputs that do move them make the network explode.

    restricted   zero outside groups of channels and chosen positions: one least squares each
    separable    ``W'_mck = sum_q P_mcq D_cqk``: depthwise, then 1 x 1, alternating two of them

`spec/algorithms.md` section 5.7; `separable` is the network decoupling of Guo et al. 2018
(arXiv:1808.05517) in the metric of the inputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxcomp.numerics.factorization import PatchMetric, dense_metric, floored
from onnxcomp.numerics.least_squares import EXACT, fit_last, symmetric

Array: TypeAlias = NDArray[np.float64]

ROUNDS = 8
DAMPING = 1e-2  # of the mean variance of an input
_LITTLE = 5e-3  # relative gain of a round that ends the rounds
_CG_STEPS = 12
_CG_TOLERANCE = 1e-3


def damped(metric: PatchMetric) -> Array:
    """Return ``S + lam I``, lam being `DAMPING` times the mean of S's diagonal."""
    S = dense_metric(metric)
    return np.asarray(S + DAMPING * np.trace(S) / len(S) * np.eye(len(S)))


# ------------------------------------------------------------------- groups and positions


def restricted(
    W: Array, metric: PatchMetric | None, *, groups: int = 1, positions: Sequence[int] = ()
) -> Array:
    """Return the best kernel that reads its own group of channels at some positions only.

    For the outputs g and the columns K that they may read, ``W'_g = (W S)_gK S_KK^-1`` with
    the damped S, which is a ridge centred on the kernel's own weights there.

    Args:
        W: kernel (m, c, k).
        metric: second moments of the input patches.
        groups: a divisor of m and c.
        positions: of the k, in the order of the result; all if empty.

    Returns:
        The kernel (m, c / groups, positions) of the grouped convolution.
    """
    m, c, k = W.shape
    chosen = np.array(positions or range(k))
    rows, inputs = m // groups, c // groups
    S = None if metric is None else damped(metric)
    parts = []
    for g in range(groups):
        own = np.arange(g * inputs, (g + 1) * inputs)
        columns = (own[:, None] * k + chosen).reshape(-1)
        block = W[g * rows : (g + 1) * rows].reshape(rows, -1)
        prior = block[:, columns]
        if S is not None:
            prior = fit_last((block @ S)[:, columns], S[np.ix_(columns, columns)], prior)
        parts.append(prior.reshape(rows, inputs, len(chosen)))
    return np.concatenate(parts)


def spread(
    part: Array, in_channels: int, spatial: int, *, positions: Sequence[int] = ()
) -> Array:
    """Return the dense kernel (m, in_channels, spatial) that one of `restricted` equals."""
    m, inputs, _ = part.shape
    groups = in_channels // inputs
    dense = np.zeros((m, in_channels, spatial))
    chosen = np.array(positions or range(spatial))
    own = np.arange(m)[:, None] // (m // groups) * inputs + np.arange(inputs)
    dense[np.arange(m)[:, None, None], own[:, :, None], chosen] = part
    return dense


# --------------------------------------------------------------------- depthwise separable


@dataclass(frozen=True)
class Separable:
    """A depthwise convolution and a 1 x 1 behind it.

    Attributes:
        depthwise: (c, q, k): q filters per input channel.
        pointwise: (m, c, q).
    """

    depthwise: Array
    pointwise: Array

    def dense(self) -> Array:
        """Return the single kernel (m, c, k) that equals both."""
        subscripts = "mcq,cqk->mck"
        return np.asarray(np.einsum(subscripts, self.pointwise, self.depthwise, optimize=True))


def separable(
    W: Array, metric: PatchMetric | None, multiplicity: int, *, rounds: int = ROUNDS
) -> Separable:
    """Return q = `multiplicity` depthwise filters per channel and the 1 x 1 that joins them.

    The start is the rank-q SVD of every input channel's (m, k) slice in the metric of that
    channel.  Then each round solves the 1 x 1 given the filters, exactly, and the filters
    given the 1 x 1 by conjugate gradients; no round raises the error.  At q = k it is exact.

    Args:
        W: kernel (m, c, k).
        metric: second moments of the input patches; None stays at the start, which is
            optimal there.
        multiplicity: 1 to k.
        rounds: most rounds.
    """
    c, k = W.shape[1:]
    S4 = None if metric is None else damped(metric).reshape(c, k, c, k)
    found = _sliced(W, S4, multiplicity)
    if S4 is None:
        return found
    seen = np.tensordot(W, S4, 2)
    energy = float(np.vdot(W, seen))

    def error_of(form: Separable) -> float:
        bent = _normal(form.pointwise, S4)(form.depthwise)
        explained = 2 * np.vdot(seen, form.dense()) - np.vdot(form.depthwise, bent)
        return max(energy - float(explained), 0.0)

    found = _with_pointwise(found, seen, S4)
    best = error_of(found)
    for _ in range(rounds):
        other = _with_pointwise(_with_filters(found, seen, S4), seen, S4)
        error = error_of(other)
        if error < best:
            found = other
        if error >= best * (1 - _LITTLE):
            break
        best = error
    return _balanced(found)


def _sliced(W: Array, S4: Array | None, q: int) -> Separable:
    """Return the best rank-q approximation of every channel's slice on its own.

    With ``S_cc = L L^T`` and Q the top eigenvectors of ``L^T W_c^T W_c L``, the left singular
    vectors are ``U ~ W_c L Q``, and ``W'_c = U U^T W_c``: no inverse of S_cc.
    """
    k = W.shape[2]
    slices = W.transpose(1, 0, 2)
    L = np.broadcast_to(np.eye(k), (len(slices), k, k))
    if S4 is not None:
        values, vectors = np.linalg.eigh(np.einsum("ckcl->ckl", S4))
        L = vectors * np.sqrt(np.clip(values, 0.0, None))[:, None]
    seen = slices @ L
    energy, Q = np.linalg.eigh(seen.transpose(0, 2, 1) @ seen)
    energy, Q = energy[:, : -q - 1 : -1], Q[:, :, : -q - 1 : -1]
    norms = np.sqrt(np.array([floored(np.clip(each, 0.0, None)) for each in energy]))
    U = seen @ Q / norms[:, None]
    return Separable(U.transpose(0, 2, 1) @ slices, U.transpose(1, 0, 2))


def _with_pointwise(form: Separable, seen: Array, S4: Array) -> Separable:
    """Return the form with the exact least-squares 1 x 1 behind its filters."""
    D = form.depthwise
    c, q, _ = D.shape
    image = np.einsum("cqk,ckdl->cqdl", D, S4, optimize=True)  # Phi S
    gram = np.einsum("cqdl,dpl->cqdp", image, D, optimize=True).reshape(c * q, c * q)
    cross = np.einsum("mck,cqk->mcq", seen, D, optimize=True).reshape(len(seen), -1)
    prior = form.pointwise.reshape(len(seen), -1)
    P = fit_last(cross, symmetric(gram), prior)
    return Separable(D, P.reshape(form.pointwise.shape))


def _normal(pointwise: Array, S4: Array) -> Callable[[Array], Array]:
    """Return the map ``x -> P^T ((P x) S)`` of filters (c, q, k).

    Through ``P^T P``, so that no product is as large as the dense kernel's with S.
    """
    m, c, q = pointwise.shape
    flat = pointwise.reshape(m, c * q)
    pairs = np.ascontiguousarray((flat.T @ flat).reshape(c * q, c, q).swapaxes(0, 1))
    rows = S4.reshape(c, S4.shape[1], -1).swapaxes(1, 2)

    def image(x: Array) -> Array:
        joined = (pairs @ x).swapaxes(0, 1).reshape(c, q, -1)  # of (c, cq, k)
        return np.asarray(joined @ rows)

    return image


def _with_filters(form: Separable, seen: Array, S4: Array) -> Separable:
    """Return the form with filters nearer to the least squares given its 1 x 1.

    The unknown change x of the filters solves ``P^T ((P x) S) = P^T ((W - W') S)``; conjugate
    gradients, preconditioned with the blocks of single channels.

    Args:
        form: Where to start.
        seen: ``W S``, (m, c, k).
        S4: The covariance, (c, k, c, k).
    """
    P = form.pointwise
    c, q, k = form.depthwise.shape
    normal = _normal(P, S4)
    gram = np.einsum("mcq,mcp->cqp", P, P, optimize=True)
    blocks = np.einsum("cqp,ckcl->cqkpl", gram, S4, optimize=True).reshape(c, q * k, q * k)
    mean = np.trace(blocks, axis1=1, axis2=2) / (q * k)
    damping = EXACT * np.maximum(mean, EXACT * max(float(mean.max()), EXACT))
    inverse = np.linalg.pinv(blocks + damping[:, None, None] * np.eye(q * k), hermitian=True)
    wanted = np.einsum("mcq,mck->cqk", P, seen, optimize=True)
    slope = rest = wanted - normal(form.depthwise)
    step, towards, size = np.zeros_like(rest), np.zeros_like(rest), 1.0
    for _ in range(_CG_STEPS):
        upright = (inverse @ rest.reshape(c, q * k, 1)).reshape(rest.shape)
        before, size = size, float(np.vdot(rest, upright))
        towards = upright + size / before * towards
        bent = normal(towards)
        curvature = float(np.vdot(towards, bent))
        if curvature <= 0:
            break
        step = step + size / curvature * towards
        rest = rest - size / curvature * bent
        if np.linalg.norm(rest) <= _CG_TOLERANCE * np.linalg.norm(slope):
            break
    return Separable(form.depthwise + step, P)


def _balanced(form: Separable) -> Separable:
    """Let every filter and the weights behind it have the same norm."""
    filters = np.square(form.depthwise).sum(axis=2)
    behind = np.square(form.pointwise).sum(axis=0)
    scale = (floored(filters) / floored(behind)) ** 0.25
    return Separable(form.depthwise / scale[:, :, None], form.pointwise * scale)
