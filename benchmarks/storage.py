"""Entropy-coded storage: sizes against the paper's formats, general compressors and DeepCABAC.

Real weights, and those of a SqueezeNet that was never trained, pruned by magnitude over the
whole network and then shared per tensor, without training: what is measured is the coder, not
the network.  Table 1 counts the ranks alone (no coder pays for codebooks), table 2 the tensors
of more than 100,000 weights by the profile `fast`, table 3 whole files.  DeepCABAC needs its
own environment, whose Python is named by NNCODEC_PYTHON; without it that column is empty.
"""

from __future__ import annotations

import lzma
import tempfile
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import onnxcomp
from benchmarks.common import (
    ChildError,
    Job,
    Options,
    Outcome,
    Table,
    model_path,
    percent,
    run_child,
    run_jobs,
)
from benchmarks.storage_peers import (
    BYTE_CODERS,
    CABAC_PYTHON,
    Ranks,
    absent,
    as_bytes,
    cabac,
    deep_compression_bytes,
    entropy_bytes,
    general_coders,
    paper_bytes,
)
from onnxcomp import codec
from onnxcomp.codec import mixing
from onnxcomp.codec.container import coded
from onnxcomp.codec.fields import FieldWriter
from onnxcomp.codec.planning import Tensors, plan_tensors
from onnxcomp.codec.records import write_record
from onnxcomp.codec.symbols import Geometry, Symbols, ranked, values_of
from onnxcomp.codec.tables import Tables, write_codes
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
LARGE = ("ipne_deeplab_v3_mnv2", "kazuhito00_yolox_nano")
"""Those with tensors of more than 100,000 weights."""
DRAWN = "squeezenet_cifar10"
"""A network of `models.builders`: its weights are random, which leaves nothing to predict."""
GROUPS = {"designed on": MODELS[:3], "held out": (*MODELS[3:], *LARGE), "drawn": (DRAWN,)}
LEVELS, ZEROS = (16, 32, 256), (0, 50, 90, 95)
SETTINGS = tuple(
    (("uq", "cws")[(row + column) % 2], levels, zeros)
    for row, levels in enumerate(LEVELS)
    for column, zeros in enumerate(ZEROS)
)
"""Quantizer, values, percentage of zeros."""
PROFILES = tuple(codec.Profile)
CABAC, MAX, FAST = "DeepCABAC", codec.Profile.MAX.value, codec.Profile.FAST.value
LARGE_TENSOR, NEAR_ENTROPY = 100_000, 1.015
_FEWEST = 256  # weights of a tensor that is shared
_TIMEOUT_S = 3600.0


def run(options: Options) -> Outcome:
    """Run the benchmark; the network that is drawn needs torch."""
    names = MODELS[:1] if options.quick else (*MODELS, *LARGE, DRAWN)
    settings = SETTINGS[1:3] if options.quick else SETTINGS
    jobs = [
        Job(
            "benchmarks.storage:sizes",
            {"network": name, "file": str(_file(name, options)), "settings": settings},
            timeout_s=_TIMEOUT_S,
        )
        for name in names
    ]
    rows: list[Mapping[str, Any]] = []
    for answer in run_jobs(jobs, workers=options.threads, kept=options.work / "answers"):
        if isinstance(answer, ChildError):
            raise answer
        rows += answer.value
    notes = _goals(rows)
    if missing := absent():
        notes.append(f"not installed, so not measured: {', '.join(missing)}")
    if rows[0]["ranks"].get(CABAC) is None:
        notes.append(f"no DeepCABAC: {CABAC_PYTHON} names no Python that has nncodec")
    tables = (_ranks_table(rows), _large_table(rows), _files_table(rows))
    return Outcome(rows, tables, notes)


def _file(name: str, options: Options) -> Path:
    if name != DRAWN:
        return model_path(name)
    path = options.work / f"{name}.onnx"
    run_child("benchmarks.cases:build", name=name, out=str(path), seed=options.seed)
    return path


def sizes(
    *, network: str, file: str, settings: Sequence[tuple[str, int, int]]
) -> list[dict[str, Any]]:
    """Return the bytes of a network under every setting; runs in a child."""
    model = onnxcomp.load(file)
    with tempfile.TemporaryDirectory() as folder:
        return [{"network": network, **_sizes(model, s, Path(folder))} for s in settings]


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
    large = [t for t in tensors if t.levels.size > LARGE_TENSOR and np.ptp(t.levels)]
    quantizer, levels, zeros = setting
    return {
        "setting": f"{quantizer} {levels}, {zeros} %",
        "weights": data.size,
        "ranks": ranks | _own_ranks(tensors),
        "large": [(coded_bytes([t], codec.Profile.FAST), entropy_bytes([t])) for t in large],
        "files": _files(model, weights, tensors, ranks, work),
    }


def _own_ranks(tensors: Sequence[Ranks]) -> dict[str, int]:
    """Return the bytes of ranks by every profile, each at most as many as by faster ones."""
    sizes = [coded_bytes(tensors, profile) for profile in PROFILES[:2]]
    sizes.append(len(mixing.encode([symbols_of(tensor.weights) for tensor in tensors])))
    least = accumulate(sizes, min)
    return {profile.value: size for profile, size in zip(PROFILES, least, strict=True)}


def symbols_of(array: npt.NDArray[np.float32]) -> Symbols:
    """Return a tensor of few values as context mixing takes it."""
    found = ranked(array)
    if found is None:
        raise ValueError("a shared tensor has too many values")
    (codebook, rank), geometry = found, Geometry.of(array.shape)
    indices = rank.reshape(geometry.shape).astype(np.int32)
    return Symbols(indices, values_of(codebook), geometry.row)


def coded_bytes(tensors: Sequence[Ranks], profile: codec.Profile) -> int:
    """Return the bytes that ranks take in a packed file without their codebooks.

    Streams, frequency tables and records are counted.  Ranks stand for their own values, lest
    tensors of many values be stored in a way that needs no codebook.
    """
    arrays = [tensor.levels.astype(np.float32) for tensor in tensors]
    plan, head = plan_tensors(Tensors.of(arrays), profile), FieldWriter()
    for codes in plan.codes:
        write_codes(codes, head)
    for record in plan.records:
        write_record(record, plan.codebooks, plan.models, head)
    streams = coded(plan, Tables(plan.codes, plan.models, plan.layouts))
    return len(head.data) + sum(map(len, streams))


def _files(
    model: Model,
    weights: Mapping[str, npt.NDArray[np.float32]],
    tensors: Sequence[Ranks],
    ranks: Mapping[str, float | None],
    work: Path,
) -> dict[str, float | None]:
    """Return the bytes of whole files.

    Compressors of bytes get the plain file.  Coders of numbers hold the ranks; to these come
    the codebooks as float32 and the rest of the model by xz.
    """
    shared = _with_weights(model, weights)
    whole = _bytes_of(shared, work)
    empty = {name: np.zeros_like(array) for name, array in weights.items()}
    rest = len(lzma.compress(_bytes_of(_with_weights(model, empty), work)))
    books = sum(tensor.codebook_bytes for tensor in tensors)
    files: dict[str, float | None] = {
        "float": len(whole),
        "HAM": paper_bytes(tensors, "ham") + rest,
        "sHAM": paper_bytes(tensors, "sham") + rest,
    }
    coders = general_coders()
    for name in BYTE_CODERS:
        if name in coders:
            files[name] = len(coders[name][0](np.frombuffer(whole, np.uint8)))
    for name, size in ranks.items():
        if name not in (*BYTE_CODERS, "entropy"):
            files[name] = None if size is None else size + books + rest
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


def _goals(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the sizes say about the goals."""
    notes = []
    for title, names in GROUPS.items():
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
    large = [size / entropy for row in rows for size, entropy in row["large"]]
    if large:
        near = sum(ratio <= NEAR_ENTROPY for ratio in large)
        notes.append(
            f"{FAST}: within {percent(NEAR_ENTROPY - 1)} of the entropy in {near} of "
            f"{len(large)} tensors of more than {LARGE_TENSOR:,} weights, "
            f"mean {percent(float(np.mean(large)) - 1)}, worst {percent(max(large) - 1)}"
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


def _large_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    cells = [
        (
            row["network"],
            row["setting"],
            f"{size:,}",
            f"{entropy:,.0f}",
            percent(size / entropy - 1),
        )
        for row in rows
        for size, entropy in row["large"]
    ]
    title = f"tensors of more than {LARGE_TENSOR:,} weights, bytes without codebooks"
    columns = ("network", "setting", FAST, "entropy", f"{FAST} / entropy")
    return Table(title, columns, cells)


def _files_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    names = [name for name in rows[0]["files"] if name != "float"]
    cells = []
    for row in rows:
        files = row["files"]
        shares = [None if files[n] is None else files[n] / files["float"] for n in names]
        cells.append((row["network"], row["setting"], *(percent(s, 2) for s in shares)))
    return Table("whole files, share of the plain one", ("network", "setting", *names), cells)
