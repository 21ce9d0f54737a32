"""Models and inputs that several tests use."""

from pathlib import Path

import numpy as np
import pytest

from onnxcomp.analysis.probe import random_inputs
from onnxcomp.model import Model
from onnxcomp.samples import Samples

SHARED = Path(__file__).parents[2] / "shared"


def shared_models() -> list:
    """Paths of all real models, or one skipped parameter where they are absent."""
    paths = sorted((SHARED / "models").glob("*.onnx"))
    return paths or [
        pytest.param(Path("absent"), marks=pytest.mark.skip("../shared is absent"))
    ]


def sane_feeds(model: Model, count: int = 1, seed: int = 0) -> Samples:
    """Random samples on which a model runs, with the sample rate that silero needs."""
    if {v.name for v in model.signature.inputs} == {"input", "state", "sr"}:
        rng = np.random.default_rng(seed)
        return Samples(
            {
                "input": rng.standard_normal((count, 1, 576)).astype(np.float32) * 0.1,
                "state": np.zeros((count, 2, 1, 128), np.float32),
                "sr": np.full(count, 16_000, np.int64),
            }
        )
    return random_inputs(model, count, seed=seed)
