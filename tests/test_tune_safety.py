"""`tune` where something fails or memory is short, and what it says of weights it leaves."""

import sys

import numpy as np
import pytest

pytest.importorskip("torch", reason="the bridge needs PyTorch")

import torch
from onnx import helper, numpy_helper

from onnxcomp import teaching
from onnxcomp.analysis import Analysis
from onnxcomp.bridge import GraphModule, equality
from onnxcomp.bridge.distillation import Distillation
from onnxcomp.bridge.objective import Examples
from onnxcomp.bridge.processes import Processes
from onnxcomp.bridge.training import activations, rows_within, single_precision
from onnxcomp.errors import DataError, UnsupportedModelError, ValidationError
from onnxcomp.model import Model
from onnxcomp.samples import Samples
from onnxcomp.teaching import Teacher
from tests.analysis.channel_graphs import Graph
from tests.search.cases import residual
from tests.search.searching import inputs
from tests.test_tune import noisy, tuned

module = sys.modules["onnxcomp.tune"]  # the package's attribute is the function
CLOSE = 1e-4  # relative; the same sums in another order, through 24 steps


def fail_at(monkeypatch, step: int, error: Exception) -> None:
    """Let the training step of this number fail, counted over all phases."""
    advance, steps = Distillation._advance, iter(range(10**6))

    def failing(self: Distillation) -> bool:
        if next(steps) == step:
            raise error
        return advance(self)

    monkeypatch.setattr(Distillation, "_advance", failing)


@pytest.mark.parametrize("blocks", ["off", "first"])
@pytest.mark.parametrize(
    "error",
    [RuntimeError("can't allocate\nmemory"), MemoryError(), DataError("odd")],
    ids=repr,
)
def test_an_error_in_a_step_leaves_what_was_learnt(error, blocks: str, monkeypatch) -> None:
    teacher = residual()
    student = noisy(teacher)
    fail_at(monkeypatch, 38, error)
    result = tuned(student, teacher, blocks=blocks)
    assert result.improved
    assert not result.interrupted
    assert {epoch.phase for epoch in result.history} == (
        {"outputs"} if blocks == "off" else {"blocks", "outputs"}
    )
    reason = str(error).split("\n")[0] or "MemoryError"
    assert f"training failed ({reason}); this is the best so far" in result.notes


def test_an_error_in_the_first_step_leaves_the_model(monkeypatch) -> None:
    teacher = residual()
    student = noisy(teacher)
    fail_at(monkeypatch, 0, RuntimeError("no kernel image"))
    result = tuned(student, teacher)
    assert result.model is student
    assert any("no kernel image" in note for note in result.notes)


def test_an_error_in_front_of_training_is_raised(monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise DataError("teacher: 'y' is NaN")

    monkeypatch.setattr(Teacher, "values", fail)
    with pytest.raises(DataError, match="teacher: 'y' is NaN"):
        tuned(residual(), residual())


def test_one_of_several_processes_does_not_end_alone(monkeypatch) -> None:
    """The others would wait for its part of the next sum."""

    class Both(Processes):
        total = Processes().total
        add = Processes().add
        from_first = Processes().from_first

    teacher = residual()
    held = Samples(inputs(teacher, 8))
    run = module._Run(noisy(teacher), teacher, held, held, module.Tuning(), Both(0, 2))
    fail_at(monkeypatch, 0, RuntimeError("no kernel image"))
    with pytest.raises(RuntimeError, match="no kernel image"):
        run.result(None, module.Deadline(None), lambda *_: None)


@pytest.mark.parametrize("kind", ["user", "random"])
def test_samples_and_random_inputs_stand_in_front(kind: str, monkeypatch) -> None:
    check, seen = equality.check_equal, []

    def failing(module: GraphModule, model: Model, samples: Samples, **options: float):
        seen.append(samples.origin)
        if samples.origin == kind:
            raise ValidationError("torch is off onnxruntime")
        return check(module, model, samples, **options)

    monkeypatch.setattr(equality, "check_equal", failing)
    with pytest.raises(ValidationError, match="off onnxruntime"):
        tuned(residual(), residual())
    assert seen == ["user", "random"][: ["user", "random"].index(kind) + 1]


def test_what_does_not_run_on_random_inputs_is_tuned(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise UnsupportedModelError("the model does not run on random inputs")

    monkeypatch.setattr(equality, "random_inputs", refuse)
    teacher = residual()
    assert tuned(noisy(teacher), teacher, epochs=4).improved


def test_cuda_multiplies_in_single_precision() -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn

    def allowed() -> tuple[bool, bool]:
        return matmul.allow_tf32, cudnn.allow_tf32

    seen, before = set(), allowed()
    tuned(residual(), residual(), epochs=1, progress=lambda *_: seen.add(allowed()))
    assert seen == {(False, False)}
    assert allowed() == before
    matmul.allow_tf32 = True
    try:
        with pytest.raises(RuntimeError), single_precision():
            raise RuntimeError
        assert allowed() == (True, before[1])
    finally:
        matmul.allow_tf32 = before[0]


def test_rows_are_what_memory_holds() -> None:
    facts = Analysis(residual())
    elements = 64 * (8 + 16 * 2 + 2 * (12 * 2 + 16 * 3) + 4)
    assert activations(facts) == elements
    each = 3 * 4 * elements
    assert [rows_within(m, facts) for m in (0, 5.5 * each, 64 * each)] == [1, 5, 64]


@pytest.mark.parametrize("blocks", ["off", "first"])
def test_little_memory_gives_the_same(blocks: str, monkeypatch) -> None:
    teacher = residual()
    student = noisy(teacher)
    options = {"blocks": blocks, "epochs": 4}
    whole = tuned(student, teacher, **options)
    forward, rows = GraphModule.forward, []

    def counting(self: GraphModule, feeds, outputs=None):
        if torch.is_grad_enabled():
            rows.append(len(feeds["x"]))
        return forward(self, feeds, outputs)

    monkeypatch.setattr(GraphModule, "forward", counting)
    memory = 3.5 * 3 * 4 * activations(Analysis(student))
    found = tuned(student, teacher, memory=memory, **options)
    assert max(rows) == 3
    losses, wanted = ([e.holdout_loss for e in r.history] for r in (found, whole))
    assert losses == pytest.approx(wanted, rel=CLOSE)
    tuned(student, teacher, **options)
    assert max(rows) == 8  # the batch


@pytest.mark.parametrize(("blocks", "most"), [("auto", 16), ("off", 0)])
def test_ends_of_blocks_are_kept_of_few_samples(blocks: str, most: int, monkeypatch) -> None:
    values, seen = Teacher.values, [0]

    def counting(self: Teacher, samples: Samples, *, ends: bool, **options: object):
        if ends:
            seen.append(samples.count)
        return values(self, samples, ends=ends, **options)

    monkeypatch.setattr(Teacher, "values", counting)
    teacher = residual()
    data = Samples(inputs(teacher, 200))
    module.tune(noisy(teacher), teacher, data, module.Tuning(epochs=1, batch=8, blocks=blocks))
    assert max(seen) == most
    tuned(noisy(teacher, 0.01), teacher, blocks="auto", epochs=1)  # outputs decide
    assert max(seen) == most


@pytest.mark.parametrize("count", [7, 8, 2])
def test_processes_share_the_hold_out(count: int, monkeypatch) -> None:
    """All of it once, and with as many looks at the clock, at which they meet."""
    monkeypatch.setattr(teaching, "_AT_ONCE", 2)
    teacher = residual()
    held = Samples(inputs(teacher, count))
    found, looks = [], []
    for rank in range(3):
        run = module._Run.__new__(module._Run)
        run._held, run._processes = held, Processes(rank, 3)
        few = held.take([0, 1])
        run._teacher = Teacher(teacher, teacher, few, threads=1, batch=4)
        seen: list[float] = []
        part, share = run._my_held(seen.append)
        looks.append(seen)
        assert part.samples.count == max(round(share * count), 1)
        if share:
            found.append(part)
    assert looks[0] == looks[1] == looks[2]
    assert sum(part.samples.count for part in found) == count
    rows = {x.tobytes() for part in found for x in part.samples.arrays["x"]}
    assert rows == {x.tobytes() for x in held.arrays["x"]}
    whole = run._teacher.values(held, ends=False)
    for name, array in whole.items():
        given = np.concatenate([part.targets[name] for part in found])
        assert np.sort(given.ravel()) == pytest.approx(np.sort(array.ravel()), rel=1e-4)
    assert isinstance(found[0], Examples)


def test_weights_that_nodes_make_are_named() -> None:
    g = Graph(3, 8, 8)
    t = g.conv(g.op("Relu", g.conv("x", 3, 4)), 4, 4)
    proto = g.model(t).to_proto()
    for tensor in [w for w in proto.graph.initializer if len(w.dims) == 4][:1]:
        made = helper.make_node("Constant", [], [tensor.name], value=tensor)
        proto.graph.node.insert(0, made)
        proto.graph.initializer.remove(tensor)
    teacher = Model.from_proto(proto)
    (name,) = [node.id for node in teacher.nodes if node.op == "Constant"]
    notes = tuned(teacher, teacher, blocks="off", epochs=1).notes
    remedy = "`onnxcomp compress --force` without limits folds"
    wanted = f"not trained: weight '{name}', as a Constant node makes it, which {remedy}"
    assert wanted in notes
    whole = residual()
    assert not any("not trained" in n for n in tuned(whole, whole, epochs=1).notes)


def test_a_model_of_integers_has_nothing_to_train() -> None:
    """Though its blocks have ends, which are looked at first."""
    proto = residual().to_proto()
    scale = numpy_helper.from_array(np.float32(0.05), "scale")
    for tensor in list(proto.graph.initializer):
        array = np.rint(numpy_helper.to_array(tensor) / 0.05).clip(-127, 127).astype(np.int8)
        tensor.CopyFrom(numpy_helper.from_array(array, f"{tensor.name}_q"))
        names = ([tensor.name, "scale"], [tensor.name.removesuffix("_q")])
        proto.graph.node.insert(0, helper.make_node("DequantizeLinear", *names))
    proto.graph.initializer.append(scale)
    model = Model.from_proto(proto)
    with pytest.raises(UnsupportedModelError, match="no weights that can be trained"):
        tuned(model, model, blocks="auto")
