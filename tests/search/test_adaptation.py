"""BatchNorm statistics are those of the working model's outputs, and noise is given them."""

import numpy as np
import onnx
import pytest

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.moments import collect_moments
from onnxcomp.analysis.probe import random_inputs
from onnxcomp.analysis.stream import Stream
from onnxcomp.model import Array, Model
from onnxcomp.passes.working import prepare, working_model
from onnxcomp.runtime import Session, with_outputs
from onnxcomp.search.adaptation import Adapted, adapted, batchnorm_statistics
from tests.analysis.channel_graphs import Graph
from tests.graphs import SHARED, shared_models

STATISTICS_TOLERANCE = 1e-3  # of the deviation: BatchNorm's epsilon and float32
MOMENTS_TOLERANCE = 1e-4  # of the deviation: float32
WEIGHTS_TOLERANCE = 1e-6  # relative L2: float32


def residual() -> Model:
    g = Graph(3, 16, 16)
    t = g.op("Relu", g.bn(g.conv("x", 3, 8), 8))
    h = g.op("Relu", g.bn(g.conv(t, 8, 8), 8))
    t = g.op("Relu", g.op("Add", g.bn(g.conv(h, 8, 8), 8), t))
    return g.model(g.op("Gemm", g.mean(t), g.w(8, 5), g.w(5)))


def grouped_and_transposed() -> Model:
    g = Graph(6, 8, 8)
    t = g.op("Relu", g.bn(g.conv("x", 6, 6, group=6), 6))
    t = g.op("ConvTranspose", t, g.w(6, 4, 3, 3), strides=[2, 2], group=2)
    return g.model(g.conv(g.op("Relu", g.bn(t, 8)), 8, 4))


def followed_by_more() -> Model:
    """An affine chain behind the BatchNormalization is folded with it."""
    g = Graph(3, 8, 8)
    t = g.op("Mul", g.bn(g.conv("x", 3, 8), 8), g.w(8, 1, 1))
    return g.model(g.conv(g.op("Relu", g.op("Add", t, g.w(8, 1, 1))), 8, 4))


def at_the_end() -> Model:
    """The name of an output stays; the convolution takes it on."""
    g = Graph(3, 8, 8)
    return g.model(g.bn(g.conv("x", 3, 8), 8))


def dense() -> Model:
    """A Gemm, and a MatMul whose BatchNormalization becomes the Add of its bias."""
    g = Graph(12)
    t = g.op("Relu", g.bn(g.op("Gemm", "x", g.w(12, 10), g.w(10)), 10))
    t = g.op("Relu", g.bn(g.op("MatMul", t, g.w(10, 6)), 6))
    return g.model(g.op("Gemm", t, g.w(6, 4), g.w(4)))


MODELS = (residual, grouped_and_transposed, followed_by_more, at_the_end, dense)


def feeds(model: Model, seed: int, count: int = 64, batch: int = 24) -> list[dict[str, Array]]:
    """Batches of different sizes; inputs of a mean and deviation that differ by seed."""
    rng = np.random.default_rng(seed)
    shape = (count, *model.signature.inputs[0].shape[1:])
    x = (rng.standard_normal(shape) * (1 + seed) + 0.3 * seed).astype(np.float32)
    return [{"x": x[i : i + batch]} for i in range(0, count, batch)]


def moments(model: Model, name: str, batches: list[dict[str, Array]], axis: int = 1):
    session = Session(with_outputs(model, [name]), optimize=False)
    y = np.concatenate([session.run(feed)[name] for feed in batches]).astype(np.float64)
    rows = np.moveaxis(y, axis, -1).reshape(-1, y.shape[axis])
    return rows.mean(axis=0), rows.std(axis=0)


def trained(model: Model) -> Model:
    """Give every BatchNormalization the statistics of its input, as training does."""
    for node in [n for n in model.nodes if n.op == "BatchNormalization"]:
        mean, deviation = moments(model, node.input(0), feeds(model, 0))
        draft = model.edit()
        draft.set_weight(node.input(3), mean)
        draft.set_weight(node.input(4), deviation**2)
        model = draft.seal(by="test")
    return model


def gap(found, wanted) -> float:
    """Largest difference of means and deviations, in units of the deviation."""
    pairs = zip(found, wanted, strict=True)
    return max(float(np.max(np.abs(a - b) / wanted[1])) for a, b in pairs)


def relative(found: Array, wanted: Array) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def work_and_statistics(make):
    prepared = prepare(trained(make()))[0]
    return working_model(prepared, None, seed=0), batchnorm_statistics(prepared)


@pytest.mark.parametrize("make", MODELS)
def test_statistics_are_those_of_the_working_model(make):
    model, statistics = work_and_statistics(make)
    linears = {linear.y: linear for linear in Analysis(model).linears.values()}
    assert len(statistics) == sum(n.op == "BatchNormalization" for n in make().nodes)
    for name, wanted in statistics.items():
        assert name in linears
        found = moments(model, name, feeds(model, 0))
        assert gap(found, wanted) <= STATISTICS_TOLERANCE
        assert gap(moments(model, name, feeds(model, 1)), wanted) > 0.1


def shared_weight() -> Model:
    g = Graph(8, 8, 8)
    weight, t = g.w(8, 8, 3, 3), "x"
    for _ in range(2):
        t = g.op("Relu", g.bn(g.op("Conv", t, weight, pads=[1] * 4), 8))
    return g.model(g.conv(t, 8, 4))


def in_front() -> Model:
    """Read in two places, and in front of a convolution: no statistics of an output."""
    g = Graph(8, 8, 8)
    c = g.conv("x", 8, 8)
    b = g.op("Conv", g.bn("x", 8), g.w(8, 8, 1, 1))
    return g.model(g.op("Add", g.op("Relu", g.bn(c, 8)), c), b)


@pytest.mark.parametrize("make", [shared_weight, in_front])
def test_what_is_not_folded_into_a_node_says_nothing(make):
    assert batchnorm_statistics(prepare(make())[0]) == {}


@pytest.mark.parametrize("path", shared_models(), ids=lambda p: p.stem)
def test_real_models(path):
    prepared = prepare(Model.from_proto(onnx.load(path)))[0]
    statistics = batchnorm_statistics(prepared)
    if not any(node.op == "BatchNormalization" for node in prepared.nodes):
        assert statistics == {}
        return
    linears = Analysis(working_model(prepared, None, seed=0)).linears.values()
    assert statistics.keys() <= {linear.y for linear in linears}
    if path.stem.startswith("akamaster"):
        assert len(statistics) == len(linears) - 1  # all but the fully connected layer


@pytest.mark.parametrize("make", MODELS)
def test_noise_gets_the_statistics(make):
    model, statistics = work_and_statistics(make)
    noise = feeds(model, 1)
    found = adapted(Analysis(model), statistics, noise, threads=1)
    assert len(found.scales) == len(statistics)
    for name, wanted in statistics.items():
        assert gap(moments(found.model, name, noise), wanted) <= MOMENTS_TOLERANCE
        assert gap(moments(model, name, noise), wanted) > 0.1
    assert found.model.signature == model.signature


@pytest.mark.parametrize("make", MODELS)
def test_restoring_gives_the_weights_back(make):
    model, statistics = work_and_statistics(make)
    found = adapted(Analysis(model), statistics, feeds(model, 1), threads=1)
    changes = {}
    for linear in Analysis(model).linears.values():
        kernel, other = (linear.kernel(m.weights[linear.weight]) for m in (model, found.model))
        bias, shifted = (m.weights[linear.bias].reshape(-1) for m in (model, found.model))
        rows = np.arange(0, linear.out_channels, 2)
        back, moved = found.restore(linear.id, other[rows], shifted[rows], rows)
        assert relative(back, kernel[rows]) <= WEIGHTS_TOLERANCE
        assert np.abs(moved - bias[rows]).max() <= 1e-5 * np.abs(shifted).max()
        changes[linear.id] = relative(other, kernel)
    assert {n for n, change in changes.items() if change} == found.scales.keys()
    assert max(changes.values()) > 0.1


def test_restoring_the_last_kernel_of_a_chain_restores_its_product():
    rng = np.random.default_rng(0)
    scales = {"y": (rng.uniform(0.5, 2, 6), rng.standard_normal(6))}
    network = Adapted(residual(), residual(), scales)
    first, last = rng.standard_normal((2, 27)), rng.standard_normal((4, 2, 1, 1))
    rows, bias = np.array([0, 2, 3, 5]), rng.standard_normal(4)
    product = network.restore("y", last[:, :, 0, 0] @ first, bias, rows)
    factor = network.restore("y", last, bias, rows)
    assert np.allclose(factor[0][:, :, 0, 0] @ first, product[0], rtol=1e-12)
    assert np.array_equal(factor[1], product[1])
    x = rng.standard_normal((27, 100))
    scale, shift = (part[rows, None] for part in scales["y"])
    there = last[:, :, 0, 0] @ first @ x + bias[:, None]
    assert np.allclose(scale * (product[0] @ x + product[1][:, None]) + shift, there)


def test_constant_channels_keep_their_weights_and_factors_are_bounded():
    prepared = prepare(trained(residual()))[0]
    model, statistics = working_model(prepared, None, seed=0), batchnorm_statistics(prepared)
    linear = next(iter(Analysis(model).linears.values()))
    draft = model.edit()
    weight = model.weights[linear.weight].copy()
    weight[0], weight[1], weight[2] = 0, weight[1] * 10, weight[2] / 10
    draft.set_weight(linear.weight, weight)
    noise = feeds(model, 1)
    found = adapted(Analysis(draft.seal(by="test")), statistics, noise, threads=1)
    scale, _ = found.scales[linear.id]
    assert scale[:3].tolist() == [1, 0.25, 4]
    mean, deviation = moments(found.model, linear.y, noise)
    assert np.allclose(mean, statistics[linear.y][0], atol=1e-3 * deviation.max())
    assert deviation[0] == 0


def test_nodes_that_share_a_weight_stay():
    model = working_model(prepare(shared_weight())[0], None, seed=0)
    first, second, _ = Analysis(model).linears.values()
    statistics = {n.y: (np.zeros(8), np.ones(8)) for n in (first, second)}
    found = adapted(Analysis(model), statistics, feeds(model, 0), threads=1)
    assert found.scales == {}
    assert found.model is model


def test_channels_that_are_infinite_on_noise_stay():
    model, statistics = work_and_statistics(residual)
    noise = feeds(model, 1)
    noise[0]["x"][0, 0, 0, 0] = np.inf
    found = adapted(Analysis(model), statistics, noise, threads=1)
    for scale, shift in found.scales.values():
        assert np.all(np.isfinite(scale) & np.isfinite(shift))
    scale, shift = next(iter(found.scales.values()))
    assert np.all(scale == 1)
    assert np.all(shift == 0)


def real_pictures(count: int) -> Array:
    """The first training images of CIFAR-10, preprocessed."""
    image = pytest.importorskip("PIL.Image")
    path = SHARED / "data" / "cifar10" / "train-00.webp"
    if not path.exists():
        pytest.skip("../shared is absent")
    tiles = np.asarray(image.open(path).convert("RGB"))[: count // 10 * 32]
    tiles = tiles.reshape(-1, 32, 10, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    normal = (tiles / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    return normal.astype(np.float32)


def covariances(model: Model, x: Array) -> list[Array]:
    facts = Analysis(model)
    stream = Stream(model, [{"input": x}], facts.tensors)
    found = []
    for position, linear in enumerate(facts.linears.values()):
        stream.advance([linear.x])
        rng = np.random.default_rng(position)
        xs, ys = stream.batches(linear.x), stream.peek(linear.y)
        found.append(collect_moments(linear, xs, ys, rng)[0].xx)
    return found[:-1]  # the fully connected layer has few rows


def test_noise_in_an_adapted_network_is_more_like_images():
    """Mean relative error of the input covariances: 1.2 on noise, 0.6 once it is adapted."""
    path = SHARED / "models" / "akamaster_cifar10_resnet20.onnx"
    if not path.exists():
        pytest.skip("../shared is absent")
    prepared = prepare(Model.from_proto(onnx.load(path)))[0]
    model = working_model(prepared, None, seed=0)
    noise = random_inputs(model, 40).arrays["input"]
    found = adapted(
        Analysis(model), batchnorm_statistics(prepared), [{"input": noise}], threads=1
    )
    wanted = covariances(model, real_pictures(40))

    def error(other: Model) -> float:
        pairs = zip(covariances(other, noise), wanted, strict=True)
        return float(np.mean([relative(*pair) for pair in pairs]))

    assert error(found.model) < 0.8
    assert error(model) > 1.0
