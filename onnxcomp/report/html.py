"""Reports as one HTML page each: no scripts, nothing loaded, light or dark by the reader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from onnxcomp.report.figures import latency_figure, losses_figure, macs_figure
from onnxcomp.report.text import clean, count, grouped_reasons, percent, size, speedup

if TYPE_CHECKING:
    from onnxcomp.passes.base import Refusal
    from onnxcomp.report import Report
    from onnxcomp.report.inspection import Inspection, LayerChange, Port
    from onnxcomp.search.search import Point
    from onnxcomp.validation import Ladder

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #6a737d;
  --line: #d8dee4; --accent: #2563a8; --warn: #8a4b00; --warn-paper: #fff4e0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --paper: #14181c;
  --soft: #98a2ad; --line: #343b43; --accent: #6aa9ec; --warn: #ffc56b;
  --warn-paper: #33270f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; color: var(--ink);
  background: var(--paper); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.note { color: var(--warn); background: var(--warn-paper); border-left: 4px solid;
  padding: .4rem .7rem; margin: .5rem 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; min-width: 8rem; }
th { color: var(--soft); font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.number, .tight { white-space: nowrap; min-width: 0; }
figure { margin: 1rem 0; } figcaption { color: var(--soft); margin-bottom: .4rem; }
svg { width: 100%; min-width: 34rem; height: auto; display: block; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); dominant-baseline: middle; }
svg .name, svg .value { text-anchor: end; } svg .value { fill: var(--soft); }
svg .before { fill: none; stroke: var(--soft); } svg .after, svg .dot { fill: var(--accent); }
svg .interval { stroke: var(--accent); stroke-width: 3; }
svg .one { stroke: var(--soft); stroke-dasharray: 3 3; }
details { margin: .5rem 0; } summary { cursor: pointer; }
"""


def render(report: Report, layers: Sequence[LayerChange] = ()) -> str:
    """Return the page of a compression.

    Args:
        report: What was found and measured.
        layers: MACs of each layer before and after, for the figure of them.
    """
    before, after = report.original, report.result
    verdict = "" if report.met else "A limit was not met; this is the best that was found."
    parts = [
        "<h1>Compression report</h1>",
        _notes([verdict, *report.notes]),
        _table(
            ["|", "original>", "result>", "ratio"],
            [
                _figures_row("parameters", before.params, after.params, count),
                _figures_row("MACs per sample", before.macs, after.macs, count),
                _figures_row("file size", before.file_bytes, after.file_bytes, size),
                *_latency_rows(report),
            ],
        ),
        _latency(report),
        macs_figure(layers),
        _section("What it cost", _judgement(report.ladder)),
        _section("What was done", _actions(report)),
        _section("What was left alone, and why", _refusals(report.refusals)),
        _section("What other limits would have given", _front(report.front)),
        _section("Validation", _ladder(report.ladder)),
        _section("Seconds by phase", _seconds(report)),
    ]
    return _page("Compression report", parts)


def render_inspection(inspection: Inspection) -> str:
    """Return the page of an inspected model."""
    cost = inspection.cost
    facts = [
        ["opset, IR", f"{inspection.opset}, {inspection.ir_version}"],
        ["producer", inspection.producer or "unknown"],
        ["inputs", "; ".join(map(_port, inspection.inputs))],
        ["outputs", "; ".join(map(_port, inspection.outputs))],
        ["file", size(inspection.file_bytes)],
        ["parameters", f"{count(cost.params)} ({size(cost.weight_bytes)})"],
        ["MACs per sample", count(cost.macs) if inspection.passes else "unknown"],
        ["operators", ", ".join(f"{n} {op}" for op, n in inspection.operators.items())],
    ]
    layers = [
        [
            la.name,
            la.op,
            _shape(la.in_shape),
            _shape(la.out_shape),
            count(la.params),
            count(la.macs),
            percent(la.share),
        ]
        for la in inspection.layers
    ]
    shared = [[t.name, _shape(t.shape), ", ".join(t.readers)] for t in inspection.shared]
    repeated = [
        [str(r.stage), str(r.position), _shape(r.kernel), ", ".join(r.members)]
        for r in inspection.repetitions
    ]
    groups = [
        [g.name, str(g.size), ", ".join(g.producers), ", ".join(g.readers), g.pinned or ""]
        for g in inspection.groups
    ]
    header = ["layer", "op|", "input|", "output|", "params>", "MACs>", "share>"]
    made = ["group", "channels>", "made by", "read by", "why it must stay"]
    parts = [
        f"<h1>{_text(inspection.path or 'Model')}</h1>",
        _notes(inspection.notes),
        _table(["|", ""], facts),
        _section("Layers", _table(header, layers)),
        _section(
            "Repeated layers", _table(["stage>", "place>", "kernel|", "layers"], repeated)
        ),
        _section("Shared initializers", _table(["name", "shape|", "read by"], shared)),
        _section("Channel groups", _table(made, groups)),
    ]
    passes = []
    for view in inspection.passes:
        kind = "exact" if view.exact else "lossy"
        passes.append([view.name, kind, str(view.options), str(len(view.refusals))])
    header = ["pass|", "|", "options>", "refused>"]
    parts.append(_section("What each pass could do", _table(header, passes)))
    for view in inspection.passes:
        parts.append(_section(f"Left alone by {view.name}", _refusals(view.refusals)))
    return _page(inspection.path or "Model", parts)


def _page(title: str, parts: Iterable[str]) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _figures_row(
    label: str, before: int, after: int, show: Callable[[float], str]
) -> list[str]:
    return [label, show(before), show(after), percent(after / before) if before else ""]


def _latency_rows(report: Report) -> list[list[str]]:
    if report.benchmark is None:
        return []
    first, second = report.benchmark.models
    control = report.benchmark.control.ratio
    return [
        [
            "median ms",
            f"{first.median_ms:.3f}",
            f"{second.median_ms:.3f}",
            speedup(second.ratio),
        ],
        ["A/A control", "", "", speedup(control)],
    ]


def _latency(report: Report) -> str:
    if report.benchmark is None:
        return ""
    machine = report.benchmark.machine
    where = f"{machine.cpu}, {machine.threads} threads, onnxruntime {machine.onnxruntime}"
    return latency_figure(["original", "result"], report.benchmark) + f"<p>{_text(where)}</p>"


def _judgement(ladder: Ladder) -> str:
    evaluation = ladder.evaluation
    if evaluation is None:
        return ""
    rows = [
        [
            name,
            f"{drift.relative_l2:.4g}",
            "" if drift.sqnr_db is None else f"{drift.sqnr_db:.1f}",
            "" if drift.top1_agreement is None else percent(drift.top1_agreement),
            f"{drift.max_abs:.3g}",
        ]
        for name, drift in evaluation.drift.items()
    ]
    header = ["output", "relative L2>", "SQNR dB>", "top-1 agreement>", "max |change|>"]
    before, after = evaluation.metric_reference, evaluation.metric_candidate
    line = ""
    if before is not None and after is not None and evaluation.drop is not None:
        line = f"{evaluation.metric}: {before:.4f}, then {after:.4f}"
        line = f"<p>{_text(line)} (drop {evaluation.drop:+.4f})</p>"
    return _table(header, rows) + line + f"<p>{_text(ladder.note)}</p>"


def _actions(report: Report) -> str:
    if not report.actions:
        return "<p>Nothing was changed but what exact passes do.</p>"
    macs = report.original.macs
    rows = [
        [a.method, a.where, a.what, f"{a.loss:.2e}", percent(a.macs / macs) if macs else ""]
        for a in sorted(report.actions, key=lambda action: -action.macs)
    ]
    header = ["method|", "where", "what", "loss>", "share of MACs>"]
    share = percent(report.changed_macs)
    line = f"<p>{share} of the original's MACs are in reshaped nodes.</p>"
    return (
        line
        + _folded(f"{len(rows)} actions", _table(header, rows))
        + losses_figure(report.actions)
    )


def _front(points: Sequence[Point]) -> str:
    """Return what a front says; changes are told as roots, as drift is."""
    rows = [
        [
            *map(percent, (point.macs, point.params, point.file_bytes, point.seconds)),
            percent(max(point.loss, 0.0) ** 0.5),
            "" if point.error is None else percent(point.error**0.5),
        ]
        for point in points
    ]
    costs = ["MACs>", "parameters>", "file size>", "predicted time>"]
    line = (
        "<p>Change of the raw outputs relative to how much they vary (standard deviation).</p>"
    )
    return line + _table([*costs, "predicted change>", "found>"], rows) if rows else ""


def _refusals(refusals: Sequence[Refusal]) -> str:
    rows = [
        [str(len(places)), reason, ", ".join(places)]
        for reason, places in grouped_reasons(refusals)
    ]
    if not rows:
        return ""
    table = _table(["places>", "reason", "where"], rows)
    return _folded(f"{len(refusals)} places, {len(rows)} reasons", table)


def _ladder(ladder: Ladder) -> str:
    rows = [[r.name, "passed" if r.passed else "FAILED", r.detail] for r in ladder.rungs]
    return _table(["check|", "|", "found"], rows)


def _seconds(report: Report) -> str:
    rows = [[phase, f"{seconds:.1f}"] for phase, seconds in report.seconds.items()]
    return _table(["phase", "seconds>"], rows)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>" if content else ""


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{_text(summary)}</summary>{content}</details>"


def _notes(notes: Iterable[str]) -> str:
    shown = [note for note in dict.fromkeys(notes) if note]
    return "".join(f'<p class="note">{_text(note)}</p>' for note in shown)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; headers end in ">" over numbers and in "|" over what is not broken."""
    if not rows:
        return ""
    classes = {">": ' class="number"', "|": ' class="tight"'}
    kinds = [classes.get(title[-1:], "") for title in header]
    head = "".join(
        f"<th{kind}>{_text(title[:-1] if kind else title)}</th>"
        for kind, title in zip(kinds, header, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{kind}>{_text(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    top = (
        f"<thead><tr>{head}</tr></thead>"
        if any(title not in ("", "|", ">") for title in header)
        else ""
    )
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>'


def _text(text: str) -> str:
    return escape(clean(text))


def _shape(shape: Sequence[int] | None) -> str:
    return "" if shape is None else "x".join(map(str, shape)) or "scalar"


def _port(port: Port) -> str:
    shape = "of unknown rank" if port.shape is None else f"[{', '.join(map(str, port.shape))}]"
    return f"{port.name} {port.dtype} {shape}"
