"""The working model: what the search measures and edits.

BatchNorm is folded, so that a kernel has the scale of its output; every linear node has a bias
of its own, so that refits can move means.  Nothing of this survives in a file: FINISH drops
biases that stayed zero and merges equal tensors again.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnxcomp.analysis import Analysis
from onnxcomp.model import Model
from onnxcomp.passes import FINISH, PREPARE
from onnxcomp.passes.base import Pass, Refusal, run_exact
from onnxcomp.passes.fold_batchnorm import FoldBatchnorm
from onnxcomp.passes.make_biases_explicit import MakeBiasesExplicit
from onnxcomp.samples import Samples


def prepare(model: Model) -> tuple[Model, list[Refusal]]:
    """Apply the exact passes that keep BatchNorm; return the model and what was refused."""
    return _run(model, PREPARE)


def finish(model: Model) -> Model:
    """Apply the exact passes that end every compression."""
    return _run(model, FINISH)[0]


def working_model(prepared: Model, samples: Samples | None, *, seed: int) -> Model:
    """Return a prepared model with BatchNorm folded and private, explicit biases."""
    folded, _ = _run(prepared, (FoldBatchnorm(), MakeBiasesExplicit()))
    facts = Analysis(folded, samples, seed=seed)
    draft = folded.edit()
    shared = False
    for linear in facts.linears.values():
        uses = folded.readers.get(linear.bias, ())
        for use in uses[1:]:
            if use.node.id in (linear.id, linear.y):
                name = draft.add_weight(linear.bias, folded.weights[linear.bias])
                draft.set_input(use.node.id, use.index, name)
                shared = True
    return draft.seal(by="working_model") if shared else folded


def _run(model: Model, passes: Sequence[Pass]) -> tuple[Model, list[Refusal]]:
    refusals: list[Refusal] = []
    for pass_ in passes:
        model, proposal = run_exact(pass_, Analysis(model))
        refusals += proposal.refusals
    return model, refusals
