"""Removal equals zeroing on random graphs and on whole networks."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.model import Array, Model
from tests.analysis.channel_graphs import Graph, feeds
from tests.analysis.channel_law import analyse, draw, free_groups, obeys, obeys_everywhere
from tests.graphs import sane_feeds, shared_models

_CHOICES = ["conv", "grouped", "depthwise", "norm", "act", "add", "concat", "split", "slice"]
_CHOICES += ["shuffle", "excite", "pad", "shared", "gather", "flip"]


def _grow(steps: list[tuple[str, int]]) -> Model:
    g = Graph(3, 4, 4, seed=len(steps))
    tensors = [("x", 3), (g.conv("x", 3, 6), 6)]
    tied = g.w(6, 6, 1, 1)
    for step, number in steps:
        x, size = tensors[number % len(tensors)]
        same = [t for t, other in tensors if other == size]
        if step == "conv":
            tensors.append((g.conv(x, size, 6), 6))
        elif step == "grouped" and size % 2 == 0:
            tensors.append((g.conv(x, size, 6, group=2), 6))
        elif step == "depthwise":
            tensors.append((g.conv(x, size, 2 * size, group=size, kernel=1), 2 * size))
        elif step == "norm":
            tensors.append((g.bn(x, size), size))
        elif step == "act":
            tensors.append((g.op("Tanh", x), size))
        elif step == "add":
            tensors.append((g.op("Add", x, same[number % len(same)]), size))
        elif step == "concat" and size <= 24:
            other, more = tensors[number // 2 % len(tensors)]
            tensors.append((g.op("Concat", x, other, axis=1), size + more))
        elif step == "split" and size % 2 == 0:
            parts = g.ops("Split", x, outputs=2, axis=1)
            tensors += [(part, size // 2) for part in parts]
        elif step == "slice" and size > 2:
            tensors.append((g.op("Slice", x, g.ints(1), g.ints(-1), g.ints(1)), size - 2))
        elif step == "shuffle" and size % 2 == 0:
            y = g.op("Reshape", x, g.ints(0, 2, size // 2, 4, 4))
            y = g.op("Transpose", y, perm=[0, 2, 1, 3, 4])
            tensors.append((g.op("Reshape", y, g.ints(0, size, 4, 4)), size))
        elif step == "excite":
            y = g.op("GlobalAveragePool", x)
            tensors.append((g.op("Mul", x, g.conv(y, size, size, kernel=1)), size))
        elif step == "pad":
            y = g.op("Pad", x, g.ints(0, 1, 0, 0, 0, 2, 0, 0))
            tensors.append((y, size + 3))
        elif step == "shared" and size == 6:
            tensors.append((g.op("Conv", x, tied), 6))
        elif step == "gather":
            order = g.rng.permutation(size)
            tensors.append((g.op("Gather", x, g.ints(*order[: size - 1], 0), axis=1), size))
        elif step == "flip":
            y = g.op("Transpose", x, perm=[0, 2, 3, 1])
            tensors.append((g.op("Transpose", g.op("Abs", y), perm=[0, 3, 1, 2]), size))
    read = {name for node in g.nodes for name in node.input}
    leaves = [(x, size) for x, size in tensors if x not in read] or [tensors[-1]]
    return g.model(*(g.op("Gemm", g.mean(x), g.w(size, 2)) for x, size in leaves))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(_CHOICES), st.integers(0, 11)), max_size=10))
def test_random_graphs(steps: list[tuple[str, int]]) -> None:
    model = _grow(steps)
    feed = feeds(model)
    channels = analyse(model, feed[0])
    free = free_groups(channels)
    for seed in range(2 if free else 0):
        obeys(model, channels, draw(channels, free, seed), feed)


def _fed(path: Path) -> tuple[Model, list[dict[str, Array]]]:
    model = Model.from_proto(onnx.load(path))
    inputs = model.signature.inputs
    sizes = [1, 2] if all(v.shape and isinstance(v.shape[0], str) for v in inputs) else [1]
    return model, [next(iter(sane_feeds(model, n).batches(inputs, n))).feed for n in sizes]


@pytest.mark.parametrize("path", shared_models(), ids=lambda path: path.stem)
def test_real_models(path: Path) -> None:
    model, feed = _fed(path)
    obeys_everywhere(model, feed, seeds=1, alone=2)


@pytest.mark.heavy
@pytest.mark.parametrize("path", shared_models(), ids=lambda path: path.stem)
def test_every_group_of_real_models(path: Path) -> None:
    model, feed = _fed(path)
    obeys_everywhere(model, feed)


BUILT = ["resnet20a_cifar10", "resnet20b_cifar10", "mobilenet_v2_cifar10"]
BUILT += ["shufflenet_v2_cifar10", "squeezenet_cifar10", "densenet40_cifar10"]


def _built(name: str, folder: Path, *, folded: bool) -> tuple[Model, list[dict[str, Array]]]:
    builders = pytest.importorskip("models.builders")
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    builders.export(name, folder / "m.onnx", folded=folded)
    shape = builders.BUILDERS[name].input_shape
    rng = np.random.default_rng(0)
    feed = [{"input": rng.standard_normal((n, *shape)).astype(np.float32)} for n in (1, 2)]
    return Model.from_proto(onnx.load(folder / "m.onnx")), feed


@pytest.mark.parametrize("name", BUILT)
def test_built_models(name: str, tmp_path: Path) -> None:
    model, feed = _built(name, tmp_path, folded=False)
    channels = obeys_everywhere(model, feed, seeds=1, alone=1)
    pinned = [group.pinned for group in channels.groups if group.pinned is not None]
    assert pinned == ["it is the graph output 'logits'"]


def test_trunk_of_padded_shortcuts_is_three_groups(tmp_path: Path) -> None:
    model, feed = _built("resnet20a_cifar10", tmp_path, folded=True)
    channels = analyse(model, feed[0])
    trunk = [group for group in channels.groups if len(group.producers) > 1]
    assert [(g.size, len(g.producers)) for g in trunk] == [(16, 10), (16, 6), (32, 3)]
