"""Paired latency: the interval, the control, the protocol, and known answers."""

import gc
import json
from dataclasses import asdict, replace

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnxcomp import bench
from onnxcomp.bench import (
    Benchmark,
    Ratio,
    Timing,
    bootstrap_ratio,
    describe_machine,
    is_slower,
    paired_latency,
)
from onnxcomp.errors import ExecutionError, ParameterError
from onnxcomp.model import Model


def convolutions(count: int) -> Model:
    """A chain of equal 3x3 convolutions, so that the work is proportional to `count`."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((16, 16, 3, 3)).astype(np.float32) / 12
    nodes = [
        helper.make_node("Conv", [f"t{i}", "w"], [f"t{i + 1}"], pads=[1, 1, 1, 1])
        for i in range(count)
    ]
    shape = [1, 16, 24, 24]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("t0", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"t{count}", onnx.TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weight, "w")],
    )
    opset = [helper.make_opsetid("", 17)]
    return Model.from_proto(helper.make_model(graph, opset_imports=opset, ir_version=8))


FEEDS = {"t0": np.random.default_rng(1).standard_normal((1, 16, 24, 24)).astype(np.float32)}


def made_up(model: Ratio, control: Ratio) -> Benchmark:
    def timing(ratio: Ratio) -> Timing:
        return Timing(1.0, 1.0, ratio, ratio)

    models = (timing(Ratio(1, 1, 1)), timing(model))
    return Benchmark(models, timing(control), 20, 3, describe_machine(), ())


def test_model_against_itself_is_not_slower() -> None:
    model = convolutions(2)
    found = paired_latency([model, model], FEEDS, time_limit_s=4)
    assert not is_slower(found, 0)
    assert not is_slower(found, 1)
    assert found.models[0].ratio == Ratio(1, 1, 1)
    assert found.visits >= 20
    assert found.rounds >= 3
    for timing in (*found.models, found.control):
        assert 0 < timing.median_ms <= 2 * timing.p90_ms
        assert timing.wall_ratio.low <= timing.wall_ratio.value <= timing.wall_ratio.high
    assert 0.8 < found.control.ratio.value < 1.25


def test_four_times_the_work_is_slower() -> None:
    found = paired_latency([convolutions(2), convolutions(8)], FEEDS, time_limit_s=4)
    assert found.models[1].ratio.high < 0.6
    assert found.models[1].median_ms > found.models[0].median_ms
    assert is_slower(found, 1)
    back = paired_latency([convolutions(8), convolutions(2)], FEEDS, time_limit_s=4)
    assert back.models[1].ratio.low > 1.6
    assert not is_slower(back, 1)


@pytest.mark.parametrize(
    ("model", "control", "slower"),
    [
        (Ratio(0.95, 0.94, 0.96), Ratio(1.0, 0.99, 1.01), True),
        (Ratio(0.95, 0.91, 0.992), Ratio(1.0, 0.99, 1.01), False),
        (Ratio(1.05, 1.04, 1.06), Ratio(1.0, 0.99, 1.01), False),
        (Ratio(0.95, 0.94, 0.96), Ratio(1.0, 0.9, 1.1), False),
        # The control errs by 6 % to the fast side, so 5 % to the slow side mean nothing.
        (Ratio(0.95, 0.945, 0.955), Ratio(1.06, 1.05, 1.07), False),
    ],
)
def test_slower_means_beyond_the_control(model: Ratio, control: Ratio, slower: bool) -> None:
    assert is_slower(made_up(model, control), 1) is slower


def coverage(width: int, sigma_rounds: float) -> float:
    """Share of 200 synthetic measurements of 12 x `width` visits whose interval holds 1."""
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        means = 1 + sigma_rounds * rng.standard_normal((12, 1))
        ratio = bootstrap_ratio(
            (means + 0.02 * rng.standard_normal((12, width))).tolist(), seed=trial
        )
        hits += ratio.low <= 1 <= ratio.high
    return hits / 200


def test_interval_covers_the_truth() -> None:
    # 200 trials: the standard error of a share of 0.95 is 0.015.
    assert coverage(7, 0.0) >= 0.9
    assert coverage(7, 0.02) >= 0.87


def test_drawing_visits_alone_would_not_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bootstrap_ratio

    def one_round(rounds: list[list[float]], *, seed: int = 0) -> Ratio:
        return whole([[ratio for ratios in rounds for ratio in ratios]], seed=seed)

    monkeypatch.setitem(globals(), "bootstrap_ratio", one_round)
    assert coverage(7, 0.02) < 0.8


@given(st.lists(st.lists(st.floats(0.1, 10), min_size=1, max_size=9), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_interval_of_rounds_of_any_length(rounds: list[list[float]]) -> None:
    flat = [ratio for ratios in rounds for ratio in ratios]
    found = bootstrap_ratio(rounds)
    assert min(flat) <= found.low <= found.high <= max(flat)
    assert found.value == np.median(flat)
    assert found == bootstrap_ratio(rounds)


def test_interval_narrows_with_more_rounds() -> None:
    ratios = 1 + 0.05 * np.random.default_rng(0).standard_normal((40, 7))
    few, many = (bootstrap_ratio(ratios[:count].tolist()) for count in (4, 40))
    assert many.half_width < 0.6 * few.half_width


def test_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-ups, discarded runs, random order, fresh sessions, and no garbage collection."""
    opened: list[int] = []
    ran: list[int] = []

    class Recorder(bench.Session):
        def __init__(self, model: Model, *, threads: int = 1, spinning: bool = False) -> None:
            assert spinning  # as where a model is deployed
            super().__init__(model, threads=threads, spinning=spinning)
            self.number = len(opened)
            opened.append(threads)

        def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            assert not gc.isenabled()
            ran.append(self.number)
            return super().run(feeds)

    monkeypatch.setattr(bench, "Session", Recorder)
    monkeypatch.setattr(bench, "_MIN_TIMING_NS", 1)
    models = [convolutions(1), convolutions(1)]
    found = paired_latency(
        models, FEEDS, min_visits=6, max_visits=6, runs_per_visit=4, target_half_width=1e-9
    )
    assert (found.visits, found.rounds, opened) == (6, 3, [1] * 9)
    assert ran[:9] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    starts = [start + visit for start in (9, 48, 87) for visit in range(0, 30, 5)]
    assert all(len(set(ran[start : start + 5])) == 1 for start in starts)
    firsts = [ran[start] % 3 for start in starts]
    orders = [tuple(firsts[i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert len(set(orders)) > 2
    assert [ran.count(number) for number in range(9)] == [3 + 2 * 5] * 9
    assert gc.isenabled()
    assert any("95 % interval" in warning for warning in found.warnings)


def test_short_runs_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    entrant = bench._Entrant(convolutions(1))
    entrant.open(FEEDS, 1)
    batched = entrant.repeats
    monkeypatch.setattr(bench, "_MIN_TIMING_NS", 1)
    entrant.open(FEEDS, 1)
    assert entrant.repeats == 1 < batched


def test_time_limit_ends_it_with_a_warning() -> None:
    found = paired_latency([convolutions(1)], FEEDS, time_limit_s=1e-6)
    assert (found.visits, found.rounds) == (1, 1)
    assert any("only 1 of 20 visits" in warning for warning in found.warnings)


def test_failure_restores_garbage_collection() -> None:
    with pytest.raises(ExecutionError, match="cannot run"):
        paired_latency([convolutions(1)], {"t0": np.zeros((1, 3), np.float32)})
    assert gc.isenabled()
    gc.disable()
    try:
        paired_latency([convolutions(1)], FEEDS, max_visits=1)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_warnings_name_what_is_wrong() -> None:
    good = Timing(1.0, 1.0, Ratio(1.0, 0.999, 1.001), Ratio(1.0, 0.999, 1.001))
    assert bench._warnings((good, good), 20, 20, 0.01) == ()
    gap = replace(good, wall_ratio=Ratio(1.05, 1.04, 1.06))
    wide = replace(good, cpu_ratio=Ratio(1.0, 0.95, 1.05))
    far = replace(good, wall_ratio=Ratio(1.03, 1.03, 1.03), cpu_ratio=Ratio(1.03, 1.03, 1.03))
    assert "model 0: the ratio by wall" in bench._warnings((gap, good), 20, 20, 0.01)[0]
    assert "model 0: the 95 % interval" in bench._warnings((wide, good), 20, 20, 0.01)[0]
    assert "A/A control is 1.030" in bench._warnings((good, far), 20, 20, 0.01)[0]


def test_several_threads_have_no_cpu_ratio() -> None:
    found = paired_latency([convolutions(1)], FEEDS, threads=2, max_visits=2, time_limit_s=2)
    assert found.control.cpu_ratio is None
    assert found.control.ratio == found.control.wall_ratio
    assert found.machine.threads == 2


def test_machine_is_described() -> None:
    machine = describe_machine(threads=3)
    assert machine.cpu
    assert machine.cores >= 1
    assert (machine.threads, machine.onnxruntime) == (3, onnxruntime.__version__)
    assert json.loads(json.dumps(asdict(machine)))["cpu"] == machine.cpu


@pytest.mark.parametrize("name", ["threads", "max_visits", "min_visits", "runs_per_visit"])
def test_parameters_must_be_positive(name: str) -> None:
    with pytest.raises(ParameterError, match=name):
        paired_latency([convolutions(1)], FEEDS, **{name: 0})


def test_there_must_be_a_model() -> None:
    with pytest.raises(ParameterError, match="models"):
        paired_latency([], FEEDS)
