"""Few values per weight: files within limits, losses as small as they can be, nothing else."""

from dataclasses import replace

import numpy as np
import pytest

from onnxcomp import codec, load
from onnxcomp.analysis import Analysis
from onnxcomp.deadline import TimeLimitReached
from onnxcomp.errors import ParameterError
from onnxcomp.model import Model
from onnxcomp.numerics.rounding import Rounded
from onnxcomp.search import storage
from onnxcomp.search.outputs import OutputError, raw_runs
from onnxcomp.search.run import Result, compress
from onnxcomp.search.settings import Limits, Settings
from onnxcomp.search.storage import Curves, Storage, in_form, written_bytes
from tests.search.cases import CASES
from tests.search.searching import inputs, wide

QUICK = Settings(latency=False, grid="8", methods=("share_weights",), emit="onnxc")


def run(model: Model, settings: Settings = QUICK, **limits: float) -> Result:
    return compress(model, inputs(model, 64), limits=Limits(**limits), settings=settings)


def feeds(model: Model, count: int = 64) -> list[dict[str, np.ndarray]]:
    return [inputs(model, count)]


def output_change(
    original: Model, model: Model, batches: list[dict[str, np.ndarray]], *, threads: int
) -> float:
    reference, found = (list(raw_runs(m, batches, threads=threads)) for m in (original, model))
    return OutputError(reference).of(found)


def make(model: Model, **options: object) -> Storage:
    given = {
        "exclude": None,
        "trained": False,
        "data_aware": True,
        "seed": 0,
        "threads": 1,
        "progress": lambda *_: None,
    }
    return Storage(model, None, feeds(model), 1, **{**given, **options})


def values(model: Model) -> dict[str, int]:
    """Number of distinct values of every weight of a linear node, largest first."""
    linears = Analysis(model).linears.values()
    return {n.weight: len(np.unique(model.weights[n.weight])) for n in linears}


def test_the_packed_file_is_within_the_limit_and_nearly_uses_it_up(tmp_path):
    model = wide()
    changes = []
    for limit in (0.2, 0.08):
        result = run(model, size=limit)
        assert result.met
        size = codec.pack(result.model, tmp_path / "a.onnxc")
        assert result.report.result.file_bytes == size
        assert 0.9 * limit <= size / model.file_bytes <= limit
        assert codec.unpack(tmp_path / "a.onnxc").digest == result.model.digest
        assert all(count <= 256 for count in values(result.model).values())
        changes.append(output_change(model, result.model, feeds(model), threads=1))
        methods = {action.method for action in result.report.actions}
        assert methods == {"share_weights"}
        assert len(result.report.actions) == len(values(model))
    assert changes == sorted(changes)
    assert changes[0] < 0.02


@pytest.mark.parametrize("trained", [True, False])
def test_levels_that_are_trained_still_fit(trained):
    """Levels off their grid take more bytes; without room for them the file outgrows it."""
    model, rng = wide(), np.random.default_rng(0)
    limit = 0.1 * model.file_bytes
    found = make(model, trained=trained).within(limit).model
    moved = {}
    for name, array in found.weights.items():
        levels, index = np.unique(array, return_inverse=True)
        if array.ndim > 1 and array.dtype == np.float32:
            off = levels * rng.uniform(1, 1.01, levels.shape).astype(np.float32)
            moved[name] = off[index].reshape(array.shape)
    size = codec.packed_bytes(Model(found.skeleton, {**found.weights, **moved}))
    assert (size <= limit) == trained
    assert size > 0.85 * limit


def test_it_loses_less_than_the_nearest_levels_of_one_step():
    """At equal size; the whole of what compensation, refits and allocation give."""
    model = wide()
    found = make(model).within(0.1 * model.file_bytes)
    limit, change = codec.packed_bytes(found.model), 0.0
    for step in np.geomspace(0.2, 2, 24):
        plain = {
            n: (np.rint(a / (step * a.std())) * (step * a.std()) + 0.0).astype(a.dtype)
            if a.ndim > 1
            else a
            for n, a in model.weights.items()
        }
        nearest = Model(model.skeleton, plain)
        if codec.packed_bytes(nearest) <= limit:
            change = output_change(model, nearest, feeds(model), threads=1)
            break
    assert 0 < output_change(model, found.model, feeds(model), threads=1) < 0.5 * change


@pytest.mark.parametrize("name", ["depthwise", "transposed", "fully_connected", "twins"])
def test_all_kinds_of_nodes(name):
    """Groups, transposed layouts, dense nodes, and weights that several nodes share."""
    model = CASES[name]()
    found = make(model).within(0.5 * model.file_bytes)
    counts = values(found.model)
    assert counts
    for weight, count in counts.items():
        assert count < 0.9 * found.model.weights[weight].size or count < 300
        assert not np.signbit(
            found.model.weights[weight][found.model.weights[weight] == 0]
        ).any()
    assert output_change(model, found.model, feeds(model), threads=1) < 0.1
    assert len({a.where for a in found.actions}) == len(found.actions)


def test_a_limit_that_cannot_be_met():
    """The smallest file found is kept."""
    model = wide()
    result = run(model, size=1000.0)
    assert not result.met
    assert 1000 < result.report.result.file_bytes < 0.08 * model.file_bytes


def test_excluded_nodes_keep_their_weights():
    model = wide()
    first = next(iter(Analysis(model).linears.values()))
    found = make(model, exclude=f"^{first.id}$").within(0.35 * model.file_bytes)
    assert np.array_equal(found.model.weights[first.weight], model.weights[first.weight])
    assert first.id not in {action.where for action in found.actions}
    assert len(found.actions) == len(values(model)) - 1


def test_without_the_method_or_a_limit_nothing_is_lost():
    model = wide()
    for settings, limits in (
        (QUICK, {}),
        (replace(QUICK, methods=("remove_channels",)), {"size": 1.0}),
    ):
        result = run(model, settings, **limits)
        assert output_change(model, result.model, feeds(model), threads=1) < 1e-9


def test_smaller_plans_take_part_and_the_best_is_kept(monkeypatch):
    """With a plan that loses nothing: half of the channels are copies of the others."""
    model = wide()
    seen = []
    within = Storage.within

    def watched(self, limit):
        seen.append(Analysis(self._model).cost.params)
        return within(self, limit)

    monkeypatch.setattr(Storage, "within", watched)
    settings = replace(QUICK, methods=("remove_channels", "share_weights"))
    result = run(model, settings, size=0.05)
    assert result.met
    assert len(seen) >= 2
    assert seen[1] < 0.85 * seen[0]
    alone = run(model, QUICK, size=0.05)
    error = [output_change(model, r.model, feeds(model), threads=1) for r in (result, alone)]
    assert error[0] <= 1.05 * error[1]


def test_other_limits_hold_as_well():
    model = wide()
    settings = replace(QUICK, methods=("remove_channels", "share_weights"))
    result = run(model, settings, size=0.1, macs=0.7)
    assert result.met
    assert Analysis(result.model).cost.macs <= 0.7 * Analysis(model).cost.macs
    assert result.report.result.file_bytes <= 0.1 * model.file_bytes
    methods = {action.method for action in result.report.actions}
    assert methods == {"remove_channels", "share_weights"}
    tight = run(model, QUICK, size=0.05, drift=1e-3)
    assert not tight.met  # so few bits move the outputs further


def test_a_preview_promises_the_limit():
    model = wide()
    limits = Limits(size=0.1)
    result = compress(model, inputs(model), limits=limits, settings=QUICK, dry_run=True)
    assert result.met
    assert result.report.result.file_bytes <= 0.1 * model.file_bytes
    assert any("will be rounded" in note for note in result.report.notes)


def test_codebooks_of_bytes():
    model = wide()
    result = run(model, replace(QUICK, emit="codebook"))
    assert all(count <= 256 for count in values(result.model).values())
    small = in_form(result.model, "codebook")
    assert {n.op for n in small.nodes} >= {"Gather", "Cast"}
    assert written_bytes(result.model, "codebook") == small.file_bytes
    assert result.report.result.file_bytes == small.file_bytes < 0.45 * model.file_bytes
    assert output_change(model, small, feeds(model), threads=1) < 1e-3


def test_codebooks_behind_the_fastest_plan_within_the_drift():
    """What the drift alone asks for, on few values; the preview tells of the same plan."""
    model = wide()
    settings = replace(QUICK, methods=("remove_channels", "share_weights"))
    plain = run(model, settings, drift=0.5)
    found = run(model, replace(settings, emit="codebook"), drift=0.5)
    assert found.met
    assert found.plan == plain.plan
    assert not found.plan.empty
    methods = [{action.method for action in r.report.actions} for r in (plain, found)]
    assert methods == [{"remove_channels"}, {"remove_channels", "share_weights"}]


def test_codebooks_that_break_a_limit_are_left_out():
    result = run(wide(), replace(QUICK, emit="codebook"), drift=1e-5)
    assert result.met
    assert np.max([*values(result.model).values()]) > 256
    assert any("weights of few values break a limit" in note for note in result.report.notes)
    reasons = {refusal.reason for refusal in result.report.refusals}
    assert "it has more than 256 values" in reasons


def test_limits_out_of_reach_are_told_and_weights_rounded_all_the_same():
    model = wide()
    result = run(model, size=0.2, macs=0.9)
    assert not result.met
    assert any("limit on MACs" in note for note in result.report.notes)
    assert result.report.result.file_bytes <= 0.2 * model.file_bytes


def test_the_time_limit_keeps_what_was_rounded(monkeypatch):
    walk, calls = Storage._walk, []

    def late(self, chosen):
        calls.append(chosen)
        if len(calls) > 1:
            raise TimeLimitReached("the time limit was reached")
        return walk(self, chosen)

    monkeypatch.setattr(Storage, "_walk", late)
    model = wide()
    found = make(model).within(0.1 * model.file_bytes)
    assert len(calls) == 2
    assert codec.packed_bytes(found.model) < 0.15 * model.file_bytes


@pytest.mark.parametrize(("mean", "spread"), [(1.0, 1e-7), (1e-4, 0.0), (0.0, 0.0)])
def test_weights_that_are_nearly_equal(mean, spread):
    """Steps suit the size of the weights, not how much they differ."""
    model = CASES["depthwise"]()
    name = next(n.weight for n in Analysis(model).linears.values() if n.depthwise)
    shape = model.weights[name].shape
    drawn = mean + spread * np.random.default_rng(0).standard_normal(shape)
    model = Model(model.skeleton, {**model.weights, name: drawn.astype(np.float32)})
    found = make(model).within(0.5 * model.file_bytes)
    assert np.allclose(found.model.weights[name], mean, rtol=0.01)  # steps are 2^-8 of it
    assert output_change(model, found.model, feeds(model), threads=1) < 0.02


def test_from_the_weights_alone():
    """Samples do not move the levels then, and they lose more."""
    model = wide()
    aware, alone = (make(model, data_aware=aware).in_bytes() for aware in (True, False))
    error = [output_change(model, f.model, feeds(model), threads=1) for f in (aware, alone)]
    assert error[0] < error[1] < 0.01


def test_curves_take_the_least_sum():
    rounded = [
        Rounded(np.zeros((1, 1, 1), np.int32), step, step**2, bits)
        for step, bits in ((1, 80), (4, 20), (8, 10))
    ]
    curves = Curves.of(rounded, [(4.0**2, 1.6e-3), (8.0**2, np.inf)])  # the last overflows
    assert curves.steps[[0, -1]].tolist() == [1, 4]
    assert curves.best(0.0) == 0
    assert curves.best(1.0) == len(curves.steps) - 1
    middle = np.flatnonzero(np.isclose(curves.steps, 2))[0]
    assert curves.bits[middle] == pytest.approx(50)
    assert curves.losses[middle] == pytest.approx(4e-4)  # as the square of the step


def test_change_tells_models_apart():
    model = wide()
    name = next(n for n, a in model.weights.items() if a.ndim == 4)
    other = Model(model.skeleton, {**model.weights, name: model.weights[name] * 1.1})
    assert output_change(model, model, feeds(model), threads=1) == 0
    assert 1e-4 < output_change(model, other, feeds(model), threads=1) < 1


@pytest.fixture
def packed(tmp_path) -> Model:
    """A model read from a packed file that takes a small part of its ONNX file."""
    few = {n: np.sign(a) if a.ndim == 4 else a for n, a in wide().weights.items()}
    codec.pack(Model(wide().skeleton, few), tmp_path / "a.onnxc")
    model = load(tmp_path / "a.onnxc")
    assert model.file_bytes < 0.2 * wide().file_bytes
    return model


@pytest.mark.parametrize("limits", [{"macs": 0.6}, {"size": 0.6}])
def test_a_packed_input_counts_as_the_onnx_file_it_becomes(packed, limits):
    methods = ("remove_channels", "factorize")
    result = run(packed, replace(QUICK, emit="onnx", methods=methods), **limits)
    assert result.met
    assert not result.plan.empty
    assert result.report.ladder.passed
    whole = result.report.original.file_bytes
    assert whole == wide().file_bytes
    assert 0.2 * whole < result.model.file_bytes <= limits.get("size", 1) * whole
    assert f"packed file of {packed.file_bytes:,} bytes" in result.report.notes[0]
    assert f"with the {whole:,}" in result.report.notes[0]


@pytest.mark.parametrize("emit", ["onnxc", "codebook", "onnx"])
def test_what_sizes_are_compared_with(packed, emit):
    notes: list[str] = []
    assert storage.sized_as(wide(), emit, notes).file_bytes == wide().file_bytes
    assert notes == []
    found = storage.sized_as(packed, emit, notes)
    assert found.digest == packed.digest
    assert found.files == packed.files
    own = Model(packed.skeleton, packed.weights)
    assert found.file_bytes == pytest.approx(written_bytes(own, emit), rel=1e-3)
    assert len(notes) == (emit != "onnxc")
    assert codec.unpack(packed.files[0]).packed


def test_settings_know_the_forms():
    with pytest.raises(ParameterError, match="'emit' must be one of"):
        Settings(emit="zip")
    assert not Settings(emit="onnxc").shares
    assert Settings(emit="onnxc", limits=Limits(size=0.1)).shares
    assert not Settings(limits=Limits(size=0.1)).shares
    assert storage.written_bytes(wide(), "onnx") == wide().file_bytes
