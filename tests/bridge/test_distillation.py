"""The training loop by itself: its loss, its schedule, its state, and when it ends."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest

pytest.importorskip("torch", reason="the bridge needs PyTorch")

import torch
from scipy.special import log_softmax

from onnxcomp.bridge import GraphModule, to_torch
from onnxcomp.bridge import distillation as distillation_module
from onnxcomp.bridge.distillation import Distillation, State
from onnxcomp.bridge.objective import Examples, Objective, check_labels
from onnxcomp.bridge.training import Training, check_device
from onnxcomp.errors import (
    DataError,
    ParameterError,
    UnsupportedModelError,
    ValidationError,
)
from onnxcomp.evaluate import predict
from onnxcomp.model import Model
from onnxcomp.samples import Samples
from tests.analysis.channel_graphs import Graph
from tests.bridge.op_graphs import floats
from tests.bridge.test_batches import CONV, FREE, MIXED, model_of
from tests.passes.exact_checks import graph
from tests.search.searching import inputs, wide

TIGHT = 1e-5  # relative; the same sums in float32
QUICK = Training(epochs=4, batch=8, learning_rate=3e-3)


def examples(model: Model, count: int, seed: int = 0) -> Examples:
    """Samples with targets that are not what the model gives."""
    rng = np.random.default_rng(seed)
    arrays = inputs(model, count)
    labels = rng.integers(0, 16, count)
    samples = Samples({n: a[rng.permutation(count)] for n, a in arrays.items()}, labels)
    outputs = predict(model, samples)
    targets = {n: 1.5 * a + 0.1 for n, a in outputs.items()}
    return Examples(samples, {n: a.astype(np.float32) for n, a in targets.items()})


@dataclass(frozen=True)
class Fixed:
    """Examples as lessons that never vary."""

    examples: Examples

    @property
    def count(self) -> int:
        return self.examples.samples.count

    def drawn(self, index, seed) -> Samples:
        return replace(self.examples.samples.take(index), labels=np.asarray(index))

    def taught(self, samples: Samples) -> Examples:
        return self.examples.take(samples.labels.tolist())


def distillation(
    module: GraphModule,
    objective: Objective,
    fit: Examples,
    held: Examples,
    settings: Training,
) -> Distillation:
    return Distillation(module, objective, Fixed(fit), objective, held, settings)


def training(
    settings: Training = QUICK, model: Model | None = None
) -> tuple[Distillation, GraphModule]:
    model = model or wide(classes=True)
    module = to_torch(model)
    fit, held = examples(model, 20), examples(model, 8, seed=1)
    objective = Objective(model, module, fit, settings.batch, None)
    return distillation(module, objective, fit, held, settings), module


def run(found: Distillation, late=lambda: False) -> list[State]:
    """Train; return the states that were kept."""
    states: list[State] = []
    found.run(late=late, progress=lambda *_: None, save=states.append)
    return states


def after(steps: int):
    """A clock that says that it is late behind so many steps."""
    calls = itertools.count()
    return lambda: next(calls) >= steps


def test_the_loss_is_what_its_formula_says() -> None:
    model = wide(classes=True)
    module, given = to_torch(model), examples(model, 20)
    ((name, target),) = given.targets.items()
    found = predict(model, given.samples)[name].astype(np.float64)
    wanted = np.mean((found - target) ** 2) / np.var(target.astype(np.float64))
    logs, known = (log_softmax(a.astype(np.float64), axis=1) for a in (found, target))
    place = np.arange(20), given.samples.labels
    entropy = -np.mean((1 - np.exp(known[place])) * logs[place])
    for batch in (1, 7, 32):  # however the samples are cut
        plain = Objective(model, module, given, batch, None)
        labelled = Objective(model, module, given, batch, name)
        assert plain.of(module, given) == pytest.approx(wanted, rel=TIGHT)
        assert labelled.of(module, given) == pytest.approx(wanted + entropy, rel=TIGHT)
    other = given.take(range(10))
    assert plain.of(module, other) != pytest.approx(wanted, rel=1e-3)
    with pytest.raises(ValidationError, match=f"'{name}' has shape .*, the teacher's"):
        plain.of(module, Examples(given.samples, {name: target[:, :5]}))


@pytest.mark.parametrize("lines", [FREE["flat"], MIXED["halves"]], ids=["free", "mixed"])
def test_graphs_of_one_sample_have_the_same_loss_and_gradient(lines) -> None:
    """Four together where the graph takes it, else one by one: the mean of single runs."""
    model = model_of(*lines)
    module, samples = to_torch(model), Samples({"x": floats(6, 3, 6, 6)})
    target = predict(model, samples)["y"]
    given = Examples(samples, {"y": target + floats(*target.shape, seed=3)})
    objective = Objective(model, module, given, 4, None)
    scale = np.var(given.targets["y"], dtype=np.float64)
    wanted = np.mean((target - given.targets["y"]) ** 2, dtype=np.float64) / scale
    assert objective.of(module, given) == pytest.approx(wanted, rel=TIGHT)
    parts = list(objective.parts(module, given))
    assert len(parts) == (2 if lines is FREE["flat"] else 6)
    assert sum(share for share, _ in parts) == pytest.approx(1)
    assert all(loss.requires_grad for _, loss in parts)


def test_outputs_with_several_rows_per_sample_are_run_one_by_one() -> None:
    """As detectors have them; together their rows would be taken for samples."""
    lines = "t = Transpose <perm = [0, 2, 3, 1]> (h)\ny = Reshape (t, flat)"
    weights = {"w": floats(4, 3, 3, 3), "flat": np.array([-1, 4])}
    model = graph("float[1,3,6,6] x", "float[36,4] y", CONV + lines, weights)
    module, samples = to_torch(model), Samples({"x": floats(5, 3, 6, 6)})
    target = predict(model, samples)["y"]
    assert target.shape == (5, 36, 4)
    exact = Examples(samples, {"y": target})
    assert Objective(model, module, exact, 4, None).of(module, exact) < TIGHT
    wrong = Examples(samples, {"y": np.roll(target, 1, axis=0)})
    assert Objective(model, module, wrong, 4, None).of(module, wrong) > 0.1


def test_weights_of_double_precision_are_trained_as_such() -> None:
    weights = {"w": floats(8, 4).astype(np.float64)}
    model = graph("double[N,8] x", "double[N,4] y", "y = MatMul (x, w)", weights)
    module, samples = to_torch(model), Samples({"x": floats(6, 8).astype(np.float64)})
    target = 1.5 * predict(model, samples)["y"]
    given = Examples(samples, {"y": target.astype(np.float32)})
    objective = Objective(model, module, given, 2, None)
    found = distillation(module, objective, given, given, QUICK)
    run(found)
    assert found.best_loss < found.before
    assert {weight.dtype for weight in found.best or ()} == {torch.float64}


def test_labels_that_are_no_classes_are_refused() -> None:
    check_labels(np.array([0, 3]), 4)
    check_labels(np.array([[0], [3]]), 4)
    check_labels(np.eye(4)[:2], 4)
    with pytest.raises(DataError, match="labels go from 0 to 4; there are 4"):
        check_labels(np.array([0, 4]), 4)
    with pytest.raises(DataError, match="one class index per sample, or shares of 4 classes"):
        check_labels(np.zeros((2, 3)), 4)
    with pytest.raises(DataError, match="labels are float64"):
        check_labels(np.array([0.5, 1.0]), 4)


def test_the_rate_grows_and_falls() -> None:
    rates = [Training(learning_rate=2.0).rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert np.all(np.diff(rates[10:]) < 0)
    assert rates[55] == pytest.approx(1.0)
    assert 0 < rates[-1] < 0.01
    assert Training().rate(0, 1) == 1e-4


@pytest.mark.parametrize("name", ["epochs", "batch", "patience", "learning_rate"])
def test_settings_outside_their_range_are_refused(name: str) -> None:
    with pytest.raises(ParameterError, match=f"tune: '{name}' must be"):
        Training(**{name: 0})
    with pytest.raises(ParameterError, match="'device' must be one of cpu, cuda"):
        check_device("tpu")


def test_it_learns_and_keeps_the_best_average() -> None:
    found, module = training(Training(epochs=12, batch=8, learning_rate=3e-3))
    run(found)
    losses = [epoch.holdout_loss for epoch in found.history]
    assert [epoch.number for epoch in found.history] == list(range(1, 13))
    assert found.best_loss == min(losses) < 0.5 * found.before
    assert found.best is not None
    for name, value in zip(module.trained, found.best, strict=True):
        module.trained[name].data = value
    assert found.loss_of(module) == found.best_loss
    assert found.ended == ""


def test_long_passes_are_judged_on_the_way_and_may_end_within_one(monkeypatch) -> None:
    monkeypatch.setattr(distillation_module, "_LOOK_STEPS", 2)
    found, _ = training(Training(epochs=2, batch=4, learning_rate=3e-3))
    assert found.per_epoch == 5
    found.steps = 7
    run(found)
    assert [epoch.number for epoch in found.history] == [0.4, 0.8, 1.2, 1.4]
    assert found.best_loss == min(epoch.holdout_loss for epoch in found.history)
    assert found.ended == ""


@pytest.mark.parametrize("looks", [2, 256])
@pytest.mark.parametrize("steps", [0, 1, 3, 5, 12])
def test_going_on_from_a_state_gives_the_same_as_undisturbed(
    steps: int, looks: int, monkeypatch
) -> None:
    """20 samples in steps of 8 are three per epoch: the states lie within epochs too."""
    monkeypatch.setattr(distillation_module, "_LOOK_STEPS", looks)
    whole, _ = training()
    run(whole)
    cut, _ = training()
    (*_, state) = run(cut, late=after(steps))
    again, _ = training()
    again.restore(state)
    run(again)
    assert again.history == whole.history
    assert again.best_loss == whole.best_loss
    for mine, its in zip(again.best or (), whole.best or (), strict=True):
        assert torch.equal(mine, its)
    other, _ = training(Training(epochs=4, batch=8, learning_rate=3e-3, seed=1))
    run(other)
    assert other.best_loss != whole.best_loss


def test_states_are_made_seldom_and_at_the_end() -> None:
    """Behind the first step, so that a folder that is full shows, and at the end."""
    seen = []
    for save_every_s in (60.0, 0.0):
        found, _ = training()
        states: list[State] = []
        found.run(
            late=lambda: False,
            progress=lambda *_: None,
            save=states.append,
            save_every_s=save_every_s,
        )
        seen.append([state["step"] for state in states])
    assert seen == [[1, 12], [*range(1, 13), 12]]


def test_without_a_store_no_state_is_made(monkeypatch) -> None:
    monkeypatch.setattr(Distillation, "state", None)
    found, _ = training()
    found.run(late=lambda: False, progress=lambda *_: None, save=None)
    assert len(found.history) == 4


@pytest.mark.parametrize("where", ["_advance", "_close_look"])
def test_what_ends_within_a_step_leaves_the_state_before_it(where: str, monkeypatch) -> None:
    whole, _ = training()
    run(whole)
    cut, _ = training()
    method, count, states = getattr(Distillation, where), itertools.count(), []

    def broken(self: Distillation) -> bool:
        done = method(self)
        if next(count) == 1:
            raise KeyboardInterrupt
        return done

    options = {"late": lambda: False, "save": states.append, "save_every_s": 0.0}
    with monkeypatch.context() as patch:
        patch.setattr(Distillation, where, broken)
        with pytest.raises(KeyboardInterrupt):
            cut.run(progress=lambda *_: None, **options)
    again, _ = training()
    again.restore(states[-1])
    run(again)
    assert again.history == whole.history
    assert again.best_loss == whole.best_loss


def test_a_late_end_judges_what_there_is_and_keeps_it_out_of_the_state() -> None:
    found, _ = training(Training(epochs=1, batch=2, learning_rate=3e-3))
    (*_, state) = run(found, late=after(8))
    assert found.ended == "the time limit was reached"
    assert found.history == []
    assert found.best_loss < found.before == state["best_loss"]
    assert state["best"] is None


def test_what_is_not_finite_ends_it_and_the_best_stays() -> None:
    model = wide(classes=True)
    found, module = training(model=model)
    run(found, late=after(7))
    best = found.best_loss
    assert best < found.before
    next(iter(module.trained.values())).data[:] = np.inf
    run(found)
    assert "the loss became NaN or infinite" in found.ended
    assert found.best_loss == best
    assert all(torch.isfinite(weight).all() for weight in found.best or ())


def test_it_ends_where_nothing_gets_better() -> None:
    settings = Training(epochs=50, batch=8, learning_rate=1e-12, patience=3)
    model = wide(classes=True)
    module, given = to_torch(model), examples(model, 20)
    exact = Examples(given.samples, predict(model, given.samples))
    objective = Objective(model, module, exact, 8, None)
    found = distillation(module, objective, exact, exact, settings)
    run(found)
    assert found.ended == "no better hold-out loss at the last 3 looks"
    assert len(found.history) < 45  # of 50


def test_a_rate_that_harms_is_lowered_and_training_begins_again(monkeypatch) -> None:
    harmful = Training(epochs=24, batch=8, learning_rate=0.1)
    model = wide(classes=True)
    module, given = to_torch(model), examples(model, 20)
    near = {n: a + 0.05 * given.targets[n] for n, a in predict(model, given.samples).items()}
    given = Examples(given.samples, near)

    def trained() -> tuple[Distillation, GraphModule]:
        module = to_torch(model)
        objective = Objective(model, module, given, 8, None)
        return distillation(module, objective, given, given, harmful), module

    found, module = trained()
    states = run(found)
    rates = [epoch.learning_rate for epoch in found.history]
    assert found.best_loss < 0.9 * found.before
    assert max(rates[-8:]) < 0.1 / 3
    again, other = trained()
    again.restore(states[len(states) // 2])
    run(again)
    for one, same in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, same)
    monkeypatch.setattr(distillation_module, "_HARM", np.inf)
    stubborn, _ = trained()
    run(stubborn)
    assert stubborn.best_loss > found.best_loss


def test_steps_are_fitted_to_the_time_that_is_left() -> None:
    settings = replace(QUICK, epochs=10)
    short, _ = training(settings)
    short.run(late=lambda: False, progress=lambda *_: None, save=None, left=lambda: 0.0)
    assert len(short.history) == 1
    assert short.steps == short.per_epoch
    long, _ = training(settings)
    states: list[State] = []
    long.run(late=after(7), progress=lambda *_: None, save=states.append, left=lambda: 3600.0)
    assert long.steps > 10 * long.per_epoch
    again, _ = training(settings)
    again.restore(states[-1])
    assert again.steps == long.steps


def test_zeros_of_kernels_stay_and_those_of_biases_do_not() -> None:
    g = Graph(3, 8, 8)
    pruned = g.rng.standard_normal((8, 3, 3, 3)) * (g.rng.random((8, 3, 3, 3)) < 0.5)
    first = g.constant(pruned.astype(np.float32))
    bias = g.constant(np.zeros(8, np.float32))
    rare = g.rng.standard_normal((16, 8, 3, 3)).astype(np.float32)
    rare[0, 0, 0, 0] = 0.0
    last = g.constant(rare)
    t = g.op("Relu", g.op("Conv", "x", first, bias, pads=[1] * 4))
    model = g.model(g.op("Conv", t, last, pads=[1] * 4))
    for keep in (True, False):
        found, module = training(Training(epochs=2, batch=8, keep_structure=keep), model)
        run(found)
        weight = module.trained[first].detach().numpy()
        assert np.any(weight != pruned)
        assert bool(np.all(weight[pruned == 0] == 0)) is keep
        assert np.any(module.trained[bias].detach().numpy() != 0)
        assert module.trained[last].detach().numpy()[0, 0, 0, 0] != 0


def test_a_graph_without_weights_is_refused() -> None:
    g = Graph(16, 8, 8)
    model = g.model(g.op("GlobalAveragePool", g.op("Relu", "x")))
    with pytest.raises(UnsupportedModelError, match="no weights that can be trained"):
        training(model=model)
