"""`compress` without samples: images inverted from BatchNormalization, else noise."""

import importlib.util

import pytest

pytest.importorskip("torch", reason="images are inverted with PyTorch")

import torch

from onnxcomp.bridge import inversion
from onnxcomp.errors import UnsupportedModelError
from onnxcomp.model import Model
from onnxcomp.search.run import Result, compress
from onnxcomp.search.settings import Limits, Settings
from tests.analysis.channel_graphs import Graph
from tests.bridge.test_inversion import pictures, trained
from tests.search.cases import residual

QUICK = Settings(latency=False, grid="8", methods=("remove_channels",))
MACS = Limits(macs=0.7)


def classes() -> Model:
    g = Graph(3, 16, 16)
    t = "x"
    for inputs, outputs in ((3, 16), (16, 16), (16, 16)):
        t = g.op("Relu", g.bn(g.conv(t, inputs, outputs), outputs))
    return g.model(g.op("Softmax", g.op("Gemm", g.mean(t), g.w(16, 5), g.w(5))))


@pytest.fixture(autouse=True)
def _one_batch(monkeypatch):
    monkeypatch.setattr(inversion, "_BATCHES", 1)


def run(model: Model, limits: Limits = MACS, **options: object) -> Result:
    return compress(model, limits=limits, settings=QUICK, **options)


def fail(*_: object, **__: object) -> None:
    raise AssertionError("this was done already")


def test_images_are_inverted_once_and_kept(tmp_path, monkeypatch):
    model = trained(classes)
    seen = []
    result = run(model, resume=tmp_path / "state", progress=lambda *at: seen.append(at))
    first, *others = result.report.notes
    assert first.startswith("no samples given: fitted and judged on 64 images inverted")
    assert not any("stand for real inputs" in note for note in others)
    assert any(label == "invert images" for label, _ in seen)
    assert result.met
    assert not result.plan.empty
    assert result.report.ladder.evaluation.samples == 21  # of 64, held out
    monkeypatch.setattr(inversion, "inverted", fail)
    again = run(model, resume=tmp_path / "state")
    assert again.model.digest == result.model.digest
    with pytest.raises(AssertionError, match="done already"):
        run(model)


def test_without_torch_noise_stays(monkeypatch):
    model = trained(classes)
    find = importlib.util.find_spec

    def found(name: str, *rest: object) -> object:
        return None if name == "torch" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    first, *others = run(model).report.notes
    assert "noise only, as images are inverted with PyTorch, which is not installed" in first
    assert any("stand for real inputs" in note for note in others)


def test_refusals_are_told(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise UnsupportedModelError("the moon is full")

    monkeypatch.setattr(inversion, "inverted", refuse)
    assert "noise only, as the moon is full;" in run(trained(classes)).report.notes[0]
    assert "no BatchNormalization" in run(residual()).report.notes[0]


@pytest.mark.parametrize("error", [RuntimeError("out of\nmemory"), MemoryError()], ids=repr)
def test_where_torch_fails_noise_stays(error, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch.Tensor, "backward", fail)
    reason = str(error).split("\n")[0] or "MemoryError"
    result = run(trained(classes))
    assert f"noise only, as torch fails: {reason};" in result.report.notes[0]
    assert result.met


def test_what_does_not_need_them_does_not_wait_for_them(monkeypatch):
    monkeypatch.setattr(inversion, "inverted", fail)
    model = trained(classes)
    run(model, Limits())
    compress(model, {"x": pictures(model, 16)}, limits=MACS, settings=QUICK)
    weights_alone = Settings(latency=False, grid="8", data_aware=False)
    compress(model, limits=MACS, settings=weights_alone)


def test_a_third_of_the_time_is_theirs(monkeypatch):
    found = []

    def slow(*_: object, late, **__: object) -> None:
        while not late():
            pass
        found.append(True)
        raise UnsupportedModelError("it takes too long")

    monkeypatch.setattr(inversion, "inverted", slow)
    settings = Settings(latency=False, grid="8", methods=("remove_channels",), time_limit=6)
    result = compress(trained(classes), limits=MACS, settings=settings)
    assert found
    assert 0 < result.report.seconds["invert"] <= 3.5
    assert result.met


def test_limits_on_the_drop_stay_halved():
    result = run(trained(classes), Limits(drift=0.2))
    assert any("halved" in note for note in result.report.notes)
    assert 0 < result.report.ladder.evaluation.relative_l2 <= 0.1
