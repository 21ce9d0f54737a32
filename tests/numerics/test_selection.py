from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.errors import DataError, ParameterError
from onnxcomp.numerics import selection
from onnxcomp.numerics.moments import MomentsBuilder, RowMoments
from onnxcomp.numerics.selection import Reader, contribution_gram, eliminate

DAMPING = 1e-3


def rows(seed, n, d):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d))


def reader(seed, channels, k, m, *, extra=0, shuffle=True, weight=1.0):
    """A reader of `channels` times k columns in random places, plus `extra` other columns."""
    rng = np.random.default_rng(seed)
    d = channels * k + extra
    x = rows(seed, 30 * d, d)
    W = rng.normal(size=(m, d))
    places = rng.permutation(d) if shuffle else np.arange(d)
    builder = MomentsBuilder(d, m)
    builder.add(x, x @ W.T)
    return Reader(W, builder.finish(), places[: channels * k].reshape(channels, k), weight)


def refitted_loss(one, removed, damping=DAMPING):
    """The least of the damped error when the removed channels' columns are zero."""
    d = one.metric.d
    S = one.metric.xx + damping * one.metric.mean_energy * np.eye(d)
    gone = one.columns[list(removed)].reshape(-1)
    kept = np.setdiff1d(np.arange(d), gone)
    fit = np.zeros_like(one.W)
    fit[:, kept] = one.W @ S[:, kept] @ np.linalg.inv(S[np.ix_(kept, kept)])
    return one.weight * np.trace((one.W - fit) @ S @ (one.W - fit).T)


def brute_force(readers, channels):
    """Greedy elimination with an explicit refit of every candidate set."""
    gone, losses = [], [0.0]
    for _ in range(channels):
        rest = [c for c in range(channels) if c not in gone]
        costs = [sum(refitted_loss(r, [*gone, c]) for r in readers) for c in rest]
        gone.append(rest[int(np.argmin(costs))])
        losses.append(min(costs))
    return gone, losses


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(0, 3)),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 3),
)
def test_elimination_is_greedy_with_refit(seed, channels, kinds, delay):
    readers = [
        reader(seed + i, channels, k, m, extra=extra, weight=1.0 + i)
        for i, (k, m, extra) in enumerate(kinds)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_DELAY", delay)
        patch.setattr(selection, "_DELAYED", 3)
        got = eliminate(readers, channels, damping=DAMPING)
    order, losses = brute_force(readers, channels)
    np.testing.assert_allclose(got.losses, losses, rtol=1e-5, atol=1e-8 * losses[-1])
    assert got.order.tolist() == order
    assert (np.diff(got.losses) >= 0).all()


def test_removal_without_refit_is_another_and_worse_curve():
    one = reader(0, 8, 2, 4)
    got = eliminate([one], 8, damping=DAMPING)
    S = one.metric.xx
    for count in range(1, 8):
        gone = one.columns[got.order[:count]].reshape(-1)
        zeroed = one.W.copy()
        zeroed[:, gone] = 0
        plain = np.trace((one.W - zeroed) @ S @ (one.W - zeroed).T)
        assert plain > 1.05 * got.losses[count]


def test_the_curve_is_what_solve_achieves():
    one = reader(1, 8, 3, 5, extra=2)
    damping = 1e-8  # the curve of the damped metric is then the plain error
    got = eliminate([one], 8, damping=damping)
    for count in range(9):
        kept = np.sort(
            np.setdiff1d(np.arange(one.metric.d), one.columns[got.order[:count]].reshape(-1))
        )
        fitted = one.metric.solve(one.W, damping, columns=kept)
        achieved = one.metric.error(fitted, columns=kept)
        assert achieved == pytest.approx(got.losses[count], rel=1e-4, abs=1e-4)
    assert got.losses[4] > 1.0


def test_kept_sets_are_nested_and_sorted():
    got = eliminate([reader(2, 10, 1, 3)], 10)
    sets = [got.kept(n) for n in range(11)]
    assert all(set(a) < set(b) for a, b in pairwise(sets))
    assert all((np.diff(s) > 0).all() for s in sets)
    assert [len(s) for s in sets] == list(range(11))
    assert sets[-1].tolist() == list(range(10))
    with pytest.raises(ParameterError, match="0 to 10"):
        got.kept(11)


def test_redundant_and_dead_channels_go_first_and_cost_nothing():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(400, 6))
    x[:, 2] = 0
    x[:, 4] = x[:, 1]
    W = rng.normal(size=(3, 6))
    builder = MomentsBuilder(6, 3)
    builder.add(x, x @ W.T)
    got = eliminate([Reader(W, builder.finish(), np.arange(6)[:, None])], 6, damping=1e-9)
    assert set(got.order[:2].tolist()) in ({2, 4}, {2, 1})
    assert got.losses[2] < 1e-6 * got.losses[-1]
    assert got.losses[3] > 1e-3 * got.losses[-1]


def test_a_reader_that_weighs_more_decides():
    first, second = reader(4, 8, 1, 3), reader(5, 8, 1, 3)
    alone = eliminate([first], 8).order.tolist()
    heavy = Reader(first.W, first.metric, first.columns, 1e6)
    assert eliminate([heavy, second], 8).order.tolist() == alone
    assert eliminate([second], 8).order.tolist() != alone


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(2, 7),
    st.integers(1, 3),
    st.integers(2, 40),
    st.sampled_from([3, 60]),  # outputs; of many, channels with few columns go by columns
)
def test_rows_select_by_contributions(seed, channels, k, n, m):
    rng = np.random.default_rng(seed)
    d = channels * k + 2
    x, W = rows(seed, n, d), rng.normal(size=(m, d))
    columns = rng.permutation(d)[: channels * k].reshape(channels, k)
    metric = RowMoments.of(x, x @ W.T)
    centred = x - x.mean(0)
    shares = np.stack([(centred[:, c] @ W[:, c].T).reshape(-1) for c in columns])
    gram = shares @ shares.T / n
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_GRAM_VALUES", 3 * channels * 5)  # several blocks
        got = contribution_gram(W, metric, columns)
    scale = np.abs(gram).max() + 1e-12
    np.testing.assert_allclose(got, gram, atol=1e-5 * scale)
    # the elimination is that of one input per channel, all with weight 1
    found = eliminate([Reader(W, metric, columns)], channels)
    total = gram.sum() + DAMPING * np.trace(gram)
    assert found.losses[-1] == pytest.approx(total, rel=1e-3, abs=1e-4 * scale)
    damped = gram + DAMPING * np.trace(gram) / channels * np.eye(channels)
    first = 1 / np.diag(np.linalg.inv(damped)).max()
    assert found.losses[1] == pytest.approx(first, rel=1e-2, abs=1e-4 * scale)


def test_row_contributions_are_not_those_of_the_weights_alone():
    x = rows(7, 60, 8) * np.geomspace(1, 0.01, 8)
    W = np.random.default_rng(7).normal(size=(3, 8))
    metric, columns = RowMoments.of(x, x @ W.T), np.arange(8)[:, None]
    order = eliminate([Reader(W, metric, columns)], 8).order
    assert order.tolist() != np.argsort(np.square(W).sum(0)).tolist()
    assert set(order[:3].tolist()) & {5, 6, 7}


@pytest.mark.parametrize("damping", [1e-3, 1e-8])
def test_rank_deficient_inputs_are_harmless(damping):
    """Patches of rank 5 in 36 columns: all but a few channels are free."""
    rng = np.random.default_rng(8)
    x = rng.normal(size=(400, 5)) @ rng.normal(size=(5, 36))
    W = rng.normal(size=(4, 36))
    builder = MomentsBuilder(36, 4)
    builder.add(x, x @ W.T)
    one = Reader(W, builder.finish(), np.arange(36).reshape(12, 3))
    got = eliminate([one], 12, damping=damping)
    assert (np.diff(got.losses) >= 0).all()
    assert got.losses[-1] == pytest.approx(refitted_loss(one, range(12), damping), rel=1e-6)
    assert got.losses[9] < 0.02 * got.losses[-1] < got.losses[11]


def test_dependent_inputs_without_damping_are_explained():
    one = reader(6, 4, 2, 3)
    state = selection._state(one, 4, DAMPING)
    state._diagonal[1] = -np.eye(2)
    with pytest.raises(DataError, match="raise the damping"):
        state.remove(1)


def test_misfits_are_named():
    one = reader(6, 4, 2, 3)
    with pytest.raises(ParameterError, match="at least one reader"):
        eliminate([], 4)
    with pytest.raises(ParameterError, match=r"\(5, k\)"):
        eliminate([one], 5)
    twice = Reader(one.W, one.metric, np.zeros((4, 2), int))
    with pytest.raises(ParameterError, match="distinct"):
        eliminate([twice], 4)
    beyond = Reader(one.W, one.metric, one.columns + 1)
    with pytest.raises(ParameterError, match="over the 8 inputs"):
        eliminate([beyond], 4)
