"""Seeded networks by name, and their export to ONNX with BatchNorm kept or folded.

    from models.builders import export
    export("resnet18_cifar10", "resnet18.onnx", folded=False)

The weights are random, yet no BatchNorm is trivial: its statistics are measured on noise and
then disturbed, so that signals keep their size through deep networks and a mistake in folding
or in removing channels shows. Shifts are mostly positive: with shifts around zero a random
ResNet-50 magnifies rounding errors thirty times, to 1e-5 of its output; so it is below 4e-6.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.architectures import VGG, DenseNet, MobileNetV2, ResNet, ShuffleNetV2, SqueezeNet

INPUT, OUTPUT = "input", "logits"
Exporter = Literal["torchscript", "dynamo"]


@dataclass(frozen=True)
class Builder:
    """A network that can be built from a seed.

    Attributes:
        make: constructor of the module.
        input_shape: (channels, height, width) of one image.
    """

    make: Callable[[], nn.Module]
    input_shape: tuple[int, int, int]

    def __call__(self, seed: int = 0) -> nn.Module:
        """Return the network in eval mode with weights drawn from `seed`."""
        with torch.device("meta"):
            module = self.make()
        module.to_empty(device="cpu")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _draw_weights(module)
            _measure_statistics(module, self.input_shape)
        return module.eval().requires_grad_(False)

    def parameter_count(self) -> int:
        """Return the number of trainable parameters, without allocating them."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.make().parameters())


def _draw_weights(module: nn.Module) -> None:
    """Draw every parameter from the global generator: He et al. 2015 for weights."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.3, 1.5)
            with torch.no_grad():
                layer.bias.normal_(0.5, 0.3).mul_(layer.weight)
            layer.reset_running_stats()
            continue
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            nn.init.normal_(layer.bias, std=0.05)


@torch.no_grad()
def _measure_statistics(module: nn.Module, input_shape: tuple[int, int, int]) -> None:
    """Set running statistics to those of a batch of noise, each off by a random amount."""
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    if not norms:
        return
    channels, height, width = input_shape
    for layer in norms:
        layer.momentum = 1.0
    module.train()(torch.randn(4, channels, min(height, 64), min(width, 64)))
    for layer in norms:
        layer.momentum = 0.1
        mean, variance = layer.running_mean, layer.running_var
        if mean is None or variance is None:
            raise ValueError("a BatchNorm without running statistics cannot be exported")
        variance.clamp_(min=1e-2)  # of channels that were silent on the noise
        mean += 0.1 * variance.sqrt() * torch.randn_like(mean)
        variance *= torch.empty_like(variance).uniform_(0.7, 1.4)


def _builders() -> dict[str, Builder]:
    forms = {"cifar10": (10, True), "cifar100": (100, True), "imagenet": (1000, False)}
    found = {}

    def add(name: str, form: str, make: Callable[..., nn.Module], **options: Any) -> None:
        classes, cifar = forms[form]
        size = 32 if cifar else 224
        found[f"{name}_{form}"] = Builder(
            partial(make, classes=classes, **options), (3, size, size)
        )

    for form, (_, cifar) in forms.items():
        for depth, blocks in ((18, (2, 2, 2, 2)), (34, (3, 4, 6, 3)), (50, (3, 4, 6, 3))):
            bottleneck = depth == 50
            make = partial(ResNet, blocks, bottleneck=bottleneck)
            add(f"resnet{depth}", form, make, cifar=cifar)
        for depth in (16, 19):
            add(f"vgg{depth}", form, partial(VGG, depth, batch_norm=False), cifar=cifar)
            add(f"vgg{depth}_bn", form, partial(VGG, depth, batch_norm=True), cifar=cifar)
        add("mobilenet_v2", form, MobileNetV2, cifar=cifar)
        add("shufflenet_v2", form, ShuffleNetV2, cifar=cifar)
        add("squeezenet", form, SqueezeNet, cifar=cifar)
        if cifar:
            add("densenet40", form, DenseNet)
            for depth in (20, 56, 110):
                for option in ("A", "B"):
                    make = partial(ResNet, ((depth - 2) // 6,) * 3, width=16, option=option)
                    add(f"resnet{depth}{option.lower()}", form, make)
    return dict(sorted(found.items()))


BUILDERS = _builders()


def export(
    name: str,
    path: str | os.PathLike[str],
    *,
    folded: bool,
    opset: int | None = None,
    dynamic_batch: bool = True,
    exporter: Exporter = "torchscript",
    seed: int = 0,
    image_size: int | None = None,
) -> nn.Module:
    """Build a network and write it as ONNX; input `input`, output `logits`.

    Args:
        name: key of `BUILDERS`.
        path: file to write.
        folded: fold BatchNorm into the convolutions, instead of keeping the nodes.
        opset: default 17, or 18 with exporter "dynamo", which writes no older one.
        dynamic_batch: leave the batch axis open (`batch`), instead of 1.
        exporter: torch's tracer ("torchscript") or `torch.export` ("dynamo").
        seed: seed of the weights.
        image_size: height and width of the declared input, instead of the network's own.

    Returns:
        The module that was written, in eval mode.
    """
    if name not in BUILDERS:
        raise ValueError(f"no network {name!r}; there are {', '.join(BUILDERS)}")
    builder = BUILDERS[name]
    channels, height, width = builder.input_shape
    module = builder(seed)
    export_module(
        module,
        (channels, image_size or height, image_size or width),
        path,
        folded=folded,
        opset=opset,
        dynamic_batch=dynamic_batch,
        exporter=exporter,
    )
    return module


def export_module(
    module: nn.Module,
    input_shape: tuple[int, ...],
    path: str | os.PathLike[str],
    *,
    folded: bool,
    opset: int | None = None,
    dynamic_batch: bool = True,
    exporter: Exporter = "torchscript",
) -> None:
    """Write any module in eval mode as `export` does.

    Args:
        module: takes one float32 image batch, returns one tensor.
        input_shape: shape of one image.
        path: file to write.
        folded: see `export`; so are the other arguments.
        opset: as above.
        dynamic_batch: as above.
        exporter: as above.
    """
    module = module.eval()
    # Two images: with one, tracers take the batch axis for a constant.
    image = torch.zeros(2 if dynamic_batch else 1, *input_shape)
    if exporter == "torchscript":
        _export_traced(module, image, Path(path), folded, opset or 17, dynamic_batch)
    elif exporter == "dynamo":
        if opset is not None and opset < 18:
            raise ValueError(f"exporter 'dynamo' writes opset 18 and newer; got {opset}")
        _export_dynamo(module, image, Path(path), folded, opset or 18, dynamic_batch)
    else:
        raise ValueError(f"exporter must be torchscript or dynamo; got {exporter!r}")


def _export_traced(
    module: nn.Module, image: Tensor, path: Path, folded: bool, opset: int, dynamic: bool
) -> None:
    """Export by tracing; the exporter folds BatchNorm unless it must preserve the mode."""
    mode = torch.onnx.TrainingMode.EVAL if folded else torch.onnx.TrainingMode.PRESERVE
    with _quiet():
        torch.onnx.export(
            module,
            (image,),
            str(path),
            dynamo=False,
            training=mode,
            do_constant_folding=folded,
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=opset,
            dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}} if dynamic else None,
        )


def _export_dynamo(
    module: nn.Module, image: Tensor, path: Path, folded: bool, opset: int, dynamic: bool
) -> None:
    """Export by `torch.export`; its optimiser folds BatchNorm too."""
    from onnxscript import optimizer

    with _quiet():
        program = torch.onnx.export(
            module,
            (image,),
            dynamo=True,
            optimize=folded,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=opset,
            dynamic_shapes=({0: torch.export.Dim("batch")},) if dynamic else None,
        )
        if program is None:
            raise RuntimeError("the exporter returned no program")
        if not folded:  # torch's optimiser fuses BatchNorm; this much keeps it
            optimizer.fold_constants(program.model)
            optimizer.remove_unused_nodes(program.model)
        program.save(str(path), external_data=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporters say about themselves."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message, category in (
                (
                    r"You are using the legacy TorchScript-based ONNX export",
                    DeprecationWarning,
                ),
                (r"The feature will be removed", DeprecationWarning),
                (r"Constant folding - Only steps=1 can be constant folded", UserWarning),
                (r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning),
            ):
                warnings.filterwarnings("ignore", message, category)
            yield
    finally:
        logger.setLevel(level)
