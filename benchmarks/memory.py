"""Peak memory on a model of 1 GB with external data: `inspect`, and factorising one layer.

Both run in fresh processes.  Resident memory counts mapped pages of the weight file, which the
kernel can drop at any time; anonymous memory does not.  The goal is a peak of 1.5 times the
files' size.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from benchmarks.child import MemoryWatch
from benchmarks.common import Options, Outcome, Table, count, run_child

GOAL = 1.5
CONVS, CONV_WIDTH = 9, 1152  # 3 x 3, 47.8 MB each
MATMULS, MATMUL_WIDTH = 9, 4096  # 67.1 MB each
_EXTENT = 4


def run(options: Options) -> Outcome:
    """Run the benchmark."""
    shrink = 4 if options.quick else 1
    path = options.work / "large.onnx"
    build(path, conv_width=CONV_WIDTH // shrink, matmul_width=MATMUL_WIDTH // shrink)
    size = sum(file.stat().st_size for file in path.parent.glob("large.onnx*"))
    out = str(options.work / "small.onnx")
    inspected = run_child("benchmarks.memory:inspect", path=str(path))
    factorized = run_child("benchmarks.memory:factorize", path=str(path), out=out)
    whole = {
        "step": "inspect",
        "seconds": inspected.seconds,
        "peak_rss": inspected.peak_rss,
        "peak_anonymous": inspected.peak_anonymous,
        "peak_children": inspected.peak_children,
    }
    rows = [{**row, "file_bytes": size} for row in (whole, *factorized.value)]
    cells = [
        (
            row["step"],
            f"{row['seconds']:.1f}",
            f"{count(row['peak_rss'])}B",
            f"{row['peak_rss'] / size:.2f}",
            f"{row['peak_anonymous'] / size:.2f}",
            f"{row['peak_children'] / size:.2f}",
        )
        for row in rows
    ]
    columns = ("step", "seconds", "peak", "of the files", "anonymous", "child process")
    table = Table(f"Memory on {count(size)}B of ONNX with external data", columns, cells)
    notes = []
    for name, part in (("inspect", rows[:1]), ("factorise one layer", rows[1:])):
        worst = max(part, key=lambda row: max(row["peak_rss"], row["peak_children"]))
        share = max(worst["peak_rss"], worst["peak_children"]) / size
        verdict = "met" if share <= GOAL else f"missed, at '{worst['step']}'"
        notes.append(f"{name}: {share:.2f} times the files' size; goal {GOAL}: {verdict}")
    return Outcome(rows, (table,), notes)


def build(path: Path, *, conv_width: int, matmul_width: int, seed: int = 0) -> None:
    """Write a network of 3 x 3 convolutions and MatMul layers with its weights beside it.

    Weights are drawn and written one at a time, so that this takes little memory.
    """
    rng = np.random.default_rng(seed)
    nodes: list[NodeProto] = []
    tensors: list[TensorProto] = []
    tensor = "x"
    with path.with_name(path.name + ".data").open("wb") as stream:

        def weight(name: str, shape: tuple[int, ...], fan_in: int) -> str:
            array = rng.standard_normal(shape, np.float32) * np.float32((2 / fan_in) ** 0.5)
            proto = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
            proto.data_location = TensorProto.EXTERNAL
            for key, value in (
                ("location", path.name + ".data"),
                ("offset", stream.tell()),
                ("length", array.nbytes),
            ):
                proto.external_data.add(key=key, value=str(value))
            array.tofile(stream)
            tensors.append(proto)
            return name

        def node(op: str, *inputs: str, **attributes: Any) -> str:
            output = f"{op.lower()}{len(nodes)}"
            nodes.append(helper.make_node(op, inputs, [output], **attributes))
            return output

        channels = 16
        for index in range(CONVS):
            name = weight(f"conv{index}.weight", (conv_width, channels, 3, 3), channels * 9)
            tensor = node("Relu", node("Conv", tensor, name, pads=[1, 1, 1, 1]))
            channels = conv_width
        tensor = node("Flatten", node("GlobalAveragePool", tensor))
        for index in range(MATMULS):
            name = weight(f"matmul{index}.weight", (channels, matmul_width), channels)
            tensor, channels = node("Relu", node("MatMul", tensor, name)), matmul_width
    nodes.append(helper.make_node("Identity", [tensor], ["y"]))
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16, _EXTENT, _EXTENT])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", matmul_width])],
        tensors,
    )
    opset = [helper.make_opsetid("", 17)]
    path.write_bytes(
        helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString()
    )


def inspect(*, path: str) -> None:
    """Run `onnxcomp inspect`; runs in a child, so that its memory can be read."""
    from onnxcomp.cli import main

    sys.argv = ["onnxcomp", "inspect", path]
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"inspect ended with {ended.code}") from ended


def factorize(*, path: str, out: str) -> list[dict[str, Any]]:
    """Factorise the middle MatMul to a quarter of its rank; runs in a child.

    Returns:
        Every step with its seconds and its peaks of memory, in bytes.
    """
    import onnxcomp
    from onnxcomp.analysis import Analysis
    from onnxcomp.passes.factorize import Factorize

    rows: list[dict[str, Any]] = []
    pass_ = Factorize(forms=("output_basis",))
    with _step("load", rows):
        model = onnxcomp.load(path)
    with _step("analyse", rows):
        facts = Analysis(model)
        linears = [linear for linear in facts.linears.values() if linear.node.op == "MatMul"]
        chosen = linears[len(linears) // 2]
    with _step("propose", rows):
        options = [o for o in pass_.propose(facts).options if o.target == chosen.id]
        option = min(options, key=lambda o: abs(o.size[0] - chosen.out_channels // 4))
    with _step("fit", rows):
        arrays, _ = pass_.fit(option, chosen.kernel(model.weights[chosen.weight]), None)
    with _step("apply and seal", rows):
        draft = model.edit()
        pass_.apply(draft, facts, {option: arrays})
        smaller = draft.seal(by=pass_.name)
    with _step("save", rows):
        smaller.save(out)
    return rows


@contextmanager
def _step(name: str, rows: list[dict[str, Any]]) -> Iterator[None]:
    start = time.monotonic()
    with MemoryWatch() as memory:
        yield
    rows.append(
        {
            "step": name,
            "seconds": time.monotonic() - start,
            "peak_rss": memory.resident,
            "peak_anonymous": memory.anonymous,
            "peak_children": memory.children,
        }
    )
