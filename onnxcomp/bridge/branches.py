"""The operators that a convolution can become, as torch modules warm from closed forms.

A branch is a graph of its own: the node cut out of the model, rewritten by
`SubstituteOperators`, and made a module by `to_torch`.  What torch trains is so what the same
pass writes into the whole graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.linear import Linear
from onnxcomp.analysis.moments import SecondMoments, collect_moments
from onnxcomp.analysis.stream import Stream
from onnxcomp.analysis.target import Convolution, Target
from onnxcomp.bridge.module import GraphModule, to_torch
from onnxcomp.bridge.writing import from_torch
from onnxcomp.errors import UnsupportedModelError
from onnxcomp.model import Array, Model, Value, extract
from onnxcomp.numerics.factorization import squared_error
from onnxcomp.numerics.moments import Moments
from onnxcomp.passes import FINISH, PREPARE
from onnxcomp.passes.base import Arrays, Option, run_exact
from onnxcomp.passes.fold_batchnorm import FoldBatchnorm
from onnxcomp.passes.make_biases_explicit import MakeBiasesExplicit
from onnxcomp.passes.substitute_operators import (
    FITTED,
    TRAINED,
    SubstituteOperators,
    arrays_of,
    chain,
    seconds,
)
from onnxcomp.samples import Samples

_FITTED_ON = 512  # samples at most, for the closed forms
_BATCH = 32


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
        plan: The operators, by node.
        arrays: Their kernels, as `SubstituteOperators.apply` takes them.
    """

    model: Model
    plan: Mapping[str, Option]
    arrays: Mapping[str, Arrays]


def working_graph(model: Model) -> Model:
    """Return a model with BatchNorm folded and explicit biases."""
    for pass_ in (*PREPARE, FoldBatchnorm(), MakeBiasesExplicit()):
        model, _ = run_exact(pass_, Analysis(model))
    return model


def find_branches(
    facts: Analysis, samples: Samples, operators: SubstituteOperators | None, target: Target
) -> dict[str, list[Branch]]:
    """Return the operators of every convolution that has some, itself included.

    Args:
        facts: Analysis of a `working_graph`.
        samples: What the closed forms are fitted on.
        operators: Which operators to take; all that are legal if None.
        target: Whose latency model predicts seconds.

    Raises:
        UnsupportedModelError: There is none.
    """
    if operators is None:
        operators = SubstituteOperators((*FITTED, *TRAINED), target, step=1)
    model = facts.model
    options: dict[str, list[Option]] = {}
    for option in operators.propose(facts).options:
        if len(model.readers[facts.linears[option.target].bias]) == 1:
            options.setdefault(option.target, []).append(option)
    if not options:
        raise UnsupportedModelError("no convolution of the model has a lighter operator")
    starts = _starts(facts, samples, operators, options)
    whole = _costs([linear.convolution for linear in facts.linears.values()], target)
    found = {
        node: [_branch(facts, facts.linears[node], None, model, 0.0, target, whole)]
        for node in options
    }
    for index in range(max(map(len, options.values()))):  # one of every node at a time
        round_ = {o[index]: starts[o[index]] for o in options.values() if index < len(o)}
        rewritten = _rewritten(facts, operators, round_)
        for option, start in round_.items():
            linear = facts.linears[option.target]
            branch = _branch(facts, linear, option, rewritten, start.error, target, whole)
            found[option.target].append(branch)
    return found


@dataclass(frozen=True, eq=False)
class _Start:
    """What an operator is trained from: its kernels, the bias, and their error."""

    arrays: Arrays
    bias: Array
    error: float


def _starts(
    facts: Analysis,
    samples: Samples,
    operators: SubstituteOperators,
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
        (metric,) = collect_moments(linear, inputs, targets, rng)
        for option in options[linear.id]:
            found[option] = _start(facts, linear, operators, option, metric)
    return found


def _start(
    facts: Analysis,
    linear: Linear,
    operators: SubstituteOperators,
    option: Option,
    moments: SecondMoments,
) -> _Start:
    weights = facts.model.weights
    kernel = linear.kernel(weights[linear.weight])
    bias = np.asarray(weights[linear.bias], np.float64).reshape(-1)
    metric = moments if isinstance(moments, Moments) else None
    if option.form in FITTED:
        arrays, dense = operators.fit(option, kernel, metric)
        flat = dense.reshape(len(dense), -1)
        change, whole = (squared_error(kernel, k, metric) for k in (dense, 0 * kernel))
        own = bias if metric is None else metric.bias(flat)
        return _Start(arrays, own, change / max(whole, 1e-30))
    arrays = operators.start(option, kernel, metric)
    if not arrays and metric is not None:  # what has no weights passes the inputs' means on
        means = metric.x_mean.reshape(linear.in_channels, -1).mean(axis=1)
        return _Start(arrays, metric.y_mean - means, 1.0)
    return _Start(arrays, bias, 1.0)


def _rewritten(
    facts: Analysis, operators: SubstituteOperators, starts: Mapping[Option, _Start]
) -> Model:
    """Return the whole graph with an operator in the place of each of some nodes."""
    draft = facts.model.edit()
    for option, start in starts.items():
        bias = facts.linears[option.target].bias
        draft.set_weight(bias, start.bias.reshape(facts.model.weights[bias].shape))
    arrays = {option: start.arrays for option, start in starts.items()}
    operators.apply(draft, facts, arrays)
    return draft.seal(by=operators.name)


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
    steps, time = [linear.convolution], target.seconds(linear.convolution)
    if option is not None:
        steps = chain(linear, option, linear.out_channels, linear.in_channels)
        time = seconds(linear, option, target)
    fact = facts.tensors[linear.x]
    cut = Value(linear.x, fact.dtype, (None, *fact.shape[1:]))
    model = extract(whole_graph, [cut], [linear.id])
    costs = {**_costs(steps, target), "seconds": time}
    shares = {name: cost / whole[name] for name, cost in costs.items()}
    return Branch(option, model, to_torch(model), error, shares)


def written(facts: Analysis, net: GraphModule, chosen: Mapping[str, Branch]) -> Written:
    """Return the graph with chosen operators and trained weights.

    Args:
        facts: Analysis of the `working_graph` that the network was made of.
        net: The network, for the weights that no branch holds.
        chosen: An operator for every convolution that has several.
    """
    draft = from_torch(net, facts.model).edit()
    plan: dict[str, Option] = {}
    arrays: dict[str, Arrays] = {}
    for node, branch in chosen.items():
        linear, trained = facts.linears[node], from_torch(branch.module, branch.model)
        weights = trained.weights
        convolutions = [n for n in trained.nodes if n.op == "Conv"]
        # weights are in the order in which they were written; parallel nodes are in none
        read = {n.input(1) for n in convolutions}
        kernels = [array for name, array in weights.items() if name in read]
        biases = [weights[n.input(2)] for n in convolutions if n.input(2)]
        bias = biases[0] if biases else weights[trained.producers[node].input(1)]
        draft.set_weight(linear.bias, bias.reshape(facts.model.weights[linear.bias].shape))
        if branch.option is None:
            draft.set_weight(linear.weight, kernels[0])
        else:
            plan[node] = branch.option
            arrays[node] = arrays_of(branch.option, kernels)
    pass_ = SubstituteOperators()
    pass_.apply(draft, facts, {plan[node]: arrays[node] for node in plan})
    model = draft.seal(by=pass_.name)
    for exact in FINISH:
        model, _ = run_exact(exact, Analysis(model))
    return Written(model, plan, arrays)


def _costs(steps: Sequence[Convolution], target: Target) -> dict[str, float]:
    return {
        "params": float(sum(step.weights for step in steps)),
        "macs": float(sum(step.macs for step in steps)),
        "seconds": target.chain_seconds(steps),
    }
