"""A search over a small model, on which pursuits can be tried one after the other."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from onnxcomp.analysis import Analysis
from onnxcomp.deadline import Deadline
from onnxcomp.model import Array, Model
from onnxcomp.passes.working import finish, prepare
from onnxcomp.search.judge import Judge
from onnxcomp.search.pursuit import Outcome, Pursuit
from onnxcomp.search.search import Search
from onnxcomp.search.settings import Limits, Settings
from onnxcomp.search.setup import Roles, assign_samples, make_search
from onnxcomp.search.store import Store
from tests.analysis.channel_graphs import Graph

QUICK = Settings(latency=False, grid="8", methods=("remove_channels",))


def wide(*, classes: bool = False) -> Model:
    """Four 1x1 convolutions whose time is that of their MACs; maps, or scores of classes."""
    g = Graph(16, 8, 8)
    t, inputs = "x", 16
    for outputs in (64, 64, 48):
        t, inputs = g.op("Relu", g.conv(t, inputs, outputs, kernel=1)), outputs
    t = g.conv(t, inputs, 16, kernel=1)
    return g.model(g.mean(t) if classes else t)


def inputs(model: Model, count: int = 32) -> dict[str, Array]:
    """Normal inputs, the same every time."""
    rng = np.random.default_rng(0)
    return {
        v.name: rng.standard_normal((count, *v.shape[1:])).astype(v.dtype)
        for v in model.signature.inputs
    }


@dataclass
class Tried:
    """What a pursuit gave and said."""

    outcome: Outcome
    kept: list[Model]
    notes: list[str]
    times: list[float]

    @property
    def error(self) -> float:
        return self.outcome.candidate.error


@dataclass
class Searching:
    """A model with its search.

    Attributes:
        ticks: Called whenever the search reports progress.
    """

    model: Model
    roles: Roles
    search: Search
    ticks: list[Callable[[], None]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        model: Model,
        settings: Settings = QUICK,
        *,
        deadline: Deadline | None = None,
        ticks: list[Callable[[], None]] | None = None,
    ) -> "Searching":
        callbacks = [] if ticks is None else ticks
        roles = assign_samples(model, inputs(model), settings, [])
        prepared, _ = prepare(model)
        search = make_search(
            model,
            prepared,
            finish(prepared),
            roles,
            settings,
            progress=lambda *_: [tick() for tick in callbacks] and None,
            store=Store(None),
            deadline=deadline or Deadline(None),
            notes=[],
        )
        return cls(model, roles, search, callbacks)

    def absolute(self, limits: Limits) -> Limits:
        cost = Analysis(self.model).cost
        return limits.absolute(cost.macs, cost.params, self.model.file_bytes)

    def judge(self, metric=None) -> Judge:
        return Judge(self.model, self.roles.holdout, metric, threads=1)

    def predicted(self, model: Model) -> float:
        """Predicted share of the original's time; of what plans change, nothing else."""
        samples, target = self.search.space.facts.samples, self.search.space.target
        seconds = [
            sum(target.chain_seconds([li.convolution]) for li in facts.linears.values())
            for facts in (Analysis(m, samples) for m in (model, self.search.nothing.model))
        ]
        return seconds[0] / seconds[1]

    def pursue(
        self,
        limits: Limits,
        share: float | None = None,
        *,
        clock: Callable[[Model], float] | None = None,
        metric=None,
        largest: float = np.inf,
        box: bool = False,
    ) -> Tried:
        kept, notes, times = [], [], []

        def timed(model: Model) -> float:
            times.append((clock or self.predicted)(model))
            return times[-1]

        pursuit = Pursuit(
            self.search,
            self.absolute(limits),
            share,
            judge=self.judge(metric),
            clock=timed,
            keep=kept.append,
            largest=largest,
            box=box,
            seed=0,
            notes=notes,
        )
        return Tried(pursuit.run(), kept, notes, times)


@cache
def maps() -> Searching:
    """The search over `wide()`, measured once for all tests."""
    return Searching.of(wide())


@cache
def scores() -> Searching:
    """The same with scores of classes."""
    return Searching.of(wide(classes=True))


def ends_with_the_best(tried: Tried) -> bool:
    """Whether the last model that was kept is the one that is returned."""
    return bool(tried.kept) and tried.kept[-1] is tried.outcome.candidate.model


def macs(model: Model) -> int:
    return Analysis(model).cost.macs


class Clock:
    """Seconds that pass with every report of progress."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def tick(self) -> None:
        self.now += 1.0
