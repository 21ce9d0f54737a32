"""Samples: the inputs on which a network is fitted, tuned and judged.

Each array has its samples along the first axis. How a sample becomes the model's input follows
from the array's rank (the rank rule):

* rank of the declared input: stacked along the batch axis, sample i is `x[i:i+1]`;
* one rank more: sample i is the whole input `x[i]`, batch axis included. Recurrent states such
  as [2, 1, 16, 16, 33] and scalars need this form; such samples are fed one at a time.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onnxcomp.errors import DataError, ParameterError
from onnxcomp.numerics.noise import as_pixels, pink_noise
from onnxcomp.sample_files import (
    IMAGE_SUFFIXES,
    Preprocess,
    check_sizes,
    read_images,
    read_npy,
    read_npz,
)
from onnxcomp.sample_rules import (
    InputSpec,
    batch_size,
    channel_axis,
    check_names,
    dims,
    fitted,
    gather,
    is_float,
    is_whole,
    only,
    share_batch_axis,
    show,
)

Array = NDArray[Any]
MAX_BYTES = 8_000_000_000
LABELS = "labels"


@dataclass(frozen=True, eq=False)
class Batch:
    """Arrays for one run of the model.

    Attributes:
        feed: input name -> array that fits the declared input.
        start: index of the first sample in the feed.
        count: samples in the feed; behind them the last is repeated up to a fixed batch size.
        rows: length of the batch axis of the feed; None where samples are whole inputs.
    """

    feed: dict[str, Array]
    start: int
    count: int
    rows: int | None

    def trim(self, output: Array) -> Array:
        """Cut the rows of an output that belong to repeated samples.

        An output whose first axis is not the batch axis is returned as it is.
        """
        if self.rows is None or output.ndim == 0 or output.shape[0] != self.rows:
            return output
        return output[: self.count]


@dataclass(frozen=True, eq=False)
class Samples:
    """At least one sample for every input of a model; `as_samples` checks them against it.

    Arrays are read-only views: they are not copied, so do not write to the arrays given.

    Attributes:
        arrays: input name -> array of shape (count, ...); see the rank rule.
        labels: array of shape (count, ...), or None.
        origin: "user", "random" where `random_samples` made them, or "inverted" where they
            were made from what a network recorded.
    """

    arrays: Mapping[str, Array]
    labels: Array | None = None
    origin: str = "user"

    def __post_init__(self) -> None:
        arrays = {name: _read_only(array) for name, array in self.arrays.items()}
        labels = None if self.labels is None else _read_only(self.labels)
        everything = arrays | ({} if labels is None else {LABELS: labels})
        counts = {
            name: len(array) if array.ndim else None for name, array in everything.items()
        }
        if not arrays or None in counts.values():
            raise DataError(f"samples need a first axis that counts them; got {counts}")
        if len(set(counts.values())) > 1:
            found = ", ".join(f"'{name}' {count}" for name, count in counts.items())
            raise DataError(
                f"all inputs need the same number of samples; got {found}. A recurrent state "
                "needs one rank more than declared, samples first"
            )
        if 0 in counts.values():
            raise DataError("there are no samples; give at least one")
        object.__setattr__(self, "arrays", MappingProxyType(arrays))
        object.__setattr__(self, "labels", labels)

    @property
    def count(self) -> int:
        """Number of samples, at least 1."""
        return len(next(iter(self.arrays.values())))

    def take(self, indices: ArrayLike) -> Self:
        """Return the samples at `indices` (integers), copied, in that order."""
        index = np.asarray(indices, np.int64).reshape(-1)
        arrays = {name: array[index] for name, array in self.arrays.items()}
        return replace(
            self, arrays=arrays, labels=None if self.labels is None else self.labels[index]
        )

    def split(
        self,
        seed: int,
        holdout: float = 0.25,
        minimum: int = 64,
        *,
        groups: NDArray[np.int64] | None = None,
    ) -> tuple["Samples", "Samples"]:
        """Split at random, reproducibly, into (fit, hold-out), each in the original order.

        Small sets mostly fit: where the share is less than `minimum`, up to a third is held
        out. Not half, for the fit is what compresses; not just the share, for light copies
        make up for samples that the fit lacks and nothing does for those that judge it. With
        the defaults 16 samples split into 11 and 5, 64 into 43 and 21, 256 into 192 and 64.

        Args:
            seed: seed of the draw.
            holdout: share of the samples to hold out, in (0, 0.5].
            minimum: hold out at least so many, as long as they are no more than a third.
            groups: a number for each sample, (count,), >= 0: samples of one number stay
                together, all but those of one group.

        Raises:
            DataError: there are fewer than two samples.
        """
        if not 0 < holdout <= 0.5:
            raise ParameterError.of("split", "holdout", "in (0, 0.5]", holdout)
        if self.count < 2:
            raise DataError(
                "one sample cannot be split into fit and hold-out; give at least 2"
            )
        wanted = max(round(self.count * holdout), min(minimum, self.count // 3), 1)
        held = min(wanted, self.count // 2)
        rng = np.random.default_rng(seed)
        order = rng.permutation(self.count)
        if groups is not None:
            rank = rng.permutation(groups.max() + 1)[groups[order]]
            order = order[np.argsort(rank, kind="stable")]
        return self.take(np.sort(order[held:])), self.take(np.sort(order[:held]))

    def batches(self, inputs: Sequence[InputSpec], size: int) -> Iterator[Batch]:
        """Iterate over all samples, in order, as feeds that fit the declared inputs.

        A fixed batch size in the declared shapes overrides `size`, the last feed is then
        filled up by repetition; whole inputs (see the rank rule) are fed one at a time.

        Args:
            inputs: the model's declared inputs.
            size: samples per feed where the batch axis is open, >= 1.

        Raises:
            DataError: an input has no samples, or the declared batch sizes contradict.
        """
        if size < 1:
            raise ParameterError.of("batches", "size", ">= 1", size)
        check_names(self.arrays, [value.name for value in inputs])
        whole = {value.name: is_whole(value, self.arrays[value.name]) for value in inputs}
        fixed = batch_size(inputs, whole)
        return self._feeds(whole, fixed or size, pad=fixed is not None)

    def _feeds(self, whole: Mapping[str, bool], rows: int, *, pad: bool) -> Iterator[Batch]:
        for start in range(0, self.count, rows):
            count = min(rows, self.count - start)
            index = np.minimum(np.arange(rows if pad else count) + start, self.count - 1)
            feed = {}
            for name, array in self.arrays.items():
                chunk = array[start] if whole[name] else array[start : start + count]
                feed[name] = np.asarray(chunk if count == len(index) else array[index])
            yield Batch(feed, start, count, None if any(whole.values()) else len(index))


def load_samples(
    path: str | os.PathLike[str],
    inputs: Sequence[InputSpec],
    *,
    preprocess: str | os.PathLike[str] | Preprocess | None = None,
    max_bytes: int = MAX_BYTES,
) -> Samples:
    r"""Read samples from an `.npz` file, a folder of `.npy` files or a folder of images.

    * `.npz`: keys are input names; any key for a single input; `labels` is optional.
    * `.npy`: one file per input, named after it (`/`, `\` and `:` in a name become `_`); or,
      for a single input, many files with one sample each, in the order of their names.
    * images (jpg, png, webp, bmp): in the order of their names, for a single input, with
      `preprocess`. A folder may hold `labels.npy` in both cases.

    Args:
        path: file or folder.
        inputs: the model's declared inputs.
        preprocess: for images: a `Preprocess` or the YAML file of one.
        max_bytes: limit on the bytes of all samples.

    Raises:
        DataError: the files cannot be used; says which, what was found and what is needed.
    """
    source = Path(path)
    try:
        return as_samples(_read(source, inputs, preprocess, max_bytes), inputs)
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error}") from error


def _read(
    source: Path,
    inputs: Sequence[InputSpec],
    preprocess: str | os.PathLike[str] | Preprocess | None,
    max_bytes: int,
) -> dict[str, Array]:
    entries = source.iterdir() if source.is_dir() else ()
    files = sorted(file for file in entries if not file.name.startswith("."))
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    arrays = [file for file in files if file.suffix == ".npy"]
    if images:
        return _read_image_folder(source, images, inputs, preprocess, max_bytes)
    if preprocess is not None:
        raise DataError(f"{source}: holds no images, and preprocessing applies to them only")
    if arrays:
        return _read_npy_folder(arrays, inputs, max_bytes)
    if source.suffix == ".npz":
        return read_npz(source, max_bytes=max_bytes)
    raise DataError(f"{source}: give an .npz file, a folder of .npy files or one of images")


def _read_image_folder(
    source: Path,
    images: list[Path],
    inputs: Sequence[InputSpec],
    preprocess: str | os.PathLike[str] | Preprocess | None,
    max_bytes: int,
) -> dict[str, Array]:
    if preprocess is None:
        raise DataError(f"{source}: a folder of images needs a preprocessing file")
    if not isinstance(preprocess, Preprocess):
        preprocess = Preprocess.load(Path(preprocess))
    found = {only(inputs).name: read_images(images, preprocess, max_bytes=max_bytes)}
    labels = source / f"{LABELS}.npy"
    return found | ({LABELS: read_npy(labels, max_bytes=max_bytes)} if labels.exists() else {})


def _read_npy_folder(
    files: list[Path], inputs: Sequence[InputSpec], max_bytes: int
) -> dict[str, Array]:
    check_sizes(files, max_bytes)
    found = {file.stem: read_npy(file, max_bytes=max_bytes) for file in files}
    stems = {v.name.translate(str.maketrans("/\\:", "___")): v.name for v in inputs}
    if len(inputs) > 1 or set(stems) & set(found):
        return {stems.get(stem, stem): array for stem, array in found.items()}
    labels = found.pop(LABELS, None)
    gathered = gather(found.values(), inputs, max_bytes=max_bytes)
    return gathered | ({} if labels is None else {LABELS: labels})


def as_samples(
    data: Samples | Mapping[str, Any] | Iterable[Any],
    inputs: Sequence[InputSpec],
    *,
    max_bytes: int = MAX_BYTES,
) -> Samples:
    """Return `data` as samples that fit the declared inputs.

    Args:
        data: `Samples`; arrays by input name (any name for a single input) and optionally
            `labels`; one array; or an iterable of such mappings or arrays. An item of an
            iterable holds a batch of samples, or one sample without its batch axis; where the
            inputs do not share a batch axis, one whole feed.
        inputs: the model's declared inputs.
        max_bytes: limit on what is collected from an iterable.

    Raises:
        DataError: an input is missing or unknown, a dimension or a type does not fit, a value
            is NaN or infinite, or the numbers of samples differ.
    """
    origin = "user"
    if isinstance(data, str | bytes | os.PathLike):
        raise DataError("samples must be arrays; read a file with load_samples")
    if isinstance(data, Samples):
        origin = data.origin
        labels = {} if data.labels is None else {LABELS: data.labels}
        found: Mapping[str, Any] = {**data.arrays, **labels}
    elif isinstance(data, Mapping):
        found = data
    elif isinstance(data, np.ndarray) or hasattr(data, "__array__"):
        found = {only(inputs).name: data}
    elif isinstance(data, Iterable):
        found = gather(data, inputs, max_bytes=max_bytes)
    else:
        raise DataError(f"samples must be arrays or an iterable; got {type(data).__name__}")
    arrays = {name: np.asarray(array) for name, array in found.items()}
    names = [value.name for value in inputs]
    target = None if LABELS in names else arrays.pop(LABELS, None)
    if len(names) == 1 and len(arrays) == 1:
        arrays = {names[0]: next(iter(arrays.values()))}
    check_names(arrays, names)
    if target is not None and target.dtype.kind not in "biuf":
        raise DataError(f"labels are {target.dtype}; give numbers, such as class indices")
    return Samples({v.name: fitted(v, arrays[v.name]) for v in inputs}, target, origin)


def random_samples(
    inputs: Sequence[InputSpec],
    count: int,
    seed: int,
    shapes: Mapping[str, tuple[int, ...]],
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> Samples:
    """Make samples where the user has none; they say little about the network's real accuracy.

    Float inputs of rank 4 get images whose amplitude falls as 1/f, as in natural images, each
    channel of zero mean and unit variance (NHWC is assumed where the last axis has at most 4
    entries and the second more); other floats get white noise. The channels of what looks like
    pictures (`channel_axis`) are correlated, and their values lie within a range where one is
    known; that of bytes is 0 to 255. Other integer arrays are 0, an index that every table
    has; integer scalars, which mostly are counts, are 1. Booleans are False.

    Args:
        inputs: the model's declared inputs.
        count: number of samples, >= 1.
        seed: seed of the draw.
        shapes: input name -> full shape, batch axis included, needed for open dimensions.
        ranges: input name -> lowest and highest value of its pictures, where known.

    Raises:
        DataError: a dimension behind the batch axis is open, or a shape does not fit.
    """
    if count < 1:
        raise ParameterError.of("random_samples", "count", ">= 1", count)
    stacked = share_batch_axis(inputs)
    arrays = {}
    for position, value in enumerate(inputs):
        shape = shapes.get(value.name, dims(value))
        sample = shape[1:] if stacked else shape
        sizes = tuple(dim for dim in sample if isinstance(dim, int))
        if len(shape) != len(dims(value)) or len(sizes) != len(sample):
            raise DataError(
                f"input '{value.name}' is declared as {show(dims(value))}; name the sizes of "
                f"all its {len(dims(value))} axes; got {show(shape)}"
            )
        array = arrays[value.name] = np.zeros((count, *sizes), value.dtype)
        bytes_ = value.dtype == np.uint8
        channels = channel_axis(sizes[-3:]) if len(shape) == 4 else None
        span = (0.0, 255.0) if bytes_ else (ranges or {}).get(value.name)
        if is_float(value.dtype) or (bytes_ and channels is not None):
            rng = np.random.default_rng([seed, position])
            for index in range(count):
                noise = _noise(rng, sizes, len(shape), channels)
                array[index] = as_pixels(noise, *span) if span and channels else noise
        elif value.dtype.kind in "iu" and not shape:
            array[...] = 1
    return replace(as_samples(arrays, inputs), origin="random")


def _noise(
    rng: np.random.Generator, sizes: tuple[int, ...], rank: int, channels: int | None
) -> NDArray[np.float64]:
    """Draw one sample, an image where the input has rank 4."""
    if rank != 4:
        return rng.standard_normal(sizes)
    last = sizes[-1] <= 4 < sizes[-3] if channels is None else channels == -1
    return pink_noise(rng, sizes, (-3, -2) if last else (-2, -1), channels)


def _read_only(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view
