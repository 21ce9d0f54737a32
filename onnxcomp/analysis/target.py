"""What the target CPU rewards: the grid of widths and ranks, and predicted milliseconds.

The latency model is linear in a few amounts of work of a convolution (FLOPs, bytes, nodes);
its coefficients and the grids come from measurements on onnxruntime's CPU kernels.  Shapes
that were measured themselves are looked up.  The model ranks options during the search; what
is reported is always measured.  A target is built in, or a file that `calibrate` wrote.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from onnxcomp.errors import ParameterError
from onnxcomp.json_fields import Fields

SCHEMA_VERSION = 1
KIND = "onnxcomp-target"
_FLOAT_BYTES = 4
_IMAGE_CHANNELS = 3
_SPILL_BYTES = 1_000_000
_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_PRODUCTS = ("Gemm", "MatMul")

# Nanoseconds per output element of operators that onnxruntime does not fuse into a
# convolution, with the change of layout that some of them (Elu, Erf, PRelu, Slice, ...) need
# on both sides; Sigmoid and Mul together are fused into SiLU.  A residual Add is fused, too.
# Measured where the profile x86-avx512 was; Pad as Slice.
ELEMENT_NS = MappingProxyType(
    {
        "Add": 0.02,
        "Sigmoid": 0.08,
        "Mul": 0.28,
        "Tanh": 0.43,
        "HardSwish": 0.48,
        "HardSigmoid": 0.2,
        "Elu": 2.2,
        "Erf": 0.9,
        "PRelu": 0.92,
        "Concat": 0.35,
        "Slice": 0.33,
        "Split": 0.35,
        "Pad": 0.33,
        "Resize": 0.35,
        "Upsample": 0.35,
        "MaxPool": 0.25,
        "AveragePool": 0.3,
        "BatchNormalization": 0.18,
    }
)


@dataclass(frozen=True)
class Convolution:
    """Shape of one convolution, or of a matrix product as a 1 x 1 convolution.

    Attributes:
        in_channels: Channels of its input.
        out_channels: Channels of its output.
        kernel: Kernel positions.
        out_positions: Output positions.
        in_positions: Input positions.
        groups: Groups.
        op: Its operator; Gemm, MatMul and ConvTranspose have no blocked kernels.
    """

    in_channels: int
    out_channels: int
    kernel: int
    out_positions: int
    in_positions: int
    groups: int = 1
    op: str = "Conv"

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample; a ConvTranspose works on its inputs."""
        transposed = self.op == "ConvTranspose"
        positions = self.in_positions if transposed else self.out_positions
        return positions * self.weights

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return self.out_channels * (self.in_channels // self.groups) * self.kernel


@dataclass(frozen=True)
class Costs:
    """Coefficients of the latency model, in picoseconds per FLOP, byte or row.

    Attributes:
        direct: FLOP of blocked kernels, channels rounded up to blocks.
        narrow: FLOP of a block of output channels that is left over when blocks are taken
            four at a time, on top of `direct`.
        depthwise: FLOP of depthwise kernels.
        fallback: FLOP of convolutions by im2col.
        im2col: Byte that im2col writes (ConvTranspose: that col2im reads).
        product: FLOP of matrix products of several rows.
        vector: Byte of the weight of matrix products of one row.
        weight: Byte of weights elsewhere.
        activation: Byte of inputs and outputs.
        spill: Byte of those that have more than a megabyte, on top of `activation`.
        reorder: Byte of inputs of less than a block of channels, which lose their blocks.
        rows: Row of the output, per input and rounded output channel, behind such inputs.
        node: The same per node, in nanoseconds.
    """

    direct: float
    narrow: float
    depthwise: float
    fallback: float
    im2col: float
    product: float
    vector: float
    weight: float
    activation: float
    spill: float
    reorder: float
    rows: float
    node: float


@dataclass(frozen=True)
class Calibration:
    """Where a target was measured, and how well the model fits there.

    Attributes:
        cpu: Model name of the processor.
        architecture: Instruction set, such as `x86_64`.
        onnxruntime: Version of onnxruntime.
        threads: Intra-op threads.
        chains: Micro-chains that were fitted.
        median_error: Median relative error of a chain's time when it is left out of the fit.
        p90_error: 90th percentile of the same.
    """

    cpu: str
    architecture: str
    onnxruntime: str
    threads: int
    chains: int
    median_error: float
    p90_error: float


@dataclass(frozen=True)
class Target:
    """A profile of a CPU.

    Attributes:
        name: What `--target` calls it, or the CPU that it was measured on.
        block: Channels that the blocked kernels round up to.
        small: Sizes below one block that still pay.
        costs: Coefficients of the latency model.
        element_ns: Nanoseconds per output element, by elementwise operator.
        table: Measured seconds of shapes, which the formula does not predict then.
        calibration: Where it was measured; None for built-in profiles.
    """

    name: str
    block: int
    small: tuple[int, ...]
    costs: Costs
    element_ns: tuple[tuple[str, float], ...] = tuple(ELEMENT_NS.items())
    table: tuple[tuple[Convolution, float], ...] = ()
    calibration: Calibration | None = None

    def sizes(self, total: int, *, step: int | None = None) -> tuple[int, ...]:
        """Return the widths or ranks below `total` that the target rewards, ascending.

        Args:
            total: Size now.
            step: Multiples of this instead of the grid; 1 frees all sizes, of which sixteen
                evenly spaced ones are returned.
        """
        if step is None:
            blocks = range(self.block, total, self.block)
            return tuple(sorted({s for s in (*self.small, *blocks) if s < total}))
        if step < 1:
            raise ParameterError.of("Target.sizes", "step", "at least 1", step)
        sizes = {round(total * i / 16 / step) * step for i in range(1, 16)}
        return tuple(sorted(s for s in sizes if 0 < s < total))

    def seconds(self, conv: Convolution) -> float:
        """Return the seconds of one convolution at batch 1, measured or predicted."""
        measured = self._measured.get(conv)
        if measured is not None:
            return measured
        terms = work_terms(conv, self.block)
        return float(1e-12 * sum(getattr(self.costs, n) * w for n, w in terms.items()))

    def chain_seconds(self, chain: Sequence[Convolution]) -> float:
        """Return the predicted seconds of convolutions one after the other."""
        return sum(self.seconds(conv) for conv in chain)

    def element_seconds(self, op: str, elements: float) -> float:
        """Return the predicted seconds of an operator that is no convolution.

        Args:
            op: The operator; those that are fused or not known take no time.
            elements: Elements of its output, per sample.
        """
        return 1e-9 * self._elements.get(op, 0.0) * elements

    def to_json(self) -> dict[str, Any]:
        """Return the target as plain JSON values."""
        calibration = self.calibration
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "name": self.name,
            "block": self.block,
            "small": list(self.small),
            "costs": dataclasses.asdict(self.costs),
            "element_ns": dict(self.element_ns),
            "table": [
                {**dataclasses.asdict(conv), "seconds": seconds}
                for conv, seconds in self.table
            ],
            "calibration": None if calibration is None else dataclasses.asdict(calibration),
        }

    @classmethod
    def from_json(cls, data: object, source: str) -> Target:
        """Return the target that `to_json` wrote.

        Args:
            data: What JSON held.
            source: Where it came from, for error messages.

        Raises:
            ParameterError: Something is missing, unknown or impossible.
        """
        fields = Fields(data, source)
        fields.check_header(KIND, SCHEMA_VERSION)
        block = fields.whole("block")
        small = fields.wholes("small")
        if any(size >= block for size in small) or list(small) != sorted(set(small)):
            raise fields.error("small", f"ascending and below the block, {block}", small)
        fitted = None
        if fields.get("calibration") is not None:
            fitted = fields.within("calibration").record(Calibration)
        found = cls(
            name=fields.text("name"),
            block=block,
            small=small,
            costs=fields.within("costs").record(Costs),
            element_ns=tuple(fields.within("element_ns").numbers().items()),
            table=tuple(_table_entry(entry) for entry in fields.each("table")),
            calibration=fitted,
        )
        fields.check_nothing_left()
        if found.costs.activation + found.costs.node <= 0:
            raise fields.error("costs", "above 0 in activation or node", fields.get("costs"))
        return found

    @cached_property
    def _measured(self) -> Mapping[Convolution, float]:
        return dict(self.table)

    @cached_property
    def _elements(self) -> Mapping[str, float]:
        return dict(self.element_ns)


def work_terms(conv: Convolution, block: int) -> dict[str, float]:
    """Return the work of a convolution that the latency model counts, by field of `Costs`.

    Rules of dispatch as measured with onnxruntime 1.31: blocked kernels take inputs of a
    multiple of four channels, or of less than a block.  Of the latter any number runs in a
    direct kernel of its own (5..15 that are no multiple of four, too), row by row, behind a
    node that takes the blocks apart, except where the input is an image.

    Args:
        conv: The convolution.
        block: Channels that the blocked kernels round up to.
    """
    c, m, g, k = conv.in_channels, conv.out_channels, conv.groups, conv.kernel
    weights, flops = _FLOAT_BYTES * conv.weights, 2.0 * conv.macs
    found: dict[str, float] = {"weight": weights, "node": 1e3}
    if conv.op in _PRODUCTS:
        if conv.out_positions == 1:
            return {"vector": weights, "node": 1e3}
        return {**found, "product": flops, **_moved(conv, c, m)}
    depthwise = g > 1 and g == c == m and c % 4 == 0
    aligned = g > 1 and (c // g) % block == 0 and (m // g) % block == 0
    blocked = conv.op == "Conv" and (
        depthwise or aligned or (g == 1 and (c % 4 == 0 or c < block))
    )
    if not blocked:
        copied = (
            conv.in_positions * m if conv.op == "ConvTranspose" else conv.out_positions * c
        )
        im2col = _FLOAT_BYTES * copied * k if k > 1 else 0.0
        return {**found, "fallback": flops, "im2col": im2col, **_moved(conv, c, m)}
    up_c, up_m = (-(-n // block) * block for n in (c, m))
    found |= _moved(conv, up_c, up_m)
    if depthwise:
        return {**found, "depthwise": 2.0 * conv.out_positions * up_m * k}
    if g == 1:
        flops = 2.0 * conv.out_positions * (c if c < block else up_c) * up_m * k
        found["weight"] = _FLOAT_BYTES * up_c * up_m * k
    blocks = -(-(m // g) // block)
    found["direct"] = flops
    found["narrow"] = flops / blocks if blocks % 4 == 1 else 0.0
    if g == 1 and c < block:
        found["rows"] = math.sqrt(conv.out_positions) * c * up_m
        if c > _IMAGE_CHANNELS:
            found["reorder"] = _FLOAT_BYTES * c * conv.in_positions
            found["node"] = 2e3
    return found


def _moved(conv: Convolution, in_channels: int, out_channels: int) -> dict[str, float]:
    """Return the terms of inputs and outputs at channels as they are stored."""
    both = (in_channels * conv.in_positions, out_channels * conv.out_positions)
    sizes = [float(_FLOAT_BYTES * elements) for elements in both]
    return {"activation": sum(sizes), "spill": sum(n for n in sizes if n > _SPILL_BYTES)}


def _table_entry(fields: Fields) -> tuple[Convolution, float]:
    """Return a shape and its measured seconds."""
    seconds = fields.number("seconds")
    if not seconds:
        raise fields.error("seconds", "above 0", seconds)
    return read_convolution(fields), seconds


def read_convolution(fields: Fields) -> Convolution:
    """Return the shape that an object holds, besides what was read from it already."""
    found = fields.record(Convolution)
    if found.op not in _OPS:
        raise fields.error("op", f"one of {', '.join(_OPS)}", found.op)
    if found.in_channels % found.groups or found.out_channels % found.groups:
        raise fields.error("groups", "a divisor of both channels", found.groups)
    return found


_AVX512 = Costs(
    direct=7.0,
    narrow=2.2,
    depthwise=12.6,
    fallback=11.8,
    im2col=70.0,
    product=7.7,
    vector=57.0,
    weight=90.0,
    activation=12.5,
    spill=7.0,
    reorder=250.0,
    rows=400.0,
    node=500.0,
)
_AVX2 = replace(_AVX512, direct=14.0, narrow=0.0, depthwise=25.0, fallback=24.0, product=17.0)
_ARM64 = replace(_AVX2, direct=50.0, depthwise=50.0, fallback=50.0, product=50.0)

TARGETS = MappingProxyType(
    {
        target.name: target
        for target in (
            Target("x86-avx512", 16, (4, 8, 12), _AVX512),
            Target("x86-avx2", 8, (4,), _AVX2),
            Target("arm64", 4, (), _ARM64),
        )
    }
)
"""Built-in profiles.  Only x86-avx512 was measured: on a server core of 2024 (Xeon with
AVX-512 and AMX, 2.6 GHz, 2 MiB of L2) with onnxruntime 1.31 on one thread."""

ARCHITECTURES = MappingProxyType(
    {"x86-avx512": "x86_64", "x86-avx2": "x86_64", "arm64": "aarch64"}
)
"""Instruction sets of the built-in profiles."""


def find_target(name: str) -> Target:
    """Return a built-in profile, or the one that a file holds.

    Args:
        name: Name of a built-in profile; or path of what `onnxcomp calibrate` wrote, or of
            the `result.json` of a bench kit with micro-chains.

    Raises:
        ParameterError: There is no profile of that name, or the file holds none.
    """
    if name in TARGETS:
        return TARGETS[name]
    path = Path(name)
    if not (path.is_file() or path.suffix == ".json"):
        allowed = f"one of {', '.join(sorted(TARGETS))}, or a file of `onnxcomp calibrate`"
        raise ParameterError.of("find_target", "target", allowed, name)
    from onnxcomp.calibration import read_target  # which needs `Target`

    return read_target(path)
