"""The losses of a search space, as measured: what plans are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from onnxcomp.numerics.selection import Elimination
from onnxcomp.passes.base import Option, Refusal
from onnxcomp.search.sharing import JointLosses
from onnxcomp.search.space import Plan

LATE = "the time limit was reached before it was measured"
_RESCALED = 10.0  # largest factor between losses alone and in place


@dataclass(frozen=True)
class Losses:
    """Measured losses.

    Attributes:
        forms: Loss of every form of a node worth considering.
        widths: Loss of every width worth considering, by group.
        orders: Order in which each group's channels go.
        refusals: Why a node or group has no option left, or a node not all of its forms.
        joint: Loss of each joint factorisation at each of its nodes.
    """

    forms: Mapping[Option, float]
    widths: Mapping[str, Mapping[int, float]]
    orders: Mapping[str, Elimination]
    refusals: tuple[Refusal, ...] = ()
    joint: JointLosses = field(default_factory=JointLosses)

    def of(self, plan: Plan) -> dict[str | Option, float]:
        """Return the losses of a plan's own options, by group or by form."""
        measured = [(n, w, self.widths.get(n, {})) for n, w in plan.widths.items()]
        found: dict[str | Option, float] = {n: lost[w] for n, w, lost in measured if w in lost}
        return found | {o: self.forms[o] for o in plan.forms.values() if o in self.forms}

    def updated(self, newer: Losses, plan: Plan) -> Losses:
        """Return these losses with those of some nodes and groups measured again.

        In place of others a change loses less than alone, or more; the newer losses are
        scaled by one factor, so that those options of `plan` keep their sum.
        """
        again = {option.target for option in newer.forms}
        found = newer.of(plan)
        old = sum(lost for option, lost in self.of(plan).items() if option in found)
        newly = sum(found.values())
        factor = min(max(old / newly, 1 / _RESCALED), _RESCALED) if newly else 1.0
        kept = {o: lost for o, lost in self.forms.items() if o.target not in again}
        widths = {
            name: {w: factor * lost for w, lost in each.items()}
            for name, each in newer.widths.items()
        }
        return Losses(
            {**kept, **{o: factor * lost for o, lost in newer.forms.items()}},
            {**self.widths, **widths},
            {**self.orders, **newer.orders},
            self.refusals,
            self.joint,
        )
