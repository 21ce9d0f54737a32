"""Plans of operators: as files, and written into the model that they are for."""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from onnxcomp.analysis import Analysis
from onnxcomp.errors import DataError, ParameterError
from onnxcomp.model import Model
from onnxcomp.passes import NODE_PASSES
from onnxcomp.passes.base import Option
from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.operator_plan import OperatorPlan, load_plan, replay, working_graph
from onnxcomp.passes.substitute_operators import SubstituteOperators
from tests.analysis.channel_graphs import Graph
from tests.graphs import sane_feeds
from tests.passes.exact_checks import drift

SUBSTITUTE, LOW_RANK = SubstituteOperators.name, Factorize.name


def network() -> Model:
    g = Graph(3, 8, 8)
    t = g.op("Relu", g.bn(g.conv("x", 3, 8), 8))
    for _ in range(3):
        t = g.op("Relu", g.bn(g.conv(t, 8, 8), 8))
    return g.model(g.op("Gemm", g.mean(t), g.w(8, 5), g.w(5)))


@pytest.fixture(scope="module")
def plan() -> OperatorPlan:
    """An operator, a chain of low rank, one without weights, and other weights."""
    facts = Analysis(working_graph(network()))
    _, second, third, fourth, last = facts.linears.values()
    kinds = (
        Option(SUBSTITUTE, second.id, "separable", (2,)),
        Option(LOW_RANK, third.id, "tucker2", (4,)),
        Option(SUBSTITUTE, fourth.id, "skip"),
    )
    arrays = {fourth.id: {}}
    for option in kinds[:2]:
        linear = facts.linears[option.target]
        kernel = linear.kernel(facts.model.weights[linear.weight])
        found, _ = NODE_PASSES[option.method].fit(option, kernel, None)
        arrays[option.target] = {key: array.astype("f4") for key, array in found.items()}
    changed = (second.bias, last.weight)
    weights = {name: facts.model.weights[name] + np.float32(0.1) for name in changed}
    return OperatorPlan({option.target: option for option in kinds}, arrays, weights)


@pytest.fixture
def file(plan, tmp_path):
    plan.save(tmp_path / "plan.npz")
    return tmp_path / "plan.npz"


def written(plan: OperatorPlan) -> Model:
    """The plan by its passes, without the module."""
    facts = Analysis(working_graph(network()))
    draft = facts.model.edit()
    for name, array in plan.weights.items():
        draft.set_weight(name, array)
    for node, option in plan.options.items():
        NODE_PASSES[option.method].apply(draft, facts, {option: plan.arrays[node]})
    return draft.seal(by="test")


def test_a_file_makes_the_same_model(plan, file):
    read = load_plan(file)
    assert read.options == plan.options
    made, again = replay(network(), plan), replay(network(), read)
    feeds = next(sane_feeds(network()).batches(network().signature.inputs, 3)).feed
    assert drift(made, again, feeds) == 0
    assert drift(written(plan), made, feeds) <= 1e-6
    assert drift(network(), made, feeds) > 1e-2
    assert made.signature == network().signature
    assert drift(replay(network(), replace(plan, weights={})), made, feeds) > 1e-3


def test_half_precision_is_kept(plan, tmp_path):
    """NumPy has no bfloat16 in files; float32 holds all of its values."""
    wide = {name: array.astype(ml_dtypes.bfloat16) for name, array in plan.weights.items()}
    half = {name: array.astype(np.float16) for name, array in plan.weights.items()}
    for weights, dtype in ((wide, np.float32), (half, np.float16)):
        replace(plan, weights=weights).save(tmp_path / "plan.npz")
        for name, array in load_plan(tmp_path / "plan.npz").weights.items():
            assert array.dtype == dtype
            np.testing.assert_array_equal(array, weights[name].astype(np.float32))


def test_the_plan_can_be_read_without_onnxcomp(plan, file):
    with np.load(file, allow_pickle=False) as stored:
        text = stored["plan"].tobytes().decode()
        content = json.loads(text)
        assert stored[content["operators"][0]["kernels"]["0"]].shape == (16, 1, 3, 3)
    assert '"form": "separable"' in text
    assert [o["node"] for o in content["operators"]] == list(plan.options)
    assert list(content["weights"]) == list(plan.weights)


def rewritten(file, change, **arrays) -> None:
    """Change the content of a file's plan, and add entries."""
    with np.load(file) as found:
        stored = dict(found)
    content = json.loads(stored["plan"].tobytes())
    change(content)
    stored["plan"] = np.frombuffer(json.dumps(content).encode(), np.uint8)
    np.savez(file, **{**stored, **arrays})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(kind="recipe"), "'kind' must be"),
        (lambda c: c.update(schema_version=2), "'schema_version' must be 1"),
        (lambda c: c.update(notes=""), "'notes' is not known"),
        (lambda c: c.pop("weights"), "'weights' is missing"),
        (lambda c: c["operators"][0].update(method="prune_weights"), r"\[0\].method' must be"),
        (lambda c: c["operators"][1].update(form="bypass"), r"\[1\].form' must be"),
        (lambda c: c["operators"][0].update(size=[0]), r"\[0\].size' must be"),
        (
            lambda c: c["operators"].append(c["operators"][0]),
            r"\[3\].node' must be named once",
        ),
        (lambda c: c["operators"][0]["kernels"].update({"0": "array99"}), "an entry of the"),
        (lambda c: c["weights"].update(w="plan"), "with finite floats"),
        (lambda c: c["weights"].update(w="broken"), "with finite floats"),
    ],
)
def test_wrong_plans_are_refused(change, message, file):
    rewritten(file, change, broken=np.float32([np.nan]))
    with pytest.raises(ParameterError, match=message):
        load_plan(file)


def test_files_that_hold_no_plan_are_refused(file, tmp_path):
    np.savez(file, x=np.zeros(3))
    with pytest.raises(DataError, match="no plan of operators"):
        load_plan(file)
    np.savez(file, plan=np.frombuffer(b"{", np.uint8))
    with pytest.raises(DataError, match="is no JSON"):
        load_plan(file)
    np.savez(file, plan=np.frombuffer(b"[]", np.uint8))
    with pytest.raises(ParameterError, match="a JSON object"):
        load_plan(file)
    np.savez(file, plan=np.array([{}], object), allow_pickle=True)
    with pytest.raises(DataError, match="object"):
        load_plan(file)
    file.write_bytes(b"plan")
    with pytest.raises(DataError, match=r"not a sound \.npz"):
        load_plan(file)
    with pytest.raises(DataError, match="cannot be read"):
        load_plan(tmp_path / "absent.npz")


def test_plans_of_other_models_are_refused(plan):
    with pytest.raises(ParameterError, match="no weight 'other'"):
        replay(network(), replace(plan, weights={"other": np.zeros(3, np.float32)}))
    name = next(iter(plan.weights))
    with pytest.raises(ParameterError, match=f"no weight '{name}'"):
        replay(network(), replace(plan, weights={name: np.zeros(3, np.float32)}))
    separable, low_rank, _ = plan.options.values()
    first, *_, last = Analysis(working_graph(network())).linears
    for option in (
        replace(separable, target="other"),
        replace(separable, target=last),
        replace(separable, size=()),
        replace(low_rank, size=(8, 8)),
        replace(low_rank, size=(99,)),
        Option(SUBSTITUTE, first, "skip"),
    ):
        arrays = {option.target: plan.arrays[separable.target]}
        with pytest.raises(ParameterError, match="can become"):
            replay(network(), OperatorPlan({option.target: option}, arrays, {}))
    kernels = {"0": plan.arrays[separable.target]["0"], "2": np.zeros((8, 16, 1, 1), "f4")}
    first_kernel = plan.arrays[separable.target]["0"]
    turned = {**plan.arrays[separable.target], "0": first_kernel.swapaxes(0, 1)}  # as large
    for wrong in (kernels, {"0": kernels["0"]}, turned):
        arrays = {separable.target: wrong}
        with pytest.raises(ParameterError, match="do not fit"):
            replay(network(), OperatorPlan({separable.target: separable}, arrays, {}))
