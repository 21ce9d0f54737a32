"""The joint benchmarks: every form reaches a factor, and variants share what they say."""

import numpy as np
import onnx
import pytest

import onnxcomp
from benchmarks import joint, joint_runtime
from onnxcomp.analysis import Analysis
from onnxcomp.analysis.target import TARGETS
from onnxcomp.model import Model
from onnxcomp.numerics.joint_svd import JOINT_FORMS
from onnxcomp.passes.factorize_jointly import FactorizeJointly
from onnxcomp.passes.working import prepare, working_model
from onnxcomp.runtime import Session
from onnxcomp.search.space import Space
from tests.graphs import sane_feeds
from tests.passes.joint_cases import residual

FORMS = (*joint.OWN, *JOINT_FORMS)


@pytest.fixture(scope="module")
def space() -> Space:
    model = residual()
    work = working_model(prepare(model)[0], None, seed=0)
    facts = Analysis(work, sane_feeds(model, 2))
    target = TARGETS["x86-avx512"]
    pass_ = FactorizeJointly(("output_basis_last",), target=target, step=1, slower=True)
    return Space(facts, [pass_.propose(facts)], target)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reaches_a_factor_and_no_larger_share_does(space, form) -> None:
    whole = space.facts.cost.params
    share, plan = joint._at_factor(space, form, 1.5)
    assert plan.cost.params <= whole / 1.5
    assert any((o.form == form) for o in plan.forms.values())
    if share < 1:
        further = joint._plan(space, form, share + 1 / joint._SHARES)
        assert further.cost.params > whole / 1.5


def test_common_factors_allow_larger_ranks_than_own_ones(space) -> None:
    own, _ = joint._at_factor(space, "spatial", 1.5)
    common, _ = joint._at_factor(space, "spatial_first", 1.5)
    assert common > own


def test_a_factor_out_of_reach_is_said(space) -> None:
    with pytest.raises(ValueError, match="cannot divide"):
        joint._at_factor(space, "spatial", 1000)


def test_variants_share_what_they_say(tmp_path) -> None:
    stack = tmp_path / "stack.onnx"
    onnx.save(joint_runtime.build(3, 8, 5, seed=0), stack)
    files = {v: str(tmp_path / f"{v}.onnx") for v in ("whole", *joint_runtime.VARIANTS)}
    joint_runtime.make(source=str(stack), files=files)
    models = {variant: onnxcomp.load(file) for variant, file in files.items()}
    readers = {
        variant: max(len(model.readers[name]) for name in model.weights)
        for variant, model in models.items()
    }
    assert readers["whole"] == readers["output_basis"] == 1
    assert readers["output_basis_first"] == readers["output_basis_last"] == 3
    feed = {"x": np.random.default_rng(0).standard_normal((1, 8, 5, 5)).astype(np.float32)}
    outputs = {v: next(iter(Session(m).run(feed).values())) for v, m in models.items()}
    for found in outputs.values():
        assert found.shape == outputs["whole"].shape
        assert np.isfinite(found).all()


def test_the_stack_is_what_its_name_says() -> None:
    model = Model.from_proto(joint_runtime.build(2, 4, 3, seed=0))
    assert [node.op for node in model.nodes] == ["Conv", "Relu", "Add"] * 2
    assert {a.shape for a in model.weights.values()} == {(4, 4, 3, 3), (4,)}
