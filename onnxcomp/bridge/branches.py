"""The operators that a convolution can become, as torch modules warm from closed forms.

A branch is a graph of its own: the node cut out of the model, rewritten by the pass that its
option names, and made a module by `to_torch`.  What torch trains is so what the same pass
writes into the whole graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.linear import Linear
from onnxcomp.analysis.moments import SecondMoments, collect_moments
from onnxcomp.analysis.stream import Stream
from onnxcomp.analysis.target import Convolution, Target
from onnxcomp.bridge.module import GraphModule, to_torch
from onnxcomp.bridge.writing import from_torch
from onnxcomp.errors import ParameterError, UnsupportedModelError
from onnxcomp.model import Array, Model, Value, extract
from onnxcomp.numerics.factorization import squared_error
from onnxcomp.numerics.moments import Moments
from onnxcomp.passes import NODE_PASSES
from onnxcomp.passes.base import Arrays, NodePass, Option
from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.operator_plan import OperatorPlan, write_options, written_into
from onnxcomp.passes.substitute_operators import (
    BYPASS,
    FITTED,
    TRAINED,
    SubstituteOperators,
    arrays_of,
    pool_seconds,
)
from onnxcomp.samples import Samples

_FITTED_ON = 512  # samples at most, for the closed forms
_BATCH = 32
_RANKS = (0.25, 0.5)  # of chains of low rank, as shares of the full one


@dataclass(frozen=True, eq=False)
class Branch:
    """One operator in the place of a convolution.

    Attributes:
        option: The operator; None for the convolution itself.
        model: The graph from the convolution's input to its output.
        module: The same as a module.
        error: Squared error of the closed form relative to the output's variance; 1 where
            there is none.
        costs: Shares of the whole model's parameters, MACs and predicted seconds, by name.
    """

    option: Option | None
    model: Model
    module: GraphModule
    error: float
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Written:
    """A choice of operators in the graph that it was made for.

    Attributes:
        model: The graph.
        plan: What makes it of the original.
    """

    model: Model
    plan: OperatorPlan


def find_branches(
    facts: Analysis, samples: Samples, operators: Sequence[NodePass], target: Target
) -> dict[str, list[Branch]]:
    """Return the operators of every convolution that has some, itself included.

    Args:
        facts: Analysis of a `working_graph`.
        samples: What the closed forms are fitted on.
        operators: Passes whose proposals to take, without `BYPASS`, which is no operator of
            its own; if there are none, all lighter operators that are legal, and chains of
            low rank.
        target: Whose latency model predicts seconds.

    Raises:
        ParameterError: Only `BYPASS` is asked for.
        UnsupportedModelError: There is none.
    """
    model = facts.model
    options: dict[str, list[Option]] = {}
    for option in _options(facts, operators, target):
        linear = facts.linears[option.target]
        if linear.node.op == "Conv" and len(model.readers[linear.bias]) == 1:
            options.setdefault(option.target, []).append(option)
    if not options:
        raise UnsupportedModelError("no convolution of the model has a lighter operator")
    starts = _starts(facts, samples, options)
    whole = _costs([linear.convolution for linear in facts.linears.values()], target)
    found = {
        node: [_branch(facts, facts.linears[node], None, model, 0.0, target, whole)]
        for node in options
    }
    for index in range(max(map(len, options.values()))):  # one of every node at a time
        round_ = {o[index]: starts[o[index]] for o in options.values() if index < len(o)}
        rewritten = _rewritten(facts, round_)
        for option, start in round_.items():
            linear = facts.linears[option.target]
            branch = _branch(facts, linear, option, rewritten, start.error, target, whole)
            found[option.target].append(branch)
    return found


def _options(
    facts: Analysis, operators: Sequence[NodePass], target: Target
) -> Iterator[Option]:
    """Yield what the passes propose and what can be trained."""
    every = SubstituteOperators((*FITTED, *TRAINED), target, step=1)
    for pass_ in operators or (every, Factorize(target=target, shares=_RANKS)):
        if isinstance(pass_, SubstituteOperators):
            forms = tuple(form for form in pass_.forms if form != BYPASS)
            if not forms:
                allowed = f"operators that can be trained, which {BYPASS} is not"
                raise ParameterError.of("search", "operators.forms", allowed, pass_.forms)
            pass_ = replace(pass_, forms=forms)
        yield from pass_.propose(facts).options


@dataclass(frozen=True, eq=False)
class _Start:
    """What an operator is trained from: its kernels, the bias, and their error."""

    arrays: Arrays
    bias: Array
    error: float


def _starts(
    facts: Analysis,
    samples: Samples,
    options: Mapping[str, Sequence[Option]],
) -> dict[Option, _Start]:
    """Fit all operators on the model's own activations."""
    few = samples.take(range(min(samples.count, _FITTED_ON)))
    feeds = [batch.feed for batch in few.batches(facts.model.signature.inputs, _BATCH)]
    stream = Stream(facts.model, feeds, facts.tensors, threads=facts.threads)
    found = {}
    for position, linear in enumerate(facts.linears.values()):
        if linear.id not in options:
            continue
        stream.advance([linear.x])
        rng = np.random.default_rng([facts.seed, position])
        inputs, targets = stream.batches(linear.x), stream.peek(linear.y)
        (metric,) = collect_moments(linear, inputs, targets, rng, threads=facts.threads)
        for option in options[linear.id]:
            found[option] = _start(facts, linear, option, metric)
    return found


def _start(facts: Analysis, linear: Linear, option: Option, moments: SecondMoments) -> _Start:
    """Return what an operator is trained from.

    Where there are rows in the place of second moments, the samples being few for the node's
    inputs, closed forms are those of the weights alone, and the bias stays.
    """
    weights = facts.model.weights
    kernel = linear.kernel(weights[linear.weight])
    bias = np.asarray(weights[linear.bias], np.float64).reshape(-1)
    metric = moments if isinstance(moments, Moments) else None
    if option.form not in TRAINED:
        arrays, dense = NODE_PASSES[option.method].fit(option, kernel, metric)
        flat = dense.reshape(len(dense), -1)
        change, whole = (squared_error(kernel, k, metric) for k in (dense, 0 * kernel))
        own = bias if metric is None else metric.bias(flat)
        return _Start(arrays, own, change / max(whole, 1e-30))
    arrays = SubstituteOperators().start(option, kernel, metric)
    if not arrays and metric is not None:  # what has no weights passes the inputs' means on
        means = metric.x_mean.reshape(linear.in_channels, -1).mean(axis=1)
        return _Start(arrays, metric.y_mean - means, 1.0)
    return _Start(arrays, bias, 1.0)


def _rewritten(facts: Analysis, starts: Mapping[Option, _Start]) -> Model:
    """Return the whole graph with an operator in the place of each of some nodes."""
    draft = facts.model.edit()
    for option, start in starts.items():
        bias = facts.linears[option.target].bias
        draft.set_weight(bias, start.bias.reshape(facts.model.weights[bias].shape))
    write_options(draft, facts, {option: start.arrays for option, start in starts.items()})
    return draft.seal(by="find_branches")


def _branch(
    facts: Analysis,
    linear: Linear,
    option: Option | None,
    whole_graph: Model,
    error: float,
    target: Target,
    whole: Mapping[str, float],
) -> Branch:
    """Cut the branch of a node out of a graph in which its operator is written."""
    steps, pool = [linear.convolution], 0.0
    if option is not None:
        widths = linear.out_channels, linear.in_channels
        steps = NODE_PASSES[option.method].chain(option, linear, *widths)
        pool = pool_seconds(linear, option, target)
    fact = facts.tensors[linear.x]
    cut = Value(linear.x, fact.dtype, (None, *fact.shape[1:]))
    model = extract(whole_graph, [cut], [linear.id])
    costs = _costs(steps, target)
    costs["seconds"] += pool
    shares = {name: cost / whole[name] for name, cost in costs.items()}
    return Branch(option, model, to_torch(model), error, shares)


def written(facts: Analysis, net: GraphModule, chosen: Mapping[str, Branch]) -> Written:
    """Return the graph with chosen operators and trained weights.

    Args:
        facts: Analysis of the `working_graph` that the network was made of.
        net: The network, for the weights that no branch holds.
        chosen: An operator for every convolution that has several.
    """
    old = facts.model.weights
    weights = dict(from_torch(net, facts.model).weights)
    options: dict[str, Option] = {}
    arrays: dict[str, Arrays] = {}
    for node, branch in chosen.items():
        linear, trained = facts.linears[node], from_torch(branch.module, branch.model)
        convolutions = [n for n in trained.nodes if n.op == "Conv"]
        # weights are in the order in which they were written; parallel nodes are in none
        read = {n.input(1) for n in convolutions}
        kernels = [array for name, array in trained.weights.items() if name in read]
        biases = [trained.weights[n.input(2)] for n in convolutions if n.input(2)]
        bias = biases[0] if biases else trained.weights[trained.producers[node].input(1)]
        weights[linear.bias] = bias.reshape(old[linear.bias].shape)
        if branch.option is None:
            weights[linear.weight] = kernels[0]
        else:
            options[node] = branch.option
            arrays[node] = arrays_of(branch.option, kernels)
    changed = {n: a for n, a in weights.items() if a.tobytes() != old[n].tobytes()}
    plan = OperatorPlan(options, arrays, changed)
    return Written(written_into(facts, plan), plan)


def _costs(steps: Sequence[Convolution], target: Target) -> dict[str, float]:
    return {
        "params": float(sum(step.weights for step in steps)),
        "macs": float(sum(step.macs for step in steps)),
        "seconds": target.chain_seconds(steps),
    }
