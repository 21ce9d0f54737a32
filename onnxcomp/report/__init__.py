"""What a run found and did, as data; `text`, `html` and JSON are views of it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcomp.loading import write_text

if TYPE_CHECKING:
    from onnxcomp.analysis import Analysis
    from onnxcomp.bench import Benchmark
    from onnxcomp.passes.base import Refusal
    from onnxcomp.search.search import Point
    from onnxcomp.search.settings import Settings
    from onnxcomp.validation import Ladder

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Figures:
    """One model in numbers.

    Attributes:
        params: Parameters, shared tensors counted once.
        macs: Multiply-accumulates per sample.
        file_bytes: Size of the file with its external data.
        median_ms: Median latency of a run at batch 1, or at the declared batch; None where it
            was not measured.
    """

    params: int
    macs: int
    file_bytes: int
    median_ms: float | None

    @classmethod
    def of(cls, facts: Analysis, benchmark: Benchmark | None, index: int) -> Figures:
        """Return the figures of an analysed model that is number `index` in a benchmark."""
        ms = None if benchmark is None else benchmark.models[index].median_ms
        return cls(facts.cost.params, facts.cost.macs, facts.source.file_bytes, ms)


@dataclass(frozen=True)
class Action:
    """One thing that was done.

    Attributes:
        method: Name of the pass.
        where: Node or channel group.
        what: What became of it, in words.
        loss: Measured or interpolated loss of this action alone.
        macs: MACs that the node or the group's nodes had before.
    """

    method: str
    where: str
    what: str
    loss: float
    macs: int


@dataclass(frozen=True)
class Report:
    """Everything that a run of `compress` found and measured.

    Attributes:
        original: The vendor's model.
        result: The model that is shipped.
        actions: What was done.
        refusals: What was not done, and why.
        ladder: The validation ladder of the result.
        benchmark: Paired latency of original and result.
        notes: What the reader must know first.
        seconds: Wall time by phase.
        changed_macs: Share of the original's MACs in nodes that were changed.
        met: Whether all limits hold.
        settings: The resolved settings.
        predicted: The result's share of the original's time on a target that is another
            machine; None where the target is this one.
        front: What other limits would have given, most MACs first.
    """

    original: Figures
    result: Figures
    actions: tuple[Action, ...]
    refusals: tuple[Refusal, ...]
    ladder: Ladder
    benchmark: Benchmark | None
    notes: tuple[str, ...]
    seconds: Mapping[str, float]
    changed_macs: float
    met: bool
    settings: Settings
    predicted: float | None = None
    front: tuple[Point, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values; infinite numbers become None."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"schema_version": SCHEMA_VERSION, **{k: plain(v) for k, v in fields.items()}}

    def save(self, path: str | Path) -> None:
        """Write the report: `.html` as a self-contained page, otherwise JSON."""
        path = Path(path)
        if path.suffix == ".html":
            from onnxcomp.report.html import render

            write_text(path, render(self))
        else:
            write_text(path, json.dumps(self.to_json(), indent=1) + "\n")


def plain(value: Any) -> Any:
    """Return a value as JSON holds it: dataclasses as objects, no infinite numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
