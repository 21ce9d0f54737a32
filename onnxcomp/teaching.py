"""What a compressed model is taught: its original's tensors, on samples varied at random."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.outputs import class_scores, raw_outputs
from onnxcomp.augmentation import augmented
from onnxcomp.errors import DataError, ParameterError, UnsupportedModelError
from onnxcomp.evaluate import join_outputs, paired_outputs
from onnxcomp.model import Array, Model, Value, extract
from onnxcomp.runtime import Session, capture_tensors
from onnxcomp.sample_rules import channel_axis, is_float
from onnxcomp.samples import Samples, as_samples

if TYPE_CHECKING:
    from onnxcomp.bridge.objective import Examples

AUGMENTATIONS = ("none", "light", "mixup")
_LAYERS = 3  # linear nodes of a block, at least, where nothing is residual
_ALIKE = 0.5  # correlation of a channel with the one that it was, at least
_AT_ONCE = 64  # samples between two looks at the clock
_HELD_SHARE, _MOST_HELD = 0.25, 2048  # of the samples; more would only slow the epochs
_SHOWN = 4  # names in a message


@dataclass(frozen=True, eq=False)
class End:
    """Where a block ends: a tensor that model and teacher have under one name.

    Attributes:
        name: Its name.
        channels: The teacher's channels that the model has left, and their axis; None where
            it has all.
    """

    name: str
    channels: tuple[Array, int] | None = None

    def of(self, array: Array) -> Array:
        """Return what the model should have, of the teacher's tensor."""
        return array if self.channels is None else array.take(*self.channels)


class Teacher:
    """The original, run by onnxruntime.

    Args:
        model: The compressed model.
        teacher: Its original.
        few: Some samples, on which both are looked at.
        threads: Threads of every session.
        batch: Samples per run where the teacher allows several.

    Attributes:
        outputs: Tensors of the model that are compared: its raw outputs, in front of Softmax
            and Sigmoid; where they do not match the teacher's one by one, the float outputs.
        ends: Ends of its blocks, in the order of the graph.
    """

    def __init__(
        self, model: Model, teacher: Model, few: Samples, *, threads: int, batch: int
    ) -> None:
        self._inputs = teacher.signature.inputs
        self._batch = batch
        mine, its = (Analysis(part, few, threads=threads) for part in (model, teacher))
        self._pairs = _paired(mine, its)
        self.outputs = tuple(self._pairs)
        self.ends = self._ends(mine, its, few, threads)
        outputs = list(dict.fromkeys(self._pairs.values()))
        everything = [*outputs, *(end.name for end in self.ends)]
        self._sessions = {
            ends: Session(extract(its.model, (), names), threads=threads)
            for ends, names in ((False, outputs), (True, everything))
        }

    def values(
        self,
        samples: Samples,
        *,
        ends: bool,
        each: Callable[[float], None] = lambda _: None,
    ) -> dict[str, Array]:
        """Return the teacher's values by tensor of the model, samples first, as float32.

        Args:
            samples: The samples.
            ends: Whether to return those at the ends of blocks too.
            each: Called with the share that is done, in front of every 64 samples.

        Raises:
            UnsupportedModelError: A tensor has not one row per sample.
            DataError: A value is NaN or infinite.
        """
        runs = []
        for start in range(0, samples.count, _AT_ONCE):
            each(start / samples.count)
            part = samples.take(range(start, min(start + _AT_ONCE, samples.count)))
            runs.append(self._run(self._sessions[ends], part))
        found = join_outputs(runs)
        values = {mine: found[its] for mine, its in self._pairs.items()}
        if ends:
            values |= {end.name: end.of(found[end.name]) for end in self.ends}
        for name, array in values.items():
            if len(array) != samples.count:
                raise UnsupportedModelError(
                    f"teacher: '{name}' has {len(array)} rows for {samples.count} samples; "
                    "tune needs one per sample"
                )
            if not np.all(np.isfinite(array)):
                raise DataError(f"teacher: '{name}' is NaN or infinite on the samples")
        return {name: array.astype(np.float32) for name, array in values.items()}

    def _run(self, session: Session, samples: Samples) -> dict[str, Array]:
        read = [value for value in self._inputs if value.name in session.input_names]
        used = Samples({value.name: samples.arrays[value.name] for value in read})
        runs = paired_outputs([session], read, used, self._batch)
        return join_outputs([outputs for (outputs,) in runs])

    def _ends(
        self, mine: Analysis, its: Analysis, few: Samples, threads: int
    ) -> tuple[End, ...]:
        """Return the ends of blocks whose channels are those of the teacher."""
        names = [name for name in _block_ends(mine, its) if name not in self._pairs]
        if not names:
            return ()
        parts = (extract(facts.model, (), names) for facts in (mine, its))
        found = [self._run(Session(part, threads=threads), few) for part in parts]
        ends = (_end(name, *(values[name] for values in found)) for name in names)
        return tuple(end for end in ends if end is not None)


def _paired(mine: Analysis, its: Analysis) -> dict[str, str]:
    """Return the teacher's tensor for each tensor of the model that is compared.

    These are the raw outputs, in front of Softmax and Sigmoid; where those of the two graphs
    do not match one by one, the float outputs as they are.
    """
    kinds, others = (_raw_kinds(facts) for facts in (mine, its))
    if list(kinds.values()) == list(others.values()):
        return dict(zip(kinds, others, strict=True))
    names = [v.name for v in mine.model.signature.outputs if v.dtype.kind == "f"]
    if not names:
        raise UnsupportedModelError("no output is of floats; there is nothing to learn from")
    return {name: name for name in names}


def _raw_kinds(facts: Analysis) -> dict[str, object]:
    """Return shape and place of every raw output: an output's name, or what reads it."""
    model, kinds = facts.model, dict[str, object]()
    for name in raw_outputs(model, facts.tensors):
        readers = tuple(sorted(use.node.op for use in model.readers.get(name, ())))
        place = name if name in model.output_names else readers
        kinds[name] = (facts.tensors[name].shape, place)
    return kinds


def _block_ends(mine: Analysis, its: Analysis) -> list[str]:
    """Return names at which blocks end in both graphs, in the order of the graph.

    Residual blocks end at their Adds, behind a Relu that is the only reader; where there are
    none, a block has three of the teacher's linear nodes or more.
    """
    names = [_activated(mine.model, block.output) for block in mine.blocks]
    if not names:
        names, place = [], -1
        for index, name in enumerate(its.linears):
            if name in mine.linears and index - place >= _LAYERS:
                names.append(name)
                place = index
    both = mine.tensors.keys() & its.tensors.keys()
    return [name for name in names if name in both and is_float(its.tensors[name].dtype)]


def _activated(model: Model, name: str) -> str:
    """Return what a Relu makes of a tensor, where nothing else reads it."""
    readers = model.readers.get(name, ())
    return readers[0].node.id if [use.node.op for use in readers] == ["Relu"] else name


def _end(name: str, mine: Array, its: Array) -> End | None:
    """Return an end, with the channels that are left; None where they are not found again.

    Removing channels keeps their order, and a channel that was fitted to what it was before
    correlates with it.
    """
    if mine.shape == its.shape:
        return End(name)
    if mine.ndim != its.ndim:
        return None
    differing = [axis for axis in range(mine.ndim) if mine.shape[axis] != its.shape[axis]]
    if len(differing) != 1 or differing[0] == 0:
        return None
    (axis,) = differing
    rows = [_standardised(np.moveaxis(array, axis, 0)) for array in (mine, its)]
    correlations = rows[0] @ rows[1].T / rows[0].shape[1]
    channels = correlations.argmax(axis=1)
    if np.any(np.diff(channels) <= 0) or correlations.max(axis=1).min() < _ALIKE:
        return None
    return End(name, (channels, axis))


def _standardised(rows: Array) -> Array:
    """Return rows of mean 0 and variance 1; rows of one value become 0."""
    flat = rows.reshape(len(rows), -1).astype(np.float64)
    flat = flat - flat.mean(axis=1, keepdims=True)
    deviation = flat.std(axis=1, keepdims=True)
    return np.asarray(np.divide(flat, deviation, out=flat * 0, where=deviation > 0))


class Course:
    """Samples to learn from, varied anew at every step; what torch calls a data set.

    Args:
        samples: The samples; their labels are class indices or shares of classes.
        teacher: What labels them.
        inputs: The model's inputs.
        augmentation: "none"; "light": images become light copies; "mixup": and a third of
            them is mixed with others, a third has a rectangle of another.
        ends: Whether the teacher shows the ends of its blocks.
        classes: Number of classes where labels are learned from, else 0.
    """

    def __init__(
        self,
        samples: Samples,
        teacher: Teacher,
        inputs: Sequence[Value],
        *,
        augmentation: str,
        ends: bool,
        classes: int,
    ) -> None:
        if classes and samples.labels is not None and augmentation == "mixup":
            samples = replace(samples, labels=_shares(samples.labels, classes))
        self._samples, self._teacher, self._inputs = samples, teacher, inputs
        self._augmentation, self._ends = augmentation, ends

    @property
    def count(self) -> int:
        """Number of samples."""
        return self._samples.count

    def drawn(self, index: Sequence[int], seed: Sequence[int]) -> Samples:
        """Return the samples at `index`, varied at random."""
        samples = self._samples.take(index)
        if self._augmentation == "none":
            return samples
        rng = np.random.default_rng(seed)
        found = augmented(
            samples, self._inputs, 2 * samples.count, seed=int(rng.integers(2**32))
        ).samples
        if found is samples:  # they are no images
            return samples
        copies = replace(found.take(range(samples.count, found.count)), labels=samples.labels)
        return copies if self._augmentation == "light" else mixed(copies, rng)

    def taught(self, samples: Samples) -> Examples:
        """Return samples with what the teacher makes of them."""
        from onnxcomp.bridge.objective import Examples

        return Examples(samples, self._teacher.values(samples, ends=self._ends))


def _shares(labels: Array, classes: int) -> Array:
    if labels.shape == (len(labels), classes):
        return labels.astype(np.float32)
    return np.eye(classes, dtype=np.float32)[labels.reshape(-1)]


def mixed(samples: Samples, rng: np.random.Generator) -> Samples:
    """Return images of which a third is mixed with others, and a third has a part of another.

    The first is mixup (Zhang et al. 2018), the second CutMix (Yun et al. 2019).

    Args:
        samples: Images of one input, (N, C, H, W) or (N, H, W, C), of floats or bytes;
            labels, if any, as shares of classes.
        rng: What is drawn from: shares uniform in (0, 1), of brightness or of area.
    """
    ((name, images),) = samples.arrays.items()
    axis = channel_axis(images.shape[1:])
    assert axis is not None
    count, third = len(images), len(images) // 3
    partner, shares = rng.permutation(count), np.ones(count)
    shares[: 2 * third] = rng.random(2 * third)
    found = np.array(images)
    first = np.moveaxis(found, axis, -1)
    other = first[partner]
    weight = shares[:third, None, None, None]
    blend = weight * first[:third] + (1 - weight) * other[:third]
    for i in range(third, 2 * third):
        rows, columns = (_span(size, 1 - shares[i], rng) for size in first.shape[1:3])
        first[i, rows, columns] = other[i, rows, columns]
        area = (rows.stop - rows.start) * (columns.stop - columns.start)
        shares[i] = 1 - area / (first.shape[1] * first.shape[2])
    first[:third] = np.rint(blend) if images.dtype == np.uint8 else blend
    labels = samples.labels
    if labels is not None:
        row = shares.reshape(-1, *(1,) * (labels.ndim - 1))
        labels = (row * labels + (1 - row) * labels[partner]).astype(labels.dtype)
    return replace(samples, arrays={name: found}, labels=labels)


def _span(size: int, area: float, rng: np.random.Generator) -> slice:
    """Return one side of a rectangle that covers a share of the area, somewhere."""
    length = round(size * area**0.5)
    start = int(rng.integers(size - length, endpoint=True))
    return slice(start, start + length)


def parts_of(model: Model, data: Any, held: Any, seed: int) -> tuple[Samples, Samples]:
    """Return the samples to learn from and those to judge by, which may be given."""
    inputs = model.signature.inputs
    samples = as_samples(data, inputs)
    if held is not None:
        return samples, as_samples(held, inputs)
    return samples.split(seed, min(_HELD_SHARE, _MOST_HELD / samples.count))


def label_scores(model: Model, *parts: Samples) -> tuple[str, int]:
    """Return tensor and number of class scores, in front of Softmax, that fit the labels.

    Raises:
        DataError: There are no labels, no such scores, or the labels do not fit them.
    """
    from onnxcomp.bridge.objective import check_labels

    labels = [part.labels for part in parts if part.labels is not None]
    if len(labels) < len(parts):
        raise DataError("tune: the data have no 'labels' to train on; leave labels out")
    facts = capture_tensors(model, next(parts[0].batches(model.signature.inputs, 1)).feed)
    found = class_scores(model, facts)
    if found is None:
        raise DataError("tune: no output is class scores of shape (N, K); leave labels out")
    for array in labels:
        check_labels(array, found[1])
    return found


def check_signatures(model: Model, teacher: Model) -> None:
    """Check that a model takes and gives what its teacher does.

    Raises:
        ParameterError: Inputs or outputs differ.
    """
    for what in ("inputs", "outputs"):
        mine = getattr(model.signature, what)
        its = getattr(teacher.signature, what)
        same = len(mine) == len(its) and all(map(_alike, mine, its))
        if not same:
            raise ParameterError(
                f"tune: {what} of the model are {_shown(mine)}, of the teacher {_shown(its)}; "
                "give the original that the model was made from"
            )


def _alike(mine: Value, its: Value) -> bool:
    """Whether two declarations agree but for the batch and what one leaves open."""
    if (mine.name, mine.dtype) != (its.name, its.dtype):
        return False
    if mine.shape is None or its.shape is None:
        return True
    pairs = zip(mine.shape[1:], its.shape[1:], strict=False)
    fixed = ((a, b) for a, b in pairs if isinstance(a, int) and isinstance(b, int))
    return len(mine.shape) == len(its.shape) and all(a == b for a, b in fixed)


def _shown(values: Sequence[Value]) -> str:
    few = ", ".join(f"'{v.name}' {v.dtype}{list(v.shape or ())}" for v in values[:_SHOWN])
    return few + (f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else "")
