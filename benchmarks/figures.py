"""The figures of the benchmarks; matplotlib is imported where one is drawn."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import SkippedError


@dataclass(frozen=True)
class Style:
    """How a method is named and drawn."""

    label: str
    colour: str
    marker: str


METHODS: Mapping[str, Style] = {
    "onnxcomp_off": Style("onnxcomp, free ranks", "C0", "o"),
    "onnxcomp_auto": Style("onnxcomp, target's grid", "C9", "o"),
    "widths": Style("uniform widths, solved", "C4", "D"),
    "output_basis": Style("uniform ranks, solved", "C5", "D"),
    "svd": Style("plain SVD of each layer", "C1", "s"),
    "magnitude": Style("magnitude pruning", "C7", "x"),
    "magnitude_statistics": Style("magnitude, BatchNorm re-estimated", "C6", "x"),
    "wanda": Style("onnxsim, activations", "C2", "^"),
    "l2": Style("onnxsim, weights", "C3", "v"),
}
OTHERS = ("widths", "output_basis", "svd", "magnitude", "magnitude_statistics")
"""The methods of `baselines`, which take a share of the MACs."""
ONNXSIM = ("wanda", "l2")
"""The rankings of `peers`, which take a sparsity."""


def require_matplotlib() -> None:
    """Raise `SkippedError` where there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SkippedError("matplotlib is absent: install it")


def accuracy_curve(
    means: Sequence[Mapping[str, Any]], originals: Mapping[str, float], path: Path
) -> None:
    """Draw top-1 against MACs, one panel per network.

    Args:
        means: `model`, `method`, `images`, `limit`, `macs` and `top1`; of each network those
            with its largest number of images and a limit that is no time are drawn.
        originals: Top-1 of the networks.
        path: PNG file to write.
    """
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(
        1,
        len(originals),
        figsize=(4.2 * len(originals) + 2.2, 3.8),
        sharey=True,
        squeeze=False,
        dpi=160,
    )
    for panel, (model, top1) in zip(panels[0], originals.items(), strict=True):
        own = [r for r in means if r["model"] == model and r["limit"][0] != "max_latency"]
        images = max((row["images"] for row in own), default=0)
        panel.axhline(100 * top1, color="0.6", linewidth=1, linestyle="--")
        panel.annotate(
            f"original {100 * top1:.2f} %",
            (0.02, 100 * top1 + 1.2),
            xycoords=("axes fraction", "data"),
            fontsize=8,
        )
        for method, style in METHODS.items():
            line = sorted(
                (100 * row["macs"], 100 * row["top1"])
                for row in own
                if row["method"] == method and row["images"] == images
            )
            if line:
                x, y = zip(*line, strict=True)
                panel.plot(
                    x, y, color=style.colour, marker=style.marker, ms=4, label=style.label
                )
        panel.set_title(model.rpartition("_")[2].replace("resnet", "ResNet-"), fontsize=10)
        panel.set_xlabel("MACs, % of the original")
        _plain(panel)
    panels[0, 0].set_ylabel("CIFAR-10 top-1, %")
    panels[0, 0].set_ylim(0, 100)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="center right")
    figure.tight_layout(rect=(0, 0, 1 - 2.3 / figure.get_figwidth(), 1))
    figure.savefig(path)
    pyplot.close(figure)


def scatter(
    x: Sequence[float],
    y: Sequence[float],
    path: Path,
    *,
    labels: tuple[str, str],
    factor: float,
    logarithmic: bool = True,
) -> None:
    """Draw points against the diagonal, with a band of a factor around it.

    Args:
        x: What was predicted.
        y: What was measured.
        path: PNG file to write.
        labels: Of both axes.
        factor: Above 1; the band reaches from the diagonal over it to the diagonal times it.
        logarithmic: Both axes.
    """
    pyplot = _pyplot()
    figure, panel = pyplot.subplots(figsize=(4.4, 4.0), dpi=160)
    ends = [0.8 * min(*x, *y), 1.25 * max(*x, *y)]
    panel.plot(ends, ends, color="0.5", linewidth=1)
    low, high = ([f * end for end in ends] for f in (1 / factor, factor))
    panel.fill_between(ends, low, high, color="0.93", linewidth=0)
    panel.scatter(x, y, s=14, color="C0")
    if logarithmic:
        from matplotlib.ticker import LogLocator, NullLocator

        panel.set_xscale("log")
        panel.set_yscale("log")
        for axis in (panel.xaxis, panel.yaxis):  # the default's labels overlap
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter("{x:g}")
    panel.set_xlim(*ends)
    panel.set_ylim(*ends)
    panel.set_xlabel(labels[0])
    panel.set_ylabel(labels[1])
    _plain(panel)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _plain(panel: Any) -> None:
    panel.grid(color="0.92")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
