"""Figures of a report as inline SVG, drawn from rectangles, lines and text."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from onnxcomp.report.text import clean, count

if TYPE_CHECKING:
    from onnxcomp.bench import Benchmark
    from onnxcomp.report import Action
    from onnxcomp.report.inspection import LayerChange

_WIDTH = 640
_LABEL = 210  # of the width, for names
_VALUE = 130  # of the width, for numbers
_ROW = 22
_MOST_ROWS = 60
_NAME = 30  # characters of a name that fit


def macs_figure(layers: Sequence[LayerChange]) -> str:
    """Return bars of the MACs of every layer: outlined before, filled after."""
    shown = [layers[i] for i in _largest([layer.before for layer in layers])]
    top = max([max(layer.before, layer.after) for layer in shown], default=0) or 1
    rows = []
    for index, layer in enumerate(shown):
        y = index * _ROW
        rows.append(_label(y, layer.name))
        rows.append(_bar(y, layer.before / top, "before"))
        rows.append(_bar(y, layer.after / top, "after"))
        rows.append(_value(y, f"{count(layer.after)} of {count(layer.before)}"))
    title = "MACs of each layer: outline before, filled after"
    return _figure(title, rows, len(shown))


def losses_figure(actions: Sequence[Action]) -> str:
    """Return bars of the loss of every action, largest first."""
    shown = sorted(actions, key=lambda action: -action.loss)[:_MOST_ROWS]
    top = max([action.loss for action in shown], default=0.0) or 1.0
    rows = []
    for index, action in enumerate(shown):
        y = index * _ROW
        rows.append(_label(y, action.where, action.what))
        rows.append(_bar(y, max(action.loss, 0.0) / top, "after"))
        rows.append(_value(y, f"{action.loss:.2e}"))
    return _figure("Loss of each action alone", rows, len(shown))


def latency_figure(names: Sequence[str], benchmark: Benchmark) -> str:
    """Return speedups over the first model with their 95 % intervals, and the A/A control."""
    timings = [*zip(names, benchmark.models, strict=True)][1:]
    timings.append(("A/A control", benchmark.control))
    ratios = [(name, timing.ratio) for name, timing in timings]
    low = min(0.95, *(ratio.low for _, ratio in ratios))
    high = max(1.05, *(ratio.high for _, ratio in ratios))
    scale = (_WIDTH - _LABEL - _VALUE - 20) / (high - low)

    def x(value: float) -> float:
        return _LABEL + 10 + (value - low) * scale

    height = len(ratios) * _ROW
    rows = [f'<line class="one" x1="{x(1):.1f}" x2="{x(1):.1f}" y1="0" y2="{height}"/>']
    for index, (name, ratio) in enumerate(ratios):
        y = index * _ROW
        middle = y + _ROW / 2
        rows.append(_label(y, name))
        rows.append(
            f'<line class="interval" x1="{x(ratio.low):.1f}" x2="{x(ratio.high):.1f}" '
            f'y1="{middle}" y2="{middle}"/>'
            f'<circle class="dot" cx="{x(ratio.value):.1f}" cy="{middle}" r="4"/>'
        )
        rows.append(_value(y, f"{ratio.value:.2f}x"))
    return _figure("Speedup with its 95 % interval; the line is 1", rows, len(ratios))


def _largest(scores: Sequence[float]) -> list[int]:
    """Return the positions of the largest scores, as many as a figure has rows."""
    ranked = sorted(range(len(scores)), key=lambda index: -scores[index])
    return sorted(ranked[:_MOST_ROWS])


def _figure(title: str, rows: Sequence[str], count: int) -> str:
    if not count:
        return ""
    height = count * _ROW
    return (
        f'<figure class="wide"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(rows)}</svg></figure>"
    )


def _label(y: float, name: str, detail: str = "") -> str:
    name = clean(name)
    short = name if len(name) <= _NAME else "..." + name[-_NAME + 3 :]
    whole = f"{name}: {clean(detail)}" if detail else name
    return (
        f'<text class="name" x="{_LABEL}" y="{y + _ROW / 2}">{escape(short)}'
        f"<title>{escape(whole)}</title></text>"
    )


def _bar(y: float, share: float, kind: str) -> str:
    width = max(share, 0.0) * (_WIDTH - _LABEL - _VALUE - 20)
    return (
        f'<rect class="{kind}" x="{_LABEL + 8}" y="{y + 4}" width="{width:.1f}" '
        f'height="{_ROW - 8}"/>'
    )


def _value(y: float, text: str) -> str:
    return f'<text class="value" x="{_WIDTH - 2}" y="{y + _ROW / 2}">{escape(text)}</text>'
