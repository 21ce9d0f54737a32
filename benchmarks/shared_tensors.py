"""The shared-tensor matrix: weights and biases of a chain shared, own or absent.

The network is that of the survey: a 3 x 3 stem to 32 channels, then four 32 -> 32 convolutions
with ReLU, global pooling and a Gemm, weights random; half of the channels go.  Beside the six
combinations: all biases zero and merged by an earlier tool, and one set of BatchNormalization
parameters behind all convolutions.  "Runs" means that onnxruntime executes the result.
"Obeys" means more:

* channel removal equals zeroing the removed channels in the original (relative L2 <= 1e-5; for
  the peer, removed filters are found by comparing those that are left with the original ones);
* exact passes change nothing (relative L2 <= 1e-5, graph optimisation off);
* a weight with one initializer and several readers still has one;
* `compress` passes the validation ladder and stays within its limit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.common import ChildError, Options, Outcome, Table, run_child

Array = npt.NDArray[Any]
CASES = (
    *(
        f"{weight} weight, {bias} bias"
        for weight, bias in itertools.product(("shared", "own"), ("shared", "own", "no"))
    ),
    "own weight, equal biases merged",
    "own weight, shared BatchNorm",
)
OURS = ("prepare and finish", "remove_channels", "factorize", "compress")
PEERS = ("onnxsim python", "onnxsim c++")
TOLERANCE = 1e-5
WIDTH, LAYERS, CLASSES = 32, 4, 10


def run(options: Options) -> Outcome:
    """Run the benchmark; the peer's columns say so where onnxsim is absent."""
    rows = []
    for number, case in enumerate(CASES[::3] if options.quick else CASES):
        path = str(options.work / f"{number}.onnx")
        onnx.save(build(case, seed=options.seed), path)
        row: dict[str, Any] = {"case": case}
        for tool in (*OURS, *PEERS):
            out = str(options.work / f"{number}-{tool.replace(' ', '-')}.onnx")
            try:
                found = run_child(
                    "benchmarks.shared_tensors:treat", path=path, tool=tool, out=out
                )
                row[tool] = found.value
            except ChildError as error:
                row[tool] = {"runs": False, "obeys": False, "why": str(error)}
        rows.append(row)
    cells = [(row["case"], *(_cell(row[tool]) for tool in (*OURS, *PEERS))) for row in rows]
    table = Table("Tensors with several readers", ("case", *OURS, *PEERS), cells)
    notes = []
    for tool in (*OURS, *PEERS):
        runs, obeys = (sum(bool(row[tool][key]) for row in rows) for key in ("runs", "obeys"))
        notes.append(f"{tool}: {runs} of {len(rows)} run, {obeys} obey")
    for row in rows:
        for tool in (*OURS, *PEERS):
            if row[tool]["why"]:
                notes.append(f"{row['case']}, {tool}: {row[tool]['why']}")
    return Outcome(rows, (table,), notes)


def build(case: str, *, seed: int = 0) -> onnx.ModelProto:
    """Return the network of a case; one combination of the matrix."""
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    arrays: dict[str, Array] = {}
    tensor = "x"

    def add(name: str, *shape: int, scale: float = 1.0, mean: float = 0.0) -> str:
        if name not in arrays:
            values = mean + scale * rng.standard_normal(shape)
            arrays[name] = np.asarray(values, np.float32)
        return name

    def node(op: str, inputs: list[str], **attributes: Any) -> str:
        output = f"{op.lower()}{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    shared_weight = case.startswith("shared weight")
    bias_kind = case.partition(", ")[2]
    channels = 3
    for index in range(LAYERS + 1):
        own = f"w{index}" if index == 0 or not shared_weight else "w"
        inputs = [tensor, add(own, WIDTH, channels, 3, 3, scale=(2 / (9 * channels)) ** 0.5)]
        if bias_kind in ("shared bias", "equal biases merged"):
            zero = bias_kind.startswith("equal")  # then the stem's too is the same tensor
            name = "b" if zero or index else "b0"
            inputs.append(add(name, WIDTH, scale=0.0 if zero else 0.1))
        elif bias_kind == "own bias":
            inputs.append(add(f"b{index}", WIDTH, scale=0.1))
        tensor, channels = node("Conv", inputs, pads=[1, 1, 1, 1], kernel_shape=[3, 3]), WIDTH
        if bias_kind == "shared BatchNorm":
            names = [add(n, WIDTH, scale=0.1, mean=m) for n, m in _BATCH_NORM.items()]
            tensor = node("BatchNormalization", [tensor, *names])
        tensor = node("Relu", [tensor])
    tensor = node("Flatten", [node("GlobalAveragePool", [tensor])])
    gemm = [tensor, add("gemm.w", CLASSES, WIDTH, scale=WIDTH**-0.5), add("gemm.b", CLASSES)]
    nodes.append(helper.make_node("Gemm", gemm, ["y"], transB=1))
    graph = helper.make_graph(
        nodes,
        "shared",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", CLASSES])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


_BATCH_NORM = {"bn.scale": 1.0, "bn.bias": 0.2, "bn.mean": 0.0, "bn.var": 1.0}


def treat(*, path: str, tool: str, out: str) -> dict[str, Any]:
    """Let one tool work on a case and judge what it made; runs in a child."""
    treatments: Mapping[str, Callable[[str, str], dict[str, Any]]] = {
        "prepare and finish": _exact,
        "remove_channels": _remove_channels,
        "factorize": _factorize,
        "compress": _compress,
        "onnxsim python": lambda path, out: _peer(path, out, "apply_structured_pruning"),
        "onnxsim c++": lambda path, out: _peer(path, out, "apply_structured_pruning_cpp"),
    }
    return treatments[tool](path, out)


def _exact(path: str, out: str) -> dict[str, Any]:
    import onnxcomp
    from onnxcomp.passes import FINISH, PREPARE

    original = onnxcomp.load(path)
    model = original
    for pass_ in (*PREPARE, *FINISH):
        model = _applied(pass_, model)
    return _verdict(
        original, model, out, reference=original, shares=_shares_still(original, model)
    )


def _remove_channels(path: str, out: str) -> dict[str, Any]:
    """Remove the second half of every free group's channels, without a refit."""
    import onnxcomp
    from onnxcomp.analysis import Analysis
    from onnxcomp.passes.base import Option
    from onnxcomp.passes.remove_channels import RemoveChannels

    original = onnxcomp.load(path)
    facts = Analysis(original)
    chosen, zeroed = {}, {name: np.array(array) for name, array in original.weights.items()}
    for group in facts.channels.groups:
        if group.pinned is not None:
            continue
        gone = np.arange(group.size // 2, group.size)
        chosen[Option(RemoveChannels.name, group.name, "", (group.size // 2,))] = {
            "removed": gone
        }
        for reader in group.readers:
            np.moveaxis(zeroed[reader.weight], reader.axis, 0)[reader.index[gone].ravel()] = 0
    draft = original.edit()
    RemoveChannels().apply(draft, facts, chosen)
    model = draft.seal(by=RemoveChannels.name)
    reference = _with_weights(path, zeroed)
    row = _verdict(
        original, model, out, reference=reference, shares=_shares_still(original, model)
    )
    return row | {"groups": len(chosen)}


def _factorize(path: str, out: str) -> dict[str, Any]:
    """Factorise every node that the pass offers, at its largest rank, from the weights."""
    import onnxcomp
    from onnxcomp.analysis import Analysis
    from onnxcomp.passes.factorize import Factorize

    original = onnxcomp.load(path)
    facts, pass_ = Analysis(original), Factorize(step=1)
    found = pass_.propose(facts)
    best = {o.target: o for o in sorted(found.options, key=lambda o: o.size)}
    draft, dense = original.edit(), {}
    chosen = {}
    for node, option in best.items():
        linear = facts.linears[node]
        kernel = linear.kernel(original.weights[linear.weight])
        chosen[option], dense_kernel = pass_.fit(option, kernel, None)
        dense[linear.weight] = linear.stored(dense_kernel)
    pass_.apply(draft, facts, chosen)
    model = draft.seal(by=pass_.name)
    reference = _with_weights(path, dense)
    row = _verdict(
        original, model, out, reference=reference, shares=_shares_still(original, model)
    )
    return row | {"factorised": len(chosen)}


def _compress(path: str, out: str) -> dict[str, Any]:
    import onnxcomp

    original = onnxcomp.load(path)
    samples = np.random.default_rng(1).standard_normal((128, 3, 32, 32), np.float32)
    settings = onnxcomp.Settings(latency=False, search_threads=1)
    result = onnxcomp.compress(
        original, samples, limits=onnxcomp.Limits(macs=0.5), settings=settings
    )
    row = _verdict(original, result.model, out, reference=None, shares=True)
    obeys = result.report.ladder.passed and result.met
    why = "" if obeys else "; ".join(result.report.notes) or "limit not met"
    return row | {"obeys": row["runs"] and obeys, "why": why}


def _peer(path: str, out: str, entry: str) -> dict[str, Any]:
    """Prune by half with the peer; find what it removed, filter by filter."""
    import onnxruntime
    import onnxsim

    import onnxcomp

    proto = onnx.load(path)
    if "BatchNormalization" in {node.op_type for node in proto.graph.node}:
        proto, _ = onnxsim.simplify(proto)
    onnx.save(proto, out + ".before")
    onnx.save(getattr(onnxsim, entry)(proto, sparsity=0.5), out)
    try:
        session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
        session.run(None, {"x": np.zeros((1, 3, 32, 32), np.float32)})
    except Exception as error:  # whatever the runtime raises is the finding
        why = " ".join(str(error).split())[:200]
        return {"runs": False, "obeys": False, "why": why}
    original, model = onnxcomp.load(out + ".before"), onnxcomp.load(out)
    row = _verdict(original, model, out, reference=None, shares=True)
    if model.file_bytes == original.file_bytes:
        return row | {"obeys": False, "why": "nothing was pruned"}
    zeroed = _zeroed_like(original, model)
    if zeroed is None:
        return row | {"obeys": False, "why": "filters that are left are not the original's"}
    return _verdict(
        original,
        model,
        out,
        reference=_with_weights(out + ".before", zeroed),
        shares=_shares_still(original, model),
    )


def _applied(pass_: Any, model: Any) -> Any:
    from onnxcomp.analysis import Analysis

    facts = Analysis(model)
    proposal = pass_.propose(facts)
    if not proposal.options:
        return model
    draft = model.edit()
    pass_.apply(draft, facts, {option: {} for option in proposal.options})
    return draft.seal(by=pass_.name)


def _zeroed_like(original: Any, pruned: Any) -> dict[str, Array] | None:
    """Return the original's weights with the filters zeroed that `pruned` lacks, or None.

    Channels are followed through the chain: the filters of a node are compared on the inputs
    that are left.  A filter and its bias are zeroed, which silences the channel behind ReLU.
    """
    pairs = zip(original.nodes, pruned.nodes, strict=True)
    zeroed: dict[str, Array] = {}
    kept = np.arange(3)
    for old, new in pairs:
        if old.op != "Conv":
            continue
        before, after = original.weights[old.inputs[1]], pruned.weights[new.inputs[1]]
        if after.shape[1] != len(kept):
            return None
        part = before[:, kept]
        rows = [np.flatnonzero((part == one).all(axis=(1, 2, 3))) for one in after]
        if any(len(row) != 1 for row in rows):
            return None
        kept = np.concatenate(rows)
        gone = np.setdiff1d(np.arange(len(before)), kept)
        for name in old.inputs[1:]:
            array = zeroed.setdefault(name, np.array(original.weights[name]))
            array[gone] = 0
    return zeroed


def _with_weights(path: str, arrays: Mapping[str, Array]) -> Any:
    import onnxcomp

    draft = onnxcomp.load(path).edit()
    for name, array in arrays.items():
        draft.set_weight(name, array)
    return draft.seal(by="benchmark")


def _shares_still(original: Any, model: Any) -> bool:
    """Whether the readers of a shared filter bank that are still there read one tensor."""
    for _, array, uses in original.weight_readers():
        if array.ndim != 4 or len(uses) < 2:
            continue
        readers = [(model.producers.get(use.node.id), use.index) for use in uses]
        read = {n.inputs[i] for n, i in readers if n is not None and n.op == "Conv"}
        if len(read) > 1:
            return False
    return True


def _verdict(
    original: Any, model: Any, out: str, *, reference: Any | None, shares: bool
) -> dict[str, Any]:
    """Save, read back, run, and compare with the reference without graph optimisation."""
    import onnxcomp
    from onnxcomp.drift import drift
    from onnxcomp.errors import OnnxcompError
    from onnxcomp.runtime import Session

    if not Path(out).exists():
        model.save(out)
    feed = {"x": np.random.default_rng(2).standard_normal((2, 3, 32, 32), np.float32)}
    share = model.file_bytes / original.file_bytes
    try:
        outputs = Session(onnxcomp.load(out), optimize=False).run(feed)
    except OnnxcompError as error:
        return {"runs": False, "obeys": False, "bytes": share, "why": str(error)}
    row: dict[str, Any] = {"runs": True, "obeys": shares, "bytes": share, "why": ""}
    if not shares:
        row["why"] = "a shared weight was copied"
    if reference is not None:
        expected = Session(reference, optimize=False).run(feed)
        row["relative_l2"] = max(d.relative_l2 for d in drift(expected, outputs).values())
        if row["relative_l2"] > TOLERANCE:
            row |= {"obeys": False, "why": f"relative L2 {row['relative_l2']:.3g}"}
    return row


def _cell(found: Mapping[str, Any]) -> str:
    if not found["runs"]:
        return "fails to run"
    return f"{'obeys' if found['obeys'] else 'runs only'}, {100 * found['bytes']:.0f} %"
