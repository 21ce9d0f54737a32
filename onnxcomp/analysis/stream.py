"""`Stream`: walks a model front to back over all samples, holding only the live tensors.

Search and walk visit the linear nodes in order and need, at each, its inputs for every sample.
Instead of running a prefix of the network for each node, a stream keeps the tensors that later
nodes still read, and runs the segment up to the next node from them: one forward pass in all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from onnxcomp.errors import ParameterError
from onnxcomp.model import Array, Model, Value, extract
from onnxcomp.runtime import Session, TensorFact, inner_value, last_uses, segment_ends

Feeds = Mapping[str, Array]


class Stream:
    """A forward pass over all samples that stops wherever it is asked to.

    Args:
        model: The model; nodes in topological order.
        batches: One feed per batch.
        tensors: Dtype and rank of every tensor (`capture_tensors`).
        keep: Tensors to hold to the end, besides the model's outputs.
        threads: Batches that are run at once.
    """

    def __init__(
        self,
        model: Model,
        batches: Sequence[Feeds],
        tensors: Mapping[str, TensorFact],
        *,
        keep: Iterable[str] = (),
        threads: int = 1,
    ) -> None:
        self.model = model
        self._tensors = tensors
        self._threads = threads
        self._weights: dict[str, Array] = {}
        self._position = 0
        self._held: list[dict[str, Array]] = [dict(feed) for feed in batches]
        self._order = {node.id: index for index, node in enumerate(model.nodes)}
        self._last_use = last_uses(model) | dict.fromkeys(keep, len(model.nodes))

    def set_weight(self, name: str, value: Array) -> None:
        """Let all nodes that have not run yet read another value of the same shape."""
        old = self.model.weights[name]
        if value.shape != old.shape:
            owner, allowed = "Stream.set_weight", f"of shape {old.shape}"
            raise ParameterError.of(owner, name, allowed, value.shape)
        self._weights[name] = value.astype(old.dtype)

    def advance(self, names: Iterable[str]) -> None:
        """Run on until all the tensors `names` are held.

        Raises:
            ParameterError: One of them was dropped already, as no later node reads it.
        """
        missing = [n for n in names if n not in self._held[0] and n not in self.model.weights]
        if not missing:
            return
        try:
            target = max(self._order[self.model.producers[n].id] for n in missing) + 1
        except KeyError as error:
            raise ParameterError(
                f"Stream.advance: {error} is no tensor of the model"
            ) from None
        if target <= self._position:
            raise ParameterError(f"Stream.advance: {missing} lie behind the front")
        for end in segment_ends(self.model, self._position, target):
            self._run_to(end, missing if end == target else ())

    def _run_to(self, end: int, wanted: Iterable[str]) -> None:
        """Run the nodes in front of index `end`; hold what is live there and `wanted`."""
        keep = self._live(end) | set(wanted)
        new = sorted(n for n in keep if n not in self._held[0])
        session = self.tail([], new, arena=False)
        for held, out in zip(self._held, session.run_each(self._held), strict=True):
            merged = held | out
            held.clear()
            held.update({n: merged[n] for n in keep})
        self._position = end

    def batches(self, name: str) -> list[Array]:
        """Return a held tensor, or a weight, per batch."""
        if name in self.model.weights:
            return [self._weights.get(name, self.model.weights[name])] * len(self._held)
        return [held[name] for held in self._held]

    def peek(self, name: str) -> list[Array]:
        """Return a tensor that follows from what is held, without moving on."""
        if name in self._held[0]:
            return self.batches(name)
        session = self.tail([], [name], arena=False)
        return [out[name] for out in session.run_each(self._held)]

    def depends(self, name: str) -> set[str]:
        """Return the nodes that must still run to make a tensor."""
        wanted, found = [name], set[str]()
        while wanted:
            tensor = wanted.pop()
            node = self.model.producers.get(tensor)
            if tensor in self._held[0] or node is None or node.id in found:
                continue
            found.add(node.id)
            wanted += [*node.inputs, *node.captured]
        return found

    def held(self) -> list[dict[str, Array]]:
        """Return everything held now, per batch."""
        return self._held

    def tail(
        self, free: Sequence[str], outputs: Sequence[str], *, arena: bool = True
    ) -> Session:
        """Return a session from the tensors held now to `outputs`.

        Args:
            free: Weights that become inputs, so that many values of them can be tried.
            outputs: Tensors to return.
            arena: As in `Session`.
        """
        cut = [inner_value(n, self._tensors[n]) for n in self._held[0]]
        values = [*cut, *(_exact_value(n, self.model.weights[n]) for n in free)]
        part = extract(self.model, _needed(self.model, values, outputs), outputs)
        weights = {n: self._weights.get(n, a) for n, a in part.weights.items()}
        return Session(Model(part.skeleton, weights), at_once=self._threads, arena=arena)

    def _live(self, position: int) -> set[str]:
        """Return the tensors made before `position` that are read there or later."""
        made = {n for node in self.model.nodes[:position] for n in node.outputs if n}
        made |= set(self._held[0])
        return {n for n in made if self._last_use.get(n, -1) >= position}


def _needed(model: Model, values: Sequence[Value], outputs: Sequence[str]) -> list[Value]:
    """Return those of `values` that the way to `outputs` meets first."""
    cut = {value.name for value in values}
    wanted, seen = list(outputs), set[str]()
    while wanted:
        name = wanted.pop()
        if name in seen or not name:
            continue
        seen.add(name)
        node = model.producers.get(name)
        if name not in cut and node is not None:
            wanted += [*node.inputs, *node.captured]
    return [value for value in values if value.name in seen]


def _exact_value(name: str, array: Array) -> Value:
    return Value(name, np.dtype(array.dtype), array.shape)
