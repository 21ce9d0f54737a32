"""How many samples a search works on: what memory and time allow."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TypeVar

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.stream import Feeds
from onnxcomp.deadline import Deadline
from onnxcomp.evaluate import usable_batch
from onnxcomp.runtime import Session
from onnxcomp.samples import Samples
from onnxcomp.search.settings import Settings
from onnxcomp.search.store import Store

_MEASURED_SAMPLES = 128  # that losses are measured on, fewer where that is much work
_LEAST_MEASURED = 16
_MEASURED_MACS = 12 * 10**12
_RUNS = 5  # of the whole network, for the options of one node
_BATCH = 32
_BATCHES = 4  # at least, as batches are what runs side by side
_SMALL_BATCH = 4  # below it a run costs more than its samples
_STATE_BYTES = 8  # of a live float32, in both networks of the walk
_MEASURING_SHARE = 0.3  # of a time limit, for runs of the network that measure losses
_FITTING_SHARE = 0.2  # of it, for runs on all samples that are fitted on
_PASSES = 20  # of these: four in each of a few candidates
_LEAST_FITTED = 8
_PARTS = 3  # of the samples: losses are measured on one, with options solved on the others
_T = TypeVar("_T")


@dataclass(frozen=True)
class Effort:
    """Numbers of samples.

    Attributes:
        fitted: To solve arrays on.
        measured: Of these, the leading ones that losses are measured on.
    """

    fitted: int
    measured: int


def find_effort(
    facts: Analysis,
    samples: Samples,
    settings: Settings,
    deadline: Deadline,
    store: Store,
    notes: list[str],
) -> Effort:
    """Return on how many samples to work.

    Args:
        facts: Analysis of the working model.
        samples: All that may be fitted on.
        settings: Bytes that activations may take, and the time limit.
        deadline: When the search must end.
        store: Where the answer is kept, as another moment would give another.
        notes: Receives why not all samples are used.
    """
    whole = samples.count
    held = int(settings.memory / (_STATE_BYTES * max(_live_elements(facts), 1)))
    fitted = min(max(held, 1), whole)
    effort = Effort(fitted, min(_measured(facts), max(fitted // _PARTS, 1)))
    if effort.fitted < whole:
        notes.append(
            f"fitted on {effort.fitted} of {whole} samples to stay within "
            f"{settings.memory / 1e9:.1f} GB of activations"
        )
    if settings.time_limit is None:
        return effort
    known = store.get("effort", settings.time_limit)
    if known is None:
        known = astuple(_hurried(facts, samples, deadline, effort))
        store.put("effort", settings.time_limit, known)
    hurried = Effort(*known)
    less = []
    if hurried.fitted < effort.fitted:
        less.append(f"fitted on {hurried.fitted} of {whole} samples")
    if hurried.measured < effort.measured:
        less.append(f"losses measured on {hurried.measured} samples")
    if less:
        notes.append(f"for want of time {', '.join(less)}")
    return hurried


def fitting_feeds(
    facts: Analysis, samples: Samples, effort: Effort, *, sources: int
) -> tuple[list[Feeds], int]:
    """Return the feeds to fit on, and the number of leading ones to measure losses on.

    Args:
        facts: Analysis of the working model.
        samples: All that may be fitted on; the first ones are `sources`, the others copies of
            these in turns.  All copies of one are on the same side.
        effort: How many to take.
        sources: Number of different samples.
    """
    count = effort.fitted
    leading = max(effort.measured * min(sources, count) // count, 1)
    parts: tuple[list[int], list[int]] = ([], [])
    for index in range(count):
        parts[index % sources >= leading].append(index)
    measured, others = (feeds(facts, samples.take(part)) if part else [] for part in parts)
    return [*measured, *others], len(measured)


def apart(batches: Sequence[_T], measured: int) -> Sequence[_T]:
    """Return the batches to solve an option on whose loss is measured on the leading ones.

    These are the others, if there are any: on few samples that an option was solved on, the
    loss of what they happen not to need is far too small.
    """
    return batches[measured:] or batches


def feeds(facts: Analysis, samples: Samples) -> list[Feeds]:
    """Return samples as feeds of at most 32, few of them as a few to be run at once."""
    inputs = facts.model.signature.inputs
    wanted = min(max(math.ceil(samples.count / _BATCHES), _SMALL_BATCH), _BATCH)
    size = usable_batch([Session(facts.model)], inputs, samples, wanted)
    return [batch.feed for batch in samples.batches(inputs, size)]


def _measured(facts: Analysis) -> int:
    """Return on how many samples losses are measured where there is time enough."""
    each = max(_RUNS * len(facts.linears) * facts.cost.macs, 1)  # about, of one sample
    return min(max(_MEASURED_MACS // each, _LEAST_MEASURED), _MEASURED_SAMPLES)


def _hurried(facts: Analysis, samples: Samples, deadline: Deadline, effort: Effort) -> Effort:
    """Return an effort at which losses of all nodes and a few candidates are made in time."""
    each = _seconds(facts, samples)
    losses = _MEASURING_SHARE * deadline.left / (_RUNS * max(len(facts.linears), 1) * each)
    fitting = _FITTING_SHARE * deadline.left / (_PASSES * each)
    fitted = min(effort.fitted, max(int(fitting), _LEAST_FITTED))
    measured = min(effort.measured, int(losses), fitted // _PARTS)
    return Effort(fitted, max(measured, 1))


def _seconds(facts: Analysis, samples: Samples) -> float:
    """Return how long the network takes for one sample."""
    session = Session(facts.model, at_once=facts.threads)
    batch = next(samples.take([0]).batches(facts.model.signature.inputs, 1))
    session.run(batch.feed)  # warms up
    start = time.monotonic()
    runs = len(list(session.run_each([batch.feed] * facts.threads)))
    return max(time.monotonic() - start, 1e-6) / (runs * (batch.rows or 1))


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
