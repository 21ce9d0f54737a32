"""What a search is made of: samples by their roles, the space, and the batches to fit on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.probe import random_inputs
from onnxcomp.analysis.target import find_target
from onnxcomp.augmentation import augmented
from onnxcomp.evaluate import usable_batch
from onnxcomp.model import Array, Model
from onnxcomp.numerics.joint_svd import JOINT_FORMS
from onnxcomp.passes.base import Pass
from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.factorize_jointly import FactorizeJointly
from onnxcomp.passes.remove_channels import RemoveChannels
from onnxcomp.runtime import Session
from onnxcomp.samples import Samples, as_samples
from onnxcomp.search.adaptation import Adapted, adapted, batchnorm_statistics
from onnxcomp.search.deadline import Deadline, Progress
from onnxcomp.search.search import Search
from onnxcomp.search.settings import Limits, Settings
from onnxcomp.search.space import Space
from onnxcomp.search.store import Store, identity_of
from onnxcomp.search.working import working_model

_RANDOM_SAMPLES = 128
_ENOUGH_SAMPLES = 512  # and pixels, up to which light copies of images are added
_ENOUGH_PIXELS = 2**20
_MEASURED_SAMPLES = 128  # that losses are measured on, fewer where that is much work
_LEAST_MEASURED = 32
_MEASURED_MACS = 40 * 10**12
_RUNS = 5  # of the whole network, for the options of one node
_BATCH = 32
_STATE_BYTES = 8  # of a live float32, in both networks of the walk
# The others were never among the best of a group of ResNet-20 and -56, and take their time.
_SHARED = tuple(
    name
    for name in JOINT_FORMS
    if name not in ("spatial_last", "output_basis_both", "tucker2_outer")
)
# Settings that losses and candidates depend on; the others may differ in a run that goes on.
_DECISIVE = ("methods", "target", "grid", "exclude", "data_aware", "seed", "memory")


@dataclass(frozen=True)
class Roles:
    """Samples by what they are used for.

    Attributes:
        fit: To solve arrays and to measure losses, with light copies where there are few.
        holdout: To judge candidates.
        given: The user's samples; None where noise stands for them.
    """

    fit: Samples
    holdout: Samples
    given: Samples | None

    @property
    def labels(self) -> Array | None:
        """The user's labels, if any."""
        return None if self.given is None else self.given.labels


def assign_samples(
    model: Model,
    data: Samples | Mapping[str, Any] | Iterable[Any] | None,
    seed: int,
    notes: list[str],
) -> Roles:
    """Split samples into those to fit on and those to judge by.

    Args:
        model: The vendor's model.
        data: The user's samples; noise is made where it is None.
        seed: Seed of the split, of copies and of noise.
        notes: Receives what the reader of the report must know.
    """
    inputs = model.signature.inputs
    given = None if data is None else as_samples(data, inputs)
    if given is None:
        samples = random_inputs(model, _RANDOM_SAMPLES, seed=seed)
        notes.append(
            "no samples given: fitted and judged on noise only; expect to lose more than is "
            "shown, and give a few dozen real inputs with --data if there are any"
        )
    else:
        samples = given
    if samples.count == 1:
        notes.append("one sample only: fitted and judged on the same input")
        return Roles(samples, samples, given)
    fit, holdout = samples.split(seed)
    if given is not None:
        fit = _enlarged(model, fit, seed, notes)
    return Roles(fit, holdout, given)


def _enlarged(model: Model, samples: Samples, seed: int, notes: list[str]) -> Samples:
    """Return the fitting samples with light copies of images, where there are few."""
    pixels = max(math.prod(a.shape[2:]) for a in samples.arrays.values())
    enough = min(_ENOUGH_SAMPLES, _ENOUGH_PIXELS // max(pixels, 1))
    found = augmented(samples, model.signature.inputs, max(enough, 1), seed=seed)
    if found.samples is not samples:
        notes.append(f"fitted on {found.note}")
    return found.samples


def make_search(
    original: Model,
    prepared: Model,
    plain: Model,
    roles: Roles,
    settings: Settings,
    *,
    progress: Progress,
    store: Store,
    deadline: Deadline,
    notes: list[str],
) -> Search:
    """Return the search over a model.

    Args:
        original: The vendor's model.
        prepared: The same after the exact passes that keep BatchNorm.
        plain: The same after all exact passes.
        roles: Samples.
        settings: Methods, target and everything that is measured with.
        progress: Called with a label and the share done.
        store: Where measurements and candidates are kept.
        deadline: When to stop.
        notes: Receives what the reader of the report must know.
    """
    work = working_model(prepared, roles.fit, seed=settings.seed)
    facts = Analysis(work, roles.fit, seed=settings.seed, threads=settings.threads)
    adaptation = None
    if roles.given is None and settings.data_aware:
        adaptation = _adapted(prepared, facts, roles.fit, settings.threads, notes)
    if adaptation is not None:
        model = adaptation.model
        facts = Analysis(model, roles.fit, seed=settings.seed, threads=settings.threads)
    batches, measured = _batches(facts, roles.fit, settings.memory, notes)
    space = _space(facts, settings, adapted=adaptation is not None)
    fixed = [getattr(settings, name) for name in _DECISIVE]
    return Search(
        space,
        batches,
        measured,
        _feeds(facts, roles.holdout),
        plain,
        settings=settings,
        progress=progress,
        store=store.scoped(identity_of(original, roles.given, fixed)),
        deadline=deadline,
        adapted=adaptation,
    )


def _adapted(
    prepared: Model, facts: Analysis, noise: Samples, threads: int, notes: list[str]
) -> Adapted | None:
    """Let noise move through the network as BatchNorm says that real inputs did."""
    statistics = batchnorm_statistics(prepared)
    found = adapted(facts, statistics, _feeds(facts, noise), threads=threads)
    if not found.scales:
        return None
    notes.append(
        f"the statistics of {len(found.scales)} BatchNormalizations stand for real inputs"
    )
    return found


def _space(facts: Analysis, settings: Settings, *, adapted: bool) -> Space:
    """Return all options; common factors save bytes only, so they wait for such a limit."""
    target, step, limits = find_target(settings.target), settings.step, settings.limits
    passes: list[Pass] = [
        kind(target=target, step=step)
        for kind in (RemoveChannels, Factorize)
        if kind.name in settings.methods
    ]
    small = limits.size is not None or limits.params is not None
    if FactorizeJointly.name in settings.methods and small:
        forms = [n for n in _SHARED if not adapted or JOINT_FORMS[n].shares == "first"]
        slower = limits == Limits(size=limits.size)
        passes.append(FactorizeJointly(tuple(forms), target=target, step=step, slower=slower))
    return Space(facts, [pass_.propose(facts) for pass_ in passes], target, settings.exclude)


def _batches(
    facts: Analysis, samples: Samples, memory: float, notes: list[str]
) -> tuple[list[Mapping[str, Array]], int]:
    """Return the feeds that fit the memory, and on how many losses are measured."""
    count = max(int(memory / (_STATE_BYTES * max(_live_elements(facts), 1))), 1)
    if count < samples.count:
        notes.append(
            f"fitted on {count} of {samples.count} samples to stay within "
            f"{memory / 1e9:.1f} GB of activations"
        )
        samples = samples.take(range(count))
    batches = _feeds(facts, samples)
    size = -(-samples.count // len(batches))
    each = max(_RUNS * len(facts.linears) * facts.cost.macs, 1)  # about, of one sample
    wanted = min(max(_MEASURED_MACS // each, _LEAST_MEASURED), _MEASURED_SAMPLES)
    return batches, max(min(wanted // size, len(batches)), 1)


def _feeds(facts: Analysis, samples: Samples) -> list[Mapping[str, Array]]:
    """Return samples as feeds of the largest batch that the model allows."""
    inputs = facts.model.signature.inputs
    size = usable_batch([Session(facts.model)], inputs, samples, _BATCH)
    return [batch.feed for batch in samples.batches(inputs, size)]


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
