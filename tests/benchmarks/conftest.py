"""Fixtures of the benchmarks' tests."""

import pytest

from benchmarks import common


@pytest.fixture
def shared():
    """Skip where the real models and data are absent."""
    if not (common.SHARED / "models" / "manifest.json").exists():
        pytest.skip("../shared is absent")
