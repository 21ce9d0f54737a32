"""What it costs to leave a convolution out and let the next one do its work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxcomp.analysis.linear import Linear
from onnxcomp.analysis.moments import collect_moments
from onnxcomp.errors import DataError
from onnxcomp.model import Array, Model
from onnxcomp.passes.base import Option
from onnxcomp.passes.substitute_operators import BYPASS, next_linear, passed_on
from onnxcomp.search.effort import apart
from onnxcomp.search.outputs import OutputError
from onnxcomp.search.refits import like_bias, solve_dense
from onnxcomp.search.space import Space
from onnxcomp.search.twins import Twins


def _values(model: Model, linear: Linear) -> dict[str, Array]:
    """Return the weight and bias with which a convolution passes its input on."""
    weight, bias = (model.weights[name] for name in (linear.weight, linear.bias))
    kernel = passed_on(linear.kernel(weight).shape)
    return {linear.weight: linear.stored(kernel), linear.bias: np.zeros_like(bias)}


@dataclass(frozen=True)
class BypassMeter:
    """Measures the outputs with a convolution left out and its reader refitted.

    Attributes:
        error: Measures the outputs.
        outputs: Names of the tensors that it measures.
        measured: Number of leading batches that it measures on.
        seed: Seed of the positions that the reader is refitted on.
    """

    error: OutputError
    outputs: Sequence[str]
    measured: int
    seed: int

    def errors(self, space: Space, twins: Twins, linear: Linear) -> dict[Option, float]:
        """Return the output error by option; nothing where this is none.

        Args:
            space: The options.
            twins: Both networks, in front of the convolution.
            linear: The convolution.
        """
        options = [option for option in space.forms[linear.id] if option.form == BYPASS]
        reader = next_linear(space.facts, linear)
        if not options or reader is None or reader.id in space.excluded:
            return {}
        model, held = space.facts.model, twins.current.held()
        values = _values(model, linear)
        front = twins.current.tail([*values], [reader.x], arena=False)
        feeds = ({**each, **values} for each in apart(held, self.measured))
        xs = [out[reader.x] for out in front.run_each(feeds)]
        rng = np.random.default_rng([self.seed, list(space.facts.linears).index(reader.id)])
        targets = apart(twins.original.peek(reader.y), self.measured)
        try:
            metrics = collect_moments(reader, xs, targets, rng, threads=space.facts.threads)
        except DataError:  # such as a mask of -inf in front of the reader
            return {}
        kernel = reader.kernel(model.weights[reader.weight])
        kernel, bias = solve_dense(reader, kernel, metrics, np.arange(reader.in_channels))
        values[reader.weight] = reader.stored(kernel)
        values[reader.bias] = like_bias(bias, model.weights[reader.bias])
        session = twins.current.tail([*values], self.outputs)
        lost = self.error.of_runs(session, ({**h, **values} for h in held[: self.measured]))
        return dict.fromkeys(options, lost) if np.isfinite(lost) else {}
