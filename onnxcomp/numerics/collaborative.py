"""Collaborative compression: input channels and singular values of a layer in one list.

Li et al. 2021 (arXiv:2105.11228), by the rules of the authors' code.  A weight W of N outputs,
C input channels and v kernel positions, as a matrix N x C v, has C + min(N, C v) units: its
input channels and its singular values.  Replacing W by X loses, by a first-order Taylor
expansion that is squared element by element,

    L(X) = sum G (X - W)^2,    G the squared mean gradient of the loss, or its mean square.

Each layer's curve of L over the share of its cost that goes is fitted by a exp(b c)
(`sensitivity`); one slope of all curves gives every layer its share (`solve_rates`); `Removal`
then takes, round by round, the units of least L after them plus gamma times the mean of L
after one more.

Unlike the code, a round first drops its singular values, from the round's own decomposition,
then zeroes its channels; and values that a removed channel made zero are no units any more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxcomp.errors import LimitError, ParameterError
from onnxcomp.numerics.least_squares import top_eigen

Array: TypeAlias = NDArray[np.float64]
Index: TypeAlias = NDArray[np.int64]
Cost: TypeAlias = Callable[[int, int | None], float]
"""What a layer costs with so many input channels, in two parts of a rank or (None) whole."""

MOST = 0.95  # largest share of its cost that a layer loses
EXACT_UP_TO = 32  # rows or columns, where each channel's look-ahead has its own decomposition
_INTERVAL = 0.01  # share of a layer's units that go in one round
_FLOOR = 1e-10  # added to losses in front of the logarithm
_BISECTIONS = 200


class Units:
    """A layer of which some units are gone; the arrays hold the channels that stay.

    Attributes:
        channels: Numbers of the channels that stay.
        rank: Singular values that stay.
    """

    def __init__(self, weight: Array, importance: Array) -> None:
        """Begin with all units.

        Args:
            weight: W, shape (N, C, v).
            importance: G, of the same shape, not negative.
        """
        if weight.ndim != 3 or weight.shape != importance.shape:
            raise ParameterError.of(
                "Units", "importance", f"of the weight's shape {weight.shape}, (N, C, v)",
                importance.shape,
            )  # fmt: skip
        self.channels: Index = np.arange(weight.shape[1])
        self.rank = min(len(weight), weight[0].size)
        self.interval = max(1, int(_INTERVAL * (len(self.channels) + self.rank)))
        self._W = np.asarray(weight, np.float64)
        self._G = np.asarray(importance, np.float64)
        self._X = self._W
        self._lost = 0.0  # in the channels that are gone
        self._found: tuple[Array, Array] | None = None

    @property
    def loss(self) -> float:
        """L(X)."""
        return self._lost + float(np.sum(self._G * np.square(self._X - self._W)))

    def remove(self, channels: Sequence[int], components: Sequence[int]) -> None:
        """Remove singular values of X, largest first, then channels, by their places now."""
        if components:
            basis, parts = self._parts()
            gone = basis[:, components] @ parts[components]
            self._X = self._X - (gone.T if self._flipped else gone).reshape(self._X.shape)
            rest = np.delete(np.arange(self.rank), components)
            self._found = basis[:, rest], parts[rest]
            self.rank = len(rest)
        if channels:
            W, G = self._W[:, channels], self._G[:, channels]
            self._lost += float(np.sum(G * W * W))
            stay = np.delete(np.arange(len(self.channels)), channels)
            self.channels = self.channels[stay]
            self._W, self._G, self._X = (a[:, stay] for a in (self._W, self._G, self._X))
            self.rank = min(self.rank, self._X[0].size)
            self._found = None

    def scores(self, gamma: float, exact_up_to: int = EXACT_UP_TO) -> tuple[Array, Array]:
        """Return the scores Back + gamma Fwd of all channels and of all singular values.

        Back is L without the unit; Fwd the mean of L without it and without any one of the
        n - 1 others.  As these sum to twice X' = X without the unit,

            Fwd = Back - 4 / (n - 1) sum G (X' - W) X' + 1 / (n - 1) sum G (X'^2 + Q')

        with Q' the sum of the squared components of X'.  Without a channel these need a
        decomposition of their own; where the smaller side of X is above `exact_up_to`, the
        components of X stand for them with the channel's entries left out: they still sum to
        X', but are no longer orthogonal.
        """
        E, G, X = self._X - self._W, self._G, self._X
        GE, GX = G * E, G * X
        error, cross, square = (np.sum(a, axis=(0, 2)) for a in (GE * E, GE * X, GX * X))
        basis, parts = self._parts()
        with_error, with_self = (
            np.sum((basis.T @ self._flat(a)) * parts, axis=1) for a in (GE, GX)
        )
        table = (np.square(basis).T @ self._flat(G)) * np.square(parts)
        energy = np.sum(table, axis=1)
        loss, others = self._lost + error.sum(), max(len(self.channels) + self.rank - 1, 1)

        def score(back: Array, product: Array, squares: Array) -> Array:
            return np.asarray(back + gamma * (back + (squares - 4.0 * product) / others))

        back = loss - error + np.sum(G * self._W * self._W, axis=(0, 2))
        inner = self._inner(table, exact_up_to) if gamma else np.zeros_like(back)
        by_channel = score(back, cross.sum() - cross, square.sum() - square + inner)
        product = cross.sum() - with_error - with_self + energy
        squares = square.sum() - 2.0 * with_self + energy.sum()
        return by_channel, score(loss - 2.0 * with_error + energy, product, squares)

    def _inner(self, table: Array, exact_up_to: int) -> Array:
        """Return sum G Q' without each channel.

        Args:
            table: G times the squares of the components of X, summed over the flat rows.
            exact_up_to: As of `scores`.
        """
        X, G = self._X, self._G
        if min(len(X), X[0].size) > exact_up_to:
            sums = table.sum(axis=0)
            if self._flipped:
                basis, parts = self._parts()
                sums = np.sum(np.square(basis) * (self._flat(G) @ np.square(parts).T), axis=1)
            sums = sums.reshape(len(self.channels), -1).sum(axis=1)
            return np.asarray(sums.sum() - sums)
        found = np.empty(len(self.channels))
        for j in range(len(found)):
            rest, weights = (self._flat(np.delete(a, j, axis=1)) for a in (X, G))
            basis = np.linalg.eigh(rest @ rest.T)[1]
            table = np.square(basis).T @ weights
            found[j] = np.sum(table * np.square(basis.T @ rest))
        return found

    @property
    def _flipped(self) -> bool:
        """Whether X^T is decomposed instead of X, being the wider of both."""
        return bool(self._X[0].size < len(self._X))

    def _flat(self, array: Array) -> Array:
        """Return an array as the matrix that is decomposed, (n, d) with n <= d."""
        flat = array.reshape(len(array), -1)
        return flat.T if self._flipped else flat

    def _parts(self) -> tuple[Array, Array]:
        """Return U, shape (n, rank), and S V^T, shape (rank, d), of the flat X."""
        if self._found is None:
            flat = self._flat(self._X)
            basis = top_eigen(flat @ flat.T, self.rank)[1]
            self._found = basis, basis.T @ flat
        return self._found


# ------------------------------------------------------------------------- shares of layers


@dataclass(frozen=True)
class Curve:
    """Loss over the share c of a layer's cost that goes: a exp(b c), about 1 at c = 1.

    Attributes:
        log_a: Logarithm of a, which itself is too small for a float where b is large.
        b: Growth.
    """

    log_a: float
    b: float

    @property
    def start(self) -> float:
        """Logarithm of the slope at c = 0."""
        return self.log_a + math.log(self.b)

    def loss(self, rate: float) -> float:
        """Return the loss at a share."""
        return math.exp(self.log_a + self.b * rate)

    def rate(self, log_slope: float) -> float:
        """Return the share at which the curve has a slope, between 0 and `MOST`."""
        return min(max((log_slope - self.start) / self.b, 0.0), MOST)


def sensitivity(weight: Array, importance: Array, cost: Cost) -> Curve | None:
    """Return the sensitivity curve of a layer.

    All units go in the order of their loss alone; behind each round (one unit, in layers of
    200 and more about 1 %) share and loss are recorded.  Losses are divided by the largest and
    fitted by linear regression of ln(loss + 1e-10), samples weighted by sqrt(loss).

    Args:
        weight: W, shape (N, C, v).
        importance: G, of the same shape.
        cost: Cost of the layer.

    Returns:
        The curve; None where the loss does not grow with the share, as without any gradient.
    """
    units = Units(weight, importance)
    alone = np.concatenate(units.scores(0.0))
    count = weight.shape[1]
    left = list(range(len(alone) - count))  # singular values, by their first places
    order, cut = np.argsort(alone, kind="stable").tolist(), False
    whole = cost(count, None)
    points = []
    for start in range(0, len(order), units.interval):
        gone = order[start : start + units.interval]
        channels = np.flatnonzero(np.isin(units.channels, gone)).tolist()
        places = [left.index(unit - count) for unit in gone if unit >= count]
        components = [place for place in places if place < units.rank]
        units.remove(channels, components)
        cut |= bool(components)
        left = np.delete(left, places).tolist()
        now = cost(len(units.channels), units.rank if cut else None)
        points.append((1.0 - now / whole, units.loss))
    return _fitted(np.array(points))


def _fitted(points: Array) -> Curve | None:
    """Return the curve through (share, loss), of which shares above 0 count."""
    rates, losses = points[points[:, 0] > 0].T
    if not len(losses) or not losses.max() > 0:
        return None
    losses = np.clip(losses / losses.max(), 0.0, None)
    logs, weights = np.log(losses + _FLOOR), np.sqrt(losses)
    share = weights / weights.sum()
    x, y = share @ rates, share @ logs
    spread = share @ np.square(rates - x)
    if not spread > 0:
        return None
    b = float(share @ ((rates - x) * (logs - y)) / spread)
    return Curve(float(y - b * x), b) if b > 0 else None


def solve_rates(
    curves: Sequence[Curve | None],
    costs: Sequence[float],
    removed: float,
    *,
    per_cost: bool = False,
) -> tuple[float, ...]:
    """Return the share of its cost that every layer loses.

    All curves have the same slope x there, c = ln(x / (a b)) / b between 0 and 0.95, and x is
    found by bisection; the code's rule, which weights each layer's loss by its cost.

    Args:
        curves: One per layer; a layer without stays whole.
        costs: Cost F of each layer.
        removed: What the layers lose together, sum F c.
        per_cost: Slope x F instead: the sum of losses, not weighted, is least.

    Raises:
        LimitError: They cannot lose so much.
    """
    known = [i for i, curve in enumerate(curves) if curve is not None and costs[i] > 0]
    most = MOST * sum(costs[i] for i in known)
    if removed > most:
        raise LimitError(
            f"collaborative compression can remove {most:.4g} of the cost of its layers, not "
            f"the {removed:.4g} that are asked for"
        )
    shift = [math.log(cost) if per_cost and cost > 0 else 0.0 for cost in costs]

    def rates(level: float) -> tuple[float, ...]:
        return tuple(
            0.0 if curve is None else curve.rate(level + extra)
            for curve, extra in zip(curves, shift, strict=True)
        )

    ends = [(c.start - shift[i], c.b) for i in known if (c := curves[i]) is not None]
    low = min((start for start, _ in ends), default=0.0)
    high = max((start + MOST * b for start, b in ends), default=0.0)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        found = sum(c * cost for c, cost in zip(rates(middle), costs, strict=True))
        low, high = (middle, high) if found < removed else (low, middle)
    return rates(high)


# ------------------------------------------------------------------------- units that go


@dataclass(frozen=True)
class Kept:
    """What becomes of a layer.

    Attributes:
        dropped: Input channels that go, in the order in which they went.
        rank: Singular values that stay; None where the layer stays in one part.
    """

    dropped: tuple[int, ...] = ()
    rank: int | None = None


class Removal:
    """The rounds in which the units of one layer go, made as far as they are asked for.

    Args:
        weight: W, shape (N, C, v).
        importance: G, of the same shape.
        gamma: Weight of the look-ahead.
        exact_up_to: Smaller side up to which that is exact, see `Units.scores`.
    """

    def __init__(
        self,
        weight: Array,
        importance: Array,
        gamma: float,
        exact_up_to: int = EXACT_UP_TO,
    ) -> None:
        self._units = Units(weight, importance)
        self._gamma = gamma
        self._exact_up_to = exact_up_to
        self._count = weight.shape[1]
        self._states = [Kept()]

    def until(self, cost: Cost, limit: float) -> Kept:
        """Return the first state that costs at most `limit`; the last one if none does.

        Once both kinds of units went, channels alone are enough where they meet the limit.
        One channel and one singular value stay in any case.
        """
        index = 0
        while index < len(self._states) or self._advance():
            kept = self._states[index]
            for found in (Kept(kept.dropped), kept):
                if cost(self._count - len(found.dropped), found.rank) <= limit:
                    return found
            index += 1
        return self._states[-1]

    def _advance(self) -> bool:
        """Make one more round; tell whether there was anything to remove."""
        units, last = self._units, self._states[-1]
        by_channel, by_component = units.scores(self._gamma, self._exact_up_to)
        order = np.argsort(np.concatenate([by_channel, by_component]), kind="stable")
        channels: list[int] = []
        components: list[int] = []
        for unit in order.tolist():
            if len(channels) + len(components) == units.interval:
                break
            if unit >= len(by_channel):
                if len(components) < units.rank - 1:
                    components.append(unit - len(by_channel))
            elif len(channels) < len(by_channel) - 1:
                channels.append(unit)
        if not channels and not components:
            return False
        gone = tuple(units.channels[channels].tolist())
        units.remove(channels, components)
        cut = last.rank is not None or bool(components)
        self._states.append(Kept(last.dropped + gone, units.rank if cut else None))
        return True
