"""All exact passes, one after the other, on every real model."""

import onnx
import pytest

from onnxcomp.analysis import Analysis
from onnxcomp.model import Model
from onnxcomp.passes.base import run_exact
from onnxcomp.passes.fold_batchnorm import FoldBatchnorm
from onnxcomp.passes.fold_constants import FoldConstants
from onnxcomp.passes.make_biases_explicit import MakeBiasesExplicit
from onnxcomp.passes.merge_initializers import MergeInitializers
from onnxcomp.passes.remove_dead import RemoveDead
from onnxcomp.passes.remove_identities import RemoveIdentities
from tests.graphs import SHARED, sane_feeds, shared_models
from tests.passes.exact_checks import TOLERANCE, drift, inner_drift, is_sorted, ops, run

CHAIN = (
    FoldConstants(),
    RemoveIdentities(),
    MergeInitializers(),
    RemoveDead(),
    FoldBatchnorm(),
)


def read(path) -> Model:
    return Model.from_proto(onnx.load(path))


@pytest.mark.parametrize("path", shared_models(), ids=lambda path: path.stem)
def test_the_chain_is_exact_and_complete_on_real_models(path):
    model = read(path)
    feeds = next(iter(sane_feeds(model).batches(model.signature.inputs, 1))).feed
    after = model
    for pass_ in CHAIN:
        before = after
        after, _ = run(pass_, before)
        assert after.file_bytes <= before.file_bytes
        assert is_sorted(after)
    assert drift(model, after, feeds) <= TOLERANCE
    assert inner_drift(model, after, feeds) <= TOLERANCE
    for pass_ in CHAIN:
        assert pass_.propose(Analysis(after)).options == ()
    biased, _ = run(MakeBiasesExplicit(), after)
    assert drift(model, biased, feeds) <= TOLERANCE
    back, _ = run(RemoveIdentities(), biased)
    assert sorted(ops(back)) == sorted(ops(after))
    assert len(back.weights) == len(after.weights)


def resnet20() -> Model:
    path = SHARED / "models" / "akamaster_cifar10_resnet20.onnx"
    if not path.exists():
        pytest.skip("../shared is absent")
    return read(path)


def test_the_check_fails_where_one_folded_bias_is_off():
    model = resnet20()
    after = model
    for pass_ in CHAIN:
        after, _ = run_exact(pass_, Analysis(after))
    bias = after.nodes[0].inputs[2]
    draft = after.edit()
    draft.set_weight(bias, after.weights[bias] * 1.001)
    wrong = draft.seal(by="test")
    feeds = next(iter(sane_feeds(model).batches(model.signature.inputs, 1))).feed
    assert drift(model, after, feeds) <= TOLERANCE < drift(model, wrong, feeds)
    assert inner_drift(model, wrong, feeds) > TOLERANCE


def test_a_resnet_ends_without_constants_and_batchnorms():
    after = resnet20()
    for pass_ in CHAIN:
        after, _ = run_exact(pass_, Analysis(after))
    kinds = {"Conv", "Relu", "Add", "Slice", "Pad", "AveragePool", "Flatten", "Gemm"}
    assert set(ops(after)) == kinds
