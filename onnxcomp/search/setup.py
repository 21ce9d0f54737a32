"""What a search is made of: samples by their roles, the space, and the batches to fit on."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.outputs import class_scores
from onnxcomp.analysis.probe import random_inputs
from onnxcomp.analysis.target import find_target
from onnxcomp.augmentation import augmented
from onnxcomp.deadline import Deadline, Progress
from onnxcomp.errors import DataError, UnsupportedModelError
from onnxcomp.model import Array, Model
from onnxcomp.numerics.clusters import clusters
from onnxcomp.numerics.joint_svd import JOINT_FORMS
from onnxcomp.passes.base import Pass
from onnxcomp.passes.compress_collaboratively import CompressCollaboratively
from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.factorize_jointly import FactorizeJointly
from onnxcomp.passes.remove_channels import RemoveChannels
from onnxcomp.passes.substitute_operators import BYPASS, FITTED, SubstituteOperators
from onnxcomp.passes.working import working_model
from onnxcomp.runtime import capture_tensors
from onnxcomp.samples import Samples, as_samples
from onnxcomp.search.adaptation import Adapted, adapted, batchnorm_statistics
from onnxcomp.search.collaboration import CollaborativeSearch
from onnxcomp.search.effort import feeds, find_effort, fitting_feeds
from onnxcomp.search.search import Search
from onnxcomp.search.settings import Limits, Settings
from onnxcomp.search.space import Space
from onnxcomp.search.store import Store, identity_of

_RANDOM_SAMPLES = 128
_LEAST_JUDGED = 32  # different samples, of which 10 judge; promises by 5 were often broken
_ENOUGH_SAMPLES = 512  # and pixels, up to which light copies of images are added
_ENOUGH_PIXELS = 2**20
# The others were never among the best of a group of ResNet-20 and -56, and take their time.
_SHARED = tuple(
    name
    for name in JOINT_FORMS
    if name not in ("spatial_last", "output_basis_both", "tucker2_outer")
)
# Settings that losses and candidates depend on; the others may differ in a run that goes on.
_DECISIVE = ("methods", "grid", "exclude", "data_aware", "seed", "memory")


@dataclass(frozen=True)
class Roles:
    """Samples by what they are used for.

    Attributes:
        fit: To solve arrays and to measure losses, with light copies where there are few.
        plain: The same without copies.
        holdout: To judge candidates.
        given: The user's samples; None where noise or inverted images stand for them.
    """

    fit: Samples
    plain: Samples
    holdout: Samples
    given: Samples | None

    @property
    def labels(self) -> Array | None:
        """The user's labels, if any."""
        return None if self.given is None else self.given.labels

    @property
    def inverted(self) -> bool:
        """Whether images that were inverted stand for the user's samples."""
        return self.holdout.origin == "inverted"


def assign_samples(
    model: Model,
    data: Samples | Mapping[str, Any] | Iterable[Any] | None,
    settings: Settings,
    notes: list[str],
) -> Roles:
    """Split samples into those to fit on and those to judge by.

    Args:
        model: The vendor's model.
        data: The user's samples; noise is made where it is None.
        settings: Seed of the split, of copies and of noise; limits that say how to split.
        notes: Receives what the reader of the report must know.

    Raises:
        DataError: The samples do not fit the model, or are too few for a limit on drop or
            drift, which is a promise for new samples.
    """
    inputs, seed = model.signature.inputs, settings.seed
    given = None if data is None else _different(as_samples(data, inputs), notes)
    if given is not None and settings.limits.judged and given.count < _LEAST_JUDGED:
        raise DataError(
            f"limits on drop and drift need at least {_LEAST_JUDGED} different samples, as "
            f"fewer do not tell what new ones lose; got {given.count}: give more, or limit "
            "costs only"
        )
    samples = random_inputs(model, _RANDOM_SAMPLES, seed=seed) if given is None else given
    if samples.count == 1:
        notes.append("one sample only: fitted and judged on the same input")
        return Roles(samples, samples, samples, given)
    plain, holdout = _split(samples, settings)
    fit = plain if given is None else _enlarged(model, plain, seed, notes)
    return Roles(fit, plain, holdout, given)


def _different(samples: Samples, notes: list[str]) -> Samples:
    """Return samples of different inputs: equal ones would be fitted on and judge as well."""
    first: dict[bytes, int] = {}
    for index in range(samples.count):
        digest = hashlib.sha256()
        for array in samples.arrays.values():
            digest.update(array[index].tobytes())
        first.setdefault(digest.digest(), index)
    equal = samples.count - len(first)
    if not equal:
        return samples
    notes.append(f"{equal} of {samples.count} samples equal others and were left out")
    return samples.take(list(first.values()))


def _split(samples: Samples, settings: Settings) -> tuple[Samples, Samples]:
    """Return samples to fit on and samples to judge by.

    Where drift is promised for new samples, those that judge are of other kinds than those
    fitted on, as new ones may be; elsewhere all kinds are needed to fit.  Samples to fit on
    are shuffled, as the leading ones often stand for all.
    """
    groups = None
    if settings.limits.drift is not None:
        arrays = [array for array in samples.arrays.values() if array.dtype.kind in "biuf"]
        groups = clusters(arrays, settings.seed) if arrays else None
    fit, holdout = samples.split(settings.seed, groups=groups)
    order = np.random.default_rng(settings.seed).permutation(fit.count)
    return fit.take(order.tolist()), holdout


def invert_samples(
    original: Model,
    prepared: Model,
    noise: Roles,
    settings: Settings,
    *,
    progress: Progress,
    store: Store,
    deadline: Deadline,
    notes: list[str],
) -> Roles:
    """Let images made from what BatchNormalization recorded take the place of noise.

    They need torch, and a model that says enough of real images; see `bridge.inversion`.

    Args:
        original: The vendor's model.
        prepared: The same after the exact passes that keep BatchNorm.
        noise: Samples of a run to which none were given; they stay where nothing is better.
        settings: Seed, threads, memory.
        progress: Called with a label and the share done.
        store: Where images are kept: what is measured on some must not go on with others.
        deadline: When to stop; a third of what is left is used.
        notes: Receives what stands for real samples, and why.

    Raises:
        DataError: A method needs the user's own.
    """
    if CompressCollaboratively.name in settings.methods:
        _check_gradients(noise)  # before work is done for nothing
    store = store.scoped(identity_of(original, None, "inverted", settings.seed))
    arrays, reason = store.get("images", ()), ""
    if arrays is None:
        try:
            images = _inverted(prepared, noise.fit, settings, progress, deadline.share(1 / 3))
            arrays = dict(images.arrays)
            store.put("images", (), arrays)
        except UnsupportedModelError as error:
            reason = str(error)
    if arrays is None:
        notes.append(
            f"no samples given: fitted and judged on noise only, as {reason}; expect to lose "
            "more than is shown, and give a few dozen real inputs with --data if there are any"
        )
        return noise
    samples = Samples(arrays, origin="inverted")
    notes.append(
        f"no samples given: fitted and judged on {samples.count} images inverted from what "
        "BatchNormalization recorded; expect to lose more than is shown, and give a few dozen "
        "real inputs with --data if there are any"
    )
    plain, holdout = _split(samples, settings)
    return Roles(_enlarged(original, plain, settings.seed, notes), plain, holdout, None)


def _inverted(
    prepared: Model, noise: Samples, settings: Settings, progress: Progress, deadline: Deadline
) -> Samples:
    """Invert images, or raise why not (UnsupportedModelError)."""
    if not settings.data_aware:
        raise UnsupportedModelError("the weights alone are to tell what they are worth")
    if not any(node.op == "BatchNormalization" for node in prepared.nodes):
        raise UnsupportedModelError("it has no BatchNormalization to tell of real inputs")
    if importlib.util.find_spec("torch") is None:
        raise UnsupportedModelError("images are inverted with PyTorch, which is not installed")
    from onnxcomp.bridge.inversion import inverted

    feed = next(noise.batches(prepared.signature.inputs, 1)).feed
    scores = class_scores(prepared, capture_tensors(prepared, feed))
    return inverted(
        prepared,
        None if scores is None else scores[0],
        seed=settings.seed,
        threads=settings.cores,
        memory=settings.memory,
        late=lambda: deadline.passed,
        progress=lambda share: progress("invert images", share),
    )


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
    known = roles.fit
    if CompressCollaboratively.name in settings.methods:
        _check_gradients(roles)
        known = roles.plain  # whose labels are known
    facts = Analysis(work, known, seed=settings.seed, threads=settings.cores)
    adaptation = None
    if roles.given is None and not roles.inverted and settings.data_aware:
        adaptation = _adapted(prepared, facts, roles.fit, settings.cores, notes)
    if adaptation is not None:
        model = adaptation.model
        facts = Analysis(model, roles.fit, seed=settings.seed, threads=settings.cores)
    space = _space(facts, settings, adapted=adaptation is not None)
    drifts = settings.limits.drift is not None  # which splits the samples in another way
    fixed = [space.target, drifts, *(getattr(settings, name) for name in _DECISIVE)]
    store = store.scoped(identity_of(original, roles.given, fixed, roles.inverted))
    effort = find_effort(facts, roles.fit, settings, deadline, store, notes)
    batches, measured = fitting_feeds(facts, roles.fit, effort, sources=roles.plain.count)
    return _kind(settings)(
        space,
        batches,
        measured,
        feeds(facts, roles.holdout),
        plain,
        settings=settings,
        progress=progress,
        store=store.scoped(effort),
        deadline=deadline,
        adapted=adaptation,
    )


def _check_gradients(roles: Roles) -> None:
    """Check that there are samples of the user's to take gradients on.

    Raises:
        DataError: There are none.
    """
    if roles.given is None:
        name = CompressCollaboratively.name
        raise DataError(f"{name}: gradients need samples; give some with --data")


def _kind(settings: Settings) -> Callable[..., Search]:
    """Return the search that the methods ask for."""
    if CompressCollaboratively.name not in settings.methods:
        return Search
    limits = settings.limits
    pass_ = CompressCollaboratively(
        cost="macs" if limits.latency is None or limits.macs is not None else "seconds",
        reconstruct=settings.data_aware,
        target=find_target(settings.target),
        step=settings.step,
    )
    return partial(CollaborativeSearch, pass_)


def _adapted(
    prepared: Model, facts: Analysis, noise: Samples, threads: int, notes: list[str]
) -> Adapted | None:
    """Let noise move through the network as BatchNorm says that real inputs did."""
    statistics = batchnorm_statistics(prepared)
    found = adapted(facts, statistics, feeds(facts, noise), threads=threads)
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
    if SubstituteOperators.name in settings.methods:
        operators = FITTED if adapted else (*FITTED, BYPASS)  # which needs unchanged scales
        passes.append(SubstituteOperators(operators, target, step))
    small = limits.size is not None or limits.params is not None
    if FactorizeJointly.name in settings.methods and small:
        forms = [n for n in _SHARED if not adapted or JOINT_FORMS[n].shares == "first"]
        slower = limits == Limits(size=limits.size)
        passes.append(FactorizeJointly(tuple(forms), target=target, step=step, slower=slower))
    return Space(facts, [pass_.propose(facts) for pass_ in passes], target, settings.exclude)
