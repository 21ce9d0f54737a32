"""Weights on uniform grids so that the packed file is within a limit and the loss least.

Every weight gets one step size.  What a step costs in accuracy is measured as every other loss
is (`search.loss_meter`): the weight is rounded, all else stays, and the raw outputs are
compared; a few steps are measured, the others interpolated over the closed-form error of the
rounding.  One price of a bit, found by bisection, then gives the steps; a walk front to back
refits each node on the compressed network's own inputs, rounds it with compensation and sets
its bias; and since only the file tells its size, the walk is repeated until the file fits.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.linear import Linear
from onnxcomp.analysis.moments import SecondMoments, collect_moments, identity_moments
from onnxcomp.analysis.outputs import raw_outputs
from onnxcomp.analysis.stream import Feeds
from onnxcomp.codec import packed_bytes
from onnxcomp.codec.symbols import distinct
from onnxcomp.deadline import Progress, TimeLimitReached
from onnxcomp.errors import DataError
from onnxcomp.model import Array, Model
from onnxcomp.numerics.interpolation import Curve
from onnxcomp.numerics.rounding import Rounded, Rounder
from onnxcomp.passes.base import Refusal, run_exact
from onnxcomp.passes.emit_codebook import EmitCodebook
from onnxcomp.passes.share_weights import ShareWeights
from onnxcomp.passes.working import finish, prepare, working_model
from onnxcomp.report import Action
from onnxcomp.samples import Samples
from onnxcomp.search.outputs import OutputMeter
from onnxcomp.search.refits import like_bias
from onnxcomp.search.twins import Twins

_log = logging.getLogger(__name__)
_STEPS = (-8, -6, -4, -3, -2, -1, 0, 1, 2)  # powers of two of a weight's deviation from 0
_MEASURED = (3, 5, 7, 8)  # of these steps, those of which the loss is measured
_LEAST = 1e-30
_FINE = 12  # steps per octave that the allocation chooses from
_DAMPING = 0.1  # of refits, as in the walk of a plan
_PRICE = 0.05  # of a level's bits in rounding; see the class
_ROUNDS = 5  # walks, until the file fits
_CLOSE = 0.98  # share of the limit that must be used up
_AIM = 0.993  # share of it that the next walk aims at
_BISECTIONS = 60
_BYTE_LEVELS = 250  # from the least to the largest weight, some left for refits
_TRAINED_LEVELS, _LEVEL_BYTES = 256, 4  # that a weight may have; what one may grow by
_BIAS_SHARE = 0.02  # of a node's error, that rounding its bias may add
Row = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curves:
    """What the steps of one weight cost.

    Attributes:
        steps: Ascending.
        bits: Entropy of all indices at each step.
        losses: Squared change of the raw outputs relative to their variance.
    """

    steps: Row
    bits: Row
    losses: Row

    @classmethod
    def of(cls, rounded: Sequence[Rounded], measured: Sequence[tuple[float, float]]) -> Curves:
        """Return curves with steps between those that were rounded to.

        Args:
            rounded: Roundings at ascending steps.
            measured: Closed-form errors of some roundings and their losses; one is finite.
        """
        points = sorted((error, loss) for error, loss in measured if np.isfinite(loss))
        errors, losses = np.array(points, np.float64).reshape(-1, 2).T
        curve = Curve(errors, losses)
        known = [r for r in rounded if r.error <= curve.top] or list(rounded[:1])
        at = np.log2([r.step for r in known])
        fine = np.linspace(at[0], at[-1], int(np.rint(_FINE * (at[-1] - at[0]))) + 1)
        lost = np.log([max(curve.at(r.error), _LEAST) for r in known])
        return cls(
            np.exp2(fine),
            np.interp(fine, at, [r.bits for r in known]),
            np.exp(np.interp(fine, at, lost)),
        )

    def best(self, price: float) -> int:
        """Return the index of the step of least loss plus price of its bits."""
        return int(np.argmin(self.losses + price * self.bits))


@dataclass(frozen=True)
class Stored:
    """A model whose weights lie on grids.

    Attributes:
        model: The model.
        actions: What was done, weight by weight.
    """

    model: Model
    actions: tuple[Action, ...]


class Storage:
    """Rounds the weights of one model, plain or compressed already, for a limit on its file.

    Levels bear a small price of their own as well.  On ResNet-20 that lost a little at 3 bits
    a weight and gained a tenth of the loss below 1.5: it shrinks all outputs alike, so a large
    price loses more than larger steps do at equal entropy.

    Args:
        model: The model.
        samples: Fitting samples.
        batches: The same as feeds.
        measured: Leading batches on which losses are measured.
        exclude: Regular expression; nodes whose name or output matches keep their weights.
        trained: Whether levels will be trained: they leave their grid then, in more bytes.
        data_aware: Round in the metric of the samples; otherwise from the weights alone.
        seed: Seed of the sampled positions.
        threads: Batches that are worked on at once.
        progress: Called with a label and the share done.
    """

    def __init__(
        self,
        model: Model,
        samples: Samples | None,
        batches: Sequence[Feeds],
        measured: int,
        *,
        exclude: str | None,
        trained: bool,
        data_aware: bool,
        seed: int,
        threads: int,
        progress: Progress,
    ) -> None:
        work = working_model(prepare(model)[0], samples, seed=seed)
        self._facts = Analysis(work, samples, seed=seed, threads=threads)
        self._model = work
        self._batches = batches
        self._measured = measured
        self._trained = trained
        self._data_aware = data_aware
        self._seed = seed
        self._threads = threads
        self._progress = progress
        self._first: dict[str, Linear] = {}
        for linear in self._facts.linears.values():
            names = (linear.node.name, linear.id, linear.y)
            if exclude is None or not any(re.search(exclude, name) for name in names):
                self._first.setdefault(linear.weight, linear)
        self._curves: dict[str, Curves] = {}

    def within(self, limit: float) -> Stored:
        """Return the model of least predicted loss whose packed file is within a limit.

        Args:
            limit: Bytes.  Where no steps make the file so small, it is the smallest found.
        """
        if not self._curves:
            self._measure()
        zeros = {name: np.zeros_like(self._model.weights[name]) for name in self._first}
        fixed = packed_bytes(self._written(zeros))
        scale, tried, found = 1.0, set[float](), dict[int, Stored]()
        for _ in range(_ROUNDS):
            price = self._price(8.0 * (_AIM * limit - fixed) / scale)
            if price in tried:
                break
            tried.add(price)
            chosen = {name: curves.best(price) for name, curves in self._curves.items()}
            try:
                stored, bits = self._walk(chosen)
            except TimeLimitReached:
                if not found:
                    raise
                break
            size = packed_bytes(stored.model) + self._room(stored.model)
            found[size] = stored
            if _CLOSE * limit <= size <= limit:
                break
            scale = max(8.0 * (size - fixed) / max(bits, 1.0), 0.1)
        return found[max((size for size in found if size <= limit), default=min(found))]

    def _room(self, model: Model) -> int:
        """Return the bytes that levels take once they are trained, and no grid any more."""
        if not self._trained:
            return 0
        kernels = [w for w in model.weights.values() if w.ndim > 1 and w.dtype.kind == "f"]
        books = [distinct(kernel, _TRAINED_LEVELS) for kernel in kernels]
        return sum(_LEVEL_BYTES * len(book) for book in books if book is not None)

    def in_bytes(self) -> Stored:
        """Return the model with at most 256 levels per weight, for indices of one byte."""
        if not self._curves:
            self._measure()
        chosen = {}
        for name, curves in self._curves.items():
            step = float(np.ptp(self._model.weights[name])) / _BYTE_LEVELS
            chosen[name] = min(int(np.searchsorted(curves.steps, step)), len(curves.steps) - 1)
        return self._walk(chosen)[0]

    def _measure(self) -> None:
        """Fill in what the steps of every weight cost, in one pass over the original."""
        facts, leading = self._facts, self._batches[: self._measured]
        outputs = raw_outputs(self._model, facts.tensors)
        meter = OutputMeter(self._model, facts.tensors, leading, threads=self._threads)
        twins = Twins(facts, self._batches, weights=None, keep=outputs, threads=self._threads)
        for position, linear in enumerate(facts.linears.values()):
            self._progress(f"storage: {linear.id}", position / len(facts.linears))
            if self._first.get(linear.weight) is not linear:
                continue
            twins.advance(linear)
            metrics = self._moments(twins, linear, position)
            kernel = linear.kernel(self._model.weights[linear.weight])
            W, rounder = _grouped(linear, kernel), Rounder(metrics)
            deviation = float(np.sqrt(np.mean(W**2))) or 1.0
            found = [rounder.round(W, deviation * 2.0**e, _PRICE) for e in _STEPS]
            session = twins.current.tail([linear.weight, linear.bias], outputs)
            points = []
            for rounded in (found[index] for index in _MEASURED):
                own = self._arrays(linear, metrics, rounded)
                feeds = (held | own for held in twins.current.held()[: self._measured])
                points.append((rounded.error, meter.error.of_runs(session, feeds)))
            self._curves[linear.weight] = Curves.of(found, points)

    def _moments(
        self, twins: Twins, linear: Linear, position: int
    ) -> tuple[SecondMoments, ...]:
        """Return the moments of a node; those of the weights alone where there are none."""
        rng = np.random.default_rng([self._seed, position])
        if self._data_aware and len(self._model.readers[linear.weight]) == 1:
            try:
                xs, ys = twins.inputs(linear), twins.targets(linear)
                return collect_moments(linear, xs, ys, rng, threads=self._threads)
            except DataError as error:  # such as a mask of -inf in front of the node
                _log.warning("'%s' is rounded to the nearest level: %s", linear.id, error)
        kernel = linear.kernel(self._model.weights[linear.weight])
        bias = np.asarray(self._model.weights[linear.bias], np.float64).reshape(-1)
        return identity_moments(linear, kernel, bias)

    def _arrays(
        self, linear: Linear, metrics: Sequence[SecondMoments], rounded: Rounded
    ) -> dict[str, Array]:
        """Return a node's rounded weight, and the bias that suits it, rounded as well."""
        kernel = rounded.dense.reshape(linear.out_channels, -1, *linear.kernel_shape)
        old = self._model.weights[linear.bias]
        found = {linear.weight: linear.stored(kernel)}
        if len(self._model.readers[linear.weight]) > 1:
            return found | {linear.bias: old}
        pairs = zip(metrics, rounded.dense, strict=True)
        bias = np.concatenate([metric.bias(each) for metric, each in pairs])
        allowed = 12.0 * _BIAS_SHARE * max(rounded.error, 1e-30) / len(bias)
        step = 2.0 ** np.floor(0.5 * np.log2(allowed))
        bias = np.rint(bias / step) * step + 0.0  # no -0.0
        return found | {linear.bias: like_bias(bias, old)}

    def _price(self, budget: float) -> float:
        """Return the least price of a bit at which all weights are within a budget."""

        def total(price: float) -> float:
            return sum(float(c.bits[c.best(price)]) for c in self._curves.values())

        low, high = -80.0, 20.0  # powers of two
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if total(2.0**middle) > budget else (low, middle)
        return float(2.0**high)

    def _walk(self, chosen: Mapping[str, int]) -> tuple[Stored, float]:
        """Round all weights to steps of their curves; return the model, and its entropy."""
        facts, weights, bits = self._facts, dict[str, Array](), 0.0
        twins = Twins(facts, self._batches, weights={}, threads=self._threads)
        actions = []
        for position, linear in enumerate(facts.linears.values()):
            self._progress(linear.id, position / len(facts.linears))
            if self._first.get(linear.weight) is not linear:
                continue
            twins.advance(linear)
            metrics = self._moments(twins, linear, position)
            curves, index = self._curves[linear.weight], chosen[linear.weight]
            prior = _grouped(linear, linear.kernel(self._model.weights[linear.weight]))
            pairs = zip(metrics, prior, strict=True)
            target = np.stack([metric.solve(each, _DAMPING) for metric, each in pairs])
            rounded = Rounder(metrics).round(target, curves.steps[index], _PRICE)
            for name, value in self._arrays(linear, metrics, rounded).items():
                twins.current.set_weight(name, value)
                weights[name] = value
            bits += rounded.bits
            actions.append(_action(linear, rounded, float(curves.losses[index])))
        model = self._written(weights)
        return Stored(model, tuple(actions)), bits

    def _written(self, weights: Mapping[str, Array]) -> Model:
        draft = self._model.edit()
        for name, value in weights.items():
            draft.set_weight(name, value)
        return finish(draft.seal(by=ShareWeights.name))


def _grouped(linear: Linear, kernel: Array) -> Array:
    """Return a kernel as weights per group, shape (groups, outputs, inputs)."""
    return kernel.reshape(linear.groups, linear.out_channels // linear.groups, -1)


def _action(linear: Linear, rounded: Rounded, loss: float) -> Action:
    """Return what became of a weight, in words."""
    indices = rounded.indices
    levels, zeros = len(np.unique(indices)), np.mean(indices == 0)
    what = (
        f"{indices.size} weights on {levels} levels, {zeros:.0%} zeros, "
        f"{rounded.bits / indices.size:.2f} bits each"
    )
    return Action(ShareWeights.name, linear.id, what, loss, linear.convolution.macs)


def written_bytes(model: Model, emit: str) -> int:
    """Return the bytes of the file that a model is written to, in the form that is wanted."""
    if emit == "onnxc":
        return packed_bytes(model)
    return in_form(model, emit).file_bytes


def sized_as(model: Model, emit: str, notes: list[str]) -> Model:
    """Return a model whose size can be compared with that of a file in the form wanted.

    A packed input counts with the size that it has itself in that form.

    Args:
        model: The input.
        emit: Form of the file to write.
        notes: Receives which size that is.
    """
    if not model.packed or emit == "onnxc":
        return model
    unsized = Model(model.skeleton, model.weights, foreign_ops=model.foreign_ops)
    size = written_bytes(unsized, emit)
    notes.append(
        f"the input is a packed file of {model.file_bytes:,} bytes; sizes are compared with "
        f"the {size:,} that it takes in the form of the result"
    )
    return Model(
        model.skeleton,
        model.weights,
        files=model.files,
        file_bytes=size,
        foreign_ops=model.foreign_ops,
    )


def in_form(model: Model, emit: str) -> Model:
    """Return a model as it is written to an ONNX file, with codebooks if wanted."""
    return run_exact(EmitCodebook(), Analysis(model))[0] if emit == "codebook" else model


def without_codebook(model: Model, emit: str) -> tuple[Refusal, ...]:
    """Return which weights are written as they are though codebooks are wanted, and why."""
    if emit != "codebook":
        return ()
    return EmitCodebook().propose(Analysis(model)).refusals
