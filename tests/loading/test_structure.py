"""Names, scopes, order, depth, loops, functions and versions."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.helper import (
    make_node,
    make_opsetid,
    make_sparse_tensor,
    make_tensor,
    make_tensor_sequence_value_info,
)
from onnx.numpy_helper import from_array, to_array

from onnxcomp.errors import UnsupportedModelError
from onnxcomp.loading.limits import LoadLimits
from onnxcomp.loading.structure import walk
from tests.corpus import build
from tests.corpus.build import value, weight
from tests.loading.graphs import TRUE, branch, choice, function_model, loop_in, refused

RELU = make_node("Relu", ["x"], ["y"])

# --- names, scopes, order ---------------------------------------------------------------


def test_initializers_that_are_inputs_are_fine(read):
    model = onnx.ModelProto.FromString(build.matmul(weight(16, 16)))
    model.graph.input.append(value("w", 16, 16))
    model.ir_version, model.opset_import[0].version = 3, 8
    assert read(model).proto == model


def test_absent_optional_inputs_are_fine(read):
    limit = from_array(np.array(1, np.float32), "top")
    assert read(build.nodes(make_node("Clip", ["x", "", "top"], ["y"]), weights=[limit]))


def test_unused_domain_imports_are_fine(read):
    model = build.model(build.graph([RELU]), domains=["ai.onnx.ml", "com.example"])
    assert read(model).foreign_ops == ()


def test_default_domain_has_two_names(read):
    model = build.model(build.graph([make_node("Relu", ["x"], ["y"], domain="ai.onnx")]))
    assert read(model).foreign_ops == ()
    model.opset_import.append(make_opsetid("ai.onnx", 16))
    refused(read, model, "two versions")


def test_branches_see_names_from_outside(read):
    then = branch(make_node("Add", ["a", "w"], ["t"]), output="t")
    outer = make_node("Relu", ["x"], ["a"])
    assert read(choice(then, outer, weights=[TRUE, weight(16)]))
    refused(read, choice(then, outer), "'w', which nothing in the graph makes")


def test_captured_names_count_for_the_order(read):
    inner = branch(make_node("Relu", ["late"], ["t"]), output="t")
    either = make_node("If", ["true"], ["n"], then_branch=inner, else_branch=inner)
    model = onnx.ModelProto.FromString(choice(branch(either, output="n")))
    model.graph.node.append(make_node("Neg", ["x"], ["late"]))
    loaded = read(model)
    assert [node.op_type for node in loaded.proto.graph.node] == ["Neg", "If"]
    assert loaded.reordered
    model.graph.node[1].input[0] = "y"
    refused(read, model, "cycle")


def test_a_branch_that_reads_its_own_result_is_a_cycle(read):
    refused(read, choice(branch(make_node("Relu", ["y"], ["t"]), output="t")), "own output")


def test_branches_are_sorted_too(read):
    then = branch(make_node("Relu", ["a"], ["t"]), make_node("Neg", ["x"], ["a"]), output="t")
    loaded = read(choice(then))
    graphs = {a.name: a.g for a in loaded.proto.graph.node[0].attribute}
    assert [node.op_type for node in graphs["then_branch"].node] == ["Neg", "Relu"]
    assert loaded.warnings == (
        "the nodes of 'then_branch' of node 'y' (If) were not in order and were sorted",
    )


@given(st.permutations(range(12)))
@settings(max_examples=30, deadline=None)
def test_any_order_is_sorted_and_keeps_all_nodes(order):
    names = ["x", *(f"t{i}" for i in range(11)), "y"]
    nodes = [make_node("Add", [names[i], names[i // 2]], [names[i + 1]]) for i in range(12)]
    model = build.model(build.graph([nodes[i] for i in order]))
    structure = walk(model, LoadLimits())
    assert list(model.graph.node) == nodes
    assert bool(structure.warnings) == (list(order) != sorted(order))


def test_large_constants_survive_sorting(read):
    constant = make_node("Constant", [], ["w"], value=weight(16, 16))
    loaded = read(build.nodes(make_node("MatMul", ["x", "w"], ["y"]), constant))
    array = to_array(loaded.proto.graph.node[0].attribute[0].t)
    np.testing.assert_array_equal(array, to_array(weight(16, 16)))


def test_names_are_unique_in_every_body(read):
    twice = [make_node("Relu", ["x"], ["t"]), make_node("Neg", ["x"], ["t"])]
    refused(read, choice(branch(*twice, output="t")), "'t' is defined twice in 'then_branch'")
    assert read(choice(branch(make_node("Relu", ["x"], ["e"]), output="e")))
    refused(read, build.nodes(make_node("Relu", ["x"], ["x"])), "made twice")


def test_outputs_must_be_made(read):
    refused(read, build.nodes(make_node("Relu", ["x"], ["z"])), "'y', which nothing")
    refused(read, build.nodes(make_node("Relu", ["x"], [""])), "no output")
    model = build.model(build.graph([RELU]))
    del model.graph.output[:]
    refused(read, model, "no graph with outputs")


# --- depth, loops, functions -------------------------------------------------------------


def test_eight_nested_ifs_are_read_and_nine_are_not(read):
    assert read(build.nested_ifs(8))
    refused(read, build.nested_ifs(9), "more than 8 deep")


def test_ten_thousand_iterations_are_read_and_one_more_is_not(read):
    assert read(build.loop(10_000))
    refused(read, build.loop(10_001), "10001 loop iterations")


@pytest.mark.parametrize("inner", [100, 101])
def test_nested_loops_multiply(inner, read):
    weights = [TRUE, from_array(np.array(100), "outer"), from_array(np.array(inner), "inner")]
    nested = loop_in([make_node("Relu", ["v_r_y"], ["r_r_y"])], "inner", "r_y")
    model = build.nodes(loop_in([nested], "outer", "y"), weights=weights)
    if inner == 100:
        assert read(model)
    else:
        refused(read, model, "10100 loop iterations")


def test_a_loop_count_may_be_a_constant_node_but_not_computed(read):
    relu = make_node("Relu", ["v_y"], ["r_y"])
    count = make_node("Constant", [], ["n"], value_int=7)
    assert read(build.nodes(count, loop_in([relu], "n", "y"), weights=[TRUE]))
    computed = make_node("Size", ["x"], ["n"])
    for nodes in ([computed, loop_in([relu], "n", "y")], [loop_in([relu], "", "y")]):
        model = build.nodes(*nodes, weights=[TRUE])
        refused(read, model, "decides while it runs", UnsupportedModelError)


def test_functions_are_counted_expanded(read):
    def chain(length: int) -> bytes:
        calls = [(f"F{i}", f"F{i}") for i in range(1, length)]
        return build.functions([*calls, ("Relu", "Relu")])

    # F0 of n functions expands to 2^(n + 1) - 2 nodes.
    assert read(chain(13)).foreign_ops == ()
    refused(read, chain(14), "expands to 32766 nodes")


def test_mutual_recursion_is_found(read):
    calls = [("F1", "Relu"), ("F2", "Relu"), ("F0", "Relu")]
    refused(read, build.functions(calls), "calls itself")
    assert read(build.functions([*calls[:2], ("Relu", "Relu")]))


def test_functions_see_only_their_inputs(read):
    assert read(function_model(make_node("Relu", ["a"], ["b"])))
    refused(read, function_model(make_node("Relu", ["x"], ["b"])), "reads 'x'")
    unknown = function_model(make_node("Nothing", ["a"], ["b"]))
    refused(read, unknown, "no operator 'Nothing'", UnsupportedModelError)
    model = function_model(make_node("Relu", ["a"], ["b"]))
    model.graph.node[0].input.append("x")
    refused(read, model, "takes 0 to 1")
    model.functions.append(model.functions[0])
    refused(read, model, "defined twice")


def test_references_to_attributes_belong_in_functions(read):
    node = make_node("LeakyRelu", ["a"], ["b"])
    reference = onnx.AttributeProto(name="alpha", ref_attr_name="alpha", type=1)
    node.attribute.append(reference)
    assert read(function_model(node, alpha=0.1))
    node.input[0], node.output[0] = "x", "y"
    refused(read, build.nodes(node), "refers to a function's attribute")


def test_loops_in_functions_multiply_with_loops_around_calls(read):
    constants = [
        make_node("Constant", [], ["n"], value_int=1000),
        make_node("Constant", [], ["true"], value=TRUE),
    ]
    inner = loop_in([make_node("Relu", ["v_b"], ["r_b"])], "n", "b")
    inner.input[2] = "a"
    model = function_model(*constants, inner)
    assert read(model)
    call = onnx.NodeProto.FromString(model.graph.node[0].SerializeToString())
    call.input[0], call.output[0] = "v_y", "r_y"
    del model.graph.node[:]
    model.graph.node.append(loop_in([call], "m", "y"))
    model.graph.initializer.extend([TRUE, from_array(np.array(11), "m")])
    refused(read, model, "11000 loop iterations")


# --- versions and parts of a model -------------------------------------------------------


@pytest.mark.parametrize("version", [0, 2, 99])
def test_unknown_ir_versions_are_refused(version, read):
    model = build.model(build.graph([RELU]))
    model.ir_version = version
    refused(read, model, "IR version", UnsupportedModelError)


def test_missing_imports_are_refused(read):
    model = build.model(build.graph([make_node("Relu", ["x"], ["y"], domain="other")]))
    refused(read, model, "does not import")
    del model.opset_import[:]
    refused(read, model, "no operator set")


def test_training_steps_and_sparse_tensors_are_refused(read):
    model = build.model(build.graph([RELU]))
    training = onnx.ModelProto.FromString(model.SerializeToString())
    training.training_info.add()
    refused(read, training, "training", UnsupportedModelError)
    sparse = make_sparse_tensor(
        make_tensor("s", 1, [1], [1.0]), make_tensor("i", 7, [1], [0]), [4]
    )
    model.graph.sparse_initializer.append(sparse)
    refused(read, model, "sparse", UnsupportedModelError)
    constant = make_node("Constant", [], ["s"], sparse_value=sparse)
    refused(read, build.nodes(constant, RELU), "sparse", UnsupportedModelError)


def test_values_that_are_no_tensors_are_read(read):
    model = build.model(build.graph([make_node("SequenceConstruct", ["x"], ["y"])]))
    del model.graph.output[:]
    model.graph.output.append(make_tensor_sequence_value_info("y", 1, None))
    assert read(model)
