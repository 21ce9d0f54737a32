"""Small graphs and the checks that every exact pass has to stand."""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import onnx
from onnx import numpy_helper, parser

from onnxcomp.analysis import Analysis
from onnxcomp.model import Array, Model
from onnxcomp.passes.base import Pass, Proposal, run_exact
from onnxcomp.runtime import Session, with_outputs

TOLERANCE = 1e-5  # relative L2, unoptimised onnxruntime


def graph(
    inputs: str,
    outputs: str,
    body: str,
    weights: Mapping[str, Array] | None = None,
    *,
    opset: int = 17,
) -> Model:
    """Parse a graph in ONNX text form and give it initializers."""
    head = f'<ir_version: 8, opset_import: ["" : {opset}]>'
    proto = parser.parse_model(f"{head} g ({inputs}) => ({outputs}) {{ {body} }}")
    for name, array in (weights or {}).items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    onnx.checker.check_model(proto)
    return Model.from_proto(proto)


def run(pass_: Pass, model: Model) -> tuple[Model, Proposal]:
    """Apply a pass; the signature stays, and a second time finds nothing to do."""
    result, proposal = run_exact(pass_, Analysis(model))
    assert result.signature == model.signature
    assert pass_.propose(Analysis(result)).options == ()
    return result, proposal


def ops(model: Model) -> list[str]:
    return [node.op for node in model.nodes]


def reasons(proposal: Proposal) -> dict[str, str]:
    return {refusal.where: refusal.reason for refusal in proposal.refusals}


def drift(before: Model, after: Model, feeds: Mapping[str, Array]) -> float:
    """Largest relative L2 distance between the outputs of two models."""
    wanted = Session(before, optimize=False).run(feeds)
    found = Session(after, optimize=False).run(feeds)
    return max(relative_l2(found[name], wanted[name]) for name in wanted)


def relative_l2(found: Array, wanted: Array) -> float:
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    off, size = np.linalg.norm(found - wanted), np.linalg.norm(wanted)
    assert np.isfinite(size)
    return float(off / max(size, 1e-30))


def inner_drift(before: Model, after: Model, feeds: Mapping[str, Array]) -> float:
    """Largest relative L2 distance over activations that both models name alike."""
    kinds = {"Relu", "LeakyRelu", "PRelu", "Sigmoid", "Tanh", "Clip", "MaxPool", "Softmax"}
    made = [{n.id for n in model.nodes if n.op in kinds} for model in (before, after)]
    names = sorted(made[0] & made[1])
    return drift(with_outputs(before, names), with_outputs(after, names), feeds)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(*shape: int, seed: int = 0) -> Array:
    return rng(seed).standard_normal(shape).astype(np.float32)


def batchnorm(channels: int, prefix: str = "bn", seed: int = 1) -> dict[str, Array]:
    """Scale, bias, mean and variance of a BatchNormalization, none of them trivial."""
    draw = rng(seed)
    return {
        f"{prefix}_s": draw.uniform(0.5, 2, channels).astype(np.float32),
        f"{prefix}_b": draw.standard_normal(channels).astype(np.float32),
        f"{prefix}_m": draw.standard_normal(channels).astype(np.float32),
        f"{prefix}_v": draw.uniform(0.1, 3, channels).astype(np.float32),
    }


def is_sorted(model: Model) -> bool:
    """Whether each node's inputs are made before it."""
    place = {name: i for i, node in enumerate(model.nodes) for name in node.outputs}
    edges = ((place.get(n, -1), i) for i, node in enumerate(model.nodes) for n in node.inputs)
    return all(a < b for a, b in edges) and all(a is not b for a, b in pairwise(model.nodes))
