"""Onnxruntime sessions: the only file, besides `bench.py`, that opens them."""

from __future__ import annotations

import logging
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from onnxcomp.errors import ExecutionError
from onnxcomp.model import Array, Model, Value, extract, fill
from onnxcomp.parallel import ordered_map

_SMALL_ELEMENTS = 256
_SEGMENT_BYTES = 128 * 2**20
_FATAL = 4  # errors reach the caller as exceptions; nothing is printed beside them
_log = logging.getLogger(__name__)
ort.disable_telemetry_events()


class Session:
    """One onnxruntime session on a model, with its weights lent, not copied, to it.

    Args:
        model: The model to run.
        optimize: All graph optimisations (as deployed), or none (as written).
        threads: Intra-op threads.
        at_once: Feeds that `run_each` works on at the same time.
        spinning: Whether idle threads spin, as they do where a model is deployed; beside
            NumPy's own threads they only take its time.
        arena: Whether freed memory is kept for later runs.  An output keeps the whole block
            of the arena that it lies in, so that those to be held are made without.

    Raises:
        ExecutionError: Onnxruntime refuses the model.
    """

    def __init__(
        self,
        model: Model,
        *,
        optimize: bool = True,
        threads: int = 1,
        at_once: int = 1,
        spinning: bool = False,
        arena: bool = True,
    ) -> None:
        self._at_once = at_once
        options = session_options(optimize=optimize, threads=threads)
        options.enable_cpu_mem_arena = arena
        if not spinning:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        proto = model.to_proto(external=True)
        # onnxruntime drops what nothing reads, and then misses what it was to fill in
        read = {*model.readers, *model.output_names, *(v.name for v in proto.graph.input)}
        unread = [t for t in proto.graph.initializer if t.name not in read]
        for tensor in unread:
            proto.graph.initializer.remove(tensor)
        lent: dict[str, ort.OrtValue] = {}
        for tensor in proto.graph.initializer:
            array = model.weights.get(tensor.name)
            if array is None:
                continue
            if array.size <= _SMALL_ELEMENTS:
                fill(tensor, array)
                continue
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="lent")
            lent[tensor.name] = _lend(tensor, np.ascontiguousarray(array))
        if lent:
            options.add_external_initializers(list(lent), list(lent.values()))
        try:
            self._session = ort.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise ExecutionError(
                f"onnxruntime cannot load the model: {_reason(error)}"
            ) from error
        _drop_mapped_pages(model.weights[name] for name in lent)
        self.input_names = tuple(v.name for v in self._session.get_inputs())
        self.output_names = tuple(v.name for v in self._session.get_outputs())

    @property
    def output_types(self) -> Mapping[str, str]:
        """Onnxruntime's own names of the output types, such as `tensor(float)`."""
        return {v.name: v.type for v in self._session.get_outputs()}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once and return all outputs by name.

        Raises:
            ExecutionError: Onnxruntime fails on these inputs.
        """
        try:
            values = self._session.run(None, dict(feeds))
        except Exception as error:
            raise ExecutionError(
                f"onnxruntime cannot run the model: {_reason(error)}"
            ) from error
        return dict(zip(self.output_names, values, strict=True))

    def run_each(self, feeds: Iterable[Mapping[str, Array]]) -> Iterator[dict[str, Array]]:
        """Yield the outputs of every feed in order; feeds may hold more than the inputs.

        Raises:
            ExecutionError: Onnxruntime fails on one of them.
        """
        own = ({name: feed[name] for name in self.input_names} for feed in feeds)
        yield from ordered_map(self.run, own, at_once=self._at_once)


def open_file(
    path: Path, options: ort.SessionOptions | None, *, providers: Sequence[Any]
) -> ort.InferenceSession:
    """Open a session on a model file as onnxruntime itself does it.

    Raises:
        ExecutionError: Onnxruntime refuses the model.
    """
    try:
        return ort.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:
        raise ExecutionError(f"onnxruntime cannot load the model: {_reason(error)}") from error


def _lend(tensor: onnx.TensorProto, array: Array) -> ort.OrtValue:
    if tensor.data_type != onnx.TensorProto.BFLOAT16:
        return ort.OrtValue.ortvalue_from_numpy(array)
    bits = array.view(np.uint16)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, tensor.data_type)


def _drop_mapped_pages(arrays: Iterable[Array]) -> None:
    """Let the kernel take back pages of mapped weight files, which onnxruntime has copied."""
    files: dict[int, mmap.mmap] = {}
    for array in arrays:
        base: object = array
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap):
            files[id(base)] = base
    for file in files.values():
        file.madvise(mmap.MADV_DONTNEED)


def session_options(*, optimize: bool, threads: int) -> ort.SessionOptions:
    """Return the options that every session of onnxcomp uses.

    Denormals are flushed, as pruned weights produce them and they distort latency.
    Onnxruntime applies this once per process, so all sessions must ask for it; from the
    first one on, NumPy on the same thread flushes them too.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    )
    return options


@dataclass(frozen=True)
class TensorFact:
    """What one run showed of a tensor.

    Attributes:
        dtype: Its dtype.
        shape: Its shape in that run.
        value: Its value, where it is an integer tensor of at most 256 elements that is
            not a weight (shape arithmetic).
    """

    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    value: Array | None = None


def capture_tensors(model: Model, feeds: Mapping[str, Array]) -> dict[str, TensorFact]:
    """Run a model once and return dtype and shape of every tensor of its main graph.

    Shapes are taken by a `Shape` node per tensor, so that memory stays that of an ordinary
    run.  Tensors that are no plain tensors (sequences, optionals) are left out.

    Args:
        model: The model.
        feeds: One feed for all its inputs.

    Returns:
        Facts by tensor name: inputs, weights and inner tensors.
    """
    facts = {n: TensorFact(a.dtype, a.shape) for n, a in model.weights.items()}
    facts.update({n: TensorFact(a.dtype, a.shape) for n, a in feeds.items()})
    last = last_uses(model)
    held, start = dict(feeds), 0
    for end in segment_ends(model, 0, len(model.nodes)):
        made = [name for node in model.nodes[start:end] for name in node.outputs if name]
        cut = [inner_value(n, facts[n]) for n in held]
        later = [n for n in made if last.get(n, -1) >= end and n not in model.output_names]
        held = _capture(extract(model, cut, made), held, facts, later)
        start = end
    return facts


def _capture(
    part: Model, feeds: Mapping[str, Array], facts: dict[str, TensorFact], later: Sequence[str]
) -> dict[str, Array]:
    """Add the facts of a part's outputs; return the values that later parts need."""
    types = _tensor_types(part)
    probe = _with_shapes(part, list(types))
    result = _run_on(probe, feeds)
    shapes = {n: tuple(int(d) for d in result[_shape_name(n)]) for n in types}
    small = [
        name
        for name, dtype in types.items()
        if np.issubdtype(dtype, np.integer) and math.prod(shapes[name]) <= _SMALL_ELEMENTS
    ]
    kept = [name for name in later if name in types]
    wanted = list(dict.fromkeys([*small, *kept]))
    values = _run_on(with_outputs(part, wanted), feeds) if wanted else {}
    held = {n: values[n] for n in kept}
    values = {n: values[n] for n in small}
    facts.update({n: TensorFact(types[n], shapes[n], values.get(n)) for n in types})
    return {**feeds, **held}


def _run_on(part: Model, feeds: Mapping[str, Array]) -> dict[str, Array]:
    session = Session(part, optimize=False)
    return session.run({name: feeds[name] for name in session.input_names})


def last_uses(model: Model) -> dict[str, int]:
    """Return the index of the last node that reads each tensor; outputs are read last."""
    last: dict[str, int] = {}
    for index, node in enumerate(model.nodes):
        for name in (*node.inputs, *node.captured):
            last[name] = index
    last.update(dict.fromkeys(model.output_names, len(model.nodes)))
    return last


def segment_ends(model: Model, start: int, end: int) -> Iterator[int]:
    """Yield where to cut the nodes from `start` to `end`, so that no part needs much memory.

    Onnxruntime copies the weights of a session; sessions are opened one after another, each
    with at most 128 MB of weights where the nodes allow it.
    """
    total = 0
    for index in range(start, end):
        names = model.nodes[index].inputs
        size = sum(model.weights[n].nbytes for n in names if n in model.weights)
        if total and total + size > _SEGMENT_BYTES:
            yield index
            total = 0
        total += size
    if end > start:
        yield end


def with_outputs(model: Model, names: Sequence[str]) -> Model:
    """Return the same model with other outputs, for capturing inner tensors."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.skeleton)
    declared = {v.name: v for v in proto.graph.output}
    outputs = [declared.get(n, onnx.ValueInfoProto(name=n)) for n in names]
    copies = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in outputs]
    del proto.graph.output[:]
    proto.graph.output.extend(copies)
    return Model(proto, model.weights)


def inner_value(name: str, fact: TensorFact) -> Value:
    """Return the declaration under which an inner tensor can be fed, all dims free."""
    return Value(name, fact.dtype, (None,) * len(fact.shape))


def _with_shapes(model: Model, names: Sequence[str]) -> Model:
    proto = onnx.ModelProto()
    proto.CopyFrom(model.skeleton)
    del proto.graph.output[:]
    for name in names:
        proto.graph.node.append(onnx.helper.make_node("Shape", [name], [_shape_name(name)]))
        proto.graph.output.append(onnx.ValueInfoProto(name=_shape_name(name)))
    return Model(proto, model.weights)


def _shape_name(name: str) -> str:
    return name + "::shape"


def _tensor_types(part: Model) -> dict[str, np.dtype[np.generic]]:
    """Return the dtype of every output that is a plain tensor, as onnxruntime infers it."""
    found: dict[str, np.dtype[np.generic]] = {}
    for name, kind in Session(part, optimize=False).output_types.items():
        if kind in _DTYPES:
            found[name] = _DTYPES[kind]
        else:
            _log.info("tensor '%s' of type %s is not captured", name, kind)
    return found


_DTYPES = {
    f"tensor({name})": np.dtype(dtype)
    for name, dtype in {
        "float": np.float32,
        "float16": np.float16,
        "double": np.float64,
        "bool": np.bool_,
        "int8": np.int8,
        "int16": np.int16,
        "int32": np.int32,
        "int64": np.int64,
        "uint8": np.uint8,
        "uint16": np.uint16,
        "uint32": np.uint32,
        "uint64": np.uint64,
    }.items()
}


def _reason(error: Exception) -> str:
    """Return onnxruntime's message in one line, without its status prefix."""
    text = " ".join(str(error).split())
    return text.split(" : ", 3)[-1] if text.startswith("[ONNXRuntimeError]") else text
