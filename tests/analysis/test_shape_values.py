"""Numbers of shape tensors are traced to constants and to sizes of axes."""

import numpy as np
import pytest

from onnxcomp.analysis.atoms import Atoms
from onnxcomp.analysis.constants import Constants
from onnxcomp.analysis.shape_values import CONSTANT, Element, ShapeValues
from onnxcomp.model import Model
from onnxcomp.runtime import capture_tensors
from tests.analysis.channel_graphs import Graph, feeds


def _values(model: Model) -> ShapeValues:
    values = ShapeValues(Constants(model), capture_tensors(model, feeds(model)[0]))
    for node in model.nodes:
        values.follow(node)
    return values


def _dim(axis: int) -> Element:
    return Element(dim=("x", axis), depends=frozenset([("x", axis)]))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda g, s: g.op("Gather", s, g.ints(2, -3)), [_dim(2), _dim(1)]),
        (lambda g, s: g.op("Slice", s, g.ints(1), g.ints(3)), [_dim(1), _dim(2)]),
        (lambda g, s: g.op("Concat", s, g.ints(7), axis=0), [*map(_dim, range(4)), CONSTANT]),
        (lambda g, s: g.op("Cast", s, to=1), [*map(_dim, range(4))]),
        (lambda g, s: g.op("Reshape", s, g.ints(2, 2)), [*map(_dim, range(4))]),
        (
            lambda g, s: g.op("Mul", s, g.ints(1, 2, 1, 1)),
            [Element(depends=frozenset([("x", axis)])) for axis in range(4)],
        ),
        (
            lambda g, s: g.op("ReduceProd", s, keepdims=0),
            [Element(depends=frozenset(("x", axis) for axis in range(4)))],
        ),
    ],
)
def test_numbers_are_traced(build: object, expected: list[Element]) -> None:
    g = Graph(3, 4, 5)
    out = build(g, g.op("Shape", "x"))
    elements = _values(g.model(out)).elements(out)
    assert elements is not None
    assert elements.reshape(-1).tolist() == expected


def test_data_are_not_traced() -> None:
    g = Graph(3, 4, 5)
    scaled = g.op("Mul", "x", g.op("Cast", g.op("Size", "x"), to=1))
    values = _values(g.model(scaled))
    assert values.elements(scaled) is None
    assert values.elements("x") is None


def test_constants_are_found_through_identity_and_computation() -> None:
    g = Graph(3, 4, 5)
    weight = g.w(3)
    same = g.op("Identity", weight)
    pads = g.op("Add", g.ints(1, 2), g.ints(3, 4))
    noise = g.op("RandomNormal", shape=[3])
    model = g.model(g.op("Add", "x", "x"), same, pads, noise)
    constants = Constants(model)
    assert {weight, same, pads} <= constants.names
    assert noise not in constants.names
    assert constants.origin(same) == weight
    assert constants.origin(pads) is None
    assert constants.exposed(weight) == f"'{weight}' is a graph output"
    np.testing.assert_array_equal(_values(model).fixed(pads), [4, 6])


def test_atoms_join_into_classes_and_keep_all_reasons() -> None:
    atoms = Atoms()
    a, b = atoms.fresh(3), atoms.fresh(3, "why")
    atoms.join(a[:2], b[1:])
    atoms.pin(a[:1], "again")
    assert atoms.roots(np.concatenate([a, b])).tolist() == [0, 1, 2, 3, 0, 1]
    assert atoms.reasons() == {0: ("why", "again"), 1: ("why",), 3: ("why",)}
