"""`compress`: from a vendor's model and unlabelled samples to a smaller, faster model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike
from threadpoolctl import threadpool_limits

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.target import find_target
from onnxcomp.bench import Benchmark, is_slower
from onnxcomp.deadline import Deadline, Progress
from onnxcomp.errors import UnsupportedModelError
from onnxcomp.evaluate import predict
from onnxcomp.metrics import Metric, load_metric
from onnxcomp.model import Model
from onnxcomp.passes.working import finish, prepare
from onnxcomp.report import Action, Figures, Report
from onnxcomp.samples import Samples
from onnxcomp.search.clock import Clock
from onnxcomp.search.judge import Judge
from onnxcomp.search.pursuit import Outcome, Pursuit
from onnxcomp.search.search import Search
from onnxcomp.search.settings import Limits, Settings
from onnxcomp.search.setup import Roles, assign_samples, invert_samples, make_search
from onnxcomp.search.space import Plan
from onnxcomp.search.storage import sized_as, without_codebook
from onnxcomp.search.store import Store
from onnxcomp.search.tuning import SEARCH_SHARE, check_expressible, check_tuning, tuned
from onnxcomp.validation import Ladder, validate

_LATENCY_SECONDS = 20.0  # of the measurement that is reported
_LEAST_SECONDS = 1.0  # of the same, when time is up
_FINAL_SHARE = 0.15  # of the time limit, kept for the measurement that is reported
_BLIND = 0.5  # share of a limit on drop or drift that is used where there are no samples
Keep = Callable[[Model], None]


@dataclass(frozen=True)
class Result:
    """What `compress` returns.

    Attributes:
        model: The model to ship.
        plan: What was done to it.
        report: Everything that was found and measured.
        met: Whether all limits hold.
        search: The search, from which further plans can be made.
        interrupted: Whether Ctrl-C ended the search; the model is then the best so far.
    """

    model: Model
    plan: Plan
    report: Report
    met: bool
    search: Search = field(repr=False)
    interrupted: bool = False


def compress(
    model: Model,
    data: Samples | Mapping[str, ArrayLike] | ArrayLike | Iterable[Any] | None = None,
    *,
    limits: Limits | None = None,
    settings: Settings | None = None,
    metric: Metric | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
    resume: str | Path | None = None,
    keep: Keep | None = None,
) -> Result:
    """Compress a model after training.

    Args:
        model: The vendor's model; it is not changed.
        data: Inputs, whose labels are used by `metric` and tuning only; if None, images
            inverted from what BatchNormalization recorded stand for them, or noise.
        limits: What the result may cost; overrides `settings.limits`.
        settings: Everything else.
        metric: Task metric to report, and to limit the drop of; drift is always reported.
            With a limit on the drop and none given: top-1 where there are labels, else
            agreement with the original.
        progress: Called with a label and the share of the phase that is done.
        dry_run: Stop at the plan: the report carries predicted figures, and the model is the
            prepared original.
        resume: Folder where measurements and candidates are kept, and taken over from a run
            of the same model, samples and settings (limits may differ).
        keep: Called with the best model so far: the input first, then every better one.

    Returns:
        The result; where nothing pays, its model is the prepared original.

    Raises:
        UnsupportedModelError: The model holds what onnxcomp cannot work on, or cannot tune.
        DataError: The samples do not fit the model, or are too few for limits on drop and
            drift.
        ParameterError: A setting is outside what it allows.
    """
    settings = settings or Settings()
    if limits is not None:
        settings = replace(settings, limits=limits)
    with threadpool_limits(1):  # of BLAS; see `Settings.search_threads`
        run = _Run(model, data, settings, metric, progress or (lambda *_: None))
        return run.result(Path(resume) if resume else None, keep or (lambda _: None), dry_run)


class _Run:
    """One run of `compress`: its phases, in order."""

    def __init__(
        self,
        model: Model,
        data: Any,
        settings: Settings,
        metric: Metric | None,
        progress: Progress,
    ) -> None:
        if model.foreign_ops:
            raise UnsupportedModelError(
                f"operators outside the ONNX domain: {', '.join(model.foreign_ops)}; "
                "`inspect` shows the model, `compress` cannot judge what they compute"
            )
        end = settings.time_limit
        self._final_seconds = min(_LATENCY_SECONDS, _FINAL_SHARE * (end or math.inf))
        self._whole = Deadline(end)
        self._end = Deadline(None if end is None else end - self._final_seconds)
        self._deadline = self._end.share(SEARCH_SHARE) if settings.tune else self._end
        self._settings = settings
        self._progress = progress
        self._notes: list[str] = []
        self._original = sized_as(model, settings.emit, self._notes)
        self._seconds: dict[str, float] = {}
        self._samples = assign_samples(model, data, settings, self._notes)
        if settings.tune:
            check_tuning(self._samples.given, settings.device)
        if metric is None and settings.limits.drop is not None:
            metric = load_metric("agreement" if self._samples.labels is None else "top1")
        if metric is not None and metric.classes:
            settings.limits.check_share()
        self._metric = metric

    def result(self, resume: Path | None, keep: Keep, dry_run: bool) -> Result:
        """Run all phases."""
        settings = self._settings
        store = Store(resume)
        self._check_metric()
        keep(self._original)
        self._base = Analysis(self._original, self._samples.fit, seed=settings.seed)
        prepared, self._refusals = self._timed("prepare", partial(prepare, self._original))
        self._plain = finish(prepared)
        if settings.tune:
            check_expressible(self._plain)
        idle = settings.limits == Limits() and not settings.shares
        if self._samples.given is None and not idle:
            self._samples = self._timed("invert", partial(self._inverted, prepared, store))
        make = partial(
            make_search,
            self._original,
            prepared,
            self._plain,
            self._samples,
            settings,
            progress=self._progress,
            store=store,
            deadline=self._deadline,
            notes=self._notes,
        )
        self._search = self._timed("analyse", make)
        cost = self._base.cost
        limits = settings.limits.absolute(cost.macs, cost.params, self._original.file_bytes)
        if limits.judged and not self._samples.given:
            limits = limits.judged_at(_BLIND)
            self._notes.append("limits on drop and drift were halved: no real samples judge")
        if idle:
            self._notes.append("no limit was given: there was nothing to do but exact passes")
            return self._judge(Outcome(self._search.nothing, met=True))
        if dry_run:
            return self._preview(limits)
        pursuit = self._pursuit(limits, keep)
        try:
            pursuit.run()
            if settings.tune:
                self._tune(pursuit, limits, keep, resume)
            return self._judge(pursuit.best, *pursuit.earlier)
        except KeyboardInterrupt:
            self._notes.append("interrupted; this is the best so far")
            self._settings = replace(settings, latency=False)
            return replace(self._judge(pursuit.best), interrupted=True)

    def _inverted(self, prepared: Model, store: Store) -> Roles:
        """Return what stands for samples, none being given."""
        return invert_samples(
            self._original,
            prepared,
            self._samples,
            self._settings,
            progress=self._progress,
            store=store,
            deadline=self._deadline,
            notes=self._notes,
        )

    def _check_metric(self) -> None:
        """Raise what a metric that does not fit would raise, before work is done for it."""
        if self._metric is not None:
            samples = self._samples.holdout
            outputs = predict(self._original, samples, threads=self._settings.cores)
            self._metric.score(outputs, samples, outputs)
            self._metric.check_labels(outputs, self._samples.labels)

    def _pursuit(self, limits: Limits, keep: Keep) -> Pursuit:
        settings, clock = self._settings, self._clock
        grows = settings.force or settings.emit != "onnx"
        whole = max(m.file_bytes for m in (self._original, self._plain))
        return Pursuit(
            self._search,
            limits,
            self._share(limits.latency),
            judge=self._holdout_judge(),
            clock=clock,
            keep=keep,
            largest=math.inf if grows else whole,
            box=settings.time_limit is not None
            and settings.data_aware
            and self._search.varied
            and not self._search.shares,  # which takes what time is left
            seed=settings.seed,
            notes=self._notes,
        )

    def _holdout_judge(self) -> Judge:
        samples, threads = self._samples.holdout, self._settings.cores
        return Judge(self._original, samples, self._metric, threads=threads)

    def _tune(self, pursuit: Pursuit, limits: Limits, keep: Keep, resume: Path | None) -> None:
        """Let the best candidate learn from the original; the result is the best then."""
        samples, search = self._samples, self._search
        if pursuit.best.candidate is search.nothing:
            return
        learn = partial(
            tuned,
            pursuit.best,
            self._original,
            (samples.plain, samples.holdout),
            self._settings,
            limits,
            fits=lambda model: search.within(model, limits),
            judge=self._holdout_judge(),
            change=self._search.change,
            deadline=self._end,
            resume=resume,
            progress=self._progress,
            notes=self._notes,
        )
        found, interrupted = self._timed("tune", learn)
        if found is not pursuit.best:
            pursuit.best = found
            keep(found.candidate.model)
        if interrupted:
            raise KeyboardInterrupt

    @cached_property
    def _clock(self) -> Clock:
        settings = self._settings
        return Clock(
            self._original,
            self._samples.holdout,
            find_target(settings.target),
            threads=settings.threads,
            deadline=self._end,
        )

    def _share(self, limit: float | None) -> float | None:
        """Return a limit on the latency as a share of the original's."""
        if limit is None:
            return None
        return float(self._search.timed("latency", partial(self._clock.share, limit)))

    def _preview(self, limits: Limits) -> Result:
        """Return a result that was not made: the plan with its predicted figures."""
        plan, met = self._planned(limits)
        size = self._search.file_bytes(plan)
        if self._search.shares and limits.size is not None:
            size = min(size, int(limits.size))
            self._notes.append("weights will be rounded until the file is within its limit")
        figures = Figures(plan.cost.params, plan.cost.macs, size, None)
        report = self._report(plan, self._validate(self._plain), None, figures, met)
        return Result(self._plain, plan, report, met, self._search)

    def _planned(self, limits: Limits) -> tuple[Plan, bool]:
        """Return the plan to begin with, and whether it is predicted to be within."""
        search, nothing = self._search, self._search.nothing
        if search.shares and limits.size is not None:  # met by rounding
            limits = replace(limits.without_judgement, size=None)
        if limits.judged:
            pursuit = self._pursuit(limits, lambda _: None)
            plan = search.fastest(search.losses, pursuit.first_bound, limits)
            return plan or nothing.plan, plan is not None
        share = self._share(limits.latency)
        if search.within(nothing.model, limits) and share is None:
            return nothing.plan, True
        seconds = math.inf if share is None else share * nothing.plan.seconds
        plan, reason = search.choose(search.losses, limits, seconds=seconds)
        if reason:
            self._notes.append(reason)
        return plan, not reason

    def _judge(self, *outcomes: Outcome) -> Result:
        """Validate and measure the first; where that does not pay, fall back on the next."""
        for outcome in outcomes:
            plan, candidate = outcome.candidate.plan, outcome.candidate.model
            met, stored = outcome.met, outcome.candidate.stored
            ladder, benchmark = self._seen(candidate)
            reason = self._regret(candidate, ladder, benchmark)
            if not reason:
                break
            if not plan.empty:
                self._notes.append(f"{reason}; it was not kept")
        else:
            self._notes.append("the original was kept")
            plan = self._search.nothing.plan
            candidate = min(self._plain, self._original, key=lambda m: m.file_bytes)
            met, stored = self._settings.limits.without_judgement == Limits(), ()
            ladder, benchmark = self._seen(candidate)
        if stored:
            self._notes.append("levels save bytes of the file, not time: sessions run floats")
        figures = Figures.of(Analysis(candidate, self._samples.fit), benchmark, 1)
        figures = replace(figures, file_bytes=self._search.size(candidate))
        self._refusals += without_codebook(candidate, self._settings.emit)
        report = self._report(plan, ladder, benchmark, figures, met, stored)
        if there := self._clock.elsewhere:
            share = self._clock(candidate)
            note = f"the target is {there}: {1 / share:.2f}x is predicted; times are of here"
            report = replace(report, predicted=share, notes=(note, *report.notes))
        return Result(candidate, plan, report, met, self._search)

    def _report(
        self,
        plan: Plan,
        ladder: Ladder,
        benchmark: Benchmark | None,
        figures: Figures,
        met: bool,
        stored: tuple[Action, ...] = (),
    ) -> Report:
        actions, changed = self._search.describe(plan)
        front = self._timed("front", self._search.front)
        return Report(
            original=Figures.of(self._base, benchmark, 0),
            result=figures,
            actions=(*actions, *stored),
            refusals=(*self._search.refusals(plan), *self._refusals),
            ladder=ladder,
            benchmark=benchmark,
            notes=tuple(self._notes),
            seconds=self._seconds | self._search.seconds,
            changed_macs=changed / max(self._base.cost.macs, 1),
            met=met,
            settings=self._settings,
            front=front,
        )

    def _seen(self, candidate: Model) -> tuple[Ladder, Benchmark | None]:
        """Validate and measure a model that may be shipped."""
        ladder = self._timed("validate", partial(self._validate, candidate))
        return ladder, self._timed("final latency", partial(self._latency, candidate))

    def _validate(self, candidate: Model) -> Ladder:
        return validate(
            self._original,
            candidate,
            None if self._samples.holdout.origin == "random" else self._samples.holdout,
            metric=self._metric,
            threads=self._settings.cores,
            allow_larger=self._settings.force or self._settings.emit != "onnx",
            seed=self._settings.seed,
        )

    def _latency(self, candidate: Model) -> Benchmark | None:
        if not self._settings.latency:
            return None
        seconds = min(self._final_seconds, max(self._whole.left, _LEAST_SECONDS))
        return self._clock.measured(self._original, candidate, seconds=seconds)

    def _regret(self, candidate: Model, ladder: Ladder, benchmark: Benchmark | None) -> str:
        """Return why the candidate must not be shipped, or ""."""
        if not ladder.passed:
            failed = ladder.rungs[-1]
            return f"the result failed validation at '{failed.name}' ({failed.detail})"
        if self._settings.force:
            return ""
        if self._search.size(candidate) > self._original.file_bytes:
            return "the result is larger than the input"
        if benchmark is None or not is_slower(benchmark, 1):
            return ""
        slower = f"the result is slower ({benchmark.models[1].ratio.value:.2f}x)"
        limits = self._settings.limits
        if limits == Limits(size=limits.size) and limits.size is not None:
            self._notes.append(f"{slower}; kept, as only its size was limited")
        elif self._clock.elsewhere:
            self._notes.append(f"{slower}; kept, as the target is another machine")
        elif self._settings.grid == "off":  # which is for comparisons by MACs, not by time
            self._notes.append(f"{slower}; kept, as --grid off leaves the target's grid")
        else:
            return slower
        return ""

    def _timed(self, phase: str, work: Callable[[], Any]) -> Any:
        start = time.monotonic()
        self._progress(phase, 0.0)
        value = work()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.monotonic() - start
        return value
