"""Ownership: every reader of every initializer, and what the tensor's axes mean to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from onnxcomp.model import Model, Use

_CHANNEL = ("channels",)
# Meaning of the axes of an input, by operator and input index.
_ROLES: Mapping[tuple[str, int], tuple[str, ...]] = MappingProxyType(
    {
        ("Conv", 1): ("out_channels", "in_channels / groups", "kernel"),
        ("Conv", 2): ("out_channels",),
        ("ConvTranspose", 1): ("in_channels", "out_channels / groups", "kernel"),
        ("ConvTranspose", 2): ("out_channels",),
        ("MatMul", 0): ("out_channels", "in_channels"),
        ("MatMul", 1): ("in_channels", "out_channels"),
        ("Gemm", 2): ("out_channels",),
        **{("BatchNormalization", index): _CHANNEL for index in (1, 2, 3, 4)},
        **{("InstanceNormalization", index): _CHANNEL for index in (1, 2)},
        ("PRelu", 1): ("channels", "spatial"),
    }
)


@dataclass(frozen=True)
class Owner:
    """One reader of an initializer.

    Attributes:
        node: Id of the node.
        op: Its operator.
        index: Input index; -1 where a subgraph of the node captures the tensor.
        axes: Meaning of the leading axes, the last one standing for all that follow; empty
            where the operator gives them none of their own (elementwise operands, shapes).
    """

    node: str
    op: str
    index: int
    axes: tuple[str, ...]


def find_owners(model: Model) -> dict[str, tuple[Owner, ...]]:
    """Return the readers of every initializer; one without readers has none."""
    return {
        name: tuple(_owner(use) for use in uses) for name, _, uses in model.weight_readers()
    }


def _owner(use: Use) -> Owner:
    node = use.node
    axes = _ROLES.get((node.op, use.index), ())
    if node.op == "Gemm" and use.index < 2:
        transposed = bool(node.attrs.get("transA" if use.index == 0 else "transB", 0))
        axes = ("in_channels", "out_channels")
        axes = axes[::-1] if transposed != (use.index == 0) else axes
    return Owner(node.id, node.op, use.index, axes)
