"""`MergeInitializers`: byte-identical initializers become one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from onnxcomp.passes._graph import GraphView
from onnxcomp.passes.base import Arrays, Need, Option, Proposal, Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from onnxcomp.analysis import Analysis
    from onnxcomp.draft import Draft
    from onnxcomp.model import Array

    _Key = tuple[str, tuple[int, ...], bytes]


@dataclass(frozen=True)
class MergeInitializers:
    """Lets all readers of equal initializers read the first of them.

    Equal means equal dtype, shape and bytes, so 0.0 and -0.0 differ and equal NaNs merge.
    """

    name: ClassVar[str] = "merge_initializers"
    exact: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset()

    def propose(self, facts: Analysis, /) -> Proposal:
        """Return an option or a refusal for every repetition of an initializer."""
        view = GraphView(facts.model)
        options, refusals = [], []
        for name, first in _repetitions(view):
            reason = view.fixed(name)
            if reason is None:
                options.append(Option(self.name, name))
            else:
                refusals.append(Refusal(name, f"equals '{first}', but {reason}"))
        return Proposal(tuple(options), tuple(refusals))

    def apply(self, draft: Draft, facts: Analysis, chosen: Mapping[Option, Arrays], /) -> None:
        """Let the readers of chosen initializers read the first equal one."""
        targets = {option.target for option in chosen}
        for name, first in _repetitions(GraphView(facts.model)):
            if name in targets:
                draft.rewire(name, first)


def _repetitions(view: GraphView) -> Iterator[tuple[str, str]]:
    """Yield every initializer that equals an earlier one, with the earlier one's name."""
    firsts: dict[_Key, str] = {}
    for name, array in view.model.weights.items():
        if array.size == 0 or not (view.uses(name) or name in view.model.output_names):
            continue
        first = firsts.setdefault(_key(array), name)
        if first != name:
            yield name, first


def _key(array: Array) -> _Key:
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return array.dtype.name, array.shape, hashlib.blake2b(data.data, digest_size=32).digest()
