"""Settings and limits: what they allow, and what limits mean in units of the original."""

import numpy as np
import pytest

from onnxcomp.errors import ParameterError
from onnxcomp.search import settings as module
from onnxcomp.search.settings import Limits, Settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"methods": ("fold_batchnorm",)},
        {"methods": ("nothing",)},
        {"grid": "0"},
        {"grid": "fine"},
        {"threads": 0},
        {"search_threads": 0},
        {"target": "toaster"},
        {"exclude": "("},
        {"time_limit": 0.0},
        {"patience": 0.5},
        {"grid": 16},
        {"memory": -5},
        {"memory": "1GB"},
        {"seed": -1},
        {"seed": 0.5},
        {"solver_seconds": -1},
        {"time_limit": "10m"},
        {"device": "tpu"},
    ],
    ids=str,
)
def test_bad_settings(wrong):
    with pytest.raises(ParameterError):
        Settings(**wrong)


def test_searches_use_the_cores_there_are(monkeypatch):
    cores = [5, 30]
    monkeypatch.setattr(module, "usable_cores", lambda: cores.pop(0))
    assert Settings(search_threads=3).cores == 3
    assert Settings().cores == 5
    assert Settings().cores == 8  # of 30


def test_numbers_of_numpy_are_numbers():
    settings = Settings(seed=np.int64(3), memory=np.float32(1e9), time_limit=np.inf)
    assert settings.seed == 3
    assert Limits(macs=np.float32(0.5)).macs == 0.5


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, "0.5", True])
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


@pytest.mark.parametrize("name", ["macs", "params", "size"])
def test_numbers_between_shares_and_sensible_costs_are_refused(name):
    """As limits that are asked for; those of a small network may be there in the end."""
    for value in (1.5, 2, 999):
        said = rf"'{name}' of {value} is .*share.*at least 1000"
        with pytest.raises(ParameterError, match=said):
            Settings(limits=Limits(**{name: value}))
    for value in (0.5, 1.0, 1000, 1.5e6):
        assert Settings(limits=Limits(**{name: value})).limits == Limits(**{name: value})
    assert Limits(**{name: 0.5}).absolute(100, 100, 100) == Limits(**{name: 50.0})


def test_a_drop_of_classes_is_a_share():
    with pytest.raises(ParameterError, match=r"5 means 500 points; 5% is 0\.05"):
        Limits(drop=5).check_share()
    with pytest.raises(ParameterError, match=r"1 means 100 points; 1% is 0\.01"):
        Limits(drop=1.0).check_share()
    Limits(drop=0.99, drift=5).check_share()


def test_grid_step():
    assert Settings().step is None
    assert Settings(grid="off").step == 1
    assert Settings(grid="8").step == 8
