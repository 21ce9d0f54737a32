"""`onnxcomp tune` from outside: files, exit codes, what goes to which stream."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the bridge needs PyTorch")

from onnxcomp import load
from onnxcomp.cli import tune as module
from onnxcomp.loading import PACKED_MAGIC
from onnxcomp.opening import Opened
from onnxcomp.samples import load_samples
from onnxcomp.tune import TuneResult
from tests.analysis.channel_graphs import Graph
from tests.search.cases import CASES
from tests.search.searching import inputs, wide
from tests.test_cli import call, digest, start
from tests.test_tune import noisy

NAMES = ("student.onnx", "teacher.onnx", "other.onnx", "samples.npz", "labelled.npz")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A noisy model, its original, another model, and samples."""
    folder = tmp_path_factory.mktemp("files")
    teacher = wide(classes=True)
    teacher.save(folder / "teacher.onnx")
    noisy(teacher).save(folder / "student.onnx")
    CASES["two_heads"]().save(folder / "other.onnx")
    arrays = inputs(teacher, 48)
    np.savez(folder / "samples.npz", **arrays)
    np.savez(folder / "labelled.npz", **arrays, labels=np.arange(48) % 16)
    return {name: folder / name for name in NAMES}


@pytest.fixture
def here(files, tmp_path, monkeypatch) -> Path:
    """An empty folder; models are opened in this process, without their first run."""

    def opened(path: Path, data: Path, *, preprocess: Path | None) -> Opened:
        model = load(path)
        return Opened(
            model, load_samples(data, model.signature.inputs, preprocess=preprocess), ()
        )

    monkeypatch.setattr(module, "open_model", opened)
    return tmp_path


def arguments(files: dict[str, Path], **changes: str) -> list[object]:
    named = {"model": "student.onnx", "teacher": "teacher.onnx", "data": "samples.npz"}
    chosen = {key: files[name] for key, name in (named | changes).items()}
    return ["tune", chosen["model"], "--teacher", chosen["teacher"], "--data", chosen["data"]]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fake(monkeypatch, **given: object) -> list[dict[str, object]]:
    """Tuning that ends at once, with the keywords of every call."""
    seen: list[dict[str, object]] = []

    def tuning(model, teacher, data, settings, **options: object) -> TuneResult:
        seen.append({**vars(settings), **options, "data": data})
        return TuneResult(model, **({"before": 2.0, "after": 1.0, "history": ()} | given))

    monkeypatch.setattr(module, "tune_model", tuning)
    return seen


def test_a_tuned_model_is_written_and_told(here, files) -> None:
    out = here / "out.onnx"
    before = {name: digest(path) for name, path in files.items()}
    result = call(*arguments(files), "-o", out, "--epochs", "2", "--seed", "3")
    assert {name: digest(path) for name, path in files.items()} == before
    assert left(here) == ["out.onnx"]
    student, tuned = load(files["student.onnx"]), load(out)
    assert tuned.signature == student.signature
    assert [n.id for n in tuned.nodes] == [n.id for n in student.nodes]
    assert tuned.digest != student.digest
    assert out.stat().st_size == files["student.onnx"].stat().st_size
    assert "hold-out loss: " in result.stdout
    assert "teacher: hold-out samples" in result.stderr
    assert "tune: outputs, epoch 1 of 1" in result.stderr
    again = call(
        *arguments(files), "-o", here / "b.onnx", "--epochs", "2", "--seed", "3", "--quiet"
    )
    assert digest(here / "b.onnx") == digest(out)
    assert again.stderr == ""


def test_a_packed_file_is_written_where_the_name_says_so(here, files) -> None:
    for name in ("a.onnx", "a.onnxc"):
        call(*arguments(files), "-o", here / name, "--epochs", "1")
    assert (here / "a.onnxc").read_bytes().startswith(PACKED_MAGIC)
    assert load(here / "a.onnxc").digest == load(here / "a.onnx").digest


def test_nothing_better_is_said_and_ends_with_0(here, files) -> None:
    out = here / "out.onnx"
    same = arguments(files, model="teacher.onnx")
    result = call(*same, "-o", out, "--epochs", "1")
    assert "note: nothing did better on the samples held out" in result.stderr
    assert load(out).digest == load(files["teacher.onnx"]).digest


def test_flags_mean_what_they_say(here, files, monkeypatch) -> None:
    seen = fake(monkeypatch)
    call(*arguments(files), "-o", here / "a.onnx")
    flags = ["--epochs", "7", "--labels", "--device", "cuda", "--time-limit", "10m"]
    flags += ["--resume", here / "state", "--seed", "5", "--threads", "2", "--quiet"]
    flags += ["--blocks", "first", "--augment", "mixup", "--optimizer", "sgd"]
    flags += ["--learning-rate", "0.01", "--memory", "4GB"]
    call(*arguments(files), "-o", here / "a.onnx", *flags)
    for options in seen:
        del options["progress"], options["data"]
    usual = {"epochs": None, "labels": False, "device": "cpu", "time_limit": None}
    usual |= {"blocks": "auto", "augment": "light", "optimizer": "adamw"}
    usual |= {"learning_rate": None, "resume": None, "seed": 0, "threads": 1}
    usual |= {"batch": 32, "keep_structure": True, "memory": 1e9}
    assert seen[0] == usual
    wanted = usual | {"epochs": 7, "labels": True, "device": "cuda", "time_limit": 600.0}
    wanted |= {"blocks": "first", "augment": "mixup", "optimizer": "sgd"}
    wanted |= {"learning_rate": 0.01, "resume": here / "state", "seed": 5, "threads": 2}
    wanted["memory"] = 4e9
    assert seen[1] == wanted


def test_an_interrupt_ends_with_130_and_the_best(here, files, monkeypatch) -> None:
    fake(monkeypatch, interrupted=True, notes=("interrupted; this is the best so far",))
    out = here / "a.onnx"
    result = call(*arguments(files), "-o", out, code=130)
    assert f"interrupted; the best so far is in {out}" in result.stderr
    assert load(out).digest == load(files["student.onnx"]).digest


def test_an_interrupt_before_training_ends_with_130_and_the_model(here, files, monkeypatch):
    fake(monkeypatch, interrupted=True, before=None, after=None)
    result = call(*arguments(files), "-o", here / "a.onnx", code=130)
    assert "not trained" in result.stdout
    assert left(here) == ["a.onnx"]


def test_the_time_limit_ends_with_0_and_a_note(here, files) -> None:
    result = call(*arguments(files), "-o", here / "a.onnx", "--time-limit", "1us")
    assert "note: the time limit was reached before training began" in result.stderr
    assert load(here / "a.onnx").digest == load(files["student.onnx"]).digest


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"teacher": "other.onnx"}, [], "of the teacher"),
        ({}, ["--labels"], "the data have no 'labels'"),
        ({}, ["--device", "tpu"], "'device' must be one of cpu, cuda"),
        ({}, ["--epochs", "0"], "--epochs"),
        ({}, ["--blocks", "some"], "'blocks' must be one of added, auto, first, off"),
        ({}, ["--augment", "some"], "'augment' must be one of light, mixup, none"),
        ({}, ["--optimizer", "some"], "'optimizer' must be one of adamw, sgd"),
        ({}, ["--time-limit", "soon"], "--time-limit"),
        ({}, ["-o", "."], "is a folder"),
    ],
    ids=str,
)
def test_wrong_use_ends_with_2_and_writes_nothing(
    here, files, changes, flags, message
) -> None:
    given = arguments(files, **changes)
    result = call(*given, "-o", here / "a.onnx", *flags, code=2)
    assert message in result.stderr
    assert left(here) == []


def test_inputs_are_never_overwritten(here, files) -> None:
    for name in ("student.onnx", "teacher.onnx", "samples.npz"):
        result = call(*arguments(files), "-o", files[name], code=2)
        assert "is an input, which is never overwritten" in result.stderr


def test_labels_are_used(here, files) -> None:
    given = arguments(files, data="labelled.npz")
    for name, flags in (("a", []), ("b", ["--labels"])):
        call(*given, "-o", here / f"{name}.onnx", "--epochs", "2", *flags)
    assert digest(here / "a.onnx") != digest(here / "b.onnx")


def test_pictures_need_a_file_that_says_what_becomes_of_them(here, files, monkeypatch) -> None:
    pillow = pytest.importorskip("PIL.Image")
    g = Graph(3, 16, 16)
    g.model(g.conv("x", 3, 4)).save(here / "model.onnx")
    (here / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for index in range(5):
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        pillow.fromarray(pixels).save(here / "pictures" / f"{index}.png")
    (here / "images.yaml").write_text("scale: 0.00392156862745098\nlayout: nchw\n")
    seen = fake(monkeypatch)
    given = ["tune", here / "model.onnx", "--teacher", here / "model.onnx"]
    given += ["--data", here / "pictures", "-o", here / "out.onnx"]
    result = call(*given, code=2)
    assert "a folder of images needs a preprocessing file" in result.stderr
    call(*given, "--preprocess", here / "images.yaml")
    (samples,) = [options["data"] for options in seen]
    assert samples.arrays["x"].shape == (5, 3, 16, 16)
    assert 0.9 < samples.arrays["x"].max() <= 1.0


def test_a_missing_torch_ends_with_2_and_names_the_extra(here, files, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    result = call(*arguments(files), "-o", here / "a.onnx", code=2)
    assert "pip install 'onnxcomp[torch]'" in result.stderr


@pytest.mark.heavy
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_a_program_that_is_ended_goes_on(files, tmp_path, kind) -> None:
    """Ended when a state is there; then the same bytes as undisturbed."""

    def begin(name: str) -> subprocess.Popen[str]:
        given = [*arguments(files), "-o", tmp_path / f"{name}.onnx", "--epochs", "200"]
        return start(*given, "--resume", tmp_path / name)

    def finish(name: str) -> None:
        with begin(name) as process:
            _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr

    finish("whole")
    with begin("cut") as process:
        while not list(tmp_path.glob("cut/*.entry")):
            time.sleep(0.02)
            assert process.poll() is None
        time.sleep(0.3)
        process.send_signal(kind)
        _, stderr = process.communicate(timeout=60)
    if kind == signal.SIGINT:
        assert process.returncode == 130, stderr
        assert digest(tmp_path / "cut.onnx") != digest(tmp_path / "whole.onnx")
    else:
        assert not (tmp_path / "cut.onnx").exists()
    finish("cut")
    assert digest(tmp_path / "cut.onnx") == digest(tmp_path / "whole.onnx")
