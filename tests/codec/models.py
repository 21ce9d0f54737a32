"""Models that the tests of packed files use."""

import numpy as np
import onnx
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from onnx.numpy_helper import from_array

from onnxcomp.model import Model


def model_of(arrays: dict[str, np.ndarray]) -> Model:
    """A model that has these initializers; its graph runs, and reads none of them."""
    x, y = (make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"]) for name in "xy")
    graph = make_graph([make_node("Relu", ["x"], ["y"])], "graph", [x], [y])
    graph.initializer.extend(from_array(np.asarray(a), name) for name, a in arrays.items())
    graph.initializer.extend([onnx.helper.make_tensor("words", 8, [2], [b"one", b"two"])])
    graph.doc_string = "a graph"
    proto = make_model(graph, opset_imports=[make_opsetid("", 17)], ir_version=8)
    proto.metadata_props.add(key="author", value="nobody")
    return Model.from_proto(proto)


def every_kind(seed: int = 0) -> Model:
    """A model whose tensors are stored in every way there is."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(32, 32, 3, 4))
    smooth = noise[..., 1:] + noise[..., :-1]
    sparse = np.where(np.arange(9000) % 900 < 850, 0, rng.integers(-3, 4, 9000))
    long = np.rint(20 * rng.laplace(size=20_000)).astype(np.float32) + 0.0
    return model_of(
        {
            "planes": rng.normal(size=(20, 30)).astype(np.float32),
            "half": rng.normal(size=(20, 30)).astype(np.float16),
            "contexts": (np.rint(2 * smooth) / 8).astype(np.float32),
            "runs": sparse.astype(np.float32),
            "escapes": long.reshape(200, 100),
            "repeated": np.tile(rng.integers(0, 256, 50, np.uint8), 40),
            "waves": np.tile(rng.normal(size=300), 8).astype(np.float32),
            "bytes": rng.integers(-9, 9, (30, 30)).astype(np.int8),
            "again": np.arange(600, dtype=np.float32) / 7,
            "and_again": (np.arange(600, dtype=np.float32) / 7).reshape(20, 30),
            "constant": np.full((300, 3), -0.0, np.float32),
            "small": np.arange(3, dtype=np.int64),
            "scalar": np.float32(2.5),
            "empty": np.zeros((0, 4), np.float32),
        }
    )
