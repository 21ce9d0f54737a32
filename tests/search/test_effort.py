"""How many samples a search works on, and which of them lead."""

import copy
from dataclasses import replace

import numpy as np
import pytest

from onnxcomp.analysis import Analysis
from onnxcomp.deadline import Deadline
from onnxcomp.model import Model
from onnxcomp.samples import Samples
from onnxcomp.search import effort as subject
from onnxcomp.search.effort import Effort, apart, feeds, find_effort, fitting_feeds
from onnxcomp.search.setup import assign_samples
from onnxcomp.search.store import Store
from tests.search.searching import QUICK, inputs, wide

COUNT = 200
MODEL = wide()  # of four nodes


def found(seconds: float | None, *, store: Store | None = None, memory: float = 1e9):
    """Effort and notes of a search that has so much time left."""
    samples, notes = Samples(inputs(MODEL, COUNT)), []
    settings = replace(QUICK, time_limit=seconds, memory=memory)
    deadline, facts = Deadline(seconds), Analysis(MODEL, samples)
    effort = find_effort(facts, samples, settings, deadline, store or Store(None), notes)
    return effort, notes


def with_batch(model: Model, batch: int) -> Model:
    """The same model at a declared batch."""
    skeleton = copy.deepcopy(model.skeleton)
    skeleton.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
    for value in (*skeleton.graph.value_info, *skeleton.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    return Model(skeleton, model.weights)


@pytest.fixture
def slow(monkeypatch):
    """Let one sample take a hundredth of a second, however fast the machine is."""
    monkeypatch.setattr(subject, "_seconds", lambda *_: 0.01)


def test_without_a_time_limit_all_samples_count(slow):
    """A third of them to measure losses on, the others for what is measured."""
    assert found(None) == (Effort(COUNT, COUNT // 3), [])


def test_enough_time_changes_nothing(slow):
    assert found(1e4) == found(None)


def test_less_time_measures_on_fewer_and_says_so(slow):
    """Twenty runs of 10 ms each for every sample to measure on, in 0.3 of the time."""
    effort, notes = found(30.0)
    assert effort.fitted in (29, 30)
    assert effort.measured == effort.fitted // 3
    assert found(100.0)[0].measured == 33
    assert found(100.0)[0].fitted in (99, 100)
    assert "for want of time" in notes[0]
    efforts = [found(seconds)[0] for seconds in (0.01, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)]
    assert efforts[0] == Effort(8, 1)
    assert all(2 * e.measured < e.fitted for e in efforts)
    assert efforts == sorted(efforts, key=lambda e: (e.fitted, e.measured))


def test_a_run_that_goes_on_works_on_the_same_samples(slow, tmp_path, monkeypatch):
    store = Store(tmp_path / "state")
    first, _ = found(10.0, store=store)
    monkeypatch.setattr(subject, "_seconds", lambda *_: 0.0001)
    assert found(10.0, store=store)[0] == first
    assert found(10.0)[0] != first


def test_a_declared_batch_is_so_many_samples(monkeypatch):
    """One run of it takes as long as a clock says that goes by a second at each look."""
    model = with_batch(wide(), 8)
    samples = Samples(inputs(model, 16))
    ticks = iter(range(100))
    monkeypatch.setattr(subject.time, "monotonic", lambda: float(next(ticks)))
    assert subject._seconds(Analysis(model, samples), samples) == 1 / 8


def test_time_and_memory_both_hold(slow):
    little, notes = found(100.0, memory=1e5)
    assert little.fitted < found(100.0)[0].fitted
    assert "GB of activations" in notes[0]


@pytest.mark.parametrize(
    "effort", [Effort(1, 1), Effort(9, 1), Effort(50, 5), Effort(200, 128)]
)
def test_feeds_hold_what_was_asked_for(effort):
    samples = Samples(inputs(MODEL, COUNT))
    feeds, leading = fitting_feeds(Analysis(MODEL, samples), samples, effort, sources=COUNT)
    rows = [len(next(iter(feed.values()))) for feed in feeds]
    assert sum(rows) == effort.fitted
    assert sum(rows[:leading]) <= effort.measured
    assert sum(rows[:leading]) > 0.7 * effort.measured


def test_the_leading_samples_are_of_all_kinds():
    """Users' files are often sorted by class."""
    kinds = np.repeat(np.arange(4.0), 50).astype(np.float32)
    data = {"x": inputs(MODEL, COUNT)["x"] + 100 * kinds[:, None, None, None]}
    fit = assign_samples(MODEL, data, QUICK, []).plain
    leading = np.round(fit.arrays["x"][:32].mean(axis=(1, 2, 3)) / 100)
    assert set(leading) == {0.0, 1.0, 2.0, 3.0}


def firsts(feeds: list[dict[str, np.ndarray]]) -> set[int]:
    return {int(row) for feed in feeds for row in feed["x"][:, 0, 0, 0]}


@pytest.mark.parametrize("sources", [200, 43, 7, 2])
def test_copies_of_a_sample_are_on_its_side(sources):
    """Else options would be solved on what they are measured on, a little shifted."""
    data = inputs(MODEL, COUNT)["x"]
    data[:, 0, 0, 0] = np.arange(COUNT) % sources
    samples = Samples({"x": data})
    effort = Effort(COUNT, COUNT // 3)
    feeds, leading = fitting_feeds(Analysis(MODEL, samples), samples, effort, sources=sources)
    measured, solved = firsts(feeds[:leading]), firsts(apart(feeds, leading))
    assert not measured & solved
    assert len(measured | solved) == sources


@pytest.mark.parametrize("sources", [1, COUNT])
def test_one_sample_serves_for_everything(sources):
    samples = Samples({"x": inputs(MODEL, COUNT)["x"]})
    effort = Effort(COUNT if sources == 1 else 1, 1)
    feeds, leading = fitting_feeds(Analysis(MODEL, samples), samples, effort, sources=sources)
    assert leading == len(feeds)
    assert apart(feeds, leading) is feeds


def test_a_declared_batch_is_not_shared_by_both_sides():
    model = with_batch(wide(), 8)
    data = inputs(model, 20)
    data["x"][:, 0, 0, 0] = np.arange(20)
    samples = Samples(data)
    facts = Analysis(model, samples)
    feeds, leading = fitting_feeds(facts, samples, Effort(20, 6), sources=20)
    assert firsts(feeds[:leading]) == set(range(6))
    assert firsts(apart(feeds, leading)) == set(range(6, 20))


@pytest.mark.parametrize(
    ("count", "batches"),
    [(3, [3]), (8, [4, 4]), (36, [9] * 4), (100, [25] * 4), (COUNT, [32] * 6 + [8])],
)
def test_few_samples_are_as_many_batches_as_run_side_by_side(count, batches):
    samples = Samples(inputs(MODEL, COUNT)).take(range(count))
    made = feeds(Analysis(MODEL, samples), samples)
    assert [len(feed["x"]) for feed in made] == batches
