"""Speech features for the audio models, all approximate: one telephone recording at 8 kHz.

It is resampled to 16 kHz; its first half serves to fit, its second half is new. Every sample
starts somewhere in its half, at some loudness, with some noise.
"""

from __future__ import annotations

import wave
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.fft import dct
from scipy.signal import resample_poly

from benchmarks.common import model_path, shared_folder

Array = npt.NDArray[Any]
Part = Literal["fit", "new"]
RATE = 16_000


def speech(part: Part) -> Array:
    """Return one half of the recording at 16 kHz, in -1..1."""
    with wave.open(str(shared_folder() / "data" / "speech_8k.wav")) as file:
        data = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
    half = len(data) // 2
    data = data[:half] if part == "fit" else data[half:]
    return np.asarray(resample_poly(data, 2, 1), np.float64)


def _clips(part: Part, count: int, seconds: float, rng: np.random.Generator) -> Array:
    """Return pieces of speech (count, samples), wrapped round where the half is shorter."""
    data, length = speech(part), round(seconds * RATE)
    starts = rng.integers(len(data), size=count)
    clips = data[(starts[:, None] + np.arange(length)) % len(data)]
    clips = clips * rng.uniform(0.3, 1.0, (count, 1))
    level = clips.std(axis=1, keepdims=True) * 10 ** (-rng.uniform(5, 40, (count, 1)) / 20)
    return np.asarray(clips + level * rng.standard_normal(clips.shape))


def _power(clips: Array, window: int, hop: int, size: int) -> Array:
    """Return the power spectrum (count, frames, size / 2 + 1) under a Hann window."""
    frames = np.lib.stride_tricks.sliding_window_view(clips, window, axis=-1)[:, ::hop]
    return np.asarray(np.abs(np.fft.rfft(frames * np.hanning(window), size)) ** 2)


def _mel(power: Array, bands: int, low: float = 20.0, high: float = RATE / 2) -> Array:
    """Return energies in triangular bands that are equally wide in mel (O'Shaughnessy)."""
    edges = np.linspace(
        2595 * np.log10(1 + low / 700), 2595 * np.log10(1 + high / 700), bands + 2
    )
    hertz = 700 * (10 ** (edges / 2595) - 1)
    grid = np.linspace(0, RATE / 2, power.shape[-1])
    rising = (grid - hertz[:-2, None]) / (hertz[1:-1] - hertz[:-2])[:, None]
    falling = (hertz[2:, None] - grid) / (hertz[2:] - hertz[1:-1])[:, None]
    bank = np.maximum(np.minimum(rising, falling), 0)
    return np.asarray(power @ bank.T)


def dnsmos(part: Part, count: int, rng: np.random.Generator) -> Mapping[str, Array]:
    """Return (n, 900, 120): decibels below the loudest, as (dB + 40) / 40."""
    made = []
    for clip in _clips(part, count, 9.02, rng):
        mel = _mel(_power(clip[None], 320, 160, 320), 120)[0, :900]
        decibels = 10 * np.log10(np.maximum(mel / mel.max(), 1e-8))
        made.append((decibels + 40) / 40)
    return {"input_1": _f32(made)}


def anomaly(part: Part, count: int, rng: np.random.Generator) -> Mapping[str, Array]:
    """Return (n, 640): five frames of 128 bands, in decibels."""
    power = _power(_clips(part, count, 0.2, rng), 1024, 512, 1024)[:, :5]
    return {"input": _f32(10 * np.log10(_mel(power, 128) + 1e-10)).reshape(count, 640)}


def keywords(part: Part, count: int, rng: np.random.Generator) -> Mapping[str, Array]:
    """Return (n, 49, 10, 1): ten cepstral coefficients of 40 bands."""
    power = _power(_clips(part, count, 1.0, rng), 480, 320, 512)[:, :49]
    logs = np.log(_mel(power, 40, high=4000.0) + 1e-6)
    return {"input_1": _f32(dct(logs, norm="ortho")[..., :10, None])}


def wakeword(part: Part, count: int, rng: np.random.Generator) -> Mapping[str, Array]:
    """Return (n, 30, 1, 40): log energies of 40 bands, scaled to 0..1."""
    power = _power(_clips(part, count, 0.65, rng), 480, 320, 512)[:, :30]
    decibels = 10 * np.log10(_mel(power, 40) + 1e-10)
    return {"input": _f32(np.clip((decibels + 52) / 64, 0, 1))[:, :, None, :]}


def gtcrn(part: Part, count: int, rng: np.random.Generator) -> Mapping[str, Array]:
    """Return consecutive STFT frames with the caches that the original had before each."""
    clip = _clips(part, 1, (count + 1) * 256 / RATE, rng)[0]
    frames = np.lib.stride_tricks.sliding_window_view(clip, 512)[::256][:count]
    spectrum = np.fft.rfft(frames * np.sqrt(np.hanning(512)))
    mix = _f32(np.stack([spectrum.real, spectrum.imag], -1))[:, None, :, None, :]
    state = {
        "conv_cache": np.zeros((2, 1, 16, 16, 33), np.float32),
        "tra_cache": np.zeros((2, 3, 1, 1, 16), np.float32),
        "inter_cache": np.zeros((2, 1, 33, 16), np.float32),
    }
    passed_on = {f"{name}_out": name for name in state}
    return _rolled("apne_gtcrn_simple", [{"mix": frame} for frame in mix], state, passed_on)


def silero(part: Part, count: int, rng: np.random.Generator) -> Mapping[str, Array]:
    """Return consecutive windows of 64 + 512 samples with the original's state before each."""
    clip = _clips(part, 1, (count * 512 + 64) / RATE, rng)[0]
    windows = _f32(np.lib.stride_tricks.sliding_window_view(clip, 576)[::512][:count])
    feeds = [{"input": window[None], "sr": np.array(RATE, np.int64)} for window in windows]
    state = {"state": np.zeros((2, 1, 128), np.float32)}
    return _rolled("silero_vad_16k_op15", feeds, state, {"stateN": "state"})


def _rolled(
    model: str,
    feeds: list[dict[str, Array]],
    state: dict[str, Array],
    passed_on: Mapping[str, str],
) -> Mapping[str, Array]:
    """Run the original over a sequence and return each step's inputs, whole."""
    from onnxcomp import load
    from onnxcomp.runtime import Session

    session = Session(load(model_path(model)))
    steps = []
    for feed in feeds:
        step = feed | state
        steps.append(step)
        outputs = session.run(step)
        state = {name: outputs[source] for source, name in passed_on.items()}
    return {name: np.stack([step[name] for step in steps]) for name in steps[0]}


def _f32(values: npt.ArrayLike) -> Array:
    return np.asarray(values, np.float32)
