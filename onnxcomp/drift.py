"""How far outputs are from those of a reference, summed up batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxcomp.errors import ValidationError
from onnxcomp.model import Array
from onnxcomp.sample_rules import is_float


@dataclass(frozen=True)
class Drift:
    """How far an output b is from the reference a, over all samples.

    Attributes:
        relative_l2: ||a - b|| / ||a||; for a = 0, 0 where b = 0 too, else infinite.  For
            integers and booleans the share of elements that differ.
        sqnr_db: 10 log10(sum a^2 / sum (a - b)^2), infinite without noise; None for integers.
        top1_agreement: Share of rows with the same largest entry, for floats of shape (N, K)
            with K >= 2, which look like class scores; else None.
        max_abs: Largest |a - b|.
    """

    relative_l2: float
    sqnr_db: float | None
    top1_agreement: float | None
    max_abs: float


class DriftMeter:
    """Sums up the drift batch by batch, so that no outputs need be held.

    Elements that are not finite in the reference are left out.
    """

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {}

    def update(self, reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> None:
        """Add the outputs of one batch.

        Raises:
            ValidationError: Names or shapes differ, or the candidate is NaN or infinite where
                the reference is finite.
        """
        if reference.keys() != candidate.keys():
            raise ValidationError(f"outputs are {list(candidate)}, must be {list(reference)}")
        for name, array in reference.items():
            if array.shape != candidate[name].shape:
                raise ValidationError(
                    f"output '{name}' has shape {candidate[name].shape}, the original's "
                    f"{array.shape} on the same inputs"
                )
            sums = self._sums.setdefault(name, _Sums())
            add = sums.add_floats if is_float(array.dtype) else sums.add_exact
            add(name, array, candidate[name])

    def result(self) -> dict[str, Drift]:
        """Return the drift by output."""
        return {name: sums.drift() for name, sums in self._sums.items()}


@dataclass(eq=False)
class _Sums:
    """Running sums over one output."""

    signal: float = 0.0
    noise: float = 0.0
    max_abs: float = 0.0
    exact: int = 0
    differing: int = 0
    rows: int = 0
    agreeing: int = 0

    def add_exact(self, name: str, reference: Array, candidate: Array) -> None:
        self.exact += reference.size
        self.differing += int(np.count_nonzero(reference != candidate))
        if reference.dtype.kind in "biu":
            gap = np.abs(candidate.astype(np.float64) - reference.astype(np.float64))
            self.max_abs = max(self.max_abs, float(gap.max(initial=0)))

    def add_floats(self, name: str, reference: Array, candidate: Array) -> None:
        a, b = reference.astype(np.float64), candidate.astype(np.float64)
        finite = np.isfinite(a)
        broken = np.count_nonzero(finite & ~np.isfinite(b))
        if broken:
            raise ValidationError(
                f"output '{name}': {broken} of {a.size} values are NaN or infinite where the "
                "original's are finite"
            )
        if a.ndim == 2 and a.shape[1] >= 2:
            self.rows += len(a)
            self.agreeing += int(np.count_nonzero(a.argmax(axis=1) == b.argmax(axis=1)))
        a, b = a[finite], b[finite]
        self.signal += float(a @ a)
        self.noise += float((b - a) @ (b - a))
        self.max_abs = max(self.max_abs, float(np.abs(b - a).max(initial=0)))

    def drift(self) -> Drift:
        if self.exact:
            return Drift(self.differing / self.exact, None, None, self.max_abs)
        agreement = self.agreeing / self.rows if self.rows else None
        if self.noise == 0:
            return Drift(0.0, math.inf, agreement, self.max_abs)
        if self.signal == 0:
            return Drift(math.inf, -math.inf, agreement, self.max_abs)
        share = self.noise / self.signal
        return Drift(math.sqrt(share), -10 * math.log10(share), agreement, self.max_abs)


def drift(
    reference: Mapping[str, Array], candidate: Mapping[str, Array]
) -> Mapping[str, Drift]:
    """Return the drift of each output; see `DriftMeter.update` for what is refused."""
    meter = DriftMeter()
    meter.update(reference, candidate)
    return meter.result()
