"""A few measurements stand for all: as measured, between them never falling, with a floor."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcomp.numerics.interpolation import Curve, interpolated, log_spaced, spread


def found_of(
    errors: Mapping[int, float], loss: Callable[[int], float], *, count: int
) -> dict[int, float]:
    return interpolated(errors, {option: loss(option) for option in spread(errors, count)})


def test_few_are_measured():
    errors = {n: float(n + 1) ** 2 for n in range(20)}
    calls = []

    def loss(option: int) -> float:
        calls.append(option)
        return 0.01 * errors[option]

    found = found_of(errors, loss, count=4)
    assert calls == [0, 6, 13, 19]
    assert list(found) == list(range(20))
    values = [found[n] for n in range(20)]
    assert values == sorted(values)
    assert np.allclose(values, [0.01 * e for e in errors.values()])  # a straight line in logs


def test_all_are_measured_where_there_are_few():
    errors = {n: float(n + 1) for n in range(3)}
    assert found_of(errors, lambda n: 1.0 + n, count=10) == {0: 1.0, 1: 2.0, 2: 3.0}


def test_where_measurements_fall():
    """Measured losses stay as measured; those between them never fall."""
    errors = {n: float(n + 1) for n in range(10)}
    measured = {0: 1.0, 3: 3.0, 6: 2.0, 9: 4.0}
    found = found_of(errors, measured.__getitem__, count=4)
    assert {n: found[n] for n in measured} == measured
    between = [found[n] for n in range(10) if n not in measured]
    assert between == sorted(between)
    assert found[5] == pytest.approx(3.0)


def test_options_that_overflow_are_left_out():
    errors = {n: float(n + 1) for n in range(10)}
    found = found_of(errors, lambda n: np.inf if n > 5 else 1.0 + n, count=4)
    assert sorted(found) == [0, 1, 2, 3]
    assert found_of(errors, lambda _: np.inf, count=4) == {}


@pytest.mark.parametrize("least", [1e-9, 0.0, -0.1])
def test_what_is_less_than_noise_counts_as_noise(least):
    """A thousandth of the largest: a loss in place may come out as 0, or below."""
    found = found_of({0: 1.0, 1: 2.0, 2: 4.0}, {0: least, 1: 0.5, 2: 1.0}.get, count=3)
    assert found == {0: 1e-3, 1: 0.5, 2: 1.0}


def test_nothing_but_noise_is_next_to_nothing():
    found = found_of({0: 1.0, 1: 2.0}, {0: -1.0, 1: 0.0}.get, count=2)
    assert set(found) == {0, 1}
    assert all(0 < lost <= 1e-30 for lost in found.values())


@given(
    st.dictionaries(
        st.integers(0, 50), st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=12
    ),
    st.integers(2, 6),
    st.randoms(use_true_random=False),
)
def test_losses_are_positive_and_between_their_neighbours(errors, count, random):
    losses = {option: random.uniform(1e-6, 1e3) for option in errors}
    measured = []

    def loss(option: int) -> float:
        measured.append(option)
        return losses[option]

    found = found_of(errors, loss, count=count)
    assert found.keys() == errors.keys()
    assert len(measured) <= count
    floor = 1e-3 * max(losses[option] for option in measured)
    for option in measured:
        assert found[option] == max(losses[option], floor)
    low, high = min(map(found.get, measured)), max(map(found.get, measured))
    assert all(low * (1 - 1e-9) <= lost <= high * (1 + 1e-9) for lost in found.values())


def test_a_curve_is_read_between_and_below_its_points_but_not_beyond() -> None:
    curve = Curve(np.array([0.01, 1.0]), np.array([0.1, 10.0]))
    assert curve.at(0.1) == pytest.approx(1.0)  # the line between the logarithms
    assert curve.at(0.001) == pytest.approx(0.01)  # in proportion to the error
    assert curve.at(1.0) == pytest.approx(10.0)
    assert curve.at(1.01) == np.inf
    assert Curve(np.array([]), np.array([])).at(0.0) == np.inf


@given(st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=6, unique=True))
def test_a_curve_never_falls(losses) -> None:
    curve = Curve(np.geomspace(1e-3, 1.0, len(losses)), np.array(losses))
    read = [curve.at(error) for error in np.geomspace(1e-4, 1.0, 50)]
    assert (np.diff(read) >= -1e-9 * np.max(read)).all()


def test_few_values_stay_evenly_spaced_by_their_logarithms() -> None:
    values = np.arange(1.0, 1025.0)
    kept = values[log_spaced(values, 6)]
    assert kept.tolist() == [1.0, 4.0, 16.0, 64.0, 256.0, 1024.0]
    assert log_spaced([3.0, 5.0], 6).tolist() == [0, 1]
    assert log_spaced([], 6).tolist() == []
