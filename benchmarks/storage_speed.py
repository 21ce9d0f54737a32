"""The speed of storage: coders in turns on one core, on 4.2 million Laplacian weights.

Half of the weights are zeros, the others share 31 values.  Whole files are decoded to float32;
ranks alone stay ranks.  `sessions` measures the way from a packed file to a running session.
DeepCABAC needs its own environment, as in `storage`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

import onnxcomp
from benchmarks.common import Options, Outcome, Table
from benchmarks.storage import symbols_of
from benchmarks.storage_peers import Ranks, Timed, as_bytes, cabac, general_coders, timed
from onnxcomp import codec
from onnxcomp.codec import mixing, rans
from onnxcomp.codec.coders import CODERS, CoderId, segments
from onnxcomp.codec.mixing import Layout
from onnxcomp.codec.rans import Pieces
from onnxcomp.codec.symbols import Symbols
from onnxcomp.codec.tables import SYMBOLS, Tables, codes_of
from onnxcomp.model import Model
from onnxcomp.numerics.quantizers import share

PROFILES = (codec.Profile.FAST, codec.Profile.BALANCED)
MAX, RANS = codec.Profile.MAX.value, "ranks, fast"
GOALS = {RANS: (50.0, 850.0), f"{RANS}, NumPy": (0.0, 50.0), MAX: (0.0, 1.0)}
"""Million weights per second that are wanted, to encode and to decode."""
_WIDTH = 2048
_TURNS = 9


def run(options: Options) -> Outcome:
    """Run the benchmark."""
    speeds = _speeds(options.work, 256 if options.quick else _WIDTH, options.seed)
    return Outcome([speeds], (_table(speeds),), _verdicts(speeds))


def _speeds(work: Path, width: int, seed: int) -> dict[str, Any]:
    """Return median seconds to encode and to decode Laplacian weights, half of them zeros."""
    drawn = np.random.default_rng(seed).laplace(size=(width, width))
    pruned = np.where(np.abs(drawn) > np.median(np.abs(drawn)), drawn, 0)
    array = share([pruned], "uq", 32)[0].dense.astype(np.float32)
    model = onnxcomp.load(_matmul(array, work))
    symbols, tensors = symbols_of(array), [Ranks.of(array)]
    layout = Layout((width, width, 1), symbols.values, symbols.row)
    runs: dict[str, list[Timed]] = {}
    for turn in range(_TURNS + 1):  # the first compiles
        taken = {f"file, {p.value}": _pack_and_decode(model, p, work) for p in PROFILES}
        taken[RANS] = _rans(symbols)
        with mock.patch.object(rans, "kernels", return_value=None):
            taken[f"{RANS}, NumPy"] = _rans(symbols)
        begin = time.perf_counter()
        data = mixing.encode([symbols])
        middle = time.perf_counter()
        mixing.decode(data, [layout])
        taken[MAX] = Timed(len(data), middle - begin, time.perf_counter() - middle)
        taken["zstd -19"] = timed(general_coders()["zstd -19"], as_bytes(tensors))
        if peer := cabac(tensors, work):
            taken["DeepCABAC"] = peer
        for name, one in taken.items() if turn else ():
            runs.setdefault(name, []).append(one)
    return {"weights": array.size, "coders": {n: _medians(r) for n, r in runs.items()}}


def _medians(runs: Sequence[Timed]) -> dict[str, float]:
    return {
        "bytes": runs[0].size,
        "encode_s": median(one.encode_s or 0.0 for one in runs),
        "decode_s": median(one.decode_s or 0.0 for one in runs),
    }


def _rans(symbols: Symbols) -> Timed:
    """Encode and decode ranks alone, as the profile fast does."""
    stream = symbols.indices.astype(np.uint8).reshape(-1)
    whole = Pieces(np.array([stream.size]), np.array([0]))
    coder = CODERS[CoderId.RANS]
    begin = time.perf_counter()
    tables = Tables([codes_of(np.bincount(stream, minlength=SYMBOLS))], [], [])
    spans = segments(whole, coder)
    pieces = [whole.between(*span) for span in spans]
    coded = coder.encode([stream[slice(*span)] for span in spans], pieces, tables)
    middle = time.perf_counter()
    coder.decode(coded, pieces, tables)
    return Timed(sum(map(len, coded)), middle - begin, time.perf_counter() - middle)


def _pack_and_decode(model: Model, profile: codec.Profile, work: Path) -> Timed:
    path = work / "speed.onnxc"
    begin = time.perf_counter()
    size = codec.pack(model, path, profile)
    middle = time.perf_counter()
    for _ in codec.stream(path):
        pass
    return Timed(size, middle - begin, time.perf_counter() - middle)


def _matmul(array: npt.NDArray[np.float32], work: Path) -> Path:
    sides = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", extent])
        for name, extent in zip("xy", array.shape, strict=True)
    ]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    weight = numpy_helper.from_array(array, "w")
    graph = helper.make_graph([node], "matmul", sides[:1], sides[1:], [weight])
    opsets = [helper.make_opsetid("", 17)]
    path = work / "matmul.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def _verdicts(speeds: Mapping[str, Any]) -> list[str]:
    """Return what the speeds say about the goals."""
    notes = []
    for name, wanted in GOALS.items():
        coder = speeds["coders"][name]
        for what, key, goal in zip(
            ("encode", "decode"), ("encode_s", "decode_s"), wanted, strict=True
        ):
            if goal:
                found = speeds["weights"] / coder[key] / 1e6
                verdict = "met" if found >= goal else "missed"
                notes.append(
                    f"{name}: {what} {found:.3g} million weights per second, "
                    f"goal {goal:g}: {verdict}"
                )
    return notes


def _table(speeds: Mapping[str, Any]) -> Table:
    weights = speeds["weights"]
    cells = [
        (
            name,
            f"{8 * one['bytes'] / weights:.3f}",
            f"{weights / one['encode_s'] / 1e6:.3g}",
            f"{weights / one['decode_s'] / 1e6:.3g}",
        )
        for name, one in speeds["coders"].items()
    ]
    title = f"{weights:,} weights on one core; million weights per second"
    return Table(title, ("coder", "bits per weight", "encode", "decode"), cells)
