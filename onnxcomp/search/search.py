"""The search: losses measured once, from which plans are chosen and solved."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar, TypeVar

import numpy as np

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.stream import Feeds
from onnxcomp.deadline import Deadline, Progress
from onnxcomp.errors import LimitError
from onnxcomp.model import Array, Model
from onnxcomp.passes.base import Refusal
from onnxcomp.passes.working import finish
from onnxcomp.report import Action
from onnxcomp.search.actions import describe
from onnxcomp.search.adaptation import Adapted
from onnxcomp.search.allocation import Allocator
from onnxcomp.search.loss_meter import LossMeter
from onnxcomp.search.losses import Losses
from onnxcomp.search.outputs import OutputError, OutputMeter, raw_runs
from onnxcomp.search.settings import Limits, Settings
from onnxcomp.search.sharing import JointLosses, Sharing
from onnxcomp.search.space import Plan, Space
from onnxcomp.search.storage import Storage, written_bytes
from onnxcomp.search.store import Store
from onnxcomp.search.walk import Walk

T = TypeVar("T")
_FRONT = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
_FRONT_SECONDS = 5.0
_TABLE_SHARE = 0.5  # of the time limit, that measuring losses may take
_SAME = 1e-6  # relative difference of predicted times that counts as none
_SOLVER_SHARE = 0.25  # of the time left, that one programme may take


@dataclass(frozen=True)
class Candidate:
    """A plan that was solved.

    Attributes:
        plan: What was done.
        model: The model that it made; the prepared original for an empty plan.
        weights: Dense weights of the working model that compute the same.
        error: Squared change of the raw outputs relative to their variance, on the hold-out.
        stored: What was done to weights for the form of the written file.
    """

    plan: Plan
    model: Model
    weights: Mapping[str, Array]
    error: float
    stored: tuple[Action, ...] = ()


@dataclass(frozen=True)
class Point:
    """A plan beside others on the Pareto front; costs are shares of the original's.

    Attributes:
        macs: Multiply-accumulates.
        params: Parameters.
        file_bytes: Bytes of the file.
        seconds: Predicted time of what plans may change.
        loss: Predicted squared change of the raw outputs relative to their variance.
        error: The same as found on the hold-out; None for a plan that was not solved.
    """

    macs: float
    params: float
    file_bytes: float
    seconds: float
    loss: float
    error: float | None = None


class Search:
    """One search space with its losses, from which any number of plans can be made.

    Args:
        space: The options.
        batches: Fitting samples.
        measured: Leading batches on which losses are measured.
        holdout: Hold-out samples, on which candidates are compared.
        plain: The prepared original, which an empty plan gives.
        settings: Seed, threads and how to solve.
        progress: Called with a label and the share done.
        store: Where measurements and candidates are kept.
        deadline: When to stop.
        adapted: Where the working model was adapted to BatchNorm statistics, how to undo it.

    Attributes:
        varied: Whether further plans can be made by measuring losses again or shaking them.
    """

    varied: ClassVar[bool] = True

    def __init__(
        self,
        space: Space,
        batches: Sequence[Feeds],
        measured: int,
        holdout: Sequence[Feeds],
        plain: Model,
        *,
        settings: Settings,
        progress: Progress,
        store: Store,
        deadline: Deadline,
        adapted: Adapted | None = None,
    ) -> None:
        self.space = space
        self.seconds: dict[str, float] = {}
        nothing = Plan({}, {}, 0.0, space.facts.cost, space.seconds({}, {}))
        self.nothing = Candidate(nothing, plain, {}, 0.0)
        self.deadline = deadline
        self.store = store
        self._batches = batches
        self._measured = measured
        self._holdout = holdout
        self._settings = settings
        self._progress = progress
        self._adapted = adapted
        self._sizes: dict[str, int] = {}
        self._losses: Losses | None = None
        self._tried: dict[str, tuple[Plan, float]] = {}  # by digest

    def refusals(self, plan: Plan) -> tuple[Refusal, ...]:
        """Return why passes had no option for nodes and groups that the plan leaves alone."""
        found = (*self.space.refusals, *(self._losses.refusals if self._losses else ()))
        changed = {*plan.forms, *plan.widths}
        return tuple(refusal for refusal in found if refusal.where not in changed)

    @property
    def losses(self) -> Losses:
        """The losses of single options, measured when they are first asked for."""
        if self._losses is None:
            deadline = self.deadline.share(_TABLE_SHARE)
            self._losses = replace(
                self.timed("losses", self._meter(self.store, deadline).run),
                joint=self.timed("joint losses", partial(self._joint_losses, deadline)),
            )
        return self._losses

    def _joint_losses(self, deadline: Deadline) -> JointLosses:
        settings = self._settings
        sharing = Sharing(
            self.space,
            self._batches,
            seed=settings.seed,
            threads=settings.cores,
            progress=self._progress,
            data_aware=settings.data_aware,
        )
        return sharing.measure(self._measured, self.store, deadline)

    def measure_again(self, candidate: Candidate, names: Sequence[str]) -> Losses:
        """Return the losses with some nodes and groups measured in a candidate's place.

        Their options are then measured with all others of the candidate in place.
        """
        store = self.store.scoped("again", self._key(candidate.plan, self.losses))
        meter = self._meter(store, self.deadline.share(_TABLE_SHARE))
        work = partial(meter.run, candidate.weights, names)
        return self.losses.updated(self.timed("losses in place", work), candidate.plan)

    def _meter(self, store: Store, deadline: Deadline) -> LossMeter:
        settings = self._settings
        return LossMeter(
            self.space,
            self._batches,
            measured=self._measured,
            seed=settings.seed,
            threads=settings.cores,
            progress=self._progress,
            data_aware=settings.data_aware,
            store=store,
            deadline=deadline,
        )

    def allocator(self, losses: Losses) -> Allocator:
        """Return what chooses plans by given losses."""
        settings = self._settings
        left = _SOLVER_SHARE * self.deadline.left
        return Allocator(
            self.space,
            losses,
            time_limit_s=max(min(settings.solver_seconds, left), 1.0),
            patience=settings.patience if settings.step is None else 1.0,
        )

    def choose(
        self, losses: Losses, limits: Limits, *, seconds: float = np.inf
    ) -> tuple[Plan, str]:
        """Return the best plan within absolute limits, and why there is none.

        Where none is within them, the plan nearest to them is returned with the reason.
        """
        allocator = self.allocator(losses)
        try:
            work = partial(allocator.choose, limits, seconds=seconds)
            return self.timed("allocate", work), ""
        except LimitError as error:
            nearest = partial(allocator.smallest, limits, seconds=seconds)
            return self.timed("allocate", nearest), str(error)

    def fastest(self, losses: Losses, loss: float, limits: Limits) -> Plan | None:
        """Return the plan of least predicted time within a loss and limits, if any.

        Of plans that take equally long it is the one of least loss.
        """
        allocator = self.allocator(losses)
        try:
            plan = self.timed("allocate", partial(allocator.fastest, loss, limits))
        except LimitError:
            return None
        if plan.empty:
            return plan
        within = partial(allocator.choose, limits, seconds=plan.seconds * (1 + _SAME))
        try:
            best = self.timed("allocate", within)
        except LimitError:
            return plan
        return best if best.loss < plan.loss else plan

    def solve(self, plan: Plan, losses: Losses) -> Candidate:
        """Solve a plan's arrays, or take them over from an earlier run.

        Raises:
            TimeLimitReached: The deadline passed before it was done.
        """
        if plan.empty:
            return self.nothing
        key = self._key(plan, losses)
        model, kept = self.store.get_model("model", key), self.store.get("walk", key)
        if model is None or kept is None:
            walked = self.timed("walk", self._walk(plan, losses).run)
            model = finish(walked.model)
            kept = dict(walked.weights)
            self.store.put_model("model", key, model)
            self.store.put("walk", key, kept)
        error = self.timed("judge", lambda: self._judged.of(kept))
        self._tried[model.digest] = plan, error
        return Candidate(plan, model, kept, error)

    def _walk(self, plan: Plan, losses: Losses) -> Walk:
        """Return what solves a plan."""
        return Walk(
            self.space,
            plan,
            losses,
            self._batches,
            seed=self._settings.seed,
            threads=self._settings.cores,
            progress=self._progress_until_deadline,
            data_aware=self._settings.data_aware,
            adapted=self._adapted,
        )

    def _key(self, plan: Plan, losses: Losses) -> list[Any]:
        """Return what decides the arrays of a plan, as plain values."""
        widths = [
            (name, width, losses.orders[name].order.tolist())
            for name, width in sorted(plan.widths.items())
        ]
        forms = [(n, o.target, o.form, list(o.size)) for n, o in sorted(plan.forms.items())]
        return [widths, forms]

    def _progress_until_deadline(self, label: str, share: float) -> None:
        self.deadline.check()
        self._progress(label, share)

    @cached_property
    def _judged(self) -> OutputMeter:
        facts, threads = self.space.facts, self._settings.cores
        return OutputMeter(facts.model, facts.tensors, self._holdout, threads=threads)

    def within(self, model: Model, limits: Limits) -> bool:
        """Whether a model's MACs, parameters and bytes are within absolute limits."""
        cost = Analysis(model, self.space.facts.samples).cost
        row = (cost.macs, cost.params, self.size(model))
        return all(found <= limit for found, limit in zip(row, limits.row, strict=True))

    def size(self, model: Model) -> int:
        """Return the bytes of the file that a model will be written to."""
        if model.digest not in self._sizes:
            self._sizes[model.digest] = written_bytes(model, self._settings.emit)
        return self._sizes[model.digest]

    def file_bytes(self, plan: Plan) -> int:
        """Return the predicted size of the file that a plan makes."""
        return self.space.file_bytes(plan.cost, plan.forms)

    @property
    def shares(self) -> bool:
        """Whether weights are to take few values, for the form of the written file."""
        return self._settings.shares

    def share(self, candidate: Candidate, limit: float | None) -> Candidate:
        """Return a candidate whose weights take few values, for a limit on its file.

        Raises:
            TimeLimitReached: The deadline passed before it was done.
        """
        settings = self._settings
        storage = Storage(
            candidate.model,
            self.space.facts.samples,
            self._batches,
            self._measured,
            exclude=settings.exclude,
            trained=settings.tune,
            data_aware=settings.data_aware,
            seed=settings.seed,
            threads=settings.cores,
            progress=self._progress_until_deadline,
        )
        if settings.emit == "codebook":
            found = self.timed("share weights", storage.in_bytes)
        else:
            limit = np.inf if limit is None else limit
            found = self.timed("share weights", partial(storage.within, limit))
        return replace(
            candidate, model=found.model, error=self.change(found.model), stored=found.actions
        )

    def change(self, model: Model) -> float:
        """Return how far a model's raw outputs are from the original's, on the hold-out."""
        runs = raw_runs(model, self._holdout, threads=self._settings.cores)
        return self._original_outputs.of(runs)

    @cached_property
    def _original_outputs(self) -> OutputError:
        plain, threads = self.nothing.model, self._settings.cores
        return OutputError(list(raw_runs(plain, self._holdout, threads=threads)))

    def describe(self, plan: Plan) -> tuple[tuple[Action, ...], int]:
        """Return what a plan does, in words, and the MACs of all nodes that it changes."""
        return ((), 0) if self._losses is None else describe(self.space, plan, self._losses)

    def front(self) -> tuple[Point, ...]:
        """Return a Pareto front, most MACs first; nothing before losses were measured.

        Of the plans that were solved those that no other beats in time and error, and
        predicted ones at limits on the MACs, as far as a few seconds go.
        """
        if self._losses is None:
            return ()
        tried = self._tried.values()
        points = [
            self._point(plan, error)
            for plan, error in tried
            if not any(p.seconds <= plan.seconds and e < error for p, e in tried)
        ]
        whole, deadline = self.nothing.plan.cost.macs, Deadline(_FRONT_SECONDS)
        each = _FRONT_SECONDS / len(_FRONT)
        allocator = Allocator(self.space, self._losses, time_limit_s=each)
        for share in _FRONT:
            if deadline.passed or self.deadline.passed:
                break
            try:
                plan = allocator.choose(Limits(macs=max(share * whole, 2.0)), rough=True)
            except LimitError:
                break
            if all(plan != solved for solved, _ in tried):
                points.append(self._point(plan, None))
        return tuple(sorted(points, key=lambda point: -point.macs))

    def _point(self, plan: Plan, error: float | None) -> Point:
        base = self.nothing.plan
        return Point(
            plan.cost.macs / base.cost.macs,
            plan.cost.params / base.cost.params,
            self.file_bytes(plan) / self.file_bytes(base),
            plan.seconds / base.seconds,
            plan.loss,
            error,
        )

    def timed(self, phase: str, work: Callable[[], T]) -> T:
        """Do a piece of work and add its wall time to that of its phase."""
        start = time.monotonic()
        self._progress(phase, 0.0)
        try:
            return work()
        finally:
            spent = time.monotonic() - start
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent


def smaller(limits: Limits, excess: float) -> Limits:
    """Return limits whose bound on the file's size is lower by a little more than `excess`."""
    return replace(limits, size=max((limits.size or 0.0) - 1.05 * excess, 1.0))
