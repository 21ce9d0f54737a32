"""Progress tells the truth about the time that is left; the clock is the test's own."""

import io

import numpy as np
import pytest
from rich.console import Console

from onnxcomp.report.progress import Pace, ProgressView, _duration


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def run(seconds: list[float], *, restored: int = 0) -> list[tuple[float, float, float | None]]:
    """Share, true and estimated time left after each step of a phase of such steps."""
    clock = Clock()
    pace = Pace(clock)
    pace.update(0.0)
    found = []
    for position, step in enumerate(seconds):
        clock.now += 0.001 if position < restored else step
        share = (position + 1) / len(seconds)
        pace.update(share)
        found.append((share, sum(seconds[position + 1 :]), pace.left()))
    return found


def errors(
    found: list[tuple[float, float, float | None]], since: float, until: float = 0.95
) -> list[float]:
    """Errors of the estimates, relative to what is left, between two shares."""
    found = [row for row in found if since <= row[0] <= until]
    assert len(found) > 3
    return [abs((left or 0.0) - true) / true for _, true, left in found]


@pytest.mark.parametrize("steps", [10, 100, 1000])
def test_a_linear_phase_is_known_after_a_tenth(steps):
    assert max(errors(run([200.0 / steps] * steps), since=0.1)) < 0.01


def test_uneven_steps_are_evened_out():
    """Steps whose costs differ by a factor of 5, as those of convolutions do."""
    draws = (np.random.default_rng(seed).uniform(0.5, 2.5, 100) for seed in range(20))
    found = [errors(run(list(costs)), since=0.1, until=0.8) for costs in draws]
    assert np.mean(found) < 0.1
    assert np.max(found) < 0.6


def test_the_check_bites():
    """Costs that triple halfway cannot be known before; they are soon after."""
    found = run([1.0] * 50 + [3.0] * 50)
    assert max(errors(found, since=0.1)) > 0.4
    assert max(errors(found, since=0.8)) < 0.2


def test_what_was_restored_does_not_count():
    """An earlier run left 60 of 100 steps: the rest takes as long as it took before."""
    found = run([2.0] * 100, restored=60)
    assert max(errors(found, since=0.63)) < 0.05


def test_early_guesses_are_not_shown():
    shown = {share: left for share, _, left in run([1.0] * 100)}
    assert shown[0.02] is None
    assert shown[0.03] is not None
    quick = {share: left for share, _, left in run([0.1] * 100)}
    assert quick[0.19] is None
    assert quick[0.2] is not None
    assert Pace(Clock()).left() is None


def pace_at(share: float, seconds: float) -> tuple[Pace, Clock]:
    """A pace after even steps of a hundredth."""
    clock = Clock()
    pace = Pace(clock)
    pace.update(0.0)
    for step in range(1, round(100 * share) + 1):
        clock.now += seconds / (100 * share)
        pace.update(step / 100)
    return pace, clock


def test_between_updates_it_counts_down():
    pace, clock = pace_at(0.5, 100.0)
    assert pace.left() == pytest.approx(100.0)
    clock.now += 1.0
    assert pace.left() == pytest.approx(99.0)


def test_a_step_that_lasts_makes_it_grow():
    pace, clock = pace_at(0.5, 100.0)
    grown = []
    for _ in range(4):
        clock.now += 20.0
        grown.append(pace.left())
    assert grown == sorted(grown)
    assert grown[0] > 100.0


def test_it_is_never_negative():
    for share in (0.5, 0.9, 0.99, 1.0):
        pace, clock = pace_at(share, 10.0)
        for _ in range(100):
            left = pace.left()
            assert left is not None
            assert left >= 0.0
            clock.now += 1.0
    assert pace.left() == 0.0


@pytest.mark.parametrize("share", [0.0, 0.2], ids=["at zero", "at less"])
def test_a_new_phase_begins_anew(share):
    pace, clock = pace_at(0.5, 100.0)
    pace.update(share)
    assert pace.left() is None
    clock.now += 10.0
    pace.update(share + 0.1)
    assert pace.left() == pytest.approx((0.9 - share) * 100.0)


def test_a_clock_that_stands_still_is_no_division_by_zero():
    pace = Pace(Clock())
    for share in (0.0, 0.0, 0.5, 0.5, 1.0):
        pace.update(share)
        assert pace.left() is None


def lines(clock: Clock, *, terminal: bool = False, limit: float | None = None) -> list[str]:
    """What is written during two phases, of which the first takes 400 s in 100 steps."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, markup=False)
    with ProgressView(console, time_limit_s=limit, clock=clock) as view:
        view.update("losses", 0.0)
        for step in range(1, 101):
            clock.now += 4.0
            view.update(f"conv{step}", step / 100)
        view.update("walk", 0.0)
    return stream.getvalue().splitlines()


def test_lines_tell_what_is_left():
    found = lines(Clock())
    assert found[0] == "losses"
    assert found[1] == "  3% conv3 (6:28 left of this phase)"
    assert found[2] == "  6% conv6 (6:16 left of this phase)"
    assert found[-2:] == [" 99% conv99 (0:04 left of this phase)", "walk"]
    assert len(found) == 35


def test_lines_tell_when_the_limit_comes():
    found = lines(Clock(), limit=390.0)
    assert found[0] == "losses (limit in 6:30)"
    assert found[1] == "  3% conv3 (6:28 left of this phase, limit in 6:18)"
    assert found[-1] == "walk (limit reached)"


def test_the_bar_tells_the_same():
    text = "\n".join(lines(Clock(), terminal=True, limit=7200.0))
    assert "walk" in text
    assert "limit in 1:53:20" in text


def test_a_bar_between_updates_counts_down():
    clock, stream = Clock(), io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    with ProgressView(console, clock=clock) as view:
        view.update("losses", 0.0)
        clock.now += 10.0
        view.update("conv1", 0.1)
        view._bar.refresh()
        clock.now += 5.0
        view._bar.refresh()
    assert "1:30 left of this phase" in stream.getvalue()
    assert "1:25 left of this phase" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0:00"), (59.6, "1:00"), (3599.0, "59:59"), (36000.0, "10:00:00")],
)
def test_durations(seconds, words):
    assert _duration(seconds) == words
