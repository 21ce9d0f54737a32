"""Tensors, attributes, operators, and the sizes that follow from them."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.helper import make_attribute, make_node, make_tensor
from onnx.numpy_helper import from_array

from onnxcomp.errors import InvalidModelError, UnsupportedModelError
from onnxcomp.loading.limits import LoadLimits
from onnxcomp.loading.tensors import check_tensor
from tests.corpus import build
from tests.corpus.build import weight
from tests.loading.graphs import TRUE, branch, choice, function_model, refused

RELU = make_node("Relu", ["x"], ["y"])

# --- tensors -----------------------------------------------------------------------------

ALL_TYPES = sorted(set(TensorProto.DataType.values()) - {0, TensorProto.STRING})


@pytest.mark.parametrize("data_type", ALL_TYPES)
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_every_dtype_passes_with_its_payload_and_not_with_another(data_type, raw, count):
    dtype = onnx.helper.tensor_dtype_to_np_dtype(data_type)
    array = np.arange(count).astype(np.float32).astype(dtype)
    tensor = from_array(array, "t") if raw else make_tensor("t", data_type, [count], array)
    assert tensor.HasField("raw_data") == raw or count == 0
    check_tensor(tensor, "t", LoadLimits())
    tensor.dims[0] = count + 4
    with pytest.raises(InvalidModelError, match="payload"):
        check_tensor(tensor, "t", LoadLimits())


def test_strings_must_be_text(read):
    tensor = make_tensor("s", TensorProto.STRING, [2], [b"a", b"b"])
    assert read(build.nodes(RELU, weights=[tensor]))
    tensor.string_data[1] = b"\xff"
    refused(read, build.nodes(RELU, weights=[tensor]), "not UTF-8")
    raw = TensorProto(name="s", data_type=TensorProto.STRING, dims=[1], raw_data=b"a")
    refused(read, build.nodes(RELU, weights=[raw]), "payload")


def test_contradicting_payloads_are_refused(read):
    tensor = weight(16, 16)
    tensor.float_data.append(1.0)
    refused(read, build.matmul(tensor), "payload")
    tensor = weight(16, 16)
    tensor.external_data.add(key="location", value="ok.bin")
    refused(read, build.matmul(tensor), "not marked external")
    tensor.data_location = TensorProto.EXTERNAL
    refused(read, build.matmul(tensor), "cannot hold")
    tensor = weight(16, 16)
    tensor.segment.begin = 0
    refused(read, build.matmul(tensor), "segment", UnsupportedModelError)


def test_tensors_everywhere_are_checked(read):
    bad = TensorProto(name="c", data_type=1, dims=[4])
    constant = make_node("Constant", [], ["c"], value=bad)
    refused(read, build.nodes(constant, RELU), "'value' of node 'c'")
    then = branch(make_node("Relu", ["x"], ["t"]), output="t", weights=[bad])
    refused(read, choice(then), "initializer 'c'")
    model = function_model(constant, make_node("Relu", ["a"], ["b"]))
    refused(read, model, "'value' of node 'c'")


# --- attributes and operators ------------------------------------------------------------


def test_attributes_are_well_formed(read):
    def leaky(*attributes: onnx.AttributeProto) -> bytes:
        node = make_node("LeakyRelu", ["x"], ["y"])
        node.attribute.extend(attributes)
        return build.nodes(node)

    alpha = make_attribute("alpha", 0.1)
    assert read(leaky(alpha))
    refused(read, leaky(alpha, alpha), "given twice")
    refused(read, leaky(make_attribute("alpha", 1)), "wrong type")
    refused(read, leaky(onnx.AttributeProto(name="alpha", f=0.1)), "of type 0")
    refused(read, leaky(onnx.AttributeProto(name="alpha", type=1, f=0.1, i=3)), "holds")
    empty = onnx.AttributeProto(name="k", type=onnx.AttributeProto.TENSOR)
    refused(read, leaky(empty), "holds")
    refused(read, leaky(*(make_attribute(f"a{i}", 1) for i in range(65))), "65 attributes")


def test_arity_and_required_attributes_follow_the_operator_set(read):
    refused(read, build.nodes(make_node("Relu", ["x", "x"], ["y"])), "1 to 1")
    refused(read, build.nodes(make_node("Add", ["x"], ["y"])), "2 to 2")
    refused(read, build.nodes(make_node("Concat", ["x"], ["y"])), "lacks attribute 'axis'")
    model = build.model(build.graph([make_node("Gelu", ["x"], ["y"])]), opset=19)
    refused(read, model, "opset 19 has no operator", UnsupportedModelError)
    model.opset_import[0].version = 20
    assert read(model)


@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [3, 3]},
        {"pads": [4096, 0, 0, 0], "strides": [2, 1], "dilations": [1, 2]},
        {"group": 2},
        {"auto_pad": "SAME_UPPER"},
    ],
)
def test_sound_conv_attributes(attributes, read):
    assert read(build.conv(**attributes)())


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"kernel_shape": [3]}, "kernel_shape"),
        ({"pads": [4097, 0, 0, 0]}, "pads"),
        ({"pads": [-1, 0, 0, 0]}, "pads"),
        ({"pads": [1, 1]}, "pads .* needs 4 entries"),
        ({"strides": [1]}, "strides .* needs 2 entries"),
        ({"dilations": [0, 1]}, "dilations"),
        ({"group": 3}, "group 3 does not divide"),
        ({"group": -4}, "group -4"),
        ({"auto_pad": "SOME"}, "auto_pad"),
    ],
)
def test_broken_conv_attributes(attributes, says, read):
    refused(read, build.conv(**attributes)(), says)


@pytest.mark.parametrize(
    ("operator", "dims", "attributes", "bias", "says"),
    [
        ("ConvTranspose", (4, 2, 3, 3), {"group": 2}, 4, None),
        ("ConvTranspose", (4, 2, 3, 3), {"group": 2}, 2, "does not fit 4 channels"),
        ("ConvTranspose", (4, 2, 3, 3), {"output_padding": [9999, 0]}, 2, "output_padding"),
        ("Conv", (8, 4, 3, 3), {}, 8, None),
        ("Conv", (8, 4, 3, 3), {}, 4, "does not fit 8 channels"),
        ("Conv", (8, 4), {}, 8, "is not"),
        ("Conv", (8, 4, 0, 3), {}, 8, "is not"),
    ],
)
def test_conv_weights(operator, dims, attributes, bias, says, read):
    node = make_node(operator, ["x", "w", "b"], ["y"], **attributes)
    weights = [weight(*dims), weight(bias, name="b")]
    model = build.model(build.graph([node], weights, x=(1, 4, 8, 8), y=4))
    if says is None:
        assert read(model)
    else:
        refused(read, model, says)


def test_weights_in_constant_nodes_and_around_branches_are_checked_too(read):
    constant = make_node("Constant", [], ["w"], value=weight(4, 4, 3, 3))
    conv = make_node("Conv", ["x", "w"], ["y"], kernel_shape=[5, 5])
    model = build.model(build.graph([constant, conv], x=(1, 4, 8, 8), y=4))
    refused(read, model, "kernel_shape")
    inner = make_node("Conv", ["x", "w"], ["t"], group=3)
    weights = [TRUE, weight(4, 4, 3, 3)]
    refused(read, choice(branch(inner, output="t"), weights=weights), "group 3")


def test_pooling_attributes(read):
    def pool(**attributes: object) -> onnx.ModelProto:
        node = make_node("MaxPool", ["x"], ["y"], **attributes)
        return build.model(build.graph([node], x=(1, 4, 8, 8), y=4))

    assert read(pool(kernel_shape=[2, 2], strides=[2, 2]))
    refused(read, pool(kernel_shape=[0, 2]), "kernel_shape")
    refused(read, pool(kernel_shape=[2, 2], pads=[0, 0, 0, 2**31]), "pads")
    refused(read, pool(strides=[2, 2]), "lacks attribute 'kernel_shape'")


def test_batch_norm_statistics(read):
    def norm(
        variance: object, *, epsilon: float = 1e-5, scale: tuple[int, ...] = (4,)
    ) -> onnx.ModelProto:
        weights = [weight(*scale, name="s"), weight(4, name="b"), weight(4, name="m")]
        weights.append(from_array(np.asarray(variance, np.float32), "v"))
        inputs = ["x", "s", "b", "m", "v"]
        node = make_node("BatchNormalization", inputs, ["y"], epsilon=epsilon)
        return build.model(build.graph([node], weights, x=(1, 4, 8, 8), y=4))

    assert read(norm([1, 1, 0, 1]))
    refused(read, norm([1, 1, -1, 1]), "'v' holds -1.0")
    refused(read, norm([1, 1, np.nan, 1]), "'v' holds nan")
    refused(read, norm([1, 1, 1, 1], epsilon=float("nan")), "epsilon")
    refused(read, norm([1, 1, 1, 1], scale=(5,)), "differ")
    refused(read, norm([1, 1, 1, 1], scale=(4, 1)), "differ")


def test_matrices_have_two_axes(read):
    gemm = make_node("Gemm", ["x", "w"], ["y"])
    assert read(build.nodes(gemm, weights=[weight(16, 16)]))
    refused(read, build.nodes(gemm, weights=[weight(16, 16, 1)]), "input 1 has shape")
    matmul, scalar = make_node("MatMul", ["x", "w"], ["y"]), np.array(1, np.float32)
    refused(read, build.nodes(matmul, weights=[from_array(scalar, "w")]), "input 1")


def test_infinity_is_a_mask_but_no_weight(read):
    mask = from_array(np.full((1, 16), -np.inf, np.float32), "w")
    add = make_node("Add", ["x", "w"], ["y"])
    assert read(build.nodes(add, weights=[mask]))
    mask.dims[:] = [16, 1]
    refused(read, build.matmul(mask), "'w' holds -inf")
    mask.raw_data = np.full(16, np.nan, np.float32).tobytes()
    refused(read, build.nodes(add, weights=[mask]), "'w' holds nan")


# --- sizes -------------------------------------------------------------------------------

HALF, WHOLE = 2**30, 2**31


def integers(*values: int) -> TensorProto:
    return from_array(np.array(values, np.int64), "n")


def floats(*values: float) -> TensorProto:
    return from_array(np.array(values, np.float32), "n")


@pytest.mark.parametrize(
    ("operator", "inputs", "sound", "huge"),
    [
        ("Tile", "x n", integers(WHOLE // 16, 1), integers(WHOLE // 8, 1)),
        ("Expand", "x n", integers(WHOLE // 16, 16), integers(WHOLE, 16)),
        ("ConstantOfShape", "n", integers(2, HALF), integers(4, HALF)),
        ("Pad", "x n", integers(0, 0, 0, HALF), integers(0, 0, 1, WHOLE)),
        ("Upsample", "x n", floats(1, HALF / 8), floats(1, HALF)),
        ("Upsample", "x n", floats(1, 2), floats(1, np.inf)),
        ("Upsample", "x n", floats(1, 2), floats(1, -1)),
        ("Resize", "x - n", floats(1, 100), floats(1, 1e30)),
        ("Resize", "x - - n", integers(1, 99), integers(9, WHOLE)),
    ],
)
def test_operators_that_make_large_tensors(operator, inputs, sound, huge, read):
    names = [name.strip("-") for name in inputs.split()]
    node = make_node(operator, names, ["y"])

    def model(constant: TensorProto) -> onnx.ModelProto:
        opset = 9 if operator == "Upsample" else 17
        return build.model(build.graph([node], [constant]), opset=opset)

    assert read(model(sound))
    refused(read, model(huge), "elements|scales")


def test_random_tensors_and_ranges_are_bounded(read):
    def ranged(*ends: float) -> bytes:
        scalars = [
            from_array(np.array(end, np.float32), name)
            for name, end in zip("abc", ends, strict=True)
        ]
        return build.nodes(make_node("Range", ["a", "b", "c"], ["y"]), weights=scalars, y=1)

    def random(*shape: int) -> bytes:
        return build.nodes(make_node("RandomNormal", [], ["y"], shape=shape))

    assert read(ranged(0, 1e3, 1e-3))
    refused(read, ranged(0, 1e9, 1e-3), "elements")
    refused(read, ranged(0, 1, 0), "step 0")
    assert read(random(4, 4))
    refused(read, random(WHOLE, 4), "elements")


def test_sizes_pass_through_elementwise_operators(read):
    def chain(length: int) -> bytes:
        nodes, name = [], "x"
        for i in range(length):
            nodes += [
                make_node("Concat", [name] * 9, [f"c{i}"], axis=-1),
                make_node("Relu", [f"c{i}"], [f"r{i}"]),
                make_node("Add", [f"r{i}", f"c{i}"], [f"a{i}"]),
            ]
            name = f"a{i}"
        return build.nodes(*nodes, make_node("Neg", [name], ["y"]))

    assert read(chain(8))
    refused(read, chain(9), "'c8'")


def test_declared_inputs_are_bounded_and_unknown_dims_are_fine(read):
    def declared(*dims: int | str) -> onnx.ModelProto:
        return build.model(build.graph([RELU], x=dims))

    assert read(declared("batch", 16))
    assert read(declared(-1, 16))
    refused(read, declared(WHOLE, 2), "input 'x'")
    refused(read, declared(*[1] * 9), "9 dimensions")
