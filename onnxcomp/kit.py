"""Bench kits: one zip with models, micro-chains and a script that measures them elsewhere.

    kit.json            what there is: files, inputs, and what the time of a chain is made of
    measure.py          `kit_script.py`; needs nothing but Python, numpy and onnxruntime
    chains/ models/     ONNX files, numbered
    feeds/              inputs of the models, as .npy

The script writes `result.json`: the entries of `kit.json` with their times.  `calibrate` runs
the same script on the same files in this process.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from onnxcomp import kit_script
from onnxcomp.analysis.target import Convolution, read_convolution
from onnxcomp.bench import Benchmark, Machine, Recording, recorded_latency
from onnxcomp.calibration_chains import ELEMENT_BASE, build_chain
from onnxcomp.errors import ParameterError
from onnxcomp.json_fields import Fields
from onnxcomp.loading import replacing, write_model
from onnxcomp.model import Array, Model

SCRIPT = "measure.py"
COLD_BYTES = 160_000
"""Chains with a weight of more bytes stand for networks that no cache keeps."""
_CONTROL = "A/A control"
_DATE = (1980, 1, 1, 0, 0, 0)
_MODE = 0o644 << 16


@dataclass(frozen=True)
class Timed:
    """One entry of a result.

    Attributes:
        name: The chain as it is written, or the model's file name.
        role: "chain", "model" or "control"; a control is a second session of the first model.
        recording: Its times; None where it did not run.
        error: Why it did not run, or "".
        convolutions: Of a chain: its convolutions.
        elements: Of a chain: output elements by elementwise operator.
        ends: Of a chain: elements of its input and of what its last pool reads.
        base: Of a chain with elementwise operators: the chain without them, else "".
    """

    name: str
    role: str
    recording: Recording | None
    error: str
    convolutions: tuple[Convolution, ...] = ()
    elements: tuple[tuple[str, int], ...] = ()
    ends: int = 0
    base: str = ""

    def seconds(self, *, cpu: bool) -> float:
        """Return the time of a run: the lower quartile of the visits, as load only adds.

        Args:
            cpu: CPU time instead of wall time.
        """
        assert self.recording is not None
        rounds = self.recording.cpu if cpu else self.recording.wall
        return float(np.quantile(np.concatenate(rounds), 0.25)) / 1e9


@dataclass(frozen=True)
class Result:
    """What a kit's script measured.

    Attributes:
        source: File that it comes from.
        machine: Where it was measured.
        entries: What was measured, in the kit's order.
    """

    source: str
    machine: Machine
    entries: tuple[Timed, ...]

    def benchmark(self) -> tuple[list[str], Benchmark]:
        """Return names and latency of the models, as a measurement made here.

        Raises:
            ParameterError: There are no models, or one of them did not run.
        """
        timed = [entry for entry in self.entries if entry.role != "chain"]
        if not timed:
            raise ParameterError(
                f"{self.source} has no models; write the kit with `onnxcomp bench MODEL... "
                "--kit` to compare models"
            )
        recordings = []
        for entry in timed:
            if entry.recording is None:
                raise ParameterError(f"{self.source}: '{entry.name}' failed: {entry.error}")
            recordings.append(entry.recording)
        visits = {tuple(map(len, found.wall)) for found in recordings}
        if len(visits) > 1 or timed[-1].role != "control":
            raise ParameterError(
                f"{self.source}: 'entries' must be models with equal visits and a control "
                f"behind them; found visits {sorted(visits)}"
            )
        names = [entry.name for entry in timed[:-1]]
        return names, recorded_latency(recordings, self.machine)


def write_kit(
    path: Path,
    *,
    chains: Sequence[str] = (),
    models: Sequence[tuple[str, Model]] = (),
    feeds: Mapping[str, Array] | None = None,
    inputs: Iterable[Path] = (),
) -> None:
    """Write a kit; equal arguments give equal bytes.

    Args:
        path: The zip to write; one that exists is replaced.
        chains: Micro-chains to measure, as `calibration_chains` writes them.
        models: Models to compare with the first of them, with their names.
        feeds: One feed for all models, by input name.
        inputs: Files that must not be overwritten.

    Raises:
        ParameterError: The zip cannot be written, or is one of `inputs`.
    """
    with tempfile.TemporaryDirectory() as name, replacing(path, inputs=inputs) as stream:
        folder = Path(name)
        assemble(folder, chains, models, feeds or {})
        (folder / SCRIPT).write_bytes(Path(kit_script.__file__).read_bytes())
        _zip(folder, stream)


def assemble(
    folder: Path,
    chains: Sequence[str],
    models: Sequence[tuple[str, Model]] = (),
    feeds: Mapping[str, Array] | None = None,
) -> None:
    """Write the files of a kit, without its script, into an empty folder."""
    entries = []
    (folder / "chains").mkdir()
    for index, name in enumerate(chains):
        chain = build_chain(name)
        file = f"chains/{index}.onnx"
        (folder / file).write_bytes(chain.model.SerializeToString())
        entries.append(
            {
                "name": name,
                "role": "chain",
                "file": file,
                "inputs": {"x": list(chain.shape)},
                "cold": max(4 * conv.weights for conv in chain.convolutions) > COLD_BYTES,
                "convolutions": [asdict(conv) for conv in chain.convolutions],
                "elements": dict(chain.elements),
                "ends": chain.ends,
                "base": ELEMENT_BASE if chain.elements else "",
            }
        )
    entries += _model_entries(folder, models, feeds or {})
    kit = {
        "schema_version": kit_script.SCHEMA_VERSION,
        "kind": kit_script.KIT_KIND,
        "entries": entries,
    }
    (folder / "kit.json").write_text(json.dumps(kit, indent=1) + "\n", encoding="utf-8")


def _model_entries(
    folder: Path, models: Sequence[tuple[str, Model]], feeds: Mapping[str, Array]
) -> list[dict[str, Any]]:
    (folder / "models").mkdir()
    (folder / "feeds").mkdir()
    files = {}
    for index, (name, array) in enumerate(feeds.items()):
        files[name] = f"feeds/{index}.npy"
        np.save(folder / files[name], array, allow_pickle=False)
    entries: list[dict[str, Any]] = []
    for index, (name, model) in enumerate(models):
        file = f"models/{index}.onnx"
        write_model(model.to_proto(external=True), folder / file, external=model.weights)
        entries.append(
            {"name": name, "role": "model", "file": file, "inputs": files, "cold": False}
        )
    if entries:
        entries.append({**entries[0], "name": _CONTROL, "role": "control"})
    return entries


def _zip(folder: Path, stream: BinaryIO) -> None:
    """Zip a folder's files, sorted and without dates."""
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                info = zipfile.ZipInfo(file.relative_to(folder).as_posix(), _DATE)
                info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, _MODE
                large = file.stat().st_size >= 2**31
                with (
                    file.open("rb") as source,
                    archive.open(info, "w", force_zip64=large) as sink,
                ):
                    while block := source.read(2**20):
                        sink.write(block)


def parse_result(data: object, source: str) -> Result:
    """Return what a kit's script wrote, checked.

    Args:
        data: What JSON held.
        source: File that it comes from, for messages.

    Raises:
        ParameterError: Something is missing, unknown or impossible.
    """
    fields = Fields(data, source)
    fields.check_header(kit_script.RESULT_KIND, kit_script.SCHEMA_VERSION)
    machine = _machine(fields.within("machine"))
    entries = tuple(_entry(entry) for entry in fields.each("entries"))
    fields.check_nothing_left()
    return Result(source, machine, entries)


def _machine(fields: Fields) -> Machine:
    load, governor = fields.get("load_average"), fields.get("governor")
    return Machine(
        cpu=fields.text("cpu"),
        architecture=fields.text("architecture"),
        cores=fields.whole("cores"),
        onnxruntime=fields.text("onnxruntime"),
        threads=fields.whole("threads"),
        load_average=None if load is None else fields.number("load_average"),
        governor=None if governor is None else fields.text("governor"),
    )


def _entry(fields: Fields) -> Timed:
    role = fields.text("role")
    if role not in ("chain", "model", "control"):
        raise fields.error("role", "chain, model or control", role)
    for key in ("file", "inputs", "cold"):  # which were for the script
        fields.get(key)
    name, error = fields.text("name"), ""
    recording = None
    if fields.has("error"):
        error = fields.text("error")
    else:
        recording = _recording(fields)
    if role != "chain":
        fields.check_nothing_left()
        return Timed(name, role, recording, error)
    elements = fields.within("elements")
    found = Timed(
        name,
        role,
        recording,
        error,
        tuple(read_convolution(conv) for conv in fields.each("convolutions")),
        tuple((op, elements.whole(op)) for op in elements.names()),
        fields.whole("ends"),
        fields.text("base") if fields.get("base") else "",
    )
    fields.check_nothing_left()
    return found


def _recording(fields: Fields) -> Recording:
    """Return the times of an entry: medians of visits, and all wall times."""
    walls, cpus = (_times(fields, key) for key in ("wall_ns", "cpu_ns"))
    if [len(visits) for visits in walls] != [len(visits) for visits in cpus]:
        raise fields.error("cpu_ns", "as long as 'wall_ns'", cpus)
    wall, cpu = (
        [[float(np.median(visit)) for visit in visits] for visits in rounds]
        for rounds in (walls, cpus)
    )
    timings = [float(t) for visits in walls for visit in visits for t in visit]
    return Recording(wall, cpu, timings)


def _times(fields: Fields, key: str) -> list[list[list[int]]]:
    """Return times by round, visit and timing; none of these is empty."""
    rounds = fields.get(key)
    wanted = "lists of rounds, visits and times in ns above 0, none of them empty"
    levels: list[Any] = [rounds]
    for _ in range(3):
        if not all(isinstance(level, list) and level for level in levels):
            raise fields.error(key, wanted, rounds)
        levels = [item for level in levels for item in level]
    if any(type(time) is not int or time < 1 for time in levels):
        raise fields.error(key, wanted, rounds)
    found: list[list[list[int]]] = rounds
    return found
