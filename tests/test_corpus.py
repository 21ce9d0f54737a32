"""The 52 hostile files, truncations and flipped bytes: a typed refusal or success, quickly."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from onnxcomp.errors import OnnxcompError, UnsupportedModelError
from onnxcomp.loading import read_model
from onnxcomp.sandbox import first_run
from tests.corpus import build

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "models"
MEMORY_BYTES = 2 * 10**9
SECONDS = 10

# Reads every case in one process of at most 2 GB, as a case that kills it fails the rest.
READER = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
from onnxcomp.errors import OnnxcompError
from onnxcomp.loading import read_model
for path in sys.argv[2:]:
    start, outcome, text = time.perf_counter(), "ok", ""
    try:
        loaded = read_model(path)
        text = " ".join((*loaded.foreign_ops, *loaded.warnings))
    except OnnxcompError as error:
        outcome, text = type(error).__name__, str(error)
    print(json.dumps([path, outcome, text, time.perf_counter() - start]), flush=True)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> dict[int, Path]:
    return build.build(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def outcomes(corpus) -> dict[int, tuple[str, str, float]]:
    paths = {str(path): number for number, path in corpus.items()}
    result = subprocess.run(
        [sys.executable, "-c", READER, str(MEMORY_BYTES), *paths],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=SECONDS * 6,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    return {paths[path]: (outcome, text, s) for path, outcome, text, s in answers}


def test_there_are_52_cases():
    assert [case.number for case in build.CASES] == list(range(1, 53))


@pytest.mark.parametrize("case", build.CASES, ids=lambda case: f"{case.number}")
def test_case_ends_as_expected(case, outcomes):
    outcome, text, seconds = outcomes[case.number]
    assert (outcome, case.says in text) == (case.expected, True), text
    assert seconds < SECONDS


def test_a_wrong_expectation_would_be_noticed(outcomes):
    assert outcomes[1][0] != build.INVALID
    assert build.CASES[18].says not in outcomes[20][1]


@pytest.mark.parametrize("number", [1, 2, 29])
def test_accepted_case_runs_in_the_sandbox(number, corpus):
    loaded = read_model(corpus[number])
    first_run(loaded, memory_bytes=MEMORY_BYTES, timeout_s=SECONDS)


def test_foreign_operators_are_named_and_the_sandbox_decides(corpus):
    custom, contrib = read_model(corpus[31]), read_model(corpus[32])
    assert custom.foreign_ops == ("com.example::Secret",)
    assert contrib.foreign_ops == ("com.microsoft::QuickGelu",)
    first_run(contrib, timeout_s=SECONDS)
    with pytest.raises(UnsupportedModelError, match="Secret"):
        first_run(custom, timeout_s=SECONDS)


def damaged(seed: int, count: int) -> Iterator[bytes]:
    """Yield real and small models with flipped bytes, and some cut short."""
    real = [path.read_bytes() for path in sorted(SHARED.glob("*.onnx"))]
    small = [case.make() for case in build.CASES if len(case.make()) < 5000]
    small += [build.nested_ifs(3), build.loop(5), build.conv(pads=[1, 1, 1, 1])()]
    rng = random.Random(seed)
    for index in range(count):
        # Real files are nearly all weights; small ones are hit where it matters.
        sources = real if real and index % 2 else small
        data = bytearray(rng.choice([source for source in sources if source]))
        if index % 10 == 0:
            yield bytes(data[: rng.randrange(len(data))])
            continue
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        yield bytes(data)


def read_all(folder: Path, seed: int, count: int) -> dict[str, int]:
    """Read damaged files and count outcomes; any other exception fails the test."""
    path = folder / "damaged.onnx"
    outcomes = {"ok": 0, "refused": 0}
    for data in damaged(seed, count):
        path.write_bytes(data)
        try:
            read_model(path)
        except OnnxcompError:
            outcomes["refused"] += 1
        else:
            outcomes["ok"] += 1
    return outcomes


def test_flipped_bytes_are_read_or_refused(tmp_path):
    outcomes = read_all(tmp_path, seed=1, count=400)
    assert outcomes["ok"] > 20
    assert outcomes["refused"] > 100


@pytest.mark.heavy
def test_many_flipped_bytes_of_real_models(tmp_path):
    if not SHARED.is_dir():
        pytest.skip("../shared is absent")
    outcomes = read_all(tmp_path, seed=2, count=4000)
    assert sum(outcomes.values()) == 4000


@pytest.mark.heavy
def test_what_is_read_after_flips_cannot_break_out_of_the_sandbox(tmp_path):
    path, tried = tmp_path / "damaged.onnx", 0
    for data in damaged(seed=3, count=400):
        path.write_bytes(data)
        try:
            loaded = read_model(path)
        except OnnxcompError:
            continue
        tried += 1
        with suppress(OnnxcompError):
            first_run(loaded, timeout_s=SECONDS, memory_bytes=MEMORY_BYTES)
    assert tried > 50


def test_every_truncation_of_a_small_model_is_refused(tmp_path):
    data, path = build.conv()(), tmp_path / "cut.onnx"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(OnnxcompError):
            read_model(path)
