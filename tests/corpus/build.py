"""Builds the 52 hostile and broken model files, with the outcome that each must have.

`python -m tests.corpus.build FOLDER` writes them to FOLDER/model/NN.onnx. The files are made
as needed and not kept: some are links and pipes, and what a virus scanner thinks of them is
nobody's concern.
"""

import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto
from onnx.helper import (
    make_function,
    make_graph,
    make_model,
    make_node,
    make_opsetid,
    make_tensor_value_info,
)
from onnx.numpy_helper import from_array

FLOAT = TensorProto.FLOAT
OK = "ok"
INVALID = "InvalidModelError"
UNSUPPORTED = "UnsupportedModelError"


@dataclass(frozen=True)
class Case:
    """One file: its number in the list of hostile files, what it is, and what must happen.

    Attributes:
        number: From 1 to 52.
        name: What is wrong with it.
        make: Returns its bytes.
        expected: "ok", or the name of the error that `read_model` must raise.
        says: A part of that error's message, so that it is refused for the right reason.
    """

    number: int
    name: str
    make: Callable[[], bytes]
    expected: str
    says: str = ""


def build(folder: Path) -> dict[int, Path]:
    """Write all cases and the files around them; return the model files by number."""
    inside = folder / "model"
    (inside / "sub").mkdir(parents=True)
    (inside / "ok.bin").write_bytes(bytes(4096))
    (folder / "secret.bin").write_bytes(bytes(4096))
    (inside / "link.bin").symlink_to("../secret.bin")
    (inside / "linked").symlink_to("..")
    (inside / "hard.bin").hardlink_to(folder / "secret.bin")
    os.mkfifo(inside / "pipe.bin")
    (inside / "zero.bin").symlink_to("/dev/zero")
    paths = {case.number: inside / f"{case.number:02d}.onnx" for case in CASES}
    for case in CASES:
        paths[case.number].write_bytes(case.make())
    return paths


def value(name: str, *dims: int | str | None) -> onnx.ValueInfoProto:
    return make_tensor_value_info(name, FLOAT, list(dims))


def weight(*dims: int, name: str = "w") -> TensorProto:
    values = np.random.default_rng(0).standard_normal(dims).astype(np.float32)
    return from_array(values, name)


def graph(
    nodes: Sequence[NodeProto],
    weights: Sequence[TensorProto] = (),
    *,
    x: Sequence[int] = (1, 16),
    y: int = 2,
) -> GraphProto:
    """Return a graph from `x` to `y`, which has so many symbolic dimensions."""
    outputs = [value("y", *(f"d{i}" for i in range(y)))]
    return make_graph(nodes, "g", [value("x", *x)], outputs, weights)


def model(
    content: GraphProto,
    *,
    opset: int = 17,
    domains: Sequence[str] = (),
    functions: object = (),
) -> ModelProto:
    imports = [make_opsetid("", opset), *(make_opsetid(domain, 1) for domain in domains)]
    return make_model(content, opset_imports=imports, ir_version=9, functions=functions)


def matmul(tensor: TensorProto, *, x: Sequence[int] = (1, 16)) -> bytes:
    node = make_node("MatMul", ["x", "w"], ["y"])
    return model(graph([node], [tensor], x=x)).SerializeToString()


def nodes(*content: NodeProto, weights: Sequence[TensorProto] = (), y: int = 2) -> bytes:
    return model(graph(content, weights, y=y)).SerializeToString()


def external(location: str, *dims: int, **entries: str) -> Callable[[], bytes]:
    """Return the maker of a MatMul whose weight of 1024 bytes lies in another file."""

    def make() -> bytes:
        shape = dims or (16, 16)
        tensor = TensorProto(name="w", data_type=FLOAT, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, text in {"location": location, "length": "1024", **entries}.items():
            tensor.external_data.add(key=key, value=text)
        return matmul(tensor, x=(1, shape[0]))

    return make


def raw(dims: Sequence[int], payload: bytes, data_type: int = FLOAT) -> Callable[[], bytes]:
    tensor = TensorProto(name="w", data_type=data_type, dims=dims, raw_data=payload)
    return lambda: matmul(tensor)


def huge_constant_of_shape() -> bytes:
    shape = from_array(np.array([16, 250_000_000]), "s")
    return nodes(
        make_node("ConstantOfShape", ["s"], ["c"]),
        make_node("MatMul", ["x", "c"], ["y"]),
        weights=[shape],
    )


def huge_expand() -> bytes:
    shape = from_array(np.array([2**36, 16]), "s")
    return nodes(make_node("Expand", ["x", "s"], ["y"]), weights=[shape])


def doublings() -> bytes:
    names = ["x", *(f"t{i}" for i in range(39)), "y"]
    chain = [make_node("Concat", [a, a], [b], axis=1) for a, b in pairwise(names)]
    return model(graph(chain, x=(1, 1))).SerializeToString()


def cycle() -> bytes:
    return nodes(make_node("Add", ["x", "b"], ["a"]), make_node("Relu", ["a"], ["b"]),
                 make_node("Relu", ["b"], ["y"]))  # fmt: skip


def foreign(domain: str, operator: str) -> bytes:
    node = make_node(operator, ["x"], ["y"], domain=domain)
    return model(graph([node]), domains=[domain]).SerializeToString()


def functions(callees: Sequence[tuple[str, str]]) -> bytes:
    """Return a model that calls F0; each function calls the two named ones in turn."""
    imports = [make_opsetid("", 17), make_opsetid("local", 1)]
    made = [
        make_function(
            "local",
            f"F{i}",
            ["a"],
            ["c"],
            [
                make_node(one, ["a"], ["b"], domain="local" if one[0] == "F" else ""),
                make_node(two, ["b"], ["c"], domain="local" if two[0] == "F" else ""),
            ],
            imports,
        )
        for i, (one, two) in enumerate(callees)
    ]
    node = make_node("F0", ["x"], ["y"], domain="local")
    return model(graph([node]), domains=["local"], functions=made).SerializeToString()


def nested_ifs(depth: int) -> bytes:
    true = from_array(np.array(True), "true")
    inner = [make_node("Relu", ["x"], ["y"])]
    for level in range(depth):
        other = make_graph(
            [make_node("Identity", ["x"], [f"e{level}"])], "e", [], [value(f"e{level}", 1, 16)]
        )
        name = f"t{level}"
        inner[-1].output[0] = name
        then = make_graph(inner, "t", [], [value(name, 1, 16)])
        inner = [make_node("If", ["true"], ["y"], then_branch=then, else_branch=other)]
    return nodes(*inner, weights=[true])


def loop(trips: int) -> bytes:
    body = make_graph(
        [make_node("Identity", ["go"], ["on"]), make_node("Relu", ["v"], ["r"])],
        "body",
        [
            make_tensor_value_info("i", TensorProto.INT64, []),
            make_tensor_value_info("go", TensorProto.BOOL, []),
            value("v", 1, 16),
        ],
        [make_tensor_value_info("on", TensorProto.BOOL, []), value("r", 1, 16)],
    )
    weights = [from_array(np.array(trips), "trips"), from_array(np.array(True), "true")]
    node = make_node("Loop", ["trips", "true", "x"], ["y"], body=body)
    return nodes(node, weights=weights)


def conv(**attributes: object) -> Callable[[], bytes]:
    def make() -> bytes:
        node = make_node("Conv", ["x", "w"], ["y"], **attributes)
        content = graph([node], [weight(4, 4, 3, 3)], x=(1, 4, 8, 8), y=4)
        return model(content).SerializeToString()

    return make


def not_a_number() -> bytes:
    values = np.ones((16, 16), np.float32)
    values[3, 5] = np.nan
    return matmul(from_array(values, "w"))


def two_weights_of_one_name() -> bytes:
    node = make_node("MatMul", ["x", "w"], ["y"])
    return model(graph([node], [weight(16, 16), weight(16, 16)])).SerializeToString()


def new_opset() -> bytes:
    return model(graph([make_node("Relu", ["x"], ["y"])]), opset=9999).SerializeToString()


def long_chain() -> bytes:
    names = ["x", *(f"t{i}" for i in range(99_999)), "y"]
    return nodes(*(make_node("Relu", [a], [b]) for a, b in pairwise(names)))


def field(number: int, content: bytes) -> bytes:
    """Return a length-delimited protobuf field."""
    length, size = bytearray(), len(content)
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + content


def nested_messages(depth: int) -> bytes:
    """Return graph > node > attribute > graph > ..., which no serializer would write."""
    content = b""
    for _ in range(depth):
        content = field(1, field(5, field(6, content)))
    return b"\x08\x09" + field(7, content)


def lying_length() -> bytes:
    return b"\x08\x09\x3a\x80\xfc\xff\x89\x07" + bytes(64)  # 1.9 GB of graph announced


def packed_dims() -> bytes:
    tensor = field(1, b"\x01" * 20_000_000)
    return b"\x08\x09" + field(7, field(5, tensor))


CASES: tuple[Case, ...] = (
    Case(1, "control: ordinary initializer", lambda: matmul(weight(16, 16)), OK),
    Case(2, "external data, ordinary", external("ok.bin"), OK),
    Case(3, "external ../secret.bin", external("../secret.bin"), INVALID, "plain path"),
    Case(4, "external sub/../..", external("sub/../../secret.bin"), INVALID, "plain path"),
    Case(5, "external absolute path", external("/etc/passwd"), INVALID, "plain path"),
    Case(6, "external symlink to outside", external("link.bin"), INVALID, "not a link"),
    Case(7, "external symlinked folder", external("linked/secret.bin"), INVALID, "not a link"),
    Case(8, "external hard link to outside", external("hard.bin"), INVALID, "one name"),
    Case(9, "external FIFO", external("pipe.bin"), INVALID, "ordinary file"),
    Case(10, "external symlink to /dev/zero", external("zero.bin"), INVALID, "not a link"),
    Case(11, "external file missing", external("none.bin"), INVALID, "No such file"),
    Case(12, "external offset -4", external("ok.bin", offset="-4"), INVALID, "offset '-4'"),
    Case(13, "external past the end", external("ok.bin", offset="4000"), INVALID, "has 4096"),
    Case(
        14, "external length 2^50", external("ok.bin", length=str(2**50)), INVALID, "declares"
    ),
    Case(
        15,
        "unknown external keys",
        external("ok.bin", __class__="x", basepath="/"),
        INVALID,
        "external keys",
    ),
    Case(
        16,
        "external marker of memory addresses",
        external("*/_ORT_MEM_ADDR_/*"),
        INVALID,
        "cannot be read",
    ),
    Case(17, "external shorter than dims", external("ok.bin", 64, 64), INVALID, "16384"),
    Case(18, "raw data shorter than dims", raw([16, 16], bytes(4)), INVALID, "payload"),
    Case(19, "dims overflow int64", raw([2**40, 2**40], bytes(4)), INVALID, "elements"),
    Case(20, "negative dim", raw([-1, 16], bytes(64)), INVALID, "negative dimension"),
    Case(21, "unknown data type", raw([16, 16], bytes(1024), 250), INVALID, "data type 250"),
    Case(22, "ConstantOfShape, 4e9 elements", huge_constant_of_shape, INVALID, "elements"),
    Case(23, "Expand to 2^40 elements", huge_expand, INVALID, "elements"),
    Case(24, "40 doublings by Concat", doublings, INVALID, "elements"),
    Case(25, "cycle of two nodes", cycle, INVALID, "cycle"),
    Case(
        26,
        "self loop",
        lambda: nodes(make_node("Add", ["x", "y"], ["y"])),
        INVALID,
        "its own output",
    ),
    Case(
        27,
        "two nodes with one output name",
        lambda: nodes(make_node("Relu", ["x"], ["y"]), make_node("Neg", ["x"], ["y"])),
        INVALID,
        "twice",
    ),
    Case(
        28,
        "dangling input",
        lambda: nodes(make_node("Add", ["x", "nowhere"], ["y"])),
        INVALID,
        "'nowhere'",
    ),
    Case(
        29,
        "unsorted nodes",
        lambda: nodes(make_node("Relu", ["a"], ["y"]), make_node("Neg", ["x"], ["a"])),
        OK,
    ),
    Case(
        30,
        "unknown operator",
        lambda: nodes(make_node("Frobnicate", ["x"], ["y"])),
        UNSUPPORTED,
        "no operator 'Frobnicate'",
    ),
    Case(31, "custom operator", lambda: foreign("com.example", "Secret"), OK),
    Case(32, "com.microsoft operator", lambda: foreign("com.microsoft", "QuickGelu"), OK),
    Case(
        33, "recursive function", lambda: functions([("F0", "Relu")]), INVALID, "calls itself"
    ),
    Case(
        34,
        "function bomb",
        lambda: functions([(f"F{i}", f"F{i}") for i in range(1, 25)] + [("Relu", "Relu")]),
        INVALID,
        "expands to",
    ),
    Case(35, "If nested 14 deep", lambda: nested_ifs(14), INVALID, "nested"),
    Case(36, "If nested 18 deep", lambda: nested_ifs(18), INVALID, "nested"),
    Case(37, "Loop of 2^60 iterations", lambda: loop(2**60), INVALID, "loop iterations"),
    Case(
        38, "Conv kernel_shape 9x9, W 3x3", conv(kernel_shape=[9, 9]), INVALID, "kernel_shape"
    ),
    Case(39, "Conv group 0", conv(group=0), INVALID, "group 0"),
    Case(40, "Conv stride 0", conv(strides=[0, 1]), INVALID, "strides"),
    Case(41, "Conv pads 2^31", conv(pads=[2**31, 0, 0, 0]), INVALID, "pads"),
    Case(42, "NaN in a weight", not_a_number, INVALID, "'w' holds nan"),
    Case(43, "initializers of one name", two_weights_of_one_name, INVALID, "twice"),
    Case(44, "opset 9999", new_opset, UNSUPPORTED, "opset 9999"),
    Case(45, "100,000 nodes in a chain", long_chain, INVALID, "nodes"),
    Case(46, "empty file", bytes, INVALID, "empty"),
    Case(47, "random bytes", lambda: random.Random(0).randbytes(4096), INVALID, "ONNX"),
    Case(48, "truncated", lambda: matmul(weight(16, 16))[:-200], INVALID, "truncated"),
    Case(49, "nested 1000 deep", lambda: nested_messages(1000), INVALID, "nested"),
    Case(50, "nested 60 deep", lambda: nested_messages(60), INVALID, "nested"),
    Case(51, "length prefix lies", lying_length, INVALID, "truncated"),
    Case(52, "20 MB of packed dims", packed_dims, INVALID, "dimensions"),
)


if __name__ == "__main__":
    for number, path in build(Path(sys.argv[1])).items():
        print(number, path, path.stat().st_size)
