"""Few values per node, per channel or for all, and zeros that stay."""

import numpy as np
import pytest

from onnxcomp.analysis import Analysis
from onnxcomp.errors import ParameterError
from onnxcomp.model import Model
from onnxcomp.numerics.quantizers import QUANTIZERS
from onnxcomp.passes.share_weights import SCOPES, ShareWeights
from tests.graphs import sane_feeds
from tests.passes.test_contract import GRAPHS

LEVELS = 8


def shared(name: str, pass_: ShareWeights) -> tuple[Analysis, Model]:
    """A graph, half of whose weights are zero, after a pass with the first option of each."""
    model = GRAPHS[name]()
    half = {
        n: a * (np.arange(a.size).reshape(a.shape) % 2).astype(a.dtype) if a.ndim > 1 else a
        for n, a in model.weights.items()
    }
    model = Model(model.skeleton, half)
    facts = Analysis(model, sane_feeds(model, 2))
    chosen = {}
    for option in pass_.propose(facts).options:
        kernels = {
            linear.id: linear.kernel(model.weights[linear.weight])
            for linear in pass_.members(facts)[option.target]
        }
        chosen[option] = pass_.fit(option, kernels)
    draft = model.edit()
    pass_.apply(draft, facts, chosen)
    return facts, draft.seal(by="test")


def kernels(facts: Analysis, model: Model) -> list[np.ndarray]:
    own = [x for x in facts.linears.values() if len(model.readers[x.weight]) == 1]
    return [linear.kernel(model.weights[linear.weight]) for linear in own]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("name", ["residual", "dense", "transposed", "depthwise"])
def test_few_values_and_the_same_zeros(name, quantizer):
    facts, found = shared(name, ShareWeights((quantizer,), (LEVELS,)))
    for before, after in zip(kernels(facts, facts.model), kernels(facts, found), strict=True):
        assert len(np.unique(after[before != 0])) <= LEVELS
        assert (after[before == 0] == 0).all()
        assert not np.signbit(after[after == 0]).any()
        if before.size > 20 * LEVELS and quantizer == "cws":
            assert np.var(after - before) < 0.1 * np.var(before)
            assert np.abs(after - before).max() > 0


def test_scopes():
    def values(scope: str) -> tuple[int, int, int]:
        facts, found = shared("residual", ShareWeights(("cws",), (LEVELS,), scope))
        each = kernels(facts, found)
        together = np.unique(np.concatenate([k.ravel() for k in each if k.ndim == 4]))
        per_channel = max(len(np.unique(row)) for k in each for row in k)
        return max(len(np.unique(k)) for k in each), per_channel, len(together)

    node, per_channel, together = values("node")
    assert node == per_channel == LEVELS + 1
    assert together > LEVELS + 1
    node, per_channel, _ = values("channel")
    assert per_channel <= LEVELS + 1 < node
    assert values("unified")[2] <= LEVELS + 1
    assert set(SCOPES) == {"node", "channel", "unified"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"quantizers": ("kmeans",)}, "quantizers"),
        ({"levels": (1,)}, "levels"),
        ({"scope": "everything"}, "scope"),
    ],
)
def test_wrong_parameters_are_named(fields, named):
    with pytest.raises(ParameterError, match=named):
        ShareWeights(**fields)
