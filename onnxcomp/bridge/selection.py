"""A choice of operators that is learnt: weights and selection by one gradient descent.

Every convolution becomes a `Choice` among itself and lighter operators, all of them warm from
their closed forms.  Exactly one is active in each forward pass; the gradient of its gate also
tells the others what they would change.  The objective is the change of the network's outputs
plus a factor times its cost, after Diao et al. 2021 (Sensors 21, 3464) as reconstructed in
`spec/operator-substitution.md`: formulas and schedule are this project's own where the article
is not known.  What differs on purpose: branches have no BatchNorm (it is folded, and closed
forms start them at the right scale), and no labels are needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.outputs import raw_outputs
from onnxcomp.analysis.target import TARGETS, Target
from onnxcomp.bridge.branches import Branch, find_branches, written
from onnxcomp.bridge.equality import check_equal, tolerance_of
from onnxcomp.bridge.module import GraphModule
from onnxcomp.bridge.objective import Examples, Objective
from onnxcomp.bridge.plan import make_plan
from onnxcomp.deadline import Progress
from onnxcomp.errors import ParameterError
from onnxcomp.evaluate import predict
from onnxcomp.model import Model, extract
from onnxcomp.passes.base import NodePass
from onnxcomp.passes.operator_plan import OperatorPlan, working_graph
from onnxcomp.samples import Samples

Cost = Literal["params", "macs", "seconds"]
Gate = Literal["identity", "softmax"]

_EXPLORED = 0.25  # share of the convolutions that try a random operator in a step of warm-up
_CLIP = 1.0  # largest norm of the weights' gradient
_MOMENTUM = 0.9
_SLACK = 0.005  # of the original's cost, above a target that counts as reached
_CHECKED = 4  # samples on which the result must be what torch trained


@dataclass(frozen=True)
class Selection:
    """How operators are chosen.

    Attributes:
        cost: What is to be saved; seconds are those of the target's latency model.
        factor: Weight of the cost, as a share of the original's, beside the relative squared
            change of the outputs.
        target: Share of the cost to reach, instead of paying for all of it: the penalty is
            the factor times the distance from it, and the last epoch within it is kept.
        gate: Derivative of the gates: "identity" (trainable gates) or "softmax" (hard forward
            pass, straight-through).
        warm_up: Epochs in which random operators are trained, one path at a time.
        epochs: Epochs in which weights and gates are trained together.
        tuning: Epochs in which the weights of the chosen operators are trained.
        batch: Samples per step.
        learning_rate: That of the weights (Adam), falling to 0 as a cosine.
        gate_rate: That of the gates (gradient descent with momentum), likewise.
        seed: Seed of the order of the samples and of random paths.
    """

    cost: Cost = "macs"
    factor: float = 1.0
    target: float | None = None
    gate: Gate = "identity"
    warm_up: int = 1
    epochs: int = 6
    tuning: int = 4
    batch: int = 32
    learning_rate: float = 3e-4
    gate_rate: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("cost", ("params", "macs", "seconds")),
            ("gate", ("identity", "softmax")),
        ):
            if getattr(self, name) not in allowed:
                raise ParameterError.choice("Selection", name, allowed, getattr(self, name))
        for name in ("warm_up", "epochs", "tuning", "factor"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ParameterError.of("Selection", name, "at least 0", value)
        if self.batch < 1:
            raise ParameterError.of("Selection", "batch", ">= 1", self.batch)
        for name in ("learning_rate", "gate_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ParameterError.of("Selection", name, "> 0", getattr(self, name))
        if self.target is not None and not 0 < self.target <= 1:
            raise ParameterError.of("Selection", "target", "above 0, at most 1", self.target)


@dataclass(frozen=True)
class Selected:
    """What a search found.

    Attributes:
        model: The model with the chosen operators and the trained weights.
        plan: What makes it of the original, without torch: `plan.save`, `load_plan`, `replay`.
        share: Cost of the model as a share of the original's.
        loss: Relative squared change of the outputs on the samples.
        history: Loss and share of the cost after every epoch of the search.
        table: The plan in words, one line per convolution, with its shares of the original's
            parameters, MACs and predicted seconds.
    """

    model: Model
    plan: OperatorPlan
    share: float
    loss: float
    history: tuple[tuple[float, float], ...]
    table: str


def one_hot(alpha: Tensor, gate: Gate) -> Tensor:
    """Return gates that are exactly 0 or 1, the first largest entry open.

    The derivative is the identity's, or softmax's Jacobian ``p_i (delta_ij - p_j)``.

    Args:
        alpha: Shape (n,).
        gate: Which of the two.
    """
    hard = functional.one_hot(alpha.argmax(), len(alpha)).to(alpha)
    soft = alpha if gate == "identity" else alpha.softmax(0)
    return hard + (soft - soft.detach())


class Choice(nn.Module):
    """One convolution's operators, cheapest first, of which one is active.

    Attributes:
        alpha: Whose largest entry is active; shape (operators,).
        only: The operator that is run, whatever alpha says; None where the gates decide.
    """

    def __init__(self, branches: Sequence[Branch], cost: Cost, gate: Gate) -> None:
        super().__init__()
        self.branches = sorted(branches, key=lambda branch: branch.costs[cost])
        self.operators = nn.ModuleList([branch.module for branch in self.branches])
        self.alpha = nn.Parameter(torch.tensor([-b.error for b in self.branches]))
        self.costs: Tensor
        values = torch.tensor([branch.costs[cost] for branch in self.branches])
        self.register_buffer("costs", values)
        self.only: int | None = None
        self._gate: Gate = gate

    @property
    def original(self) -> int:
        """Position of the convolution itself."""
        return next(i for i, branch in enumerate(self.branches) if branch.option is None)

    @property
    def active(self) -> int:
        """Position of the operator that is run."""
        return int(self.alpha.argmax()) if self.only is None else self.only

    def forward(self, x: Tensor, *_: Tensor | None) -> Tensor:
        """Return what the active operator makes of x; the gates get their gradients."""
        active = self.active
        y = self._run(active, x)
        if self.only is not None:
            return y
        gates = one_hot(self.alpha, self._gate)
        total = gates[active] * y
        for index in range(len(self.operators)):
            if index != active:
                with torch.no_grad():  # a closed gate lets nothing through to its weights
                    other = self._run(index, x)
                total = total + gates[index] * other
        return total

    def _run(self, index: int, x: Tensor) -> Tensor:
        module = self.branches[index].module
        (y,) = module.forward({module.input_names[0]: x}).values()
        return y

    def cost(self) -> Tensor:
        """Return the cost of the open gate, with the gates' gradient."""
        return (one_hot(self.alpha, self._gate) * self.costs).sum()


class Supernet(GraphModule):
    """A graph whose convolutions are `Choice`s.

    Attributes:
        choices: They, by node.
    """

    def __init__(self, model: Model, choices: Mapping[str, Choice]) -> None:
        plan = make_plan(model, batchnorm="frozen")
        steps = (replace(s, kernel=choices.get(s.id, s.kernel)) for s in plan.steps)
        super().__init__(replace(plan, steps=tuple(steps)), batchnorm="frozen", dropout=False)
        self.choices = dict(choices)
        self._all = nn.ModuleList(choices.values())

    def saved(self) -> Tensor:
        """Return what the open gates save, as a share of the original's cost."""
        saved = [c.costs[c.original] - c.cost() for c in self.choices.values()]
        return torch.stack(saved).sum()

    @property
    def alphas(self) -> list[nn.Parameter]:
        """What the gates are made of."""
        return [choice.alpha for choice in self.choices.values()]

    @property
    def substitutes(self) -> list[nn.Parameter]:
        """The weights of all operators but the convolutions themselves."""
        return [
            weight
            for choice in self.choices.values()
            for index, operator in enumerate(choice.operators)
            if index != choice.original
            for weight in operator.parameters()
        ]


def search(
    model: Model,
    samples: Samples,
    selection: Selection | None = None,
    *,
    operators: Sequence[NodePass] = (),
    outputs: Sequence[str] = (),
    target: Target = TARGETS["x86-avx512"],
    progress: Progress = lambda *_: None,
) -> Selected:
    """Choose an operator for every convolution, and train what was chosen.

    Args:
        model: The model, with BatchNorm or without.
        samples: Unlabelled samples; the model's own outputs on them are what is learnt.
        selection: How to choose.
        operators: Passes that propose what to choose from; if there are none, all lighter
            operators that are legal, and chains of low rank.
        outputs: Tensors whose change counts; the raw outputs, in front of Softmax and Sigmoid,
            if none are given.
        target: Whose latency model predicts seconds.
        progress: Called with a label and the share of the steps that is done.

    Raises:
        DataError: The samples do not fit, or there are none.
        ParameterError: `operators` hold nothing that can be trained.
        UnsupportedModelError: Nodes cannot be expressed in torch, or no convolution has a
            lighter operator.
        ValidationError: The result is not what torch trained, on some samples.
    """
    selection = selection or Selection()
    work = working_graph(model)
    facts = Analysis(work, samples, seed=selection.seed)
    choices = {
        node: Choice(branches, selection.cost, selection.gate)
        for node, branches in find_branches(facts, samples, operators, target).items()
    }
    net = Supernet(work, choices)
    names = tuple(outputs) or raw_outputs(work, facts.tensors)
    examples = Examples(samples, predict(extract(work, (), names), samples))
    objective = Objective(work, net, examples, selection.batch)
    training = _Training(net, objective, examples, selection, progress)
    training.run()
    chosen = {node: choice.branches[choice.active] for node, choice in choices.items()}
    result = written(facts, net, chosen)
    few = samples.take(range(min(_CHECKED, samples.count)))
    check_equal(net, result.model, few, tolerance=tolerance_of(work))
    return Selected(
        result.model,
        result.plan,
        training.share,
        objective.of(net, examples),
        tuple(training.history),
        _table(choices),
    )


class _Training:
    """The three stages of a search: warm-up, weights with gates, chosen weights."""

    def __init__(
        self,
        net: Supernet,
        objective: Objective,
        examples: Examples,
        selection: Selection,
        progress: Progress,
    ) -> None:
        self._net = net
        self._objective = objective
        self._examples = examples
        self._selection = selection
        self._progress = progress
        self._rng = np.random.default_rng(selection.seed)
        self._best: tuple[float, dict[str, Tensor]] | None = None  # excess of an epoch, state
        self.history: list[tuple[float, float]] = []

    @property
    def share(self) -> float:
        """Cost of the network with the open gates as a share of the original's."""
        return 1 - self._net.saved().item()

    def run(self) -> None:
        """Train; the choices are fixed in the end."""
        selection, net = self._selection, self._net
        alphas = {id(alpha) for alpha in net.alphas}
        weights = [p for p in net.parameters() if id(p) not in alphas]
        if net.substitutes:  # pools and skips have no weights
            self._stage("warm-up", selection.warm_up, net.substitutes, self._try_paths)
        self._fix(lambda choice: None)
        self._stage("search", selection.epochs, weights, lambda: None, gates=True)
        if self._best is not None:
            net.load_state_dict(self._best[1])
        self._fix(lambda choice: choice.active)
        self._stage("tuning", selection.tuning, weights, lambda: None)

    def _fix(self, position: Callable[[Choice], int | None]) -> None:
        for choice in self._net.choices.values():
            choice.only = position(choice)

    def _try_paths(self) -> None:
        """Let some convolutions run a random operator, the others themselves."""

        def draw(choice: Choice) -> int:
            if self._rng.random() >= _EXPLORED:
                return choice.original
            return int(self._rng.integers(len(choice.operators)))

        self._fix(draw)

    def _stage(
        self,
        name: str,
        epochs: int,
        weights: Sequence[nn.Parameter],
        before: Callable[[], None],
        gates: bool = False,
    ) -> None:
        """Train weights, and the gates where asked to, for some epochs."""
        selection, net = self._selection, self._net
        optimizer = torch.optim.Adam(weights, selection.learning_rate)
        gating = torch.optim.SGD(net.alphas, selection.gate_rate, momentum=_MOMENTUM)
        count, size = self._examples.samples.count, selection.batch
        per_epoch = -(-count // size)
        for epoch in range(epochs):
            order, total = self._rng.permutation(count), 0.0
            for step in range(per_epoch):
                done = (epoch * per_epoch + step) / (epochs * per_epoch)
                fall = (1 + math.cos(math.pi * done)) / 2
                optimizer.param_groups[0]["lr"] = selection.learning_rate * fall
                gating.param_groups[0]["lr"] = selection.gate_rate * fall
                before()
                net.zero_grad()
                chosen = order[step * size : (step + 1) * size].tolist()
                total += len(chosen) / count * self._backward(chosen)
                if gates:
                    self._penalty().backward()  # type: ignore[no-untyped-call]  # torch has no types there
                    _limit(net.alphas)
                    gating.step()
                nn.utils.clip_grad_norm_(weights, _CLIP)
                optimizer.step()
                self._progress(name, done)
            if gates:
                self.history.append((total, self.share))
                self._note_epoch()

    def _note_epoch(self) -> None:
        """Keep the state of the last epoch within the target, or nearest to it."""
        target = self._selection.target
        if target is None:
            return
        excess = max(self.share - target - _SLACK, 0.0)
        if self._best is None or excess <= self._best[0]:
            state = {name: value.clone() for name, value in self._net.state_dict().items()}
            self._best = excess, state

    def _backward(self, chosen: Sequence[int]) -> float:
        """Add the gradients of the change of the outputs on some samples; return it."""
        total = 0.0
        for share, loss in self._objective.parts(self._net, self._examples.take(chosen)):
            if loss.requires_grad:  # not where only pools and skips are left
                (share * loss).backward()  # type: ignore[no-untyped-call]  # torch has no types there
            total += share * loss.item()
        return total

    def _penalty(self) -> Tensor:
        """Return what the cost adds to the objective."""
        share = 1 - self._net.saved()
        if self._selection.target is not None:
            share = (share - self._selection.target).abs()
        return self._selection.factor * share


def _limit(alphas: Sequence[nn.Parameter]) -> None:
    """Let no gate move faster than its rate, so that a large factor saturates nothing."""
    for alpha in alphas:
        if alpha.grad is not None:
            alpha.grad /= alpha.grad.abs().max().clamp(min=1.0)


def _table(choices: Mapping[str, Choice]) -> str:
    """Return the plan, one line per convolution."""
    rows = []
    for node, choice in choices.items():
        branch, original = choice.branches[choice.active], choice.branches[choice.original]
        option, before = branch.option, original.costs
        sizes = "" if option is None else " ".join(str(size) for size in option.size)
        what = "as it was" if option is None else f"{option.form} {sizes}".rstrip()
        costs = [f"{n} {before[n]:.2%} -> {now:.2%}" for n, now in branch.costs.items()]
        rows.append("; ".join([f"{node}: {what}", *costs]))
    return "\n".join(rows)
