"""A kit runs where only Python, numpy and onnxruntime are, and its result is read back."""

import copy
import json
import subprocess
import sys
import zipfile

import numpy as np
import onnx
import pytest

from onnxcomp import kit_script, load
from onnxcomp.bench import describe_machine
from onnxcomp.calibration_chains import ELEMENT_BASE
from onnxcomp.errors import ParameterError
from onnxcomp.kit import SCRIPT, Timed, parse_result, write_kit
from onnxcomp.model import Model
from onnxcomp.runtime import session_options
from tests.graphs import sane_feeds
from tests.test_cli import DIGITS

CHAINS = ("16@8 2x conv3:16", "512@1 1x gemm:512", "16@8 1x conv1:16")


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    path = tmp_path_factory.mktemp("kit") / "kit.zip"
    write_digits(path, CHAINS)
    return path


def write_digits(path, chains=(), **options):
    model = load(DIGITS)
    feed = next(iter(sane_feeds(model, 1).batches(model.signature.inputs, 1))).feed
    models = [("digits.onnx", model), ("again.onnx", model)]
    write_kit(path, chains=chains, models=models, feeds=feed, **options)


@pytest.fixture(scope="module")
def measured(kit):
    """What the script wrote, run outside of this project, and what it printed."""
    folder = kit.parent / "unpacked"
    with zipfile.ZipFile(kit) as archive:
        archive.extractall(folder)
    out = kit.parent / "result.json"
    command = [sys.executable, "-I", "-S", "-c", ISOLATED, folder / SCRIPT, "-o", out]
    done = subprocess.run(
        [*map(str, command), "--seconds", "2"],
        cwd=kit.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(out.read_text()), done.stdout


# Only the standard library, numpy and onnxruntime with what it imports itself.
ISOLATED = f"""
import importlib.abc, runpy, sys
sys.path += {[path for path in sys.path if path.endswith(("site-packages", "lib-dynload"))]!r}
class Guard(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("onnxcomp", "onnx", "scipy", "rich", "typer", "yaml"):
            raise ImportError("not on this device: " + name)
sys.meta_path.insert(0, Guard())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_script_measures_everything(measured):
    data, printed = measured
    roles = [entry["role"] for entry in data["entries"]]
    assert roles == ["chain"] * 3 + ["model"] * 2 + ["control"]
    for entry in data["entries"]:
        assert "error" not in entry
        assert len(entry["wall_ns"]) == len(entry["cpu_ns"]) == 3
        assert all(len(visit) == 3 for visits in entry["wall_ns"] for visit in visits)
    assert [entry["cold"] for entry in data["entries"]] == [False, True, *[False] * 4]
    assert "digits.onnx: " in printed
    assert "conv3" not in printed


def test_its_result_is_a_benchmark(measured):
    result = parse_result(measured[0], "result.json")
    names, found = result.benchmark()
    assert names == ["digits.onnx", "again.onnx"]
    assert len(found.models) == 2
    assert found.models[0].ratio.value == 1
    assert found.rounds == 3
    entry = measured[0]["entries"][3]
    medians = [np.median(visit) for visits in entry["wall_ns"] for visit in visits]
    assert found.models[0].median_ms == pytest.approx(np.median(medians) / 1e6)
    assert found.visits == len(medians)
    assert 0.3 < found.control.ratio.value < 3
    assert (found.machine.cpu, found.machine.threads) == (describe_machine().cpu, 1)


def test_a_slower_model_is_seen_as_such(measured):
    """Three times the times give a third of the speedup, to 1e-9."""
    data = copy.deepcopy(measured[0])
    for key in ("wall_ns", "cpu_ns"):
        times = data["entries"][3][key]
        data["entries"][4][key] = [[[3 * t for t in v] for v in visits] for visits in times]
    _, found = parse_result(data, "x").benchmark()
    assert found.models[1].ratio.value == pytest.approx(1 / 3)
    assert found.models[1].median_ms == pytest.approx(3 * found.models[0].median_ms)


def test_load_only_adds(measured):
    """The time of a chain is the lower quartile of its visits, by CPU or by wall time."""
    entry = parse_result(measured[0], "x").entries[0]
    assert isinstance(entry, Timed)
    assert entry.recording is not None
    visits = np.concatenate(entry.recording.cpu)
    assert entry.seconds(cpu=True) == pytest.approx(np.quantile(visits, 0.25) / 1e9)
    entry.recording.wall[:] = [[1e6, 2e6, 3e6, 4e6, 5e6]]
    assert entry.seconds(cpu=False) == pytest.approx(2e-3)


def test_kits_are_deterministic_and_replace_only_what_they_may(kit, tmp_path):
    again = tmp_path / "kit.zip"
    again.write_bytes(b"old")
    write_digits(again, CHAINS)
    assert again.read_bytes() == kit.read_bytes()
    with pytest.raises(ParameterError, match="never overwritten"):
        write_digits(again, inputs=[again])
    assert again.read_bytes() == kit.read_bytes()
    with pytest.raises(ParameterError, match="cannot be written"):
        write_digits(tmp_path / "absent" / "kit.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["kit.zip"]


def test_kits_are_small(tmp_path):
    """Weights of 38 MB take less than 1 MB."""
    write_kit(tmp_path / "kit.zip", chains=["512@7 4x conv3:512"])
    assert (tmp_path / "kit.zip").stat().st_size < 1_000_000


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(zipfile.ZipFile, "open", fail)
    with pytest.raises(KeyboardInterrupt):
        write_digits(tmp_path / "kit.zip")
    assert not list(tmp_path.iterdir())


def test_models_in_a_kit_are_the_models(kit):
    with zipfile.ZipFile(kit) as archive:
        names = archive.namelist()
        model = onnx.load_from_string(archive.read("models/0.onnx"))
        entries = json.loads(archive.read("kit.json"))["entries"]
        script = archive.read(SCRIPT).decode()
    assert Model.from_proto(model).digest == load(DIGITS).digest
    assert names == sorted(names)
    assert {entry["file"] for entry in entries} <= set(names)
    assert "import onnxcomp" not in script
    assert "from onnxcomp" not in script


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 5), ("200000 100000", 2), ("250000 100000", 2), ("50000 100000", 1)],
)
def test_cores_are_those_of_the_container(monkeypatch, tmp_path, quota, cores):
    monkeypatch.setattr(kit_script.os, "sched_getaffinity", lambda _: range(5), raising=False)
    monkeypatch.setattr(kit_script, "_QUOTA", tmp_path / "cpu.max")
    assert kit_script.usable_cores() == 5  # no such file
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert kit_script.usable_cores() == cores


def test_options_are_those_of_onnxcomp():
    """What decides latency is set as in `runtime.session_options`."""
    own, ours = kit_script.session_options(3), session_options(optimize=True, threads=3)
    for name in (
        "intra_op_num_threads",
        "inter_op_num_threads",
        "graph_optimization_level",
        "execution_mode",
        "enable_mem_pattern",
        "enable_cpu_mem_arena",
    ):
        assert getattr(own, name) == getattr(ours, name), name
    key = "session.set_denormal_as_zero"
    assert own.get_session_config_entry(key) == ours.get_session_config_entry(key) == "1"


def test_models_that_do_not_run_are_named(tmp_path):
    model = onnx.load(DIGITS)
    model.graph.node[0].op_type = "Twist"
    (tmp_path / "models").mkdir()
    onnx.save(model, tmp_path / "models" / "0.onnx")
    entry = {"name": "twisted", "role": "model", "file": "models/0.onnx", "cold": False}
    entries = [{**entry, "inputs": {}}, {**entry, "inputs": {}, "role": "control"}]
    kit = {"schema_version": 1, "kind": "onnxcomp-kit", "entries": entries}
    (tmp_path / "kit.json").write_text(json.dumps(kit))
    data = kit_script.measure(tmp_path, 1.0)
    assert "Twist" in data["entries"][0]["error"]
    with pytest.raises(ParameterError, match=r"x: 'twisted' failed: .*Twist"):
        parse_result(data, "x").benchmark()
    kit["schema_version"] = 2
    (tmp_path / "kit.json").write_text(json.dumps(kit))
    with pytest.raises(SystemExit, match="one zip"):
        kit_script.measure(tmp_path, 1.0)


def _time(value):
    return lambda d: d["entries"][0].update(wall_ns=value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema_version=9), "'schema_version' must be 1"),
        (lambda d: d.update(extra=1), "'extra' is not known"),
        (lambda d: d["machine"].update(threads=0), "'machine.threads' must be a whole number"),
        (lambda d: d["machine"].pop("cpu"), "'machine.cpu' is missing"),
        (lambda d: d["entries"][0].update(role="spy"), r"'entries\[0\].role' must be chain"),
        (lambda d: d["entries"][0].update(more=1), r"'entries\[0\].more' is not known"),
        (lambda d: d["entries"][0].pop("ends"), r"'entries\[0\].ends' is missing"),
        (lambda d: d["entries"][3].update(ends=1), r"'entries\[3\].ends' is not known"),
        (_time([]), r"'entries\[0\].wall_ns' must be lists of rounds"),
        (_time([[]]), r"'entries\[0\].wall_ns' must be lists of rounds"),
        (_time([[[0]]]), r"'entries\[0\].wall_ns' must be lists of rounds"),
        (_time([[[1.5]]]), r"'entries\[0\].wall_ns' must be lists of rounds"),
        (_time([[[1]]]), r"'entries\[0\].cpu_ns' must be as long as"),
        (
            lambda d: d["entries"][0]["convolutions"][0].update(kernel=0),
            r"convolutions\[0\].kernel' must be a whole number",
        ),
    ],
)
def test_wrong_results_are_refused(measured, change, message):
    data = copy.deepcopy(measured[0])
    change(data)
    with pytest.raises(ParameterError, match=message) as caught:
        parse_result(data, "result.json")
    assert str(caught.value).startswith("result.json: ")


def test_results_without_models_are_no_benchmark(measured):
    data = copy.deepcopy(measured[0])
    data["entries"] = data["entries"][:3]
    with pytest.raises(ParameterError, match="has no models; write the kit with"):
        parse_result(data, "result.json").benchmark()
    data = copy.deepcopy(measured[0])
    for key in ("wall_ns", "cpu_ns"):
        data["entries"][4][key] = data["entries"][4][key][:1]
    with pytest.raises(ParameterError, match="models with equal visits"):
        parse_result(data, "result.json").benchmark()


def test_chains_with_elements_name_their_base(tmp_path):
    from onnxcomp.kit import assemble

    assemble(tmp_path, [ELEMENT_BASE, f"{ELEMENT_BASE} SiLU"])
    base, silu = json.loads((tmp_path / "kit.json").read_text())["entries"]
    assert (base["base"], silu["base"]) == ("", ELEMENT_BASE)
    assert silu["elements"] == {"Sigmoid": 3 * 32 * 56 * 56, "Mul": 3 * 32 * 56 * 56}
