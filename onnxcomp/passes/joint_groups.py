"""Which nodes take common factors: repeated blocks, or the choice of the paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxcomp.analysis.blocks import name_of_place
from onnxcomp.analysis.linear import Linear
from onnxcomp.errors import ParameterError
from onnxcomp.passes.chains import Shape, kernel_shape4, reason_to_stay

if TYPE_CHECKING:
    from onnxcomp.analysis import Analysis

_HALVED = 4  # members from which on a group is also offered in halves
_SLACK = 1e-9  # so that a rate times a width that is a whole number stays one
SCHEMES = ("svd", "ljsvd", "rjsvd1", "rjsvd2", "bijsvd")


@dataclass(frozen=True)
class Group:
    """Nodes whose kernels are factorised together.

    Attributes:
        name: What options call it.
        members: Ids of the nodes, in file order.
        repetition: Name of the repeated layers that they are all or some of.
    """

    name: str
    members: tuple[str, ...]
    repetition: str


@dataclass(frozen=True)
class PaperRule:
    """What the paper factorises, and to which ranks (Chen et al. 2023, arXiv:2107.04386).

    Every convolution on the path of a residual block is factorised, but for those of the
    first stage.  A group is one position of the blocks of one stage; the first layer of a
    stage, whose input is narrower ("half input depth"), is factorised by itself, under
    `rjsvd1` with its group.  Ranks are rounded down.

    Attributes:
        scheme: "ljsvd" shares the first factors, "rjsvd1" and "rjsvd2" the last ones,
            "bijsvd" parts of both, and "svd", the paper's anchor, nothing.
        rate: Rank of the plain SVD with the same parameters, as a share of the output
            channels (of the smaller side for 1 x 1 kernels).
        left: Share of the rank whose first factor is shared, under "bijsvd".
    """

    scheme: str
    rate: float
    left: float = 0.5

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ParameterError.choice("PaperRule", "scheme", SCHEMES, self.scheme)
        if not 0 < self.rate <= 1:
            raise ParameterError.of("PaperRule", "rate", "above 0 and at most 1", self.rate)
        if not 0 <= self.left <= 1:
            raise ParameterError.of("PaperRule", "left", "0 to 1", self.left)

    def groups(self, facts: Analysis) -> tuple[Group, ...]:
        """Return the paper's groups; nodes that share nothing are groups of one."""
        places: dict[tuple[int, int], list[Linear]] = {}
        for block in facts.blocks:
            for position, node in enumerate(block.path):
                if block.stage > 0 and reason_to_stay(facts, facts.linears[node]) == "":
                    places.setdefault((block.stage, position), []).append(facts.linears[node])
        found: dict[str, list[str]] = {}
        for (stage, position), linears in places.items():
            for linear in linears:
                shape = kernel_shape4(linear, linear.out_channels, linear.in_channels)
                key = (shape[0], *shape[2:]) if self.scheme == "rjsvd1" else shape
                name = name_of_place(stage, position, key)
                name += f" {linear.id}" * (self.scheme == "svd")
                found.setdefault(name, []).append(linear.id)
        return tuple(Group(name, tuple(nodes), name) for name, nodes in found.items())

    def choice(self, shapes: Sequence[Shape]) -> tuple[str, tuple[int, ...]]:
        """Return the form and the ranks of a group of kernels (m, c, kh, kw)."""
        m, c, kh, kw = shapes[-1]
        base = "spatial" if kh > 1 and kw > 1 else "output_basis"
        most = min(m * kw, *(s[1] * s[2] for s in shapes))
        width = self.rate * (m if kh * kw > 1 else min(m, c))
        firsts, last = sum(s[1] * s[2] for s in shapes), m * kw
        budget = firsts + len(shapes) * last

        def rank(share: float, size: int) -> int:
            return min(math.floor(width * share * budget / size + _SLACK), most)

        shared_first = shapes[0][1] * kh + len(shapes) * last
        if self.scheme == "bijsvd" and len(shapes) > 1:
            right = rank(1 - self.left, firsts + last)
            left = min(rank(self.left, shared_first), most - right)
            return f"{base}_both", (right, left) if right + left else (1, 0)
        if self.scheme in ("svd", "ljsvd", "bijsvd"):
            return f"{base}_first", (max(rank(1, shared_first), 1),)
        return f"{base}_last", (max(rank(1, firsts + last), 1),)


def repeated_groups(facts: Analysis) -> tuple[Group, ...]:
    """Return the layers that repeat, together and, where they are several, in halves."""
    found = []
    for repetition in facts.repetitions:
        members = repetition.members
        found.append(Group(repetition.name, members, repetition.name))
        if len(members) >= _HALVED:
            half = len(members) // 2
            for start, part in ((0, members[:half]), (half, members[half:])):
                name = f"{repetition.name} {start + 1}-{start + len(part)}"
                found.append(Group(name, part, repetition.name))
    return tuple(found)


def by_name(groups: Sequence[Group]) -> Mapping[str, Group]:
    """Return groups by their names."""
    return {group.name: group for group in groups}
