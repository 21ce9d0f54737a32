"""Without samples: the network adapted so that noise moves through it as real inputs did.

A BatchNormalization that is folded into a linear node leaves a record of real inputs: the mean
and the standard deviation that the node's output had, per channel, while the network was
trained (Ioffe and Szegedy 2015).  `adapted` scales and shifts the outputs of those nodes,
front to back, until noise has the same moments there.  Compression then solves in the adapted
network, and `Adapted.restore` maps what it solved back to the original's scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.linear import LINEAR_OPS, Linear
from onnxcomp.analysis.stream import Feeds, Stream
from onnxcomp.model import Array, Model, Node
from onnxcomp.passes._affine import read_affine
from onnxcomp.passes._graph import GraphView
from onnxcomp.passes.fold_batchnorm import FoldBatchnorm

_MAX_SCALE = 4.0  # a channel further off than this is not what noise can tell about
_DEAD = 1e-4  # share of the wanted deviation up to which a channel counts as constant
Vector = npt.NDArray[np.float64]
Statistics = tuple[Vector, Vector]


def batchnorm_statistics(prepared: Model) -> dict[str, Statistics]:
    """Return what BatchNormalization says of the linear outputs of the working model.

    Args:
        prepared: The prepared model, its BatchNormalization not folded yet.

    Returns:
        Mean and standard deviation per channel, shape (channels,), by the name that the output
        of the linear node has in `working_model(prepared)`.
    """
    view = GraphView(prepared)
    options = FoldBatchnorm().propose(Analysis(prepared)).options
    folded = {option.target for option in options if not option.form}
    found: dict[str, Statistics] = {}
    for node in view.live:
        if node.op in LINEAR_OPS:
            last, statistics = _behind(view, node, folded)
            if statistics is not None:
                # The name of the last node stays on the Add of a MatMul, and where it must.
                stays = node.op == "MatMul" or view.fixed(last) is not None
                found[last if stays else node.id] = statistics
    return found


def _behind(view: GraphView, node: Node, folded: set[str]) -> tuple[str, Statistics | None]:
    """Return the end of the chain that goes into a linear node, and its statistics there."""
    tensor, statistics = node.id, None
    while True:
        use = view.only_reader(tensor)
        if use is None or use.node.id not in folded:
            return tensor, statistics
        affine = read_affine(view, node, use.node, tensor)
        if use.node.op == "BatchNormalization":
            mean, variance = (view.constant(name) for name in use.node.inputs[3:5])
            assert mean is not None
            assert variance is not None
            statistics = mean.astype(np.float64), np.sqrt(variance, dtype=np.float64)
        if statistics is not None:
            mean, deviation = statistics
            statistics = affine.scale * mean + affine.shift, np.abs(affine.scale) * deviation
        tensor = use.node.id


@dataclass(frozen=True)
class Adapted:
    """A network whose linear outputs have, on noise, the statistics of real inputs.

    Attributes:
        original: The working model.
        model: The same graph with other weights and biases.
        scales: Factor s and summand t per output channel of each adapted linear node, by its
            id: its kernel became diag(s) W, its bias s b + t.
    """

    original: Model
    model: Model
    scales: Mapping[str, Statistics]

    def restore(
        self, linear_id: str, kernel: Array, bias: Array, outputs: npt.NDArray[np.integer]
    ) -> tuple[Array, Array]:
        """Map what was solved in the adapted network to the original's scale.

        Args:
            linear_id: The linear node.
            kernel: Its dense kernel, or the last kernel of its chain, outputs first.
            bias: Its bias, shape (outputs,).
            outputs: The original's output channel of each row, shape (outputs,).

        Returns:
            W' = diag(1 / s) kernel and b' = (bias - t) / s; both unchanged where the node was
            not adapted.
        """
        if linear_id not in self.scales:
            return kernel, bias
        scale, shift = (part[outputs] for part in self.scales[linear_id])
        return kernel / _rows(scale, kernel), (bias - shift) / scale


def adapted(
    facts: Analysis,
    statistics: Mapping[str, Statistics],
    batches: Sequence[Feeds],
    *,
    threads: int,
) -> Adapted:
    """Scale and shift linear outputs, front to back, until noise gives them `statistics`.

    Factors are held between 1/4 and 4; a channel that the noise leaves constant keeps its
    weights and gets the mean only.  Nodes that share weight or bias with others stay.

    Args:
        facts: The working model.
        statistics: Mean and standard deviation by output name, from `batchnorm_statistics`.
        batches: Noise, one feed per batch.
        threads: Batches that are worked on at once.
    """
    model = facts.model
    stream = Stream(model, batches, facts.tensors, threads=threads)
    draft = model.edit()
    scales: dict[str, Statistics] = {}
    for linear in facts.linears.values():
        if linear.y not in statistics or not _private(model, linear):
            continue
        stream.advance([linear.x])
        scale, shift = _towards(statistics[linear.y], _moments(stream, linear))
        kernel = linear.kernel(model.weights[linear.weight])
        weight = linear.stored(kernel * _rows(scale, kernel))
        old = model.weights[linear.bias]
        bias = (old.reshape(-1) * scale + shift).reshape(old.shape)
        for name, value in ((linear.weight, weight), (linear.bias, bias)):
            stream.set_weight(name, value)
            draft.set_weight(name, value)
        scales[linear.id] = scale, shift
    return Adapted(model, draft.seal(by="adaptation") if scales else model, scales)


def _private(model: Model, linear: Linear) -> bool:
    """Whether weight and bias of a node are seen by nothing else."""
    return bool(linear.bias) and all(
        len(model.readers[name]) == 1 and name not in model.output_names
        for name in (linear.weight, linear.bias)
    )


def _moments(stream: Stream, linear: Linear) -> Statistics:
    """Return mean and standard deviation per output channel over all that is held."""
    session = stream.tail([], [linear.y])
    parts = []
    with np.errstate(invalid="ignore"):  # of infinite outputs, which `_towards` leaves alone
        for out in session.run_each(stream.held()):
            y = out[linear.y]
            rows = np.moveaxis(y, linear.y_axis, -1).reshape(-1, linear.out_channels)
            rows = rows.astype(np.float64)
            parts.append((len(rows), rows.mean(axis=0), rows.var(axis=0)))
        counts, means, variances = (np.array(part) for part in zip(*parts, strict=True))
        share = counts[:, None] / counts.sum()
        mean = (share * means).sum(axis=0)
        variance = (share * (variances + (means - mean) ** 2)).sum(axis=0)
        return mean, np.sqrt(variance)


def _towards(wanted: Statistics, found: Statistics) -> Statistics:
    """Return the factor and summand per channel that turn one pair of moments to another."""
    (mean, deviation), (mean_now, deviation_now) = wanted, found
    dead = deviation_now <= _DEAD * deviation
    ratio = deviation / np.where(dead, 1.0, deviation_now)
    scale = np.where(dead, 1.0, np.clip(ratio, 1 / _MAX_SCALE, _MAX_SCALE))
    shift = mean - scale * mean_now
    sound = np.isfinite(scale) & np.isfinite(shift)
    return np.where(sound, scale, 1.0), np.where(sound, shift, 0.0)


def _rows(values: Vector, kernel: Array) -> Vector:
    return values.reshape(-1, *(1,) * (kernel.ndim - 1))
