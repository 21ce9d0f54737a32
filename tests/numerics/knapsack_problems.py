"""Small problems of options with shared variables, and their answers by trying everything."""

from itertools import product

import numpy as np
from hypothesis import strategies as st

from onnxcomp.numerics.option_tables import Table


def brute_force(domains, tables, limits):
    """The least loss over all values and options, and the smallest reachable costs."""
    best, smallest = np.inf, np.full(len(limits), np.inf)
    for values in product(*map(range, domains)):
        choices = []
        for table in tables:
            state = [values[v] for v in table.scope]
            choices.append(np.flatnonzero((table.states == state).all(axis=1)))
        for options in product(*choices):
            costs = sum(t.costs[i] for t, i in zip(tables, options, strict=True))
            smallest = np.minimum(smallest, costs)
            if (costs <= limits).all():
                best = min(best, sum(t.loss[i] for t, i in zip(tables, options, strict=True)))
    return best, smallest


@st.composite
def coupled(draw):
    """Small problems with shared variables and one or two limits."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    domains = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    kinds = draw(st.integers(1, 2))
    tables = []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(0, min(2, len(domains))))
        scope = tuple(rng.permutation(len(domains))[:size].tolist())
        every = list(product(*(range(domains[v]) for v in scope)))
        states = every + [every[i] for i in rng.integers(0, len(every), 2)]
        n = len(states)
        tables.append(
            Table(
                scope,
                np.array(states, int).reshape(n, size),
                rng.random(n),
                rng.integers(0, 6, (n, kinds)).astype(float),
            )
        )
    limits = np.array(
        [draw(st.one_of(st.just(np.inf), st.integers(0, 16))) for _ in range(kinds)]
    )
    return domains, tables, limits.astype(float)
