"""What a training step changes, and what it must leave alone."""

import copy

import numpy as np
import pytest

pytest.importorskip("torch", reason="the bridge needs PyTorch")

import torch
from torch import nn

from onnxcomp.bridge import GraphModule, check_equal, from_torch, to_torch
from onnxcomp.errors import ParameterError, UnsupportedModelError, ValidationError
from onnxcomp.model import Model
from tests.analysis.channel_graphs import Graph, feeds
from tests.bridge.checks import (
    backward,
    changed,
    converted,
    feed_of,
    relative,
    without_gradient,
)
from tests.graphs import sane_feeds
from tests.passes.joint_cases import made
from tests.search.cases import CASES

TIGHT = 1e-6  # relative L2 of the same arithmetic in float32


def step(module: GraphModule, model: Model, rate: float = 0.05, count: int = 1) -> None:
    """One step of gradient descent."""
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=rate)
    backward(module, feed_of(model, sane_feeds(model, count), count))
    optimizer.step()
    module.eval()


@pytest.mark.parametrize("name", CASES)
def test_a_step_changes_what_it_trains_and_nothing_else(name: str) -> None:
    model = CASES[name]()
    module = to_torch(model)
    before = {n: w.detach().clone() for n, w in module.trained.items()}
    step(module, model)
    moved = {n for n, w in module.trained.items() if not torch.equal(w, before[n])}
    assert len(moved) > len(before) / 2
    trained = from_torch(module, like=model)
    assert changed(model, trained) == moved
    check_equal(module, trained)
    with pytest.raises(ValidationError, match="torch is off onnxruntime by"):
        check_equal(module, model)
    assert changed(trained, from_torch(to_torch(trained), like=trained)) == set()


def test_a_frozen_weight_stays() -> None:
    model = CASES["residual"]()
    module = to_torch(model)
    frozen, *_ = module.trained
    module.trained[frozen].requires_grad_(False)
    step(module, model)
    assert changed(model, from_torch(module, like=model)) == module.trained.keys() - {frozen}


@pytest.mark.parametrize("name", ["weight_in_three_places", "slope_in_two_places", "twins"])
def test_shared_initializers_stay_one(name: str) -> None:
    model = CASES[name]()
    module = to_torch(model)
    shared = [n for n, _, uses in model.weight_readers() if len(uses) > 1]
    assert shared
    assert set(shared) <= module.trained.keys()
    parameters = list(module.parameters())
    assert len({id(p) for p in parameters}) == len(parameters) == len(module.trained)
    backward(module, feed_of(model, sane_feeds(model)))
    together = module.trained[shared[0]].grad
    uses = model.readers[shared[0]]
    assert together is not None
    alone = torch.zeros_like(together)
    for use in uses:  # its gradient is the sum over copies that one node each reads
        draft = model.edit()
        own = draft.add_weight("own", model.weights[shared[0]])
        draft.set_input(use.node.id, use.index, own)
        apart = to_torch(draft.seal(by="test"))
        backward(apart, feed_of(model, sane_feeds(model)))
        part = apart.trained[own].grad
        assert part is not None
        alone += part
    assert relative(alone, together) < TIGHT
    assert relative(alone - part, together) > 1e-3


@pytest.mark.parametrize(
    ("case", "form"),
    [
        ("residual bn", "spatial_both"),
        ("residual", "input_basis_both"),
        ("residual", "tucker2_outer"),
        ("gemm", "output_basis_both"),
        ("matmul", "output_basis_first"),
    ],
)
def test_common_factors_stay_common(case: str, form: str) -> None:
    found = made(case, form)
    model = found.model
    common = {n for n in model.weights if n.endswith("_common")}
    module = converted(model, found.facts.samples)
    assert common
    assert common <= module.trained.keys()
    step(module, model)
    assert without_gradient(module) == []
    trained = from_torch(module, like=model)
    assert common <= changed(model, trained)
    check_equal(module, trained)
    if form.endswith("_both"):
        assert "Concat" in {node.op for node in trained.nodes}


def _with_batchnorm(momentum: float = 0.7) -> Model:
    g = Graph(3, 8, 8)
    t = g.conv("x", 3, 6)
    names = [g.w(6, name="bn") for _ in range(3)]
    names.append(g.constant(np.linspace(0.5, 2, 6, dtype=np.float32), "variance"))
    t = g.op("BatchNormalization", t, *names, momentum=momentum, epsilon=1e-3)
    return g.model(g.conv(g.op("Relu", t), 6, 4))


def test_batchnorm_follows_the_batches_as_torch_does() -> None:
    model = _with_batchnorm(momentum=0.7)
    conv, bn = model.nodes[0], model.nodes[1]
    module = to_torch(model, batchnorm="trainable")
    norm = nn.BatchNorm2d(6, eps=1e-3, momentum=0.3)  # torch weighs the new by 1 - 0.7
    scale, bias, mean, variance = (torch.tensor(model.weights[n]) for n in bn.inputs[1:])
    norm.load_state_dict(
        {"weight": scale, "bias": bias, "running_mean": mean, "running_var": variance}
        | {"num_batches_tracked": torch.tensor(0)}
    )
    feed = {"x": torch.from_numpy(feeds(model, 4)[0]["x"])}
    module.train()
    for _ in range(2):
        found = module(feed, [conv.id, bn.id])
        assert relative(found[bn.id], norm(found[conv.id])) < TIGHT
    trained = from_torch(module, like=model)
    assert changed(model, trained) == set(bn.inputs[3:])
    assert relative(trained.weights[bn.inputs[3]], norm.running_mean) < TIGHT
    assert relative(trained.weights[bn.inputs[4]], norm.running_var) < TIGHT
    wrong = nn.BatchNorm2d(6, eps=1e-3, momentum=0.7)
    wrong.load_state_dict(norm.state_dict() | {"running_mean": mean, "running_var": variance})
    wrong(found[conv.id])
    assert relative(trained.weights[bn.inputs[3]], wrong.running_mean) > 1e-2
    check_equal(module, trained)


def test_batchnorm_is_frozen_by_default_and_in_evaluation() -> None:
    model = _with_batchnorm()
    feed = {"x": torch.from_numpy(feeds(model, 4)[0]["x"])}
    frozen, trainable = to_torch(model), to_torch(model, batchnorm="trainable")
    assert not frozen.training
    wanted = frozen(feed)
    frozen.train()(feed)
    trainable.eval()(feed)
    for module in (frozen, trainable):
        assert changed(model, from_torch(module, like=model)) == set()
        for name, value in module.eval()(feed).items():
            assert torch.equal(value, wanted[name])
    step(frozen, model)
    statistics = set(model.nodes[1].inputs[3:])
    assert changed(model, from_torch(frozen, like=model)) == model.weights.keys() - statistics


def test_statistics_that_cannot_be_kept_are_refused() -> None:
    g = Graph(3, 8, 8)
    t, zeros = g.conv("x", 3, 6), g.constant(np.zeros(6, np.float32))
    ones = g.constant(np.ones(6, np.float32))
    made = g.op("Add", ones, ones)
    t = g.op("BatchNormalization", t, g.w(6), zeros, zeros, made)
    model = g.model(t)
    frozen = to_torch(model)
    assert frozen.untrained == {zeros: "it is a statistic of BatchNormalization too"}
    with pytest.raises(UnsupportedModelError) as caught:
        to_torch(model, batchnorm="trainable")
    assert f"'{zeros}' is read by '{t}' too" in str(caught.value)
    assert f"'{made}' is no initializer (fold constants first)" in str(caught.value)
    with pytest.raises(ParameterError, match="'batchnorm' must be one of frozen, trainable"):
        to_torch(model, batchnorm="train")  # type: ignore[arg-type]


def test_dropout_only_where_asked_for() -> None:
    g = Graph(3, 8, 8)
    ratio = g.constant(np.float32(0.5))
    model = g.model(g.conv(g.op("Dropout", g.conv("x", 3, 6), ratio), 6, 4))
    feed = {"x": torch.from_numpy(feeds(model, 2)[0]["x"])}
    kept, dropping = to_torch(model).train(), to_torch(model, dropout=True)
    (wanted,) = kept(feed).values()
    (quiet,) = dropping.eval()(feed).values()
    (noisy,) = dropping.train()(feed).values()
    assert torch.equal(wanted, quiet)
    assert relative(noisy, wanted) > 0.1


def test_what_looks_like_a_weight_but_is_none_stays() -> None:
    """Constants of preprocessing, of decoding and of scaling, beside those of layers."""
    g = Graph(3, 8, 8)
    t = g.op("Mul", "x", mean := g.w(3, 1, 1))
    t = g.conv(t, 3, 6)
    t = g.op("Mul", t, gain := g.w(6, 1, 1))
    t = g.op("Add", g.op("Relu", t), shift := g.w(1, 6, 1, 1))
    t = g.op("Add", t, rows := g.w(8, 1))
    t = g.op("Div", g.op("Add", t, g.constant(np.float32(3))), g.constant(np.float32(6)))
    t = g.op("Transpose", t, perm=[0, 2, 3, 1])
    t = g.op("Add", g.op("Add", t, last := g.w(6)), grid := g.w(1, 8, 8, 1))
    module = converted(g.model(t))
    assert {gain, shift, last} <= module.trained.keys()
    assert not {mean, rows, grid} & module.trained.keys()
    assert len(module.trained) == 5


def test_names_of_any_kind_and_copies_of_the_module() -> None:
    model = CASES["two_heads"]()
    names = {n: f"onnx::{i}/weight.{i} é" for i, n in enumerate(model.weights)}
    proto = model.to_proto()
    for tensor in proto.graph.initializer:
        tensor.name = names[tensor.name]
    for node in proto.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    renamed = Model.from_proto(proto)
    module = converted(renamed)
    assert set(module.trained) <= set(renamed.weights)
    twin = copy.deepcopy(module)
    step(module, renamed)
    assert changed(renamed, from_torch(twin, like=renamed)) == set()
    twin.load_state_dict(module.state_dict())
    assert from_torch(twin, renamed).digest == from_torch(module, renamed).digest


def test_writing_into_another_graph_is_refused() -> None:
    module = to_torch(CASES["residual"]())
    with pytest.raises(ParameterError, match="the model has no initializer"):
        from_torch(module, like=CASES["one_dimension"]())
    other = CASES["residual"]()
    draft = other.edit()
    name = next(n for n, a in other.weights.items() if a.ndim == 4)
    draft.set_weight(name, np.zeros((16, 8, 1, 1), np.float32))
    with pytest.raises(ParameterError, match=f"'{name}' has shape .*, the model's"):
        from_torch(module, like=Model(other.skeleton, draft.weights))
