"""Channel groups: the classes of a finished walk, sorted by the tensors in which they lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxcomp.analysis.atoms import IntArray
from onnxcomp.analysis.channel_flow import ChannelFlow
from onnxcomp.analysis.shape_values import Axis

_MAX_REASONS = 3


@dataclass(frozen=True, eq=False)
class ChannelSlice:
    """Where the channels of a group lie on one axis of a tensor.

    Attributes:
        tensor: An activation, an initializer or a `Constant`.
        axis: The axis.
        index: Shape (size, m): row k lists the positions that belong to channel k.
    """

    tensor: str
    axis: int
    index: IntArray


@dataclass(frozen=True, eq=False)
class Reader:
    """A weighted node that takes channels of a group in, along one axis of its weight.

    Attributes:
        node: Id of the node.
        weight: Its weight.
        axis: Axis of the weight.
        index: Shape (size, m): row k lists the positions that channel k meets.
    """

    node: str
    weight: str
    axis: int
    index: IntArray


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that lie in the same tensors; any subset but all of them can be removed.

    Attributes:
        name: First output of its first producer, made unique with "#n".
        size: Number of channels.
        slices: Where they lie: activations in file order, then constants.
        producers: Ids of the weighted nodes that make them, in file order.
        readers: The weighted nodes that take them in, in file order.
        pinned: Why none of them can be removed, or None.
    """

    name: str
    size: int
    slices: tuple[ChannelSlice, ...] = field(repr=False)
    producers: tuple[str, ...]
    readers: tuple[Reader, ...] = field(repr=False)
    pinned: str | None = None


def form_groups(flow: ChannelFlow) -> tuple[tuple[ChannelGroup, ...], IntArray]:
    """Sort the classes of a finished walk into groups.

    Args:
        flow: The walk's state.

    Returns:
        The groups, and the channel number of every atom: channels are numbered through,
        group by group.
    """
    roots = flow.atoms.roots(np.arange(len(flow.atoms), dtype=np.int64))
    entries: dict[Axis, list[IntArray]] = {
        axis: [roots[ids]] for axis, ids in flow.labels.items()
    }
    for use in flow.uses:
        entries.setdefault((use.tensor, use.axis), []).append(roots[use.labels])
    by_class = [_pairs(ids) for ids in entries.values()]
    number, sizes, pins = _number(by_class, flow.atoms.reasons(), len(roots))
    starts = np.cumsum([0, *sizes])
    slices: list[list[ChannelSlice]] = [[] for _ in sizes]
    for (tensor, axis), found in entries.items():
        for group, index in _cut([number[ids] for ids in found], starts):
            slices[group].append(ChannelSlice(tensor, axis, index))
    producers: list[list[str]] = [[] for _ in sizes]
    for node, made in flow.producers.items():
        for group, _ in _cut([number[roots[flow.labels[made]]]], starts):
            producers[group].append(node)
    readers: list[list[Reader]] = [[] for _ in sizes]
    for use in flow.uses:
        for group, index in _cut([number[roots[use.labels]]], starts) if use.reads else ():
            readers[group].append(Reader(use.node, use.tensor, use.axis, index))
    names = _names([[*p, s[0].tensor][0] for p, s in zip(producers, slices, strict=True)])
    groups = tuple(
        ChannelGroup(name, size, tuple(own), tuple(makers), tuple(takers), pinned)
        for name, size, own, makers, takers, pinned in zip(
            names, sizes, slices, producers, readers, pins, strict=True
        )
    )
    return groups, number[roots]


def _pairs(ids: Sequence[IntArray]) -> IntArray:
    """Return the distinct (class, position) pairs of one axis, sorted."""
    pairs = [np.stack([one, np.arange(len(one))], axis=1) for one in ids]
    return np.unique(np.concatenate(pairs), axis=0)


def _number(
    entries: Sequence[IntArray], reasons: Mapping[int, tuple[str, ...]], count: int
) -> tuple[IntArray, list[int], list[str | None]]:
    """Number the classes through, group by group.

    Args:
        entries: (class, position) pairs of every axis.
        reasons: Why classes are pinned.
        count: Number of atoms, of which classes are some.

    Returns:
        The channel number of every class (-1 elsewhere), size and pin of every group.
    """
    places: dict[int, list[tuple[int, int]]] = {}
    for entry, pairs in enumerate(entries):
        classes, times = np.unique(pairs[:, 0], return_counts=True)
        for root, number in zip(classes.tolist(), times.tolist(), strict=True):
            places.setdefault(root, []).append((entry, number))
    members: dict[tuple[tuple[tuple[int, int], ...], tuple[str, ...]], list[int]] = {}
    for root, found in places.items():
        members.setdefault((tuple(found), reasons.get(root, ())), []).append(root)
    numbers = np.full(count, -1, np.int64)
    sizes: list[int] = []
    pins: list[str | None] = []
    for (signature, why), roots in members.items():
        first = entries[signature[0][0]]
        rows = first[np.isin(first[:, 0], roots)]
        order = rows[np.argsort(rows[:, 1], kind="stable"), 0]
        unique = list(dict.fromkeys(order.tolist()))
        numbers[unique] = np.arange(len(unique)) + sum(sizes)
        sizes.append(len(unique))
        pins.append("; ".join(why[:_MAX_REASONS]) or None)
    return numbers, sizes, pins


def _cut(ids: Sequence[IntArray], starts: IntArray) -> Iterator[tuple[int, IntArray]]:
    """Yield the groups on one axis with their positions, shape (size, m)."""
    pairs = _pairs(ids)
    edges = np.searchsorted(pairs[:, 0], starts)
    for group in np.flatnonzero(np.diff(edges)).tolist():
        rows = pairs[edges[group] : edges[group + 1], 1]
        yield group, rows.reshape(int(starts[group + 1] - starts[group]), -1)


def _names(stems: Sequence[str]) -> list[str]:
    """Tell groups with the same first producer apart."""
    seen: dict[str, int] = {}
    names = []
    for stem in stems:
        seen[stem] = seen.get(stem, 0) + 1
        names.append(stem if seen[stem] == 1 else f"{stem}#{seen[stem]}")
    return names
