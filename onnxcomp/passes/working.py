"""The working model: what the search measures and edits.

BatchNorm is folded, so that a kernel has the scale of its output; every linear node has a bias
of its own, so that refits can move means.  Nothing of this survives in a file: FINISH drops
biases that stayed zero and merges equal tensors again.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.constants import Site
from onnxcomp.model import Model
from onnxcomp.passes import FINISH, PREPARE
from onnxcomp.passes.base import Refusal, run_all
from onnxcomp.passes.fold_batchnorm import FoldBatchnorm
from onnxcomp.passes.make_biases_explicit import MakeBiasesExplicit
from onnxcomp.samples import Samples


def prepare(model: Model) -> tuple[Model, list[Refusal]]:
    """Apply the exact passes that keep BatchNorm; return the model and what was refused."""
    return run_all(model, PREPARE)


def finish(model: Model) -> Model:
    """Apply the exact passes that end every compression."""
    return run_all(model, FINISH)[0]


def working_model(prepared: Model, samples: Samples | None, *, seed: int) -> Model:
    """Return a prepared model with BatchNorm folded and private, explicit biases.

    Other constants that carry different channels for different readers, such as one PRelu
    slope in two places, become private as well.
    """
    folded, _ = run_all(prepared, (FoldBatchnorm(), MakeBiasesExplicit()))
    sites = _sites_to_fork(Analysis(folded, samples, seed=seed))
    if not sites:
        return folded
    draft = folded.edit()
    for node, index in sites:
        name = folded.producers[node].inputs[index]
        draft.set_input(node, index, draft.add_weight(name, folded.weights[name]))
    return draft.seal(by="working_model")


def _sites_to_fork(facts: Analysis) -> list[Site]:
    """Return the inputs that need their own copy of the initializer they read."""
    model, linears = facts.model, facts.linears.values()
    biases: dict[str, list[Site]] = {}
    for linear in linears:
        for use in model.readers.get(linear.bias, ()):
            if use.node.id in (linear.id, linear.y):
                biases.setdefault(linear.bias, []).append((use.node.id, use.index))
    forks: dict[Site, None] = {}
    for name, sites in biases.items():
        lone = len(sites) == len(model.readers[name]) and name not in model.output_names
        forks |= dict.fromkeys(sites[1:] if lone else sites)
    first: dict[tuple[str, int], npt.NDArray[np.int64]] = {}
    several = {name for name, uses in model.readers.items() if len(uses) > 1}
    several &= model.weights.keys() - {linear.weight for linear in linears}
    for part in facts.channels.uses if several else ():
        site = (part.node, part.index)
        if site in forks or model.producers[part.node].inputs[part.index] not in several:
            continue
        labels = first.setdefault((part.tensor, part.axis), part.labels)
        if not np.array_equal(labels, part.labels):
            forks[site] = None
    return list(forks)
