"""The part of a convolution's window that a lighter operator reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

_SINGLES = {
    "row": ((True, False),),
    "column": ((False, True),),
    "cross": ((True, False), (False, True)),
}
_TAPS = 3  # of a dilated kernel, along each axis


@dataclass(frozen=True)
class Window:
    """Evenly spaced positions along each axis of a kernel.

    Attributes:
        starts: First position along each axis.
        counts: Positions along each axis.
        steps: Distance between them.
    """

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    steps: tuple[int, ...]

    def positions(self, extents: tuple[int, ...]) -> tuple[int, ...]:
        """Return the positions in a kernel of these extents, in C order."""
        flat = []
        for taps in product(*(range(n) for n in self.counts)):
            index = 0
            for tap, start, step, extent in zip(
                taps, self.starts, self.steps, extents, strict=True
            ):
                index = index * extent + start + tap * step
            flat.append(index)
        return tuple(flat)


def windows_of(form: str, extents: tuple[int, ...]) -> tuple[Window, ...]:
    """Return what a form reads of a kernel; nothing where it does not apply.

    Args:
        form: "grouped" reads all, "pointwise", "row", "column" the middle of some axes,
            "cross" is the sum of a row and a column, "dilated" reads both ends and the middle.
        extents: Of the kernel.
    """
    whole = Window((0,) * len(extents), extents, (1,) * len(extents))
    if form == "grouped":
        return (whole,)
    if form == "dilated":
        if not extents or any(k < 5 or k % 2 == 0 for k in extents):
            return ()
        steps = tuple(k // 2 for k in extents)
        return (Window(whole.starts, (_TAPS,) * len(extents), steps),)
    if all(k == 1 for k in extents):
        return ()
    if form == "pointwise":
        return (_middle(extents, (True,) * len(extents)),)
    if form not in _SINGLES or len(extents) != 2 or min(extents) == 1:
        return ()
    return tuple(_middle(extents, single) for single in _SINGLES[form])


def _middle(extents: tuple[int, ...], single: tuple[bool, ...]) -> Window:
    """Return the window of the middle of some axes and all of the others."""
    starts = tuple((k - 1) // 2 if one else 0 for k, one in zip(extents, single, strict=True))
    counts = tuple(1 if one else k for k, one in zip(extents, single, strict=True))
    return Window(starts, counts, (1,) * len(extents))


def cropped(
    attrs: Mapping[str, Any], extents: tuple[int, ...], window: Window
) -> dict[str, Any] | None:
    """Return the attributes of the convolution that reads a window only.

    The output keeps its shape: what the window leaves out comes off the padding.

    Args:
        attrs: Attributes of the Conv.
        extents: Of its kernel.
        window: What is read.

    Returns:
        The attributes, or None where there is less padding than that.
    """
    count = len(extents)
    dilations = list(attrs.get("dilations", (1,) * count))
    before = [s * d for s, d in zip(window.starts, dilations, strict=True)]
    spans = [d * (k - 1) for d, k in zip(dilations, extents, strict=True)]
    kept = [
        d * step * (n - 1)
        for d, step, n in zip(dilations, window.steps, window.counts, strict=True)
    ]
    after = [s - b - k for s, b, k in zip(spans, before, kept, strict=True)]
    found = dict(attrs) | {"kernel_shape": list(window.counts)}
    found["dilations"] = [d * step for d, step in zip(dilations, window.steps, strict=True)]
    crops = [*before, *after]
    implicit = str(attrs.get("auto_pad", "NOTSET")).startswith("SAME")
    stretched = any(step != 1 for step in found["dilations"])
    if not any(crops) and not (implicit and stretched):  # onnxruntime runs no such node
        return found
    pads = _pads(attrs, spans)
    if pads is None or any(p < crop for p, crop in zip(pads, crops, strict=True)):
        return None
    found.pop("auto_pad", None)
    found["pads"] = [p - crop for p, crop in zip(pads, crops, strict=True)]
    return found


def reads_middle(attrs: Mapping[str, Any], extents: tuple[int, ...]) -> bool:
    """Whether the middle of a kernel is at the output's own position, at stride 1."""
    dilations = attrs.get("dilations", (1,) * len(extents))
    pads = _pads(attrs, [d * (k - 1) for d, k in zip(dilations, extents, strict=True)])
    middle = [d * ((k - 1) // 2) for d, k in zip(dilations, extents, strict=True)]
    return pads is not None and list(pads[: len(extents)]) == middle


def _pads(attrs: Mapping[str, Any], spans: list[int]) -> list[int] | None:
    """Return the padding of a Conv; None where it depends on the size of the input."""
    auto = attrs.get("auto_pad", "NOTSET")
    count = len(spans)
    if auto == "NOTSET":
        return list(attrs.get("pads", (0,) * 2 * count))
    if auto == "VALID":
        return [0] * 2 * count
    if any(stride != 1 for stride in attrs.get("strides", ())):
        return None
    less, more = [s // 2 for s in spans], [s - s // 2 for s in spans]
    return [*less, *more] if auto == "SAME_UPPER" else [*more, *less]
