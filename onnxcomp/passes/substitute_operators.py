"""SubstituteOperators: a convolution becomes a lighter operator, or two.

    grouped         k x k in groups
    pointwise       1 x 1 at the middle of the window, also in groups
    row, column     1 x k or k x 1 at the middle
    cross           the sum of both
    dilated         3 x 3 that spans a window of 5, 7, ...
    separable       depthwise k x k, then 1 x 1: one such pair, or a sum of up to four

    bypass          nothing, where the next linear node can be refitted to do its work too:
                    a residual block of two convolutions becomes one of any form

All of these equal some dense kernel and are fitted by `numerics.substitution` from the weights
alone or in the metric of the inputs, so the search can judge them without training.  Others
cannot be fitted that way and are proposed on request only, for `bridge.selection`:

    separable_twice   depthwise, 1 x 1, Relu, depthwise, 1 x 1
    average_pool, max_pool, skip    no weights; the node's bias stays

The set is that of Diao et al. 2021 (Sensors 21, 3464) as far as its opening tells it, see
`spec/operator-substitution.md` section 1.  What follows the node, its activation too, stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from onnxcomp.analysis.linear import Linear
from onnxcomp.analysis.target import TARGETS, Convolution, Target
from onnxcomp.errors import ParameterError
from onnxcomp.model import Array
from onnxcomp.numerics.factorization import PatchMetric, squared_error
from onnxcomp.numerics.substitution import restricted, separable, spread
from onnxcomp.passes.base import Arrays, Need, Option, Proposal, node_proposal
from onnxcomp.passes.chains import reason_to_stay
from onnxcomp.passes.windows import cropped, reads_middle, windows_of

if TYPE_CHECKING:
    from onnxcomp.analysis import Analysis
    from onnxcomp.draft import Draft

FITTED = ("grouped", "pointwise", "row", "column", "cross", "dilated", "separable")
BYPASS = "bypass"
TRAINED = ("separable_twice", "average_pool", "max_pool", "skip")
_ACTIVATIONS = ("Clip", "LeakyRelu", "Relu")
_POOLS = {"average_pool": "AveragePool", "max_pool": "MaxPool"}
_GROUPS = (2, 4, 8)
_MULTIPLICITIES = (1, 2, 3, 4)
_PAYS = 1.05  # an option must be predicted at least so much faster than what it replaces


@dataclass(frozen=True)
class SubstituteOperators:
    """Lighter operators in the place of single convolutions.

    Attributes:
        forms: Which to propose, of `FITTED`, `BYPASS` and `TRAINED`.
        target: Profile whose latency model judges options.
        step: None to leave out what is predicted to be no faster, a number to propose it too.
    """

    name: ClassVar[str] = "substitute_operators"
    exact: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset()

    forms: tuple[str, ...] = (*FITTED, BYPASS)
    target: Target = TARGETS["x86-avx512"]
    step: int | None = None

    def __post_init__(self) -> None:
        for form in self.forms:
            allowed = (*FITTED, BYPASS, *TRAINED)
            if form not in allowed:
                raise ParameterError.choice("SubstituteOperators", "forms", allowed, form)

    def propose(self, facts: Analysis, /) -> Proposal:
        """Return every legal operator that saves work, and refusals for other nodes."""
        return node_proposal(facts, self._options)

    def _options(self, facts: Analysis, linear: Linear) -> tuple[list[Option], str]:
        if linear.node.op != "Conv":
            return [], f"{linear.node.op} is no convolution"
        if reason := reason_to_stay(facts, linear):
            return [], reason
        alone = next_linear(facts, linear) is None
        forms = [form for form in self.forms if form != BYPASS or not alone]
        sizes = [(form, size) for form in forms for size in legal_sizes(form, linear)]
        legal = [Option(self.name, linear.id, form, size) for form, size in sizes]
        if not legal:
            return [], "no lighter operator has its shape"
        if self.step is not None:
            return legal, ""
        dense = self.target.seconds(linear.convolution)
        faster = [o for o in legal if seconds(linear, o, self.target) * _PAYS <= dense]
        if faster:
            return faster, ""
        lighter = f"none of {len(legal)} lighter operators"
        return [], f"{lighter} is predicted faster on {self.target.name}"

    def chain(
        self, option: Option, linear: Linear, out_channels: int, in_channels: int
    ) -> list[Convolution]:
        """Return the convolutions that an option makes of a node at given widths."""
        return chain(linear, option, out_channels, in_channels)

    def possible(
        self, option: Option, linear: Linear, out_channels: int, in_channels: int
    ) -> bool:
        """Whether an option is possible, and smaller, at given widths."""
        if option.form in ("grouped", "pointwise"):
            (groups,) = option.size
            return in_channels % groups == 0 and out_channels % groups == 0
        if option.form in (*_POOLS, "skip", BYPASS):
            widths = linear.out_channels, linear.in_channels
            return (out_channels, in_channels) == widths
        own = Convolution(in_channels, out_channels, linear.spatial, 1, 1)
        steps = chain(linear, option, out_channels, in_channels)
        return sum(step.weights for step in steps) < own.weights

    def errors(
        self, options: Sequence[Option], kernel: Array, metric: PatchMetric | None, /
    ) -> dict[Option, float]:
        """Return the squared error of the node's output under each fitted option."""
        found = {}
        for option in options:
            _, dense = self.fit(option, kernel, metric)
            found[option] = squared_error(kernel, dense, metric)
        return found

    def fit(
        self, option: Option, kernel: Array, metric: PatchMetric | None, /
    ) -> tuple[Arrays, Array]:
        """Solve one option's kernels in closed form.

        Args:
            option: One of the forms `FITTED` or `BYPASS`, and its size.
            kernel: Refitted dense kernel (m, c, *kernel_shape), float64.
            metric: Second moments of the node's input patches; None for the weights alone.

        Returns:
            The kernels by name ("0", "1"), as Conv stores them, those of several separable
            convolutions side by side, the middle of a cross in its row; and the dense kernel
            that equals them together.
        """
        shape = kernel.shape
        m, c, extents = shape[0], shape[1], shape[2:]
        W = kernel.reshape(m, c, -1)
        if option.form == "separable":
            found = separable(W, metric, option.size[0])
            filters = found.depthwise.swapaxes(0, 1).reshape(-1, 1, *extents)
            pointwise = found.pointwise.swapaxes(1, 2).reshape(m, -1, *(1,) * len(extents))
            return {"0": filters, "1": pointwise}, found.dense().reshape(shape)
        if option.form == BYPASS:
            return {}, passed_on(shape)
        windows = windows_of(option.form, extents)
        if not windows:
            raise ParameterError.choice("SubstituteOperators.fit", "form", FITTED, option.form)
        groups = option.size[0] if option.size else 1
        read = tuple(dict.fromkeys(p for w in windows for p in w.positions(extents)))
        part = restricted(W, metric, groups=groups, positions=read)
        dense = spread(part, c, W.shape[2], positions=read)
        kernels, used = {}, set[int]()
        for index, window in enumerate(windows):
            places = window.positions(extents)
            own = part[:, :, [read.index(p) for p in places]]
            kernel = np.where([p in used for p in places], 0.0, own)
            kernels[str(index)] = kernel.reshape(m, -1, *window.counts)
            used.update(places)
        return kernels, dense.reshape(shape)

    def start(self, option: Option, kernel: Array, metric: PatchMetric | None, /) -> Arrays:
        """Return kernels to train from, of any form.

        The first half of `separable_twice` passes its inputs on, the second is `separable`:
        behind a Relu, at stride 1 and with an odd kernel padded to the same extent, the whole
        then computes what `separable` does.
        """
        if option.form in FITTED:
            return self.fit(option, kernel, metric)[0]
        if option.form != "separable_twice":
            return {}
        once = Option(self.name, option.target, "separable", (1,))
        second = self.fit(once, kernel, metric)[0]
        c, extents = kernel.shape[1], kernel.shape[2:]
        first = passed_on((c, c, *extents)).sum(axis=1, keepdims=True)
        ones = np.eye(c).reshape(c, c, *(1,) * len(extents))
        return {"0": first, "1": ones, "2": second["0"], "3": second["1"]}

    def apply(self, draft: Draft, facts: Analysis, chosen: Mapping[Option, Arrays], /) -> None:
        """Replace the nodes of `chosen` by their operators."""
        for option, arrays in chosen.items():
            _Writer(draft, facts.linears[option.target], option).write(arrays)


def next_linear(facts: Analysis, linear: Linear) -> Linear | None:
    """Return the linear node that alone reads a node, behind an activation at most.

    None where there is no such node, or where it cannot be refitted on its own.
    """
    model, tensor = facts.model, linear.y
    while tensor not in model.output_names and len(model.readers.get(tensor, ())) == 1:
        node = model.readers[tensor][0].node
        found = facts.linears.get(node.id)
        if found is not None:
            own = len(model.readers[found.weight]) == 1 and found.x == tensor
            return found if own and found.groups == 1 else None
        if node.op not in _ACTIVATIONS:
            return None
        tensor = node.id
    return None


def passed_on(shape: tuple[int, ...]) -> Array:
    """Return the kernel (c, c, *kernel_shape) that passes its input on."""
    kernel = np.zeros(shape)
    every = np.arange(shape[0])
    middle: tuple[Any, ...] = tuple((k - 1) // 2 for k in shape[2:])
    kernel[every, every, *middle] = 1
    return kernel


def arrays_of(option: Option, kernels: Sequence[Array]) -> Arrays:
    """Return the kernels of an option's convolutions, in order, as `apply` takes them."""
    if option.form == "separable":
        first, second = np.concatenate(kernels[::2]), np.concatenate(kernels[1::2], axis=1)
        return {"0": first, "1": second}
    return {str(index): kernel for index, kernel in enumerate(kernels)}


def chain(
    linear: Linear, option: Option, out_channels: int, in_channels: int
) -> list[Convolution]:
    """Return the convolutions that an option makes of a node at given widths."""
    form, c, m = option.form, in_channels, out_channels
    x, y = math.prod(linear.in_extent), math.prod(linear.out_extent)
    if form == "separable":
        once = [Convolution(c, c, linear.spatial, y, x, c), Convolution(c, m, 1, y, y)]
        return once * option.size[0]
    if form == "separable_twice":
        first = Convolution(c, c, linear.spatial, y, x, c)
        second = Convolution(c, c, linear.spatial, y, y, c)
        return [first, Convolution(c, c, 1, y, y), second, Convolution(c, m, 1, y, y)]
    groups = option.size[0] if option.size else 1
    counts = [math.prod(w.counts) for w in windows_of(form, linear.kernel_shape)]
    return [Convolution(c, m, count, y, x, groups) for count in counts]


def seconds(linear: Linear, option: Option, target: Target) -> float:
    """Return the predicted seconds of an option at the node's own widths."""
    steps = chain(linear, option, linear.out_channels, linear.in_channels)
    return target.chain_seconds(steps) + pool_seconds(linear, option, target)


def pool_seconds(linear: Linear, option: Option, target: Target) -> float:
    """Return the predicted seconds of an option's pool, if it is one."""
    elements = linear.out_channels * float(np.prod(linear.out_extent, dtype=np.int64))
    return target.element_seconds(_POOLS.get(option.form, ""), elements)


def legal_sizes(form: str, linear: Linear) -> list[tuple[int, ...]]:
    """Return the sizes at which a form is legal in a node's place and takes less work."""
    m, c, k = linear.out_channels, linear.in_channels, linear.spatial
    attrs, extents = linear.node.attrs, linear.kernel_shape
    if form in (*_POOLS, "skip", BYPASS):
        pool = form in _POOLS
        same = pool or linear.in_extent == linear.out_extent
        strided = not pool and any(s != 1 for s in linear.strides)
        dilated = pool and any(d != 1 for d in linear.dilations)
        pads = attrs.get("pads", (0, 0) * len(extents))
        wide = pool and any(p >= k for p, k in zip(pads, 2 * extents, strict=True))
        shifted = form == BYPASS and not reads_middle(attrs, extents)
        return [()] if c == m and same and not (strided or dilated or wide or shifted) else []
    sizes: list[tuple[int, ...]]
    if form == "separable":
        sizes = [(q,) for q in _MULTIPLICITIES if q < k]
    elif form == "separable_twice":
        sizes = [()] if k > 1 else []
    else:
        windows = windows_of(form, extents)
        if not windows or any(cropped(attrs, extents, w) is None for w in windows):
            return []
        sizes = [(g,) for g in _GROUPS if m % g == 0 and c % g == 0 and min(m, c) > g]
        if form != "grouped":
            sizes = [(1,), *sizes] if form == "pointwise" else [()]
    dense = linear.convolution.weights
    return [
        size
        for size in sizes
        if c > 1
        and sum(s.weights for s in chain(linear, Option("", "", form, size), m, c)) < dense
    ]


class _Writer:
    """Writes the operators that take the place of one convolution."""

    def __init__(self, draft: Draft, linear: Linear, option: Option) -> None:
        self._draft = draft
        self._linear = linear
        self._node, self._form = option.target, option.form
        self._size = option.size[0] if option.size else 1
        inputs = draft.inputs(self._node)
        self._x, self._weight = inputs[:2]
        self._bias = next(iter(inputs[2:3]), "")
        self._attrs = draft.attributes(self._node)
        self._dtype = draft.weights[self._weight].dtype
        draft.remove_node(self._node)

    def write(self, arrays: Arrays) -> None:
        """Write the operators with their kernels."""
        kernels = [arrays[str(index)] for index in range(len(arrays))]
        if self._form == "separable":
            self._separable(*kernels)
        elif self._form == "separable_twice":
            self._separable_twice(*kernels)
        elif kernels:
            self._windows(kernels)
        else:
            self._plain()

    def _windows(self, kernels: Sequence[Array]) -> None:
        """Write a convolution for each window, and their sum."""
        shape, total = self._linear.kernel_shape, ""
        windows = windows_of(self._form, shape)
        for index, (window, kernel) in enumerate(zip(windows, kernels, strict=True)):
            attrs = cropped(self._attrs, shape, window) or {}
            attrs["group"], end = self._size, len(windows) == 1
            tensor = self._conv(self._x, kernel, attrs, end=end, bias=index == 0)
            last = index == len(windows) - 1
            total = self._op("Add", total, tensor, end=last) if total else tensor

    def _separable(self, depthwise: Array, pointwise: Array) -> None:
        """Write a sum of pairs.

        One convolution with several filters per channel would do, but onnxruntime has fast
        kernels for a single one, and fuses the Adds.
        """
        channels = len(depthwise) // self._size
        attrs, total = {**self._attrs, "group": channels}, ""
        for index in range(self._size):
            own, last = slice(index * channels, (index + 1) * channels), self._size - 1
            tensor = self._conv(self._x, depthwise[own], attrs)
            tensor = self._conv(tensor, pointwise[:, own], end=not last, bias=index == 0)
            total = self._op("Add", total, tensor, end=index == last) if total else tensor

    def _separable_twice(self, *kernels: Array) -> None:
        first = {**self._attrs, "group": len(kernels[0])}
        spans = [
            d * (k - 1)
            for d, k in zip(self._linear.dilations, self._linear.kernel_shape, strict=True)
        ]
        pads = [*(s // 2 for s in spans), *(s - s // 2 for s in spans)]
        second = {k: v for k, v in first.items() if k not in ("strides", "auto_pad")}
        tensor = self._conv(self._conv(self._x, kernels[0], first), kernels[1])
        tensor = self._conv(self._op("Relu", tensor), kernels[2], {**second, "pads": pads})
        self._conv(tensor, kernels[3], end=True)

    def _plain(self) -> None:
        """Write a pool or nothing, and the bias where it stays."""
        tensor, op = self._x, _POOLS.get(self._form, "")
        if op:
            kept = ("auto_pad", "pads", "strides")
            attrs = {k: v for k, v in self._attrs.items() if k in kept}
            attrs["kernel_shape"] = list(self._linear.kernel_shape)
            if op == "AveragePool":
                attrs["count_include_pad"] = 1
            tensor = self._op(op, tensor, end=not self._bias, **attrs)
        if self._bias and self._form != BYPASS:
            shape = (1, -1, *(1,) * len(self._linear.kernel_shape))
            value = self._draft.weights[self._bias].reshape(shape)
            self._op("Add", tensor, self._draft.add_weight(self._bias, value), end=True)
        elif not op:
            self._op("Identity", tensor, end=True)

    def _conv(
        self,
        tensor: str,
        kernel: Array,
        attrs: Mapping[str, Any] | None = None,
        *,
        end: bool = False,
        bias: bool = False,
    ) -> str:
        """Add a convolution, 1 x 1 without attributes; the node's bias goes with its end."""
        name = f"{self._weight}_{self._form}"
        names = [tensor, self._draft.add_weight(name, kernel.astype(self._dtype))]
        if self._bias and (end or bias):
            names.append(self._bias)
        kept = {"kernel_shape": list(kernel.shape[2:])} if attrs is None else attrs
        return self._op("Conv", *names, end=end, **kept)

    def _op(self, op: str, *names: str, end: bool = False, **attrs: Any) -> str:
        stem = f"{self._node}_{self._form}"
        outputs = [self._node] if end else None
        return self._draft.add_node(op, names, stem=stem, outputs=outputs, attrs=attrs)
