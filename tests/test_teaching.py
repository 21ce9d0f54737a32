"""What a model is taught: which tensors are compared, and what becomes of samples."""

from dataclasses import replace

import numpy as np
import pytest

from onnxcomp.errors import DataError
from onnxcomp.evaluate import predict
from onnxcomp.model import Model
from onnxcomp.runtime import Session, with_outputs
from onnxcomp.samples import Samples
from onnxcomp.teaching import AUGMENTATIONS, Course, Teacher, mixed
from tests.analysis.channel_graphs import Graph
from tests.search.cases import residual
from tests.search.searching import inputs
from tests.test_tune import noisy

KEPT = np.array([0, 2, 3, 5, 8, 9, 11])


def trunk(keep: np.ndarray | None = None, *, adds: bool = True) -> Model:
    """Two blocks of a trunk of 12 channels, of which `keep` are left; else four layers."""
    g = Graph(3, 16, 16)
    keep = np.arange(12) if keep is None else keep

    def conv(x: str, inputs: int, outputs: int, *, cut: str) -> str:
        w = g.rng.standard_normal((outputs, inputs, 3, 3)).astype(np.float32)
        b = g.rng.standard_normal(outputs).astype(np.float32)
        if "i" in cut:  # the other channels hardly count, so that they can be removed
            w[:, np.setdiff1d(np.arange(12), KEPT)] *= 0.1
        w = w[keep] if "o" in cut else w
        w = w[:, keep] if "i" in cut else w
        names = g.constant(w), g.constant(b[keep] if "o" in cut else b)
        return g.op("Conv", x, *names, pads=[1] * 4)

    t = g.op("Relu", conv("x", 3, 12, cut="o"))
    for _ in range(2):
        h = conv(g.op("Relu", conv(t, 12, 10, cut="i")), 10, 12, cut="o")
        t = g.op("Relu", g.op("Add", h, t) if adds else h)
    return g.model(conv(t, 12, 4, cut="i"))


def teacher_of(student: Model, teacher: Model, count: int = 8) -> Teacher:
    few = Samples(inputs(teacher, count))
    return Teacher(student, teacher, few, threads=1, batch=4)


def test_blocks_end_behind_their_adds() -> None:
    model = trunk()
    found = teacher_of(noisy(model), model)
    adds = [node.id for node in model.nodes if node.op == "Add"]
    assert [end.name for end in found.ends] == [model.readers[a][0].node.id for a in adds]
    assert all(end.channels is None for end in found.ends)


def test_without_adds_a_block_has_three_layers() -> None:
    model = trunk(adds=False)
    (end,) = teacher_of(noisy(model), model).ends
    convs = [node.id for node in model.nodes if node.op == "Conv"]
    assert end.name == convs[2]


def test_channels_that_are_left_are_found_again() -> None:
    model = trunk()
    found = teacher_of(trunk(KEPT), model)
    assert found.ends
    for end in found.ends:
        assert end.channels is not None
        assert np.array_equal(end.channels[0], KEPT)
        assert end.channels[1] == 1
    samples = Samples(inputs(model, 3))
    values = found.values(samples, ends=True)
    whole = Session(with_outputs(model, [end.name for end in found.ends])).run(samples.arrays)
    for end in found.ends:
        np.testing.assert_allclose(values[end.name], whole[end.name][:, KEPT], rtol=1e-5)


def test_channels_that_are_not_like_the_teachers_are_no_end() -> None:
    model, wrong = trunk(), trunk(KEPT)
    rng = np.random.default_rng(5)
    weights = {
        n: rng.standard_normal(a.shape).astype(a.dtype) for n, a in wrong.weights.items()
    }
    assert teacher_of(Model(wrong.skeleton, weights), model).ends == ()


def test_values_are_the_teachers() -> None:
    model = residual()
    found = teacher_of(noisy(model), model)
    samples = Samples(inputs(model, 7))
    values = found.values(samples, ends=False)
    (name,) = found.outputs
    assert values.keys() == {name}
    np.testing.assert_allclose(
        values[name], predict(model, samples)[name], rtol=1e-5, atol=1e-5
    )
    wrong = predict(noisy(model), samples)[name]
    assert not np.allclose(values[name], wrong, rtol=1e-2)
    with pytest.raises(DataError, match="NaN or infinite on the samples"):
        found.values(Samples({"x": np.full_like(samples.arrays["x"], np.inf)}), ends=False)


def pictures(count: int = 12, *, labels: bool = True) -> Samples:
    """Images of 16 by 16 of one colour each, from -1 to 1, with a class for each."""
    colours = np.linspace(-1, 1, count, dtype=np.float32)[:, None, None, None]
    arrays = {"x": np.broadcast_to(colours, (count, 3, 16, 16)).copy()}
    return Samples(arrays, np.arange(count) if labels else None)


def course(samples: Samples, augmentation: str, classes: int = 0) -> Course:
    model = trunk()
    return Course(
        samples,
        teacher_of(model, model),
        model.signature.inputs,
        augmentation=augmentation,
        ends=True,
        classes=classes,
    )


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_steps_vary_and_their_seed_tells_how(augmentation: str) -> None:
    rng = np.random.default_rng(0)
    samples = Samples({"x": rng.standard_normal((9, 3, 16, 16)).astype(np.float32)})
    found = course(samples, augmentation)
    index = [4, 0, 7, 1, 2, 3]
    first, again, other = (found.drawn(index, seed) for seed in ([0, 1], [0, 1], [0, 2]))
    same = np.array_equal(first.arrays["x"], other.arrays["x"])
    assert np.array_equal(first.arrays["x"], again.arrays["x"])
    assert same == (augmentation == "none")
    if augmentation == "none":
        assert np.array_equal(first.arrays["x"], samples.arrays["x"][index])


def test_what_is_no_image_stays_as_it_is() -> None:
    samples = Samples({"x": np.zeros((4, 8, 8, 8), np.float32)})
    model = residual()
    found = Course(
        samples,
        teacher_of(model, model),
        model.signature.inputs,
        augmentation="mixup",
        ends=False,
        classes=0,
    )
    assert np.array_equal(found.drawn([1, 2], [0]).arrays["x"], samples.arrays["x"][:2])


def test_light_copies_keep_their_labels() -> None:
    found = course(pictures(), "light", 12).drawn([3, 9, 11], [5])
    assert found.labels is not None
    assert found.labels.tolist() == [3, 9, 11]
    means = found.arrays["x"].mean(axis=(1, 2, 3))
    assert np.all(np.diff(means) > 0)


def test_mixed_images_have_labels_of_the_same_shares() -> None:
    """Each image has one colour: what it is of whom, its mean and its label must both say."""
    samples = pictures()
    shares = replace(samples, labels=np.eye(12, dtype=np.float32))
    found = mixed(shares, np.random.default_rng(0))
    assert found.labels is not None
    np.testing.assert_allclose(found.labels.sum(axis=1), 1, atol=1e-6)
    colours = samples.arrays["x"][:, 0, 0, 0]
    means = found.arrays["x"].mean(axis=(1, 2, 3))
    np.testing.assert_allclose(means, found.labels @ colours, atol=1e-5)
    assert np.abs(means - colours).max() > 0.1
    spread = np.ptp(found.arrays["x"], axis=(1, 2, 3))
    assert np.all(spread[:4] < 1e-6)  # blended
    assert np.any(spread[4:8] > 0.1)  # a part of another
    assert np.array_equal(found.arrays["x"][8:], samples.arrays["x"][8:])


def test_labels_become_shares_where_images_are_mixed() -> None:
    drawn = course(pictures(), "mixup", 12).drawn(range(12), [3])
    assert drawn.labels is not None
    assert drawn.labels.shape == (12, 12)
    assert np.count_nonzero((drawn.labels > 0.01) & (drawn.labels < 0.99)) >= 8
    assert course(pictures(labels=False), "mixup").drawn([0, 1], [3]).labels is None


def test_bytes_stay_bytes() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (9, 16, 16, 3), np.uint8)
    found = mixed(Samples({"x": images}), rng).arrays["x"]
    assert found.dtype == np.uint8
    assert not np.array_equal(found, images)
