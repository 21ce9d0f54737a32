"""`compress`: from a vendor's model and unlabelled samples to a smaller, faster model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from numpy.typing import ArrayLike
from threadpoolctl import threadpool_limits

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.probe import random_inputs
from onnxcomp.analysis.target import find_target
from onnxcomp.bench import Benchmark, is_slower, paired_latency
from onnxcomp.errors import UnsupportedModelError
from onnxcomp.evaluate import usable_batch
from onnxcomp.metrics import Metric
from onnxcomp.model import Array, Model
from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.remove_channels import RemoveChannels
from onnxcomp.report import Figures, Report
from onnxcomp.runtime import Session
from onnxcomp.samples import Samples, as_samples
from onnxcomp.search.losses import Progress
from onnxcomp.search.search import Outcome, Search
from onnxcomp.search.settings import Limits, Settings
from onnxcomp.search.space import Plan, Space
from onnxcomp.search.working import finish, prepare, working_model
from onnxcomp.validation import Ladder, validate

_RANDOM_SAMPLES = 128
_MEASURED_SAMPLES = 128
_BATCH = 32
_STATE_BYTES = 8  # of a live float32, in both networks of the walk


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

    @cached_property
    def pareto(self) -> tuple[tuple[float, float], ...]:
        """Predicted points (share of the original's MACs, loss), most MACs first."""
        return self.search.front(self.report.original.macs)


def compress(
    model: Model,
    data: Samples | Mapping[str, ArrayLike] | ArrayLike | Iterable[Any] | None = None,
    *,
    limits: Limits | None = None,
    settings: Settings | None = None,
    metric: Metric | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> Result:
    """Compress a model after training.

    Args:
        model: The vendor's model; it is not changed.
        data: Unlabelled inputs (labels are used by `metric` only); random ones if None.
        limits: What the result may cost; overrides `settings.limits`.
        settings: Everything else.
        metric: Task metric to report; drift is always reported.
        progress: Called with a label and the share of the phase that is done.
        dry_run: Stop at the plan: the report carries predicted figures, and the model is the
            prepared original.

    Returns:
        The result; where nothing pays, its model is the prepared original.

    Raises:
        UnsupportedModelError: The model holds what onnxcomp cannot work on.
        DataError: The samples do not fit the model.
        ParameterError: A setting is outside what it allows.
    """
    settings = settings or Settings()
    if limits is not None:
        settings = replace(settings, limits=limits)
    with threadpool_limits(settings.threads):
        run = _Run(model, data, settings, metric, progress or (lambda *_: None))
        return run.result(dry_run=dry_run)


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
        self._original = model
        self._settings = settings
        self._metric = metric
        self._progress = progress
        self._notes: list[str] = []
        self._seconds: dict[str, float] = {}
        inputs = model.signature.inputs
        self._user = None if data is None else as_samples(data, inputs)
        if self._user is None:
            samples = random_inputs(model, _RANDOM_SAMPLES, seed=settings.seed)
            self._notes.append("no samples given: fitted and judged on random inputs only")
        else:
            samples = self._user
        if samples.count > 1:
            self._fit, self._holdout = samples.split(settings.seed)
        else:
            self._fit = self._holdout = samples
            self._notes.append("one sample only: fitted and judged on the same input")

    def result(self, *, dry_run: bool) -> Result:
        """Run all phases."""
        settings, seed = self._settings, self._settings.seed
        prepared, self._refusals = self._timed("prepare", partial(prepare, self._original))
        self._plain = finish(prepared)
        self._base = Analysis(self._original, self._fit, seed=seed)
        work = working_model(prepared, self._fit, seed=seed)
        facts = Analysis(work, self._fit, seed=seed, threads=settings.threads)
        self._search = Search(
            self._space(facts), *self._batches(facts), settings, self._progress, self._notes
        )
        cost = self._base.cost
        limits = settings.limits.absolute(cost.macs, cost.params, self._original.file_bytes)
        if settings.limits == Limits():
            return self._judge(Outcome(self._search.nothing, self._plain, True))
        if dry_run:
            return self._preview(*self._search.plan(limits, self._plain))
        try:
            return self._judge(self._search.run(limits, self._plain))
        except KeyboardInterrupt:
            self._notes.append("interrupted; the prepared original is the best so far")
            self._settings = replace(settings, latency=False)
            result = self._judge(Outcome(self._search.nothing, self._plain, False))
            return replace(result, interrupted=True)

    def _space(self, facts: Analysis) -> Space:
        settings = self._settings
        target, step = find_target(settings.target), settings.step
        passes = [
            kind(target=target, step=step)
            for kind in (RemoveChannels, Factorize)
            if kind.name in settings.methods
        ]
        return Space(
            facts, [pass_.propose(facts) for pass_ in passes], target, settings.exclude
        )

    def _batches(self, facts: Analysis) -> tuple[list[Mapping[str, Array]], int]:
        """Return the feeds that fit the memory, and on how many losses are measured."""
        model = facts.model
        live = _live_elements(facts)
        count = max(int(self._settings.memory / (_STATE_BYTES * max(live, 1))), 1)
        samples = self._fit
        if count < samples.count:
            self._notes.append(
                f"fitted on {count} of {samples.count} samples to stay within "
                f"{self._settings.memory / 1e9:.1f} GB of activations"
            )
            samples = samples.take(range(count))
        inputs = model.signature.inputs
        size = usable_batch([Session(model)], inputs, samples, _BATCH)
        batches = list(samples.batches(inputs, size))
        measured, seen = 0, 0
        while measured < len(batches) and seen < _MEASURED_SAMPLES:
            seen += batches[measured].count
            measured += 1
        return [batch.feed for batch in batches], measured

    def _preview(self, plan: Plan, met: bool) -> Result:
        """Return a result that was not made: the plan with its predicted figures."""
        size = self._search.space.file_bytes(plan.cost, plan.forms)
        figures = Figures(plan.cost.params, plan.cost.macs, size, None)
        report = self._report(plan, self._validate(self._plain), None, figures, met)
        return Result(self._plain, plan, report, met, self._search)

    def _judge(self, outcome: Outcome) -> Result:
        """Validate, measure, and fall back where the candidate does not pay."""
        plan, candidate, met = outcome.plan, outcome.model, outcome.met
        ladder = self._timed("validate", partial(self._validate, candidate))
        benchmark = self._timed("latency", partial(self._latency, candidate))
        reason = self._regret(candidate, ladder, benchmark)
        if reason:
            self._notes.append(f"{reason}; the prepared original was kept")
            plan, candidate = self._search.nothing, self._plain
            if candidate.file_bytes > self._original.file_bytes:
                candidate = self._original
            met = self._settings.limits == Limits()
            ladder, benchmark = self._validate(candidate), self._latency(candidate)
        figures = Figures.of(Analysis(candidate, self._fit), benchmark, 1)
        report = self._report(plan, ladder, benchmark, figures, met)
        return Result(candidate, plan, report, met, self._search)

    def _report(
        self,
        plan: Plan,
        ladder: Ladder,
        benchmark: Benchmark | None,
        figures: Figures,
        met: bool,
    ) -> Report:
        actions, changed = self._search.describe(plan)
        return Report(
            original=Figures.of(self._base, benchmark, 0),
            result=figures,
            actions=actions,
            refusals=(*self._search.refusals, *self._refusals),
            ladder=ladder,
            benchmark=benchmark,
            notes=tuple(self._notes),
            seconds=self._seconds | self._search.seconds,
            changed_macs=changed / max(self._base.cost.macs, 1),
            met=met,
            settings=self._settings,
        )

    def _validate(self, candidate: Model) -> Ladder:
        return validate(
            self._original,
            candidate,
            self._holdout if self._user is not None else None,
            metric=self._metric,
            threads=self._settings.threads,
            allow_larger=self._settings.force,
            seed=self._settings.seed,
        )

    def _latency(self, candidate: Model) -> Benchmark | None:
        if not self._settings.latency:
            return None
        feeds = next(iter(self._holdout.batches(self._original.signature.inputs, 1))).feed
        return paired_latency(
            [self._original, candidate], feeds, threads=self._settings.threads, time_limit_s=20
        )

    def _regret(self, candidate: Model, ladder: Ladder, benchmark: Benchmark | None) -> str:
        """Return why the candidate must not be shipped, or ""."""
        if not ladder.passed:
            failed = ladder.rungs[-1]
            return f"the result failed validation at '{failed.name}' ({failed.detail})"
        if self._settings.force:
            return ""
        if candidate.file_bytes > self._original.file_bytes:
            return "the result is larger than the input"
        if benchmark is None or not is_slower(benchmark, 1):
            return ""
        slower = f"the result is slower ({benchmark.models[1].ratio.value:.2f}x)"
        limits = self._settings.limits
        if limits.size is not None and limits.macs is None and limits.params is None:
            self._notes.append(f"{slower}; kept, as only its size was limited")
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


def _live_elements(facts: Analysis) -> int:
    """Return the most elements per sample that are live at once during a forward pass."""
    last = {n: i for i, node in enumerate(facts.model.nodes) for n in node.inputs}
    live = peak = 0
    ending: dict[int, int] = {}
    for index, node in enumerate(facts.model.nodes):
        for name in node.outputs:
            if name in last and name in facts.tensors:
                size = math.prod(facts.tensors[name].shape)
                live += size
                ending[last[name]] = ending.get(last[name], 0) + size
        peak = max(peak, live)
        live -= ending.pop(index, 0)
    return peak
