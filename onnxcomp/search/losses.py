"""What each option costs in accuracy, measured on the network's raw outputs.

Every option of a linear node, be it a factorisation or the removal of input channels, is a
dense weight of the same shape.  One session per node, from the tensors that are live in front
of it to the outputs, takes that weight as an input: trying an option is one run of the tail.
Between the measured options of a node the loss is interpolated over the closed-form error of
its own output, which is cheap and exact.  The currency, the squared change of the raw outputs
relative to their variance, adds up over nodes where KL divergence and local errors do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from onnxcomp.analysis.linear import Linear
from onnxcomp.analysis.moments import (
    SecondMoments,
    collect_moments,
    grouped,
    identity_moments,
)
from onnxcomp.analysis.stream import Feeds, Stream
from onnxcomp.errors import DataError
from onnxcomp.model import Array, Value, extract
from onnxcomp.numerics.moments import Moments
from onnxcomp.numerics.selection import Elimination, Reader, eliminate
from onnxcomp.numerics.svd import FORMS
from onnxcomp.passes.base import Option, Refusal
from onnxcomp.passes.factorize import Factorize, kernel_shape4
from onnxcomp.runtime import Session
from onnxcomp.search.outputs import OutputError, raw_outputs
from onnxcomp.search.space import Space

_MEASURED = 4  # options measured per node or group; the others are interpolated
_HOPELESS = 0.5  # share of the output's variance; options with a larger error are left out
Index = npt.NDArray[np.int64]
Progress = Callable[[str, float], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Losses:
    """Measured losses.

    Attributes:
        forms: Loss of every factorisation worth considering.
        widths: Loss of every width worth considering, by group.
        orders: Order in which each group's channels go.
        refusals: Why a node or group has no option left.
    """

    forms: Mapping[Option, float]
    widths: Mapping[str, Mapping[int, float]]
    orders: Mapping[str, Elimination]
    refusals: tuple[Refusal, ...]


class LossMeter:
    """Measures the losses of a search space in one pass over the network.

    Args:
        space: The options.
        batches: Fitting samples, one feed per batch.
        measured: Number of leading batches on which losses are measured.
        seed: Seed of the sampled positions.
        threads: Threads of every session.
        progress: Called with a label and the share done.
        data_aware: Solve in the metric of the samples, or from the weights alone.
    """

    def __init__(
        self,
        space: Space,
        batches: Sequence[Feeds],
        *,
        measured: int,
        seed: int,
        threads: int,
        progress: Progress,
        data_aware: bool = True,
    ) -> None:
        self._space = space
        self._facts = space.facts
        self._model = space.facts.model
        self._batches = batches
        self._measured = measured
        self._seed = seed
        self._threads = threads
        self._progress = progress
        self._data_aware = data_aware
        self._outputs = raw_outputs(self._model, space.facts.tensors)
        self._forms: dict[Option, float] = {}
        self._widths: dict[str, dict[int, float]] = {}
        self._orders: dict[str, Elimination] = {}
        self._refusals: dict[str, str] = {}

    def run(self) -> Losses:
        """Visit all linear nodes in order and return what was measured."""
        stream = Stream(
            self._model,
            self._batches,
            self._facts.tensors,
            keep=self._outputs,
            threads=self._threads,
        )
        session = Session(extract(self._model, (), self._outputs), threads=self._threads)
        reference = [
            session.run({n: feed[n] for n in session.input_names})
            for feed in self._batches[: self._measured]
        ]
        self._error = OutputError(reference)
        waiting = self._waiting()
        linears = list(self._facts.linears.values())
        for position, linear in enumerate(linears):
            self._progress(linear.id, position / len(linears))
            groups = [name for name, pending in waiting.items() if linear.id in pending[1]]
            if linear.id not in self._space.forms and not groups:
                continue
            stream.advance([linear.x])
            try:
                metrics = self._moments(stream, linear, position)
            except DataError as error:  # such as a mask of -inf in front of the node
                for name in (linear.id, *groups):
                    self._refusals[name] = f"nothing can be fitted at '{linear.id}': {error}"
                    waiting.pop(name, None)
                continue
            if linear.id in self._space.forms:
                self._measure_forms(stream, linear, metrics[0])
            for name in groups:
                seen, missing = waiting[name]
                seen[linear.id] = metrics
                missing.discard(linear.id)
                if not missing:
                    self._measure_group(stream, name, seen)
                    del waiting[name]
        for name in waiting:
            self._refusals[name] = "no linear node reads its channels"
        refusals = tuple(Refusal(where, why) for where, why in self._refusals.items())
        return Losses(self._forms, self._widths, self._orders, refusals)

    def _waiting(self) -> dict[str, tuple[dict[str, tuple[SecondMoments, ...]], set[str]]]:
        """Return for every group the readers' moments, none yet, and the readers to come."""
        linears = self._facts.linears
        return {
            name: (
                {},
                {
                    reader.node
                    for reader in self._space.groups[name].readers
                    if reader.node in linears and not linears[reader.node].depthwise
                },
            )
            for name in self._space.widths
        }

    def _moments(
        self, stream: Stream, linear: Linear, position: int
    ) -> tuple[SecondMoments, ...]:
        """Return the moments of a node's inputs and outputs in the original network."""
        if not self._data_aware:
            weights = self._model.weights
            bias = np.asarray(weights[linear.bias], np.float64).reshape(-1)
            return identity_moments(linear, linear.kernel(weights[linear.weight]), bias)
        session = stream.tail([], [linear.y])
        xs = stream.batches(linear.x)
        ys = [
            session.run({n: held[n] for n in session.input_names})[linear.y]
            for held in stream.held()
        ]
        rng = np.random.default_rng([self._seed, position])
        return collect_moments(linear, xs, ys, rng)

    def _measure_forms(self, stream: Stream, linear: Linear, metric: SecondMoments) -> None:
        """Measure some of a node's factorisations and interpolate the rest."""
        kernel = linear.kernel(self._model.weights[linear.weight])
        shape = kernel_shape4(linear, *kernel.shape[:2])
        flat = kernel.reshape(shape)
        options = [
            option
            for option in self._space.forms[linear.id]
            if isinstance(metric, Moments) or option.form == "output_basis"
        ]
        errors: dict[Option, float] = {}
        for form in dict.fromkeys(option.form for option in options):
            curve = FORMS[form].errors(flat, metric)
            errors |= {o: float(curve[o.size[0]]) for o in options if o.form == form}
        matrix = kernel.reshape(len(kernel), -1)
        bound = _HOPELESS * float(np.vdot(matrix, metric.times(matrix)))
        kept = self._efficient(linear, {o: e for o, e in errors.items() if e <= bound})
        if not kept:
            self._refusals[linear.id] = "every smaller form loses half of its output"
            return
        session = stream.tail([linear.weight, linear.bias], self._outputs)
        fit = Factorize().fit

        def loss(option: Option) -> float:
            _, dense = fit(option, kernel, metric)
            bias = metric.bias(dense.reshape(len(dense), -1))
            return self._tail(stream, session, linear, dense, bias)

        found = _interpolated({option: errors[option] for option in kept}, loss)
        self._forms |= found
        if not found:
            self._refusals[linear.id] = "with every smaller form the outputs overflow"

    def _efficient(self, linear: Linear, errors: Mapping[Option, float]) -> list[Option]:
        """Return the options that no other beats in error, MACs and parameters at once."""
        rows = []
        for option, error in errors.items():
            steps = self._space.steps(linear, option, linear.in_channels, linear.out_channels)
            macs, weights = sum(s.macs for s in steps), sum(s.weights for s in steps)
            rows.append((error, macs, weights, self._space.target.chain_seconds(steps)))
        table = np.array(rows)
        kept = []
        for index, option in enumerate(errors):
            better = np.all(table <= table[index], axis=1) & np.any(
                table < table[index], axis=1
            )
            if not better.any():
                kept.append(option)
        return kept

    def _tail(
        self, stream: Stream, session: Session, linear: Linear, kernel: Array, bias: Array
    ) -> float:
        """Return the output error with one node's weight and bias replaced."""
        own = {
            linear.weight: linear.stored(kernel),
            linear.bias: like_bias(bias, self._model.weights[linear.bias]),
        }
        feeds = (held | own for held in stream.held()[: self._measured])
        return self._error.of(
            session.run({n: feed[n] for n in session.input_names}) for feed in feeds
        )

    def _measure_group(
        self, stream: Stream, name: str, metrics: Mapping[str, tuple[SecondMoments, ...]]
    ) -> None:
        """Order a group's channels by elimination and measure some of its widths."""
        if not metrics:
            self._refusals[name] = "no linear node reads its channels"
            return
        group = self._space.groups[name]
        readers = []
        for node_id, per_group in metrics.items():
            readers += self._readers(self._facts.linears[node_id], name, per_group)
        order = eliminate(readers, group.size)
        self._orders[name] = order
        session = self._group_session(stream, list(metrics))

        def loss(width: int) -> float:
            values: dict[str, Array] = {}
            removed = {name: order.order[: group.size - width].astype(np.int64)}
            for node_id, per_group in metrics.items():
                values |= self._without(self._facts.linears[node_id], removed, per_group)
            feeds = self._feeds(stream, len(metrics) == 1)
            return self._error.of(
                session.run({n: {**feed, **values}[n] for n in session.input_names})
                for feed in feeds
            )

        points = {w: float(order.losses[group.size - w]) for w in self._space.widths[name]}
        self._widths[name] = _interpolated(points, loss)

    def _group_session(self, stream: Stream, node_ids: Sequence[str]) -> Session:
        """Return a session with the readers' weights free: the tail of a lone reader."""
        linears = [self._facts.linears[node_id] for node_id in node_ids]
        free = list(dict.fromkeys(n for li in linears for n in (li.weight, li.bias)))
        if len(linears) == 1:
            return stream.tail(free, self._outputs)
        weights = self._model.weights
        values = [Value(n, weights[n].dtype, weights[n].shape) for n in free]
        return Session(extract(self._model, values, self._outputs), threads=self._threads)

    def _feeds(self, stream: Stream, lone: bool) -> Sequence[Feeds]:
        return (stream.held() if lone else self._batches)[: self._measured]

    def _readers(
        self, linear: Linear, name: str, metrics: tuple[SecondMoments, ...]
    ) -> list[Reader]:
        """Return a reader of a group per convolution group, with the columns it occupies."""
        kernel = linear.kernel(self._model.weights[linear.weight])
        index = dict(self._space.input_side(linear).parts)[name]
        per_in = linear.in_channels // linear.groups
        rows = len(kernel) // linear.groups
        readers = []
        for g, metric in enumerate(metrics):
            part = index if linear.groups == 1 else index[:, index[0] // per_in == g]
            local = part - g * per_in if linear.groups > 1 else part
            offsets = np.arange(linear.spatial)
            columns = (local[:, :, None] * linear.spatial + offsets).reshape(len(index), -1)
            weight = kernel[g * rows : (g + 1) * rows].reshape(rows, -1)
            scale = max(metric.target_energy, 1e-30)
            readers.append(Reader(weight, metric, columns, 1.0 / scale))
        return readers

    def _without(
        self, linear: Linear, removed: Mapping[str, Index], metrics: tuple[SecondMoments, ...]
    ) -> dict[str, Array]:
        """Return a reader's weight and bias, refitted without the removed channels."""
        kept = self._space.input_side(linear).kept(removed)
        kernel = linear.kernel(self._model.weights[linear.weight])
        old = self._model.weights[linear.bias]
        if len(self._model.readers[linear.weight]) > 1:
            kernel = without_inputs(linear, kernel, kept)
            return {linear.weight: linear.stored(kernel), linear.bias: old}
        kernel, bias = solve_dense(linear, kernel, metrics, kept)
        return {linear.weight: linear.stored(kernel), linear.bias: like_bias(bias, old)}


def solve_dense(
    linear: Linear,
    kernel: Array,
    metrics: Sequence[SecondMoments],
    inputs: Index,
) -> tuple[Array, Array]:
    """Refit a node on the input channels that stay; the weights of the others become zero.

    Args:
        linear: The node.
        kernel: Its kernel now, shape (m, c / groups, *kernel_shape).
        metrics: Moments per group over all input channels and all outputs of the group.
        inputs: Input channels that stay, sorted.

    Returns:
        The kernel, of the same shape, and the bias, shape (m,).
    """
    result = np.zeros_like(kernel)
    bias = np.zeros(len(kernel))
    per_in = linear.in_channels // linear.groups
    positions = np.arange(linear.spatial)
    everything = grouped(linear)
    for metric, (c, m) in zip(metrics, everything, strict=True):
        stay = np.intersect1d(c, inputs) % per_in
        columns = (stay[:, None] * linear.spatial + positions).reshape(-1)
        prior = kernel[m].reshape(len(m), -1)
        part = None if len(columns) == metric.d else columns
        weight = metric.solve(prior, columns=part)
        full = np.zeros_like(prior)
        full[:, columns] = weight
        result[m] = full.reshape(len(m), *kernel.shape[1:])
        bias[m] = metric.bias(weight, columns=part)
    return result, bias


def without_inputs(linear: Linear, kernel: Array, inputs: Index) -> Array:
    """Return a kernel whose weights of all but the given input channels are zero."""
    stay = np.zeros(linear.in_channels, bool)
    stay[inputs] = True
    per_group = stay.reshape(linear.groups, -1)
    mask = np.repeat(per_group, len(kernel) // linear.groups, axis=0)
    return np.asarray(kernel * mask.reshape(*mask.shape, *(1,) * (kernel.ndim - 2)))


def _interpolated(errors: Mapping[T, float], loss: Callable[[T], float]) -> dict[T, float]:
    """Measure the loss of a few options and interpolate log loss over log error.

    Args:
        errors: Closed-form error of every option.
        loss: Measures one option; infinite where the outputs are not finite.

    Returns:
        A loss for every option: as measured, and between those never falling as the error
        grows.  Options of larger error than every one of finite loss are left out.
    """
    ranked = sorted(errors, key=lambda o: errors[o])
    picks = np.unique(np.linspace(0, len(ranked) - 1, _MEASURED).round().astype(int))
    measured = {ranked[i]: loss(ranked[i]) for i in picks}
    measured = {option: lost for option, lost in measured.items() if np.isfinite(lost)}
    if not measured:
        return {}
    tiny = 1e-30
    x = np.log([max(errors[option], tiny) for option in measured])
    y = np.maximum.accumulate(np.log([max(lost, tiny) for lost in measured.values()]))
    top = max(errors[option] for option in measured)
    ranked = [option for option in ranked if errors[option] <= top]
    at = np.log([max(errors[option], tiny) for option in ranked])
    return dict(zip(ranked, np.exp(np.interp(at, x, y)).tolist(), strict=True)) | measured


def like_bias(bias: Array, old: Array) -> Array:
    """Return a bias of shape (m,) in the shape and dtype of the file's."""
    return bias.reshape(old.shape).astype(old.dtype)
