"""A kernel as a chain of convolutions: equivalence, error, balance and refit."""

from dataclasses import dataclass, replace
from functools import reduce
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxcomp.errors import ParameterError
from onnxcomp.numerics.least_squares import basis_cross, basis_gram, fit_last

Array: TypeAlias = NDArray[np.float64]

_SPREAD = 1e-10  # energies below this share of the largest are balanced as if they had it


class PatchMetric(Protocol):
    """The part of `moments.Metric` that forms need; all but `output_basis` also need `xx`."""

    def times(self, W: Array) -> Array:
        """Return ``W S``."""

    def quadratic(self, W: Array) -> Array:
        """Return ``W S W^T``."""


@dataclass(frozen=True)
class Factorization:
    """A kernel written as a chain of convolutions, applied first to last.

    Attributes:
        form: a name of `FORMS`.
        kernels: float64 arrays (out, in, kernel height, kernel width).
    """

    form: str
    kernels: tuple[Array, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Channels between the convolutions."""
        return tuple(len(kernel) for kernel in self.kernels[:-1])

    def dense(self) -> Array:
        """Return the single kernel (m, c, kh, kw) that equals the chain."""
        return compose(self.kernels)


def compose(kernels: tuple[Array, ...]) -> Array:
    """Return the kernel of a chain in which every axis is wider than 1 at most once."""

    def pair(first: Array, second: Array) -> Array:
        both = np.einsum("rcab,mref->mcaebf", first, second, optimize=True)
        m, c, a, e, b, f = both.shape
        return np.asarray(both).reshape(m, c, a * e, b * f)

    return reduce(pair, kernels)


def squared_error(W: Array, other: Array, metric: PatchMetric | None) -> float:
    """Return ``tr((W - other) S (W - other)^T)`` for two kernels of one shape."""
    difference = (W - other).reshape(len(W), -1)
    if metric is None:
        return float(np.vdot(difference, difference))
    return max(float(np.vdot(difference, metric.times(difference))), 0.0)


def balanced(
    form: str, kernels: tuple[Array, ...], energies: tuple[Array, ...]
) -> Factorization:
    """Scale the inner channels so that both sides of each carry the same energy.

    Args:
        form: name of the form.
        kernels: the chain.
        energies: for every inner place, the energies of its channels before scaling.
    """
    scaled = list(kernels)
    for i, energy in enumerate(energies):
        behind = np.square(compose(kernels[i + 1 :])).sum(axis=(0, 2, 3))
        ratio = floored(energy) / floored(behind)
        scale = ratio[:, None, None, None] ** 0.25
        scaled[i] = scaled[i] / scale
        scaled[i + 1] = scaled[i + 1] * scale.reshape(1, -1, 1, 1)
    return Factorization(form, tuple(scaled))


def floored(energy: Array) -> Array:
    """Return energies without those so small that a balance of them would overflow."""
    top = float(energy.max())
    return np.maximum(energy, _SPREAD * top) if top > 0 else np.ones_like(energy)


def refit(form: Factorization, target: Array, metric: PatchMetric | None) -> Factorization:
    """Return `form` with its last kernel solved anew, the others untouched.

    ``A = W* S Phi^T (Phi S Phi^T)^-1`` with Phi the map of the kept kernels, centred on the
    present last kernel: for a new target W* of shape (m, c, kh, kw) in a new metric.
    """
    first, last = compose(form.kernels[:-1]), form.kernels[-1]
    v = last.shape[2] * last.shape[3]
    A = last_factor(
        target.reshape(len(last), -1, v),
        metric,
        first.reshape(len(first), -1),
        last.reshape(*last.shape[:2], v),
    )
    return replace(form, kernels=(*form.kernels[:-1], A.reshape(last.shape)))


def dense_metric(metric: PatchMetric) -> Array:
    """Return the metric's matrix (d, d), or raise ParameterError where it holds rows only."""
    xx: Array | None = getattr(metric, "xx", None)
    if xx is None:
        raise ParameterError.of(
            "svd", "metric", "dense moments (only output_basis works on rows)", type(metric)
        )
    return xx


def last_factor(blocks: Array, metric: PatchMetric | None, B: Array, prior: Array) -> Array:
    """Return the exact least-squares second factor (m, r, v) given the basis (r, u)."""
    m, u, v = blocks.shape
    if metric is None:  # S = I separates the offsets: one small system for all of them
        M = blocks.transpose(0, 2, 1).reshape(m * v, u)
        start = prior.transpose(0, 2, 1).reshape(m * v, -1)
        return fit_last(M @ B.T, B @ B.T, start).reshape(m, v, -1).transpose(0, 2, 1)
    cross = basis_cross(B, metric.times(blocks.reshape(m, -1)))
    gram = metric.quadratic(B) if v == 1 else basis_gram(B, dense_metric(metric))
    return fit_last(cross, gram, prior.reshape(m, -1)).reshape(prior.shape)
