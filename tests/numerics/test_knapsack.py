from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.errors import LimitError, ParameterError
from onnxcomp.numerics import knapsack
from onnxcomp.numerics.knapsack import allocate
from onnxcomp.numerics.option_tables import Table
from onnxcomp.numerics.relaxation import Relaxation
from tests.numerics.knapsack_problems import brute_force, coupled


def free_tables(seed, count, options, kinds=1, decades=0.0):
    """Independent units with integer costs and losses over `decades` orders of magnitude."""
    rng = np.random.default_rng(seed)
    return [
        Table(
            (),
            np.zeros((options, 0), int),
            rng.random(options) * 10 ** (decades * rng.random(options)),
            rng.integers(0, 20, (options, kinds)).astype(float),
        )
        for _ in range(count)
    ]


def allocate_exact_dp(tables, limit):
    """The least loss of scope-free tables with integer costs under one limit."""
    best = np.full(limit + 1, np.inf)
    best[0] = 0
    for table in tables:
        after = np.full(limit + 1, np.inf)
        for loss, cost in zip(table.loss, table.costs[:, 0].astype(int), strict=True):
            if cost <= limit:
                np.minimum(after[cost:], best[: limit + 1 - cost] + loss, out=after[cost:])
        best = after
    return best.min()


def check_consistent(found, tables, limits):
    assert (found.costs <= limits).all()
    for table, option in zip(tables, found.options, strict=True):
        assert tuple(table.states[option]) == tuple(found.values[v] for v in table.scope)
    chosen = list(zip(tables, found.options, strict=True))
    assert found.loss == pytest.approx(sum(t.loss[i] for t, i in chosen))
    np.testing.assert_allclose(found.costs, sum(t.costs[i] for t, i in chosen))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 6), st.floats(0.15, 1.1))
def test_one_limit_equals_the_dynamic_programme(seed, count, options, share):
    tables = free_tables(seed, count, options)
    floor = sum(t.costs.min() for t in tables)
    limit = int(max(share * 10 * count, floor))
    found = allocate((), tables, np.array([limit]), relative_gap=0)
    check_consistent(found, tables, np.array([limit]))
    assert found.loss == pytest.approx(allocate_exact_dp(tables, limit), abs=1e-6)
    assert found.gap <= 1e-5


def test_the_oracle_bites():
    tables = free_tables(1, 8, 5)
    found = allocate((), tables, np.array([40.0]), relative_gap=0)
    assert found.loss < allocate_exact_dp(tables, 39) - 1e-3 or found.costs[0] <= 39
    assert allocate_exact_dp(tables, 60) < found.loss - 1e-3


@settings(max_examples=60, deadline=None)
@given(coupled())
def test_coupled_problems_equal_brute_force(problem):
    domains, tables, limits = problem
    want, smallest = brute_force(domains, tables, limits)
    if np.isinf(want):
        with pytest.raises(LimitError) as caught:
            allocate(domains, tables, limits)
        alone = np.flatnonzero(smallest > limits)
        if len(alone):
            assert f"limit {alone[0]} " in str(caught.value)
            assert f"is {smallest[alone[0]]:g};" in str(caught.value)
        return
    found = allocate(domains, tables, limits, relative_gap=0)
    check_consistent(found, tables, limits)
    assert found.loss == pytest.approx(want, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(coupled(), st.floats(0.8, 1.2))
def test_choices_of_too_much_loss_are_of_no_use(problem, share):
    domains, tables, limits = problem
    want, _ = brute_force(domains, tables, limits)
    if np.isinf(want) or abs(share - 1) < 1e-6:
        return
    if share < 1:
        with pytest.raises(LimitError):
            allocate(domains, tables, limits, most=share * want)
        return
    found = allocate(domains, tables, limits, relative_gap=0, most=share * want)
    assert found.loss == pytest.approx(want, abs=1e-6)


def test_only_what_is_known_is_said_where_loss_is_bounded():
    table = Table((), np.zeros((2, 0), int), np.array([0, 1.0]), np.array([[1.0], [0]]))
    with pytest.raises(LimitError, match="loses at most 5 was found"):
        allocate([], [table], np.array([-1.0]), most=5.0)
    with pytest.raises(LimitError, match="limit 0 is -1"):
        allocate([], [table], np.array([-1.0]))


def test_variables_tie_their_tables_together():
    """Each table alone prefers another value; together the total decides."""
    states = np.array([[0], [1]])
    first = Table((0,), states, np.array([0.0, 1.0]), np.zeros((2, 1)))
    second = Table((0,), states, np.array([3.0, 0.0]), np.zeros((2, 1)))
    found = allocate([2], [first, second], np.array([np.inf]))
    assert (found.values, found.options, found.loss) == ((1,), (1, 1), 1.0)
    untied = [Table((), np.zeros((2, 0), int), t.loss, t.costs) for t in (first, second)]
    assert allocate([], untied, np.array([np.inf])).loss == 0.0


def test_losses_of_many_magnitudes_are_told_apart():
    rng = np.random.default_rng(0)
    tables = []
    for _ in range(6):
        loss = np.array([1e-9, 3e-9, 1e6]) * (1 + rng.random(3))
        tables.append(Table((), np.zeros((3, 0), int), loss, np.array([[3.0], [1.0], [0.0]])))
    limits = np.array([12.0])
    want, _ = brute_force([], tables, limits)
    found = allocate([], tables, limits, relative_gap=0)
    assert found.loss == pytest.approx(want, rel=1e-6)
    worst_cheap = sum(t.loss[1] for t in tables)
    assert found.loss < 0.9 * worst_cheap


def test_limits_are_met_to_the_last_unit_and_may_fit_exactly():
    rng = np.random.default_rng(3)
    tables = []
    for _ in range(30):
        macs = rng.integers(10**7, 10**9, 6).astype(float)
        loss = 1 / macs
        tables.append(Table((), np.zeros((6, 0), int), loss / 1e-8, macs[:, None]))
    total = sum(t.costs.max() for t in tables)
    for limit in (total, total - 1, 0.7 * total, 0.5 * total):
        found = allocate([], tables, np.array([limit]), relative_gap=1e-5)
        assert found.costs[0] <= limit
    exact = allocate([], tables, np.array([total]), relative_gap=0)
    assert exact.loss == pytest.approx(sum(t.loss.min() for t in tables))
    smallest = sum(t.costs.min() for t in tables)
    assert allocate([], tables, np.array([smallest])).costs[0] == smallest
    with pytest.raises(LimitError, match="limit 0"):
        allocate([], tables, np.array([smallest - 1e5]))


def test_a_limit_broken_within_solver_tolerance_is_solved_again(monkeypatch):
    """A solver that overshoots by one unit at first is corrected by a tighter limit."""
    tables = free_tables(5, 6, 4)
    limit = np.array([30.0])
    want = allocate([], tables, limit, relative_gap=0)
    true_solve = knapsack._Programme.minimise

    def loose(self, objective, limits, seconds, gap):
        return true_solve(self, objective, limits + 1.0, seconds, gap)

    monkeypatch.setattr(knapsack._Programme, "minimise", loose)
    over = allocate([], tables, np.array([29.0]), relative_gap=0)
    assert over.costs[0] <= 29
    monkeypatch.setattr(
        knapsack._Programme,
        "minimise",
        lambda self, o, lim, s, g: true_solve(self, o, np.array([np.inf]), s, g),
    )
    monkeypatch.setattr(Relaxation, "maximise", lambda *a: None)  # which knows such a choice
    with pytest.raises(LimitError, match="rounding"):
        allocate([], tables, np.array([want.costs[0] - 5]), relative_gap=0)


def test_limits_that_fail_only_together_are_named():
    loss, states = np.zeros(2), np.zeros((2, 0), int)
    table = Table((), states, loss, np.array([[0.0, 5.0], [5.0, 0.0]]))
    with pytest.raises(LimitError, match=r"limit 1 is 1, .* under limits \[0\] is 5"):
        allocate([], [table], np.array([1.0, 1.0]))


def test_the_same_problem_gives_the_same_answer():
    tables = free_tables(7, 15, 8, kinds=2)
    limits = np.array([110.0, 120.0])
    assert len({allocate([], tables, limits).options for _ in range(3)}) == 1


def test_the_gap_is_honest_at_the_time_limit(monkeypatch):
    tables = free_tables(8, 10, 6)
    limits = np.array([70.0])
    optimum = allocate([], tables, limits, relative_gap=0)
    rough = allocate([], tables, limits, relative_gap=0.5)
    floor = sum(t.loss.min() for t in tables)
    assert (rough.loss - floor) * (1 - rough.gap) <= optimum.loss - floor + 1e-9
    with pytest.raises(LimitError, match="allow more time"):
        allocate([], tables, limits, time_limit_s=0)
    nothing = SimpleNamespace(x=None, status=1)
    monkeypatch.setattr(knapsack, "milp", lambda *a, **k: nothing)
    relaxed = allocate([], tables, limits, relative_gap=0)
    check_consistent(relaxed, tables, limits)
    assert (relaxed.loss - floor) * (1 - relaxed.gap) <= optimum.loss - floor + 1e-9
    assert relaxed.gap > 0
    monkeypatch.setattr(Relaxation, "maximise", lambda *a: None)
    with pytest.raises(LimitError, match="allow more time"):
        allocate([], tables, limits)


def test_a_known_choice_survives_a_programme_that_fails(monkeypatch):
    tables, limits = free_tables(8, 10, 6), np.array([70.0])
    want = allocate([], tables, limits, relative_gap=1.0)

    def failed(*args):
        raise LimitError("met only up to rounding")

    monkeypatch.setattr(knapsack, "_solve", failed)
    assert allocate([], tables, limits, relative_gap=0).options == want.options
    monkeypatch.setattr(Relaxation, "maximise", lambda *a: None)
    with pytest.raises(LimitError, match="up to rounding"):
        allocate([], tables, limits)


def test_thirty_units_on_four_shared_widths_are_solved():
    rng = np.random.default_rng(9)
    tables = []
    for unit in range(30):
        scope = (unit % 4, (unit + 1) % 4) if unit % 2 else (unit % 4,)
        widths = np.array(list(product(range(1, 6), repeat=len(scope))))
        states, rank = np.repeat(widths, 4, axis=0), np.tile(np.arange(1, 5), len(widths))
        macs = widths.prod(axis=1).repeat(4) * rank * rng.integers(5, 50)
        loss = rng.random() * (6 - states.mean(axis=1)) ** 2 / rank
        tables.append(Table(scope, states - 1, loss, macs[:, None] * 1.0))
    limits = 0.3 * np.sum([t.costs.max(axis=0) for t in tables], axis=0)
    found = allocate([5] * 4, tables, limits, relative_gap=0.02)
    check_consistent(found, tables, limits)
    assert found.gap <= 0.02
    tighter = allocate([5] * 4, tables, 0.9 * limits, relative_gap=0.02)
    assert tighter.loss > found.loss


def test_only_rows_beaten_within_their_state_are_dropped():
    states = np.array([[0], [0], [0], [1], [1], [1]])
    loss = np.array([1.0, 1.0, 0.5, 9.0, 8.0, 9.0])
    costs = np.array([[2.0, 7], [2, 0], [3, 0], [9, 0], [9, 0], [8, 0]])
    table = Table((0,), states, loss, costs)
    first_only = np.array([True, False])
    assert table.undominated([2], first_only).tolist() == [0, 2, 4, 5]
    assert table.undominated([2], ~first_only).tolist() == [2, 4]


def test_misfits_are_named():
    good = Table((), np.zeros((2, 0), int), np.zeros(2), np.zeros((2, 1)))
    with pytest.raises(ParameterError, match="domains"):
        allocate([0], [good], np.array([1.0]))
    limits = np.array([1.0])
    for bad, what in (
        (Table((0, 0), np.zeros((2, 2), int), np.zeros(2), np.zeros((2, 1))), "scope"),
        (Table((5,), np.zeros((2, 1), int), np.zeros(2), np.zeros((2, 1))), "scope"),
        (Table((0,), np.full((2, 1), 3), np.zeros(2), np.zeros((2, 1))), "domains"),
        (Table((), np.zeros((2, 0), int), np.zeros(2), np.zeros((2, 2))), "shapes"),
        (Table((), np.zeros((2, 0), int), np.array([0, np.nan]), np.zeros((2, 1))), "finite"),
    ):
        with pytest.raises(ParameterError, match=f"table 1.*{what}"):
            allocate([3], [good, bad], limits)
    with pytest.raises(ParameterError, match="at least one"):
        allocate([3], [], limits)
    split = [Table((0,), np.array([[s]]), np.zeros(1), np.zeros((1, 1))) for s in (0, 1)]
    with pytest.raises(ParameterError, match="agree on no values"):
        allocate([3], split, limits)
