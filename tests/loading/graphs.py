"""Small graphs and checks that the tests of loading share."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.helper import (
    make_function,
    make_graph,
    make_node,
    make_opsetid,
    make_tensor_value_info,
)
from onnx.numpy_helper import from_array

from onnxcomp.errors import InvalidModelError
from tests.corpus import build
from tests.corpus.build import value

TRUE = from_array(np.array(True), "true")


def refused(
    read: Callable[[onnx.ModelProto | bytes], object],
    model: onnx.ModelProto | bytes,
    says: str,
    error: type[Exception] = InvalidModelError,
) -> None:
    """Assert that a model is refused for this reason."""
    with pytest.raises(error, match=says):
        read(model)


def branch(
    *nodes: onnx.NodeProto, output: str, weights: Sequence[TensorProto] = ()
) -> onnx.GraphProto:
    return make_graph(nodes, "branch", [], [value(output, 1, 16)], weights)


def choice(
    then: onnx.GraphProto, *before: onnx.NodeProto, weights: Sequence[TensorProto] = (TRUE,)
) -> bytes:
    """Return `y = If(true) then ... else Identity(x)`."""
    other = branch(make_node("Identity", ["x"], ["e"]), output="e")
    node = make_node("If", ["true"], ["y"], then_branch=then, else_branch=other)
    return build.nodes(*before, node, weights=weights)


def loop_in(body_nodes: Sequence[onnx.NodeProto], trips: str, result: str) -> onnx.NodeProto:
    """Return a Loop over `x`; for result "a", its body makes "r_a" from "v_a"."""
    body = make_graph(
        [make_node("Identity", [f"go_{result}"], [f"on_{result}"]), *body_nodes],
        "body",
        [
            make_tensor_value_info(f"i_{result}", TensorProto.INT64, []),
            make_tensor_value_info(f"go_{result}", TensorProto.BOOL, []),
            value(f"v_{result}", 1, 16),
        ],
        [make_tensor_value_info(f"on_{result}", TensorProto.BOOL, []), value(f"r_{result}")],
    )
    return make_node("Loop", [trips, "true", "x"], [result], body=body)


def function_model(*nodes: onnx.NodeProto, **attributes: object) -> onnx.ModelProto:
    """Return a model that calls one local function from "a" to "b", with one attribute."""
    imports = [make_opsetid("", 17), make_opsetid("local", 1)]
    function = make_function("local", "F", ["a"], ["b"], nodes, imports, ["alpha"])
    call = make_node("F", ["x"], ["y"], domain="local", **attributes)
    return build.model(build.graph([call]), domains=["local"], functions=[function])


def two_matmuls(*weights: TensorProto) -> onnx.ModelProto:
    """Return `y = x a b`."""
    nodes = [make_node("MatMul", ["x", "a"], ["t"]), make_node("MatMul", ["t", "b"], ["y"])]
    return build.model(build.graph(nodes, weights))


def loop_of_unknown_length() -> bytes:
    """Return a Loop that runs as often as `x` has elements."""
    loop = loop_in([make_node("Relu", ["v_y"], ["r_y"])], "n", "y")
    return build.nodes(make_node("Size", ["x"], ["n"]), loop, weights=[TRUE])


def weight_with(number: float) -> bytes:
    """Return `y = x w`, where `w` holds this number once."""
    values = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    values[3, 5] = number
    return build.matmul(from_array(values, "w"))
