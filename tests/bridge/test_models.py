"""All graphs around: they compute the same, train everywhere, and go back unchanged."""

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the bridge needs PyTorch")

import torch

from onnxcomp.bridge import takes_batches, to_torch
from onnxcomp.errors import UnsupportedModelError
from onnxcomp.loading import load
from onnxcomp.model import Model
from onnxcomp.passes.working import prepare
from onnxcomp.samples import Samples
from tests.analysis.channel_cases import CASES as CHANNELS
from tests.bridge.checks import backward, converted, feed_of, without_gradient
from tests.graphs import sane_feeds, shared_models
from tests.passes.joint_cases import CASES as JOINT
from tests.search.cases import CASES as SEARCH

REFUSED = {
    "apne_gtcrn_simple": "14 nodes of the model: GRU 'onnx::Squeeze_531': there is no such",
    "silero_vad_16k_op15": "3 nodes of the model: If '/model/decoder/If_output_0': it carries",
}
FIXTURES: dict[str, Callable[[], Model]] = {
    **{f"channels {name}": make for name, (make, _) in CHANNELS.items()},
    **{f"search {name}": make for name, make in SEARCH.items()},
    **{f"joint {name}": make for name, make in JOINT.items()},
}
# Seconds of convolutions; their exact passes have tests of their own.
SLOW = {"ipne_TBEFN_180x320", "ipne_deeplab_v3_mnv2", "libonnx_super_resolution_10"}


@pytest.mark.parametrize("name", FIXTURES)
def test_fixtures(name: str) -> None:
    model = FIXTURES[name]()
    module = converted(model)
    assert module.trained
    backward(module, feed_of(model, sane_feeds(model)))
    assert without_gradient(module) == []


@pytest.mark.parametrize("path", shared_models(), ids=lambda path: path.stem)
def test_real_models(path: Path) -> None:
    model = load(path)
    if path.stem in REFUSED:
        with pytest.raises(UnsupportedModelError, match=REFUSED[path.stem]):
            to_torch(model)
        return
    samples = sane_feeds(model, 2)
    module = converted(model, samples)
    backward(module, feed_of(model, samples))
    assert without_gradient(module) == []
    names = [name for name, _, uses in model.weight_readers() if uses]
    weights = {n for n in names if model.weights[n].ndim > 1 and model.weights[n].size > 99}
    assert weights & module.trained.keys()
    assert module.untrained == {}
    assert takes_batches(module, model, samples)


@pytest.mark.parametrize("path", shared_models(), ids=lambda path: path.stem)
def test_prepared_models(path: Path) -> None:
    if path.stem in REFUSED | dict.fromkeys(SLOW):
        pytest.skip("refused, or slow to run")
    model = prepare(load(path))[0]
    module = converted(model, sane_feeds(model, 1))
    assert sum(w.numel() for w in module.trained.values()) > 5000


@pytest.mark.parametrize("path", shared_models(), ids=lambda path: path.stem)
def test_shapes_are_computed_beside_the_device(path: Path) -> None:
    """On torch's device without values, any read of a tensor's values would fail."""
    if path.stem in REFUSED:
        pytest.skip("refused, see above")
    model = load(path)
    feed = feed_of(model, sane_feeds(model))
    module = to_torch(model)
    with torch.no_grad():
        wanted = {name: value.shape for name, value in module(feed).items()}
    module.to("meta")
    found = module({name: value.to("meta") for name, value in feed.items()})
    assert {name: value.shape for name, value in found.items()} == wanted
    assert {value.device.type for value in found.values()} == {"meta"}


def test_the_part_between_inner_tensors() -> None:
    model = SEARCH["residual"]()
    module = to_torch(model)
    feed = feed_of(model, sane_feeds(model))
    names = [node.id for node in model.nodes if node.op == "Relu"][1:3]
    inner = module(feed, names)
    assert list(inner) == names
    (output,) = model.output_names
    from_there = module({names[1]: inner[names[1]], names[0]: inner[names[0]]}, [output])
    assert torch.equal(from_there[output], module(feed)[output])
    with pytest.raises(ValueError, match="'x' is not given and nothing makes it; feed x"):
        module({names[1]: inner[names[1]]}, [names[0]])
    with pytest.raises(ValueError, match="has no tensor 'elsewhere' to feed"):
        module({"elsewhere": feed["x"]})
    with pytest.raises(ValueError, match="'nowhere' is not given"):
        module(feed, ["nowhere"])
    model = SEARCH["shuffle"]()
    module, feed = to_torch(model), feed_of(model, sane_feeds(model))
    left, right = next(node.outputs for node in model.nodes if node.op == "Split")
    inner = module(feed, [left, right])
    (output,) = module({**feed, left: 2 * inner[left]}).values()
    assert torch.equal(output, *module({left: 2 * inner[left], right: inner[right]}).values())
    assert not torch.equal(output, *module(feed).values())
    where = f"torch fails in node '{model.nodes[0].id}': "
    with pytest.raises(UnsupportedModelError, match=where):
        module({"x": torch.zeros(1, 3, 4, 4)})


def test_samples_of_the_user_are_compared_on() -> None:
    model = SEARCH["squeeze_excite"]()
    whole = sane_feeds(model, 5)
    assert isinstance(whole, Samples)
    converted(model, whole)
