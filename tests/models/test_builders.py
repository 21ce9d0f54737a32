"""The standard networks: published sizes, determinism, and exports that compute the same."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from models.builders import BUILDERS, INPUT, OUTPUT, export

TOLERANCE = 1e-5  # relative L2; the float32 rounding of these networks is below 4e-6

PUBLISHED = {
    "resnet18_imagenet": 11_689_512,
    "resnet34_imagenet": 21_797_672,
    "resnet50_imagenet": 25_557_032,
    "resnet18_cifar10": 11_173_962,
    "resnet34_cifar10": 21_282_122,
    "resnet50_cifar10": 23_520_842,
    "vgg16_imagenet": 138_357_544,
    "vgg16_bn_imagenet": 138_365_992,
    "vgg19_imagenet": 143_667_240,
    "vgg19_bn_imagenet": 143_678_248,
    "mobilenet_v2_imagenet": 3_504_872,
    "shufflenet_v2_imagenet": 2_278_604,
    "squeezenet_imagenet": 1_235_496,
    "densenet40_cifar10": 1_019_722,
    "resnet20a_cifar10": 269_722,
    "resnet56a_cifar10": 853_018,
    "resnet110a_cifar10": 1_727_962,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    assert BUILDERS[name].parameter_count() == PUBLISHED[name]


def test_option_b_adds_two_projections_with_batchnorm() -> None:
    extra = BUILDERS["resnet20b_cifar10"].parameter_count() - PUBLISHED["resnet20a_cifar10"]
    assert extra == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64


def test_vgg19_for_cifar_has_the_large_fully_connected_layers() -> None:
    with torch.device("meta"):
        module = BUILDERS["vgg19_bn_cifar10"].make()
    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    sizes = [(layer.in_features, layer.out_features) for layer in linear]
    assert sizes == [(512, 4096), (4096, 4096), (4096, 10)]


def images(shape: tuple[int, ...], seed: int = 7) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(path: Path, feed: torch.Tensor) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    return session.run([OUTPUT], {INPUT: feed.numpy()})[0]


def relative_l2(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize("folded", [False, True], ids=["kept", "folded"])
@pytest.mark.parametrize(
    ("name", "exporter"),
    [
        ("resnet20a_cifar10", "torchscript"),
        ("resnet20b_cifar10", "torchscript"),
        ("resnet18_cifar100", "torchscript"),
        ("mobilenet_v2_cifar10", "torchscript"),
        ("shufflenet_v2_cifar10", "torchscript"),
        ("densenet40_cifar10", "torchscript"),
        ("squeezenet_cifar10", "torchscript"),
        ("resnet20a_cifar10", "dynamo"),
    ],
)
def test_exports_compute_what_torch_computes(
    tmp_path: Path, name: str, exporter: Any, folded: bool
) -> None:
    path = tmp_path / "model.onnx"
    module = export(name, path, folded=folded, exporter=exporter)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == (17 if exporter == "torchscript" else 18)
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    expected = sum(isinstance(layer, nn.BatchNorm2d) for layer in module.modules())
    assert len(norms) == (0 if folded and "densenet" not in name else expected)
    assert all(len(node.output) == 1 for node in norms)
    assert all(a.i == 0 for node in norms for a in node.attribute if a.name == "training_mode")
    for count in (1, 3):
        feed = images((count, 3, 32, 32))
        reference = module(feed).numpy()
        assert relative_l2(run(path, feed), reference) < TOLERANCE


def test_the_tolerance_bites(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    module = export("resnet20a_cifar10", path, folded=True)
    feed = images((2, 3, 32, 32))
    norm = next(layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d))
    assert norm.running_mean is not None
    norm.running_mean += 1e-3
    assert relative_l2(run(path, feed), module(feed).numpy()) > TOLERANCE


@pytest.mark.parametrize("name", ["resnet20a_cifar10", "shufflenet_v2_cifar10"])
def test_batchnorm_is_not_trivial(name: str) -> None:
    module = BUILDERS[name]()
    for layer in module.modules():
        if not isinstance(layer, nn.BatchNorm2d):
            continue
        values = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
        for value in values:
            assert value is not None
            assert torch.isfinite(value).all()
            assert value.std() > 1e-3
        assert layer.running_var is not None
        assert layer.running_var.min() > 5e-3


def test_networks_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = BUILDERS["resnet20b_cifar10"](3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = BUILDERS["resnet20b_cifar10"](3).state_dict()
    other = BUILDERS["resnet20b_cifar10"](4).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_exports_are_reproducible(tmp_path: Path) -> None:
    for name in ("a", "b"):
        export("resnet20b_cifar10", tmp_path / name, folded=False)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_declared_shapes(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"

    def declared() -> list[Any]:
        dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
        return [dim.dim_param or dim.dim_value for dim in dims]

    export("resnet20b_cifar10", path, folded=False)
    assert declared() == ["batch", 3, 32, 32]
    export("squeezenet_imagenet", path, folded=False, dynamic_batch=False, image_size=64)
    assert declared() == [1, 3, 64, 64]
    assert operators(path) >= {"Conv", "MaxPool", "Concat"}


def test_channels_are_shuffled_by_reshape_and_transpose(tmp_path: Path) -> None:
    export("shufflenet_v2_cifar10", tmp_path / "model.onnx", folded=True)
    assert operators(tmp_path / "model.onnx") >= {"Split", "Concat", "Reshape", "Transpose"}


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match="no network 'alexnet'; there are densenet40_cifar10"):
        export("alexnet", path, folded=True)
    with pytest.raises(ValueError, match="opset 18 and newer; got 17"):
        export("resnet20a_cifar10", path, folded=True, exporter="dynamo", opset=17)
    with pytest.raises(ValueError, match="torchscript or dynamo; got 'jit'"):
        export("resnet20a_cifar10", path, folded=True, exporter="jit")  # type: ignore[arg-type]
