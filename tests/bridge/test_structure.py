"""Zeros of pruned weights and codebooks, while everything around them is trained."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="the bridge needs PyTorch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from onnxcomp.bridge.structure import Structure
from onnxcomp.bridge.training import Training

SHAPE = (16, 8, 3, 3)


def coded(values: list[float], shape=SHAPE, seed: int = 0) -> np.ndarray:
    """A tensor of few values, each of which occurs."""
    rng = np.random.default_rng(seed)
    flat = rng.choice(values, int(np.prod(shape)))
    flat[: len(values)] = values
    return flat.reshape(shape).astype(np.float32)


def trained(array: np.ndarray, optimizer: str = "adamw", *, kept: bool = True) -> np.ndarray:
    """The weights behind five steps with random gradients, decay and momentum."""
    weight = nn.Parameter(torch.from_numpy(array.copy()))
    structure = Structure([weight] if kept else [])
    rate = Training(optimizer=optimizer, learning_rate=0.1, weight_decay=0.1)
    steps = rate.make_optimizer([weight])
    for seed in range(5):
        torch.manual_seed(seed)
        weight.grad = torch.randn(weight.shape)
        structure.restrict([weight])
        steps.step()
        with torch.no_grad():
            structure.settle([weight])
    return weight.detach().numpy()


def same_groups(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether elements that were equal are equal to the last bit, and zeros are zero."""
    groups = [after[before == value] for value in np.unique(before)]
    equal = all(len(np.unique(group)) == 1 for group in groups)
    return equal and bool(np.all(after[before == 0] == 0))


def test_the_lone_zero_of_a_codebook_stays_and_those_of_a_bias_do_not() -> None:
    book, bias = np.array([-0.5, 0.0, 0.25], np.float32), np.zeros(4, np.float32)
    assert list(trained(book) == 0) == [False, True, False]
    assert np.all(trained(book, kept=False) != 0)
    assert np.all(trained(bias) != 0)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("values", [[-0.5, 0.0, 0.25], [1.0, 2.0, 3.0], [0.0, 0.1, 0.2, 0.3]])
def test_codebooks_stay_codebooks(optimizer: str, values: list[float]) -> None:
    array = coded(values)
    free, kept = (trained(array, optimizer, kept=k) for k in (False, True))
    assert same_groups(array, kept)
    assert not same_groups(array, free)
    moved = [kept[array == value][0] != np.float32(value) for value in values if value]
    assert all(moved)


@pytest.mark.parametrize(("count", "shape"), [(16, (4, 4, 3, 3)), (64, (16, 12)), (4, (4, 3))])
def test_codebooks_of_small_tensors_stay(count: int, shape) -> None:
    array = coded([0.5 + v / 8 for v in range(count)], shape)
    assert len(np.unique(array)) == count
    assert same_groups(array, trained(array))
    assert not same_groups(array, trained(array, kept=False))


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(8, 4), (16, 32), (8, 1, 3, 3), (64, 64)])
def test_dense_weights_are_no_codebooks(kind: str, shape) -> None:
    """Though values recur where they have few bits; in bfloat16 each 1.8 times at most."""
    dense = torch.from_numpy(np.random.default_rng(0).standard_normal(shape) / 8)
    array = dense.to(getattr(torch, kind)).float().numpy()
    assert np.array_equal(trained(array), trained(array, kept=False))


def test_what_is_left_of_pruned_weights_shares_nothing() -> None:
    """Nine in ten are zero, so that there are few values for the elements there are."""
    rng = np.random.default_rng(0)
    array = np.where(rng.random(SHAPE) < 0.9, 0, rng.standard_normal(SHAPE)).astype("f4")
    weight = nn.Parameter(torch.from_numpy(array))
    structure = Structure([weight])
    weight.grad = torch.ones(SHAPE)
    structure.restrict([weight])
    assert np.array_equal(weight.grad.numpy(), (array != 0).astype(np.float32))
    assert not structure._codebooks


def test_a_value_has_the_mean_gradient_of_its_elements() -> None:
    array = coded([-1.0, 0.0, 2.0])
    weight = nn.Parameter(torch.from_numpy(array))
    structure = Structure([weight])
    gradient = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    weight.grad = torch.from_numpy(gradient.copy())
    structure.restrict([weight])
    for value in (-1.0, 2.0):
        found = weight.grad.numpy()[array == value]
        assert found == pytest.approx(gradient[array == value].mean(), abs=1e-6)
        assert found[0] != pytest.approx(gradient.mean(), abs=1e-4)
    assert np.all(weight.grad.numpy()[array == 0] == 0)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_zeros_stay_under_decay_and_momentum(optimizer: str) -> None:
    rng = np.random.default_rng(0)
    array = np.where(rng.random(SHAPE) < 0.4, 0, rng.standard_normal(SHAPE)).astype("f4")
    free, kept = (trained(array, optimizer, kept=k) for k in (False, True))
    assert np.all(kept[array == 0] == 0)
    assert not np.any(free[array == 0] == 0)
    assert np.all(kept[array != 0] != array[array != 0])


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(64, np.float32),
        np.full((64, 1, 1), 0.25, np.float32),
        coded([float(v) for v in range(1, 300)], (40, 40)),
        coded([float(v) for v in range(1, 101)], (14, 14)),
        np.where(np.eye(14) > 0, 1.0, np.arange(196).reshape(14, 14)).astype(np.float32),
        np.random.default_rng(0).standard_normal((40, 40)).astype(np.float32),
    ],
    ids=["bias", "slope", "too many values", "hardly shared", "few alike", "dense"],
)
def test_what_is_neither_is_free(array: np.ndarray) -> None:
    assert np.array_equal(trained(array), trained(array, kept=False))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(-800, 800), min_size=2, max_size=12, unique=True),
    st.sampled_from([(64, 32), (8, 16, 3, 3), (300, 7)]),
)
def test_groups_survive_whatever_their_values(values: list[int], shape) -> None:
    array = coded([value / 100 for value in values], shape)
    if np.count_nonzero(np.unique(array)) >= 2:
        assert same_groups(array, trained(array))
