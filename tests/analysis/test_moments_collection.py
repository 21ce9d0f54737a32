"""Collected moments are those of the patches, per group, with bounded rows."""

import numpy as np
import pytest

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.linear import Linear
from onnxcomp.analysis.moments import collect_moments, grouped
from onnxcomp.errors import DataError
from onnxcomp.model import Model
from onnxcomp.numerics.moments import Moments, RowMoments
from onnxcomp.runtime import Session
from tests.analysis.test_linear import one_node

TOLERANCE = 1e-4  # relative; float32 sums


def run(model: Model, count: int = 4) -> tuple[Linear, list, list]:
    facts = Analysis(model)
    (linear,) = facts.linears.values()
    shape = model.signature.inputs[0].shape
    rng = np.random.default_rng(3)
    xs, ys = [], []
    session = Session(model, optimize=False)
    for _ in range(count):
        xs.append(rng.standard_normal(shape).astype(np.float32) + 0.5)
        ys.append(session.run({"x": xs[-1]})["y"])
    return linear, xs, ys


@pytest.mark.parametrize(
    ("op", "shape", "weight", "attrs"),
    [
        ("Conv", (2, 4, 9, 8), (6, 4, 3, 3), {"pads": [1] * 4, "strides": [2, 1]}),
        ("Conv", (2, 4, 9, 8), (6, 2, 3, 3), {"group": 2}),
        ("Conv", (2, 4, 9, 8), (8, 1, 3, 3), {"group": 4}),
        ("ConvTranspose", (2, 4, 5, 6), (4, 3, 3, 3), {"strides": [2, 2], "group": 2}),
        ("Conv", (2, 4, 20), (6, 4, 3), {}),
        ("Gemm", (60, 7), (5, 7), {"transB": 1}),
        ("MatMul", (8, 9, 7), (7, 5), {}),
    ],
    ids=str,
)
def test_solving_on_own_outputs_gives_the_weights(op, shape, weight, attrs):
    """All positions are seen, so that the node itself is the best map, without error."""
    model = one_node(op, shape, weight, attrs)
    linear, xs, ys = run(model, 20)  # more than ten rows per column: S is not shrunk
    metrics = collect_moments(linear, xs, ys, np.random.default_rng(0))
    assert len(metrics) == linear.groups
    kernel = linear.kernel(model.weights["w"])
    for metric, (c, m) in zip(metrics, grouped(linear), strict=True):
        own = kernel[m].reshape(len(m), -1)
        assert metric.d == len(c) * linear.spatial
        assert metric.error(own) <= TOLERANCE * metric.target_energy
        solved = metric.solve(np.zeros_like(own), damping=1e-9)
        assert np.abs(solved - own).max() <= 0.01 * np.abs(own).max()
        assert np.allclose(metric.bias(own), 0, atol=1e-3)
        assert metric.error(own * 1.1) > 10 * TOLERANCE * metric.target_energy


def test_moments_of_some_channels():
    model = one_node("Conv", (2, 6, 9, 8), (5, 6, 3, 3), {})
    linear, xs, ys = run(model)
    inputs, outputs = np.array([0, 2, 5]), np.array([1, 4])
    (part,) = collect_moments(
        linear, xs, ys, np.random.default_rng(0), inputs=inputs, outputs=outputs
    )
    (whole,) = collect_moments(linear, xs, ys, np.random.default_rng(0))
    columns = (inputs[:, None] * 9 + np.arange(9)).reshape(-1)
    assert np.allclose(part.x_mean, whole.x_mean[columns])
    assert np.allclose(np.diag(part.xx), np.diag(whole.xx)[columns], rtol=1e-6)
    assert np.allclose(part.yx, whole.yx[np.ix_(outputs, columns)], rtol=1e-5, atol=1e-6)
    assert not np.allclose(part.yx, whole.yx[np.ix_([0, 2], columns)], rtol=1e-2)


def test_groups_without_channels_are_left_out():
    model = one_node("Conv", (2, 6, 9, 8), (6, 2, 3, 3), {"group": 3})
    linear, xs, ys = run(model)
    kept = np.array([0, 1, 4, 5])
    pairs = grouped(linear, kept, np.arange(6))
    assert [(c.tolist(), m.tolist()) for c, m in pairs] == [([0, 1], [0, 1]), ([4, 5], [4, 5])]
    metrics = collect_moments(linear, xs, ys, np.random.default_rng(0), inputs=kept)
    assert len(metrics) == 2


def test_few_rows_of_many_columns_are_kept_as_rows():
    model = one_node("Gemm", (6, 400), (5, 400), {"transB": 1})
    linear, xs, ys = run(model)
    (metric,) = collect_moments(linear, xs, ys, np.random.default_rng(0))
    assert isinstance(metric, RowMoments)
    assert metric.x.shape == (24, 400)
    kernel = linear.kernel(model.weights["w"])
    assert metric.error(kernel) <= TOLERANCE * metric.target_energy
    assert metric.error(0.9 * kernel) > TOLERANCE * metric.target_energy


def test_rows_are_bounded_and_seeded():
    model = one_node("Conv", (4, 2, 120, 120), (3, 2, 3, 3), {"pads": [1] * 4})
    linear, xs, ys = run(model)
    assert sum(y.size for y in ys) / linear.out_channels > 40_000
    metrics = [
        collect_moments(linear, xs, ys, np.random.default_rng(seed))[0] for seed in (0, 0, 1)
    ]
    assert isinstance(metrics[0], Moments)
    assert metrics[0].count == 40_000
    assert np.array_equal(metrics[0].xx, metrics[1].xx)
    assert not np.array_equal(metrics[0].xx, metrics[2].xx)


@pytest.mark.parametrize("features", [7, 400])  # sums, and rows as they are
def test_threads_change_nothing(features):
    model = one_node("Gemm", (9, features), (5, features), {"transB": 1})
    linear, xs, ys = run(model, 7)
    one, three = (
        collect_moments(linear, xs, ys, np.random.default_rng(0), threads=threads)[0]
        for threads in (1, 3)
    )
    fields = ("xx", "yx", "x_mean") if isinstance(one, Moments) else ("x", "y", "x_mean")
    assert isinstance(one, RowMoments) is (features == 400)
    for name in fields:
        assert np.array_equal(getattr(one, name), getattr(three, name))
    assert one.count == three.count == 63


def test_errors_of_threads_are_raised():
    model = one_node("Gemm", (9, 7), (5, 7), {"transB": 1})
    linear, xs, ys = run(model, 7)
    xs[4][0, 0] = np.nan
    with pytest.raises(DataError, match="NaN"):
        collect_moments(linear, xs, ys, np.random.default_rng(0), threads=3)
    with pytest.raises(ValueError, match="wrong"):
        collect_moments(linear, xs, ys, np.random.default_rng(0), revise=wrong, threads=3)


def wrong(patches, rows):
    raise ValueError("wrong")


def test_rows_grow_with_the_inputs_of_the_map():
    """80 rows per input, where there are so many: 8 * 81 inputs ask for 51,840."""
    model = one_node("Conv", (4, 8, 120, 120), (1, 8, 9, 9), {"pads": [4] * 4})
    linear, xs, ys = run(model, 1)
    (metric,) = collect_moments(linear, xs, ys, np.random.default_rng(0))
    assert metric.d == 648
    assert metric.count == 80 * 648 < xs[0][:, 0].size


def test_revised_targets_take_the_place_of_the_sampled_rows():
    """Rows of ys arrive whole with their patches; inputs keep their moments."""
    model = one_node("Conv", (2, 4, 9, 8), (6, 4, 3, 3), {"pads": [1] * 4})
    linear, xs, ys = run(model)
    kernel = linear.kernel(model.weights["w"]).reshape(6, -1)
    seen = []

    def revise(patches, rows):
        found = patches.reshape(len(patches), -1) @ kernel.T.astype(np.float32)
        seen.append(float(np.abs(found - rows[:, :6]).max() / np.abs(rows).max()))
        return -2 * rows[:, :6] + rows[:, 6:]

    ones, outputs = [np.ones_like(y) for y in ys], np.array([1, 4])
    (plain,) = collect_moments(linear, xs, ys, np.random.default_rng(0), outputs=outputs)
    (revised,) = collect_moments(
        linear,
        xs,
        ys,
        np.random.default_rng(0),
        outputs=outputs,
        beside=ones,
        revise=revise,
    )
    assert len(seen) == len(xs)
    assert max(seen) <= TOLERANCE  # patches and rows belong together
    assert np.array_equal(revised.xx, plain.xx)
    assert np.array_equal(revised.x_mean, plain.x_mean)
    assert np.allclose(revised.yx, -2 * plain.yx, rtol=TOLERANCE, atol=1e-5)
    assert np.allclose(revised.y_mean, 1 - 2 * plain.y_mean, rtol=TOLERANCE, atol=1e-5)
    assert not np.allclose(revised.y_mean, plain.y_mean, rtol=0.1)
