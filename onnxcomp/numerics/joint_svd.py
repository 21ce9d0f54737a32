"""Forms of several kernels with common factors, in the metrics of their own inputs.

The forms are those of `numerics.svd`, with a part that is stored once for all members. A
member W_i (m, c, kh, kw) is seen as (m, u, v), u inputs at each of v offsets:

    spatial        u = (c, kh)       v = kw         kh x 1, then 1 x kw   (the paper's)
    output_basis   u = (c, kh, kw)   v = 1          kh x kw, then 1 x 1
    input_basis    u = c             v = (kh, kw)   1 x 1, then kh x kw

    *_first        W_i ~ A_i (B kron I_v)                        spatial: LJSVD
    *_last         W_i ~ A (B_i kron I_v)                        spatial: RJSVD
    *_both         W_i ~ A (B_i kron I_v) + A_i (B kron I_v)     spatial: Bi-JSVD
    tucker2_outer  W_i ~ A C_i (B kron I_v)                      1 x 1, kh x kw, 1 x 1

Without metrics these are the paper's (`joint_stacks`), in metrics `joint_alternation`.

References:
    S. Chen et al., Joint matrix decomposition for deep convolutional neural networks
    compression, Neurocomputing 516 (2023) 11-26.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxcomp.errors import ParameterError
from onnxcomp.numerics.factorization import PatchMetric, compose, squared_error
from onnxcomp.numerics.joint_alternation import in_metrics, tucker_in_metrics
from onnxcomp.numerics.joint_members import Member, balanced, check_members, normalised
from onnxcomp.numerics.joint_parts import Part, outer_factor, tucker_alone, weights_alone
from onnxcomp.numerics.joint_refit import refit_core, refit_first, refit_last, refit_pair
from onnxcomp.numerics.svd import FORMS

Array: TypeAlias = NDArray[np.float64]
Shape: TypeAlias = tuple[int, int, int, int]
Shapes: TypeAlias = tuple[Shape | None, ...]
Parts: TypeAlias = tuple[Array | None, ...]

__all__ = ["JOINT_FORMS", "Joint", "JointForm", "Member", "errors", "normalised", "refit"]

_SPLITS = ("even", "first")
_ORDERS = ("last", "first")


@dataclass(frozen=True)
class Joint:
    """Chains of convolutions with common parts.

    Attributes:
        form: a name of `JOINT_FORMS`.
        shared: per convolution of the chain, its common part (out, in, kh, kw) or None.
        private: per member and convolution, the member's own part or None.
    """

    form: str
    shared: Parts
    private: tuple[Parts, ...]

    def chain(self, index: int) -> tuple[Array, ...]:
        """Return the kernels of a member, applied first to last.

        Where a convolution has two parts, the outputs of the first one are [private, common]
        and the inputs of the last one [common, private].
        """
        kernels = []
        for place, pair in enumerate(zip(self.shared, self.private[index], strict=True)):
            parts = [part for part in (pair if place else pair[::-1]) if part is not None]
            kernels.append(np.concatenate(parts, axis=1 if place else 0))
        return tuple(kernels)

    def dense(self, index: int) -> Array:
        """Return the single kernel (m, c, kh, kw) that equals a member's chain."""
        return compose(self.chain(index))


@dataclass(frozen=True)
class JointForm:
    """One way to take common factors.

    Attributes:
        base: the name in `numerics.svd.FORMS` of each member's chain.
        shares: "first", "last", "both", or "outer": which convolutions have common parts.
        equal: axes of the members' kernels that must be equal, of "m c kh kw".
    """

    base: str
    shares: str
    equal: str

    @property
    def name(self) -> str:
        """The name in `JOINT_FORMS`."""
        return f"{self.base}_{self.shares}"

    def applies(self, shape: Shape) -> bool:
        """Whether the chain differs from the simpler ones at a member's shape."""
        return FORMS[self.base].applies(shape)

    def max_rank(self, shape: Shape) -> int:
        """Return the number of inner channels at which a member's own chain would be exact.

        For outer they count on the wider side, as in `numerics.svd.tucker_ranks`.
        """
        return FORMS[self.base].max_rank(shape)

    def shared_shapes(self, shape: Shape, ranks: Sequence[int]) -> Shapes:
        """Return the shapes of the common parts, None where there is none."""
        if self.shares == "outer":
            q, p = ranks
            return (q, shape[1], 1, 1), None, (shape[0], p, 1, 1)
        right, left = self._ranks(ranks)
        return self._pair(shape, left, right)

    def private_shapes(self, shape: Shape, ranks: Sequence[int]) -> Shapes:
        """Return the shapes of a member's own parts, None where there is none."""
        if self.shares == "outer":
            q, p = ranks
            return None, (p, q, shape[2], shape[3]), None
        right, left = self._ranks(ranks)
        return self._pair(shape, right, left)

    def build(
        self,
        members: Sequence[Member],
        ranks: Sequence[int],
        *,
        rounds: int | None = None,
        split: str = "even",
        order: str = "last",
    ) -> Joint:
        """Return the factors that minimise the weighted sum of the members' errors.

        Args:
            members: at least one, with kernels that agree in the axes `equal`.
            ranks: (r,) for first and last; for both, (r of the part with the last factor in
                common, r of the other part), one of which can be 0; (q, p) for outer.
            rounds: of alternation; None for the default, which is the paper's 30 for both
                without metrics and 3 in metrics. 0, in metrics, is quick: errors on ResNet-56
                were 1 to 13 % above those of 3 (output_basis_last: none).
            split: how the energy of each inner channel, pooled over the members, is split
                between its two sides: "even", or all of it to the "first" as in the paper.
            order: which part of both is updated first: the one with the "last" factor in
                common (the paper's Algorithm 3), or with the "first" (its authors' code).

        Raises:
            ParameterError: the members do not fit each other, or the ranks them.
        """
        self._check(members, ranks, rounds)
        for name, value, allowed in (("split", split, _SPLITS), ("order", order, _ORDERS)):
            if value not in allowed:
                raise ParameterError.choice(self.name, name, allowed, value)
        solved = self._solve([self.part(m) for m in members], ranks, rounds, order)
        chains = []
        for member, flats in zip(members, solved, strict=True):
            shapes = self._chain_shapes(_shape(member.kernel), ranks)
            chains.append(tuple(f.reshape(s) for f, s in zip(flats, shapes, strict=True)))
        if self.shares == "outer":
            (B, _, A), *_ = chains = balanced(chains, members, split, (slice(0), slice(None)))
            return Joint(self.name, (B, None, A), tuple((None, C, None) for _, C, _ in chains))
        right = self._ranks(ranks)[0]
        (B, A), *_ = chains = balanced(chains, members, split, (slice(right),))
        private = tuple((_some(F[:right]), _some(L[:, right:])) for F, L in chains)
        return Joint(self.name, (_some(B[right:]), _some(A[:, :right])), private)

    def part(self, member: Member) -> Part:
        """Return a member as the solvers see it."""
        kernel = np.asarray(member.kernel, np.float64)
        first = FORMS[self.base].shapes(_shape(kernel), 1)[0]
        return Part(
            kernel.reshape(len(kernel), math.prod(first[1:]), -1), member.metric, member.weight
        )

    def _solve(
        self, parts: Sequence[Part], ranks: Sequence[int], rounds: int | None, order: str
    ) -> list[tuple[Array, ...]]:
        """Return the factors of every member as matrices, first to last."""
        aware = parts[0].metric is not None
        if self.shares == "outer":
            q, p = ranks
            found = (tucker_in_metrics if aware else tucker_alone)(parts, q, p, rounds)
            A = outer_factor(found, p)
            return [(F, A.T @ L, A) for F, L in zip(found.firsts, found.lasts, strict=True)]
        right, left = self._ranks(ranks)
        found = (in_metrics if aware else weights_alone)(parts, right, left, rounds, order)
        return list(zip(found.firsts, found.lasts, strict=True))

    def _ranks(self, ranks: Sequence[int]) -> tuple[int, int]:
        """Return the ranks of the parts with the last and with the first factor in common."""
        if self.shares == "both":
            right, left = ranks
            return right, left
        (rank,) = ranks
        return (rank, 0) if self.shares == "last" else (0, rank)

    def _pair(self, shape: Shape, first: int, last: int) -> Shapes:
        """Return the shapes of a first convolution and of a last one, None at rank 0."""
        shapes = FORMS[self.base].shapes
        return (
            shapes(shape, first)[0] if first else None,
            shapes(shape, last)[1] if last else None,
        )

    def _chain_shapes(self, shape: Shape, ranks: Sequence[int]) -> list[Shape]:
        """Return the shapes of a member's whole chain."""
        if self.shares != "outer":
            return list(FORMS[self.base].shapes(shape, sum(ranks)))
        both = (self.shared_shapes(shape, ranks), self.private_shapes(shape, ranks))
        return [part for pair in zip(*both, strict=True) for part in pair if part is not None]

    def _check(
        self, members: Sequence[Member], ranks: Sequence[int], rounds: int | None
    ) -> None:
        check_members(self.name, members, self.equal)
        parts = [self.part(member) for member in members]
        m, u, v = parts[0].W.shape
        width = sum(len(part.W) * part.W.shape[2] for part in parts)
        height = sum(part.W.shape[1] for part in parts)
        first, last = min(u, width), min(height, m * v)
        if self.shares == "outer":
            last = min(m, sum(part.matrix.shape[1] for part in parts))
        limits = {"first": (first,), "last": (last,), "both": (last, first)}
        tops = limits.get(self.shares, (first, last))
        least = 0 if self.shares == "both" else 1
        fit = len(ranks) == len(tops) and sum(ranks) > 0
        if not fit or not all(least <= r <= top for r, top in zip(ranks, tops, strict=True)):
            allowed = ", ".join(f"{least} to {top}" for top in tops)
            raise ParameterError.of(self.name, "ranks", f"({allowed}) and not all 0", ranks)
        alone = self.shares == "both" and members[0].metric is None
        if rounds is not None and rounds < alone:
            raise ParameterError.of(self.name, "rounds", f"at least {int(alone)}", rounds)


JOINT_FORMS: Mapping[str, JointForm] = MappingProxyType(
    {
        form.name: form
        for form in (
            JointForm("spatial", "first", "c kh kw"),
            JointForm("spatial", "last", "m kw"),
            JointForm("spatial", "both", "m c kh kw"),
            JointForm("output_basis", "first", "c kh kw"),
            JointForm("output_basis", "last", "m"),
            JointForm("output_basis", "both", "m c kh kw"),
            JointForm("input_basis", "first", "c kh kw"),
            JointForm("input_basis", "last", "m kh kw"),
            JointForm("input_basis", "both", "m c kh kw"),
            JointForm("tucker2", "outer", "m c"),
        )
    }
)


def errors(joint: Joint, members: Sequence[Member]) -> Array:
    """Return ``tr((W - W') S (W - W')^T)`` of every member, unweighted, shape (n,)."""
    return np.array(
        [squared_error(m.kernel, joint.dense(i), m.metric) for i, m in enumerate(members)]
    )


def refit(joint: Joint, private: Parts, target: Array, metric: PatchMetric | None) -> Parts:
    """Return a member's private parts, the exact least squares for the frozen common ones.

    They are centred on `private`: directions that the data does not show keep their values. A
    part that the target's shape has no room for starts from nothing.

    Args:
        joint: gives the form and the common parts.
        private: the member's present parts.
        target: a new kernel W* (m, c, kh, kw); m may be smaller where only first factors are
            common, c where only last ones are.
        metric: moments of the new inputs; None for the weights alone.

    Raises:
        ParameterError: the common parts do not fit the target.
    """
    form, shape = JOINT_FORMS[joint.form], _shape(target)
    B, A = joint.shared[0], joint.shared[-1]
    left, right = 0 if B is None else len(B), 0 if A is None else A.shape[1]
    every = {"first": (left,), "last": (right,), "both": (right, left)}
    ranks = every.get(form.shares, (left, right))
    for have, want in zip(joint.shared, form.shared_shapes(shape, ranks), strict=True):
        if have is not None and have.shape != want:
            allowed = f"a kernel that fits the common part of shape {have.shape}"
            raise ParameterError.of(joint.form, "target", allowed, target.shape)
    wanted, part = form.private_shapes(shape, ranks), form.part(Member(target, metric))
    priors = [
        _flat(own) if own is not None and own.shape == want else None
        for own, want in zip(private, wanted, strict=True)
    ]
    found: tuple[Array | None, ...]
    if A is None or B is None:
        first = None if A is None else refit_first(part, _flat(A), priors[0])
        found = first, None if B is None else refit_last(part, _flat(B), priors[1])
    elif form.shares == "outer":
        found = None, refit_core(part, _flat(B), _flat(A), priors[1]), None
    else:
        found = refit_pair(part, _flat(B), _flat(A), (priors[0], priors[1]))
    return tuple(
        None if flat is None or want is None else flat.reshape(want)
        for flat, want in zip(found, wanted, strict=True)
    )


def _shape(kernel: Array) -> Shape:
    m, c, kh, kw = kernel.shape
    return m, c, kh, kw


def _flat(kernel: Array) -> Array:
    return kernel.reshape(len(kernel), -1)


def _some(part: Array) -> Array | None:
    return np.ascontiguousarray(part) if part.size else None
