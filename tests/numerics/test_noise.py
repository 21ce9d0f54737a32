"""Noise has the spectrum, the correlations and the range of natural images."""

import numpy as np
import pytest

from onnxcomp.numerics.noise import as_pixels, pink_noise


def slope(image: np.ndarray) -> float:
    """Exponent of the radial amplitude spectrum of one square image."""
    size = len(image)
    amplitude = np.abs(np.fft.fft2(image))
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    keep = (frequency > 0.03) & (frequency < 0.4)
    return float(np.polyfit(np.log(frequency[keep]), np.log(amplitude[keep]), 1)[0])


@pytest.mark.parametrize(
    ("sizes", "axes", "channels"),
    [
        ((4, 3, 64, 64), (-2, -1), -3),
        ((4, 64, 64, 3), (-3, -2), -1),
        ((64, 64), (-2, -1), None),
        ((64, 64, 2), (-3, -2), None),
    ],
)
def test_planes_are_normalised_with_a_natural_spectrum(sizes, axes, channels):
    noise = pink_noise(np.random.default_rng(0), sizes, axes, channels)
    assert noise.shape == sizes
    assert np.allclose(noise.mean(axis=axes), 0, atol=1e-12)
    assert np.allclose(noise.std(axis=axes), 1, atol=1e-12)
    for plane in np.moveaxis(noise, axes, (-2, -1)).reshape(-1, 64, 64):
        assert slope(plane) == pytest.approx(-1, abs=0.15)
    white = np.random.default_rng(0).standard_normal((64, 64))
    assert slope(white) == pytest.approx(0, abs=0.15)  # the check tells them apart


@pytest.mark.parametrize(("channels", "expected"), [(-3, 0.9), (None, 0.0)])
def test_channels_are_correlated_where_asked(channels, expected):
    noise = pink_noise(np.random.default_rng(0), (60, 3, 32, 48), (-2, -1), channels)
    found = np.corrcoef(np.moveaxis(noise, 1, 0).reshape(3, -1))[np.triu_indices(3, 1)]
    assert found == pytest.approx(expected, abs=0.15 if expected == 0 else 0.04)


def test_single_pixels_are_white_noise():
    noise = pink_noise(np.random.default_rng(0), (500, 3, 1, 1), (-2, -1))
    assert noise.std() == pytest.approx(1, abs=0.1)


def test_pixels_lie_within_their_range():
    noise = pink_noise(np.random.default_rng(0), (40, 3, 32, 32), (-2, -1), -3)
    pixels = as_pixels(noise, -1.0, 3.0)
    assert pixels.min() == -1
    assert pixels.max() <= 3
    assert pixels.mean() == pytest.approx(-1 + 4 * 0.45, abs=0.02)
    assert pixels.std() == pytest.approx(4 * 0.225, rel=0.03)
    assert ((pixels == -1) | (pixels == 3)).mean() < 0.05  # few are cut off
