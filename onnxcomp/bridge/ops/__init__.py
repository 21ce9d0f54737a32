"""The operators that the bridge has, one table per family."""

from __future__ import annotations

from collections.abc import Mapping

from onnxcomp.bridge.ops import (
    attention,
    elementwise,
    linear,
    normalisation,
    pooling,
    reductions,
    resize,
    shapes,
)
from onnxcomp.bridge.ops.base import Handler

HANDLERS: Mapping[str, Handler] = {
    **attention.HANDLERS,
    **elementwise.HANDLERS,
    **linear.HANDLERS,
    **normalisation.HANDLERS,
    **pooling.HANDLERS,
    **reductions.HANDLERS,
    **resize.HANDLERS,
    **shapes.HANDLERS,
}
"""Handlers by operator of the default domain."""

__all__ = ["HANDLERS"]
