"""Entropy-coded storage: sizes against the paper's formats, general compressors and DeepCABAC.

Real weights, pruned by magnitude over the whole network and then shared per tensor, without
training: what is measured is the coder, not the network. Table 1 counts the ranks alone (no
coder pays for codebooks), table 2 whole files, table 3 the speed of one core on 4.2 million
Laplacian weights, coders taking turns: whole files to float32, and ranks alone. DeepCABAC
needs its own environment, whose Python is named by NNCODEC_PYTHON; without it that column is
empty.
"""

from __future__ import annotations

import lzma
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
from benchmarks.common import Options, Outcome, Table, model_path, percent
from benchmarks.storage_peers import (
    CABAC_PYTHON,
    Ranks,
    Timed,
    absent,
    as_bytes,
    cabac,
    deep_compression_bytes,
    entropy_bytes,
    general_coders,
    paper_bytes,
    timed,
)
from onnxcomp import codec
from onnxcomp.codec import mixing, rans
from onnxcomp.codec.coders import CODERS, CoderId, segments
from onnxcomp.codec.mixing import Layout
from onnxcomp.codec.rans import Pieces
from onnxcomp.codec.symbols import Geometry, Symbols, ranked, values_of
from onnxcomp.codec.tables import SYMBOLS, Tables, codes_of
from onnxcomp.model import Model
from onnxcomp.numerics.quantizers import share

# The coder was designed on the first three and checked once on the others.
MODELS = (
    "akamaster_cifar10_resnet20",
    "akamaster_cifar10_resnet56",
    "linzaer_ultralight_face_RFB-320",
    "linzaer_ultralight_face_slim-320_nopost",
    "mlperftiny_cifar10_resnet8",
    "mlperftiny_kws_dscnn",
    "shiqiyu_retinaface_mbnet0.25",
    "shiqiyu_scrfd_500m_bnkps",
    "shiqiyu_yunet_n_dynamic",
)
# Quantizer, values, percentage of zeros.
SETTINGS = (
    ("uq", 16, 0),
    ("cws", 32, 0),
    ("uq", 256, 0),
    ("cws", 16, 50),
    ("cws", 32, 90),
    ("uq", 16, 95),
    ("cws", 256, 90),
)
PROFILES = tuple(codec.Profile)
CABAC, MAX, RANS = "DeepCABAC", "max", "ranks, fast"
SPEED_GOALS = {RANS: (50.0, 850.0), f"{RANS}, NumPy": (0.0, 50.0), MAX: (0.0, 1.0)}
"""Million weights per second that are wanted, to encode and to decode."""
_FEWEST = 256  # weights of a tensor that is shared
_SPEED_WIDTH = 2048
_TURNS = 5


def run(options: Options) -> Outcome:
    """Run the benchmark."""
    models = MODELS[:1] if options.quick else MODELS
    settings = SETTINGS[3:5] if options.quick else SETTINGS
    rows: list[Mapping[str, Any]] = []
    for name in models:
        model = onnxcomp.load(model_path(name))
        for setting in settings:
            rows.append({"network": name, **_sizes(model, setting, options.work)})
    speeds = _speeds(options.work, 256 if options.quick else _SPEED_WIDTH, options.seed)
    notes = [*_goals(rows), *_speed_goals(speeds)]
    if missing := absent():
        notes.append(f"not installed, so not measured: {', '.join(missing)}")
    if rows[0]["ranks"].get(CABAC) is None:
        notes.append(f"no DeepCABAC: {CABAC_PYTHON} names no Python that has nncodec")
    tables = (_ranks_table(rows), _files_table(rows), _speed_table(speeds))
    return Outcome([*rows, {"speed": speeds}], tables, notes)


def shared_weights(
    model: Model, quantizer: str, levels: int, zeros: int
) -> dict[str, npt.NDArray[np.float32]]:
    """Return the weights of a model, pruned over all of them and shared per tensor."""
    weights = {
        name: array
        for name, array in model.weights.items()
        if array.ndim >= 2 and array.dtype == np.float32 and array.size >= _FEWEST
    }
    magnitudes = np.abs(np.concatenate([array.ravel() for array in weights.values()]))
    threshold = np.percentile(magnitudes, zeros) if zeros else -1.0
    kept = levels - 1 if zeros else levels
    found = {}
    for name, array in weights.items():
        pruned = np.where(np.abs(array) > threshold, array, 0).astype(np.float64)
        found[name] = share([pruned], quantizer, kept)[0].dense.astype(np.float32)
    return found


def _sizes(model: Model, setting: tuple[str, int, int], work: Path) -> dict[str, Any]:
    """Return the bytes of one network under one setting, by every coder."""
    weights = shared_weights(model, *setting)
    tensors = [Ranks.of(array) for array in weights.values()]
    data = as_bytes(tensors)
    ranks: dict[str, float | None] = {
        "entropy": entropy_bytes(tensors),
        "Deep Compression": deep_compression_bytes(tensors),
        **{name: len(encode(data)) for name, (encode, _) in general_coders().items()},
    }
    peer = cabac(tensors, work)
    ranks[CABAC] = peer.size if peer else None
    ranks[MAX] = len(mixing.encode([_symbols(array) for array in weights.values()]))
    quantizer, levels, zeros = setting
    return {
        "setting": f"{quantizer} {levels}, {zeros} %",
        "weights": data.size,
        "ranks": ranks,
        "files": _files(model, weights, tensors, peer, work),
    }


def _symbols(array: npt.NDArray[np.float32]) -> Symbols:
    found = ranked(array)
    if found is None:
        raise ValueError("a shared tensor has too many values")
    (codebook, rank), geometry = found, Geometry.of(array.shape)
    indices = rank.reshape(geometry.shape).astype(np.int32)
    return Symbols(indices, values_of(codebook), geometry.row)


def _files(
    model: Model,
    weights: Mapping[str, npt.NDArray[np.float32]],
    tensors: Sequence[Ranks],
    peer: Timed | None,
    work: Path,
) -> dict[str, float | None]:
    """Return the bytes of whole files; peers get the rest of the model compressed by xz."""
    shared = _with_weights(model, weights)
    whole = _bytes_of(shared, work)
    empty = {name: np.zeros_like(array) for name, array in weights.items()}
    rest = len(lzma.compress(_bytes_of(_with_weights(model, empty), work)))
    books = sum(tensor.codebook_bytes for tensor in tensors)
    files: dict[str, float | None] = {
        "float": len(whole),
        "HAM": paper_bytes(tensors, "ham") + rest,
        "sHAM": paper_bytes(tensors, "sham") + rest,
        "xz -9e": len(lzma.compress(whole, preset=lzma.PRESET_EXTREME | 9)),
        CABAC: peer.size + books + rest if peer else None,
    }
    for profile in PROFILES:
        files[profile.value] = codec.packed_bytes(shared, profile)
    return files


def _with_weights(model: Model, weights: Mapping[str, npt.NDArray[np.float32]]) -> Model:
    draft = model.edit()
    for name, array in weights.items():
        draft.set_weight(name, array)
    return draft.seal(by="storage")


def _bytes_of(model: Model, work: Path) -> bytes:
    path = work / "storage.onnx"
    model.save(path)
    return path.read_bytes()


def _speeds(work: Path, width: int, seed: int) -> dict[str, Any]:
    """Return median seconds to encode and to decode Laplacian weights, half of them zeros."""
    drawn = np.random.default_rng(seed).laplace(size=(width, width))
    pruned = np.where(np.abs(drawn) > np.median(np.abs(drawn)), drawn, 0)
    array = share([pruned], "uq", 32)[0].dense.astype(np.float32)
    model = onnxcomp.load(_matmul(array, work))
    symbols, tensors = _symbols(array), [Ranks.of(array)]
    layout = Layout((width, width, 1), symbols.values, symbols.row)
    runs: dict[str, list[Timed]] = {}
    for turn in range(_TURNS + 1):  # the first compiles
        taken = {f"file, {p.value}": _pack_and_decode(model, p, work) for p in PROFILES[:2]}
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
            taken[CABAC] = peer
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


def _goals(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the sizes say about the goals."""
    notes = []
    for title, names in (("designed on", MODELS[:3]), ("held out", MODELS[3:])):
        ratios = [
            row["ranks"][MAX] / row["ranks"][CABAC] - 1
            for row in rows
            if row["network"] in names and row["ranks"].get(CABAC)
        ]
        if ratios:
            smaller = sum(ratio < 0 for ratio in ratios)
            notes.append(
                f"max against DeepCABAC, {title}: smaller in {smaller} of {len(ratios)}, "
                f"mean {percent(float(np.mean(ratios)))}, worst {percent(max(ratios))}"
            )
    for profile in PROFILES:
        under = sum(
            row["files"][profile.value] < min(row["files"]["HAM"], row["files"]["sHAM"])
            for row in rows
        )
        notes.append(f"{profile.value}: file under HAM's and sHAM's in {under} of {len(rows)}")
    return notes


def _speed_goals(speeds: Mapping[str, Any]) -> list[str]:
    """Return what the speeds say about the goals."""
    notes = []
    for name, wanted in SPEED_GOALS.items():
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


def _ranks_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    names = list(rows[0]["ranks"])
    cells = []
    for row in rows:
        ranks, bits = row["ranks"], 8 / row["weights"]
        against = ranks[MAX] / ranks[CABAC] - 1 if ranks[CABAC] else None
        sizes = ["-" if ranks[n] is None else f"{ranks[n] * bits:.4f}" for n in names]
        cells.append((row["network"], row["setting"], *sizes, percent(against)))
    title = "ranks alone, bits per weight, without codebooks"
    return Table(title, ("network", "setting", *names, "max / DeepCABAC"), cells)


def _files_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    names = [name for name in rows[0]["files"] if name != "float"]
    cells = []
    for row in rows:
        files = row["files"]
        shares = [None if files[n] is None else files[n] / files["float"] for n in names]
        cells.append((row["network"], row["setting"], *(percent(s, 2) for s in shares)))
    return Table("whole files, share of the plain one", ("network", "setting", *names), cells)


def _speed_table(speeds: Mapping[str, Any]) -> Table:
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
