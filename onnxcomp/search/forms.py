"""Which forms of a linear node are worth a measurement, as far as closed forms tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxcomp.analysis.linear import Linear
from onnxcomp.analysis.moments import SecondMoments, why_rows
from onnxcomp.numerics.moments import RowMoments
from onnxcomp.passes.base import Option
from onnxcomp.passes.substitute_operators import BYPASS
from onnxcomp.search.space import Space

_OF_ROWS = ("output_basis",)  # forms that rows can be fitted to without second moments


def fitted(options: Sequence[Option], metric: SecondMoments) -> tuple[list[Option], str]:
    """Return the options that have closed forms, and why others have none, or ""."""
    options = [option for option in options if option.form != BYPASS]
    if not isinstance(metric, RowMoments):
        return options, ""
    missing = dict.fromkeys(o.form for o in options if o.form not in _OF_ROWS)
    reason = f"{', '.join(missing)} cannot be fitted: {why_rows(metric)}" if missing else ""
    return [option for option in options if option.form in _OF_ROWS], reason


def efficient(space: Space, linear: Linear, errors: Mapping[Option, float]) -> list[Option]:
    """Return the options that no other beats in error, MACs and parameters at once."""
    rows = []
    for option, error in errors.items():
        steps = space.steps(linear, option, linear.in_channels, linear.out_channels)
        macs, weights = sum(s.macs for s in steps), sum(s.weights for s in steps)
        rows.append((error, macs, weights, space.target.chain_seconds(steps)))
    table = np.array(rows)
    kept = []
    for index, option in enumerate(errors):
        better = np.all(table <= table[index], axis=1) & np.any(table < table[index], axis=1)
        if not better.any():
            kept.append(option)
    return kept
