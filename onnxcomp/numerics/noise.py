"""Noise with the spectrum of natural images."""

import math

import numpy as np
from numpy.typing import NDArray

_CORRELATION = 0.9  # of the colour channels of natural images, about
_MEAN, _DEVIATION = 0.45, 0.225  # of ImageNet's pixels, as shares of their range, about


def pink_noise(
    rng: np.random.Generator,
    sizes: tuple[int, ...],
    axes: tuple[int, int],
    channels: int | None = None,
) -> NDArray[np.float64]:
    """Draw images whose amplitude falls as 1/f with the spatial frequency, of random phases.

    The spectrum is that of natural images (Field 1987). Each plane has zero mean and unit
    variance; one of a single pixel is white noise.

    Args:
        rng: source of the noise.
        sizes: shape of the result.
        axes: the spatial axes, negative and neighbours.
        channels: axis along which planes are correlated by 0.9; None where they are not.
    """
    noise = rng.standard_normal(sizes)
    if channels is not None:
        plane = list(sizes)
        plane[channels] = 1
        shared = rng.standard_normal(plane)
        noise = math.sqrt(1 - _CORRELATION) * noise + math.sqrt(_CORRELATION) * shared
    height, width = sizes[axes[0]], sizes[axes[1]]
    if height * width == 1:
        return noise
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf  # no constant part: the mean is zero
    frequency = frequency.reshape(*frequency.shape, *(1,) * (-1 - axes[1]))
    spectrum = np.fft.rfft2(noise, axes=axes) / frequency
    image = np.fft.irfft2(spectrum, s=(height, width), axes=axes)
    return np.asarray(image / image.std(axis=axes, keepdims=True))


def as_pixels(noise: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """Move noise of zero mean and unit variance into a range, as pixels lie in theirs."""
    return np.clip(low + (high - low) * (_MEAN + _DEVIATION * noise), low, high)
