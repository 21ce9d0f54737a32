"""Figures of merit: top-1, PSNR, agreement with the original, or the user's own."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxcomp.errors import DataError, OnnxcompError, ParameterError
from onnxcomp.model import Array
from onnxcomp.sample_rules import is_float
from onnxcomp.samples import Samples

_MIN_MSE = 1e-10


@dataclass(frozen=True)
class Metric:
    """A figure of merit, higher is better.

    Attributes:
        name: Its name in reports.
        function: (outputs, labels, inputs) -> float; outputs as `predict` returns them.
        against_original: The labels are the original's largest scores, not the user's.
        classes: It counts right classes, so that its points are shares of the samples.
    """

    name: str
    function: Callable[[Mapping[str, Array], Array | None, Mapping[str, Array]], float]
    against_original: bool = False
    classes: bool = False

    def score(
        self, outputs: Mapping[str, Array], samples: Samples, original: Mapping[str, Array]
    ) -> float:
        """Return the metric of `outputs`, where the original model gave `original`.

        Raises:
            DataError: Labels are missing or do not fit, or the function fails.
        """
        labels = _scores(original).argmax(axis=1) if self.against_original else samples.labels
        try:
            value = float(self.function(outputs, labels, samples.arrays))
        except OnnxcompError:
            raise
        except Exception as error:
            kind = type(error).__name__
            raise DataError(f"metric '{self.name}' failed: {kind}: {error}") from error
        if not math.isfinite(value):
            raise DataError(f"metric '{self.name}' returned {value}; it must be finite")
        return value

    def check_labels(self, outputs: Mapping[str, Array], labels: Array | None) -> None:
        """Check the labels of more samples than those that gave `outputs`.

        Raises:
            DataError: The metric counts the user's classes, and a label is none.
        """
        if self.classes and not self.against_original and labels is not None:
            _classes(labels, _scores(outputs).shape[1:])


def load_metric(spec: str) -> Metric:
    """Return a metric by name.

    Args:
        spec: `top1` (labels are classes); `psnr` or `psnr:PEAK` (labels are target images;
            mean over the images, in dB, at most 100); `agreement` (top-1 against the original,
            no labels); or `module:function`, found in the current directory or on sys.path.

    Raises:
        ParameterError: There is no such metric, module or function.
    """
    name, _, rest = spec.partition(":")
    if spec == "top1":
        return Metric("top1", _top1, classes=True)
    if spec == "agreement":
        return Metric("agreement", _top1, against_original=True, classes=True)
    if name == "psnr":
        return _psnr(spec, rest or "1")
    if not name or not rest:
        allowed = "top1, psnr, psnr:PEAK, agreement or module:function"
        raise ParameterError.of("load_metric", "spec", allowed, spec)
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(name)
    except Exception as error:
        raise ParameterError(
            f"metric '{spec}': module '{name}' cannot be imported from the current directory "
            f"or sys.path: {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(here)
    function = getattr(module, rest, None)
    if not callable(function):
        found = ", ".join(n for n, v in vars(module).items() if callable(v) and n[0] != "_")
        raise ParameterError(
            f"metric '{spec}': module '{name}' has no function '{rest}'; it has "
            f"{found or 'none'}"
        )
    return Metric(spec, function)


def _top1(
    outputs: Mapping[str, Array], labels: Array | None, inputs: Mapping[str, Array]
) -> float:
    scores = _scores(outputs)
    if labels is None:
        raise DataError("metric 'top1' needs labels; give them, or use 'agreement'")
    found = _classes(labels, scores.shape[1:])
    if found.size != len(scores):
        raise DataError(f"labels have shape {labels.shape}, the scores {scores.shape}")
    return float(np.mean(scores.argmax(axis=1) == found.reshape(-1)))


def _classes(labels: Array, scores: tuple[int, ...]) -> Array:
    """Return labels as classes, also where they are scores, of shape (n, *scores).

    Raises:
        DataError: A label is outside 0 to the number of classes less 1.
    """
    if labels.shape[1:] == scores:
        found: Array = labels.argmax(axis=1)
        return found
    wrong = labels[~np.isin(labels, np.arange(*scores))]
    if wrong.size:
        raise DataError(
            f"label {wrong[0]} is no class: scores of {scores[0]} classes need labels from 0 "
            f"to {scores[0] - 1}; subtract 1 where yours begin at 1"
        )
    return labels


def _scores(outputs: Mapping[str, Array]) -> Array:
    """Return the first float output of shape (N, K), K >= 2, or such with axes of length 1."""
    floats = [a for a in outputs.values() if is_float(a.dtype) and a.ndim >= 2]
    for array in sorted(floats, key=lambda a: a.ndim != 2):
        if max(array.shape[1:]) == math.prod(array.shape[1:]) >= 2:
            return array.reshape(len(array), -1)
    shapes = {name: array.shape for name, array in outputs.items()}
    raise DataError(f"no output is class scores of shape (N, K): {shapes}; use another metric")


def _psnr(spec: str, text: str) -> Metric:
    try:
        peak = float(text)
    except ValueError:
        peak = math.nan
    if not 0 < peak < math.inf:
        raise ParameterError.of("load_metric", "spec", "psnr:PEAK with PEAK > 0", spec)

    def psnr(
        outputs: Mapping[str, Array], labels: Array | None, inputs: Mapping[str, Array]
    ) -> float:
        image = next((a for a in outputs.values() if is_float(a.dtype)), None)
        if image is None or labels is None or labels.shape != image.shape:
            found = "none" if labels is None else str(labels.shape)
            wanted = "no float output" if image is None else str(image.shape)
            raise DataError(
                f"metric 'psnr' needs target images {wanted} as labels; got {found}"
            )
        error = (image.astype(np.float64) - labels).reshape(len(image), -1) / peak
        mse = np.maximum(np.mean(error**2, axis=1), _MIN_MSE)
        return float(np.mean(-10 * np.log10(mse)))

    return Metric(spec, psnr)
