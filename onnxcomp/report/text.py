"""Reports as tables for a terminal; nothing in a model's names is taken as markup."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from onnxcomp.bench import Benchmark, Ratio
    from onnxcomp.drift import Drift
    from onnxcomp.evaluate import Evaluation
    from onnxcomp.passes.base import Refusal
    from onnxcomp.report import Action, Figures, Report
    from onnxcomp.report.comparison import Comparison
    from onnxcomp.report.inspection import Inspection, Port
    from onnxcomp.search.settings import Limits

_MOST_ACTIONS = 30
_MOST_REASONS = 10
_MOST_NAMES = 3
_TIMING_NOISE = 0.01  # by which a second measurement of the same pair may differ


def clean(text: object) -> str:
    """Return text with everything that a terminal could act on written as an escape."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in str(text)
    )


def count(value: float) -> str:
    """Return a number of things with three digits and a prefix, such as "223 k"."""
    return _scaled(value, "")


def size(value: float) -> str:
    """Return bytes with three digits and a decimal prefix, such as "1.50 MB"."""
    return _scaled(value, "B")


def _scaled(value: float, unit: str) -> str:
    prefixes = ("", "k", "M", "G", "T")
    power = 0
    while abs(value) >= 999.5 and power < len(prefixes) - 1:
        value /= 1000
        power += 1
    digits = 0 if power == 0 or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {prefixes[power]}{unit}".rstrip()


def percent(share: float) -> str:
    """Return a share as a percentage."""
    return f"{100 * share:.1f} %"


def speedup(ratio: Ratio) -> str:
    """Return a latency ratio with its 95 % interval."""
    return f"{ratio.value:.2f}x (95 %: {ratio.low:.2f} to {ratio.high:.2f})"


def grouped_reasons(refusals: Iterable[Refusal]) -> list[tuple[str, list[str]]]:
    """Return the reasons, most frequent first, each with the places it applies to."""
    places: dict[str, list[str]] = {}
    for refusal in refusals:
        places.setdefault(refusal.reason, []).append(refusal.where)
    return sorted(places.items(), key=lambda item: (-len(item[1]), item[0]))


def unmet_limits(report: Report) -> list[str]:
    """Return the limits that the result breaks, with what was found."""
    original, result = report.original, report.result
    limits = report.settings.limits.absolute(
        original.macs, original.params, original.file_bytes
    )
    found = (
        ("--max-macs", limits.macs, result.macs, count),
        ("--max-params", limits.params, result.params, count),
        ("--max-size", limits.size, result.file_bytes, size),
    )
    broken = [
        f"{flag} {show(limit)}: found {show(value)}"
        for flag, limit, value, show in found
        if limit is not None and value > limit
    ]
    return broken + _unmet_judgement(report, limits)


def _unmet_judgement(report: Report, limits: Limits) -> list[str]:
    """Return the limits on drop, drift and time that the result breaks beyond doubt."""
    broken = []
    seen = report.ladder.evaluation
    if limits.drop is not None and seen is not None and (seen.drop or 0.0) > limits.drop:
        broken.append(f"--max-drop {limits.drop:.2%}: found {seen.drop:.2%}")
    if limits.drift is not None and seen is not None and seen.relative_l2 > limits.drift:
        broken.append(f"--max-drift {limits.drift:g}: found {seen.relative_l2:.3g}")
    return broken + _unmet_latency(report, limits.latency)


def _unmet_latency(report: Report, limit: float | None) -> list[str]:
    """Return the limit on the time if the result breaks it."""
    if limit is None:
        return []
    if report.predicted is not None:
        late = limit < report.predicted and limit <= 1
        return [f"--max-latency {limit:.2f}: predicted {report.predicted:.2f}"] if late else []
    if report.benchmark is None:
        return []
    base, timing = report.benchmark.models
    absolute = limit > 1
    share = limit / (1e3 * base.median_ms) if absolute else limit
    if 1.0 / timing.ratio.high <= share * (1 + _TIMING_NOISE):
        return []
    if absolute:
        return [f"--max-latency {limit / 1e3:g}ms: found {timing.median_ms:.3g}ms"]
    return [f"--max-latency {share:.2f}: found {1.0 / timing.ratio.value:.2f}"]


def report_view(report: Report) -> RenderableType:
    """Return the tables of a compression: notes first, then what was gained and lost."""
    parts: list[RenderableType] = [*_notes(report.notes)]
    parts.append(_figures("result", report.original, report.result, report.benchmark))
    parts += _judgement(report.ladder.evaluation)
    parts.append(Text(clean(report.ladder.note)))
    parts += [
        Text(f"validation: {'passed' if rung.passed else 'FAILED'} at '{rung.name}': ")
        + Text(clean(rung.detail))
        for rung in report.ladder.rungs
        if not rung.passed
    ]
    parts.append(_actions(report.actions, report.original.macs))
    parts.append(
        Text(f"{percent(report.changed_macs)} of the original's MACs are in reshaped nodes")
    )
    parts += _refusals(report.refusals)
    parts += [Text(f"limit not met: {line}", "bold red") for line in unmet_limits(report)]
    return Group(*parts)


def plan_view(report: Report) -> RenderableType:
    """Return the tables of a dry run: what would be done, and the figures it predicts."""
    dry = "dry run: the figures are predicted, and no model was made"
    parts: list[RenderableType] = [*_notes((dry, *report.notes))]
    parts.append(_figures("predicted", report.original, report.result, None))
    parts.append(_actions(report.actions, report.original.macs))
    parts += _refusals(report.refusals)
    return Group(*parts)


def comparison_view(comparison: Comparison) -> RenderableType:
    """Return the tables of `compare`."""
    parts: list[RenderableType] = [*_notes(comparison.notes)]
    before, after = comparison.original, comparison.candidate
    parts.append(_figures("candidate", before, after, comparison.benchmark))
    parts += _judgement(comparison.evaluation)
    if comparison.gates:
        table = _table("gate", "limit>", "found>", "")
        for gate in comparison.gates:
            verdict = Text("met", "green") if gate.met else Text("NOT MET", "bold red")
            table.add_row(gate.flag, f"{gate.limit:g}", f"{gate.found:.4g}", verdict)
        parts.append(table)
    return Group(*parts)


def benchmark_view(names: Sequence[str], benchmark: Benchmark) -> RenderableType:
    """Return the table of `bench`; speedups are over the first model."""
    table = _table("model", "median ms>", "p90 ms>", "speedup (95 % interval)", "by")
    rows = [*zip(names, benchmark.models, strict=True), ("A/A control", benchmark.control)]
    for name, timing in rows:
        clock = "wall time" if timing.cpu_ratio is None else "CPU time"
        ms = (f"{timing.median_ms:.3f}", f"{timing.p90_ms:.3f}")
        table.add_row(Text(clean(name)), *ms, speedup(timing.ratio), clock)
    machine = benchmark.machine
    where = (
        f"{clean(machine.cpu)}, {machine.cores} cores, {machine.threads} threads used, "
        f"onnxruntime {machine.onnxruntime}, {benchmark.visits} visits"
    )
    return Group(*_notes(benchmark.warnings), table, Text(where))


def inspection_view(inspection: Inspection) -> RenderableType:
    """Return the tables of `inspect`."""
    parts: list[RenderableType] = [*_notes(inspection.notes), _facts(inspection)]
    if inspection.layers:
        parts.append(_layers(inspection))
    if inspection.shared:
        table = _table("shared initializer", "shape", "read by")
        for tensor in inspection.shared:
            table.add_row(
                Text(clean(tensor.name)), _shape(tensor.shape), _names(tensor.readers)
            )
        parts.append(table)
    if inspection.repetitions:
        table = _table("repeated layers", "stage>", "place>", "kernel", "such as")
        for found in inspection.repetitions:
            place = ["" if n < 0 else str(n) for n in (found.stage, found.position)]
            kernel, members = _shape(found.kernel), _names(found.members)
            table.add_row(str(len(found.members)), *place, kernel, members)
        parts.append(table)
    if inspection.groups:
        table = _table("channel group", "size>", "made by", "read by", "why it must stay")
        for group in inspection.groups:
            made, read = _names(group.producers), _names(group.readers)
            pinned = Text(clean(group.pinned or ""))
            table.add_row(Text(clean(group.name)), str(group.size), made, read, pinned)
        parts.append(table)
    for view in inspection.passes:
        kind = "exact" if view.exact else "lossy"
        parts.append(
            Text(f"{view.name} ({kind}): {view.options} options, {len(view.refusals)} refused")
        )
        parts += _refusals(view.refusals)
    return Group(*parts)


def _facts(inspection: Inspection) -> Table:
    table = _table("", "")
    table.show_header = False
    operators = ", ".join(f"{n} {clean(op)}" for op, n in inspection.operators.items())
    cost = inspection.cost
    for label, value in (
        ("model", inspection.path),
        ("opset, IR", f"{inspection.opset}, {inspection.ir_version}"),
        ("producer", inspection.producer or "unknown"),
        ("inputs", "; ".join(_port(port) for port in inspection.inputs)),
        ("outputs", "; ".join(_port(port) for port in inspection.outputs)),
        ("file", size(inspection.file_bytes)),
        ("params", f"{count(cost.params)} ({size(cost.weight_bytes)})"),
        ("MACs per sample", count(cost.macs) if inspection.passes else "unknown"),
        ("operators", operators),
    ):
        table.add_row(label, Text(clean(value)))
    return table


def _layers(inspection: Inspection) -> Table:
    table = _table("layer", "op", "input", "output", "params>", "MACs>", "share>")
    for layer in inspection.layers:
        table.add_row(
            Text(clean(layer.name)),
            clean(layer.op),
            _shape(layer.in_shape),
            _shape(layer.out_shape),
            count(layer.params),
            count(layer.macs),
            percent(layer.share),
        )
    return table


def _figures(
    title: str, before: Figures, after: Figures, benchmark: Benchmark | None
) -> Table:
    table = _table("", "original>", f"{title}>", "ratio")
    for label, name, show in (
        ("params", "params", count),
        ("MACs", "macs", count),
        ("file size", "file_bytes", size),
    ):
        old, new = getattr(before, name), getattr(after, name)
        table.add_row(label, show(old), show(new), percent(new / old) if old else "")
    if benchmark is not None:
        first, second = benchmark.models
        ms = (f"{first.median_ms:.3f}", f"{second.median_ms:.3f}")
        table.add_row("median ms", *ms, f"speedup {speedup(second.ratio)}")
        table.add_row("A/A control", "", "", speedup(benchmark.control.ratio))
    return table


def _judgement(evaluation: Evaluation | None) -> list[RenderableType]:
    if evaluation is None:
        return []
    parts: list[RenderableType] = [_drifts(evaluation.drift)]
    before, after = evaluation.metric_reference, evaluation.metric_candidate
    if before is not None and after is not None and evaluation.drop is not None:
        line = f"{clean(evaluation.metric)}: {before:.4f} -> {after:.4f}"
        parts.append(Text(f"{line}, drop {evaluation.drop:+.4f}"))
    return parts


def _drifts(drifts: Mapping[str, Drift]) -> Table:
    table = _table("output", "relative L2>", "SQNR dB>", "top-1 agreement>", "max |change|>")
    for name, drift in drifts.items():
        table.add_row(
            Text(clean(name)),
            f"{drift.relative_l2:.4g}",
            "" if drift.sqnr_db is None else f"{drift.sqnr_db:.1f}",
            "" if drift.top1_agreement is None else percent(drift.top1_agreement),
            f"{drift.max_abs:.3g}",
        )
    return table


def _actions(actions: Sequence[Action], macs: int) -> RenderableType:
    if not actions:
        return Text("nothing was changed but what exact passes do")
    table = _table("method", "where", "what", "loss>", "share of MACs>")
    for action in sorted(actions, key=lambda a: -a.macs)[:_MOST_ACTIONS]:
        table.add_row(
            action.method,
            Text(clean(action.where)),
            Text(clean(action.what)),
            f"{action.loss:.2e}",
            percent(action.macs / macs) if macs else "",
        )
    more = len(actions) - _MOST_ACTIONS
    return Group(table, Text(f"and {more} more (all in --json)")) if more > 0 else table


def _refusals(refusals: Sequence[Refusal]) -> list[RenderableType]:
    if not refusals:
        return []
    table = _table("left alone>", "because", "such as")
    reasons = grouped_reasons(refusals)
    for reason, places in reasons[:_MOST_REASONS]:
        table.add_row(str(len(places)), Text(clean(reason)), _names(places))
    more = len(reasons) - _MOST_REASONS
    return [table, Text(f"and {more} more reasons (all in --json)")] if more > 0 else [table]


def _notes(notes: Iterable[str]) -> list[RenderableType]:
    return [Text(f"note: {clean(note)}", "yellow") for note in dict.fromkeys(notes) if note]


def _table(*headers: str) -> Table:
    """Return an empty table; a header that ends in ">" is of a column of numbers."""
    table = Table(box=box.SIMPLE_HEAD, safe_box=True, pad_edge=False)
    for header in headers:
        right = header.endswith(">")
        table.add_column(
            Text(header.removesuffix(">")),
            justify="right" if right else "left",
            no_wrap=right,
            overflow="fold",
        )
    return table


def _names(names: Sequence[str]) -> Text:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return Text(", ".join(clean(name) for name in names[:_MOST_NAMES]) + more)


def _shape(shape: Sequence[int | str] | None) -> Text:
    return Text("" if shape is None else "x".join(clean(dim) for dim in shape) or "scalar")


def _port(port: Port) -> str:
    shape = "of unknown rank" if port.shape is None else f"[{', '.join(map(str, port.shape))}]"
    return f"{port.name} {port.dtype} {shape}"
