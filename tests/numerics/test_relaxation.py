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
