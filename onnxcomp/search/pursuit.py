"""From limits to a candidate: which plans are solved, and which of them is kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxcomp.deadline import TimeLimitReached
from onnxcomp.model import Model
from onnxcomp.search.judge import NEW_SOURCES, Judge, Look, looks_memorised
from onnxcomp.search.losses import LATE, Losses
from onnxcomp.search.search import Candidate, Search, smaller
from onnxcomp.search.settings import Limits
from onnxcomp.search.variations import shaken, swapped, weighty

_SIZE_ROUNDS = 3
_TIME_ROUNDS = 5
_USED = 0.96  # share of a limit on latency that must be used up
_CAUTION = 0.985  # factor of the predicted time after each candidate that missed a limit
_BISECTIONS = 6
_CLOSE = 0.85  # of a limit on drop or drift that must be used up before the search ends
_AIM = 0.93  # share of such a limit that the next candidate aims at
_STEP = 8.0  # largest factor between the loss bounds of two candidates
_STEADY = 0.1  # of the logarithm of the loss; less says nothing of how the strain grows
_LATER_CANDIDATES = 3  # with varied losses
_FASTER = 0.98  # share of the best predicted time that the first of these must take
_PATIENCE = 24  # attempts in a row at something better, after which the search ends
_SHARED = (1.0, 0.8, 0.65, 0.5)  # of all parameters, in plans whose weights are then rounded


@dataclass(frozen=True)
class Outcome:
    """The candidate that is kept, and whether all limits hold."""

    candidate: Candidate
    met: bool


class Pursuit:
    """The way from limits to a candidate.

    Args:
        search: Where plans and candidates come from.
        limits: Absolute limits on costs; those on drop and drift as they are.
        share: Limit on the time, as a share of the original's; None where there is none.
        judge: Looks at candidates on the hold-out.
        clock: Returns the time of a model as a share of the original's.
        keep: Called with every model that is better than all before it.
        largest: Bytes that a file may have whatever the limits are.  Plans are asked for less
            from the first file on that has more, as another limit makes them hard to find.
        box: Whether to go on until the deadline: weighty options are measured again in place
            and solved again, then further plans are tried, until two dozen attempts in a row
            were no better.  Without it the first plan that uses up the limits is kept.
        seed: Seed of the further plans.
        notes: Receives what the reader of the report must know.

    Attributes:
        best: What is kept.
        earlier: What was kept before it, where that is within the limits, too.
    """

    def __init__(
        self,
        search: Search,
        limits: Limits,
        share: float | None,
        *,
        judge: Judge,
        clock: Callable[[Model], float],
        keep: Callable[[Model], None],
        largest: float = np.inf,
        box: bool,
        seed: int,
        notes: list[str],
    ) -> None:
        self._search = search
        bound = min(limits.size or np.inf, largest)
        self._limits = replace(limits, size=None if np.isinf(bound) else bound)
        self._asked = limits  # what plans must meet so that their files meet the limits
        self._share = share
        self._judge = judge
        self._clock = clock
        self._keep = keep
        self._box = box
        self._rng = np.random.default_rng(seed)
        self._notes = notes
        self._rest = 0.0  # seconds of the original that no plan changes, as measured
        self._times: dict[str, float] = {}
        self._looks: dict[str, Look] = {}
        self._strains: dict[Hashable, float] = {}  # of plans that are not solved twice
        self.best = Outcome(search.nothing, met=False)
        self.earlier: tuple[Outcome, ...] = ()

    def run(self) -> Outcome:
        """Look for the best candidate until it is found or the deadline passes."""
        plain = self._search.nothing
        if not self._limits.judged and self._holds(plain):
            self._take(plain, met=True)
        try:
            if self._search.shares and self._limits.size is None:
                self._find()
                self._share_best()
            elif self._search.shares and not self.best.met:
                self._share_within()
            else:
                self._find()
        except TimeLimitReached as reached:
            self._notes.append(f"{reached}; the best so far was kept")
            if self.best.candidate is plain:
                self.best = Outcome(plain, self._holds(plain))
        if any(look.drifts_little(self._limits) for look in self._looks.values()):
            self._notes.append(
                "the limit on drift alone would have let outputs lose more than a quarter of "
                "their variance over the samples; the search kept three quarters"
            )
        plan = self.best.candidate.plan
        late = sum(refusal.reason == LATE for refusal in self._search.refusals(plan))
        if late:
            self._notes.append(f"the time limit left {late} nodes and groups unmeasured")
        return self.best

    def _find(self) -> None:
        """Look among plans alone, unless the original is within the limits."""
        if self._limits.judged:
            self._hasten()
        elif not self.best.met:
            self._approach()

    def _take(self, candidate: Candidate, *, met: bool) -> None:
        if self.best.met and not self.best.candidate.plan.empty:
            self.earlier = (self.best,)
        self.best = Outcome(candidate, met)
        self._keep(candidate.model)

    def _holds(self, candidate: Candidate) -> bool:
        """Whether the limits on costs and time hold."""
        if not self._search.within(candidate.model, self._limits):
            return False
        return self._share is None or self._time(candidate) <= self._share

    def _too_large(self, candidate: Candidate) -> bool:
        """Whether the file is too large; plans are asked for smaller ones from then on."""
        limit = self._limits.size
        if limit is None or (size := self._search.size(candidate.model)) <= limit:
            return False
        excess = size - self._search.file_bytes(candidate.plan)
        self._asked = smaller(self._limits, max(excess, 0.0))
        return True

    def _time(self, candidate: Candidate) -> float:
        """Return a candidate's measured share of the original's time."""
        if candidate.plan.empty:
            return 1.0
        digest = candidate.model.digest
        if digest in self._times:
            return self._times[digest]
        found = self._search.timed("latency", lambda: self._clock(candidate.model))
        self._times[digest] = found
        whole, part = self._search.nothing.plan.seconds, candidate.plan.seconds
        if found < 1.0:  # found = (part + rest) / (whole + rest)
            rest = (found * whole - part) / (1.0 - found)
            self._rest = float(np.clip(rest, -0.5 * part, 10 * whole))
        return found

    # Limits on costs and time: the most accurate candidate within them.

    def _approach(self) -> None:
        self._pursue(self._search.losses)
        if self.best.met:
            self._go_on(self._pursue)

    def _go_on(self, pursue: Callable[[Losses], None]) -> None:
        """Pursue until the deadline by losses measured again, then shaken and swapped ones."""
        losses, found = self._search.losses, self.best.candidate
        if not self._box or found.plan.empty or self._search.deadline.passed:
            return
        varied = self._search.measure_again(found, weighty(found.plan, losses))
        basis, fruitless = losses, -1  # what the best plan was chosen by; attempts since then
        while fruitless < _PATIENCE and not self._search.deadline.passed:
            best = self.best
            if fruitless >= 0 and fruitless % 2:
                varied = swapped(basis, best.candidate.plan, self._rng)
            elif fruitless >= 0:
                varied = shaken(losses, self._rng)
            pursue(varied)
            fruitless += 1
            if self.best is not best:
                basis, fruitless = varied, 0

    def _pursue(self, losses: Losses) -> None:
        """Solve by given losses until the written file and the measured time are within."""
        misses = 0
        seen: set[str] = set()
        for _ in range(_SIZE_ROUNDS if self._share is None else _TIME_ROUNDS):
            seconds = self._predicted() * _CAUTION**misses
            plan, reason = self._search.choose(losses, self._asked, seconds=seconds)
            if reason and self.best.met:  # a swap may leave too few options
                return
            candidate = self._search.solve(plan, losses)
            met = self._holds(candidate)
            self._offer(candidate, met=met)
            if reason and not met:
                self._notes.append(reason)
            misses += not met
            if plan.empty or reason or candidate.model.digest in seen:
                break
            seen.add(candidate.model.digest)
            if not self._too_large(candidate) and met and not self._leaves_time(candidate):
                break

    def _share_best(self) -> None:
        """Let the weights of what was found take few values, unless that breaks a limit."""
        candidate = self._search.share(self.best.candidate, None)
        met = self._holds_with_levels(candidate)
        if met or not self.best.met:
            self._take(candidate, met=met)
        else:
            self._notes.append("weights of few values break a limit; they stay as they are")

    def _share_within(self) -> None:
        """Let the weights of ever smaller plans take few values, while that loses less."""
        whole = self._search.nothing.plan.cost.params
        costs = replace(self._limits.without_judgement, size=None)
        for part in _SHARED:
            candidate = self._search.nothing
            if part < 1 and not self._search.space.widths and not self._search.space.forms:
                break
            if part < 1 or costs != Limits():
                losses, bound = self._search.losses, min(part * whole, costs.params or np.inf)
                plan, reason = self._search.choose(
                    losses, replace(costs, params=bound), seconds=self._predicted()
                )
                if reason and part == 1:
                    self._notes.append(reason)
                candidate = self._search.solve(plan, losses)
            lost = self._search.change(candidate.model)
            if self.best.met and lost >= self.best.candidate.error:
                break  # rounding adds to it
            candidate = self._search.share(candidate, self._limits.size)
            self._offer(candidate, met=self._holds_with_levels(candidate))
            if self.best.candidate is not candidate:
                break

    def _holds_with_levels(self, candidate: Candidate) -> bool:
        """Whether all limits hold, those on drop and drift as well."""
        if not self._limits.judged or not self._holds(candidate):
            return self._holds(candidate)
        return self._judge.look(candidate.model, candidate.error).within(self._limits)

    def _offer(self, candidate: Candidate, *, met: bool) -> None:
        """Keep a candidate that is better than the best so far."""
        best = self.best
        if met and best.met:
            better = candidate.error < best.candidate.error
        else:
            better = met or not best.met
        if better:
            self._take(candidate, met=met)

    def _leaves_time(self, candidate: Candidate) -> bool:
        """Whether so much of the limit on the time is unused that another plan may pay."""
        return self._share is not None and self._time(candidate) < _USED * self._share

    def _predicted(self) -> float:
        """Return the bound on predicted seconds that should give the wanted time."""
        if self._share is None:
            return np.inf
        whole = self._search.nothing.plan.seconds
        return max(self._share * (whole + self._rest) - self._rest, 1e-9)

    # Limits on drop and drift: the fastest candidate within them.

    def _hasten(self) -> None:
        """Find the fastest candidate that is within the limits on drop and drift."""
        self._bisect(self._search.losses, self.first_bound)
        if self.best.candidate.plan.empty:
            self.best = Outcome(self._search.nothing, self._holds(self._search.nothing))
            self._notes.append("no plan that was tried is within the limits on drop and drift")
        if any(looks_memorised(look) for look in self._looks.values()):
            self._notes.append(
                "the original is right on nearly all hold-out samples, which looks as if "
                "it had been trained on them: points lost on new samples were estimated "
                "from how far the outputs move"
            )
        self._go_on(self._hasten_by)

    def _hasten_by(self, losses: Losses) -> None:
        """Look for a faster candidate by other losses.

        Of many candidates that were looked at the best is likely to be lucky on the hold-out,
        so that a later one must leave more of the limits than the first had to.
        """
        seconds = _FASTER * self.best.candidate.plan.seconds
        plan, missed = self._search.choose(losses, self._asked, seconds=seconds)
        if missed:
            return
        for _ in range(_LATER_CANDIDATES):
            if self.best.met and plan.seconds >= self.best.candidate.plan.seconds:
                break
            tried = (tuple(sorted(plan.widths.items())), tuple(sorted(plan.forms.items())))
            if tried not in self._strains:
                candidate = self._search.solve(plan, losses)
                if self._too_large(candidate):
                    break
                self._strains[tried] = strain = self._strain(candidate)
                if strain <= _AIM:
                    self._offer_faster(candidate)
            bound = plan.loss * self._stride(self._strains[tried])
            following = self._search.fastest(losses, bound, self._asked)
            if following is None:
                break
            plan = following

    def _bisect(self, losses: Losses, bound: float) -> None:
        """Find the loss bound whose fastest plan uses up the limits on drop and drift."""
        low, high = 0.0, np.inf
        points: list[tuple[float, float]] = []
        for _ in range(_BISECTIONS):
            plan = self._search.fastest(losses, bound, self._asked)
            if plan is None:  # the limits on costs ask for more than this loss
                low, bound = bound, self._between(bound, bound * _STEP, high)
                continue
            candidate = self._search.solve(plan, losses)
            if self._too_large(candidate):
                continue
            strain = self._strain(candidate)
            if strain <= 1.0:
                low = bound
                self._offer_faster(candidate)
            else:
                high = bound = plan.loss  # every bound down to it gives the same plan
            if _CLOSE <= strain <= 1.0 or high / max(low, 1e-30) < 1.1:
                break
            points.append((max(plan.loss, 1e-30), strain))
            wanted = bound * self._stride(strain, _steepness(points))
            bound = self._between(low, wanted, high)

    def _offer_faster(self, candidate: Candidate) -> None:
        """Keep a candidate that is predicted to be faster than the best so far."""
        best, met = self.best, self._holds(candidate)
        faster = candidate.plan.seconds < best.candidate.plan.seconds
        if met > best.met or (met == best.met and faster):
            self._take(candidate, met=met)

    @property
    def first_bound(self) -> float:
        """Bound on the predicted loss that limits on drop and drift begin with."""
        drop, drift = self._limits.drop, self._limits.drift
        found = [] if drop is None else [2.0 * drop]
        return min([*found, *([] if drift is None else [(drift / NEW_SOURCES) ** 2])])

    @staticmethod
    def _between(low: float, wanted: float, high: float) -> float:
        """Return the wanted bound, or the middle of the bracket where it lies outside."""
        if low < wanted < high:
            return wanted
        return float(np.sqrt(max(low, 1e-12) * min(high, 1e3)))

    @staticmethod
    def _stride(strain: float, steepness: float = 1.0) -> float:
        """Return the factor of the loss bound that should bring a strain to where we aim."""
        return float(np.clip((_AIM / strain) ** (1.0 / steepness), 1 / _STEP, _STEP))

    def _strain(self, candidate: Candidate) -> float:
        """Return the share of the limits on drop and drift that a candidate uses up."""
        return max(self._look(candidate).strain(self._limits), 1e-6)

    def _look(self, candidate: Candidate) -> Look:
        digest = candidate.model.digest
        if digest not in self._looks:
            judge = self._judge
            self._looks[digest] = self._search.timed(
                "judge", lambda: judge.look(candidate.model, candidate.error)
            )
        return self._looks[digest]


def _steepness(points: Sequence[tuple[float, float]]) -> float:
    """Return the power of the predicted loss with which the strain grew of late."""
    if len(points) < 2:
        return 1.0
    (loss, strain), (newer, other) = points[-2:]
    if abs(np.log(newer / loss)) < _STEADY:
        return 1.0
    return float(np.clip(np.log(other / strain) / np.log(newer / loss), 0.5, 2.0))
