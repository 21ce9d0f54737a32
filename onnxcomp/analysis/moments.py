"""Second moments of a linear node's input patches and targets, from sampled positions.

About 80 rows per input of the map, at least 40,000, are drawn uniformly over samples and
positions; a map of more inputs than rows (the first fully connected layer of a VGG) keeps the
rows instead of their Gram matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from onnxcomp.analysis.linear import Linear
from onnxcomp.model import Array
from onnxcomp.numerics.moments import Moments, MomentsBuilder, RowMoments
from onnxcomp.parallel import ordered_map

_ROWS_PER_INPUT = 80
_MIN_ROWS = 40_000
_MAX_DENSE = 8_192
_MAX_KEPT_ROWS = 8_192
Index = npt.NDArray[np.int64]
SecondMoments = Moments | RowMoments


def collect_moments(
    linear: Linear,
    xs: Sequence[Array],
    ys: Sequence[Array],
    rng: np.random.Generator,
    *,
    inputs: Index | None = None,
    outputs: Index | None = None,
    beside: Sequence[Array] | None = None,
    revise: Callable[[Array, Array], Array] | None = None,
    threads: int = 1,
) -> tuple[SecondMoments, ...]:
    """Return the moments of a linear node, one entry per group.

    Args:
        linear: The node.
        xs: Its data input, one array per batch.
        ys: Targets with the layout of its output, one array per batch.
        rng: Draws the positions.
        inputs: Channels of x to use, sorted; all if None.
        outputs: Channels of y to use, sorted; all if None.
        beside: Further arrays with the layout of `ys`, joined to them batch by batch.
        revise: Makes the targets of patches (n, channels of x, kernel positions) out of the
            rows sampled from `ys`, shape (n, channels of y), with those of `beside` behind
            them; by default they are the targets.
        threads: Batches that are worked on at once; the moments do not depend on it.

    Returns:
        Moments over (input channel, kernel position) in this order, or rows.
    """
    groups = grouped(linear, inputs, outputs)
    d = max(len(c) for c, _ in groups) * linear.spatial
    rows, dual = _rows_of(d, sum(y.size // y.shape[linear.y_axis] for y in ys))
    builders = [
        _Rows() if dual else MomentsBuilder(len(c) * linear.spatial, len(m)) for c, m in groups
    ]
    batches = list(zip(xs, ys, rng.spawn(len(xs)), strict=True))

    def summed(index: int) -> list[Callable[[], None]]:
        share = rows * (index + 1) // len(xs) - rows * index // len(xs)
        x, y, draws = batches[index]
        if beside is not None:
            y = np.concatenate([y, beside[index]], axis=linear.y_axis)
        patches, targets = linear.patches(x, y, share, draws)
        if revise is not None:
            targets = revise(patches, targets)
        found = []
        for builder, (c, m) in zip(builders, groups, strict=True):
            block = patches[:, c] if len(c) < patches.shape[1] else patches
            found.append(builder.summed(block.reshape(len(patches), -1), targets[:, m]))
        return found

    left = iter(range(len(xs)))
    while not builders[0].begun and (index := next(left, None)) is not None:
        for merge in summed(index):
            merge()
    for merges in ordered_map(summed, left, at_once=threads):
        for merge in merges:
            merge()
    return tuple(builder.finish() for builder in builders)


def _rows_of(d: int, available: int) -> tuple[int, bool]:
    """Return how many rows a map of d inputs takes, and whether they are kept as they are."""
    rows = min(max(_ROWS_PER_INPUT * d, _MIN_ROWS), available)
    dual = d > _MAX_DENSE or rows < d // 2
    return min(rows, _MAX_KEPT_ROWS) if dual else rows, dual


def why_rows(moments: RowMoments) -> str:
    """Return why there are rows in the place of second moments."""
    if moments.d > _MAX_DENSE:
        return f"it has {moments.d:,} inputs, more than {_MAX_DENSE:,}"
    return f"{moments.count:,} rows are few for {moments.d:,} inputs; more samples help"


def identity_moments(
    linear: Linear,
    kernel: Array,
    bias: Array,
    *,
    inputs: Index | None = None,
    outputs: Index | None = None,
) -> tuple[SecondMoments, ...]:
    """Return moments under which every solution comes from the weights alone.

    Inputs are uncorrelated, of mean 0 and variance 1, and the targets are what the node makes
    of them: refits change nothing, removals are not compensated, and low-rank forms are those
    of the plain singular value decomposition.

    Args:
        linear: The node.
        kernel: Its kernel, shape (m, c / groups, *kernel_shape).
        bias: Its bias, shape (m,).
        inputs: Channels of x to use, sorted; all if None.
        outputs: Channels of y to use, sorted; all if None.
    """
    found = []
    for c, m in grouped(linear, inputs, outputs):
        block = kernel[np.ix_(m, c % (linear.in_channels // linear.groups))]
        matrix = block.reshape(len(m), -1)
        d = matrix.shape[1]
        energy = np.einsum("md,md->m", matrix, matrix)
        found.append(Moments(d, np.zeros(d), bias[m], np.eye(d), matrix, energy))
    return tuple(found)


def grouped(
    linear: Linear, inputs: Index | None = None, outputs: Index | None = None
) -> list[tuple[Index, Index]]:
    """Return the given input and output channels (all if None) of every group with some."""
    inputs = np.arange(linear.in_channels) if inputs is None else inputs
    outputs = np.arange(linear.out_channels) if outputs is None else outputs
    per_in = linear.in_channels // linear.groups
    per_out = linear.out_channels // linear.groups
    pairs = [
        (inputs[inputs // per_in == g], outputs[outputs // per_out == g])
        for g in range(linear.groups)
    ]
    return [(c, m) for c, m in pairs if len(c) and len(m)]


class _Rows:
    """Keeps rows as they are, in the manner of a `MomentsBuilder`."""

    begun = True

    def __init__(self) -> None:
        self._rows: list[tuple[Array, Array]] = []

    def summed(self, x: Array, y: Array) -> Callable[[], None]:
        return partial(self._rows.append, (x.copy(), y))

    def finish(self) -> RowMoments:
        x, y = (np.concatenate(part) for part in zip(*self._rows, strict=True))
        return RowMoments.of(x, y)
