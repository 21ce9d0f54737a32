"""Scale: growth exponents, and goals that a slow or large search misses."""

import numpy as np
import pytest

from benchmarks import common, scale


def row(model, samples, seconds, peak=5e9):
    return {
        "model": model,
        "samples": samples,
        "params": 25e6,
        "macs": 4e9,
        "kept": 0.5,
        "seconds": seconds,
        "peak_rss": peak,
        "phases": {"losses": seconds},
        "notes": [],
    }


@pytest.mark.parametrize("power", [0.5, 1.0, 1.7])
def test_exponent_of_a_power_law(power):
    sizes = np.array([1e3, 5e4, 2e6, 3e7])
    assert scale.exponent(sizes, 3 * sizes**power) == pytest.approx(power, abs=1e-9)


def test_goal_is_judged(tmp_path):
    options = common.Options(False, 0, 2, tmp_path, tmp_path)
    met = scale._notes([row(*scale.GOAL, 1100.0)], options)
    slow = scale._notes([row(*scale.GOAL, 1300.0)], options)
    large = scale._notes([row(*scale.GOAL, 1100.0, 7e9)], options)
    assert ["met" in met[1], "met" in slow[1], "met" in large[1]] == [True, False, False]


def test_growth_in_samples_is_told_apart(tmp_path):
    options = common.Options(False, 0, 2, tmp_path, tmp_path)
    rows = [row("a", 64, 100.0), row("a", 256, 400.0)]
    assert "a: seconds grow as samples ** 1.00" in scale._notes(rows, options)
    failed = {"model": "b", "samples": 1, "error": "out of memory"}
    assert "out of memory" in scale._table([*rows, failed]).text()


def test_goal_is_among_the_cases():
    assert scale.GOAL in scale.CASES
