"""Where further plans come from: losses measured again, shaken, or without one option."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnxcomp.search.losses import Losses
from onnxcomp.search.space import Plan

_WEIGHTY = 0.8  # share of the predicted loss in the options that are measured again
_SPREAD = 0.25  # of the logarithm of losses, where they are shaken


def weighty(plan: Plan, losses: Losses) -> list[str]:
    """Return the nodes and groups of a plan that carry most of its predicted loss."""
    parts = losses.of(plan)
    total, found, seen = sum(parts.values()), dict[str, None](), 0.0
    for part in sorted(parts, key=lambda p: -parts[p]):
        if seen > _WEIGHTY * total:
            break
        found[part if isinstance(part, str) else part.target] = None
        seen += parts[part]
    return list(found)


def shaken(losses: Losses, rng: np.random.Generator) -> Losses:
    """Return losses multiplied by random factors, one for each node and group."""
    factors: dict[str, float] = {}

    def factor(name: str) -> float:
        if name not in factors:
            factors[name] = float(np.exp(_SPREAD * rng.standard_normal()))
        return factors[name]

    return replace(
        losses,
        forms={o: lost * factor(o.target) for o, lost in losses.forms.items()},
        widths={
            name: {w: lost * factor(name) for w, lost in widths.items()}
            for name, widths in losses.widths.items()
        },
        joint=replace(
            losses.joint,
            losses={(n, o): lost * factor(n) for (n, o), lost in losses.joint.losses.items()},
        ),
    )


def swapped(losses: Losses, plan: Plan, rng: np.random.Generator) -> Losses:
    """Return losses without one option of a plan, so that the next plan does without it.

    Its node or group takes a neighbour of it and the others make up for what that costs.  It
    is drawn in proportion to what it loses; a plan of common factors alone has none, so that
    the losses are shaken.
    """
    parts = losses.of(plan)
    total = sum(parts.values())
    if not total:
        return shaken(losses, rng)
    shares = [lost / total for lost in parts.values()]
    gone = list(parts)[int(rng.choice(len(parts), p=shares))]
    if not isinstance(gone, str):
        return replace(losses, forms={o: v for o, v in losses.forms.items() if o != gone})
    left = {w: v for w, v in losses.widths[gone].items() if w != plan.widths[gone]}
    return replace(losses, widths={**losses.widths, gone: left})
