"""The grid, and the cliffs that the latency model must know."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcomp.analysis.target import TARGETS, Convolution, find_target
from onnxcomp.errors import ParameterError

AVX512 = TARGETS["x86-avx512"]
CONV = Convolution(64, 64, 9, 56 * 56, 56 * 56)


def pruned(width: int) -> float:
    """Predicted speedup of the 3 x 3 layer of 64 channels at 56 x 56 when it is narrowed."""
    return AVX512.seconds(CONV) / AVX512.seconds(
        replace(CONV, in_channels=width, out_channels=width)
    )


def test_grids():
    assert AVX512.sizes(64) == (4, 8, 12, 16, 32, 48)
    assert AVX512.sizes(17) == (4, 8, 12, 16)
    assert AVX512.sizes(4) == ()
    assert TARGETS["x86-avx2"].sizes(24) == (4, 8, 16)
    assert TARGETS["arm64"].sizes(12) == (4, 8)


@given(st.integers(1, 3000), st.sampled_from(sorted(TARGETS)))
def test_sizes_are_on_the_grid(total, name):
    target = TARGETS[name]
    sizes = target.sizes(total)
    assert list(sizes) == sorted(set(sizes))
    for size in sizes:
        assert 0 < size < total
        assert size % 4 == 0
        assert size in target.small or size % target.block == 0


@given(st.integers(1, 3000), st.integers(1, 40))
def test_sizes_of_a_step(total, step):
    sizes = AVX512.sizes(total, step=step)
    assert list(sizes) == sorted(set(sizes))
    assert all(0 < s < total and s % step == 0 for s in sizes)
    assert len(sizes) <= 15
    assert bool(sizes) or total <= 16 * step


def test_cliffs():
    """Measured speedups: 61 channels 0.78, 56 channels 1.00, 48 channels 1.77, 32 3.89."""
    assert pruned(61) < 0.95
    assert pruned(56) == pytest.approx(1.0, abs=0.05)
    assert 1.5 < pruned(48) < 2.0
    assert 3.2 < pruned(32) < 4.3
    assert pruned(31) < pruned(32)
    assert pruned(33) < pruned(32)


def test_forms():
    """Measured at 64 channels: 1x1 -> 3x3 of rank 32 1.79; of rank 60 it is no gain."""

    def first(rank: int) -> float:
        chain = [
            replace(CONV, out_channels=rank, kernel=1),
            replace(CONV, in_channels=rank),
        ]
        return AVX512.seconds(CONV) / AVX512.chain_seconds(chain)

    assert 1.4 < first(32) < 2.0
    assert first(60) < 1.0
    assert first(30) < first(32)


def test_depthwise_off_the_grid_falls_back():
    good = Convolution(64, 64, 9, 3136, 3136, groups=64)
    bad = Convolution(61, 61, 9, 3136, 3136, groups=61)
    assert AVX512.seconds(bad) > AVX512.seconds(good)


def test_macs_and_weights():
    assert CONV.macs == 56 * 56 * 64 * 64 * 9
    assert replace(CONV, groups=8).weights == CONV.weights // 8
    up = Convolution(8, 4, 16, out_positions=400, in_positions=100, op="ConvTranspose")
    assert up.macs == 100 * 8 * 4 * 16


def test_errors():
    with pytest.raises(ParameterError, match="x86-avx512"):
        find_target("toaster")
    with pytest.raises(ParameterError, match="step"):
        AVX512.sizes(64, step=0)
