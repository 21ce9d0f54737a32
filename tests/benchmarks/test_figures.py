"""Figures are drawn."""

import pytest

from benchmarks import figures


@pytest.fixture(autouse=True)
def matplotlib():
    pytest.importorskip("matplotlib")


def test_curve_is_drawn(tmp_path):
    means = [
        {
            "model": "akamaster_cifar10_resnet20",
            "method": method,
            "images": 1024,
            "limit": ["macs", share],
            "macs": share,
            "top1": 0.9,
        }
        for method in figures.METHODS
        for share in (0.5, 1.0)
    ]
    figures.accuracy_curve(means, {"akamaster_cifar10_resnet20": 0.915}, tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_scatter_is_drawn(tmp_path):
    figures.scatter(
        [0.1, 0.2], [0.11, 0.3], tmp_path / "s.png", labels=("predicted", "measured"), factor=2
    )
    assert (tmp_path / "s.png").stat().st_size > 1000
