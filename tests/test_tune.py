"""`tune`: a compressed model learns from its original again, and stays the same graph."""

import dataclasses
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the bridge needs PyTorch")

import torch
from onnx import TensorProto, helper, numpy_helper

import onnxcomp
from onnxcomp import Samples, TuneResult, Tuning, load, tune
from onnxcomp.errors import DataError, ParameterError, UnsupportedModelError, ValidationError
from onnxcomp.evaluate import evaluate, predict
from onnxcomp.metrics import load_metric
from onnxcomp.model import Model
from tests.analysis.channel_graphs import Graph
from tests.bridge.checks import changed
from tests.graphs import sane_feeds, shared_models
from tests.passes.joint_cases import made
from tests.search.cases import CASES, residual
from tests.search.searching import inputs

module = sys.modules["onnxcomp.tune"]  # the package's attribute is the function
QUICK: dict[str, Any] = {"blocks": "added", "epochs": 12, "batch": 8, "learning_rate": 3e-3}
GAIN = 5.0  # by which the hold-out loss of weights with 30 % noise falls at least
COUNT = 48
FIELDS = {field.name for field in dataclasses.fields(Tuning)}
RECURRENT = ("apne_gtcrn_simple", "silero_vad_16k_op15")


def noisy(model: Model, amount: float = 0.3, seed: int = 1) -> Model:
    """A model whose weights lost accuracy; zeros stay."""
    rng = np.random.default_rng(seed)

    def lost(array: np.ndarray) -> np.ndarray:
        if array.dtype.kind != "f" or array.ndim < 2:  # factors of Resize are vectors
            return array
        noise = 1 + amount * rng.standard_normal(array.shape)
        return (array * noise).astype(array.dtype)

    return Model(model.skeleton, {n: lost(a) for n, a in model.weights.items()})


def new(model: Model) -> Samples:
    """Samples that no training sees."""
    rng = np.random.default_rng(99)
    shape = model.signature.inputs[0].shape[1:]
    return Samples({"x": rng.standard_normal((32, *shape)).astype(np.float32)})


def tuned(student: Model, teacher: Model, **options: Any) -> TuneResult:
    return taught(student, teacher, inputs(teacher, COUNT), **{**QUICK, **options})


def taught(student: Model, teacher: Model, data: Any, **options: Any) -> TuneResult:
    """`tune` with the fields of `Tuning` among its arguments."""
    own = {name: options.pop(name) for name in FIELDS & options.keys()}
    return tune(student, teacher, data, Tuning(**own), **options)


def classifier(*, softmax: bool = True, seed: int = 0) -> Model:
    g = Graph(3, 8, 8, seed=seed)
    t = g.op("Relu", g.conv("x", 3, 16))
    t = g.op("Relu", g.op("Add", g.conv(t, 16, 16), t))
    t = g.op("Gemm", g.mean(t), g.w(16, 5), g.w(5))
    return g.model(g.op("Softmax", t) if softmax else t)


def stop_at(epoch: int):
    """Progress that is interrupted in an epoch."""

    def progress(label: str, share: float) -> None:
        if f"epoch {epoch} of" in label:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("name", ["residual", "weight_in_three_places", "two_heads"])
def test_lost_accuracy_comes_back_and_only_weights_change(name: str) -> None:
    teacher = CASES[name]()
    student = noisy(teacher)
    result = tuned(student, teacher)
    assert result.improved
    assert result.after is not None
    assert result.before is not None
    assert result.after < result.before / GAIN
    assert changed(student, result.model)
    shared = [n for n, _, uses in student.weight_readers() if len(uses) > 1]
    assert [n for n, _, u in result.model.weight_readers() if len(u) > 1] == shared
    unseen = new(teacher)
    before, after = (evaluate(teacher, m, unseen) for m in (student, result.model))
    assert after.relative_l2 < before.relative_l2 / np.sqrt(GAIN)


def test_a_wrong_teacher_teaches_something_else() -> None:
    """What the tests above measure is not what any training gives."""
    teacher, wrong = residual(), noisy(residual(), amount=3.0, seed=7)
    student = noisy(teacher)
    result = tuned(student, wrong)
    unseen = new(teacher)
    before, after = (evaluate(teacher, m, unseen) for m in (student, result.model))
    assert after.relative_l2 > before.relative_l2


@pytest.mark.parametrize("form", ["spatial_both", "tucker2_outer"])
def test_common_factors_recover_and_stay_common(form: str) -> None:
    found = made("residual bn", form)
    teacher, student = found.facts.model, found.model
    result = tuned(student, teacher)
    assert result.before is not None
    assert result.after is not None
    assert result.after < result.before / 2
    common = {n for n in student.weights if n.endswith("_common")}
    assert common
    assert common <= changed(student, result.model)


def test_samples_held_out_may_be_given() -> None:
    teacher = residual()
    student = noisy(teacher)
    whole = Samples(inputs(teacher, 49))
    data, held = whole.take(range(40)), whole.take(range(40, 49))
    tuning = Tuning(**QUICK)
    first, other = (
        tune(student, teacher, data, tuning, held=part) for part in (held, data.take(range(9)))
    )
    assert first.improved
    assert first.before != other.before
    assert [e.fit_loss for e in first.history] == [e.fit_loss for e in other.history]


def test_pruned_zeros_stay_zero() -> None:
    teacher = residual()
    rng = np.random.default_rng(0)
    pruned = {
        n: np.where(rng.random(a.shape) < 0.4, 0, a).astype(a.dtype) if a.ndim == 4 else a
        for n, a in teacher.weights.items()
    }
    student = Model(teacher.skeleton, pruned)
    free, kept = (tuned(student, teacher, keep_structure=keep) for keep in (False, True))
    kernels = [n for n, a in pruned.items() if a.ndim == 4]
    for result in (free, kept):
        assert result.improved
        stay = [np.all(result.model.weights[n][pruned[n] == 0] == 0) for n in kernels]
        assert all(stay) == (result is kept)
        assert not np.array_equal(result.model.weights[kernels[0]], pruned[kernels[0]])


def shown_loss(student: Model, teacher: Model) -> float:
    """The loss on the outputs as they are, of all samples."""
    samples = Samples(inputs(teacher, COUNT))
    (mine,), (its,) = (predict(m, samples).values() for m in (student, teacher))
    return float(np.mean((mine - its) ** 2) / np.var(its))


def test_the_loss_is_taken_in_front_of_softmax() -> None:
    with_, without = classifier(), classifier(softmax=False)
    first, second = (tuned(noisy(m), m) for m in (with_, without))
    assert first.before == pytest.approx(second.before, rel=1e-5)
    assert first.after == pytest.approx(second.after, rel=1e-3)
    scores, shares = shown_loss(noisy(without), without), shown_loss(noisy(with_), with_)
    assert abs(scores / shares - 1) > 0.5
    assert first.before == pytest.approx(scores, rel=0.4)  # that of a third of the samples


def test_graphs_that_end_differently_are_compared_by_their_outputs() -> None:
    student = noisy(classifier())
    proto = classifier().to_proto()
    (last,) = [n for n in proto.graph.node if n.op_type == "Softmax"]
    name = last.output[0]
    last.output[0] = "inner"
    one = numpy_helper.from_array(np.ones(1, np.float32), "one")
    proto.graph.initializer.append(one)
    proto.graph.node.append(helper.make_node("Mul", ["inner", "one"], [name]))
    teacher = Model.from_proto(proto)
    result = tuned(student, teacher)
    assert result.before == pytest.approx(shown_loss(student, teacher), rel=0.4)
    assert result.improved


def test_labels_teach_what_the_teacher_does_not_know() -> None:
    teacher = classifier()
    arrays = inputs(teacher, 96)
    means = arrays["x"][:, 0].mean(axis=(1, 2))
    labels = (means > np.median(means)).astype(int)
    data = {**arrays, "labels": labels}
    student, top1 = noisy(teacher), load_metric("top1")
    samples = Samples(arrays, labels)
    options = {**QUICK, "learning_rate": 1e-2, "epochs": 20, "blocks": "off"}
    found = [
        taught(student, teacher, data, labels=with_, **options) for with_ in (False, True)
    ]
    outputs = [predict(result.model, samples) for result in found]
    scores = [top1.score(each, samples, each) for each in outputs]
    assert scores[1] > scores[0] + 0.2
    assert found[0].model.digest == taught(student, teacher, arrays, **options).model.digest


def test_resuming_gives_the_same_as_undisturbed(tmp_path) -> None:
    teacher = residual()
    student = noisy(teacher)
    whole = tuned(student, teacher)
    cut = tuned(student, teacher, resume=tmp_path / "state", progress=stop_at(7))
    assert cut.interrupted
    assert len(cut.history) == 6
    assert cut.improved
    seen: list[float] = []
    again = tuned(
        student,
        teacher,
        resume=tmp_path / "state",
        progress=lambda _, share: seen.append(share),
    )
    assert not again.interrupted
    assert again.history == whole.history
    assert 0.5 in seen
    for name, array in whole.model.weights.items():
        np.testing.assert_allclose(again.model.weights[name], array, rtol=0, atol=1e-6)
    gaps = [np.abs(cut.model.weights[n] - a).max() for n, a in whole.model.weights.items()]
    assert max(gaps) > 1e-4
    done = tuned(student, teacher, resume=tmp_path / "state", progress=stop_at(11))
    assert done.model.digest == again.model.digest  # nothing was left to do
    other = tuned(student, teacher, resume=tmp_path / "state", seed=1)
    assert other.history != whole.history


def test_a_state_that_cannot_be_read_is_begun_anew(tmp_path, caplog) -> None:
    teacher = residual()
    student = noisy(teacher)
    options = {"resume": tmp_path / "state", "epochs": 2}
    first = tuned(student, teacher, **options)
    (entry,) = (tmp_path / "state").glob("*.entry")
    entry.write_bytes(entry.read_bytes()[:-100])
    assert tuned(student, teacher, **options).model.digest == first.model.digest
    assert "is ignored" in caplog.text


@pytest.mark.parametrize("rate", [1e-3, 30.0])
def test_it_is_never_worse(rate: float) -> None:
    """The original cannot be beaten at being itself, nor by steps that throw it away."""
    teacher = residual()
    result = tuned(teacher, teacher, learning_rate=rate, epochs=2)
    assert result.model is teacher
    assert not result.improved
    assert result.after == result.before
    assert "nothing did better on the samples held out; the model stays" in result.notes[-1]
    assert all(epoch.holdout_loss > 0 for epoch in result.history)


def test_a_loss_that_is_not_finite_ends_it() -> None:
    teacher = residual()
    student = noisy(teacher)
    result = tuned(student, teacher, learning_rate=1e30)
    assert result.model is student
    assert any("the loss became NaN or infinite" in note for note in result.notes)


def test_weights_that_fail_the_check_are_not_returned(monkeypatch) -> None:
    from onnxcomp.bridge import equality

    teacher, checks = residual(), iter((True, True, True, False))  # the last on random inputs
    student, check = noisy(teacher), equality.check_equal

    def failing_behind_training(*given: Any, **options: Any) -> Any:
        return check(*given, **options) if next(checks) else fail("'y' differs")

    def fail(message: str) -> Any:
        raise ValidationError(message)

    monkeypatch.setattr(equality, "check_equal", failing_behind_training)
    result = tuned(student, teacher)
    assert result.model is student
    assert any("failed a check ('y' differs)" in note for note in result.notes)


def test_an_interrupt_before_training_gives_the_model_back() -> None:
    def progress(label: str, share: float) -> None:
        raise KeyboardInterrupt

    teacher = residual()
    student = noisy(teacher)
    result = tuned(student, teacher, progress=progress)
    assert result.interrupted
    assert result.model is student
    assert result.before is result.after is None
    assert not result.improved


def test_the_time_limit_ends_it() -> None:
    teacher = residual()
    student = noisy(teacher)
    result = tuned(student, teacher, time_limit=0.0)
    assert result.model is student
    assert result.notes == ("the time limit was reached before training began",)
    long = tuned(student, teacher, time_limit=3.0, epochs=100_000)
    assert "the time limit was reached" in long.notes
    assert long.improved
    assert 0 < len(long.history) < 100_000


def test_half_precision_stays_half_precision() -> None:
    proto = residual().to_proto()
    for tensor in proto.graph.initializer:
        half = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    del proto.graph.value_info[:]
    teacher = Model.from_proto(proto)
    student = noisy(teacher)
    result = tuned(student, teacher)
    assert result.after is not None
    assert result.before is not None
    assert result.after < result.before / GAIN
    assert {a.dtype for a in result.model.weights.values()} == {np.dtype(np.float16)}


def test_models_that_do_not_belong_together_are_refused() -> None:
    student = residual()
    for other in (CASES["two_heads"](), classifier()):
        with pytest.raises(
            ParameterError, match=r"of the model are .*, of the teacher"
        ) as caught:
            tuned(student, other)
        for model in (student, other):
            assert any(
                f"'{v.name}'" in str(caught.value)
                for v in (*model.signature.inputs, *model.signature.outputs)
            )


def test_what_cannot_be_trained_is_refused() -> None:
    g = Graph(16, 8, 8)
    plain = g.model(g.op("GlobalAveragePool", g.op("Relu", "x")))
    with pytest.raises(UnsupportedModelError, match="no weights that can be trained"):
        tuned(plain, plain)
    g = Graph(16, 8, 8)
    t = g.conv("x", 16, 4)
    odd = g.model(g.op("Relu", g.op("MaxRoiPool", t, g.w(1, 5), pooled_shape=[2, 2])))
    with pytest.raises(UnsupportedModelError, match="MaxRoiPool"):
        tuned(odd, odd)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "'device' must be one of cpu, cuda"),
        ({"epochs": 0}, "'epochs' must be >= 1"),
        ({"threads": 0}, "'threads' must be >= 1"),
        ({"learning_rate": float("nan")}, "'learning_rate' must be > 0"),
    ],
    ids=str,
)
def test_settings_outside_their_range_are_refused(options, message) -> None:
    with pytest.raises(ParameterError, match=message):
        tuned(residual(), residual(), **options)


def test_a_missing_device_is_named(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ParameterError, match="no usable CUDA device here; use cpu"):
        tuned(residual(), residual(), device="cuda")


def test_labels_have_to_be_there_and_fit() -> None:
    teacher = classifier()
    arrays = inputs(teacher, 16)
    with pytest.raises(DataError, match="the data have no 'labels'"):
        taught(teacher, teacher, arrays, labels=True)
    with pytest.raises(DataError, match="labels go from 9 to 9; there are 5"):
        taught(teacher, teacher, {**arrays, "labels": np.full(16, 9)}, labels=True)
    maps = residual()
    data = {**inputs(maps, 16), "labels": np.zeros(16, int)}
    with pytest.raises(DataError, match="no output is class scores"):
        taught(maps, maps, data, labels=True)
    with pytest.raises(DataError, match="one sample cannot be split"):
        tune(teacher, teacher, inputs(teacher, 1))


def test_the_gate_stands_in_front(monkeypatch) -> None:
    from onnxcomp.bridge import module

    forward = module.GraphModule.forward

    def off(self, feeds, outputs=None):
        return {n: 1.001 * value for n, value in forward(self, feeds, outputs).items()}

    monkeypatch.setattr(module.GraphModule, "forward", off)
    with pytest.raises(ValidationError, match="torch is off onnxruntime by"):
        tuned(residual(), residual())


def test_threads_of_torch_are_what_they_were() -> None:
    torch.set_num_threads(2)
    try:
        tuned(residual(), residual(), epochs=1, threads=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_the_package_needs_torch_for_tuning_only() -> None:
    code = (
        "import sys, onnxcomp, onnxcomp.cli\n"
        "assert 'torch' not in sys.modules\n"
        "sys.modules['torch'] = None\n"
        "from onnxcomp.errors import ParameterError\n"
        "try:\n    onnxcomp.tune(None, None, None)\n"
        "except ParameterError as error:\n    print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "install it with: pip install 'onnxcomp[torch]'" in found.stdout


@pytest.mark.heavy
@pytest.mark.parametrize("path", shared_models(), ids=lambda path: path.stem)
def test_real_models_learn_or_stay(path) -> None:
    teacher = load(path)
    student = noisy(teacher, 0.03)
    samples = sane_feeds(teacher, 6)
    options = {"epochs": 6, "batch": 2, "learning_rate": 3e-4}
    if path.stem in RECURRENT:
        with pytest.raises(UnsupportedModelError, match="the bridge to torch cannot express"):
            taught(student, teacher, samples, **options)
        return
    result = taught(student, teacher, samples, **options)
    assert result.after is not None
    assert result.before is not None
    assert result.after <= result.before
    assert bool(changed(student, result.model)) is result.improved


def pictures(count: int) -> tuple[Model, Samples]:
    """A model of pictures of 16 by 16, and some, each of a colour that tells its label."""
    g = Graph(3, 16, 16)
    t = g.op("Relu", g.conv("x", 3, 8))
    model = g.model(g.op("Gemm", g.mean(t), g.w(8, count), g.w(count)))
    rng = np.random.default_rng(0)
    colours = np.linspace(-9, 9, count)[:, None, None, None]
    arrays = {"x": (colours + rng.standard_normal((count, 3, 16, 16))).astype(np.float32)}
    return model, Samples(arrays, np.arange(count))


def test_the_public_name_is_the_function() -> None:
    assert onnxcomp.tune is tune
    assert onnxcomp.TuneResult is TuneResult
