"""The network behind one node, run with other weights of that node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxcomp.analysis.linear import Linear
from onnxcomp.analysis.moments import SecondMoments
from onnxcomp.model import Array
from onnxcomp.search.outputs import OutputError
from onnxcomp.search.refits import like_bias, solve_dense
from onnxcomp.search.twins import Twins


class Trials:
    """Errors of the raw outputs under other weights of one node.

    Args:
        twins: Streams that stand in front of the node.
        linear: The node.
        metrics: Moments of its inputs and of what it should give, per convolution group.
        outputs: The raw outputs.
        error: What they are compared with.
        measured: Number of leading batches to run.
        data_aware: Whether the refit of the node without any option changes the outputs.

    Attributes:
        full: The node's kernel, refitted with all of its inputs; as it is where other nodes
            read it, too.
        without: Error of the outputs with it, before any option.
    """

    def __init__(
        self,
        twins: Twins,
        linear: Linear,
        metrics: Sequence[SecondMoments],
        *,
        outputs: Sequence[str],
        error: OutputError,
        measured: int,
        data_aware: bool,
    ) -> None:
        model = twins.current.model
        weights = model.weights
        self._linear = linear
        self._held = twins.current.held()[:measured]
        self._error = error
        self._bias = weights[linear.bias]
        self._session = twins.current.tail([linear.weight, linear.bias], outputs)
        self.full, bias = linear.kernel(weights[linear.weight]), self._bias.reshape(-1)
        if len(model.readers[linear.weight]) == 1:
            every = np.arange(linear.in_channels)
            self.full, bias = solve_dense(linear, self.full, metrics, every)
        self.without = self.of(self.full, bias) if data_aware else 0.0

    def of(self, kernel: Array, bias: Array) -> float:
        """Return the error with a kernel (m, c / groups, *kernel_shape) and a bias (m,)."""
        linear = self._linear
        stored = {
            linear.weight: linear.stored(kernel),
            linear.bias: like_bias(bias, self._bias),
        }
        return self.of_weights(stored)

    def of_weights(self, weights: Mapping[str, Array]) -> float:
        """Return the error with weight and bias as they are stored, by name."""
        return self._error.of_runs(self._session, ({**h, **weights} for h in self._held))
