"""A report with hostile names, as the views may meet it."""

from onnxcomp.bench import Benchmark, Ratio, Timing, describe_machine
from onnxcomp.drift import Drift
from onnxcomp.evaluate import Evaluation
from onnxcomp.passes.base import Refusal
from onnxcomp.report import Action, Figures, Report
from onnxcomp.search.search import Point
from onnxcomp.search.settings import Limits, Settings
from onnxcomp.validation import Ladder, Rung

HOSTILE = '[bold]<script>alert("1")</script>\x1b[31m\n& [/bold]'
SAFE = '[bold]<script>alert("1")</script>\\x1b[31m\\n& [/bold]'  # as a terminal may see it


def made_up_report(**changes) -> Report:
    ratio, same = Ratio(1.5, 1.4, 1.6), Ratio(1.0, 0.99, 1.01)
    timings = (Timing(2.0, 2.1, same, same), Timing(1.3, 1.4, ratio, ratio))
    benchmark = Benchmark(timings, Timing(2.0, 2.1, same, same), 60, 3, describe_machine(), ())
    drift = {HOSTILE: Drift(0.01, 40.0, 0.99, 0.5)}
    evaluation = Evaluation(drift, 0.01, "top1", 0.98, 0.97, 0.01, 100, "user")
    content = {
        "original": Figures(1_000_000, 50_000_000, 4_000_000, 2.0),
        "result": Figures(500_000, 30_000_000, 2_000_000, 1.3),
        "actions": tuple(
            Action("factorize", f"{HOSTILE}{i}", f"rank {i}", 1e-3 * i, 1000 * i)
            for i in range(40)
        ),
        "refusals": (
            *(Refusal(f"node{i}", "the target calls it slower") for i in range(5)),
            *(Refusal(f"node{i}", f"reason {i}") for i in range(12)),
        ),
        "ladder": Ladder("judged on 100 samples", (Rung("load", True, HOSTILE),), evaluation),
        "benchmark": benchmark,
        "notes": ("no samples given: fitted and judged on random inputs only",),
        "seconds": {"walk": 1.5},
        "changed_macs": 0.8,
        "met": True,
        "settings": Settings(limits=Limits(macs=0.6)),
        "front": (Point(0.9, 0.8, 0.7, 0.6, 1e-4), Point(0.5, 0.4, 0.3, 0.2, 1e-2, 0.0225)),
    }
    return Report(**{**content, **changes})
