"""Tables: what they say, in which order, and that names stay names."""

import io

import pytest
from rich.console import Console

from onnxcomp.report import Figures
from onnxcomp.report.progress import ProgressView
from onnxcomp.report.text import clean, count, grouped_reasons, report_view, size, unmet_limits
from onnxcomp.search.settings import Limits, Settings
from tests.report.reports import HOSTILE, SAFE, made_up_report


def printed(view) -> str:
    stream = io.StringIO()
    Console(file=stream, width=220).print(view)
    return stream.getvalue()


def test_report_begins_with_its_notes():
    lines = printed(report_view(made_up_report())).splitlines()
    assert lines[0] == "note: no samples given: fitted and judged on random inputs only"


def test_report_compares_all_figures():
    text = printed(report_view(made_up_report()))
    for row in (
        ("params", "1.00 M", "500 k", "50.0 %"),
        ("MACs", "50.0 M", "30.0 M", "60.0 %"),
        ("file size", "4.00 MB", "2.00 MB", "50.0 %"),
        ("median ms", "2.000", "1.300", "speedup 1.50x (95 %: 1.40 to 1.60)"),
        ("A/A control", "1.00x (95 %: 0.99 to 1.01)"),
    ):
        assert any(all(cell in line for cell in row) for line in text.splitlines()), row
    assert "top1: 0.9800 -> 0.9700, drop +0.0100" in text
    assert "80.0 % of the original's MACs are in reshaped nodes" in text


def test_names_are_shown_as_they_are():
    text = printed(report_view(made_up_report()))
    assert SAFE in text
    assert "\x1b" not in text


def test_long_tables_say_how_much_is_left_out():
    text = printed(report_view(made_up_report()))
    assert "and 10 more (all in --json)" in text
    assert "and 3 more reasons (all in --json)" in text


def test_reasons_are_counted_most_frequent_first():
    reasons = grouped_reasons(made_up_report().refusals)
    assert [len(places) for _, places in reasons] == [5] + [1] * 12
    assert reasons[0] == ("the target calls it slower", [f"node{i}" for i in range(5)])


def test_unmet_limits_name_flag_and_finding():
    limits = Limits(macs=0.5, params=500_000, size=1.5e6)
    report = made_up_report(settings=Settings(limits=limits), met=False)
    assert unmet_limits(report) == [
        "--max-macs 25.0 M: found 30.0 M",
        "--max-size 1.50 MB: found 2.00 MB",
    ]
    assert "limit not met: --max-macs" in printed(report_view(report))
    assert unmet_limits(made_up_report()) == []


def test_report_without_latency_actions_and_macs():
    nothing = Figures(0, 0, 10, None)
    none = {"actions": (), "refusals": (), "benchmark": None, "settings": Settings()}
    report = made_up_report(original=nothing, result=nothing, **none)
    text = printed(report_view(report))
    assert "nothing was changed" in text
    assert "median ms" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (9996, "10.0 k"),
        (99_960, "100 k"),
        (223_500, "224 k"),
        (999_600, "1.00 M"),
        (4.1e7, "41.0 M"),
        (2e15, "2000 T"),
    ],
)
def test_counts_have_three_digits(value, text):
    assert count(value) == text


def test_sizes_are_decimal_as_flags_are():
    assert size(1_500_000) == "1.50 MB"
    assert size(12) == "12 B"


def test_clean_keeps_what_can_be_printed():
    assert clean(HOSTILE) == SAFE
    assert clean("größe 模型") == "größe 模型"
    assert clean("\udc80\x9b") == "\\udc80\\x9b"


def progress_on(*, terminal: bool, quiet: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=80, markup=False)
    with ProgressView(console, quiet=quiet) as progress:
        progress.update("losses", 0.0)
        progress.update(HOSTILE, 0.5)
        progress.update("walk", 0.0)
    return stream.getvalue()


def test_progress_is_lines_in_a_pipe():
    assert progress_on(terminal=False, quiet=False) == "losses\nwalk\n"


def test_progress_is_a_bar_on_a_terminal():
    assert "\x1b" in progress_on(terminal=True, quiet=False)


def test_quiet_progress_is_nothing():
    assert (
        progress_on(terminal=True, quiet=True) == progress_on(terminal=False, quiet=True) == ""
    )
