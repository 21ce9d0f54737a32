"""The walk front to back that solves a plan's arrays and writes the compressed model.

Each linear node is refitted, in closed form, on the compressed network's own inputs against
the original network's outputs.  The last node in front of a residual Add also takes over the
error of the other branch, and in front of a Relu a second solution leaves alone what the Relu
cuts off.  During the walk nothing changes its shape: removed channels are zero columns of
their readers and a node with a form is its dense product, which is the same function; the
structure is written once, at the end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.linear import Linear
from onnxcomp.analysis.moments import (
    SecondMoments,
    collect_moments,
    grouped,
    identity_moments,
)
from onnxcomp.analysis.stream import Feeds
from onnxcomp.deadline import Progress
from onnxcomp.errors import DataError
from onnxcomp.model import Array, Model
from onnxcomp.numerics.joint_svd import Joint, refit
from onnxcomp.passes import NODE_PASSES
from onnxcomp.passes.base import Arrays, Option, Pass
from onnxcomp.passes.chains import to_plane
from onnxcomp.passes.factorize_jointly import FactorizeJointly, arrays_of
from onnxcomp.passes.remove_channels import RemoveChannels
from onnxcomp.passes.substitute_operators import BYPASS
from onnxcomp.search.adaptation import Adapted
from onnxcomp.search.losses import Losses
from onnxcomp.search.refits import like_bias, without_inputs
from onnxcomp.search.sharing import Sharing
from onnxcomp.search.space import Plan, Space
from onnxcomp.search.twins import Twins

_log = logging.getLogger(__name__)
_DAMPING = 0.1  # towards the original weight; losses on new images are flat around it
_CHECKED = 4  # leading batches on which a further solution must be better
Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Solved:
    """What the walk found for one node.

    Attributes:
        kernel: Dense kernel of the original shape, zero where nothing is left.
        bias: Bias of the original shape, or None where the node keeps its own.
        factors: Kernels of the chain at the widths that remain, for a node with a form.
    """

    kernel: Array
    bias: Array | None
    factors: Arrays | None = None


@dataclass(frozen=True)
class Walked:
    """What a walk gives.

    Attributes:
        model: The compressed model, with its structure.
        weights: Dense weights and biases of the working model that compute the same.
    """

    model: Model
    weights: Mapping[str, Array]


@dataclass(frozen=True)
class _Site:
    """A node that is being solved, and what the plan leaves of it."""

    linear: Linear
    position: int
    inputs: Index
    outputs: Index
    option: Option | None


class Walk:
    """Solves one plan.

    Args:
        space: The search space that the plan was chosen from.
        plan: What to do.
        losses: Measured losses, for the order in which channels go.
        batches: Fitting samples.
        seed: Seed of the sampled positions.
        threads: Batches that are worked on at once.
        progress: Called with a label and the share done.
        data_aware: Refit every node in the metric of the samples, or change only the nodes
            of the plan, from their weights alone.
        adapted: Where the working model was adapted to BatchNorm statistics, how to undo it.
    """

    def __init__(
        self,
        space: Space,
        plan: Plan,
        losses: Losses,
        batches: Sequence[Feeds],
        *,
        seed: int,
        threads: int,
        progress: Progress,
        data_aware: bool = True,
        adapted: Adapted | None = None,
    ) -> None:
        self._space = space
        self._facts: Analysis = space.facts
        self._model: Model = space.facts.model
        self._plan = plan
        self._seed = seed
        self._progress = progress
        self._data_aware = data_aware
        self._adapted = adapted
        self._removed: dict[str, Index] = {
            name: losses.orders[name].order[: space.groups[name].size - width].astype(np.int64)
            for name, width in plan.widths.items()
        }
        self._sharing = Sharing(
            space,
            batches,
            seed=seed,
            threads=threads,
            progress=progress,
            data_aware=data_aware,
        )
        self._sensitivity = losses.joint.weights
        self._joint: dict[str, Joint] = {}
        self._threads = threads
        self._twins = Twins(space.facts, batches, weights={}, threads=threads)
        self._solved: dict[str, Solved] = {}
        self._weights: dict[str, Array] = {}

    def run(self) -> Walked:
        """Solve all nodes in order and return the compressed model."""
        solved = self._sharing.solve(self._plan, self._sensitivity, self._removed)
        self._joint = {option.target: joint for option, joint in solved.items()}
        linears = list(self._facts.linears.values())
        for position, linear in enumerate(linears):
            self._progress(linear.id, position / len(linears))
            self._visit(linear, position)
        return Walked(self._write(), self._weights)

    def _visit(self, linear: Linear, position: int) -> None:
        inputs = self._space.input_side(linear).kept(self._removed)
        outputs = self._space.output_side(linear).kept(self._removed)
        option = self._plan.forms.get(linear.id)
        untouched = option is None and len(inputs) == linear.in_channels
        if untouched and (not self._solved or linear.id in self._space.excluded):
            return
        site = _Site(linear, position, inputs, outputs, option)
        kernel = linear.kernel(self._model.weights[linear.weight])
        if len(self._model.readers[linear.weight]) > 1:
            solved = Solved(without_inputs(linear, kernel, inputs), None)
        else:
            solved = self._fit(site, kernel)
        self._solved[linear.id] = solved
        found = {linear.weight: linear.stored(solved.kernel)}
        if solved.bias is not None:
            old = self._model.weights[linear.bias]
            found[linear.bias] = like_bias(solved.bias, old)
        for name, value in found.items():
            self._twins.current.set_weight(name, value)
        self._weights |= found

    def _fit(self, site: _Site, kernel: Array) -> Solved:
        """Solve a node against the original's outputs, then against what a Relu passes on."""
        linear = site.linear
        if not self._data_aware:
            return self._solve(site, kernel, self._alone(site, kernel))
        self._twins.advance(linear)
        xs, targets = self._twins.inputs(linear), self._twins.targets(linear)
        try:
            metrics = self._collected(site, xs, targets)
        except DataError as error:  # such as a mask of -inf in front of the node
            _log.warning("'%s' is not refitted: %s", linear.id, error)
            return self._solve(site, kernel, self._alone(site, kernel))
        solved = self._solve(site, kernel, metrics)
        bypassed = site.option is not None and site.option.form == BYPASS
        if linear.groups > 1 or bypassed or not self._twins.rectified(linear):
            return solved
        return self._refit_rectified(site, solved, targets)

    def _alone(self, site: _Site, kernel: Array) -> tuple[SecondMoments, ...]:
        """Return moments under which a node's solution comes from its weights alone."""
        linear, inputs, outputs = site.linear, site.inputs, site.outputs
        bias = np.asarray(self._model.weights[linear.bias], np.float64).reshape(-1)
        return identity_moments(linear, kernel, bias, inputs=inputs, outputs=outputs)

    def _refit_rectified(self, site: _Site, first: Solved, targets: list[Array]) -> Solved:
        """Solve once more where a Relu follows; keep it if the Relu's output is nearer.

        Where the target is negative, any negative output is as good: the target becomes what
        the first solution gives, or zero.  This majorises the error behind the Relu (the
        auxiliary variables of Zhang et al. 2016, arXiv:1505.06798), and changes T but not S.
        """
        linear = site.linear
        offsets = self._twins.offsets(linear)
        m, flat = linear.out_channels, first.kernel.reshape(linear.out_channels, -1)
        weight, bias = flat.T.astype(np.float32), _bias_of(first)

        def revise(patches: Array, rows: Array) -> Array:
            offset = rows[:, m:] if offsets else np.float32(0)
            wanted = rows[:, :m] + offset
            found = patches.reshape(len(patches), -1) @ weight + bias + offset
            return np.asarray(np.where(wanted > 0, wanted, np.minimum(found, 0)) - offset)

        xs = self._twins.inputs(linear)
        metrics = self._collected(site, xs, targets, beside=offsets, revise=revise)
        second = self._solve(site, first.kernel, metrics)
        before, after = self._rectified_errors(linear, (first, second), targets, offsets)
        return second if after < before else first

    def _collected(
        self,
        site: _Site,
        xs: Sequence[Array],
        ys: Sequence[Array],
        *,
        beside: Sequence[Array] | None = None,
        revise: Callable[[Array, Array], Array] | None = None,
    ) -> tuple[SecondMoments, ...]:
        """Return the moments of a node, every time of the same positions."""
        return collect_moments(
            site.linear,
            xs,
            ys,
            np.random.default_rng([self._seed, site.position]),
            inputs=site.inputs,
            outputs=site.outputs,
            beside=beside,
            revise=revise,
            threads=self._threads,
        )

    def _rectified_errors(
        self,
        linear: Linear,
        solutions: Sequence[Solved],
        targets: Sequence[Array],
        offsets: Sequence[Array] | None,
    ) -> list[float]:
        """Return the squared error behind the Relu of each solution, on leading batches."""
        session = self._twins.current.tail([linear.weight, linear.bias], [linear.y])
        old = self._model.weights[linear.bias]
        errors = []
        for solved in solutions:
            free = {
                linear.weight: linear.stored(solved.kernel),
                linear.bias: like_bias(_bias_of(solved), old),
            }
            total = 0.0
            held = self._twins.current.held()
            outs = session.run_each({**feed, **free} for feed in held[:_CHECKED])
            for index, out in enumerate(outs):
                offset = offsets[index] if offsets else np.float32(0)
                wanted = np.maximum(targets[index] + offset, 0)
                change = np.maximum(out[linear.y] + offset, 0) - wanted
                total += float(np.vdot(change, change))
            errors.append(total)
        return errors

    def _solve(self, site: _Site, kernel: Array, metrics: Sequence[SecondMoments]) -> Solved:
        linear, option = site.linear, site.option
        full = kernel.copy()  # removed outputs stay: losses of widths in place need them
        full[site.outputs] = 0
        bias = np.asarray(self._model.weights[linear.bias], np.float64).reshape(-1).copy()
        factors: Arrays | None = None
        per_in = linear.in_channels // linear.groups
        sides = grouped(linear, site.inputs, site.outputs)
        for metric, (c, m) in zip(metrics, sides, strict=True):
            block = np.ix_(m, c % per_in)
            prior = kernel[block]
            shape = prior.shape
            solved = metric.solve(prior.reshape(len(m), -1), _DAMPING).reshape(shape)
            if option is not None and option.method in NODE_PASSES:
                factors, solved = NODE_PASSES[option.method].fit(option, solved, metric)
            elif option is not None:
                factors, solved = self._fit_private(site, option, solved, metric)
            full[block] = solved
            bias[m] = metric.bias(solved.reshape(len(m), -1))
            if option is not None and option.form == BYPASS:
                bias[m] = 0  # is not in the file
        return Solved(full, bias, factors)

    def _fit_private(
        self, site: _Site, option: Option, target: Array, metric: SecondMoments
    ) -> tuple[Arrays, Array]:
        """Solve a node's private factors beside the common ones of its group."""
        joint = self._joint[option.target]
        members = self._space.joint_groups[option.target].members
        index = members.index(site.linear.id)
        moments = metric if self._data_aware else None
        private = refit(joint, joint.private[index], to_plane(target), moments)
        found = replace(joint, private=(private,))
        return arrays_of(found, [site.linear.id]), found.dense(0).reshape(target.shape)

    def _restored(self, adapted: Adapted, node_id: str, solved: Solved) -> Solved:
        """Map a node back to the scale that it had before BatchNorm statistics changed it."""
        if solved.bias is None:
            return solved
        linear = self._facts.linears[node_id]
        every = np.arange(linear.out_channels)
        kernel, bias = adapted.restore(node_id, solved.kernel, solved.bias, every)
        factors = solved.factors
        if factors:
            last = max(factors, key=lambda name: int(name.split()[0]))
            kept = self._space.output_side(linear).kept(self._removed)
            scaled, _ = adapted.restore(node_id, factors[last], bias[kept], kept)
            factors = {**factors, last: scaled}
        return Solved(kernel, bias, factors)

    def _write(self) -> Model:
        """Write weights and structure into the model."""
        model, solved = self._model, self._solved
        if self._adapted is not None:
            model = self._adapted.original
            solved = {n: self._restored(self._adapted, n, s) for n, s in solved.items()}
        draft = model.edit()
        for node_id, found in solved.items():
            linear = self._facts.linears[node_id]
            draft.set_weight(linear.weight, linear.stored(found.kernel))
            if found.bias is not None:
                old = model.weights[linear.bias]
                draft.set_weight(linear.bias, like_bias(found.bias, old))
        chosen = {
            Option(RemoveChannels.name, name, "", (self._plan.widths[name],)): {
                "removed": removed
            }
            for name, removed in self._removed.items()
        }
        RemoveChannels().apply(draft, self._facts, chosen)
        narrow = draft.seal(by=RemoveChannels.name)
        forms: dict[str, dict[Option, Arrays]] = {}
        for node_id, option in self._plan.forms.items():
            same = forms.setdefault(option.method, {})
            same[option] = {**same.get(option, {}), **(solved[node_id].factors or {})}
        if not forms:
            return narrow
        draft = narrow.edit()
        every: tuple[Pass, ...] = (*NODE_PASSES.values(), FactorizeJointly())
        for pass_ in every:
            pass_.apply(draft, self._facts, forms.get(pass_.name, {}))
        return draft.seal(by=", ".join(forms))


def _bias_of(solved: Solved) -> Array:
    if solved.bias is None:
        raise AssertionError("a refitted node has a bias")
    return solved.bias
