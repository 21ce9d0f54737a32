"""What the target CPU rewards: the grid of widths and ranks, and predicted milliseconds.

The latency model is linear in six features of a convolution; its coefficients and the grids
come from measurements on onnxruntime's CPU kernels.  It ranks options during the search; what
is reported is always measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

from onnxcomp.errors import ParameterError

_FLOAT_BYTES = 4


# Nanoseconds per output element of operators that onnxruntime does not fuse into a
# convolution, measured on one AVX-512 core; Sigmoid and Mul together are fused into SiLU.
ELEMENT_NS = MappingProxyType(
    {
        "Sigmoid": 0.1,
        "Mul": 0.05,
        "Tanh": 0.22,
        "HardSwish": 0.24,
        "HardSigmoid": 0.1,
        "Elu": 0.25,
        "Erf": 0.3,
        "PRelu": 0.2,
        "Concat": 0.1,
        "Slice": 0.1,
        "Split": 0.1,
        "Pad": 0.1,
        "Resize": 0.2,
        "Upsample": 0.2,
        "MaxPool": 0.3,
        "BatchNormalization": 0.1,
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
class Target:
    """A profile of a CPU.

    Attributes:
        name: What `--target` calls it.
        block: Channels that the blocked kernels round up to.
        small: Sizes below one block that still pay.
        direct_flops: FLOP/s of blocked kernels.
        fallback_flops: FLOP/s of im2col and matrix products.
        im2col_bytes: Byte/s of im2col.
        weight_bytes: Byte/s of weights.
        activation_bytes: Byte/s of activations.
        node_seconds: Seconds per node.
    """

    name: str
    block: int
    small: tuple[int, ...]
    direct_flops: float = 256e9
    fallback_flops: float = 214e9
    im2col_bytes: float = 55e9
    weight_bytes: float = 124e9
    activation_bytes: float = 81e9
    node_seconds: float = 0.77e-6

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
        """Return the predicted seconds of one convolution on one thread, at batch 1."""
        c, m, g, k = conv.in_channels, conv.out_channels, conv.groups, conv.kernel
        up_c, up_m = self._up(c), self._up(m)
        depthwise = g > 1 and g == c and c % 4 == 0
        aligned = g > 1 and (c // g) % self.block == 0 and (m // g) % self.block == 0
        blocked = conv.op == "Conv" and (
            depthwise or aligned or (g == 1 and (c % 4 == 0 or c < self.block))
        )
        work = 2.0 * conv.macs
        seconds = self.node_seconds
        if not blocked:
            seconds += work / self.fallback_flops
            copied = 0.5 if k == 1 else 2.0
            if conv.op not in ("Gemm", "MatMul"):
                seconds += 4.0 * conv.out_positions * c * k * copied / self.im2col_bytes
        elif not depthwise:
            if g == 1:
                work = 2.0 * conv.out_positions * (c if c < self.block else up_c) * up_m * k
            seconds += work / self.direct_flops
        weights = up_c * up_m * k if g == 1 else conv.weights
        seconds += _FLOAT_BYTES * weights / self.weight_bytes
        moved = up_c * conv.in_positions + up_m * conv.out_positions
        return seconds + _FLOAT_BYTES * moved / self.activation_bytes

    def chain_seconds(self, chain: Sequence[Convolution]) -> float:
        """Return the predicted seconds of convolutions one after the other."""
        return sum(self.seconds(conv) for conv in chain)

    def _up(self, channels: int) -> int:
        return -(-channels // self.block) * self.block


TARGETS = MappingProxyType(
    {
        target.name: target
        for target in (
            Target("x86-avx512", block=16, small=(4, 8, 12)),
            Target("x86-avx2", block=8, small=(4,), direct_flops=128e9, fallback_flops=107e9),
            Target("arm64", block=4, small=(), direct_flops=40e9, fallback_flops=40e9),
        )
    }
)
"""Built-in profiles; only x86-avx512 was fitted to measurements."""


def find_target(name: str) -> Target:
    """Return a built-in profile.

    Raises:
        ParameterError: There is none of that name.
    """
    if name not in TARGETS:
        raise ParameterError.choice("find_target", "target", TARGETS, name)
    return TARGETS[name]
