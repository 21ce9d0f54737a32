"""How arrays of samples fit the declared inputs of a model: rank, batch size, type, values.

The rank rule. Samples lie along the first axis of an array. Where it has the rank of the
declared input, they are stacked along the batch axis: sample i is `x[i:i+1]`. With one rank
more, sample i is the whole input `x[i]`, batch axis included.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from onnxcomp.errors import DataError, UnsupportedModelError

Array = NDArray[Any]
_CHANNELS = (1, 3, 4)
_MIN_SIDE = 16


class InputSpec(Protocol):
    """What is needed of a declared input; dimensions that are not integers are open."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def dtype(self) -> np.dtype[Any]: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int | str | None, ...] | None: ...  # noqa: D102


def dims(value: InputSpec) -> tuple[int | str | None, ...]:
    """Return the declared shape; `UnsupportedModelError` where not even the rank is known."""
    if value.shape is None:
        raise UnsupportedModelError(
            f"input '{value.name}' has no declared shape; declare one, with open dimensions"
        )
    return value.shape


def is_whole(value: InputSpec, array: Array) -> bool:
    """Tell whether each sample is the whole input; `DataError` where no rank fits."""
    rank = len(dims(value))
    if array.ndim not in (rank, rank + 1) or array.ndim == 0:
        stacked = f"rank {rank} (samples along the batch axis) or " if rank else ""
        raise DataError(
            f"input '{value.name}': samples have shape {show(array.shape)}, the model takes "
            f"{show(dims(value))}; give {stacked}rank {rank + 1} (samples first, each one the "
            "whole input)"
        )
    return array.ndim == rank + 1


def batch_size(inputs: Sequence[InputSpec], whole: Mapping[str, bool]) -> int | None:
    """Return how many samples one feed must hold; None where the model leaves it open.

    Args:
        inputs: the declared inputs.
        whole: input name -> whether its samples are whole inputs.

    Raises:
        DataError: the inputs need different numbers of samples.
    """
    needed = {value.name: fixed_rows(value) for value in inputs if not whole[value.name]}
    needed |= {name: 1 for name in whole if whole[name]}
    sizes = {name: rows for name, rows in needed.items() if rows is not None}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"'{name}' {rows}" for name, rows in sizes.items())
        raise DataError(
            f"inputs take different numbers of samples at a time: {found}; give each of them "
            "with one rank more than declared, samples first, each one the whole input"
        )
    return next(iter(sizes.values()), None)


def fixed_rows(value: InputSpec) -> int | None:
    """Return the declared length of the first axis, None where it is open or absent."""
    first = next(iter(dims(value)), None)
    return first if isinstance(first, int) else None


def share_batch_axis(inputs: Sequence[InputSpec]) -> bool:
    """Tell whether the first axis of all inputs looks like one and the same batch axis."""
    return all(dims(value) for value in inputs) and len({fixed_rows(v) for v in inputs}) == 1


def fitted(value: InputSpec, array: Array) -> Array:
    """Return `array` in the declared type, after checking its dimensions and values.

    Raises:
        DataError: naming the input, what was found and what is needed.
    """
    declared = dims(value)
    sample = declared if is_whole(value, array) else declared[1:]
    axes = zip(array.shape[1:], sample, strict=True)
    for axis, (found, needed) in enumerate(axes, start=1):
        if isinstance(needed, int) and found != needed:
            raise DataError(
                f"input '{value.name}': samples have shape {show(array.shape)}, the model "
                f"takes {show(declared)}: axis {axis} of the samples must be {needed}, "
                f"not {found}"
            )
    cast = _cast(value, array)
    if is_float(cast.dtype) and cast.size:
        finite = np.isfinite(cast).reshape(len(cast), -1).all(axis=1)
        if not finite.all():
            raise DataError(
                f"input '{value.name}': sample {int(np.argmin(finite))} holds NaN or infinite "
                f"values in {cast.dtype} ({int((~finite).sum())} of {len(cast)} samples do)"
            )
    return cast


def _cast(value: InputSpec, array: Array) -> Array:
    """Floats are rounded to the declared float type; all else must keep its exact value."""
    if array.dtype == value.dtype:
        return array
    known = is_float(array.dtype) or array.dtype.kind in "biu"
    if not known or not (is_float(value.dtype) or value.dtype.kind in "biu"):
        raise DataError(
            f"input '{value.name}': samples are {array.dtype}, the model takes {value.dtype}; "
            "only integers, floats and booleans can be used"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(value.dtype)
        if is_float(array.dtype) and is_float(value.dtype):
            return cast
        # Neither comparison is enough: one widens int64 to float64, one may wrap a sign twice.
        exact = np.array_equal(cast, array) and np.array_equal(cast.astype(array.dtype), array)
    if not exact:
        raise DataError(
            f"input '{value.name}': samples are {array.dtype}, the model takes {value.dtype}, "
            "and not all values are exact in it; convert them first"
        )
    return cast


def channel_axis(sample: Sequence[int]) -> int | None:
    """Return the channel axis, -3 or -1, of a sample that looks like a picture, else None.

    Pictures have 1, 3 or 4 channels, first or last, and at least 16 pixels along both sides.

    Args:
        sample: shape of a sample, without its batch axis.
    """
    if len(sample) == 3:
        for axis, sides in ((-3, sample[1:]), (-1, sample[:2])):
            if sample[axis] in _CHANNELS and min(sides) >= _MIN_SIDE:
                return axis
    return None


def is_float(dtype: np.dtype[Any]) -> bool:
    """Tell whether `dtype` is a float type, the ones of ml_dtypes (bfloat16) included."""
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


def gather(
    items: Iterable[Any], inputs: Sequence[InputSpec], *, max_bytes: int
) -> dict[str, Array]:
    """Join the items of an iterable into one array per name.

    Args:
        items: mappings from names to arrays, or arrays for a single input. An item holds a
            batch where all arrays have the declared ranks and share a batch axis, else one
            sample.
        inputs: the declared inputs.
        max_bytes: limit on the bytes of the result.

    Raises:
        DataError: there are no items, too many bytes, or they differ in names or shapes.
    """
    columns: dict[str, list[Array]] = {}
    total = 0
    ranks = {value.name: len(dims(value)) for value in inputs}
    for position, item in enumerate(items):
        named = item if isinstance(item, Mapping) else {only(inputs).name: item}
        arrays = {name: np.asarray(array) for name, array in named.items()}
        if position and arrays.keys() != columns.keys():
            raise DataError(f"item {position} has {quoted(arrays)}, not {quoted(columns)}")
        batched = share_batch_axis(inputs) and all(
            arrays[name].ndim == rank for name, rank in ranks.items() if name in arrays
        )
        for name, array in arrays.items():
            rows = np.atleast_1d(array) if batched else array[None]
            column = columns.setdefault(name, [])
            if column and rows.shape[1:] != column[0].shape[1:]:
                raise DataError(
                    f"'{name}': samples of item {position} have shape {show(rows.shape[1:])}, "
                    f"those before it {show(column[0].shape[1:])}; make them the same"
                )
            total += rows.nbytes
            column.append(rows)
        if total > max_bytes:
            raise DataError(f"the samples take more than {max_bytes:,} bytes; give fewer")
    if not columns:
        raise DataError("there are no samples; give at least one")
    return {name: np.concatenate(column) for name, column in columns.items()}


def only(inputs: Sequence[InputSpec]) -> InputSpec:
    """Return the single input; `DataError` where there are several to choose from."""
    if len(inputs) != 1:
        names = quoted(value.name for value in inputs)
        raise DataError(f"the model has the inputs {names}: give the samples by name")
    return inputs[0]


def check_names(found: Iterable[str], needed: Sequence[str]) -> None:
    """Raise `DataError` where an input has no samples, or samples belong to no input."""
    found = list(found)
    missing = [name for name in needed if name not in found]
    if missing:
        raise DataError(f"no samples for input {quoted(missing)}; found {quoted(found)}")
    unknown = [name for name in found if name not in needed]
    if unknown:
        raise DataError(f"the model has no input {quoted(unknown)}; it has {quoted(needed)}")


def quoted(names: Iterable[str]) -> str:
    """Return the names for a message."""
    return ", ".join(f"'{name}'" for name in names) or "nothing"


def show(shape: Sequence[int | str | None]) -> str:
    """Return a shape for a message, open dimensions as their symbol or `?`."""
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in shape) + "]"
