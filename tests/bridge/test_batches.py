"""Graphs that were written for one sample, given several."""

import re
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch", reason="the bridge needs PyTorch")

import torch

from onnxcomp.bridge import check_equal, takes_batches, to_torch
from onnxcomp.errors import UnsupportedModelError
from onnxcomp.model import Model
from onnxcomp.samples import Samples
from tests.bridge.checks import converted, relative
from tests.bridge.op_graphs import floats
from tests.passes.exact_checks import graph

TOLERANCE = 1e-6  # relative L2 of a batch against its samples alone
CONV = "h = Conv <pads = [1, 1, 1, 1]> (x, w)\n"
HEAD = "y = MatMul (t, m)"
# Lines behind a convolution to (1, 4, 6, 6), and the outputs' shape.
FREE = {
    "flat": (f"t = Reshape (h, flat) {HEAD}", "1,5"),
    "rows": ("y = Reshape (h, rows)", "1,36,4"),
    "measured": (
        "s = Shape (h) p = ReduceProd <keepdims = 0> (s) z = Unsqueeze (p, zero)"
        " t = Reshape (h, half) y = Transpose <perm = [0, 2, 1]> (t)",
        "1,72,2",
    ),
    "two in a row": ("a = Reshape (h, rows) b = Relu (a) y = Reshape (b, image)", "1,4,6,6"),
    "token": ("t = Reshape (h, rows) y = Concat <axis = 1> (token, t)", "1,37,4"),
    "sizes": ('y = Resize <mode = "linear"> (h, , , sizes)', "1,4,9,8"),
    "measured sizes": (
        "a = Shape <end = 2> (h) s = Concat <axis = 0> (a, large)"
        ' y = Resize <mode = "linear"> (h, , , s)',
        "1,4,9,8",
    ),
    "expanded": ("g = GlobalAveragePool (h) y = Expand (g, image)", "1,4,6,6"),
    "channels first": (
        "a = Transpose <perm = [1, 0, 2, 3]> (h) b = Relu (a)"
        " c = Transpose <perm = [1, 0, 2, 3]> (b) y = Reshape (c, rows)",
        "1,36,4",
    ),
}
# What mixes the batch with another axis, or loses it.
MIXED = {
    "halves": ("t = Reshape (h, halves) y = ReduceSum (t, zero)", "1,2,36"),
    "first sample": ("g = Gather (h, zero) y = Relu (g)", "1,4,6,6"),
    "channels first": (
        "a = Transpose <perm = [1, 0, 2, 3]> (h) y = Reshape (a, flat)",
        "1,144",
    ),
}
SHAPES = {
    "flat": [1, 144],
    "rows": [1, -1, 4],
    "half": [1, 2, 72],
    "image": [1, 4, 6, 6],
    "sizes": [1, 4, 9, 8],
    "halves": [2, 2, 36],
    "zero": [0],
    "single": [1, 4, 1, 1],
    "large": [9, 8],
}


def model_of(lines: str, shape: str, *, batch: str = "1") -> Model:
    weights = {name: np.array(value) for name, value in SHAPES.items()}
    weights |= {
        "w": floats(4, 3, 3, 3),
        "m": floats(144, 5),
        "token": floats(1, 1, 4),
        "bias": floats(4),
    }
    used = {name: array for name, array in weights.items() if re.search(rf"\b{name}\b", lines)}
    used["w"] = weights["w"]
    return graph(f"float[{batch},3,6,6] x", f"float[{shape}] y", CONV + lines, used)


@pytest.mark.parametrize("name", FREE)
def test_a_batch_of_one_that_was_written_down_becomes_any(name: str) -> None:
    model = model_of(*FREE[name])
    module = converted(model)
    assert module.one_sample
    assert takes_batches(module, model)
    x = torch.from_numpy(floats(4, 3, 6, 6, seed=5))
    several = module({"x": x})["y"]
    single = torch.cat([module({"x": x[i : i + 1]})["y"] for i in range(4)])
    assert relative(several, single) < TOLERANCE
    assert relative(several.flip(0), single) > TOLERANCE


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_the_batch_is_told(name: str) -> None:
    model = model_of(*MIXED[name])
    assert not takes_batches(converted(model), model)


def test_a_weight_is_not_reshaped_for_the_batch() -> None:
    model = model_of("v = Reshape (bias, single) y = Mul (h, v)", "1,4,6,6")
    module = converted(model)
    assert "bias" in module.trained
    assert takes_batches(module, model)
    assert module({"x": torch.zeros(4, 3, 6, 6)})["y"].shape == (4, 4, 6, 6)


def test_open_batches_are_left_to_the_graph() -> None:
    model = model_of("y = Reshape (h, rows)", "1,M,4", batch="N")
    module = converted(model, Samples({"x": floats(3, 3, 6, 6)}))
    assert not module.one_sample
    assert takes_batches(module, model)
    assert module({"x": torch.zeros(3, 3, 6, 6)})["y"].shape == (1, 108, 4)


def test_a_batch_of_two_that_was_written_down_stays() -> None:
    lines = "y = Reshape (h, pair)"
    model = model_of(lines.replace("pair", "halves"), "2,2,72", batch="2")
    assert not to_torch(model).one_sample


@pytest.mark.parametrize("error", [RuntimeError("odd\nstrides"), MemoryError()], ids=repr)
def test_a_sample_on_which_torch_fails_names_the_node(error, monkeypatch) -> None:
    model = model_of(*FREE["rows"])
    module = to_torch(model)
    step = module._steps[0]

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(module, "_steps", (replace(step, kernel=fail), *module._steps[1:]))
    reason = str(error).split("\n")[0] or "MemoryError"
    for check in (takes_batches, check_equal):
        with pytest.raises(UnsupportedModelError) as caught:
            check(module, model)
        assert str(caught.value) == f"torch fails in node 'h': {reason}"
