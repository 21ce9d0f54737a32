"""A map over threads: the built-in map, with a few items at once."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcomp.parallel import ordered_map


@given(st.lists(st.integers(), max_size=20), st.integers(1, 5))
def test_results_come_in_the_order_of_the_items(items, at_once):
    assert list(ordered_map(str, items, at_once=at_once)) == [str(item) for item in items]


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_as_many_run_at_once_as_asked_for(at_once):
    """All calls of a round wait for each other, which fewer threads could not."""
    barrier = threading.Barrier(at_once)

    def met(_: int) -> int:
        return barrier.wait(timeout=10)

    found = list(ordered_map(met, range(3 * at_once), at_once=at_once))
    assert sorted(found) == sorted([*range(at_once)] * 3)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_items_are_taken_as_they_are_needed(at_once):
    taken = []
    found = ordered_map(str, (taken.append(n) or n for n in range(20)), at_once=at_once)
    assert not taken
    for done in range(1, 10):
        next(found)
        time.sleep(0.001)
        assert len(taken) <= done + at_once
    found.close()


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_failure_comes_at_its_place(at_once):
    found = ordered_map(lambda n: 1 / n, [2, 1, 0, 1], at_once=at_once)
    assert [next(found), next(found)] == [0.5, 1.0]
    with pytest.raises(ZeroDivisionError):
        next(found)
