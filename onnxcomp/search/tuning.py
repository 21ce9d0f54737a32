"""The last step of a search with `--tune`: the candidate learns from the original."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from onnxcomp.deadline import Deadline, Progress
from onnxcomp.errors import DataError, ParameterError, UnsupportedModelError
from onnxcomp.model import Model
from onnxcomp.passes.working import finish, prepare
from onnxcomp.samples import Samples
from onnxcomp.search.judge import Judge
from onnxcomp.search.pursuit import Outcome
from onnxcomp.search.settings import Limits, Settings
from onnxcomp.search.storage import in_form
from onnxcomp.teaching import label_scores
from onnxcomp.tune import TuneResult, Tuning, check_torch, tune

SEARCH_SHARE = 0.5  # of a time limit, when the rest is for tuning
_SECONDS = 300.0  # without one


def check_tuning(given: Samples | None, device: str) -> None:
    """Raise what keeps `--tune` from working, before work is done for it.

    Raises:
        ParameterError: There is no torch, no such device, or fewer than two samples.
    """
    check_torch()
    from onnxcomp.bridge.training import check_device

    check_device(device)
    if given is None or given.count < 2:
        raise ParameterError(
            "tune: needs at least two real samples; give them with --data, or leave --tune out"
        )


def check_expressible(model: Model) -> None:
    """Raise what keeps a model from being tuned, before the search does work for it.

    Args:
        model: The original after all exact passes; a search adds no operators that the
            bridge does not know.

    Raises:
        UnsupportedModelError: Nodes that the bridge cannot express, all of them.
    """
    from onnxcomp.bridge.plan import make_plan

    try:
        make_plan(model, batchnorm="frozen")
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"tune: {error}; leave --tune out") from error


def tuned(
    outcome: Outcome,
    original: Model,
    parts: tuple[Samples, Samples],
    settings: Settings,
    limits: Limits,
    *,
    fits: Callable[[Model], bool],
    judge: Judge,
    change: Callable[[Model], float],
    deadline: Deadline,
    resume: Path | None,
    progress: Progress,
    notes: list[str],
) -> tuple[Outcome, bool]:
    """Train the model of an outcome, and never on samples that judge it.

    Args:
        outcome: What the search found.
        original: The vendor's model.
        parts: The user's samples to fit on and those to judge by, as the search has them;
            labels are learned from where they are classes of the model's.
        settings: Seed, threads, memory, device.
        limits: Those on drop and drift are judged again.
        fits: Whether a model is within those on costs: a packed file may become larger.
        judge: Looks at the result on the hold-out.
        change: Returns how far a model's raw outputs are from the original's there.
        deadline: When training ends; without one it takes five minutes at most.
        resume: Folder of the state.
        progress: Called with a label and the share done.
        notes: Receives what was gained.

    Returns:
        The outcome, with the tuned model if that is better; whether Ctrl-C ended the training.
    """
    from onnxcomp.bridge.plan import reason_of

    candidate, (fit, held) = outcome.candidate, parts
    limit = _SECONDS if settings.time_limit is None else deadline.left
    run = partial(tune, time_limit=limit, resume=resume, progress=progress)
    start = time.monotonic()
    try:
        # codebooks keep their number of values when they are trained
        model = in_form(candidate.model, "codebook") if candidate.stored else candidate.model
        how = _tuning(settings, labels=_fit_labels(original, parts))
        found = run(model, original, fit, how, held=held)
    except Exception as error:  # whatever it is, what the search found is not lost for it
        notes.append(f"not tuned: {reason_of(error)}")
        return outcome, False
    notes += _told(found, how, time.monotonic() - start)
    if not found.improved:
        return outcome, found.interrupted
    model = finish(prepare(found.model)[0]) if candidate.stored else found.model
    met = fits(model) and (outcome.met or limits.judged)
    if met and limits.judged:
        met = judge.look(model, change(model)).within(limits)
    if outcome.met and not met:
        notes.append("the tuned model breaks a limit that held before; it was not kept")
        return outcome, found.interrupted
    return Outcome(replace(candidate, model=model), met), found.interrupted


def _tuning(settings: Settings, *, labels: bool) -> Tuning:
    """Return how a search trains its result."""
    return Tuning(
        labels=labels,
        threads=settings.cores,
        device=settings.device,
        memory=settings.memory,
        seed=settings.seed,
    )


def _fit_labels(model: Model, parts: Sequence[Samples]) -> bool:
    """Whether there are labels, and they are those of the model's class scores."""
    try:
        label_scores(model, *parts)
    except DataError:
        return False
    return True


def _told(found: TuneResult, how: Tuning, seconds: float) -> list[str]:
    """Return what training gave, and what it has to say itself."""
    effort = f"for {seconds:.0f} s and {found.epochs:.3g} epochs"
    notes = [f"tune: {note}" for note in found.notes]
    if how.labels and found.before is not None:
        notes.append("tune: learned from the labels too, by how far off them the original is")
    if found.improved:
        told = f"tuned {effort}: hold-out loss {found.before:.4g} -> {found.after:.4g}"
    elif found.before is None:
        told = "not tuned"
    else:
        told = f"trained {effort}, nothing better was found"
    return [told, *notes]
