"""Members of a joint form: what must be equal among them, and the balance of their factors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxcomp.errors import ParameterError
from onnxcomp.numerics.factorization import (
    PatchMetric,
    compose,
    dense_metric,
    floored,
    squared_error,
)
from onnxcomp.numerics.least_squares import offset_mean

Array: TypeAlias = NDArray[np.float64]
Chain: TypeAlias = tuple[Array, ...]

_AXES = ("m", "c", "kh", "kw")


@dataclass(frozen=True)
class Member:
    """One of the kernels that take common factors.

    Attributes:
        kernel: W (m, c, kh, kw), or a refitted target W*.
        metric: moments of its input patches; None, for all members alike, means the weights
            alone.
        weight: factor of its error in the sum, above 0.
    """

    kernel: Array
    metric: PatchMetric | None = None
    weight: float = 1.0


def normalised(members: Sequence[Member]) -> tuple[Member, ...]:
    """Return the members with errors relative to their own energy ``tr(W S W^T)``.

    Without it a member of large weights decides on the common factors (the paper's way). A
    member without energy keeps its weight.
    """
    found = []
    for member in members:
        energy = squared_error(member.kernel, np.zeros_like(member.kernel), member.metric)
        weight = member.weight / energy if energy > 0 else member.weight
        found.append(replace(member, weight=weight))
    return tuple(found)


def check_members(form: str, members: Sequence[Member], equal: str) -> None:
    """Check what a joint form needs of its members.

    Args:
        form: its name.
        members: the members.
        equal: axes of the kernels that must be equal, of "m c kh kw".

    Raises:
        ParameterError: a member is unusable, or differs where it must not.
    """
    if not members:
        raise ParameterError.of(form, "members", "at least one member", len(members))
    for i, member in enumerate(members):
        kernel, name = np.asarray(member.kernel), f"members[{i}]"
        if kernel.ndim != 4 or not kernel.size:
            allowed = "a kernel (m, c, kh, kw)"
            raise ParameterError.of(form, f"{name}.kernel", allowed, kernel.shape)
        for axis, mine, other in zip(
            _AXES, kernel.shape, members[0].kernel.shape, strict=True
        ):
            if axis in equal.split() and mine != other:
                allowed = f"a kernel with {axis} = {other} as in members[0]"
                raise ParameterError.of(form, f"{name}.kernel", allowed, kernel.shape)
        if (member.metric is None) != (members[0].metric is None):
            allowed = "given for all members or for none"
            raise ParameterError.of(form, f"{name}.metric", allowed, member.metric)
        d = kernel[0].size
        if getattr(member.metric, "d", d) != d:
            size = getattr(member.metric, "d", None)
            raise ParameterError.of(form, f"{name}.metric", f"over {d} inputs", size)
        if not (np.isfinite(member.weight) and member.weight > 0):
            raise ParameterError.of(form, f"{name}.weight", "above 0", member.weight)


def balanced(
    chains: Sequence[Chain], members: Sequence[Member], split: str, common: Sequence[slice]
) -> list[Chain]:
    """Scale the inner channels of all chains alike.

    Args:
        chains: kernels of each member, equal where they are common.
        members: the members.
        split: "even" gives both sides of a channel the same energy, averaged over the members;
            "first" makes what is behind it a unit vector.
        common: for every inner place, the channels behind which all members are equal.
    """
    found = [list(chain) for chain in chains]
    for place, equal in enumerate(common, 1):
        behind = np.array([np.square(compose(c[place:])).sum(axis=(0, 2, 3)) for c in chains])
        if split == "even":
            front = [
                _energy(compose(chain[:place]), member)
                for chain, member in zip(chains, members, strict=True)
            ]
            scale = (floored(np.mean(front, 0)) / floored(np.mean(behind, 0))) ** 0.25
        else:
            distinct = behind.sum(axis=0)
            distinct[equal] /= len(chains)
            scale = floored(distinct) ** -0.5
        for kernels in found:
            kernels[place - 1] = kernels[place - 1] / scale.reshape(-1, 1, 1, 1)
            kernels[place] = kernels[place] * scale.reshape(1, -1, 1, 1)
    return [tuple(kernels) for kernels in found]


def _energy(front: Array, member: Member) -> Array:
    """Return the energies of the channels behind a kernel, over the offsets it leaves."""
    rows, metric = front.reshape(len(front), -1), member.metric
    if metric is None:
        return np.asarray(np.square(rows).sum(axis=1))
    v = member.kernel[0].size // rows.shape[1]
    if v == 1:
        return np.diag(metric.quadratic(rows)).copy()
    mean = offset_mean(dense_metric(metric), v)
    return np.asarray(np.einsum("ru,ru->r", rows @ mean, rows))
