"""The search: measure losses once, then choose a plan within limits and solve it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.stream import Feeds
from onnxcomp.errors import LimitError
from onnxcomp.model import Model
from onnxcomp.passes.base import Refusal
from onnxcomp.report import Action
from onnxcomp.search.actions import describe
from onnxcomp.search.allocation import Allocator
from onnxcomp.search.losses import Losses, LossMeter, Progress
from onnxcomp.search.settings import Limits, Settings
from onnxcomp.search.space import Plan, Space
from onnxcomp.search.walk import Walk
from onnxcomp.search.working import finish

T = TypeVar("T")
_SIZE_ROUNDS = 3
_FRONT = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


@dataclass(frozen=True)
class Outcome:
    """A plan, the model that it made, and whether all limits hold."""

    plan: Plan
    model: Model
    met: bool


class Search:
    """One search space with its losses, from which any number of plans can be made.

    Args:
        space: The options.
        batches: Fitting samples.
        measured: Leading batches on which losses are measured.
        settings: Seed, threads and how to solve.
        progress: Called with a label and the share done.
        notes: Receives what the reader of the report must know.
    """

    def __init__(
        self,
        space: Space,
        batches: Sequence[Feeds],
        measured: int,
        settings: Settings,
        progress: Progress,
        notes: list[str],
    ) -> None:
        self.space = space
        self.seconds: dict[str, float] = {}
        self.nothing = Plan({}, {}, 0.0, space.facts.cost, space.seconds({}, {}))
        self._batches = batches
        self._measured = measured
        self._settings = settings
        self._progress = progress
        self._notes = notes
        self._losses: Losses | None = None
        self._allocator: Allocator | None = None

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Why nodes and groups were left alone."""
        return (*self.space.refusals, *(self._losses.refusals if self._losses else ()))

    def plan(self, limits: Limits, plain: Model) -> tuple[Plan, bool]:
        """Return the best plan within absolute limits, and whether there is one.

        Where none is within them, the plan nearest to them is returned, and a note says why;
        where the prepared original `plain` is within them already, the plan is empty.
        """
        if self._within(plain, limits):
            return self.nothing, True
        allocator = self._measure()
        try:
            return self._timed("allocate", partial(allocator.choose, limits)), True
        except LimitError as error:
            self._notes.append(str(error))
            return self._timed("allocate", partial(allocator.smallest, limits)), False

    def run(self, limits: Limits, plain: Model) -> Outcome:
        """Plan and solve until the file that would be written is within the limits, too.

        Args:
            limits: Absolute limits.
            plain: The prepared original, which an empty plan gives.
        """
        wanted, outcome = limits, Outcome(self.nothing, plain, False)
        for _ in range(_SIZE_ROUNDS):
            plan, reached = self.plan(wanted, plain)
            model = plain if plan.empty else self._solve(plan)
            outcome = Outcome(plan, model, self._within(model, limits))
            excess = model.file_bytes - (limits.size or model.file_bytes)
            if excess <= 0 or plan.empty or not reached:
                break
            smaller = (wanted.size or 0.0) - 1.05 * excess
            wanted = replace(wanted, size=max(smaller, 1.0))
        return outcome

    def describe(self, plan: Plan) -> tuple[tuple[Action, ...], int]:
        """Return what a plan does, in words, and the MACs of all nodes that it changes."""
        return ((), 0) if self._losses is None else describe(self.space, plan, self._losses)

    def front(self, macs: int) -> tuple[tuple[float, float], ...]:
        """Return predicted points (share of `macs`, loss), most MACs first."""
        if self._allocator is None:
            return ()
        points = []
        for share in _FRONT:
            try:
                plan = self._allocator.choose(Limits(macs=max(share * macs, 2.0)), rough=True)
            except LimitError:
                break
            points.append((plan.cost.macs / macs, plan.loss))
        return tuple(points)

    def _measure(self) -> Allocator:
        if self._allocator is None:
            meter = LossMeter(
                self.space,
                self._batches,
                measured=self._measured,
                seed=self._settings.seed,
                threads=self._settings.threads,
                progress=self._progress,
                data_aware=self._settings.data_aware,
            )
            self._losses = self._timed("losses", meter.run)
            self._allocator = Allocator(
                self.space,
                self._losses,
                time_limit_s=self._settings.solver_seconds,
                patience=self._settings.patience if self._settings.step is None else 1.0,
            )
        return self._allocator

    def _solve(self, plan: Plan) -> Model:
        if self._losses is None:
            raise AssertionError("a plan exists only after its losses were measured")
        walk = Walk(
            self.space,
            plan,
            self._losses,
            self._batches,
            seed=self._settings.seed,
            threads=self._settings.threads,
            progress=self._progress,
            data_aware=self._settings.data_aware,
        )
        return finish(self._timed("walk", walk.run))

    def _within(self, model: Model, limits: Limits) -> bool:
        cost = Analysis(model, self.space.facts.samples).cost
        row = (cost.macs, cost.params, model.file_bytes)
        return all(found <= limit for found, limit in zip(row, limits.row, strict=True))

    def _timed(self, phase: str, work: Callable[[], T]) -> T:
        start = time.monotonic()
        self._progress(phase, 0.0)
        value = work()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - start
        return value
