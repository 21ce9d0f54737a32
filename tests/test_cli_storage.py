"""`compress -o x.onnxc` and `--emit codebook` from outside."""

import json

import numpy as np
import pytest

from onnxcomp import load
from onnxcomp.cli import compress as module
from onnxcomp.opening import open_model
from tests.search.searching import inputs, wide
from tests.test_cli import call

RECIPE = "schema_version: 1\nmethods: [share_weights]\nlatency: false\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model, samples and a quick recipe; it is opened in this process."""
    model = wide(classes=True)
    model.save(tmp_path / "model.onnx")
    np.savez(tmp_path / "samples.npz", **inputs(model))
    (tmp_path / "quick.yaml").write_text(RECIPE)
    opened = open_model(tmp_path / "model.onnx", tmp_path / "samples.npz")
    monkeypatch.setattr(module, "open_model", lambda *_, **__: opened)
    return tmp_path


def compress(here, *args: object, code: int = 0):
    given = ["--data", here / "samples.npz", "--recipe", here / "quick.yaml"]
    return call("compress", here / "model.onnx", *args, *given, code=code)


def test_a_packed_file_within_its_limit(here):
    out = here / "small.onnxc"
    compress(here, "-o", out, "--max-size", "0.15", "--json", here / "r.json")
    whole = (here / "model.onnx").stat().st_size
    assert out.stat().st_size <= 0.15 * whole
    report = json.loads((here / "r.json").read_text())
    assert report["result"]["file_bytes"] == out.stat().st_size
    assert "levels" in report["actions"][0]["what"]
    assert load(out).signature == load(here / "model.onnx").signature
    assert "emit: onnxc" in (here / "small.recipe.yaml").read_text()


def test_without_a_limit_it_is_lossless(here):
    out = here / "same.onnxc"
    compress(here, "-o", out)
    assert out.stat().st_size < (here / "model.onnx").stat().st_size
    before, after = load(here / "model.onnx"), load(out)
    assert {n: a.tobytes() for n, a in before.weights.items()} == {
        n: a.tobytes() for n, a in after.weights.items()
    }


def test_codebooks_in_plain_onnx(here):
    out = here / "book.onnx"
    compress(here, "-o", out, "--emit", "codebook", "--max-size", "0.5")
    assert out.stat().st_size < 0.45 * (here / "model.onnx").stat().st_size
    assert {"Gather", "Cast"} <= {node.op for node in load(out).nodes}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-o", "a.onnx", "--emit", "onnxc"], "'--emit' must be one of codebook, onnx"),
        (["-o", "a.onnxc", "--emit", "codebook"], "leave one of them out"),
    ],
)
def test_forms_that_do_not_fit_are_refused(args, words, here):
    args[1] = here / args[1]
    assert words in compress(here, *args, code=2).stderr
    assert not args[1].exists()


def test_a_recipe_of_a_packed_file_asks_for_one(here):
    (here / "quick.yaml").write_text(RECIPE + "emit: onnxc\n")
    result = compress(here, "-o", here / "a.onnx", code=2)
    assert "must end in .onnxc" in result.stderr
