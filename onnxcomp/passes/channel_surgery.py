"""Removes channels from a draft: slices constants and keeps numbers in the graph in step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxcomp.analysis.channel_flow import Count, Remap
from onnxcomp.analysis.channels import Channels, Removed
from onnxcomp.analysis.constants import Site
from onnxcomp.analysis.cost import is_parameter
from onnxcomp.draft import Draft
from onnxcomp.errors import ParameterError
from onnxcomp.model import Array, Node

Keep = NDArray[np.bool_]
Cuts = tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Variant:
    """A constant as some of its readers will see it.

    Attributes:
        tensor: The constant as it is.
        sites: (node, input) of the readers that see this variant.
        cuts: (axis, positions that stay) for each axis that shrinks; () for the whole.
    """

    tensor: str
    sites: tuple[Site, ...]
    cuts: Cuts

    def apply(self, array: Array) -> Array:
        """Return the part of the constant that stays."""
        for axis, positions in self.cuts:
            array = np.take(array, positions, axis=axis)
        return array


def remove(draft: Draft, channels: Channels, removed: Removed) -> None:
    """Remove channels from all weights, constants and numbers of a draft.

    The draft must come from `channels.model`; values of weights may have changed in it, but
    neither their shapes nor their readers.

    Args:
        draft: The draft.
        channels: The channels of the model it was made from.
        removed: Channels to remove of each group, by its name.

    Raises:
        ParameterError: A group is unknown, pinned or would be emptied, a channel does not
            exist, or a weight of the draft has another shape than in the model.
    """
    keep = channels.keeping(removed)
    for tensor, variants in _by_tensor(channels, keep):
        _slice(draft, channels, tensor, variants)
    nodes = {node.id: node for node in channels.model.nodes}
    counts: dict[tuple[str, int | str], list[Count]] = {}
    for fix in channels.fixes:
        if isinstance(fix, Remap):
            _remap(draft, channels, nodes[fix.node], fix, keep)
        else:
            counts.setdefault((fix.node, fix.where), []).append(fix)
    for (node, where), found in counts.items():
        _recount(draft, channels, nodes[node], where, found, keep)


def parameters_after(channels: Channels, removed: Removed) -> int:
    """Return the number of parameters that a model keeps after `remove`.

    Args:
        channels: The channels of the model.
        removed: Channels to remove of each group, by its name.

    Returns:
        Elements of all float initializers that are read, forks included.

    Raises:
        ParameterError: As for `remove`.
    """
    keep = channels.keeping(removed)
    model = channels.model
    total = 0
    cut = dict(_by_tensor(channels, keep))
    for name, array in model.weights.items():
        if (
            is_parameter(array)
            and name not in cut
            and (name in model.readers or name in model.output_names)
        ):
            total += array.size
    for tensor, variants in cut.items():
        array = channels.constants.array(tensor)
        if is_parameter(array):
            stays = tensor in model.weights
            for variant in variants:
                if stays or variant.cuts:
                    sizes = list(array.shape)
                    for axis, positions in variant.cuts:
                        sizes[axis] = len(positions)
                    total += int(np.prod(sizes, dtype=np.int64))
    return total


def _by_tensor(channels: Channels, keep: Keep) -> Iterator[tuple[str, list[Variant]]]:
    """Yield every constant that changes, with its variants; the one that keeps the name first.

    Readers that need different parts of a constant get a variant each.  The whole keeps the
    name where somebody reads it, because graph outputs and subgraphs may do so, too.
    """
    cuts: dict[str, dict[Site, dict[int, tuple[int, ...]]]] = {}
    for use in channels.uses:
        sites = cuts.setdefault(use.tensor, {})
        axes = sites.setdefault((use.node, use.index), {})
        kept = np.flatnonzero(keep[use.labels])
        if len(kept) < len(use.labels):
            axes[use.axis] = tuple(kept.tolist())
    for tensor, per_site in cuts.items():
        if not any(per_site.values()):
            continue
        readers: dict[Cuts, list[Site]] = {}
        for site in channels.constants.sites(tensor):
            key = tuple(sorted(per_site.get(site, {}).items()))
            readers.setdefault(key, []).append(site)
        order = sorted(readers, key=lambda key: (key != (), -len(readers[key])))
        yield tensor, [Variant(tensor, tuple(readers[key]), key) for key in order]


def _slice(draft: Draft, channels: Channels, tensor: str, variants: list[Variant]) -> None:
    """Write the variants of a constant; those behind the first become forks of it."""
    origin = channels.constants.array(tensor)
    initial = tensor in draft.weights
    array = draft.weights[tensor] if initial else origin
    if array.shape != origin.shape:
        raise ParameterError(
            f"'{tensor}' has shape {array.shape} in the draft, {origin.shape} in the model; "
            "remove channels before changing shapes"
        )
    first, *forks = variants
    if initial and first.cuts:
        draft.set_weight(tensor, first.apply(array))
    for variant in forks if initial else variants:
        if variant.cuts:
            name = draft.add_weight(tensor, variant.apply(array))
            for node, index in variant.sites:
                draft.set_input(node, index, name)


def _remap(draft: Draft, channels: Channels, node: Node, fix: Remap, keep: Keep) -> None:
    """Let the indices of a Gather point at the positions that stay."""
    stays = keep[channels.labels[fix.tensor, fix.axis]]
    if stays.all():
        return
    old = channels.values[node.input(fix.index)]
    position = np.cumsum(stays) - 1
    new = position[old[stays[old]]].astype(old.dtype)
    _rewrite(draft, channels, node, fix.index, old, new)


def _recount(
    draft: Draft,
    channels: Channels,
    node: Node,
    where: int | str,
    counts: Sequence[Count],
    keep: Keep,
) -> None:
    """Write the numbers of one vector that count channels."""
    numbers: dict[int, int] = {}
    changed = False  # also by what goes outside [low, high): numbers may count from the end
    for count in counts:
        stays = keep[channels.labels[count.tensor, count.axis]]
        numbers[count.element] = int(stays[count.low : count.high].sum()) // count.per
        changed |= not stays.all()
    if not changed:
        return
    if isinstance(where, str):
        present = node.attrs.get(where, (0,) * len(numbers))
        if isinstance(present, int):
            draft.set_attributes(node.id, {where: numbers[0]})
        else:
            vector = [numbers.get(i, int(v)) for i, v in enumerate(present)]
            draft.set_attributes(node.id, {where: vector})
        return
    name = node.input(where)
    old = channels.values[name] if name else np.zeros(len(numbers), np.int64)
    new = old.copy()
    for element, number in numbers.items():
        new.reshape(-1)[element] = number
    _rewrite(draft, channels, node, where, old, new)
    if node.op == "Split":
        draft.set_attributes(node.id, {"num_outputs": None})


def _rewrite(
    draft: Draft, channels: Channels, node: Node, index: int, old: Array, new: Array
) -> None:
    """Let an input read new numbers instead of old ones.

    What is computed from shapes of the input partly stays so: constant differences are added.
    """
    name = node.input(index)
    lone = channels.constants.sites(name) == [(node.id, index)]
    if name in draft.weights and lone and channels.constants.exposed(name) is None:
        draft.set_weight(name, new)
        draft.set_input(node.id, index, name)  # declared shapes behind the node are void now
        return
    stem = f"{node.id}_{node.op.lower()}"
    if not name or name in channels.constants.names:
        other = draft.add_weight(stem, new)
    else:
        delta = draft.add_weight(f"{stem}_change", new - old)
        other = draft.add_node("Add", [name, delta], stem=stem)
    draft.set_input(node.id, index, other)
