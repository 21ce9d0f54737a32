"""RemoveChannels: whole channels vanish from every tensor that carries them.

Channels that elementwise operators, shortcuts, concatenations or shared weights tie together
form one group and go together.  Which of them go is found by elimination with compensation in
the readers' input metric (`numerics.selection`); the readers are then refitted, their bias
taking over the mean of what is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from onnxcomp.analysis.target import TARGETS, Target
from onnxcomp.errors import ParameterError
from onnxcomp.passes.base import Arrays, Need, Option, Proposal, Refusal
from onnxcomp.passes.channel_surgery import remove

if TYPE_CHECKING:
    from onnxcomp.analysis import Analysis
    from onnxcomp.draft import Draft


@dataclass(frozen=True)
class RemoveChannels:
    """Structured removal of coupled channels.

    Attributes:
        target: Profile whose grid the widths follow.
        step: Multiples of this instead of the grid; 1 frees all widths.
    """

    name: ClassVar[str] = "remove_channels"
    exact: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset()

    target: Target = TARGETS["x86-avx512"]
    step: int | None = None

    def __post_init__(self) -> None:
        if self.step is not None and self.step < 1:
            raise ParameterError.of("RemoveChannels", "step", "None or at least 1", self.step)

    def propose(self, facts: Analysis, /) -> Proposal:
        """Return the widths of every group that may shrink, and why others may not."""
        options: list[Option] = []
        refusals: list[Refusal] = []
        for group in facts.channels.groups:
            if group.pinned is not None:
                refusals.append(Refusal(group.name, group.pinned))
                continue
            per_channel = group.slices[0].index.shape[1]
            sizes = self.target.sizes(group.size * per_channel, step=self.step)
            widths = sorted({s // per_channel for s in sizes if s % per_channel == 0})
            options += [Option(self.name, group.name, "", (w,)) for w in widths]
            if not widths:
                refusals.append(
                    Refusal(group.name, f"no width on the grid is below its {group.size}")
                )
        return Proposal(tuple(options), tuple(refusals))

    def apply(self, draft: Draft, facts: Analysis, chosen: Mapping[Option, Arrays], /) -> None:
        """Remove the channels that the arrays' "removed" (indices into the group) name."""
        removed = {option.target: arrays["removed"] for option, arrays in chosen.items()}
        if removed:
            remove(draft, facts.channels, removed)
