"""Eliminating variables gives the same least sums as trying all their values."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.numerics.min_sum import MinSum


@st.composite
def sums(draw):
    """Functions of some of up to five variables; some values are impossible."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    domains = draw(st.lists(st.integers(1, 4), min_size=0, max_size=5))
    scopes, functions = [], []
    for _ in range(draw(st.integers(1, 6))):
        size = draw(st.integers(0, min(3, len(domains))))
        scopes.append(tuple(rng.permutation(len(domains))[:size].tolist()))
        values = rng.normal(size=[domains[v] for v in scopes[-1]])
        holes = rng.random(values.shape) < draw(st.sampled_from([0.0, 0.2]))
        functions.append(np.where(holes, np.inf, values))
    return domains, scopes, functions


def brute_force(domains, scopes, functions):
    """All sums, with an axis per variable."""
    total = np.zeros(domains)
    for values in product(*map(range, domains)):
        parts = zip(scopes, functions, strict=True)
        total[values] = sum(float(f[tuple(values[v] for v in scope)]) for scope, f in parts)
    return total


@settings(max_examples=150, deadline=None)
@given(sums())
def test_minimum_and_marginals_equal_brute_force(problem):
    domains, scopes, functions = problem
    total = brute_force(domains, scopes, functions)
    tree = MinSum(domains, scopes)
    least, values = tree.minimum(functions)
    assert least == pytest.approx(total.min(), abs=1e-12)
    assert total[values] == pytest.approx(least, abs=1e-12)
    for scope, marginal in zip(scopes, tree.marginals(functions), strict=True):
        want = total.min(axis=tuple(v for v in range(len(domains)) if v not in scope))
        want = want.transpose([sorted(scope).index(v) for v in scope])
        np.testing.assert_allclose(marginal, want, atol=1e-12)


def test_a_function_that_is_left_out_shows():
    scopes, functions = [(0, 1), (1,)], [np.array([[0.0, 3], [2, 1]]), np.array([4.0, 0])]
    tree = MinSum([2, 2], scopes)
    assert tree.minimum(functions) == (1.0, (1, 1))
    assert tree.minimum([functions[0], np.zeros(2)]) == (0.0, (0, 0))
    np.testing.assert_array_equal(tree.marginals(functions)[0], [[4.0, 3], [6, 1]])


def test_a_chain_takes_tables_of_neighbours_only():
    domains = [30] * 40
    chain = MinSum(domains, [(i, i + 1) for i in range(39)])
    assert chain.size == 39 * 30**2 + 30
    trunk = MinSum(domains, [(i, 39) for i in range(39)] + [(i, i + 1) for i in range(38)])
    assert trunk.size < 39 * 30**3
