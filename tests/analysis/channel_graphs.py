"""A builder of small graphs with random weights."""

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxcomp.model import Array, Model

LAST = np.iinfo(np.int64).max


class Graph:
    """Collects nodes and random weights; tensors are named by their operator."""

    def __init__(self, *shape: int, opset: int = 17, seed: int = 0) -> None:
        self.shape, self.opset = shape, opset
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Array] = {}
        self.rng = np.random.default_rng(seed)

    def w(self, *shape: int, name: str = "w") -> str:
        scale = max(np.prod(shape[1:], dtype=int), 1) ** -0.5
        return self.constant(
            (self.rng.standard_normal(shape) * scale).astype(np.float32), name
        )

    def constant(self, value: object, name: str = "c") -> str:
        name = f"{name}{len(self.weights)}"
        self.weights[name] = np.asarray(value)
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64), "i")

    def op(self, op: str, *inputs: str, **attrs: object) -> str:
        return self.ops(op, *inputs, outputs=1, **attrs)[0]

    def ops(self, op: str, *inputs: str, outputs: int, **attrs: object) -> list[str]:
        names = [f"{op.lower()}{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, **attrs))
        return names

    def conv(self, x: str, inputs: int, outputs: int, *, kernel: int = 3, **attrs: int) -> str:
        weight = self.w(outputs, inputs // attrs.get("group", 1), kernel, kernel)
        half = kernel // 2
        return self.op("Conv", x, weight, self.w(outputs), pads=[half] * 4, **attrs)

    def bn(self, x: str, size: int) -> str:
        variance = self.constant(self.rng.uniform(0.5, 2, size).astype(np.float32), "var")
        names = [self.w(size) for _ in range(3)]
        return self.op("BatchNormalization", x, *names, variance)

    def target(self, x: str, axis: int, *rest: int) -> str:
        """[size of x's axis, *rest], computed at run time as exporters do."""
        size = self.op("Gather", self.op("Shape", x), self.constant(np.array(axis)))
        return self.op("Concat", self.vector(size), self.ints(*rest), axis=0)

    def vector(self, x: str) -> str:
        if self.opset < 13:
            return self.op("Unsqueeze", x, axes=[0])
        return self.op("Unsqueeze", x, self.ints(0))

    def mean(self, x: str) -> str:
        return self.op("Flatten", self.op("GlobalAveragePool", x))

    def model(self, *outputs: str, domains: tuple[str, ...] = ()) -> Model:
        batch = [helper.make_tensor_value_info("x", 1, ["N", *self.shape])]
        graph = helper.make_graph(
            self.nodes,
            "g",
            batch,
            [onnx.ValueInfoProto(name=name) for name in outputs],
            [numpy_helper.from_array(a, n) for n, a in self.weights.items()],
        )
        opsets = [helper.make_opsetid("", self.opset)]
        opsets += [helper.make_opsetid(domain, 1) for domain in domains]
        proto = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        return Model.from_proto(inferred)


def feeds(model: Model, *batches: int) -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    shape = model.signature.inputs[0].shape[1:]
    return [
        {"x": rng.standard_normal((n, *shape)).astype(np.float32)} for n in batches or (1, 3)
    ]


def head(g: Graph, x: str, inputs: int) -> Model:
    return g.model(g.conv(x, inputs, 3))
