"""The last step of a search with `--tune`: the candidate learns from the original."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from onnxcomp.errors import OnnxcompError, ParameterError
from onnxcomp.model import Model
from onnxcomp.samples import Samples
from onnxcomp.search.deadline import Deadline, Progress
from onnxcomp.search.judge import Judge
from onnxcomp.search.pursuit import Outcome
from onnxcomp.search.settings import Limits, Settings
from onnxcomp.search.storage import in_form
from onnxcomp.search.working import finish, prepare
from onnxcomp.tune import TuneResult, Tuning, check_torch, tune

SEARCH_SHARE = 0.5  # of a time limit, when the rest is for tuning
_SECONDS = 300.0  # without one


def check_tuning(given: Samples | None) -> None:
    """Raise what keeps `--tune` from working, before work is done for it.

    Raises:
        ParameterError: There is no torch, or fewer than two samples.
    """
    check_torch()
    if given is None or given.count < 2:
        raise ParameterError(
            "tune: needs at least two real samples; give them with --data, or leave --tune out"
        )


def tuned(
    outcome: Outcome,
    original: Model,
    parts: tuple[Samples, Samples],
    settings: Settings,
    limits: Limits,
    *,
    fits: Callable[[Model], bool],
    judge: Judge,
    deadline: Deadline,
    resume: Path | None,
    progress: Progress,
    notes: list[str],
) -> tuple[Outcome, bool]:
    """Train the model of an outcome, and never on samples that judge it.

    Args:
        outcome: What the search found.
        original: The vendor's model.
        parts: The user's samples to fit on and those to judge by, as the search has them.
        settings: Seed and threads.
        limits: Those on drop and drift are judged again.
        fits: Whether a model is within those on costs: a packed file may become larger.
        judge: Looks at the result on the hold-out.
        deadline: When training ends; without one it takes five minutes at most.
        resume: Folder of the state.
        progress: Called with a label and the share done.
        notes: Receives what was gained.

    Returns:
        The outcome, with the tuned model if that is better; whether Ctrl-C ended the training.
    """
    candidate, (fit, held) = outcome.candidate, parts
    # codebooks keep their number of values when they are trained
    model = in_form(candidate.model, "codebook") if candidate.stored else candidate.model
    start = time.monotonic()
    try:
        found = tune(
            model,
            original,
            fit,
            Tuning(seed=settings.seed, threads=settings.threads),
            held=held,
            time_limit=_SECONDS if settings.time_limit is None else deadline.left,
            resume=resume,
            progress=progress,
        )
    except OnnxcompError as error:  # what the search found is not lost for it
        notes.append(f"not tuned: {error}")
        return outcome, False
    notes.append(_told(found, time.monotonic() - start))
    if not found.improved:
        return outcome, found.interrupted
    model = finish(prepare(found.model)[0]) if candidate.stored else found.model
    look = partial(judge.look, model, found.after or 0.0)
    met = fits(model) and (look().within(limits) if limits.judged else outcome.met)
    if outcome.met and not met:
        notes.append("the tuned model breaks a limit that held before; it was not kept")
        return outcome, found.interrupted
    return Outcome(replace(candidate, model=model), met), found.interrupted


def _told(found: TuneResult, seconds: float) -> str:
    if found.before is None or found.after is None:
        return f"not tuned: {found.notes[-1]}"
    gain = f"hold-out loss {found.before:.4g} -> {found.after:.4g}"
    return f"tuned for {seconds:.0f} s and {found.epochs:.3g} epochs: {gain}"
