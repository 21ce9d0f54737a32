"""The least sum of functions that share discrete variables, by eliminating them one by one.

A function of some variables is an array with one axis per variable.  Eliminating a variable
joins the functions that depend on it into a *clique* and leaves their least sum over it as a
message to the clique of whichever other variable of it goes next, so that a chain of layers
takes a table for every two neighbours however long it is.  What comes back from the last
clique gives every function its min-marginals: the least total with its own variables fixed.

R. Dechter, Bucket elimination: a unifying framework for reasoning, Artificial Intelligence 113
(1999); the way back is that of min-sum belief propagation on the tree of cliques.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]

_MOST_AXES = 32  # as many as any NumPy allows


class MinSum:
    """An order in which to eliminate the variables of functions with given scopes.

    Attributes:
        size: Values of all cliques together, to which memory and time are in proportion;
            infinite where a clique has too many variables for an array.
    """

    def __init__(self, domains: Sequence[int], scopes: Sequence[Sequence[int]]) -> None:
        """Choose the order: always the variable with the smallest clique.

        Args:
            domains: Number of values of every variable.
            scopes: Distinct variables of every function, in the order of its axes.
        """
        self._domains, self._scopes = list(domains), [tuple(scope) for scope in scopes]
        neighbours: dict[int, set[int]] = {v: set() for v in range(len(domains))}
        for scope in self._scopes:
            for variable in scope:
                neighbours[variable] |= set(scope) - {variable}
        self._cliques: list[tuple[int, ...]] = []  # the eliminated variable comes last
        place = {}
        while neighbours:
            variable = min(neighbours, key=lambda v: self._size((v, *neighbours[v])))
            beside = neighbours.pop(variable)
            place[variable] = len(self._cliques)
            self._cliques.append((*sorted(beside), variable))
            for other in beside:
                neighbours[other] |= beside - {other}
                neighbours[other].discard(variable)
        first = [min((place[v] for v in scope), default=-1) for scope in self._scopes]
        self._functions = [
            [f for f, clique in enumerate(first) if clique == c]
            for c in range(len(self._cliques))
        ]
        self._constants = [f for f, clique in enumerate(first) if clique < 0]
        self._parents = [
            min((place[v] for v in clique[:-1]), default=-1) for clique in self._cliques
        ]
        widest = max(map(len, self._cliques), default=0)
        sizes = map(self._size, self._cliques)
        self.size = float(sum(sizes)) if widest <= _MOST_AXES else inf

    def minimum(self, functions: Sequence[Array]) -> tuple[float, tuple[int, ...]]:
        """Return the least sum and values of the variables that have it; inf if every sum is.

        Args:
            functions: One array per scope; inf marks what is impossible.
        """
        joined, messages = self._forwards(functions)
        values = [0] * len(self._domains)
        for clique, total in zip(self._cliques[::-1], joined[::-1], strict=True):
            own = total[tuple(values[v] for v in clique[:-1])]
            values[clique[-1]] = int(np.argmin(own))
        return self._least(functions, messages), tuple(values)

    def marginals(self, functions: Sequence[Array]) -> list[Array]:
        """Return for every function the least sum at each of its own values, in its shape."""
        joined, messages = self._forwards(functions)
        least = self._least(functions, messages)
        found = [np.full_like(function, least) for function in functions]
        for index in range(len(self._cliques) - 1, -1, -1):
            clique, parent = self._cliques[index], self._parents[index]
            outside = np.asarray(least)
            if parent >= 0:
                outside = self._onto(joined[parent], self._cliques[parent], clique[:-1])
            with np.errstate(invalid="ignore"):  # what is impossible within stays so
                outside = np.where(
                    np.isfinite(messages[index]), outside - messages[index], 0.0
                )
            joined[index] = joined[index] + outside[..., None]
            for f in self._functions[index]:
                found[f] = self._onto(joined[index], clique, self._scopes[f])
        return found

    def _size(self, variables: Sequence[int]) -> int:
        return prod(self._domains[v] for v in variables)

    def _forwards(self, functions: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """Return the sum in every clique of what has reached it, and its message."""
        joined = [np.zeros([self._domains[v] for v in c]) for c in self._cliques]
        messages = []
        for index, clique in enumerate(self._cliques):
            for f in self._functions[index]:
                joined[index] += _spread(functions[f], self._scopes[f], clique)
            message = joined[index].min(axis=-1)
            messages.append(message)
            if (parent := self._parents[index]) >= 0:
                joined[parent] += _spread(message, clique[:-1], self._cliques[parent])
        return joined, messages

    def _least(self, functions: Sequence[Array], messages: Sequence[Array]) -> float:
        ends = zip(messages, self._parents, strict=True)
        apart = sum(float(functions[f]) for f in self._constants)
        return apart + sum(float(message) for message, parent in ends if parent < 0)

    @staticmethod
    def _onto(values: Array, clique: Sequence[int], scope: Sequence[int]) -> Array:
        """Return the least values over all variables but those of a scope."""
        left = [v for v in clique if v in scope]
        least = values.min(axis=tuple(i for i, v in enumerate(clique) if v not in scope))
        return np.asarray(least.transpose([left.index(v) for v in scope]))


def _spread(function: Array, scope: Sequence[int], clique: Sequence[int]) -> Array:
    """Return a function with the axes of a clique, of length one where it has none."""
    order = sorted(range(len(scope)), key=lambda axis: clique.index(scope[axis]))
    sizes = dict(zip(scope, function.shape, strict=True))
    return function.transpose(order).reshape([sizes.get(v, 1) for v in clique])
