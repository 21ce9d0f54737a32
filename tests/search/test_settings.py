"""Settings and limits: what they allow, and what limits mean in units of the original."""

import numpy as np
import pytest

from onnxcomp.errors import ParameterError
from onnxcomp.search.settings import Limits, Settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"methods": ("fold_batchnorm",)},
        {"methods": ("nothing",)},
        {"grid": "0"},
        {"grid": "fine"},
        {"threads": 0},
        {"target": "toaster"},
        {"exclude": "("},
        {"time_limit": 0.0},
        {"patience": 0.5},
    ],
    ids=str,
)
def test_bad_settings(wrong):
    with pytest.raises(ParameterError):
        Settings(**wrong)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_bad_limits(value):
    for name in ("macs", "params", "size", "latency", "drop", "drift"):
        with pytest.raises(ParameterError, match=name):
            Limits(**{name: value})


def test_limits_are_shares_up_to_one():
    limits = Limits(macs=0.5, params=100, size=1.0).absolute(1000, 2000, 3000)
    assert limits == Limits(500.0, 100, 3000.0)
    assert Limits(macs=7).row.tolist() == [7, np.inf, np.inf]
    others = Limits(latency=0.5, drop=0.01, drift=0.1)
    assert others.absolute(1000, 2000, 3000) == others
    assert others.judged
    assert not Limits(macs=7, latency=0.5).judged
    assert others.without_judgement == Limits(latency=0.5)
    assert others.judged_at(0.5) == Limits(latency=0.5, drop=0.005, drift=0.05)


def test_grid_step():
    assert Settings().step is None
    assert Settings(grid="off").step == 1
    assert Settings(grid="8").step == 8
