"""The loss of blocks: what each block is trained for, and that no gradient crosses an end."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="the bridge needs PyTorch")

from onnxcomp.bridge import to_torch
from onnxcomp.bridge.objective import (
    BlockObjective,
    Examples,
    Objective,
    check_labels,
)
from onnxcomp.errors import DataError
from onnxcomp.evaluate import predict
from onnxcomp.model import Model
from onnxcomp.runtime import Session, with_outputs
from onnxcomp.samples import Samples
from tests.analysis.channel_graphs import Graph
from tests.search.searching import inputs, wide

TIGHT = 1e-5  # relative; the same sums in float32


def chain() -> tuple[Model, list[str], list[str]]:
    """Three layers of 1 x 1: the model, its tensors and its weights, in order."""
    g = Graph(4, 6, 6)
    ends, t, width = [], "x", 4
    for outputs in (8, 8, 3):
        t = g.conv(t, width, outputs, kernel=1)
        ends.append(t)
        t, width = g.op("Relu", t), outputs
    model = g.model(t)
    return model, [*ends[:2], t], [model.producers[end].input(1) for end in ends]


def examples(model: Model, names: list[str], factor: float = 1.5) -> Examples:
    """Inputs whose targets are `factor` times what the model gives, and so is each end."""
    samples = Samples(inputs(model, 12))
    found = Session(with_outputs(model, names)).run(dict(samples.arrays))
    return Examples(samples, {name: factor * found[name] for name in names})


def loss(kind: type[Objective], given: Examples, names: list[str], model: Model) -> float:
    module = to_torch(model)
    objective = kind(model, module, given, 4, None, names[:-1])
    return sum(share * part.item() for share, part in objective.parts(module, given))


def test_each_block_is_compared_at_its_end() -> None:
    model, names, _ = chain()
    given = examples(model, names)
    # with targets of 1.5 times the values the squared change is a ninth of their mean square
    each = [np.mean((a / 3) ** 2) / np.var(a) for a in given.targets.values()]
    blocks = loss(BlockObjective, given, names, model)
    assert blocks == pytest.approx(np.mean(each), rel=TIGHT)
    together = loss(Objective, given, names, model)
    assert together == pytest.approx(each[2] + np.mean(each[:2]), rel=TIGHT)
    assert loss(BlockObjective, examples(model, names, 1.0), names, model) < TIGHT


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_wrong_end_teaches_its_own_block_only(wrong: int) -> None:
    model, names, weights = chain()
    exact = examples(model, names, 1.0)
    targets = dict(exact.targets)
    targets[names[wrong]] = targets[names[wrong]] + 1.0
    given = Examples(exact.samples, targets)
    learning = {}
    for kind in (BlockObjective, Objective):
        module = to_torch(model)
        objective = kind(model, module, given, 4, None, names[:-1])
        for share, part in objective.parts(module, given):
            (share * part).backward()
        sizes = [module.trained[name].grad.norm().item() for name in weights]
        learning[kind] = [size > 1e-4 for size in sizes]
    assert learning[BlockObjective] == [index == wrong for index in range(3)]
    assert learning[Objective] == [index <= wrong for index in range(3)]


def test_a_block_runs_on_what_the_model_itself_gives() -> None:
    """A wrong first layer shows at the ends behind it, though they are trained alone."""
    model, names, weights = chain()
    given = examples(model, names, 1.0)
    changed = {n: 2 * a if n == weights[0] else a for n, a in model.weights.items()}
    module = to_torch(Model(model.skeleton, changed))
    objective = BlockObjective(model, module, given, 12, None, names[:-1])
    losses = [part.item() for _, part in objective.parts(module, given)]
    assert len(losses) == 3
    assert min(losses) > 1e-3


def scores(labels: np.ndarray) -> float:
    """The loss on exact outputs, of which only the cross entropy is left."""
    model = wide(classes=True)
    arrays = inputs(model, 6)
    outputs = predict(model, Samples(arrays))
    given = Examples(Samples(arrays, labels), outputs)
    ((name, _),) = outputs.items()
    return Objective(model, to_torch(model), given, 4, name).of(to_torch(model), given)


def test_shares_of_classes_are_learned_from_as_such() -> None:
    model = wide(classes=True)
    (logits,) = predict(model, Samples(inputs(model, 6))).values()
    logs = logits.astype(np.float64).reshape(6, 16)
    logs = logs - np.log(np.exp(logs).sum(axis=1, keepdims=True))
    shares = np.random.default_rng(0).dirichlet(np.ones(16), 6)
    off = np.abs(shares - np.exp(logs)).sum(axis=1) / 2
    wanted = -np.mean(off * np.sum(shares * logs, axis=1))
    assert scores(shares) == pytest.approx(wanted, rel=TIGHT)
    assert scores(shares.argmax(axis=1)) != pytest.approx(wanted, rel=1e-2)
    hard = np.arange(6)
    assert scores(np.eye(16)[hard]) == pytest.approx(scores(hard), rel=TIGHT)


@pytest.mark.parametrize(
    "wrong", [np.full((2, 4), 0.5), np.array([[1.5, -0.5, 0, 0]])], ids=str
)
def test_numbers_that_are_no_shares_are_refused(wrong: np.ndarray) -> None:
    check_labels(np.array([[0.25, 0.75, 0, 0]]), 4)
    with pytest.raises(DataError, match="must be shares: >= 0, of sum 1"):
        check_labels(wrong, 4)
