"""What a model becomes when its local functions are expanded and its loops run.

Both are decided by counting over the call graph, without expanding anything: 25 functions
that call each other twice fit in 2 kB and are 2^24 nodes to a runtime.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from onnxcomp.errors import InvalidModelError, UnsupportedModelError
from onnxcomp.loading.constants import Constants
from onnxcomp.loading.limits import LoadLimits
from onnxcomp.loading.structure import (
    DEFAULT_DOMAINS,
    Body,
    FunctionKey,
    Structure,
    describe,
    function_key,
)


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of a local function: its loop iterations and sub-graph depth so far."""

    function: FunctionKey
    trips: int
    depth: int


@dataclass(slots=True)
class _Size:
    """What one function, or the main graph, amounts to; with its calls once expanded."""

    where: str
    nodes: int = 0
    trips: int = 1
    depth: int = 0
    calls: list[_Call] = field(default_factory=list)


def check_expansion(
    structure: Structure, constants: Sequence[Constants], limits: LoadLimits
) -> None:
    """Refuse recursion, and functions, loops or sub-graphs that multiply beyond the limits.

    Args:
        structure: The bodies of the model.
        constants: The constants of each body, in the same order.
        limits: Bounds on nodes, loop trips and depth after expansion.

    Raises:
        InvalidModelError: A function calls itself, or a limit is broken.
        UnsupportedModelError: A Loop decides while it runs how often it does.
    """
    sizes = _sizes(structure, constants)
    for name in _callees_first(
        {key: [c.function for c in s.calls] for key, s in sizes.items()}
    ):
        size = sizes[name]
        for call in size.calls:
            callee = sizes[call.function]
            size.nodes += callee.nodes
            size.trips = max(size.trips, call.trips * callee.trips)
            size.depth = max(size.depth, call.depth + callee.depth)
        for what, got, most in (
            ("nodes", size.nodes, limits.nodes),
            ("loop iterations", size.trips, limits.loop_trips),
            ("sub-graphs inside one another", size.depth, limits.graph_depth),
        ):
            if got > most:
                raise InvalidModelError(
                    f"{size.where} expands to {min(got, 10**18)} {what}; at most {most} are "
                    "allowed"
                )


def _sizes(
    structure: Structure, constants: Sequence[Constants]
) -> dict[FunctionKey | None, _Size]:
    """Return the sizes of the main graph (None) and of each function before expansion."""
    sizes: dict[FunctionKey | None, _Size] = {None: _Size("the graph")}
    roots: dict[int, _Size] = {id(structure.bodies[0]): sizes[None]}
    for key, body in structure.functions.items():
        sizes[key] = roots[id(body)] = _Size(body.where)
    trips: dict[int, int] = {}
    scopes = {id(body): c for body, c in zip(structure.bodies, constants, strict=True)}
    for body in structure.bodies:
        trips[id(body)] = 1
        if body.parent is not None:
            roots[id(body)] = roots[id(body.parent)]
            own = _loop_trips(body, scopes[id(body.parent)])
            trips[id(body)] = trips[id(body.parent)] * own
        size = roots[id(body)]
        size.nodes += len(body.proto.node)
        size.trips = max(size.trips, trips[id(body)])
        size.depth = max(size.depth, body.depth)
        for node in body.proto.node:
            key = function_key(node)
            if key in structure.functions:
                size.calls.append(_Call(key, trips[id(body)], body.depth))
    return sizes


def _loop_trips(body: Body, around: Constants) -> int:
    """Return how often a sub-graph runs each time its node does; Scan is bound by its data."""
    node = body.owner
    if node is None or node.op_type != "Loop" or node.domain not in DEFAULT_DOMAINS:
        return 1
    known = around.integers(node.input[0]) if node.input and node.input[0] else None
    if known is None or len(known) != 1:
        raise UnsupportedModelError(
            f"{describe(node)} decides while it runs how often it does; export the model with "
            "a constant number of iterations"
        )
    return max(1, known[0])


def _callees_first(
    calls: Mapping[FunctionKey | None, Sequence[FunctionKey]],
) -> list[FunctionKey | None]:
    """Return functions and main graph so that all calls come before their callers."""
    order: dict[FunctionKey | None, None] = {}
    active: dict[FunctionKey | None, int] = {}
    for start in calls:
        stack = [start]
        while stack:
            key = stack[-1]
            position = active.get(key, 0)
            if key in order or position == len(calls[key]):
                order.setdefault(key)
                active.pop(key, None)
                stack.pop()
                continue
            active[key] = position + 1
            callee = calls[key][position]
            if callee in active:
                raise InvalidModelError(f"function '{callee[0]}::{callee[1]}' calls itself")
            if callee not in order:
                stack.append(callee)
    return list(order)
