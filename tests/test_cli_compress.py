"""`compress` from outside: limits on time, drop and drift, its own time, what is kept."""

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml

import onnxcomp
from onnxcomp import load
from onnxcomp.analysis import Analysis
from onnxcomp.analysis.target import TARGETS
from onnxcomp.cli import compress as module
from onnxcomp.errors import DataError
from onnxcomp.opening import open_model
from onnxcomp.recipe import load_recipe, resolve
from onnxcomp.search.loss_meter import LossMeter
from onnxcomp.search.pursuit import Pursuit
from onnxcomp.search.settings import Limits, Settings
from tests.search.searching import inputs, wide
from tests.test_cli import call, digest, start

RECIPE = "schema_version: 1\nmethods: [remove_channels]\ngrid: 16\nlatency: false\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A model, samples, and a recipe with which a compression takes a second."""
    folder = tmp_path_factory.mktemp("files")
    model = wide(classes=True)
    model.save(folder / "model.onnx")
    np.savez(folder / "samples.npz", **inputs(model))
    (folder / "quick.yaml").write_text(RECIPE)
    return {name: folder / name for name in ("model.onnx", "samples.npz", "quick.yaml")}


@pytest.fixture
def here(files, tmp_path, monkeypatch) -> Path:
    """An empty folder; the model is opened in this process, without its first run."""
    opened = open_model(files["model.onnx"], files["samples.npz"])
    monkeypatch.setattr(module, "open_model", lambda *_, **__: opened)
    return tmp_path


def compress(files: dict[str, Path], *args: object, code: int = 0):
    quick = ["--recipe", files["quick.yaml"], "--data", files["samples.npz"]]
    return call("compress", files["model.onnx"], *args, *quick, code=code)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("args", "settings"),
    [
        (["--max-latency", "4ms"], Settings(limits=Limits(latency=4000.0))),
        (["--max-latency", "60%"], Settings(limits=Limits(latency=0.6))),
        (["--max-latency", "0.6"], Settings(limits=Limits(latency=0.6))),
        (["--max-drop", "1%"], Settings(limits=Limits(drop=0.01))),
        (["--max-drift", "0.05"], Settings(limits=Limits(drift=0.05))),
        (["--max-drift", "5%"], Settings(limits=Limits(drift=0.05))),
        (["--time-limit", "10m"], Settings(time_limit=600.0)),
        (["--time-limit", "90s"], Settings(time_limit=90.0)),
        (["--tune"], Settings(tune=True)),
        (
            ["--max-drop", "0.5%", "--max-macs", "0.5", "--max-latency", "8ms"],
            Settings(limits=Limits(macs=0.5, latency=8000.0, drop=0.005)),
        ),
    ],
    ids=str,
)
def test_flags_mean_what_they_say(args, settings, here, files, monkeypatch):
    seen = []

    def stop(model, data, **given: object) -> None:
        seen.append(given)
        raise DataError("only the arguments are looked at")

    monkeypatch.setattr(module, "compress_model", stop)
    call("compress", files["model.onnx"], "-o", here / "a.onnx", *args, code=2)
    assert seen[0]["settings"] == settings
    assert seen[0]["resume"] is None
    state = ["--resume", here / "state"]
    call("compress", files["model.onnx"], "-o", here / "a.onnx", *args, *state, code=2)
    assert seen[1]["resume"] == here / "state"


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--max-latency", "2"),
        ("--max-latency", "150%"),
        ("--max-latency", "0ms"),
        ("--max-latency", "4 parsecs"),
        ("--max-drop", "0"),
        ("--max-drop", "-1%"),
        ("--max-drift", "far"),
        ("--time-limit", "10"),
        ("--time-limit", "0s"),
        ("--time-limit", "soon"),
    ],
)
def test_wrong_values_end_with_2_and_name_the_flag(flag, value, here, files):
    result = compress(files, "-o", here / "a.onnx", flag, value, code=2)
    assert flag in result.stderr
    assert value in result.stderr
    assert not left(here)


def test_a_resume_folder_of_something_else_is_refused(here, files):
    foreign = here / "photos"
    foreign.mkdir()
    (foreign / "photo.jpg").write_bytes(b"")
    args = ["-o", here / "a.onnx", "--max-macs", "0.5", "--resume", foreign]
    result = compress(files, *args, code=2)
    assert f"--resume: '{foreign}' holds files that are not of a run" in result.stderr
    assert left(foreign) == ["photo.jpg"]
    assert left(here) == ["photos"]


def test_a_resumed_run_measures_nothing_and_ends_the_same(here, files, monkeypatch):
    args = ["--max-drift", "1%", "--resume", here / "state"]
    compress(files, "-o", here / "first.onnx", *args)

    def fail(*_: object) -> None:
        raise AssertionError("this was measured already")

    monkeypatch.setattr(LossMeter, "_visit", fail)
    compress(files, "-o", here / "second.onnx", *args)
    assert digest(here / "second.onnx") == digest(here / "first.onnx")
    result = compress(files, "-o", here / "third.onnx", *args, "--seed", "1", code=1)
    assert "measured already" in result.stderr
    assert not (here / "third.onnx").exists()


def test_out_is_there_from_the_start_and_goes_with_an_error(here, files, monkeypatch):
    out, original = here / "a.onnx", load(files["model.onnx"])

    def fail(model, data, *, keep, **_: object) -> None:
        keep(model)
        assert load(out).digest == original.digest
        raise DataError("it rains")

    monkeypatch.setattr(module, "compress_model", fail)
    assert "it rains" in compress(files, "-o", out, code=2).stderr
    assert not left(here)


def test_a_model_that_was_there_stays_until_there_is_a_better_one(here, files, monkeypatch):
    out, better = here / "a.onnx", wide()
    proto = onnx.load(files["model.onnx"])
    proto.doc_string = "of yesterday"
    onnx.save(proto, out)
    yesterday = digest(out)

    def once(model, data, *, keep, **_: object) -> None:
        keep(model)
        assert digest(out) == yesterday
        raise DataError("it rains")

    def twice(model, data, *, keep, **_: object) -> None:
        keep(model)
        keep(better)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "compress_model", once)
    compress(files, "-o", out, code=2)
    assert digest(out) == yesterday
    monkeypatch.setattr(module, "compress_model", twice)
    assert "interrupted" in compress(files, "-o", out, code=130).stderr
    assert load(out).digest == better.digest


@pytest.mark.parametrize("kind", ["text", "other model"])
def test_what_is_no_such_model_makes_way_at_once(kind, here, files, monkeypatch):
    out, original = here / "a.onnx", load(files["model.onnx"])
    if kind == "text":
        out.write_bytes(b"of yesterday")
    else:
        wide().save(out)

    def interrupted(model, data, *, keep, **_: object) -> None:
        keep(model)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "compress_model", interrupted)
    compress(files, "-o", out, code=130)
    assert load(out).digest == original.digest


def test_the_recipe_of_a_result_runs_it_again(here, files):
    args = ["-o", here / "a.onnx", "--data", files["samples.npz"]]
    compress(files, "-o", here / "a.onnx", "--max-drift", "1%")
    recipe = here / "a.recipe.yaml"
    before = digest(here / "a.onnx"), digest(recipe)
    call("compress", files["model.onnx"], *args, "--recipe", recipe)
    assert (digest(here / "a.onnx"), digest(recipe)) == before
    other = [*args, "--recipe", recipe, "--max-drift", "2%"]
    result = call("compress", files["model.onnx"], *other, code=2)
    assert f"-o (its recipe): '{recipe}' is an input" in result.stderr


def test_a_target_of_a_file_is_an_input_like_others(here, files, monkeypatch):
    target = here / "mine.json"
    target.write_text(json.dumps(TARGETS["arm64"].to_json()))
    args = ["--max-drift", "1%", "--target", target]
    result = compress(files, "-o", here / "a.onnx", *args, "--json", target, code=2)
    assert f"--json: '{target}' is an input, which is never overwritten" in result.stderr
    args += ["--resume", here / "state"]
    compress(files, "-o", here / "a.onnx", *args)
    made = yaml.safe_load((here / "a.recipe.yaml").read_text())["provenance"]["target"]
    assert made == {"path": str(target), "sha256": digest(target)}
    target.write_text(json.dumps(TARGETS["x86-avx2"].to_json()))

    def fail(*_: object) -> None:
        raise AssertionError("of another target")

    monkeypatch.setattr(LossMeter, "_visit", fail)
    result = compress(files, "-o", here / "b.onnx", *args, code=1)
    assert "of another target" in result.stderr


def test_phases_take_the_time_that_passes(files):
    model = load(files["model.onnx"])
    start = time.monotonic()
    limits, settings = Limits(latency=200.0), Settings(time_limit=4.0)
    found = onnxcomp.compress(model, inputs(model), limits=limits, settings=settings)
    passed = time.monotonic() - start
    assert {"latency", "final latency"} <= found.report.seconds.keys()
    assert 0.8 * passed < sum(found.report.seconds.values()) <= passed


def test_what_was_kept_stays_after_ctrl_c(here, files, monkeypatch):
    def interrupted(model, data, *, keep, **_: object) -> None:
        keep(model)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "compress_model", interrupted)
    result = compress(files, "-o", here / "a.onnx", code=130)
    assert "interrupted" in result.stderr
    assert left(here) == ["a.onnx"]
    assert load(here / "a.onnx").digest == load(files["model.onnx"]).digest


def test_an_interrupted_search_ends_with_130_and_the_best(here, files, monkeypatch):
    def interrupt(self: Pursuit) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pursuit, "run", interrupt)
    out = here / "a.onnx"
    result = compress(files, "-o", out, "--max-drift", "1%", code=130)
    assert f"interrupted; the best so far is in {out}" in result.stderr
    cost = Analysis(load(out)).cost
    assert cost.macs == Analysis(load(files["model.onnx"])).cost.macs
    assert left(here) == ["a.onnx", "a.recipe.yaml"]


def test_limits_that_exclude_each_other_end_with_5_and_the_best(here, files):
    out = here / "a.onnx"
    args = ["--max-macs", "20%", "--max-drift", "0.001", "--json", here / "a.json"]
    result = compress(files, "-o", out, *args, code=5)
    assert "limit not met" in result.stderr
    assert str(out) in result.stderr
    assert json.loads((here / "a.json").read_text())["met"] is False
    assert load(out).signature == load(files["model.onnx"]).signature


def test_no_time_ends_with_5_and_the_prepared_original(here, files):
    out = here / "a.onnx"
    args = ["--max-macs", "50%", "--time-limit", "1us", "--json", here / "a.json"]
    compress(files, "-o", out, *args, code=5)
    report = json.loads((here / "a.json").read_text())
    assert any("time limit" in note for note in report["notes"])
    assert report["result"]["macs"] == report["original"]["macs"]


@pytest.mark.parametrize(
    ("args", "metric"), [(["--max-drift", "1%"], None), (["--max-drop", "1%"], "agreement")]
)
def test_limits_on_what_is_lost_give_a_faster_model(args, metric, here, files):
    out = here / "a.onnx"
    compress(files, "-o", out, *args, "--json", here / "a.json")
    report = json.loads((here / "a.json").read_text())
    assert report["met"] is True
    found = report["ladder"]["evaluation"]
    assert found["metric"] == metric
    assert found["relative_l2"] > 0
    assert (found["drop"] or 0.0 if metric else found["relative_l2"]) <= 0.01
    assert report["result"]["macs"] < 0.8 * report["original"]["macs"]
    recipe = resolve(load_recipe(here / "a.recipe.yaml"), {})
    assert recipe.limits == Limits(**{"drop" if metric else "drift": 0.01})


def test_dry_runs_take_the_new_limits(here, files):
    args = ["-o", here / "a.onnx", "--dry-run", "--json", "-"]
    result = json.loads(compress(files, *args, "--max-drift", "1%").stdout)
    assert result["dry_run"] is True
    assert result["result"]["macs"] < result["original"]["macs"]
    assert not left(here)


@pytest.mark.heavy
def test_a_program_that_is_killed_leaves_a_model_and_goes_on(files, tmp_path):
    """SIGKILL at moments of its progress; then the same bytes as undisturbed."""
    quick = ["--recipe", files["quick.yaml"], "--data", files["samples.npz"]]

    def begin(name: str) -> subprocess.Popen[str]:
        out, state = tmp_path / f"{name}.onnx", tmp_path / name
        args = ["--max-drift", "1%", "--resume", state, *quick]
        return start("compress", files["model.onnx"], "-o", out, *args)

    with begin("whole") as process:
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    for moment in ("losses", "walk", "judge"):
        out = tmp_path / f"{moment}.onnx"
        with begin(moment) as process:
            for line in process.stderr:
                if moment in line:
                    break
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=60)
        assert load(out).signature == load(files["model.onnx"]).signature
        with begin(moment) as process:
            _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        assert digest(out) == digest(tmp_path / "whole.onnx")
