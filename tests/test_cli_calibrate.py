"""`calibrate`, and the kits of `bench`, from outside."""

import json
import zipfile
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from onnxcomp import kit_script
from onnxcomp.analysis.target import TARGETS, Calibration, find_target
from onnxcomp.bench import paired_latency
from onnxcomp.calibration_chains import CHAINS
from onnxcomp.cli import bench, calibrate
from tests.test_cli import DIGITS, SAMPLES, call


def test_bench_kit_and_back(tmp_path):
    kit, out = tmp_path / "kit.zip", tmp_path / "result.json"
    result = call("bench", DIGITS, DIGITS, "--kit", kit, "--data", SAMPLES)
    assert "python kit/measure.py" in result.stdout
    assert "--target" not in result.stdout
    with zipfile.ZipFile(kit) as archive:
        archive.extractall(tmp_path / "kit")
    out.write_text(json.dumps(kit_script.measure(tmp_path / "kit", 1.0)))
    found = json.loads(call("bench", "--kit-result", out, "--json", "-").stdout)
    assert found["names"] == ["digits.onnx", "digits.onnx"]
    assert found["models"][0]["wall_ratio"]["value"] == 1
    assert found["machine"]["threads"] == 1
    assert "A/A control" in call("bench", "--kit-result", out).stdout
    result = call("compress", DIGITS, "-o", tmp_path / "a.onnx", "--target", out, code=2)
    assert f"--target: {out} has times of 0 micro-chains" in result.stderr


def test_calibrate_kit_has_all_chains(monkeypatch, tmp_path):
    monkeypatch.setattr(calibrate, "CHAINS", CHAINS[4:6])
    kit = tmp_path / "kit.zip"
    result = call("calibrate", DIGITS, "--kit", kit)
    assert "--target result.json" in result.stdout
    with zipfile.ZipFile(kit) as archive:
        entries = json.loads(archive.read("kit.json"))["entries"]
    assert [entry["name"] for entry in entries] == [*CHAINS[4:6], "digits.onnx", "A/A control"]


@pytest.mark.parametrize("command", ["compare", "bench", "bench --kit", "calibrate --kit"])
def test_images_are_data(command, monkeypatch, tmp_path):
    (tmp_path / "images").mkdir()
    image = pytest.importorskip("PIL.Image").fromarray(np.arange(64, dtype="u1").reshape(8, 8))
    image.save(tmp_path / "images" / "0.png")
    preprocess, out = tmp_path / "p.yaml", tmp_path / "out"
    preprocess.write_text("{color: gray, mean: [0], std: [1]}")
    monkeypatch.setattr(calibrate, "CHAINS", CHAINS[:1])
    monkeypatch.setattr("onnxcomp.report.comparison._LATENCY_SECONDS", 1.0)
    brief = partial(paired_latency, time_limit_s=1.0)
    monkeypatch.setattr(bench, "paired_latency", brief)
    name, *kit = command.split()
    args = [name, DIGITS, DIGITS, "--data", tmp_path / "images"]
    flag = "--kit" if kit else "--json"
    assert "needs a preprocessing file" in call(*args, flag, out, code=2).stderr
    args += ["--preprocess", preprocess]
    assert "never overwritten" in call(*args, flag, preprocess, code=2).stderr
    call(*args, flag, out)
    assert out.stat().st_size


def test_calibrate_writes_a_target(monkeypatch, tmp_path):
    found = Calibration("some cpu", "x86_64", "1.31.1", 2, 90, 0.0625, 0.25)
    asked = {}

    def measure(**options):
        asked.update(options)
        return replace(TARGETS["x86-avx2"], name="some\x1b cpu", calibration=found)

    monkeypatch.setattr(calibrate, "calibrate_target", measure)
    out = tmp_path / "mine.json"
    result = call("calibrate", "-o", out, "--seconds", "7", "--threads", "2", "--quiet")
    assert (asked["seconds"], asked["threads"]) == (7.0, 2)
    assert find_target(str(out)).block == 8
    printed = " ".join(result.stdout.split())
    for text in ("blocks of 8", "90 micro-chains", "median 6.2 %", f"--target {out}"):
        assert text in printed
    assert "\x1b" not in result.stdout
    result = call("calibrate", "-o", tmp_path / "absent" / "a.json", code=2)
    assert "folder that does not exist" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["bench"], "give at least one MODEL"),
        (["bench", DIGITS, "--kit-result", "r.json"], "give only --json with it"),
        (["bench", "--kit-result", "r.json", "--preprocess", "p.yaml"], "give only --json"),
        (["bench", "--kit-result", "absent.json"], "'absent.json' cannot be read"),
        (["bench", DIGITS, "--kit", "k.zip", "--threads", "2"], "--threads is for measure.py"),
        (["bench", DIGITS, "--kit", DIGITS], "never overwritten"),
        (["bench", DIGITS, "--kit", "absent/k.zip"], "folder that does not exist"),
        (["calibrate", DIGITS], "models, --data and --preprocess are for --kit"),
        (["calibrate", "--preprocess", "p.yaml"], "are for --kit"),
        (["calibrate", "--kit", "k.zip", "-o", "t.json"], "flags of measure.py"),
        (["calibrate", "--kit", "absent/k.zip"], "folder that does not exist"),
        (["calibrate", "--seconds", "0"], "--seconds"),
        (["calibrate", "--threads", "0"], "--threads"),
    ],
)
def test_wrong_flags(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in " ".join(call(*args, code=2).stderr.split())
    assert not list(tmp_path.iterdir())


def test_kits_hold_no_paths_of_this_machine(tmp_path):
    kit = tmp_path / "kit.zip"
    bench.write_model_kit(kit, [DIGITS], None)
    with zipfile.ZipFile(kit) as archive:
        assert str(DIGITS.parent) not in archive.read("kit.json").decode()
