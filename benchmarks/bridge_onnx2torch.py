"""A graph through onnx2torch; run by a Python that has it, as its pins are its own.

Arguments: the graph, and a `.npz` of one feed ("in:NAME") and onnxruntime's answer ("out:I",
in the graph's order).  Writes to stdout JSON: the relative L2 of the worst output and the
number of Parameters, or why there is none.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import numpy as np
import torch

# onnx2torch imports torchvision, whose wheels look for operators that a CPU build lacks.
_MISSING = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _MISSING.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import onnx2torch  # noqa: E402  # behind what it needs


def main() -> None:
    """Answer for the files named on the command line."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with np.load(sys.argv[2]) as file:
        arrays = dict(file)
    feed = [torch.from_numpy(a) for name, a in arrays.items() if name.startswith("in:")]
    expected = [a for name, a in arrays.items() if name.startswith("out:")]
    try:
        module = onnx2torch.convert(sys.argv[1]).eval()
        with torch.no_grad():
            found = module(*feed)
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        print(json.dumps({"failed": f"{type(error).__name__}: {said[0]}"}))
        return
    outputs = [found] if isinstance(found, torch.Tensor) else list(found)
    drift = max(_drift(a, b.numpy()) for a, b in zip(expected, outputs, strict=True))
    print(json.dumps({"drift": drift, "parameters": len(list(module.parameters()))}))


def _drift(reference: Any, found: Any) -> float:
    if reference.shape != found.shape:
        return 1.0
    signal = float(np.linalg.norm(reference.astype(np.float64)))
    noise = float(np.linalg.norm(reference.astype(np.float64) - found))
    return noise / signal if signal else float(noise > 0)


if __name__ == "__main__":
    main()
