"""What `sandbox.py` runs in a process of its own; nothing of onnxcomp is imported here.

The request comes as JSON on stdin. The answer goes as JSON to stdout: the `stage` that was
reached, and `kind` and text of the `error` that ended it, both empty where there was none.
"""

import json
import resource
import sys

_MOST_TEXT = 2000
_STDERR_BYTES = 2**20


def main() -> None:
    """Check, load and run the model that the request names, under the limits it gives."""
    request = json.load(sys.stdin)
    for limit, value in (
        (resource.RLIMIT_AS, request["memory_bytes"]),
        (resource.RLIMIT_CPU, request["cpu_seconds"]),
        (resource.RLIMIT_FSIZE, _STDERR_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (bound, bound))
    stages = Stages()
    try:
        stages.run(request["model"], request["feeds"])
    except Exception as error:
        answer = {
            "stage": stages.name,
            "kind": type(error).__name__,
            "error": (str(error).strip() or type(error).__name__)[:_MOST_TEXT],
        }
    else:
        answer = {"stage": stages.name, "kind": "", "error": ""}
    json.dump(answer, sys.stdout)


class Stages:
    """The steps a model goes through, with the name of the present one."""

    name = "start"

    def run(self, model: str, feeds: dict[str, str] | None) -> None:
        """Check a model file, open a session on it and run it once.

        Args:
            model: Path of the model.
            feeds: Path of a `.npy` file for each input, or None to stop after loading.
        """
        import numpy as np
        import onnx
        import onnxruntime as ort

        self.name = "check"
        onnx.checker.check_model(model, full_check=True)
        self.name = "load"
        ort.disable_telemetry_events()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        if feeds is None:
            return
        self.name = "run"
        arrays = {name: np.load(path, allow_pickle=False) for name, path in feeds.items()}
        session.run(None, arrays)


if __name__ == "__main__":
    main()
