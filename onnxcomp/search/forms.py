"""Which forms of a linear node are worth a measurement, as far as closed forms tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxcomp.analysis.linear import Linear
from onnxcomp.analysis.moments import SecondMoments, why_rows
from onnxcomp.model import Array
from onnxcomp.numerics.moments import RowMoments
from onnxcomp.parallel import ordered_map
from onnxcomp.passes import NODE_PASSES
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


def own_errors(
    options: Sequence[Option], kernel: Array, metric: SecondMoments, *, threads: int
) -> dict[Option, float]:
    """Return the error of a node's own output under every option, several forms at once."""
    forms: dict[tuple[str, str], list[Option]] = {}
    for option in options:
        forms.setdefault((option.method, option.form), []).append(option)

    def of(same: Sequence[Option]) -> Mapping[Option, float]:
        return NODE_PASSES[same[0].method].errors(same, kernel, metric)

    longest_first = list(forms.values())[::-1]  # operators are solved one by one
    found = ordered_map(of, longest_first, at_once=threads)
    errors = {option: error for each in found for option, error in each.items()}
    return {option: errors[option] for option in options}


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
