"""The first load and run of an unknown model, in a child process that can only fail alone.

The checker, shape inference and onnxruntime are C++ on untrusted input, and none of them
bounds its own time or memory. So the child gets limits on address space, CPU time and written
bytes, an empty folder as working directory (onnxruntime looks for external data there), and
is killed with its process group when its time is over.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import ExecutionError, InvalidModelError, UnsupportedModelError
from onnxcomp.loading import LoadedModel, write_model

# Measured: the libraries take 0.16 GB of addresses, checking and loading twice the model's
# size; the rest is for what it computes.
_BASE_BYTES = 4 * 2**30
_BYTES_PER_MODEL_BYTE = 6
_MISSING = ("NotImplemented", "not a registered", "NOT_IMPLEMENTED", "opset", "IR version")


def first_run(
    loaded: LoadedModel,
    feeds: Mapping[str, npt.NDArray[Any]] | None = None,
    *,
    timeout_s: float = 60.0,
    memory_bytes: int | None = None,
) -> None:
    """Check a model in full, load it with all optimisations and run it once, all in a child.

    Args:
        loaded: A model from `read_model`.
        feeds: One array per input; None stops after loading.
        timeout_s: Wall time for all of it, in seconds.
        memory_bytes: Address space of the child; if None, 4 GiB and six times the size of
            the model and of the feeds.

    Raises:
        InvalidModelError: The checker or strict shape inference refuse the model.
        UnsupportedModelError: Onnxruntime lacks an operator of the model.
        ExecutionError: Onnxruntime fails on it, or it ran out of time or memory.
    """
    arrays = (*loaded.external.values(), *(feeds or {}).values())
    size = loaded.proto.ByteSize() + sum(array.nbytes for array in arrays)
    limit = memory_bytes or _BASE_BYTES + _BYTES_PER_MODEL_BYTE * size
    with tempfile.TemporaryDirectory(prefix="onnxcomp-") as name:
        folder = Path(name)
        working = folder / "empty"
        working.mkdir()
        request = {
            "model": str(_model_file(loaded, folder)),
            "feeds": None if feeds is None else _feeds_files(feeds, folder),
            "memory_bytes": limit,
            "cpu_seconds": math.ceil(timeout_s) + 1,
        }
        stage, kind, reason = _ask_child(request, working, folder / "stderr", timeout_s)
    _raise_for(stage, kind, reason)


def _model_file(loaded: LoadedModel, folder: Path) -> Path:
    """Return the file itself, or a copy where the checker would refuse it as it is."""
    if not (loaded.reordered or loaded.packed):
        return loaded.path
    copy = folder / "model.onnx"
    write_model(loaded.proto, copy, external=loaded.external)
    return copy


def _feeds_files(feeds: Mapping[str, npt.NDArray[Any]], folder: Path) -> dict[str, str]:
    """Save each array under a number, for names of inputs may be anything."""
    files: dict[str, str] = {}
    for index, (name, array) in enumerate(feeds.items()):
        files[name] = str(folder / f"{index}.npy")
        np.save(files[name], array, allow_pickle=False)
    return files


def _ask_child(
    request: Mapping[str, Any], working: Path, stderr: Path, timeout_s: float
) -> tuple[str, str, str]:
    """Return the stage that the child reached, and the kind of its error with the reason.

    Both are empty where all went well.
    """
    child = Path(__file__).with_name("sandbox_child.py")
    # The address space of thread pools would count; onnxruntime leaves a file in TMPDIR.
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TMPDIR": str(working),
    }
    with (
        stderr.open("wb") as errors,
        subprocess.Popen(
            [sys.executable, "-P", str(child)],
            cwd=working,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        ) as process,
    ):
        try:
            output, _ = process.communicate(json.dumps(request).encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return "", "Timeout", f"it did not end within {timeout_s:g} s"
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
    try:
        answer = json.loads(output)
        return answer["stage"], answer["kind"], answer["error"]
    except (ValueError, KeyError):
        return "", "Crash", _crash_reason(process.returncode, stderr)


def _crash_reason(code: int, stderr: Path) -> str:
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    lines = stderr.read_text(errors="replace").strip().splitlines()
    return f"the process ended with code {code}: {lines[-1] if lines else 'no message'}"


def _raise_for(stage: str, kind: str, reason: str) -> None:
    """Raise the error of the stage in which the child failed, if it did."""
    if not kind:
        return
    line = reason.splitlines()[-1][:500]
    if stage == "check" and kind in ("ValidationError", "InferenceError"):
        raise InvalidModelError(f"the model breaks the ONNX specification: {line}")
    if stage == "load" and any(word in reason or word == kind for word in _MISSING):
        raise UnsupportedModelError(f"onnxruntime does not support the model: {line}")
    verb = {"check": "check", "load": "load", "run": "run"}.get(stage, "load and run")
    raise ExecutionError(f"a first attempt to {verb} the model failed: {line}")
