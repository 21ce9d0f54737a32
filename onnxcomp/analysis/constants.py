"""Which tensors of a model are constant, where their values lie, and who reads them."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from onnxcomp.model import Array, Model

_RANDOM = ("Random", "Multinomial", "Bernoulli")
_VALUES = ("value", "value_int", "value_ints", "value_float", "value_floats")
Site = tuple[str, int]


class Constants:
    """The constants of a model: initializers, `Constant` nodes, and what follows from them.

    Args:
        model: The model.
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    @cached_property
    def names(self) -> frozenset[str]:
        """All tensors that do not depend on a graph input."""
        found = set(self.model.initializer_names)
        for node in self.model.nodes:
            known = all(name in found for name in (*node.inputs, *node.captured) if name)
            if known and not node.op.startswith(_RANDOM):
                found.update(name for name in node.outputs if name)
        return frozenset(found)

    @cached_property
    def _arrays(self) -> dict[str, Array]:
        arrays = dict(self.model.weights)
        for node in self.model.nodes:
            if node.op == "Constant":
                value = next((node.attrs[key] for key in _VALUES if key in node.attrs), None)
                if value is not None:
                    arrays[node.id] = np.asarray(value)
        return arrays

    @cached_property
    def _sites(self) -> dict[str, list[Site]]:
        sites: dict[str, list[Site]] = {}
        for node in self.model.nodes:
            for index, name in enumerate(node.inputs):
                origin = self.origin(name)
                if origin is not None and node.op != "Identity":
                    sites.setdefault(origin, []).append((node.id, index))
        return sites

    def origin(self, name: str) -> str | None:
        """Return the initializer or `Constant` that a tensor is, seen through `Identity`."""
        producer = self.model.producers.get(name)
        while producer is not None and producer.op == "Identity":
            name = producer.input(0)
            producer = self.model.producers.get(name)
        return name if name in self._arrays else None

    def array(self, origin: str) -> Array:
        """Return the value of an initializer or `Constant`."""
        return self._arrays[origin]

    def sites(self, origin: str) -> list[Site]:
        """Return all (node, input index) that read it, also through `Identity`."""
        return self._sites.get(origin, [])

    def exposed(self, origin: str) -> str | None:
        """Return why a constant must keep its shape as a whole, or None."""
        for name in (origin, *self._aliases.get(origin, ())):
            if name in self.model.output_names:
                return f"'{origin}' is a graph output"
            if any(use.index < 0 for use in self.model.readers.get(name, ())):
                return f"'{origin}' is read in a subgraph"
        return None

    @cached_property
    def _aliases(self) -> dict[str, list[str]]:
        aliases: dict[str, list[str]] = {}
        for node in self.model.nodes:
            origin = self.origin(node.id) if node.op == "Identity" else None
            if origin is not None:
                aliases.setdefault(origin, []).append(node.id)
        return aliases
