"""What torch's two exporters make of networks computes what the networks compute."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the bridge needs PyTorch")

import torch
from torch import nn

from models.builders import BUILDERS, OUTPUT, export, export_module
from onnxcomp.bridge import GraphModule, takes_batches
from onnxcomp.loading import load
from onnxcomp.model import Model
from tests.bridge.checks import backward, converted, relative, without_gradient
from tests.bridge.networks import NETWORKS

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:ONNX export mode is set to TrainingMode.EVAL"),
]
TOLERANCE = 1e-5  # relative L2 against the network itself
EXPORTERS = ("torchscript", "dynamo")
FEW = [
    ("resnet20a_cifar10", "torchscript", False),
    ("resnet20b_cifar10", "dynamo", False),
    ("mobilenet_v2_cifar10", "torchscript", False),
    ("shufflenet_v2_cifar10", "torchscript", True),
    ("squeezenet_cifar10", "dynamo", True),
]
# Batch and other axes are mixed by constants there: one sample at a time.
MIXED = {"sequence_first", "window_attention"}
OLDEST = {"vision_transformer": 14, "sequence_first": 14, "mobile": 11}


def agrees(network: nn.Module, module: GraphModule, images: torch.Tensor) -> None:
    """Outputs are those of the network, and not those of one that is a little off."""
    with torch.no_grad():
        wanted = network(images)
        found = module({"input": images})[OUTPUT]
        assert relative(found, wanted) < TOLERANCE
        for weight in module.parameters():
            weight *= 1 + 1e-3
        assert relative(module({"input": images})[OUTPUT], wanted) > TOLERANCE
        for weight in module.parameters():
            weight /= 1 + 1e-3


def trains(model: Model, module: GraphModule, images: torch.Tensor) -> None:
    backward(module, {"input": images})
    assert without_gradient(module) == []


def images(count: int, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def check_builder(name: str, exporter: Any, folded: bool, folder: Path) -> None:
    # The traced VGG pools to a fixed size, which small pictures do not divide.
    size = BUILDERS[name].input_shape[1] if "vgg" in name else 64
    size = min(size, BUILDERS[name].input_shape[1])
    path = folder / "model.onnx"
    network = export(name, path, folded=folded, exporter=exporter, image_size=size)
    model = load(path)
    module = converted(model)
    few = images(2, size)
    agrees(network, module, few)
    trains(model, module, few)
    kept = sum(p.numel() for p in network.parameters())
    if not folded and exporter == "torchscript":
        assert sum(p.numel() for p in module.parameters()) == kept
    assert module.untrained == {}


@pytest.mark.parametrize(("name", "exporter", "folded"), FEW)
def test_builders(name: str, exporter: str, folded: bool, tmp_path: Path) -> None:
    check_builder(name, exporter, folded, tmp_path)


@pytest.mark.heavy
@pytest.mark.parametrize("folded", [False, True], ids=["kept", "folded"])
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", [n for n in BUILDERS if not n.startswith("vgg19_imagenet")])
def test_all_builders(name: str, exporter: str, folded: bool, tmp_path: Path) -> None:
    check_builder(name, exporter, folded, tmp_path)


def check_network(name: str, exporter: Any, opset: int, folder: Path, **how: bool) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    path = folder / "model.onnx"
    export_module(network, (3, 32, 32), path, exporter=exporter, opset=opset, **how)
    model = load(path)
    module = converted(model)
    agrees(network, module, images(1))
    batched = how["dynamic_batch"] or takes_batches(module, model)
    traced_window = name == "window_attention" and exporter == "torchscript"
    assert batched == (how["dynamic_batch"] or name not in MIXED or traced_window)
    if batched:
        agrees(network, module, images(3))
    trains(model, module, images(1))


@pytest.mark.parametrize(
    ("name", "exporter", "dynamic"),
    [
        *((name, "torchscript", dynamic) for name in NETWORKS for dynamic in (False, True)),
        *((name, "dynamo", True) for name in NETWORKS),
        ("vision_transformer", "dynamo", False),
        ("sequence_first", "dynamo", False),
    ],
)
def test_networks(name: str, exporter: str, dynamic: bool, tmp_path: Path) -> None:
    opset = 17 if exporter == "torchscript" else 18
    check_network(name, exporter, opset, tmp_path, folded=dynamic, dynamic_batch=dynamic)


@pytest.mark.heavy
@pytest.mark.parametrize("folded", [False, True], ids=["kept", "folded"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["one image", "open batch"])
@pytest.mark.parametrize("opset", [11, 13, 14, 16, 18, 19, 20, 21, 22, 23])
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_over_operator_sets(
    name: str, exporter: str, opset: int, dynamic: bool, folded: bool, tmp_path: Path
) -> None:
    if (opset < 18) if exporter == "dynamo" else not OLDEST.get(name, 11) <= opset <= 20:
        pytest.skip("the exporter does not write it")
    check_network(name, exporter, opset, tmp_path, folded=folded, dynamic_batch=dynamic)
