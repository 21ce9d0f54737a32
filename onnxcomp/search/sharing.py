"""Common factors of repeated layers: what joint options lose, and their factors for a plan.

A joint option changes all layers of a group.  What it loses at each of them is read off a
curve, measured for the layer once: how the network's outputs change with the closed-form error
of the layer's own output.  How steep the curves are also weighs the layers when their common
factors are solved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.analysis.linear import Linear
from onnxcomp.analysis.moments import collect_moments
from onnxcomp.analysis.outputs import raw_outputs
from onnxcomp.analysis.stream import Feeds
from onnxcomp.deadline import Deadline, Progress
from onnxcomp.errors import DataError
from onnxcomp.model import Array
from onnxcomp.numerics.interpolation import Curve
from onnxcomp.numerics.joint_svd import Joint, Member, errors
from onnxcomp.numerics.moments import Moments
from onnxcomp.numerics.svd import output_basis, output_basis_errors
from onnxcomp.passes.base import Option
from onnxcomp.passes.chains import to_plane
from onnxcomp.passes.factorize_jointly import FactorizeJointly
from onnxcomp.search.effort import apart
from onnxcomp.search.outputs import OutputError, OutputMeter
from onnxcomp.search.refits import like_bias
from onnxcomp.search.space import Plan, Space
from onnxcomp.search.store import Store
from onnxcomp.search.twins import Twins

_log = logging.getLogger(__name__)
_METHOD = FactorizeJointly.name
_ROUGHLY = 0  # rounds of alternation where an option is only judged
_FEWEST = 1  # without metrics, where alternation begins with nothing
_PROBED = (0.01, 0.07, 0.5)  # relative errors at which a layer's curve is measured
Removed = Mapping[str, npt.NDArray[np.int64]]
Solved = Mapping[Option, Joint]


@dataclass(frozen=True)
class JointLosses:
    """What was measured of joint options.

    Attributes:
        losses: Loss of each option at each of its nodes.
        weights: Loss per squared error of a node's output, by node.
    """

    losses: Mapping[tuple[str, Option], float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Site:
    """A layer of a group, and what its common factors are solved from.

    Attributes:
        linear: The layer.
        kernel: What is left of its kernel, shape (m, c, *kernel_shape).
        metric: Second moments of its input patches; None for the weights alone.
    """

    linear: Linear
    kernel: Array
    metric: Moments | None

    @property
    def energy(self) -> float:
        """The squared norm of the kernel in the metric."""
        matrix = self.kernel.reshape(len(self.kernel), -1)
        seen = matrix if self.metric is None else self.metric.times(matrix)
        return max(float(np.vdot(matrix, seen)), 1e-30)

    def member(self, weight: float) -> Member:
        """Return the layer as the numerics see it."""
        return Member(to_plane(self.kernel), self.metric, weight)


class Sharing:
    """Solves joint options on the original network's moments.

    Args:
        space: The options.
        batches: Fitting samples.
        seed: Seed of the sampled positions.
        threads: Batches that are worked on at once.
        progress: Called with a label and the share done.
        data_aware: Solve in the metric of the samples, or from the weights alone.
    """

    def __init__(
        self,
        space: Space,
        batches: Sequence[Feeds],
        *,
        seed: int,
        threads: int,
        progress: Progress,
        data_aware: bool = True,
    ) -> None:
        self._space = space
        self._facts = space.facts
        self._model = space.facts.model
        self._batches = batches
        self._seed = seed
        self._threads = threads
        self._progress = progress
        self._data_aware = data_aware

    def solve(self, plan: Plan, weights: Mapping[str, float], removed: Removed) -> Solved:
        """Return the factors of a plan's joint options at the widths that it leaves.

        Args:
            plan: The plan.
            weights: Of the nodes, see `JointLosses`.
            removed: Channels that go, by group of channels.
        """
        options = {o.target: o for o in plan.forms.values() if o.method == _METHOD}
        found: dict[Option, Joint] = {}
        if not options:
            return found
        for name, sites in self._sites(list(options), removed, lambda twins, site: None):
            members = [site.member(weights[site.linear.id]) for site in sites]
            found[options[name]] = FactorizeJointly().fit(options[name], members)
        return found

    def measure(self, measured: int, store: Store, deadline: Deadline) -> JointLosses:
        """Return the losses of all joint options, as far as the time goes.

        Args:
            measured: Number of leading batches on which curves are measured.
            store: Where what was measured is kept.
            deadline: When to stop.
        """
        joint = self._space.joint
        if not joint:
            return JointLosses()
        key = [[o.target, o.form, list(o.size)] for each in joint.values() for o in each]
        kept = store.get("joint", key)
        if kept is None:
            kept = self._measure(measured, deadline)
            if not deadline.passed:
                store.put("joint", key, kept)
        losses = {
            (node, Option(_METHOD, target, form, tuple(size))): lost
            for node, target, form, size, lost in kept["losses"]
        }
        return JointLosses(losses, dict(kept["weights"]))

    def _measure(self, measured: int, deadline: Deadline) -> dict[str, Any]:
        outputs = raw_outputs(self._model, self._facts.tensors)
        leading = self._batches[:measured]
        meter = OutputMeter(self._model, self._facts.tensors, leading, threads=self._threads)
        curves: dict[str, Curve] = {}

        def probe(twins: Twins, site: _Site) -> None:
            curves[site.linear.id] = self._curve(twins, site, outputs, meter.error, measured)

        losses: list[tuple[str, str, str, list[int], float]] = []
        weights: dict[str, float] = {}
        for name, sites in self._sites(list(self._space.joint), {}, probe, measured):
            if deadline.passed:
                break
            steep = {s.linear.id: _steepness(curves[s.linear.id]) for s in sites}
            if not all(steep.values()):
                continue
            weights |= steep
            members = [site.member(steep[site.linear.id]) for site in sites]
            rounds = _ROUGHLY if self._data_aware else _FEWEST
            for option in self._space.joint[name]:
                joint = FactorizeJointly().fit(option, members, rounds=rounds)
                for site, error in zip(sites, errors(joint, members), strict=True):
                    lost = curves[site.linear.id].at(float(error))
                    if np.isfinite(lost):
                        row = (site.linear.id, name, option.form, [*option.size], lost)
                        losses.append(row)
        return {"losses": losses, "weights": list(weights.items())}

    def _sites(
        self,
        names: Sequence[str],
        removed: Removed,
        visit: Callable[[Twins, _Site], None],
        measured: int = 0,
    ) -> Iterator[tuple[str, list[_Site]]]:
        """Walk the original network; yield each group when all of its layers were seen.

        Nothing is fitted on the first `measured` batches, if there are others.
        """
        groups = self._space.joint_groups
        waiting = {name: list(groups[name].members) for name in names}
        wanted = {node for members in waiting.values() for node in members}
        outputs = raw_outputs(self._model, self._facts.tensors)
        twins = Twins(
            self._facts, self._batches, weights=None, keep=outputs, threads=self._threads
        )
        seen: dict[str, _Site] = {}
        linears = list(self._facts.linears.values())
        for position, linear in enumerate(linears):
            if linear.id not in wanted:
                continue
            self._progress(linear.id, position / len(linears))
            twins.advance(linear)
            site = self._site(twins, linear, position, removed, measured)
            if site is None:
                waiting = {n: m for n, m in waiting.items() if linear.id not in m}
                continue
            visit(twins, site)
            seen[linear.id] = site
            for name in [n for n, m in waiting.items() if linear.id == m[-1]]:
                yield name, [seen[node] for node in waiting.pop(name)]
            needed = {node for members in waiting.values() for node in members}
            seen = {node: site for node, site in seen.items() if node in needed}

    def _site(
        self, twins: Twins, linear: Linear, position: int, removed: Removed, measured: int
    ) -> _Site | None:
        """Return a layer as its plan leaves it; None where nothing can be fitted there."""
        inputs = self._space.input_side(linear).kept(removed)
        outputs = self._space.output_side(linear).kept(removed)
        kernel = linear.kernel(self._model.weights[linear.weight])[np.ix_(outputs, inputs)]
        if not self._data_aware:
            return _Site(linear, kernel, None)
        rng = np.random.default_rng([self._seed, position])
        both = (twins.inputs(linear), twins.targets(linear))
        xs, ys = (apart(batches, measured) for batches in both)
        try:
            (metric,) = collect_moments(
                linear, xs, ys, rng, inputs=inputs, outputs=outputs, threads=self._threads
            )
        except DataError as error:  # such as a mask of -inf in front of the node
            _log.warning("'%s' takes no common factors: %s", linear.id, error)
            return None
        if not isinstance(metric, Moments):  # too many inputs
            return None
        matrix = kernel.reshape(len(kernel), -1)
        return _Site(linear, metric.solve(matrix).reshape(kernel.shape), metric)

    def _curve(
        self,
        twins: Twins,
        site: _Site,
        outputs: Sequence[str],
        error: OutputError,
        measured: int,
    ) -> Curve:
        """Measure the loss of a layer at a few errors of its own output."""
        linear, kernel = site.linear, to_plane(site.kernel)
        session = twins.current.tail([linear.weight, linear.bias], outputs)
        tail = output_basis_errors(kernel, site.metric)
        ranks = {int(np.argmax(tail <= share * tail[0])) for share in _PROBED}
        points = []
        for rank in sorted(ranks - {0}, reverse=True):
            dense = output_basis(kernel, site.metric, rank).dense()
            found = {
                linear.weight: linear.stored(dense.reshape(site.kernel.shape)),
                linear.bias: self._bias(site, dense),
            }
            feeds = (held | found for held in twins.current.held()[:measured])
            lost = error.of_runs(session, feeds)
            if np.isfinite(lost) and lost > 0:
                points.append((tail[rank], lost))
        table = np.array(points).reshape(-1, 2)
        return Curve(table[:, 0], table[:, 1])

    def _bias(self, site: _Site, dense: Array) -> Array:
        old = self._model.weights[site.linear.bias]
        if site.metric is None:
            return old
        return like_bias(site.metric.bias(dense.reshape(len(dense), -1)), old)


def _steepness(curve: Curve) -> float:
    """Return the loss per squared error at the middle of a curve; 0 where there is none."""
    middle = len(curve.errors) // 2
    if not len(curve.errors) or curve.losses[middle] <= 0:
        return 0.0
    return float(curve.losses[middle] / curve.errors[middle])
