"""Compressed variants of a network by random plans, and what a target predicts for them."""

from collections.abc import Iterator

import numpy as np

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.target import Target
from onnxcomp.model import Model
from onnxcomp.numerics.svd import FORMS
from onnxcomp.passes.chains import kernel_shape4
from onnxcomp.passes.channel_surgery import remove
from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.remove_channels import RemoveChannels
from onnxcomp.passes.working import finish, prepare
from tests.graphs import sane_feeds

GRIDS = ((1.0, 0.0), (0.0, 1.0), (0.7, 0.5), (0.5, 0.3))
"""Shares of the channel groups that are narrowed and of the nodes that are factorised."""


def variants(model: Model, count: int, seed: int = 0) -> Iterator[Model]:
    """The prepared model, and variants of it on the grid with random factors."""
    prepared = finish(prepare(model)[0])
    yield prepared
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        narrowed, factorised = GRIDS[index % len(GRIDS)]
        yield _factorise(_narrow(prepared, narrowed, rng), factorised, rng)


def predicted_seconds(target: Target, model: Model) -> float:
    """What a target predicts for all operators of a model, at batch 1."""
    facts = Analysis(model, sane_feeds(model, 2), seed=0)
    seconds = target.chain_seconds([linear.convolution for linear in facts.linears.values()])
    for node in model.nodes:
        if node.id not in facts.linears and node.id in facts.tensors:
            elements = np.prod(facts.tensors[node.id].shape[1:], dtype=np.int64)
            seconds += target.element_seconds(node.op, float(elements))
    return seconds


def _narrow(model: Model, share: float, rng: np.random.Generator) -> Model:
    facts = Analysis(model, sane_feeds(model, 2), seed=0)
    widths: dict[str, list[int]] = {}
    for option in RemoveChannels().propose(facts).options:
        widths.setdefault(option.target, []).append(option.size[0])
    sizes = {group.name: group.size for group in facts.channels.groups}
    removed = {}
    for name, allowed in widths.items():
        kept = [width for width in allowed if 4 * width >= sizes[name]]
        if kept and rng.random() < share:
            removed[name] = list(range(int(rng.choice(kept)), sizes[name]))
    draft = model.edit()
    remove(draft, facts.channels, removed)
    return draft.seal(by="narrow")


def _factorise(model: Model, share: float, rng: np.random.Generator) -> Model:
    facts = Analysis(model, sane_feeds(model, 2), seed=0)
    options: dict[str, list] = {}
    for option in Factorize().propose(facts).options:
        options.setdefault(option.target, []).append(option)
    chosen = {}
    for node, allowed in options.items():
        if rng.random() >= share:
            continue
        option = allowed[rng.integers(len(allowed))]
        linear = facts.linears[node]
        shape = kernel_shape4(linear, linear.out_channels, linear.in_channels)
        chosen[option] = {
            str(index): _noise(kernel[: 2 + len(linear.kernel_shape)], rng)
            for index, kernel in enumerate(FORMS[option.form].shapes(shape, option.size[0]))
        }
    draft = model.edit()
    Factorize().apply(draft, facts, chosen)
    return draft.seal(by="factorise")


def _noise(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
