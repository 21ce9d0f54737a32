"""Closed forms of lighter operators: exact where they claim it, never worse for a round."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.numerics.factorization import squared_error
from onnxcomp.numerics.moments import Moments, MomentsBuilder
from onnxcomp.numerics.substitution import damped, restricted, separable, spread

EXACT = 1e-9  # relative to the kernel's energy, float64 with damping 1e-10


def case(seed, m, c, k):
    """A kernel and the moments of correlated patches."""
    rng = np.random.default_rng(seed)
    W, d = rng.normal(size=(m, c, k)), c * k
    x = rng.normal(size=(20 * d, d)) @ (rng.normal(size=(d, d)) * np.geomspace(1, 0.05, d))
    builder = MomentsBuilder(d, m)
    builder.add(x, x @ W.reshape(m, d).T)
    return W, builder.finish()


def relative(W, other, metric):
    return squared_error(W, other, metric) / squared_error(W, 0 * W, metric)


def within(metric: Moments) -> Moments:
    """The metric that forms are solved in."""
    return replace(metric, xx=damped(metric))


def brute(W: np.ndarray, metric: Moments, mask: np.ndarray) -> np.ndarray:
    """Row by row least squares on the columns that a mask (m, c, k) leaves."""
    S, flat, found = damped(metric), W.reshape(len(W), -1), np.zeros((len(W), metric.d))
    for row, kept in enumerate(mask.reshape(len(W), -1)):
        found[row, kept] = np.linalg.solve(S[np.ix_(kept, kept)], (flat[row] @ S)[kept])
    return found.reshape(W.shape)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 99),
    st.sampled_from([(8, 4, 9, 2), (4, 8, 9, 4), (6, 6, 3, 3), (5, 3, 9, 1)]),
    st.booleans(),
)
def test_restricted_is_the_least_squares_on_its_columns(seed, shape, single):
    m, c, k, groups = shape
    W, metric = case(seed, m, c, k)
    positions = (k // 2,) if single else (0, k - 1)
    mask = np.zeros(W.shape, bool)
    for row in range(m):
        g = row // (m // groups)
        own = slice(g * (c // groups), (g + 1) * (c // groups))
        for position in positions:
            mask[row, own, position] = True
    part = restricted(W, metric, groups=groups, positions=positions)
    assert part.shape == (m, c // groups, len(positions))
    dense = spread(part, c, k, positions=positions)
    assert not dense[~mask].any()
    np.testing.assert_allclose(dense, brute(W, metric, mask), atol=1e-6)
    cut = np.where(mask, W, 0)  # from the weights alone
    without = spread(restricted(W, None, groups=groups, positions=positions), c, k,
                     positions=positions)  # fmt: skip
    np.testing.assert_array_equal(without, cut)
    assert relative(W, dense, metric) < relative(W, cut, metric)


def test_nothing_is_restricted_by_one_group_of_all_positions():
    W, metric = case(0, 5, 4, 9)
    np.testing.assert_allclose(restricted(W, metric), W, atol=1e-9)


@pytest.mark.parametrize("q", [1, 2, 3])
@pytest.mark.parametrize("aware", [True, False])
def test_separable_kernels_are_found(q, aware):
    """A kernel of q filters per channel is found exactly; with one filter less it is not."""
    rng = np.random.default_rng(3)
    W, metric = case(1, 7, 5, 9)
    W = np.einsum("mcq,cqk->mck", rng.normal(size=(7, 5, q)), rng.normal(size=(5, q, 9)))
    metric = metric if aware else None
    found = separable(W, metric, q)
    assert found.depthwise.shape == (5, q, 9)
    assert found.pointwise.shape == (7, 5, q)
    assert relative(W, found.dense(), metric) < EXACT
    if q > 1:
        assert relative(W, separable(W, metric, q - 1).dense(), metric) > 1e-3


def test_as_many_filters_as_positions_lose_nothing():
    for shape in ((6, 4, 9), (4, 6, 3)):
        W, metric = case(2, *shape)
        assert relative(W, separable(W, metric, shape[2]).dense(), metric) < EXACT


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.integers(1, 4))
def test_rounds_never_raise_the_error(seed, q):
    W, metric = case(seed, 8, 6, 9)
    S = within(metric)
    errors = [relative(W, separable(W, metric, q, rounds=r).dense(), S) for r in range(6)]
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(errors))
    assert errors[-1] < 0.97 * errors[0]  # and they do something


def test_the_pointwise_part_is_the_least_squares_behind_its_filters():
    W, metric = case(4, 6, 5, 9)
    found = separable(W, metric, 2)
    S = within(metric)
    best = squared_error(W, found.dense(), S)
    rng = np.random.default_rng(0)
    for size in (1e-2, 1e-1):
        moved = found.pointwise + size * rng.normal(size=found.pointwise.shape)
        dense = np.einsum("mcq,cqk->mck", moved, found.depthwise)
        assert squared_error(W, dense, S) > best


def test_from_the_weights_alone_the_tails_of_the_slices_are_lost():
    W, _ = case(5, 6, 5, 9)
    tails = [np.linalg.svd(W[:, c], compute_uv=False)[2:] for c in range(5)]
    lost = squared_error(W, separable(W, None, 2).dense(), None)
    assert lost == pytest.approx(sum(float(t @ t) for t in tails), rel=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_channels_that_hardly_move_get_no_huge_weights(seed):
    """They follow the others, so that without damping they would stand for these."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4000, 6, 9)) @ rng.normal(size=(9, 9))
    x[:, 3:] = 1e-5 * x[:, :3][:, :, ::-1]
    W = rng.normal(size=(8, 6, 9))
    builder = MomentsBuilder(54, 8)
    builder.add(x.reshape(4000, -1), x.reshape(4000, -1) @ W.reshape(8, -1).T)
    metric = builder.finish()
    for dense in (
        spread(restricted(W, metric, positions=(4,)), 6, 9, positions=(4,)),
        separable(W, metric, 1).dense(),
        separable(W, metric, 2).dense(),
    ):
        assert np.abs(dense[:, 3:]).max() < 10 * np.abs(W).max()
    S, columns = metric.xx, np.arange(6) * 9 + 4
    plain = np.linalg.solve(S[np.ix_(columns, columns)], (W.reshape(8, -1) @ S)[:, columns].T)
    assert np.abs(plain[3:]).max() > 100 * np.abs(W).max()


def test_a_dead_channel_does_no_harm():
    W, metric = case(6, 6, 5, 9)
    W[:, 2] = 0
    found = separable(W, metric, 2)
    assert np.isfinite(found.dense()).all()
    assert relative(W, found.dense(), metric) < 1
