"""Collaborative compression as a search: a rate decides, the walk solves what it leaves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.cost import Cost
from onnxcomp.analysis.linear import Linear
from onnxcomp.model import Array, Model
from onnxcomp.numerics.collaborative import Kept
from onnxcomp.numerics.factorization import compose
from onnxcomp.numerics.selection import Elimination
from onnxcomp.passes.base import Arrays, Option, Proposal, Refusal
from onnxcomp.passes.chains import to_plane
from onnxcomp.passes.collaborative_layers import FORM, Layers, selection_seconds
from onnxcomp.passes.compress_collaboratively import (
    CompressCollaboratively,
    original_factors,
)
from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.remove_channels import RemoveChannels
from onnxcomp.passes.working import finish, prepare, working_model
from onnxcomp.report import Action
from onnxcomp.samples import Samples
from onnxcomp.search.effort import feeds
from onnxcomp.search.losses import Losses
from onnxcomp.search.refits import like_bias, without_inputs
from onnxcomp.search.search import Search
from onnxcomp.search.settings import Limits
from onnxcomp.search.space import Plan, Side, Space, Widths
from onnxcomp.search.walk import Walk, Walked

_ROUNDS = 12  # of bisection for the rate whose plan uses the limits up
_INDEX_BYTES = 8
_GATHER_BYTES = 107  # of the node and its index, names of the layer apart
_GATHER_NAMES = 5  # that derive from the layer's
_TOO_MUCH = "the limits ask for more than collaborative compression can remove"
Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Selection(Side):
    """The input channels of a node that reads only some of them."""

    read: Index

    def width(self, widths: Widths) -> int:
        """Return the channels that are read."""
        return len(self.read)

    def kept(self, removed: Mapping[str, Index]) -> Index:
        """Return the positions that are read, sorted."""
        return self.read


class _Space(Space):
    """The space of one plan, in which some nodes read a selection of their input channels.

    Args:
        like: The space of all plans.
        proposal: Widths of the groups.
        places: Which input channels of a node are left, and which it reads.
    """

    def __init__(
        self, like: Space, proposal: Proposal, places: Mapping[str, Mapping[str, Index]]
    ) -> None:
        super().__init__(like.facts, [proposal], like.target)
        self.excluded = like.excluded
        self._read = {node: each["kept"] for node, each in places.items()}
        self._selections = [
            (self.facts.linears[node], len(each["kept"]))
            for node, each in places.items()
            if len(each["kept"]) < len(each["read"])
        ]

    def input_side(self, linear: Linear) -> Side:
        """Return the input channels of a linear node."""
        side = super().input_side(linear)
        read = self._read.get(linear.id)
        return side if read is None else _Selection(side.total, side.parts, read)

    def cost(self, widths: Widths, forms: Mapping[str, Option]) -> Cost:
        """Return the exact cost of the whole model under a plan."""
        found = super().cost(widths, forms)
        for node, read in self._read.items():
            if node not in forms:
                linear = self.facts.linears[node]
                unread = super().input_side(linear).width(widths) - len(read)
                size = unread * self.output_side(linear).width(widths) * linear.spatial
                found -= Cost(size, 0, size * linear.dtype.itemsize)
        return found

    def seconds(self, widths: Widths, forms: Mapping[str, Option]) -> float:
        """Return the predicted seconds of all that a plan may change."""
        found = super().seconds(widths, forms)
        return found + sum(
            selection_seconds(self.target, linear, count) for linear, count in self._selections
        )

    def file_bytes(self, cost: Cost, forms: Mapping[str, Option]) -> int:
        """Return the predicted size of the file."""
        found = super().file_bytes(cost, forms)
        return found + sum(
            _INDEX_BYTES * count + _GATHER_BYTES + _GATHER_NAMES * len(linear.id)
            for linear, count in self._selections
        )


@dataclass(frozen=True)
class CollaborativePlan(Plan):
    """A plan in which some nodes read a selection of their input channels.

    Attributes:
        kept: What stays of each changed node.
        removed: Channels of each group that go where they are made.
        options: The pass's options with the positions that stay and that are read.
        space: The space that it is a plan of.
    """

    kept: Mapping[str, Kept]
    removed: Mapping[str, Index]
    options: Mapping[Option, Arrays]
    space: Space

    @property
    def empty(self) -> bool:
        """Whether nothing is to be done."""
        return not self.kept


def plan_at(
    rate: float,
    layers: Layers,
    space: Space,
    pass_: CompressCollaboratively,
    *,
    timely: bool = False,
) -> CollaborativePlan:
    """Return the plan by which layers lose a share of the network's cost.

    Args:
        rate: The share.
        layers: The layers.
        space: The space of all plans.
        pass_: How units are chosen.
        timely: Index selections that save no time are left out whatever the cost is.

    Raises:
        LimitError: They cannot lose so much.
    """
    facts, kept = space.facts, layers.at(rate, timely=timely)
    removed = layers.cut(kept)
    places = layers.places(kept, removed)
    sizes = {group.name: group.size for group in facts.channels.groups}
    widths = {name: sizes[name] - len(gone) for name, gone in removed.items()}
    narrowed = [Option(RemoveChannels.name, name, "", (w,)) for name, w in widths.items()]
    own = _Space(space, Proposal(tuple(narrowed)), places)
    forms = {
        node: Option(Factorize.name, node, FORM, (each.rank,))
        for node, each in kept.items()
        if each.rank is not None
    }
    return CollaborativePlan(
        widths,
        forms,
        sum(layers.members[node].loss(each) for node, each in kept.items()),
        own.cost(widths, forms),
        own.seconds(widths, forms),
        kept,
        removed,
        {pass_.option(layers, node, each): places[node] for node, each in kept.items()},
        own,
    )


class CollaborativeWalk(Walk):
    """The walk that writes index selections, too; or the original weights in the structure."""

    def __init__(self, plan: CollaborativePlan, *arguments: Any, **settings: Any) -> None:
        orders = {
            name: Elimination(gone, np.zeros(len(gone) + 1))
            for name, gone in plan.removed.items()
        }
        super().__init__(plan.space, plan, Losses({}, {}, orders), *arguments, **settings)
        self._decided = plan

    def run(self) -> Walked:
        """Solve all nodes in order and return the compressed model."""
        if self._data_aware:
            return super().run()
        weights = {
            self._facts.linears[node].weight: self._original(node, kept)
            for node, kept in self._decided.kept.items()
        }
        return Walked(self._write(), weights)

    def _original(self, node: str, kept: Kept) -> Array:
        """Return the dense weight that equals what is made of a node's own weights."""
        linear = self._facts.linears[node]
        kernel = linear.kernel(self._model.weights[linear.weight])
        read = np.delete(np.arange(linear.in_channels), kept.dropped)
        dense = without_inputs(linear, kernel, read)
        chain = original_factors(self._facts, node, kept, {})
        if chain:
            whole = compose(tuple(to_plane(part) for part in chain.values()))
            dense[:, read] = whole.reshape(len(dense), len(read), *linear.kernel_shape)
        return linear.stored(dense)

    def _write(self) -> Model:
        """Write weights and structure into the model."""
        draft = self._model.edit()
        for node, found in self._solved.items():
            linear = self._facts.linears[node]
            draft.set_weight(linear.weight, linear.stored(found.kernel))
            if found.bias is not None:
                old = self._model.weights[linear.bias]
                draft.set_weight(linear.bias, like_bias(found.bias, old))
        chosen = {
            option: {**places, **self._factors(option.target)}
            for option, places in self._decided.options.items()
        }
        CompressCollaboratively().apply(draft, self._facts, chosen)
        return draft.seal(by=CompressCollaboratively.name)

    def _factors(self, node: str) -> Arrays:
        if self._data_aware:
            return self._solved[node].factors or {}
        plan = self._decided
        return original_factors(self._facts, node, plan.kept[node], plan.removed)


class CollaborativeSearch(Search):
    """The search whose plans one rate decides.

    Args:
        pass_: How units are chosen; its rate is not used.
        arguments: As of `Search`, and so is `settings`.
    """

    varied: ClassVar[bool] = False

    def __init__(self, pass_: CompressCollaboratively, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self._pass = pass_

    @property
    def losses(self) -> Losses:
        """No losses: nothing is measured alone."""
        return Losses({}, {}, {})

    def refusals(self, plan: Plan) -> tuple[Refusal, ...]:
        """Return why a plan leaves nodes alone, once gradients were computed."""
        if "_layers" not in vars(self):
            return ()
        changed = plan.kept if isinstance(plan, CollaborativePlan) else self._layers.members
        return self._layers.refusals(changed)

    def file_bytes(self, plan: Plan) -> int:
        """Return the predicted size of the file that a plan makes."""
        space = plan.space if isinstance(plan, CollaborativePlan) else self.space
        return space.file_bytes(plan.cost, plan.forms)

    @cached_property
    def _layers(self) -> Layers:
        facts, exclude = self.space.facts, self._settings.exclude
        excluded = set(self.space.excluded)
        if exclude is not None:
            pattern = re.compile(exclude)
            nodes = facts.model.nodes
            excluded |= {n.id for n in nodes if pattern.search(n.id) or pattern.search(n.name)}
        progress = self._progress_until_deadline
        work = partial(self._pass.layers, facts, frozenset(excluded), progress)
        return self.timed("gradients", work)

    def choose(
        self, losses: Losses, limits: Limits, *, seconds: float = np.inf
    ) -> tuple[Plan, str]:
        """Return the plan of the least rate within absolute limits, and why there is none."""
        layers = self._layers
        planned = partial(
            plan_at,
            layers=layers,
            space=self.space,
            pass_=self._pass,
            timely=bool(np.isfinite(seconds)),
        )

        def excess(plan: Plan) -> float:
            row = np.array([plan.cost.macs, plan.cost.params, self.file_bytes(plan)])
            return max(float(np.max(row / limits.row)), plan.seconds / seconds)

        low, high, best = 0.0, layers.most, None
        rate = min(max(1 - 1 / excess(self.nothing.plan), low), high)
        for _ in range(_ROUNDS):
            plan = planned(rate)
            if excess(plan) <= 1:
                best, high = plan, rate
            else:
                low = rate
            rate = 0.5 * (low + high)
        if best is not None:
            return best, ""
        plan = planned(high)
        return plan, "" if excess(plan) <= 1 else _TOO_MUCH

    def _walk(self, plan: Plan, losses: Losses) -> Walk:
        """Return what solves a plan."""
        settings = self._settings
        return CollaborativeWalk(
            _own(plan),
            self._batches,
            seed=settings.seed,
            threads=settings.cores,
            progress=self._progress_until_deadline,
            data_aware=self._pass.reconstruct,
        )

    def _key(self, plan: Plan, losses: Losses) -> list[Any]:
        """Return what decides the arrays of a plan, as plain values."""
        kept = sorted(_own(plan).kept.items())
        return [(node, list(each.dropped), each.rank) for node, each in kept]

    def describe(self, plan: Plan) -> tuple[tuple[Action, ...], int]:
        """Return what a plan does, in words, and the MACs of all nodes that it changes."""
        if plan.empty:
            return (), 0
        found = []
        for node, kept in _own(plan).kept.items():
            layer = self._layers.members[node]
            linear, words = layer.linear, []
            if kept.dropped:
                count = linear.in_channels - len(kept.dropped)
                words.append(f"reads {count} of {linear.in_channels} channels")
            if kept.rank is not None:
                words.append(f"{FORM} of rank {kept.rank}")
            macs, loss = linear.convolution.macs, layer.loss(kept)
            found.append(Action(self._pass.name, node, ", ".join(words), loss, macs))
        return tuple(found), sum(action.macs for action in found)


def _own(plan: Plan) -> CollaborativePlan:
    if not isinstance(plan, CollaborativePlan):
        raise AssertionError("a collaborative search solves its own plans")
    return plan


def collaborate(
    model: Model, samples: Samples, pass_: CompressCollaboratively, *, seed: int = 0
) -> Model:
    """Compress a model at the rate of a pass, weights refitted where it says `reconstruct`.

    Args:
        model: The model; BatchNormalization is folded first.
        samples: Samples for gradients and refits, best with labels.
        pass_: How units are chosen, and how many go.
        seed: Seed of sampled positions.

    Raises:
        ParameterError: PyTorch is not installed.
        DataError: The labels are no classes.
        UnsupportedModelError: The bridge cannot express a node.
        LimitError: The layers cannot lose so much.
    """
    work = working_model(prepare(model)[0], samples, seed=seed)
    facts = Analysis(work, samples, seed=seed)
    space = Space(facts, (), pass_.target)
    plan = plan_at(pass_.rate, pass_.layers(facts), space, pass_)
    walk = CollaborativeWalk(
        plan,
        feeds(facts, samples),
        seed=seed,
        threads=facts.threads,
        progress=lambda *_: None,
        data_aware=pass_.reconstruct,
    )
    return finish(walk.run().model)
