"""Deadlines on a clock that the test sets."""

import math

import pytest

from onnxcomp.deadline import Deadline, TimeLimitReached
from onnxcomp.errors import OnnxcompError, ParameterError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_runs_out():
    clock = Clock()
    deadline = Deadline(10.0, clock)
    assert deadline.left == 10.0
    deadline.check()
    clock.now += 9.5
    assert (deadline.left, deadline.passed) == (0.5, False)
    clock.now += 2.0
    assert (deadline.left, deadline.passed) == (0.0, True)
    with pytest.raises(TimeLimitReached):
        deadline.check()


def test_no_limit_never_passes():
    clock = Clock()
    deadline = Deadline(None, clock)
    clock.now = 1e12
    deadline.check()
    assert deadline.left == deadline.share(0.1).left == math.inf


def test_no_time_at_all_has_passed_at_once():
    assert Deadline(0.0).passed


def test_a_share_ends_earlier():
    clock = Clock()
    whole = Deadline(100.0, clock)
    clock.now += 20.0
    part = whole.share(0.25)
    assert part.left == 20.0
    clock.now += 20.0
    assert part.passed
    assert not whole.passed
    assert not whole.share(1.0).passed


@pytest.mark.parametrize("seconds", [-1.0, math.nan])
def test_impossible_limits_are_refused(seconds):
    with pytest.raises(ParameterError, match="seconds"):
        Deadline(seconds)


@pytest.mark.parametrize("fraction", [0.0, 1.5, math.nan])
def test_impossible_shares_are_refused(fraction):
    with pytest.raises(ParameterError, match="fraction"):
        Deadline(1.0).share(fraction)


def test_it_is_no_error_of_the_user():
    assert not issubclass(TimeLimitReached, OnnxcompError)
