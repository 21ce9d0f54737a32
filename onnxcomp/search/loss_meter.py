"""What each option costs in accuracy, measured on the network's raw outputs.

Every option of a linear node, be it a factorisation or the removal of input channels, is a
dense weight of the same shape.  One session per node, from the tensors that are live in front
of it to the outputs, takes that weight as an input: trying an option is one run of the tail.
Between measured options the loss is interpolated over the error of a node's own output.  The
currency, the squared change of the raw outputs relative to their variance, adds up over nodes
where KL divergence and local errors do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from onnxcomp.analysis.linear import Linear
from onnxcomp.analysis.moments import SecondMoments, collect_moments, identity_moments
from onnxcomp.analysis.outputs import raw_outputs
from onnxcomp.analysis.stream import Feeds
from onnxcomp.deadline import Deadline, Progress, TimeLimitReached
from onnxcomp.errors import DataError
from onnxcomp.model import Array, Model, Value, extract
from onnxcomp.numerics.interpolation import interpolated, spread
from onnxcomp.numerics.selection import Elimination, Reader, eliminate
from onnxcomp.parallel import ordered_map
from onnxcomp.passes import NODE_PASSES
from onnxcomp.passes.base import Option, Refusal
from onnxcomp.runtime import Session
from onnxcomp.search.bypass import BypassMeter
from onnxcomp.search.effort import apart
from onnxcomp.search.forms import efficient, fitted, own_errors
from onnxcomp.search.losses import LATE, Losses
from onnxcomp.search.outputs import OutputMeter
from onnxcomp.search.refits import group_readers, like_bias, solve_dense, without_inputs
from onnxcomp.search.space import Space
from onnxcomp.search.store import Store
from onnxcomp.search.trials import Trials
from onnxcomp.search.twins import Twins

_MEASURED = 4  # options measured per node or group; the others are interpolated
_LARGE = 2**25  # weights of a node beyond which one solution at a time is enough to hold
_HOPELESS = 0.5  # share of the output's variance; options with a larger error are left out
Index = npt.NDArray[np.int64]
_Choice = TypeVar("_Choice")
_Solved = TypeVar("_Solved")
# By group: the moments of its readers so far, and the readers to come.
_Waiting = dict[str, tuple[dict[str, tuple[SecondMoments, ...]], set[str]]]


class LossMeter:
    """Measures the losses of a search space in one pass over the network.

    Args:
        space: The options.
        batches: Fitting samples, one feed per batch.
        measured: Number of leading batches to measure on; options are solved on the others.
        seed: Seed of the sampled positions.
        threads: Batches that are worked on at once.
        progress: Called with a label and the share done.
        data_aware: Solve in the metric of the samples, or from the weights alone.
        store: Where what was measured is kept.
        deadline: When it passes, nodes that were not visited are left alone.
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
        store: Store | None = None,
        deadline: Deadline | None = None,
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
        self._store = store or Store(None)
        self._deadline = deadline or Deadline(None)
        self._outputs = raw_outputs(self._model, space.facts.tensors)
        self._reset()

    def _reset(self) -> None:
        self._forms: dict[Option, float] = {}
        self._widths: dict[str, dict[int, float]] = {}
        self._orders: dict[str, Elimination] = {}
        self._refusals: dict[tuple[str, str], str] = {}  # by kind and place

    def run(
        self, weights: Mapping[str, Array] | None = None, only: Sequence[str] | None = None
    ) -> Losses:
        """Visit all linear nodes in order and return what was measured.

        Args:
            weights: Dense weights of a compressed network: each option is measured with all
                the others of that network in place.
            only: Nodes and groups to measure; all if None.
        """
        self._reset()
        self._current = weights or {}
        leading = self._batches[: self._measured]
        tensors = self._facts.tensors
        self._error = OutputMeter(self._model, tensors, leading, threads=self._threads).error
        self._trials = partial(
            Trials,
            outputs=self._outputs,
            error=self._error,
            measured=self._measured,
            data_aware=self._data_aware,
        )
        names = None if only is None else set(only)
        twins = Twins(
            self._facts,
            self._batches,
            weights=weights,
            keep=self._outputs,
            threads=self._threads,
        )
        waiting = self._waiting(names)
        nodes = [n for n in self._space.forms if names is None or n in names]
        forms = {node for node in nodes if not self._recall("forms", node)}
        linears = list(self._facts.linears.values())
        for position, linear in enumerate(linears):
            self._progress(linear.id, position / len(linears))
            groups = [name for name, pending in waiting.items() if linear.id in pending[1]]
            if linear.id in forms or groups:
                self._visit(twins, linear, position, linear.id in forms, groups, waiting)
                forms.discard(linear.id)
            elif forms or waiting:  # where kernels end decides how they round
                twins.advance(linear)
        for name in waiting:
            self._refusals["widths", name] = "no linear node reads its channels"
        places = [("forms", node) for node in self._facts.linears]  # threads end in any order
        places += [("widths", name) for name in self._space.groups]
        refusals = tuple(
            Refusal(place[1], self._refusals[place])
            for place in places
            if place in self._refusals
        )
        return Losses(self._forms, self._widths, self._orders, refusals)

    def _visit(
        self,
        twins: Twins,
        linear: Linear,
        position: int,
        forms: bool,
        groups: Sequence[str],
        waiting: _Waiting,
    ) -> None:
        """Measure a node, and the groups of which it is the last reader."""

        def refuse(reason: str) -> None:
            if forms:
                self._refusals["forms", linear.id] = reason
            for name in groups:
                self._refusals["widths", name] = reason
                del waiting[name]

        if self._deadline.passed:
            return refuse(LATE)
        twins.advance(linear)
        try:
            metrics = self._moments(twins, linear, position)
        except DataError as error:  # such as a mask of -inf in front of the node
            return refuse(f"nothing can be fitted at '{linear.id}': {error}")
        complete = {}
        for name in groups:
            seen, missing = waiting[name]
            seen[linear.id] = metrics
            missing.discard(linear.id)
            if not missing:
                complete[name] = seen
                del waiting[name]
        works: list[tuple[str, str, Callable[[], None]]] = []
        at_once = self._threads if self._model.weights[linear.weight].size <= _LARGE else 1
        if forms or any(len(seen) == 1 for seen in complete.values()):
            trials = self._trials(twins, linear, metrics)
        if forms:
            measure = partial(self._measure_forms, twins, linear, metrics[0], trials, at_once)
            works.append(("forms", linear.id, measure))
        for name, seen in complete.items():
            own = trials if len(seen) == 1 else None
            measure = partial(self._measure_group, name, seen, own, at_once)
            works.append(("widths", name, measure))
        done = ordered_map(lambda work: self._in_time(*work), works, at_once=at_once)
        for (kind, name, _), in_time in zip(works, done, strict=True):
            if in_time:
                self._remember(kind, name)
        return None

    def _in_time(self, kind: str, name: str, measure: Callable[[], None]) -> bool:
        """Measure a node or group; refuse it if the deadline passes meanwhile."""
        try:
            measure()
        except TimeLimitReached:
            self._refusals[kind, name] = LATE
            return False
        return True

    def _remember(self, kind: str, name: str) -> None:
        """Keep what was measured of a node or group."""
        entry: dict[str, Any] = {"refusal": self._refusals.get((kind, name), "")}
        if kind == "forms":
            mine = [(o, lost) for o, lost in self._forms.items() if o.target == name]
            entry["forms"] = [(o.form, list(o.size), lost) for o, lost in mine]
        elif name in self._orders:
            order = self._orders[name]
            entry["order"], entry["errors"] = order.order, order.losses
            entry["widths"] = list(self._widths[name].items())
        self._store.put(kind, name, entry)

    def _recall(self, kind: str, name: str) -> bool:
        """Take over what an earlier run measured of a node or group, if it did."""
        entry = self._store.get(kind, name)
        if entry is None:
            return False
        if entry["refusal"]:
            self._refusals[kind, name] = entry["refusal"]
        options = {(o.form, o.size): o for o in self._space.forms.get(name, ())}
        for form, size, lost in entry.get("forms", ()):
            self._forms[options[form, tuple(size)]] = lost
        if "order" in entry:
            self._orders[name] = Elimination(entry["order"], entry["errors"])
            self._widths[name] = dict(entry["widths"])
        return True

    def _waiting(self, names: set[str] | None) -> _Waiting:
        """Return for every group the readers' moments, none yet, and the readers to come."""
        linears = self._facts.linears
        wanted = [n for n in self._space.widths if names is None or n in names]
        return {
            name: (
                {},
                {
                    reader.node
                    for reader in self._space.groups[name].readers
                    if reader.node in linears and not linears[reader.node].depthwise
                },
            )
            for name in wanted
            if not self._recall("widths", name)
        }

    def _moments(
        self, twins: Twins, linear: Linear, position: int
    ) -> tuple[SecondMoments, ...]:
        """Return the moments of a node's inputs and of what it should give."""
        if not self._data_aware:
            weights = self._model.weights
            bias = np.asarray(weights[linear.bias], np.float64).reshape(-1)
            return identity_moments(linear, linear.kernel(weights[linear.weight]), bias)
        rng = np.random.default_rng([self._seed, position])
        xs, ys = (apart(of(linear), self._measured) for of in (twins.inputs, twins.targets))
        return collect_moments(linear, xs, ys, rng, threads=self._threads)

    def _measure_forms(
        self,
        twins: Twins,
        linear: Linear,
        metric: SecondMoments,
        trials: Trials,
        at_once: int,
    ) -> None:
        """Measure some of a node's forms and interpolate the rest."""
        kernel = linear.kernel(self._model.weights[linear.weight])
        options, missing = fitted(self._space.forms[linear.id], metric)
        if missing:
            self._refusals["forms", linear.id] = missing
        errors = own_errors(options, kernel, metric, threads=self._threads)
        matrix = kernel.reshape(len(kernel), -1)
        bound = _HOPELESS * float(np.vdot(matrix, metric.times(matrix)))
        kept = efficient(self._space, linear, {o: e for o, e in errors.items() if e <= bound})
        passed = self._bypassed(twins, linear) if self._data_aware else {}
        if not kept and not passed:
            if options or not missing:
                self._refuse_forms(linear, "loses half of its output")
            return
        if np.isfinite(trials.without):  # a loss below none is noise
            self._forms |= {o: max(lost - trials.without, 0.0) for o, lost in passed.items()}
        if not kept:
            return

        def dense(option: Option) -> Array:
            return NODE_PASSES[option.method].fit(option, trials.full, metric)[1]

        def lost(own: Array) -> float:
            bias = metric.bias(own.reshape(len(own), -1))
            return trials.of(own, bias) - trials.without

        points = {option: errors[option] for option in kept}
        found = self._interpolated(points, dense, lost, at_once)
        self._forms |= found
        if not found and not passed:
            self._refuse_forms(linear, "makes the outputs overflow")

    def _refuse_forms(self, linear: Linear, reason: str) -> None:
        """Say what is wrong with all of a node's forms that can be fitted."""
        known = self._refusals.get(("forms", linear.id))
        self._refusals["forms", linear.id] = (
            f"{known}; every other form {reason}" if known else f"every smaller form {reason}"
        )

    def _bypassed(self, twins: Twins, linear: Linear) -> dict[Option, float]:
        """Return the error of the outputs with a node left out, where that is an option."""
        meter = BypassMeter(self._error, self._outputs, self._measured, self._seed)
        return meter.errors(self._space, twins, linear)

    def _measure_group(
        self,
        name: str,
        metrics: Mapping[str, tuple[SecondMoments, ...]],
        trials: Trials | None,
        at_once: int,
    ) -> None:
        """Order a group's channels by elimination and measure some of its widths.

        Args:
            name: The group.
            metrics: Moments of every reader, per convolution group.
            trials: Runs behind the reader, where there is only one.
            at_once: Widths that are solved at the same time.
        """
        if not metrics:
            self._refusals["widths", name] = "no linear node reads its channels"
            return
        group = self._space.groups[name]
        readers: list[Reader] = []
        for node_id, per_group in metrics.items():
            linear = self._facts.linears[node_id]
            kernel = linear.kernel(self._model.weights[linear.weight])
            index = dict(self._space.input_side(linear).parts)[name]
            readers += group_readers(linear, kernel, index, per_group)
        order = eliminate(readers, group.size)

        def refitted(width: int) -> dict[str, Array]:
            values: dict[str, Array] = {}
            removed = {name: order.order[: group.size - width].astype(np.int64)}
            for node_id, per_group in metrics.items():
                values |= self._without(self._facts.linears[node_id], removed, per_group)
            return values

        if trials is None:
            error = self._from_the_inputs(list(metrics))
            without = error(refitted(group.size)) if self._data_aware else 0.0
        else:
            error, without = trials.of_weights, trials.without
        points = {w: float(order.losses[group.size - w]) for w in self._space.widths[name]}
        self._widths[name] = self._interpolated(
            points, refitted, lambda own: error(own) - without, at_once
        )
        self._orders[name] = order

    def _interpolated(
        self,
        points: Mapping[_Choice, float],
        solve: Callable[[_Choice], _Solved],
        loss: Callable[[_Solved], float],
        at_once: int,
    ) -> dict[_Choice, float]:
        """Measure some choices, while the next are solved, and interpolate the rest."""

        def in_time(choice: _Choice) -> _Solved:
            self._deadline.check()
            return solve(choice)

        picked = spread(points, _MEASURED)
        solved = ordered_map(in_time, picked, at_once=at_once)
        measured = {c: loss(own) for c, own in zip(picked, solved, strict=True)}
        return interpolated(points, measured)

    def _from_the_inputs(
        self, node_ids: Sequence[str]
    ) -> Callable[[Mapping[str, Array]], float]:
        """Return the error of the whole network under weights and biases of some nodes."""
        linears = [self._facts.linears[node_id] for node_id in node_ids]
        free = list(dict.fromkeys(n for li in linears for n in (li.weight, li.bias)))
        weights = self._model.weights
        values = [Value(n, weights[n].dtype, weights[n].shape) for n in free]
        part = extract(self._model, values, self._outputs)
        inner = {n: self._current.get(n, a) for n, a in part.weights.items()}
        session = Session(Model(part.skeleton, inner), at_once=self._threads)
        leading = self._batches[: self._measured]
        return lambda own: self._error.of_runs(session, ({**feed, **own} for feed in leading))

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
