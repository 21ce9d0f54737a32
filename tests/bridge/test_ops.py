"""Every operator against onnxruntime, over the operator sets in which it changed."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="the bridge needs PyTorch")

from onnxcomp.bridge import check_equal, to_torch
from onnxcomp.bridge.ops import (
    HANDLERS,
    attention,
    elementwise,
    linear,
    normalisation,
    pooling,
    reductions,
    resize,
    shapes,
)
from onnxcomp.errors import ValidationError
from tests.bridge import layout_cases, op_cases
from tests.bridge.op_graphs import Case

CASES = (*op_cases.CASES, *layout_cases.CASES)
OFF = 1 + 3e-5  # an error that the tolerance of 1e-5 must notice
# Attributes that are easily mistaken, and a mistake.
MISTAKES = {
    "Conv-17 asymmetric pads": {"pads": [1, 0, 2, 0]},
    "Conv-17 SAME_UPPER": {"auto_pad": "SAME_LOWER"},
    "ConvTranspose-17 asymmetric": {"pads": [1, 0, 0, 1]},
    "MaxPool-17 one-sided": {"pads": [0, 1, 0, 0]},
    "AveragePool-17 pads count": {"count_include_pad": 0},
    "BatchNormalization-15": {"epsilon": 1.1e-2},
    "LRN-17 size 3": {"alpha": 0.501},
    "Softmax-13": {"axis": 1},
    "Gelu-20": {"approximate": "tanh"},
    "DepthToSpace-17": {"mode": "CRD"},
    "Resize-13 linear half_pixel 0.6": {"coordinate_transformation_mode": "align_corners"},
    "Resize-13 cubic half_pixel 0.6": {"cubic_coeff_a": -0.5},
    "Resize-18 linear antialias": {"antialias": 0},
    "GridSample-16 bilinear zeros": {"padding_mode": "border"},
    "Pad-17 reflect": {"mode": "edge"},
    "Gemm-17": {"alpha": 1.001},
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_as_in_onnxruntime(case: Case) -> None:
    model = case.model()
    module, samples = to_torch(model), case.samples()
    check_equal(module, model, samples)
    dtype = model.signature.outputs[0].dtype
    if dtype == np.float32 and case.note != "zeros":
        with pytest.raises(ValidationError, match="output 'y0': torch is off onnxruntime by"):
            check_equal(to_torch(case.model(factor=OFF)), model, samples)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_attributes_show(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    module = to_torch(case.but(**MISTAKES[name]).model())
    with pytest.raises(ValidationError, match="output 'y0'"):
        check_equal(module, case.model(), case.samples())


def test_names_of_cases_are_unique() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names), sorted(n for n in names if names.count(n) > 1)


def test_every_operator_has_a_case() -> None:
    elsewhere = {"SequenceAt", "SplitToSequence"}  # in test_cases.py
    assert {case.op for case in CASES} | elsewhere == set(HANDLERS)


def test_families_do_not_overlap() -> None:
    families = (attention, elementwise, linear, normalisation, pooling)
    families += (reductions, resize, shapes)
    assert sum(len(family.HANDLERS) for family in families) == len(HANDLERS)
