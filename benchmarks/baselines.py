"""Simpler ways to the same MACs, for comparison, made of the same parts as the search.

Uniform plans give every convolution the same share of its rank, or every inner group the same
share of its channels, and are solved by the walk of the search.  Plain decomposition does the
former from the weights alone.  Magnitude pruning drops the filters of least L1 norm, the same
share of every inner group (H. Li et al., Pruning Filters for Efficient ConvNets, 2017), with
the BatchNorm statistics of the original or measured anew.  All take the largest share within
the MACs; residual trunks and fully connected layers stay whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import onnxcomp
from benchmarks.cases import file_of
from benchmarks.common import TARGET
from onnxcomp.analysis import Analysis
from onnxcomp.analysis.linear import Linear
from onnxcomp.analysis.stream import Stream
from onnxcomp.analysis.target import TARGETS, Target
from onnxcomp.errors import ParameterError
from onnxcomp.numerics.svd import FORMS
from onnxcomp.passes.base import Option, Proposal
from onnxcomp.passes.chains import kernel_shape4
from onnxcomp.passes.factorize import Factorize, chain
from onnxcomp.passes.remove_channels import RemoveChannels
from onnxcomp.passes.working import finish, prepare, working_model
from onnxcomp.search.loss_meter import LossMeter
from onnxcomp.search.losses import Losses
from onnxcomp.search.space import Plan, Space
from onnxcomp.search.walk import Walk

Array = npt.NDArray[Any]
WIDTHS = "widths"
_SHARES = 400  # steps in which the share of ranks or channels is searched
_BATCH = 32


def uniform(*, model: str, data: str, out: str, share: float, kind: str) -> dict[str, float]:
    """Treat all layers alike, solved as the search solves its plans; runs in a child.

    Args:
        model: Its name, or a file.
        data: Samples to fit on, an `.npz` file.
        out: The file to write.
        share: MACs to keep at most.
        kind: A form of `Factorize` for every layer, or "widths" for all inner channels.

    Returns:
        The `share` of ranks or channels that was kept.
    """
    network = onnxcomp.load(file_of(model))
    samples = onnxcomp.load_samples(data, network.signature.inputs)
    facts = Analysis(working_model(prepare(network)[0], samples, seed=0), samples)
    space = whole_space(facts)
    kept, plan = widest(lambda part: uniform_plan(space, kind, part), share)
    solve(space, plan, samples).save(out)
    return {"share": kept}


def plain_svd(*, model: str, out: str, share: float) -> dict[str, float]:
    """Truncate the decomposition of every layer's weights, without samples; runs in a child.

    Args:
        model: Its name, or a file.
        out: The file to write.
        share: MACs to keep at most.

    Returns:
        The `share` of ranks that was kept.
    """
    facts = Analysis(prepare(onnxcomp.load(file_of(model)))[0])
    space = whole_space(facts)
    kept, plan = widest(lambda part: uniform_plan(space, "output_basis", part), share)
    finish(written(space, plan)).save(out)
    return {"share": kept}


def magnitude(
    *, model: str, data: str, out: str, share: float, reestimate: bool
) -> dict[str, float]:
    """Drop the filters of least L1 norm, the same share of all inner groups; runs in a child.

    Args:
        model: Its name, or a file.
        data: Samples, an `.npz` file.
        out: The file to write.
        share: MACs to keep at most.
        reestimate: Measure the BatchNorm statistics anew on the samples.

    Returns:
        The `share` of channels that was kept.
    """
    network = onnxcomp.load(file_of(model))
    samples = onnxcomp.load_samples(data, network.signature.inputs)
    facts = Analysis(prepare(network)[0], samples)
    space = whole_space(facts)
    kept, plan = widest(lambda part: uniform_plan(space, WIDTHS, part), share)
    pruned = written(space, plan, lambda name: np.argsort(_norms(space, name), kind="stable"))
    if reestimate:
        pruned = with_measured_statistics(pruned, samples)
    finish(pruned).save(out)
    return {"share": kept}


def whole_space(facts: Analysis, target: Target = TARGETS[TARGET]) -> Space:
    """Return the space of all widths and ranks of a model, whether or not they pay."""
    passes = (RemoveChannels(step=1), Factorize(step=1))
    return Space(facts, [pass_.propose(facts) for pass_ in passes], target)


def widest(make: Callable[[float], Plan], share: float) -> tuple[float, Plan]:
    """Return the largest share of ranks or channels whose plan keeps that much of the MACs.

    Raises:
        ParameterError: There is none.
    """
    whole = make(1.0).cost.macs
    for step in range(_SHARES, 0, -1):
        plan = make(step / _SHARES)
        if plan.cost.macs <= share * whole:
            return step / _SHARES, plan
    raise ParameterError.of("widest", "share", "within reach of the plans", share)


def uniform_plan(
    space: Space, kind: str, share: float, *, step: int = 1, trunks: bool = False
) -> Plan:
    """Return a plan that keeps the same share of all ranks, or of all inner channels.

    Args:
        space: The options.
        kind: A form of `Factorize`, or "widths".
        share: Of every full rank or width; where that saves no MACs, nothing is done.
        step: Round to multiples of this, and to one of them at least.
        trunks: Channels that several nodes read go, too.
    """

    def rounded(size: int) -> int:
        return max(round(share * size / step), 1) * step

    widths: dict[str, int] = {}
    forms: dict[str, Option] = {}
    if kind == WIDTHS:
        for name in space.widths:
            group = space.groups[name]
            inner = trunks or len(group.readers) == 1
            if inner and rounded(group.size) < group.size:
                widths[name] = rounded(group.size)
    else:
        linears = [space.facts.linears[node] for node in space.forms]
        for linear in linears:
            rank = _rank(linear, kind, rounded) if linear.node.op == "Conv" else 0
            if rank:
                forms[linear.id] = Option(Factorize.name, linear.id, kind, (rank,))
    return Plan(widths, forms, 0.0, space.cost(widths, forms), space.seconds(widths, forms))


def _rank(linear: Linear, form: str, rounded: Callable[[int], int]) -> int:
    """Return the rank of one layer, or 0 where the form does not apply or saves no MACs."""
    shape = kernel_shape4(linear, linear.out_channels, linear.in_channels)
    if not FORMS[form].applies(shape):
        return 0
    rank = rounded(FORMS[form].max_rank(shape))
    if rank >= FORMS[form].max_rank(shape):
        return 0
    steps = chain(linear, form, rank, *shape[:2])
    return rank if sum(step.macs for step in steps) < linear.convolution.macs else 0


def written(
    space: Space, plan: Plan, order: Callable[[str], Array] | None = None
) -> onnxcomp.Model:
    """Return the model that a plan makes from the weights alone, without refits.

    Args:
        space: The options.
        plan: What to do.
        order: Of a group by its name, all channels in the order in which they go; the first
            ones go if None.
    """
    facts, removed = space.facts, {}
    for name, width in plan.widths.items():
        size = space.groups[name].size
        going = np.arange(size) if order is None else order(name)
        option = Option(RemoveChannels.name, name, "", (width,))
        removed[option] = {"removed": going[: size - width].astype(np.int64)}
    draft = facts.model.edit()
    RemoveChannels().apply(draft, facts, removed)
    narrow = Analysis(draft.seal(by=RemoveChannels.name), facts.samples)
    draft, factors = narrow.model.edit(), {}
    for option in plan.forms.values():
        linear = narrow.linears[option.target]
        kernel = linear.kernel(narrow.model.weights[linear.weight])
        factors[option], _ = Factorize().fit(option, kernel, None)
    Factorize().apply(draft, narrow, factors)
    return draft.seal(by=Factorize.name)


def solve(space: Space, plan: Plan, samples: onnxcomp.Samples) -> onnxcomp.Model:
    """Return the model that a plan makes, solved in the metric of the samples.

    Args:
        space: The options, of a working model.
        plan: What to do; channels go in the order of elimination.
        samples: Samples to fit on.
    """
    facts = space.facts
    feeds = [batch.feed for batch in samples.batches(facts.model.signature.inputs, _BATCH)]
    common: dict[str, Any] = {"seed": 0, "threads": 1, "progress": _silent}
    widths = tuple(
        Option(RemoveChannels.name, name, "", (width,)) for name, width in plan.widths.items()
    )
    losses = Losses({}, {}, {})
    if widths:  # a space of nothing else measures nothing else
        narrow = Space(facts, [Proposal(widths)], space.target)
        losses = LossMeter(narrow, feeds, measured=1, **common).run()
    return finish(Walk(space, plan, losses, feeds, **common).run().model)


def with_measured_statistics(
    model: onnxcomp.Model, samples: onnxcomp.Samples
) -> onnxcomp.Model:
    """Return a model whose BatchNorm statistics are those of its own activations on samples.

    Front to back, as training mode would: each node sees inputs that the statistics in front
    of it have normalised already.
    """
    facts = Analysis(model, samples)
    feeds = [batch.feed for batch in samples.batches(model.signature.inputs, _BATCH)]
    stream, draft = Stream(model, feeds, facts.tensors), model.edit()
    for node in model.nodes:
        if node.op != "BatchNormalization":
            continue
        stream.advance([node.inputs[0]])
        mean, variance = _statistics(stream.batches(node.inputs[0]))
        for name, value in zip(node.inputs[3:5], (mean, variance), strict=True):
            stream.set_weight(name, value)
            draft.set_weight(name, value.astype(model.weights[name].dtype))
    return draft.seal(by="with_measured_statistics")


def _statistics(batches: Sequence[Array]) -> tuple[Array, Array]:
    """Return mean and variance of every channel, shape (channels,), float64."""
    axes = (0, *range(2, batches[0].ndim))
    count = sum(batch.size for batch in batches) / batches[0].shape[1]
    mean = (
        np.sum([batch.sum(axis=axes, dtype=np.float64) for batch in batches], axis=0) / count
    )
    shape = (1, -1, *(1,) * (batches[0].ndim - 2))
    centred = (np.square(batch - mean.reshape(shape)).sum(axis=axes) for batch in batches)
    return mean, np.sum(list(centred), axis=0) / count


def _norms(space: Space, name: str) -> Array:
    """Return the L1 norm of the filters that make each channel of a group, shape (size,)."""
    group, facts = space.groups[name], space.facts
    made: Mapping[str, Linear] = {
        linear.weight: linear
        for linear in facts.linears.values()
        if linear.id in group.producers
    }
    norms = np.zeros(group.size)
    for part in group.slices:
        if part.tensor in made:
            weight = np.moveaxis(np.abs(facts.model.weights[part.tensor]), part.axis, 0)
            each = weight.reshape(len(weight), -1).sum(axis=1, dtype=np.float64)
            norms += each[part.index].sum(axis=1)
    return norms


def _silent(label: str, share: float) -> None:
    """Report no progress."""
