"""`GraphModule`: an ONNX graph as a torch module, run node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from onnxcomp.bridge.plan import (
    KERNEL_ERRORS,
    BatchNorm,
    Place,
    Plan,
    Step,
    make_plan,
    named,
    reason_of,
)
from onnxcomp.errors import ParameterError, UnsupportedModelError
from onnxcomp.model import Model

Schedule = tuple[tuple[Step, tuple[str, ...]], ...]
"""Steps in order, each with the tensors that nothing reads after it."""


class GraphModule(nn.Module):
    """An ONNX graph that can be trained; `to_torch` makes it.

    Every initializer that a layer learns is one Parameter, however many nodes read it.  The
    module holds no names of the graph as attributes: `weights` maps them to its tensors.

    Attributes:
        input_names: Names of the graph's inputs.
        output_names: Names of its outputs.
        untrained: Why a layer's weight is no Parameter, by the weight's name.
        one_sample: Whether the graph was written for one sample.  More can be given then:
            constants of reshaping follow as far as that goes, which `takes_batches` tells.
        batchnorm: "frozen": BatchNormalization uses its statistics always; "trainable": in
            training mode those of the batch, of which it keeps the running mean.
        dropout: Whether Dropout drops in training mode.
    """

    def __init__(self, plan: Plan, *, batchnorm: BatchNorm, dropout: bool) -> None:
        super().__init__()
        self.input_names = plan.inputs
        self.output_names = plan.outputs
        self.untrained = plan.untrained
        self.one_sample = plan.one_sample
        self.batchnorm = batchnorm
        self.dropout = dropout
        self._steps = plan.steps
        self._host = plan.host
        self._producers = {
            name: index
            for index, step in enumerate(plan.steps)
            for name in step.outputs
            if name
        }
        self._schedules: dict[tuple[frozenset[str], tuple[str, ...]], Schedule] = {}
        self._keys: dict[str, str] = {}
        for index, (name, value) in enumerate(plan.trained.items()):
            self._keys[name] = f"weight{index}"
            self.register_parameter(self._keys[name], nn.Parameter(value))
        for index, (name, value) in enumerate(plan.kept.items()):
            self._keys[name] = f"constant{index}"
            self.register_buffer(self._keys[name], value)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The graph's constants by their names, initializers above all.

        Parameters and buffers as they are, not copied; what is only read on the CPU too.
        """
        return self._host | {name: getattr(self, key) for name, key in self._keys.items()}

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The Parameters by the names of their initializers."""
        return {n: w for n, w in self.weights.items() if isinstance(w, nn.Parameter)}

    @property
    def device(self) -> torch.device:
        """Where its Parameters and constants are; the CPU where it has none."""
        return next(chain(self.parameters(), self.buffers()), torch.empty(0)).device

    @property
    def notes(self) -> list[str]:
        """A note on weights that layers read and that are no Parameters, if there are any."""
        if not self.untrained:
            return []
        name, reason = next(iter(self.untrained.items()))
        others = f" and {len(self.untrained) - 1} more" * (len(self.untrained) > 1)
        return [f"not trained: weight '{name}'{others}, as {reason}"]

    def forward(
        self, feeds: Mapping[str, Tensor], outputs: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Run the graph, or the part of it between given tensors.

        Args:
            feeds: Tensors by name: the graph's inputs, or inner tensors to go on from, on the
                module's device.  Half precision becomes float32.
            outputs: Names of the tensors to return, inner ones too; the graph's outputs if
                None.

        Returns:
            The tensors by name, in the order asked for.

        Raises:
            ParameterError: A tensor is unknown, or an input is missing.
            UnsupportedModelError: Torch fails on these values, or runs out of memory; the
                message names the node.
        """
        wanted = self.output_names if outputs is None else tuple(outputs)
        schedule = self._schedule(frozenset(feeds), wanted)
        device = next(iter(feeds.values())).device if feeds else torch.device("cpu")
        state = self._state(feeds)
        values: dict[str, Tensor] = {n: getattr(self, key) for n, key in self._keys.items()}
        values |= {name: _at_least_single(value) for name, value in feeds.items()}
        host = dict(self._host)

        def read(name: str, place: Place) -> Tensor | None:
            if not name:
                return None
            if place is Place.DEVICE:
                return values[name]
            return host[name] if place is Place.HOST else host[name].to(device)

        for step, done in schedule:
            keywords = {} if step.wants is None else {step.wants: state[step.wants]}
            try:
                result = step.kernel(*(read(*source) for source in step.inputs), **keywords)
            except KERNEL_ERRORS as error:
                raise UnsupportedModelError(
                    f"torch fails in node '{step.id}': {reason_of(error)}"
                ) from error
            (host if step.host else values).update(named(step.outputs, result))
            for name in done:
                del values[name]
        return {n: values[n] if n in values else host[n].to(device) for n in wanted}

    def _state(self, feeds: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return what kernels may ask for."""
        batch = None
        if self.one_sample:
            first = next((feeds[name] for name in self.input_names if name in feeds), None)
            first = next(iter(feeds.values())) if first is None else first
            batch = first.shape[0] if first.dim() and first.shape[0] != 1 else None
        return {
            "batch": batch,
            "batchnorm": self.training and self.batchnorm == "trainable",
            "dropout": self.training and self.dropout,
        }

    def _schedule(self, given: frozenset[str], wanted: tuple[str, ...]) -> Schedule:
        """Return the steps that lead from given tensors to wanted ones."""
        key = (given, wanted)
        if key not in self._schedules:
            self._schedules[key] = self._make_schedule(given, wanted)
        return self._schedules[key]

    def _make_schedule(self, given: frozenset[str], wanted: tuple[str, ...]) -> Schedule:
        known = given | self._keys.keys() | self._host.keys()
        for name in given:
            index = self._producers.get(name)
            if name not in self.input_names and index is None:
                raise ParameterError(f"GraphModule: the graph has no tensor '{name}' to feed")
            if index is not None and self._steps[index].host:
                raise ParameterError(f"GraphModule: '{name}' follows from shapes; feed others")
        missing: list[str] = []
        needed: set[int] = set()
        pending = list(wanted)
        while pending:
            name = pending.pop()
            if not name or name in known:
                continue
            if name not in self._producers:
                missing.append(name)
            elif (index := self._producers[name]) not in needed:
                needed.add(index)
                pending += [source for source, _ in self._steps[index].inputs]
        if missing:
            raise ParameterError(
                f"GraphModule: '{missing[0]}' is not given and nothing makes it; feed "
                + ", ".join(self.input_names)
            )
        steps = [_without(self._steps[index], given) for index in sorted(needed)]
        return _with_ends(steps, given, frozenset(wanted))


def _without(step: Step, given: frozenset[str]) -> Step:
    """Return a step that does not make what is given."""
    outputs = tuple("" if name in given else name for name in step.outputs)
    return replace(step, outputs=outputs)


def _with_ends(
    steps: Sequence[Step], given: frozenset[str], wanted: frozenset[str]
) -> Schedule:
    """Return the steps with the tensors that can be let go after each."""
    last: dict[str, int] = {}
    for index, step in enumerate(steps):
        if not step.host:
            last.update((name, index) for name in step.outputs if name)
        last.update((n, index) for n, place in step.inputs if n in last or n in given)
    ends: list[list[str]] = [[] for _ in steps]
    for name, index in last.items():
        if name not in wanted:
            ends[index].append(name)
    return tuple(zip(steps, map(tuple, ends), strict=True))


def _at_least_single(value: Tensor) -> Tensor:
    half = value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def to_torch(
    model: Model, *, batchnorm: BatchNorm = "frozen", dropout: bool = False
) -> GraphModule:
    """Return a model as a torch module in evaluation mode, on the CPU.

    Half-precision weights become float32, in which everything is computed.

    Args:
        model: The model; its weights are copied.
        batchnorm: Whether statistics of BatchNormalization stay, or follow the batches in
            training mode.
        dropout: Whether Dropout drops in training mode.

    Raises:
        UnsupportedModelError: Nodes cannot be expressed; the message lists them all.
    """
    if batchnorm not in ("frozen", "trainable"):
        raise ParameterError.choice(
            "to_torch", "batchnorm", ("frozen", "trainable"), batchnorm
        )
    plan = make_plan(model, batchnorm=batchnorm)
    return GraphModule(plan, batchnorm=batchnorm, dropout=dropout).eval()
