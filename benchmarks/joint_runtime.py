"""Common factors at run time: latency, resident memory and file size, and time to factorise.

Repeated 3 x 3 layers, with a Relu behind each, of the shape where memory counts most (eight of
512 channels at 7 x 7), and the ResNet-34 and ResNet-50 builders: whole, with factors of their
own, with the first factor in common, and with the last one.  Ranks are half of the channels.
At last, the seconds that all groups of ResNet-50 take from the weights alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import onnxcomp
from benchmarks.child import read_status
from benchmarks.common import (
    Options,
    Outcome,
    SkippedError,
    Table,
    interval,
    run_child,
    versions,
)
from onnxcomp.analysis import Analysis
from onnxcomp.analysis.probe import random_inputs
from onnxcomp.bench import paired_latency
from onnxcomp.numerics.joint_svd import JOINT_FORMS, Member
from onnxcomp.passes.base import Arrays, Option
from onnxcomp.passes.chains import kernel_shape4, to_plane
from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.factorize_jointly import FactorizeJointly, arrays_of
from onnxcomp.passes.working import finish, prepare
from onnxcomp.runtime import Session

STACK = (8, 512, 7)  # blocks, channels, extent
VARIANTS = ("output_basis", "output_basis_first", "output_basis_last", "spatial_first")
BUILDERS = ("resnet34_imagenet", "resnet50_imagenet")
LATENCY_SECONDS = 60.0
_RUNS = 5


def run(options: Options) -> Outcome:
    """Run the benchmark; the builders need torch."""
    stack = options.work / "stack.onnx"
    blocks, channels, extent = (3, 32, 7) if options.quick else STACK
    onnx.save(build(blocks, channels, extent, options.seed), stack)
    sources = {f"{blocks} x {channels} channels at {extent} x {extent}": str(stack)}
    if not options.quick:
        if versions()["torch"] == "absent":
            raise SkippedError("torch is absent: install '.[torch]'")
        for name in BUILDERS:
            path = str(options.work / f"{name}.onnx")
            run_child("benchmarks.cases:build", name=name, out=path, seed=options.seed)
            sources[name] = path
    rows = []
    for name, source in sources.items():
        files = {"whole": str(options.work / f"{Path(source).stem}-whole.onnx")}
        files |= {v: str(options.work / f"{Path(source).stem}-{v}.onnx") for v in VARIANTS}
        run_child("benchmarks.joint_runtime:make", source=source, files=files)
        timed = run_child(
            "benchmarks.joint_runtime:latency",
            files=list(files.values()),
            seconds=3.0 if options.quick else LATENCY_SECONDS,
        ).value
        for (variant, file), timing in zip(files.items(), timed, strict=False):
            memory = run_child("benchmarks.joint_runtime:resident", file=file).value
            size = Path(file).stat().st_size
            rows.append(
                {"network": name, "variant": variant, "file_bytes": size, **memory, **timing}
            )
        rows.append({"network": name, "variant": "A/A control", **timed[-1]})
    name = "stack" if options.quick else BUILDERS[1]
    path = str(options.work / f"{name}.onnx")
    seconds = run_child("benchmarks.joint_runtime:factorise", cores=2, file=path).value
    notes = [
        f"{form}: all groups of {name} in {s:.1f} s on two cores"
        for form, s in seconds.items()
    ]
    return Outcome(rows, (_table(rows),), notes)


def build(blocks: int, channels: int, extent: int, seed: int) -> onnx.ModelProto:
    """Return residual blocks of one 3 x 3 convolution and a Relu each."""
    rng = np.random.default_rng(seed)
    nodes, weights, tensor = [], [], "x"
    for index in range(blocks):
        kernel = rng.standard_normal((channels, channels, 3, 3)) / np.sqrt(9 * channels)
        for name, value in (
            (f"w{index}", kernel),
            (f"b{index}", rng.standard_normal(channels)),
        ):
            weights.append(numpy_helper.from_array(value.astype(np.float32), name))
        inputs = [tensor, f"w{index}", f"b{index}"]
        nodes += [
            helper.make_node("Conv", inputs, [f"c{index}"], pads=[1] * 4),
            helper.make_node("Relu", [f"c{index}"], [f"r{index}"]),
            helper.make_node("Add", [f"r{index}", tensor], [f"s{index}"]),
        ]
        tensor = f"s{index}"
    shape: list[int | str | None] = ["N", channels, extent, extent]
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", tensor)
    )
    graph = helper.make_graph(nodes, "stack", [x], [y], weights)
    opset = helper.make_opsetid("", 17)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8)


def make(*, source: str, files: Mapping[str, str]) -> None:
    """Write the whole network and its variants, from the weights alone."""
    network = finish(prepare(onnxcomp.load(source))[0])
    network.save(files["whole"])
    facts = Analysis(network, random_inputs(network, 1))
    for variant in VARIANTS:
        draft = network.edit()
        if variant in JOINT_FORMS:
            FactorizeJointly().apply(draft, facts, _joint(facts, variant))
        else:
            Factorize().apply(draft, facts, _own(facts, variant))
        draft.seal(by=variant).save(files[variant])


def _joint(facts: Analysis, form: str) -> dict[Option, Arrays]:
    found: dict[Option, Arrays] = {}
    for group in FactorizeJointly().groups(facts).values():
        shape = _shape(facts, group.members[0])
        kind = JOINT_FORMS[form]
        if group.name != group.repetition or not kind.applies(shape) or min(shape[2:]) < 2:
            continue
        option = Option(FactorizeJointly.name, group.name, form, (shape[0] // 2,))
        members = [Member(_kernel(facts, node)) for node in group.members]
        found[option] = arrays_of(FactorizeJointly().fit(option, members), group.members)
    return found


def _own(facts: Analysis, form: str) -> dict[Option, Arrays]:
    found: dict[Option, Arrays] = {}
    for node in (node for each in facts.repetitions for node in each.members):
        shape = _shape(facts, node)
        if min(shape[2:]) > 1:
            option = Option(Factorize.name, node, form, (shape[0] // 2,))
            linear = facts.linears[node]
            kernel = linear.kernel(facts.model.weights[linear.weight])
            found[option], _ = Factorize().fit(option, kernel, None)
    return found


def _shape(facts: Analysis, node: str) -> tuple[int, int, int, int]:
    linear = facts.linears[node]
    return kernel_shape4(linear, linear.out_channels, linear.in_channels)


def _kernel(facts: Analysis, node: str) -> Any:
    linear = facts.linears[node]
    return to_plane(linear.kernel(facts.model.weights[linear.weight]))


def latency(*, files: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """Measure files against the first, interleaved, on one thread; the control comes last."""
    networks = [onnxcomp.load(file) for file in files]
    samples = random_inputs(networks[0], 1)
    feed = next(samples.batches(networks[0].signature.inputs, 1)).feed
    found = paired_latency(networks, feed, time_limit_s=seconds)
    return [
        {"median_ms": timing.median_ms, "ratio": asdict(timing.ratio)}
        for timing in (*found.models, found.control)
    ]


def resident(*, file: str) -> dict[str, int]:
    """Return how much resident memory loading and running a file takes."""
    network = onnxcomp.load(file)
    feed = next(random_inputs(network, 1).batches(network.signature.inputs, 1)).feed
    del network
    before = read_status(Path("/proc/self/status"), "VmRSS")
    session = Session(onnxcomp.load(file))
    for _ in range(_RUNS):
        session.run(feed)
    return {"resident": read_status(Path("/proc/self/status"), "VmRSS") - before}


def factorise(*, file: str) -> dict[str, float]:
    """Return the seconds that every form takes for all groups, from the weights alone."""
    network = finish(prepare(onnxcomp.load(file))[0])
    facts = Analysis(network, random_inputs(network, 1))
    found = {}
    for form in JOINT_FORMS:
        start = time.monotonic()
        for group in FactorizeJointly().groups(facts).values():
            shape = _shape(facts, group.members[0])
            kind = JOINT_FORMS[form]
            if group.name != group.repetition or not kind.applies(shape):
                continue
            half = max(kind.max_rank(shape) // 4, 2)
            sizes = {"both": (half, half), "outer": (half, half)}.get(kind.shares, (half,))
            members = [Member(_kernel(facts, node)) for node in group.members]
            kind.build(members, sizes)
        found[form] = time.monotonic() - start
    return found


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    cells = [
        (
            row["network"],
            row["variant"],
            f"{row['file_bytes'] / 1e6:.1f}" if "file_bytes" in row else "",
            f"{row['resident'] / 2**20:.0f}" if "resident" in row else "",
            f"{row['median_ms']:.2f}",
            interval(row["ratio"]),
        )
        for row in rows
    ]
    columns = ("network", "variant", "file MB", "RSS + MiB", "ms", "speedup")
    return Table("Common factors at run time", columns, cells)
