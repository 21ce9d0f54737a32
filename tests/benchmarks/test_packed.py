"""The benchmark of packed files: its cases, and the goal that it judges by."""

import pytest

from benchmarks import packed


def row(way: str, limit: float, lost: float) -> dict[str, object]:
    found = {"value": lost, "low": lost, "high": lost}
    return {"model": packed.MODEL, "way": way, "limit": limit, "lost": found}


@pytest.mark.parametrize(("lost", "verdict"), [(0.0029, "met"), (0.0031, "missed")])
def test_the_goal_is_judged_by_what_both_lose(lost, verdict) -> None:
    rows = [row("both", 0.12, lost), row("levels", 0.12, 0.0), row("both", 0.25, 0.5)]
    (note,) = packed._notes(rows)
    assert note.endswith(verdict)


def test_a_row_without_a_result_is_shown_with_its_reason() -> None:
    rows = [{"model": packed.MODEL, "way": "both", "limit": 0.12, "error": "it failed"}]
    (cells,) = packed._table(rows).rows
    assert "it failed" in cells
    assert packed._notes(rows) == []
