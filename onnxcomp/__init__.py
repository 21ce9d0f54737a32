"""Make trained ONNX CNNs smaller and faster after training, and measure what that cost."""

from onnxcomp.codec import open_session, pack, unpack
from onnxcomp.errors import OnnxcompError
from onnxcomp.loading import load
from onnxcomp.model import Model
from onnxcomp.samples import Samples, load_samples
from onnxcomp.search.run import Result, compress
from onnxcomp.search.settings import Limits, Settings
from onnxcomp.tune import TuneResult, Tuning, tune

__all__ = [
    "Limits",
    "Model",
    "OnnxcompError",
    "Result",
    "Samples",
    "Settings",
    "TuneResult",
    "Tuning",
    "compress",
    "load",
    "load_samples",
    "open_session",
    "pack",
    "tune",
    "unpack",
]
