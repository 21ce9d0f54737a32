"""Weight sharing: scalar quantizers that leave few values, as in Marino et al. 2021.

    cws    k-means (Lloyd's algorithm, exact in one dimension)
    pws    probabilistic: one of the two quantiles around a weight, unbiased
    uq     uniform: multiples of one step
    ecsq   entropy-constrained: distance plus lambda times the bits of a value

(arXiv:2108.12704 and 2007.07967; better by error than by number of values: uq and ecsq, whose
values are used unequally often.)  Zeros are never moved: pruned weights stay pruned.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxcomp.errors import ParameterError

Array: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.int32]
Quantizer: TypeAlias = Callable[[Array, int, np.random.Generator], Array]

_LLOYD_STEPS = 300
_BINS = 4096  # of the density that cws starts from
_BISECTIONS = 40
_LEAST_STEP = 2.0**-40  # of a uniform grid, as a share of the largest magnitude
_ECSQ_START = 3  # clusters to start from, as a multiple of those wanted
_ECSQ_STEPS = 200
_ECSQ_TOLERANCE = 1e-4  # relative improvement of its cost, below which it has converged


@dataclass(frozen=True)
class Shared:
    """A tensor of few values.

    Attributes:
        indices: int32, shape of the tensor.
        codebook: float64, shape (k,), ascending, distinct.
    """

    indices: Indices
    codebook: Array

    @classmethod
    def of(cls, values: Array) -> "Shared":
        """Return a tensor with its distinct values as codebook."""
        codebook, indices = np.unique(values, return_inverse=True)
        return cls(indices.reshape(values.shape).astype(np.int32), codebook)

    @property
    def dense(self) -> Array:
        """The tensor, float64."""
        return self.codebook[self.indices]


def share(
    tensors: Sequence[Array], quantizer: str, levels: int, *, seed: int = 0
) -> list[Shared]:
    """Replace the weights of tensors by at most `levels` values common to all of them.

    Args:
        tensors: float64, any shapes; several make a unified codebook.
        quantizer: "cws", "pws", "uq" or "ecsq".
        levels: values besides zero, at least 2; uq's include zero.
        seed: of pws.

    Returns:
        The tensors, zero exactly where they were zero (elsewhere only where uq rounds to it).

    Raises:
        ParameterError: there is no such quantizer, or fewer than 2 levels.
    """
    if quantizer not in QUANTIZERS:
        raise ParameterError.choice("share", "quantizer", QUANTIZERS, quantizer)
    if levels < 2:
        raise ParameterError.of("share", "levels", "at least 2", levels)
    flat = np.concatenate([np.ravel(tensor) for tensor in tensors])
    found = np.zeros_like(flat)
    kept = flat != 0
    if kept.any():
        found[kept] = QUANTIZERS[quantizer](flat[kept], levels, np.random.default_rng(seed))
    common = Shared.of(found + 0.0)  # no -0.0, which is another value to a file
    ends = np.cumsum([tensor.size for tensor in tensors])[:-1]
    parts = zip(np.split(common.indices, ends), tensors, strict=True)
    return [Shared(part.reshape(t.shape), common.codebook) for part, t in parts]


def channel_scales(kernel: Array) -> Array:
    """Return the deviation from zero of every output channel's weights, shape (m, 1, ...)."""
    energy = np.mean(kernel**2, axis=tuple(range(1, kernel.ndim)), keepdims=True)
    return np.asarray(np.where(energy > 0, np.sqrt(energy), 1.0))


def cws(values: Array, levels: int, _: np.random.Generator) -> Array:
    """Clustering: k-means from centroids at equal shares of density^(1/3).

    That is their density at the optimum for many levels (Panter and Dite 1951).  Sorted
    values with prefix sums make every step exact in O(k log n).
    """
    ordered = np.sort(values)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    centroids = _density_start(ordered, levels)
    for _step in range(_LLOYD_STEPS):
        bounds = np.searchsorted(ordered, 0.5 * (centroids[1:] + centroids[:-1]))
        edges = np.concatenate([[0], bounds, [len(ordered)]])
        counts = np.diff(edges)
        used = counts > 0
        moved = np.diff(sums[edges])[used] / counts[used]
        if len(moved) == len(centroids) and np.array_equal(moved, centroids):
            break
        centroids = moved
    return centroids[np.searchsorted(0.5 * (centroids[1:] + centroids[:-1]), values)]


def _density_start(ordered: Array, levels: int) -> Array:
    counts, edges = np.histogram(ordered, bins=_BINS)
    mass = np.concatenate([[0.0], np.cumsum(np.cbrt(counts))])
    wanted = (np.arange(levels) + 0.5) / levels * mass[-1]
    return np.unique(np.interp(wanted, mass, edges))


def pws(values: Array, levels: int, rng: np.random.Generator) -> Array:
    """Probabilistic: the upper of two quantiles with probability (w - lo) / (hi - lo)."""
    ends = np.quantile(values, np.linspace(0.0, 1.0, levels))
    upper = np.clip(np.searchsorted(ends, values, side="right"), 1, levels - 1)
    low, high = ends[upper - 1], ends[upper]
    gap = high - low
    chance = np.divide(values - low, gap, out=np.zeros_like(values), where=gap > 0)
    return np.where(rng.random(len(values)) < chance, high, low)


def uq(values: Array, levels: int, _: np.random.Generator) -> Array:
    """Uniform quantization with the least step, by bisection, that leaves so few values."""
    ordered = np.sort(values)

    def count(step: float) -> int:
        return 1 + int(np.count_nonzero(np.diff(np.rint(ordered / step))))

    high = 4.0 * float(np.abs(ordered[[0, -1]]).max())
    low, least = high / (8.0 * levels * levels), high * _LEAST_STEP
    while count(low) <= levels and low > least:  # most values are far below the largest
        low /= 4.0
    for _step in range(_BISECTIONS):
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if count(middle) <= levels else (middle, high)
    return np.asarray(np.rint(values / high) * high)


def ecsq(values: Array, levels: int, _: np.random.Generator) -> Array:
    """Entropy-constrained quantization with the least lambda that leaves so few values."""
    ordered = np.sort(values)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    variance = max(float(np.var(ordered)), np.finfo(np.float64).tiny)
    low, high = 1e-8 * variance, 1e3 * variance
    best = np.array([ordered.mean()]), np.array([1.0]), 0.0
    for _step in range(_BISECTIONS // 2):
        middle = float(np.sqrt(low * high))
        found = constrained_clusters(ordered, sums, levels, middle)
        if len(found[0]) <= levels:
            high, best = middle, (*found[:2], middle)
        else:
            low = middle
    centroids, shares, lam = best
    bounds, live = _cells(centroids, -lam * np.log(shares))
    return centroids[live][np.searchsorted(bounds, values)]


def constrained_clusters(
    ordered: Array, sums: Array, levels: int, lam: float
) -> tuple[Array, Array, list[float]]:
    """Return centroids, shares and the cost ``mean (w - c)^2 - lam ln p`` after each step.

    Args:
        ordered: values, ascending, shape (n,).
        sums: their prefix sums, shape (n + 1,).
        levels: a third of the clusters to start from, which are of equal population.
        lam: price of a nat, in units of the values squared.
    """
    n, count = len(ordered), min(_ECSQ_START * levels, len(ordered))
    edges = np.linspace(0, n, count + 1).astype(np.intp)
    squares, costs = float(np.vdot(ordered, ordered)), list[float]()
    while True:
        counts = np.diff(edges)
        used = counts > 0
        totals, counts = np.diff(sums[edges])[used], counts[used]
        centroids, shares = totals / counts, counts / n
        bits = -lam * np.log(shares)
        spread = squares - float(np.vdot(totals, centroids))
        costs.append(spread / n + float(np.vdot(shares, bits)))
        settled = len(costs) > 1 and costs[-2] - costs[-1] <= _ECSQ_TOLERANCE * costs[-2]
        if settled or len(costs) == _ECSQ_STEPS:
            return centroids, shares, costs
        bounds, _ = _cells(centroids, bits)
        edges = np.concatenate([[0], np.searchsorted(ordered, bounds), [n]])


def _cells(centroids: Array, bits: Array) -> tuple[Array, NDArray[np.intp]]:
    """Return where the cluster of least ``(w - c)^2 + bits`` changes, and those that occur.

    Without w^2 each cluster is a line in w, and the cells are those of the lower envelope.
    """
    live: list[int] = []
    bounds: list[float] = []

    def crossing(a: int, b: int) -> float:
        gap = centroids[b] - centroids[a]
        return float(0.5 * (centroids[a] + centroids[b]) + 0.5 * (bits[b] - bits[a]) / gap)

    for index in range(len(centroids)):
        if live and centroids[index] <= centroids[live[-1]]:
            continue  # equal values, which the prefix sums round to either side
        while bounds and crossing(live[-1], index) <= bounds[-1]:
            live.pop()
            bounds.pop()
        if live:
            bounds.append(crossing(live[-1], index))
        live.append(index)
    return np.array(bounds), np.array(live)


QUANTIZERS: Mapping[str, Quantizer] = MappingProxyType(
    {"cws": cws, "ecsq": ecsq, "pws": pws, "uq": uq}
)
"""The quantizers by the name that options and recipes use."""
