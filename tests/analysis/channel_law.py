"""The law of channel removal: it equals zeroing the channels in the weights that read them."""

from collections.abc import Mapping, Sequence

import numpy as np

from onnxcomp.analysis.channels import Channels, find_channels
from onnxcomp.analysis.cost import is_parameter
from onnxcomp.model import Array, Model
from onnxcomp.passes.channel_surgery import parameters_after, remove
from onnxcomp.runtime import Session, capture_tensors, with_outputs

TOLERANCE = 1e-5  # relative L2 per output: float32, summed in another order
Removed = Mapping[str, Sequence[int]]


def analyse(model: Model, feeds: Mapping[str, Array]) -> Channels:
    return find_channels(model, capture_tensors(model, feeds))


def free_groups(channels: Channels) -> list[str]:
    return [g.name for g in channels.groups if g.pinned is None and g.size > 1]


def draw(channels: Channels, names: Sequence[str], seed: int) -> dict[str, list[int]]:
    """A random proper, non-empty subset of each group's channels."""
    rng = np.random.default_rng(seed)
    drawn = {}
    for name in names:
        size = channels.group(name).size
        count = int(rng.integers(1, size))
        drawn[name] = sorted(rng.choice(size, count, replace=False).tolist())
    return drawn


def removed_from(model: Model, channels: Channels, removed: Removed) -> Model:
    draft = model.edit()
    remove(draft, channels, removed)
    return draft.seal(by="test")


def zeroed(model: Model, channels: Channels, removed: Removed) -> Model:
    """The original with the removed channels zeroed in all weights that read them."""
    arrays: dict[str, Array] = {}
    sites: dict[str, set[tuple[str, int]]] = {}
    for name, indices in removed.items():
        for reader in channels.group(name).readers:
            array = arrays.setdefault(
                reader.weight, channels.constants.array(reader.weight).copy()
            )
            np.moveaxis(array, reader.axis, 0)[reader.index[list(indices)].ravel()] = 0
            sites.setdefault(reader.weight, set()).update(
                channels.constants.sites(reader.weight)
            )
    draft = model.edit()
    for weight, array in arrays.items():
        if weight in draft.weights:
            draft.set_weight(weight, array)
        else:
            fork = draft.add_weight(weight, array)
            for node, index in sorted(sites[weight]):
                draft.set_input(node, index, fork)
    return draft.seal(by="test")


def difference(one: Model, other: Model, feeds: Mapping[str, Array]) -> float:
    """The largest relative L2 difference over all outputs.

    Compared in front of a last Sigmoid: onnxruntime rounds it to 1e-7 absolutely, which is
    much where detectors return values around 1e-6.
    """
    left = Session(_before_sigmoid(one), optimize=False).run(feeds)
    right = Session(_before_sigmoid(other), optimize=False).run(feeds)
    assert left.keys() == right.keys()
    worst = 0.0
    for name, expected in right.items():
        assert left[name].shape == expected.shape
        gap = np.linalg.norm(left[name].astype(np.float64) - expected.astype(np.float64))
        worst = max(worst, float(gap / (np.linalg.norm(expected.astype(np.float64)) + 1e-12)))
    return worst


def _before_sigmoid(model: Model) -> Model:
    makers = {name: model.producers.get(name) for name in sorted(model.output_names)}
    names = [
        n.input(0) if n is not None and n.op == "Sigmoid" else k for k, n in makers.items()
    ]
    return with_outputs(model, names)


def parameters(model: Model) -> int:
    return sum(array.size for array in model.weights.values() if is_parameter(array))


def obeys(
    model: Model, channels: Channels, removed: Removed, feeds: Sequence[Mapping[str, Array]]
) -> Model:
    """Assert the law, the signature and the predicted parameters; return the new model."""
    small = removed_from(model, channels, removed)
    assert small.signature == model.signature
    assert parameters(small) == parameters_after(channels, removed)
    made = any(channels.group(name).producers for name in removed)
    assert parameters(small) < parameters(model) or not made
    reference = zeroed(model, channels, removed)
    for feed in feeds:
        assert difference(small, reference, feed) <= TOLERANCE, removed
    return small


def obeys_everywhere(
    model: Model, feeds: Sequence[Mapping[str, Array]], *, seeds: int = 2, alone: int = 10**6
) -> Channels:
    """Assert the law for random subsets: `alone` groups one by one, then all at once."""
    channels = analyse(model, feeds[0])
    free = free_groups(channels)
    assert free, [(g.name, g.pinned) for g in channels.groups]
    rng = np.random.default_rng(seeds)
    chosen = [free[i] for i in sorted(rng.permutation(len(free))[:alone])]
    for seed in range(seeds):
        for name in chosen if len(free) > 1 else []:
            obeys(model, channels, draw(channels, [name], seed), feeds)
        obeys(model, channels, draw(channels, free, seed), feeds)
    return channels
