"""The commands from outside: results, files, exit codes, and what goes to which stream."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from onnxcomp import cli, load
from onnxcomp.analysis import Analysis

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "models" / "digits" / "digits.onnx"
SAMPLES = DIGITS.with_name("samples.npz")
# A job that runs in the background of a script has SIGINT ignored, and so have its children.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from onnxcomp.cli import main
main()
"""
QUICK = """
schema_version: 1
methods: [factorize]
exclude: "blocks.[0]"
solver_seconds: 5
latency: false
"""


def call(*args, code=0):
    """Run a command in this process; check its exit code, and that no traceback shows."""
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def start(*args, **options):
    """Start the program as a process of its own."""
    command = [sys.executable, "-c", PROGRAM, *map(str, args)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


# A library in C prints whatever it likes.
NOISY = """
import ctypes
from onnxcomp import cli
inspected = cli.inspect.inspect_model

def noisy(*args, **options):
    ctypes.CDLL(None).puts(b"a line for developers")
    return inspected(*args, **options)

cli.inspect.inspect_model = noisy
cli.main()
"""


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A recipe and samples with which a compression takes two seconds."""
    folder = tmp_path_factory.mktemp("quick")
    (folder / "quick.yaml").write_text(QUICK)
    with np.load(SAMPLES) as arrays:
        np.savez(folder / "few.npz", **{name: arrays[name][:16] for name in arrays})
    return ["--recipe", folder / "quick.yaml", "--data", folder / "few.npz"]


@pytest.fixture(scope="module")
def compressed(tmp_path_factory, quick):
    """The files of one compression, and what was printed."""
    folder = tmp_path_factory.mktemp("compressed")
    files = [
        "-o",
        folder / "small.onnx",
        "--report",
        folder / "r.html",
        "--json",
        folder / "r",
    ]
    before = digest(DIGITS)
    result = call("compress", DIGITS, "--max-macs", "70%", "--metric", "top1", *files, *quick)
    assert digest(DIGITS) == before
    return folder, result


@pytest.fixture
def foreign(tmp_path):
    """A sound model with an operator that nobody knows."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Twist", ["c"], ["y"], domain="vendor.ops"),
    ]
    weight = numpy_helper.from_array(np.ones((2, 3, 1, 1), np.float32), "w")
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, 4, 4])
        for name, channels in (("x", 3), ("y", 2))
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weight])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("vendor.ops", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    path = tmp_path / "foreign.onnx"
    onnx.save(model, path)
    return path


def changed(path, change):
    """Save the demo model with its last bias changed."""
    model = onnx.load(DIGITS)
    bias = model.graph.node[-1].input[2]
    for tensor in model.graph.initializer:
        if tensor.name == bias:
            tensor.CopyFrom(
                numpy_helper.from_array(change(numpy_helper.to_array(tensor)), bias)
            )
    onnx.save(model, path)
    return path


def test_compress_writes_a_smaller_model(compressed):
    folder, result = compressed
    small, original = (Analysis(load(path)) for path in (folder / "small.onnx", DIGITS))
    assert small.cost.macs <= 0.7 * original.cost.macs
    assert (folder / "small.onnx").stat().st_size < DIGITS.stat().st_size
    assert small.model.signature == original.model.signature
    assert "file size" in result.stdout
    assert "top1: 1.0000 -> " in result.stdout


def test_compress_tells_the_same_in_json_and_html(compressed):
    folder, _ = compressed
    report = json.loads((folder / "r").read_text())
    assert report["schema_version"] == 1
    assert report["met"] is True
    assert report["original"]["file_bytes"] == DIGITS.stat().st_size
    assert report["result"]["file_bytes"] == (folder / "small.onnx").stat().st_size
    cost = Analysis(load(folder / "small.onnx")).cost
    assert report["result"]["macs"] == cost.macs
    page = (folder / "r.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "MACs of each layer" in page


def test_progress_goes_to_stderr_only(compressed, quick, tmp_path):
    _, result = compressed
    assert "losses" in result.stderr
    assert "losses" not in result.stdout
    out = tmp_path / "small.onnx"
    quiet = call("compress", DIGITS, "-o", out, "--json", "-", "--quiet", *quick)
    assert quiet.stderr == ""
    assert json.loads(quiet.stdout)["met"] is True


def test_resolved_recipe_gives_the_same_file(compressed, quick, tmp_path):
    folder, _ = compressed
    recipe, out = folder / "small.recipe.yaml", tmp_path / "again.onnx"
    call("compress", DIGITS, "-o", out, "--recipe", recipe, *quick[2:])
    assert digest(out) == digest(folder / "small.onnx")
    again = (tmp_path / "again.recipe.yaml").read_text().partition("provenance")[0]
    assert again == recipe.read_text().partition("provenance")[0]


def test_limit_that_cannot_be_met_writes_the_best_and_says_which(quick, tmp_path):
    out = tmp_path / "small.onnx"
    result = call("compress", DIGITS, "-o", out, "--max-size", "50kB", *quick, code=5)
    assert "--max-size 50.0 kB: found" in result.stderr
    assert 50_000 < out.stat().st_size <= DIGITS.stat().st_size


def test_compress_refuses_to_overwrite_inputs(quick, tmp_path):
    link = tmp_path / "link.onnx"
    link.symlink_to(DIGITS)
    before = digest(DIGITS)
    for flag, args in (
        ("-o", ["-o", DIGITS]),
        ("-o", ["-o", link]),
        ("--json", ["-o", tmp_path / "a.onnx", "--json", quick[3]]),
        ("--report", ["-o", tmp_path / "a.onnx", "--report", quick[1]]),
    ):
        result = call("compress", DIGITS, *args, *quick, code=2)
        assert f"{flag}: " in result.stderr
        assert "never overwritten" in result.stderr
    own = tmp_path / "a.recipe.yaml"
    own.write_text(QUICK)
    other = ["-o", tmp_path / "a.onnx", "--recipe", own, "--max-macs", "0.5"]
    assert "-o (its recipe): " in call("compress", DIGITS, *other, code=2).stderr
    result = call("compress", DIGITS, "-o", tmp_path / "a", "--json", tmp_path / "a", code=2)
    assert "would be written twice" in result.stderr
    assert digest(DIGITS) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.recipe.yaml", "link.onnx"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--max-macs", "150%"], "--max-macs"),
        (["--max-size", "big"], "--max-size"),
        (["--methods", "magic"], "--methods: 'methods' must be one of compress_collab"),
        (["--target", "abacus"], "--target: 'target' must be one of arm64"),
        (["--grid", "7.5"], "--grid: 'grid' must be 'auto', 'off' or a number"),
        (["--exclude", "("], "--exclude: 'exclude' must be a regular expression"),
        (["--threads", "0"], "--threads"),
        (["--metric", "magic"], "top1, psnr"),
        (["--data", "absent.npz"], "absent.npz"),
        (["--recipe", "absent.yaml"], "absent.yaml"),
        (["--tune"], "--tune"),
        (["--device", "cuda"], "--device: nothing is trained there without --tune"),
        (["--dry-run", "--report", "a.html"], "--report: --dry-run makes no model"),
    ],
)
def test_wrong_flags_end_with_2_and_are_named(args, message, tmp_path):
    result = call("compress", DIGITS, "-o", tmp_path / "a.onnx", *args, code=2)
    assert message in result.stderr
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


def test_usage_errors_end_with_2(tmp_path):
    assert "-o" in call("compress", DIGITS, code=2).stderr
    call("magic", code=2)
    result = call("compress", DIGITS, "-o", tmp_path / "absent" / "a.onnx", code=2)
    assert "folder that does not exist" in result.stderr
    for flag in ("--json", "--report"):
        args = ["-o", tmp_path / "a.onnx", flag, "/proc/a"]
        result = call("compress", DIGITS, *args, code=2)
        assert f"{flag}: '/proc/a' cannot be written" in result.stderr
    result = call("inspect", DIGITS, "--json", "/dev/null", code=2)
    assert "--json: '/dev/null' is no ordinary file" in result.stderr
    assert not list(tmp_path.iterdir())


def test_broken_files_end_with_2_and_one_line(tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(DIGITS.read_bytes()[:5000])
    for command in (["inspect", broken], ["compress", broken, "-o", tmp_path / "a.onnx"]):
        result = call(*command, code=2)
        assert "broken.onnx" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_inspect_shows_layers_groups_and_refusals(tmp_path):
    page = tmp_path / "page.html"
    result = call("inspect", DIGITS, "--html", page, "--json", tmp_path / "facts.json")
    for text in ("14.2 M", "/fc/Gemm", "channel group", "it is the graph output 'logits'"):
        assert text in result.stdout
        assert text.replace("'", "&#x27;").replace("channel group", "Channel groups") in (
            page.read_text()
        )
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert sum(layer["macs"] for layer in facts["layers"]) == facts["cost"]["macs"]
    assert {"factorize", "remove_channels"} <= {view["name"] for view in facts["passes"]}


def test_foreign_operators_are_inspected_but_not_compressed(foreign, tmp_path):
    facts = json.loads(call("inspect", foreign, "--json", "-").stdout)
    assert facts["foreign_ops"] == ["vendor.ops::Twist"]
    assert facts["cost"]["params"] == 6
    assert "vendor.ops::Twist" in facts["notes"][0]
    assert "MACs per sample   unknown" in call("inspect", foreign).stdout
    result = call("compress", foreign, "-o", tmp_path / "a.onnx", code=3)
    assert "vendor.ops::Twist" in result.stderr
    assert not (tmp_path / "a.onnx").exists()


def test_names_are_neither_markup_nor_control_codes(tmp_path):
    model = onnx.load(DIGITS)
    for node in model.graph.node:
        node.name = f"[red]{node.name}[/red]\x1b[31m<b>"
    onnx.save(model, tmp_path / "named.onnx")
    page = tmp_path / "page.html"
    result = call("inspect", tmp_path / "named.onnx", "--html", page)
    assert "[red]/fc/Gemm[/red]\\x1b[31m<b>" in result.stdout
    for text in (result.stdout, page.read_text()):
        assert "\x1b" not in text
    assert "<b>" not in page.read_text()


def test_compare_gates(tmp_path):
    nudged = changed(tmp_path / "nudged.onnx", lambda bias: bias + np.float32(0.01))
    data = ("--data", SAMPLES)
    gates = ["--max-drop", "0", "--max-drift", "0.1", "--min-speedup", "0.3"]
    result = call("compare", DIGITS, nudged, *data, *gates, "--json", tmp_path / "c.json")
    found = json.loads((tmp_path / "c.json").read_text())
    assert [gate["met"] for gate in found["gates"]] == [True, True, True]
    assert found["evaluation"]["metric"] == "top1"
    assert "A/A control" in result.stdout
    gates = ["--max-drop", "1%", "--max-drift", "1e-6", "--min-speedup", "50"]
    result = call("compare", DIGITS, nudged, *data, *gates, code=5)
    assert "--max-drift 1e-06: found" in result.stderr
    assert "--min-speedup 50: found" in result.stderr
    assert "--max-drop" not in result.stderr


def test_compare_takes_no_gate_that_cannot_fail():
    result = call("compare", DIGITS, DIGITS, "--max-drop", "5", code=2)
    assert "5 means 500 points; 5% is 0.05" in result.stderr


def test_compare_without_data_says_so_first_and_judges_agreement(tmp_path):
    spoilt = changed(
        tmp_path / "spoilt.onnx", lambda bias: bias + np.arange(10, dtype="f4") * 99
    )
    result = call("compare", DIGITS, spoilt, "--max-drop", "10%", code=5)
    assert "random inputs" in result.stdout.splitlines()[0]
    assert "gate not met: --max-drop 0.1: found" in result.stderr


def test_compare_fails_validation_with_4(tmp_path):
    other = onnx.load(DIGITS)
    other.graph.output[0].name = "scores"
    other.graph.node[-1].output[0] = "scores"
    onnx.save(other, tmp_path / "other.onnx")
    result = call("compare", DIGITS, tmp_path / "other.onnx", code=4)
    assert "validation failed at 'signature'" in result.stderr


def test_bench_measures_all_with_a_control(tmp_path):
    found = json.loads(call("bench", DIGITS, DIGITS, "--json", "-").stdout)
    assert found["names"] == [str(DIGITS)] * 2
    assert found["models"][0]["wall_ratio"]["value"] == 1
    assert 0.5 < found["control"]["wall_ratio"]["value"] < 2


def test_bench_refuses_models_of_other_inputs(tmp_path):
    other = onnx.load(DIGITS)
    other.graph.input[0].name = other.graph.node[0].input[0] = "image"
    onnx.save(other, tmp_path / "other.onnx")
    result = call("bench", DIGITS, tmp_path / "other.onnx", code=2)
    assert "has inputs ['image']" in result.stderr


def test_internal_errors_are_one_line_with_a_hint(monkeypatch):
    def fail(path):
        raise RuntimeError("out of cheese\nredo from start")

    monkeypatch.setattr(cli.inspect, "read_model", fail)
    result = call("inspect", DIGITS, code=1)
    assert result.stderr.startswith("internal error: RuntimeError: out of cheese\\nredo")
    assert "--traceback" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    shown = CliRunner().invoke(cli.app, ["--traceback", "inspect", str(DIGITS)])
    assert shown.exit_code == 1
    assert "in fail" in shown.stderr


@pytest.mark.parametrize("moment", ["prepare", "losses"])
def test_interrupted_run_ends_with_130(moment, tmp_path):
    out = tmp_path / "small.onnx"
    with start(
        "compress", DIGITS, "-o", out, "--max-macs", "0.5", "--data", SAMPLES
    ) as process:
        for line in process.stderr:
            if moment in line:
                break
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr
    assert "Traceback" not in stdout + stderr
    if out.exists():  # the best so far, whole
        assert load(out).signature == load(DIGITS).signature


def test_interrupted_search_writes_the_best_so_far(monkeypatch, quick, tmp_path):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("onnxcomp.search.loss_meter.LossMeter.run", interrupt)
    out = tmp_path / "small.onnx"
    result = call("compress", DIGITS, "-o", out, "--max-macs", "0.5", *quick, code=130)
    assert f"interrupted; the best so far is in {out}" in result.stderr
    assert Analysis(load(out)).cost.macs == Analysis(load(DIGITS)).cost.macs


def test_interrupt_before_anything_is_known_writes_nothing(monkeypatch, tmp_path):
    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("onnxcomp.opening.read_model", interrupt)
    result = call("compress", DIGITS, "-o", tmp_path / "small.onnx", code=130)
    assert "interrupted: what was not finished was not written" in result.stderr
    assert not list(tmp_path.iterdir())


def test_dry_run_prints_the_plan_and_makes_no_model(quick, tmp_path):
    args = ["compress", DIGITS, "-o", tmp_path / "small.onnx", "--dry-run", *quick]
    result = call(*args, "--max-macs", "0.7")
    assert result.stdout.startswith("note: dry run")
    assert "of rank" in result.stdout
    found = json.loads(call(*args, "--max-macs", "0.7", "--json", "-").stdout)
    assert found["dry_run"] is True
    assert found["result"]["macs"] <= 0.7 * found["original"]["macs"]
    assert "--max-macs" in call(*args, "--max-macs", "0.001", code=5).stderr
    assert not list(tmp_path.iterdir())
    call(*args, "--max-macs", "0.7", "--json", tmp_path / "plan.json")
    planned = json.loads((tmp_path / "plan.json").read_text())
    assert planned["actions"] == found["actions"]
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_native_libraries_do_not_print_among_results():
    command = [sys.executable, "-c", NOISY, "inspect", DIGITS, "--json", "-"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(process.stdout)["schema_version"] == 1
    assert process.stderr == "a line for developers\n"


def test_program_in_a_pipe_that_closes():
    reading, writing = os.pipe()
    os.close(reading)
    command = [
        sys.executable,
        "-c",
        "from onnxcomp.cli import main; main()",
        "inspect",
        DIGITS,
    ]
    with os.fdopen(writing, "wb") as closed:
        process = subprocess.run(
            command, cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True, check=False
        )
    assert process.stderr == ""


def test_help_names_the_program_and_its_flags():
    with start("compress", "--help") as process:
        stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert stdout.startswith("Usage: onnxcomp compress")
    for flag in ("--max-macs", "--max-drop", "--tune", "--emit", "--resume", "--dry-run"):
        assert flag in stdout
    assert "At most so long, such as 10m" in " ".join(stdout.split())  # it may end earlier
