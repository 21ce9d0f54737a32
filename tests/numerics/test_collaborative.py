"""Scores, curves, rates and removal of collaborative compression against brute force."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.errors import LimitError, ParameterError
from onnxcomp.numerics.collaborative import (
    MOST,
    Curve,
    Kept,
    Removal,
    Units,
    sensitivity,
    solve_rates,
)

TIGHT = 1e-12  # relative; sums of the same products in another order
SHAPES = [(6, 5, 9), (4, 7, 1), (9, 4, 1), (16, 3, 1), (50, 4, 1), (40, 3, 16)]
GAMMA, EXACT = 0.9, 64


def layer(shape, seed=0):
    """A weight and its importance."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape), np.square(rng.standard_normal(shape))


def cost_of(shape):
    """Multiply-accumulates per position of the layer."""
    n, _, v = shape

    def cost(channels, rank):
        if rank is None:
            return n * channels * v
        return channels * v * rank + rank * n

    return cost


def decomposed(X):
    """The components of X that are not zero, largest first."""
    u, s, vt = np.linalg.svd(X.reshape(len(X), -1), full_matrices=False)
    found = [np.outer(s[k] * u[:, k], vt[k]).reshape(X.shape) for k in range(len(s))]
    return [part for k, part in enumerate(found) if s[k] > 1e-9 * s[0]]


def channel(X, j):
    part = np.zeros_like(X)
    part[:, j] = X[:, j]
    return part


def parts_of(X, channels):
    return [channel(X, j) for j in channels], decomposed(X)


def lost(G, X, W):
    return float(np.sum(G * (X - W) ** 2))


def brute_scores(W, G, X, channels, gamma):
    """Every removal tried, and every further removal behind it."""
    found = []
    own, components = parts_of(X, channels)
    for j, part in [*zip(channels, own, strict=True), *((None, p) for p in components)]:
        left = X - part
        rest, inner = parts_of(left, [c for c in channels if c != j])
        count = len(channels) + len(components) - 1
        ahead = [lost(G, left - further, W) for further in (*rest, *inner)]
        ahead += [lost(G, left, W)] * (count - len(ahead))  # values that are zero now
        found.append(lost(G, left, W) + gamma * np.mean(ahead))
    return np.array(found)


def some_gone(shape, seed=0):
    """A layer of which two units are gone, and the same by hand."""
    W, G = layer(shape, seed)
    units = Units(W, G)
    units.remove([1], [units.rank - 1])
    X = W - decomposed(W)[-1]
    X[:, 1] = 0
    return W, G, X, units


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_those_of_trying_everything(shape):
    """The look-ahead is the mean loss after one more removal of any unit."""
    W, G = layer(shape)
    everything = list(range(shape[1]))
    for gamma in (0.0, GAMMA, 3.0):
        found = np.concatenate(Units(W, G).scores(gamma, EXACT))
        wanted = brute_scores(W, G, W, everything, gamma)
        assert found == pytest.approx(wanted, rel=TIGHT)
    W, G, X, units = some_gone(shape)
    assert units.loss == pytest.approx(lost(G, X, W), rel=TIGHT)
    wanted = brute_scores(W, G, X, [c for c in everything if c != 1], GAMMA)
    assert np.concatenate(units.scores(GAMMA, EXACT)) == pytest.approx(wanted, rel=TIGHT)


def test_the_comparison_sees_a_wrong_look_ahead():
    W, G = layer((6, 5, 9))
    wanted = brute_scores(W, G, W, list(range(5)), GAMMA)
    for gamma in (GAMMA * 1.001, 0.0):
        found = np.concatenate(Units(W, G).scores(gamma))
        assert found != pytest.approx(wanted, rel=1e6 * TIGHT)


@settings(max_examples=20, deadline=None)
@given(
    st.tuples(st.integers(2, 7), st.integers(2, 6), st.sampled_from([1, 4])),
    st.integers(0, 99),
)
def test_any_shape(shape, seed):
    W, G, X, units = some_gone(shape, seed)
    if units.rank < 1:
        return
    channels = units.channels.tolist()
    wanted = brute_scores(W, G, X, channels, GAMMA)
    found = np.concatenate(units.scores(GAMMA))
    assert len(found) == len(wanted)
    assert found == pytest.approx(wanted, rel=1e-9)  # singular values may lie close together


@pytest.mark.parametrize("shape", [(6, 5, 9), (16, 3, 1)])
def test_wide_layers_keep_the_components_of_the_round(shape):
    """Above so many rows: the present components with the channel's entries left out."""
    W, G, X, units = some_gone(shape)
    channels = units.channels.tolist()
    components = decomposed(X)
    wanted = []
    for j in channels:
        left = X - channel(X, j)
        rest = [part - channel(part, j) for part in components]
        rest += [channel(X, c) for c in channels if c != j]
        ahead = sum(lost(G, left - part, W) for part in rest)
        back = lost(G, left, W)
        wanted.append(back + GAMMA * ahead / (len(channels) + len(components) - 1))
    found = units.scores(GAMMA, 1)[0]
    assert found == pytest.approx(wanted, rel=TIGHT)


WIDE = (40, 24, 9)


def looked_ahead(seed, exact=1):
    """Scores of all channels and what stays of a layer at some costs."""
    W, G = layer(WIDE, seed)
    G *= np.exp(0.5 * np.random.default_rng(seed).standard_normal(WIDE[1]))[:, None]
    cost, removal = cost_of(WIDE), Removal(W, G, GAMMA, exact)
    kept = [removal.until(cost, s * cost(WIDE[1], None)) for s in (0.8, 0.6, 0.4, 0.2)]
    scores = Units(W, G).scores(GAMMA, exact)[0]
    return scores, [(each.rank, set(each.dropped)) for each in kept]


@cache
def looked_ahead_exactly(seed):
    return looked_ahead(seed, exact=WIDE[0])


def off():
    """Largest error of a score, and in how many of 32 cases other units go."""
    errors, others = [], 0
    for seed in range(8):
        (scores, kept), (wanted, exact) = looked_ahead(seed), looked_ahead_exactly(seed)
        errors.append(np.abs(scores / wanted - 1).max())
        others += sum(one != other for one, other in zip(kept, exact, strict=True))
    return max(errors), others


def test_the_look_ahead_of_wide_layers_is_nearly_exact():
    """Scores within 0.55 %; mostly the same units, else a rank and few channels away."""
    error, others = off()
    assert 0 < error <= 0.0055
    assert others <= 6
    for seed in range(8):
        pairs = zip(looked_ahead(seed)[1], looked_ahead_exactly(seed)[1], strict=True)
        for (rank, dropped), (exact_rank, exactly_dropped) in pairs:
            assert abs(rank - exact_rank) <= 1
            assert len(dropped ^ exactly_dropped) <= 2


@pytest.mark.parametrize("wrong", ["nothing left out", "half", "none"])
def test_the_comparison_of_wide_layers_sees_a_wrong_look_ahead(wrong, monkeypatch):
    inner = Units._inner

    def other(units, table, exact):
        if exact > 1:
            return inner(units, table, exact)
        if wrong == "nothing left out":
            return np.full(units._X.shape[1], table.sum())
        return inner(units, table, exact) * (0.5 if wrong == "half" else 0.0)

    monkeypatch.setattr(Units, "_inner", other)
    error, others = off()
    assert error > 0.0055
    assert others > 6


def plain_curve(W, G, cost):
    """The reference, step by step: a fresh decomposition after every unit."""
    count = W.shape[1]
    alone = [lost(G, W - channel(W, j), W) for j in range(count)]
    alone += [lost(G, W - part, W) for part in decomposed(W)]
    X, channels, left, cut = W.copy(), count, list(range(len(alone) - count)), False
    rank = len(left)
    points = []
    for unit in np.argsort(alone, kind="stable").tolist():
        if unit < count:
            X[:, unit] = 0
            channels -= 1
        else:
            place = left.index(unit - count)
            del left[place]
            parts = decomposed(X)[:rank] if rank else []
            if place < len(parts):
                X = X - parts[place]
                rank -= 1
                cut = True
        rank = min(rank, channels * W.shape[2])
        rate = 1 - cost(channels, rank if cut else None) / cost(count, None)
        if rate > 0:
            points.append((rate, lost(G, X, W)))
    rates, losses = np.array(points).T
    losses /= losses.max()
    # np.polyfit multiplies residuals, not their squares, by its weights
    b, log_a = np.polyfit(rates, np.log(losses + 1e-10), 1, w=losses**0.25)
    return log_a, b


@pytest.mark.parametrize("shape", SHAPES)
def test_curves_are_those_of_one_step_after_the_other(shape):
    W, G = layer(shape)
    G *= np.exp(np.arange(shape[1]))[None, :, None]  # channels that differ
    found = sensitivity(W, G, cost_of(shape))
    assert found is not None
    wanted = plain_curve(W, G, cost_of(shape))
    assert (found.log_a, found.b) == pytest.approx(wanted, rel=1e-9)
    other = sensitivity(W, G[:, ::-1], cost_of(shape))
    assert other is None or other.b != pytest.approx(found.b, rel=1e-3)


def test_curves_that_rise_at_the_very_end():
    """Two of many channels count, so that a itself is no float."""
    shape = (4, 150, 1)
    W, G = layer(shape)
    G[:, 0] *= 1e-3
    G[:, 2:] = 0
    curve = sensitivity(W, G, cost_of(shape))
    assert curve is not None
    assert np.exp(curve.log_a) == 0
    assert curve.loss(0.0) == 0
    assert curve.loss(1.0) == pytest.approx(1.0)
    rates = solve_rates([curve, CURVES[0]], [5.0, 2.0], 5.0)
    assert rates == pytest.approx([MOST, (5.0 - 5.0 * MOST) / 2.0])
    slopes = [curve.start + curve.b * MOST, CURVES[0].start + CURVES[0].b * rates[1]]
    assert slopes[0] < slopes[1]


def test_no_gradient_no_curve():
    W, G = layer((6, 5, 9))
    assert sensitivity(W, np.zeros_like(G), cost_of((6, 5, 9))) is None
    with pytest.raises(ParameterError, match="importance"):
        Units(W, G[:3])


CURVES = [Curve(np.log(a), b) for a, b in ((0.01, 4.0), (0.001, 7.0), (0.2, 2.0))] + [None]
COSTS = [5.0, 2.0, 9.0, 4.0]


@pytest.mark.parametrize("per_cost", [False, True])
def test_rates_meet_the_target_at_one_slope(per_cost):
    most = MOST * sum(COSTS[:3])
    last = np.zeros(4)
    for removed in np.linspace(0.01, 0.999, 15) * most:
        rates = solve_rates(CURVES, COSTS, removed, per_cost=per_cost)
        assert sum(c * f for c, f in zip(rates, COSTS, strict=True)) == pytest.approx(
            removed, rel=1e-9
        )
        assert all(0 <= rate <= MOST for rate in rates)
        assert rates[3] == 0
        assert (np.array(rates) >= last - 1e-12).all()
        last = np.array(rates)
        slopes = [
            curve.b * curve.loss(rate) / (cost if per_cost else 1.0)
            for curve, cost, rate in zip(CURVES[:3], COSTS, rates, strict=False)
            if 0 < rate < MOST
        ]
        assert np.ptp(slopes) <= 1e-9 * max(slopes, default=0)


def test_equal_layers_get_equal_rates():
    rates = solve_rates([CURVES[0]] * 3, [1.0, 5.0, 2.0], 4.0)
    assert rates == pytest.approx([0.5] * 3)
    assert solve_rates(CURVES[:3], COSTS[:3], 8.0) != pytest.approx([0.5] * 3)
    assert solve_rates(CURVES, COSTS, 0.0) == (0.0,) * 4


def test_too_much_is_refused():
    for curves in (CURVES, [None] * 4):
        with pytest.raises(LimitError, match="can remove"):
            solve_rates(curves, COSTS, 0.96 * sum(COSTS))


@pytest.mark.parametrize("shape", SHAPES)
def test_removal_takes_the_least_score_every_time(shape):
    W, G = layer(shape)
    units = min(len(W), W[0].size)

    def cost(channels, rank):  # falls with every unit
        return channels + (units if rank is None else rank)

    removal = Removal(W, G, GAMMA)
    assert removal.until(cost, cost(shape[1], None)) == Kept()
    X, channels, dropped, cut = W, list(range(shape[1])), [], False
    while len(channels) > 1 or len(decomposed(X)) > 1:
        count, parts = len(channels), decomposed(X)
        scores = brute_scores(W, G, X, channels, GAMMA)
        scores[:count] += np.inf if count == 1 else 0
        scores[count:] += np.inf if len(parts) == 1 else 0
        unit = int(np.argmin(scores))
        if unit < count:
            dropped.append(channels.pop(unit))
            X = X - channel(X, dropped[-1])
        else:
            X, cut = X - parts[unit - count], True
        rank = len(decomposed(X)) if cut else None
        wanted = Kept(tuple(dropped), rank)
        assert removal.until(cost, cost(len(channels), rank)) == wanted


def test_channels_alone_are_enough_where_they_meet_the_limit():
    """Singular values that went before them come back."""
    W, G = layer((6, 8, 9))
    cost = cost_of((6, 8, 9))
    G[:, :4] *= 1e-6  # channels go first
    found = Removal(W, G, GAMMA).until(cost, 0.5 * cost(8, None))
    assert set(found.dropped) == {0, 1, 2, 3}
    assert found.rank is None


def test_one_unit_of_each_kind_stays():
    W, G = layer((6, 5, 9))
    found = Removal(W, G, GAMMA).until(cost_of((6, 5, 9)), 0.0)
    assert len(found.dropped) == 4
    assert found.rank == 1


def test_rounds_of_wide_layers_take_several_units():
    W, G = layer((120, 130, 1))
    units = Units(W, G)
    assert units.interval == 2
    cost = cost_of((120, 130, 1))
    found = Removal(W, G, GAMMA).until(cost, 0.4 * cost(130, None))
    assert cost(130 - len(found.dropped), found.rank) <= 0.4 * cost(130, None)
    curve = sensitivity(W, G, cost)
    assert curve is not None
    assert curve.loss(1.0) == pytest.approx(1.0, abs=0.3)
