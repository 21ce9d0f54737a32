"""What a pass is: it declares what it does, proposes options, and applies chosen ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from onnxcomp.analysis import Analysis
from onnxcomp.model import Array, Model

if TYPE_CHECKING:
    from onnxcomp.analysis.linear import Linear
    from onnxcomp.analysis.target import Convolution
    from onnxcomp.draft import Draft
    from onnxcomp.numerics.factorization import PatchMetric

Arrays = Mapping[str, Array]


class Need(StrEnum):
    """What a pass cannot work without."""

    SAMPLES = "samples"
    LABELS = "labels"
    TORCH = "torch"


@dataclass(frozen=True, order=True)
class Option:
    """One thing that can be done at one place.

    Attributes:
        method: Name of the pass.
        target: First output of a node, or name of a channel group.
        form: Which of the pass's forms, such as "spatial"; "" where there is only one.
        size: Ranks or width that remain; () where nothing is to choose.
    """

    method: str
    target: str
    form: str = ""
    size: tuple[int, ...] = ()

    def __str__(self) -> str:
        size = "x".join(str(s) for s in self.size)
        return (
            f"{self.method}({self.target}{', ' * bool(self.form)}{self.form}"
            f"{', ' * bool(size)}{size})"
        )


@dataclass(frozen=True, order=True)
class Refusal:
    """A place where a pass does nothing, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class Proposal:
    """Everything a pass could do with a model, and what it will not do."""

    options: tuple[Option, ...] = ()
    refusals: tuple[Refusal, ...] = ()


@runtime_checkable
class Pass(Protocol):
    """One kind of graph rewriting; a frozen dataclass whose fields are its parameters."""

    name: ClassVar[str]
    exact: ClassVar[bool]
    needs: ClassVar[frozenset[Need]]

    def propose(self, facts: Analysis, /) -> Proposal:
        """Return all options and refusals; pure and deterministic."""
        ...

    def apply(self, draft: Draft, facts: Analysis, chosen: Mapping[Option, Arrays], /) -> None:
        """Write chosen options, with the arrays that were solved for them, into a draft.

        It decides nothing; `facts` are those that the options were proposed from.
        """
        ...


class NodePass(Pass, Protocol):
    """A pass each of whose options turns one linear node into others equal to a dense kernel.

    The search can then judge an option as that kernel in the node's place.
    """

    def chain(
        self, option: Option, linear: Linear, out_channels: int, in_channels: int
    ) -> list[Convolution]:
        """Return the convolutions that an option makes of a node at given widths."""
        ...

    def possible(
        self, option: Option, linear: Linear, out_channels: int, in_channels: int
    ) -> bool:
        """Whether an option is possible at given widths."""
        ...

    def errors(
        self, options: Sequence[Option], kernel: Array, metric: PatchMetric | None, /
    ) -> Mapping[Option, float]:
        """Return the squared error of the node's output under each option, or a bound."""
        ...

    def fit(
        self, option: Option, kernel: Array, metric: PatchMetric | None, /
    ) -> tuple[Arrays, Array]:
        """Solve one option's kernels; return them and the dense kernel that equals them."""
        ...


def node_proposal(
    facts: Analysis, options: Callable[[Analysis, Linear], tuple[Sequence[Option], str]]
) -> Proposal:
    """Return what is proposed node by node.

    Args:
        facts: The model.
        options: Returns the options of a linear node, and why there are none or "".
    """
    found: list[Option] = []
    refusals = [Refusal(node, reason) for node, reason in facts.not_linear.items()]
    for linear in facts.linears.values():
        own, reason = options(facts, linear)
        found += own
        if reason:
            refusals.append(Refusal(linear.id, reason))
    return Proposal(tuple(found), tuple(refusals))


def run_exact(pass_: Pass, facts: Analysis) -> tuple[Model, Proposal]:
    """Apply everything that an exact pass proposes.

    Returns:
        The new model, or the same object where nothing was proposed, and the proposal.
    """
    proposal = pass_.propose(facts)
    if not proposal.options:
        return facts.model, proposal
    draft = facts.model.edit()
    pass_.apply(draft, facts, {option: {} for option in proposal.options})
    return draft.seal(by=pass_.name), proposal


def run_all(model: Model, passes: Sequence[Pass]) -> tuple[Model, list[Refusal]]:
    """Apply exact passes one after the other; return the model and what was refused."""
    refusals: list[Refusal] = []
    for pass_ in passes:
        model, proposal = run_exact(pass_, Analysis(model))
        refusals += proposal.refusals
    return model, refusals
