"""Bounds of the relaxation hold, and what it drops is of no use."""

import time

import numpy as np
import pytest
from hypothesis import given, settings

from onnxcomp.numerics.knapsack import allocate
from onnxcomp.numerics.option_tables import Table
from onnxcomp.numerics.relaxation import Relaxation
from tests.numerics.knapsack_problems import brute_force, coupled


def relaxed(domains, tables, limits, most=np.inf, seconds=60.0):
    rows = [np.arange(len(table.loss)) for table in tables]
    found = Relaxation(domains, tables, rows, limits, most)
    found.maximise(time.monotonic() + seconds)
    return found


def kept(tables, rows):
    return [
        Table(t.scope, t.states[r], t.loss[r], t.costs[r])
        for t, r in zip(tables, rows, strict=True)
    ]


def floor(tables):
    return sum(float(table.loss.min()) for table in tables)


@settings(max_examples=150, deadline=None)
@given(coupled())
def test_bounds_hold_and_the_optimum_stays(problem):
    domains, tables, limits = problem
    want, _ = brute_force(domains, tables, limits)
    found = relaxed(domains, tables, limits)
    if np.isinf(want):
        assert found.options is None
        return
    assert found.bound <= want - floor(tables) + 1e-9
    if found.options is not None:
        chosen = list(zip(tables, found.options, strict=True))
        assert (sum(t.costs[i] for t, i in chosen) <= limits).all()
        assert sum(t.loss[i] for t, i in chosen) >= want - 1e-9
    left = found.rows()
    assert brute_force(domains, kept(tables, left), limits)[0] == pytest.approx(want)
    useful = relaxed(domains, tables, limits, most=want + 1e-9).rows()
    assert brute_force(domains, kept(tables, useful), limits)[0] == pytest.approx(want)


@settings(max_examples=60, deadline=None)
@given(coupled())
def test_rows_that_are_dropped_would_lose_more(problem):
    """Forcing a dropped row, and nothing else, gives a worse optimum."""
    domains, tables, limits = problem
    found = relaxed(domains, tables, limits)
    if found.options is None:
        return
    best = sum(t.loss[i] for t, i in zip(tables, found.options, strict=True))
    for index, left in enumerate(found.rows()):
        for row in np.setdiff1d(np.arange(len(tables[index].loss)), left)[:3]:
            rows = [np.arange(len(table.loss)) for table in tables]
            rows[index] = np.array([row])
            assert brute_force(domains, kept(tables, rows), limits)[0] > best - 1e-9


def many(seed, units=40, options=25):
    rng = np.random.default_rng(seed)
    tables = []
    for unit in range(units):
        scope = (unit, unit + 1)
        states = rng.integers(0, 6, (options * 6, 2))
        cost = (states + 1.0).prod(axis=1) * rng.random(len(states))
        loss = rng.random() * np.exp(-0.2 * cost) * rng.uniform(0.8, 1.2, len(states))
        every = np.array([[a, b] for a in range(6) for b in range(6)])
        tables.append(
            Table(
                scope,
                np.concatenate([states, every]),
                np.concatenate([loss, np.full(36, 2.0)]),
                np.concatenate([cost, np.full(36, 40.0)])[:, None],
            )
        )
    return [6] * (units + 1), tables


def test_most_rows_of_a_large_problem_are_dropped():
    domains, tables = many(0)
    limits = 0.3 * np.sum([t.costs.max(axis=0) for t in tables], axis=0)
    found = relaxed(domains, tables, limits)
    optimum = allocate(domains, tables, limits, relative_gap=1e-4).loss - floor(tables)
    assert 0.9 * optimum < found.bound <= optimum * (1 + 1e-9)
    assert sum(map(len, found.rows())) < 0.2 * sum(len(t.loss) for t in tables)


def test_without_time_there_is_no_bound_and_everything_stays():
    domains, tables = many(1, units=3)
    found = relaxed(domains, tables, np.array([30.0]), seconds=0.0)
    assert found.bound == -np.inf
    assert found.options is None
    assert [len(rows) for rows in found.rows()] == [len(t.loss) for t in tables]


def test_limits_at_the_least_cost_lose_nothing_to_rounding():
    """Beside a large constant, where every multiplier beyond some is as good."""
    for seed in range(10, 20):
        rng = np.random.default_rng(seed)
        none = np.zeros((2, 0), int)
        tables = [Table((), none, rng.random(2), rng.random((2, 1))) for _ in range(100)]
        tables.insert(0, Table((), none[:1], np.zeros(1), rng.random((1, 1)) * 2e4))
        cheapest = [int(np.argmin(table.costs[:, 0])) for table in tables]
        chosen = list(zip(tables, cheapest, strict=True))
        limits = np.sum([t.costs[i] for t, i in chosen], axis=0)
        found = relaxed([], tables, limits)
        assert found.options == tuple(cheapest)
        assert all(i in rows for i, rows in zip(cheapest, found.rows(), strict=True))
        loss = sum(t.loss[i] for t, i in chosen)
        assert found.bound <= loss - floor(tables)
        assert allocate([], tables, limits, relative_gap=0).loss == pytest.approx(loss)


def test_every_violated_limit_is_raised_from_nothing():
    """Of three limits only the first has a price where L is largest."""
    met = 0
    for seed in range(170, 200):
        rng = np.random.default_rng(seed)
        none = np.zeros((4, 0), int)
        tables = [Table((), none, rng.random(4), rng.random((4, 3))) for _ in range(4)]
        limits = np.array([1.6, 1.8, 1.8])
        want, _ = brute_force([], tables, limits)
        met += relaxed([], tables, limits).options is not None
        if np.isfinite(want):
            found = allocate([], tables, limits, relative_gap=0)
            assert found.loss == pytest.approx(want, abs=1e-6)
    assert met >= 15


def test_whole_numbers_are_as_good_as_floats():
    none = np.zeros((2, 0), int)
    table = Table((), none, np.array([0, 1]), np.array([[1], [0]]))
    assert relaxed([], [table], np.array([0.5])).options == (1,)


def test_entangled_variables_are_left_to_the_programme():
    """Every two of 40 variables share a table: too many axes for one clique."""
    pairs = [(a, b) for b in range(40) for a in range(b)]
    states = np.zeros((2, 2), int)
    tables = [Table(p, states, np.array([0.0, 1]), np.array([[1.0], [0]])) for p in pairs]
    limits = np.array([len(pairs) - 1.0])
    found = relaxed([1] * 40, tables, limits)
    assert found.options is None
    assert found.bound == -np.inf
    assert allocate([1] * 40, tables, limits).loss == 1.0
