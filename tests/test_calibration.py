"""The fit finds what made the times, on any CPU; real chains run and are what they say."""

import json
from dataclasses import asdict, fields, replace
from functools import lru_cache

import numpy as np
import onnx
import pytest

from onnxcomp import calibration, load
from onnxcomp.analysis import Analysis
from onnxcomp.analysis.target import ELEMENT_NS, TARGETS, Costs, Target, find_target
from onnxcomp.bench import Machine, Recording, paired_latency
from onnxcomp.calibration import calibrate, fit_target
from onnxcomp.calibration_chains import CHAINS, ELEMENT_BASE, Chain, build_chain
from onnxcomp.errors import ParameterError
from onnxcomp.kit import Result, Timed, parse_result
from onnxcomp.model import Model
from onnxcomp.runtime import Session
from tests.graphs import SHARED, sane_feeds
from tests.latency_variants import predicted_seconds, variants

RUN, END = 8e-6, 3e-10  # seconds of any run, and per element of a chain's ends
ELEMENTS = {op: 1.7 * ns for op, ns in ELEMENT_NS.items()}
SMALL = [name for name in CHAINS if "@224" not in name and "2048" not in name]


@lru_cache
def described(name: str) -> Chain:
    """A chain without its weights, which are large."""
    return replace(build_chain(name), model=onnx.ModelProto())


def made_up(target: Target, *, noise: float = 0.0, threads: int = 1, seed: int = 0) -> Result:
    """What a kit would measure on a machine that is just as a target says."""
    rng = np.random.default_rng(seed)
    timed = []
    for name in CHAINS:
        chain = described(name)
        seconds = target.chain_seconds(chain.convolutions) + RUN + END * chain.ends
        seconds += sum(1e-9 * ELEMENTS[op] * n for op, n in chain.elements.items())
        times = 1e9 * seconds * (1 + noise * rng.standard_normal(9))
        cpu, wall = [times.tolist()], [(2 * times).tolist()]
        if threads > 1:
            cpu, wall = wall, cpu
        recording = Recording(wall, cpu, wall[0])
        base = ELEMENT_BASE if chain.elements else ""
        parts = (chain.convolutions, tuple(chain.elements.items()), chain.ends, base)
        timed.append(Timed(name, "chain", recording, "", *parts))
    machine = Machine("some cpu", "x86_64", 2, "1.31.1", threads, 0.5, None)
    return Result("made up", machine, tuple(timed))


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_the_fit_finds_costs_and_grid(name):
    """Exact times give the costs back to 1e-6 (float64 least squares)."""
    truth = TARGETS[name]
    found = fit_target(made_up(truth))
    assert (found.block, found.small) == (truth.block, truth.small)
    for field in fields(Costs):
        if name != "arm64" or field.name not in ("narrow", "rows", "reorder"):
            expected = getattr(truth.costs, field.name)
            assert getattr(found.costs, field.name) == pytest.approx(expected, rel=1e-6)
    assert found.calibration is not None
    assert found.calibration.p90_error < 1e-6
    assert found.calibration.chains == sum(not described(c).elements for c in CHAINS)


def test_noise_of_a_busy_host_leaves_predictions_within_a_tenth():
    """5 % noise: every chain is predicted within 10 %; a wrong grid is not."""
    truth = TARGETS["x86-avx512"]
    found = replace(fit_target(made_up(truth, noise=0.05)), table=())
    assert found.block == 16
    layers = [conv for name in CHAINS for conv in described(name).convolutions]

    def worst(target: Target) -> float:
        return max(abs(target.seconds(c) / truth.seconds(c) - 1) for c in layers)

    assert worst(found) < 0.1
    assert worst(replace(found, block=8)) > 0.4


def test_the_error_is_that_of_chains_left_out():
    truth = TARGETS["x86-avx512"]
    result = made_up(truth)
    wrong = result.entries[0]
    assert wrong.recording is not None
    slow = Recording(*([[2 * t for t in ts] for ts in r] for r in (wrong.recording.wall,) * 2))
    entries = (replace(wrong, recording=slow), *result.entries[1:])
    errors = calibration._fit(
        [entry for entry in entries if not entry.elements],
        {entry.name: entry.seconds(cpu=True) for entry in entries},
        truth,
    ).errors
    assert errors[0] < -0.5
    assert np.median(np.abs(errors)) < 0.02


def test_elements_are_what_chains_take_longer():
    found = dict(fit_target(made_up(TARGETS["x86-avx512"])).element_ns)
    for op in set(ELEMENT_NS) - {"Pad", "Upsample"}:
        assert found[op] == pytest.approx(ELEMENTS[op], rel=1e-6), op
    assert found["Upsample"] == found["Resize"]
    assert found["Pad"] == ELEMENT_NS["Pad"]


def test_the_table_holds_chains_of_one_shape():
    """Their measured times, which need not be what the formula says."""
    truth = TARGETS["x86-avx512"]
    result = made_up(truth)
    conv = described(CHAINS[0]).convolutions[0]
    entry = result.entries[0]
    count = len(entry.convolutions)
    slow = RUN + END * entry.ends + 1.5 * count * truth.seconds(conv)
    recording = Recording([[1e9 * slow]], [[1e9 * slow]], [1e9 * slow])
    found = fit_target(
        replace(result, entries=(replace(entry, recording=recording), *result.entries[1:]))
    )
    assert found.seconds(conv) == pytest.approx(1.5 * truth.seconds(conv), rel=0.02)
    shapes = dict(found.table)
    assert described("64@8 8x conv1:32 conv3:64").convolutions[0] not in shapes
    assert len(shapes) > 30


def test_wall_time_counts_with_several_threads():
    truth = TARGETS["x86-avx512"]
    found = fit_target(made_up(truth, threads=2))
    assert found.costs.direct == pytest.approx(truth.costs.direct, rel=1e-6)
    assert found.name == "some cpu, 2 threads"


def test_too_few_chains_are_refused():
    result = made_up(TARGETS["arm64"])
    failed = replace(result.entries[0], recording=None, error="no such operator")
    fit_target(replace(result, entries=(failed, *result.entries[1:])))
    with pytest.raises(
        ParameterError, match=r"made up has times of 20 micro-chains; a target"
    ):
        fit_target(replace(result, entries=result.entries[:20]))


@pytest.mark.parametrize(
    "name", sorted({*SMALL[::6], *(c for c in SMALL if ELEMENT_BASE in c)})
)
def test_chains_are_what_they_say(name):
    """Analysis finds the convolutions, and they compute something finite."""
    chain = build_chain(name)
    onnx.checker.check_model(chain.model, full_check=True)
    model = Model.from_proto(chain.model)
    found = Analysis(model, sane_feeds(model, 2), seed=0)
    assert [linear.convolution for linear in found.linears.values()] == list(
        chain.convolutions
    )
    counts: dict[str, int] = {}
    for node in model.nodes:
        if node.op in chain.elements:
            for output in node.outputs:
                size = int(np.prod(found.tensors[output].shape[1:]))
                counts[node.op] = counts.get(node.op, 0) + size
    assert counts == dict(chain.elements)
    x = np.random.default_rng(0).standard_normal(chain.shape).astype(np.float32)
    (y,) = Session(model).run({"x": x}).values()
    assert np.isfinite(y).all()
    assert np.abs(y).max() > 0
    assert np.abs(y).max() < 1e30


def test_chains_are_unique_and_bad_ones_are_refused():
    assert len(set(CHAINS)) == len(CHAINS)
    assert CHAINS.index(f"{ELEMENT_BASE} Mul") < CHAINS.index(f"{ELEMENT_BASE} SiLU")
    for name in ("64@8", "64@8 2x warp3:4", "64@8 2x conv3:64 Softplus"):
        with pytest.raises(ParameterError, match="build_chain"):
            build_chain(name)


def test_calibrate_measures_this_machine(monkeypatch):
    """Two seconds are enough to see that wide layers cost more than narrow ones."""
    monkeypatch.setattr(calibration, "_LEAST_CHAINS", 8)
    chains = ["16@8 4x conv3:16", "32@8 4x conv3:32", "64@8 4x conv3:64", "24@8 4x conv3:24"]
    chains += ["64@8 4x conv1:64", "32@8 4x dw3", "12@8 4x conv3:12", "64@1 2x gemm:64"]
    seen = []
    target = calibrate(
        seconds=2.0, chains=chains, progress=lambda label, share: seen.append((label, share))
    )
    assert seen[0] == ("measure micro-chains", 0.0)
    assert seen[-1][1] == 1.0
    small, wide = (build_chain(name).convolutions[0] for name in (chains[0], chains[2]))
    assert target.seconds(wide) > 2 * target.seconds(small)
    assert Target.from_json(json.loads(json.dumps(target.to_json())), "x") == target


def test_results_of_a_kit_are_targets(tmp_path):
    result = made_up(TARGETS["x86-avx512"])
    data = {
        "schema_version": 1,
        "kind": "onnxcomp-kit-result",
        "machine": asdict(result.machine),
        "entries": [
            {
                "name": entry.name,
                "role": "chain",
                "file": "chains/0.onnx",
                "inputs": {"x": [1]},
                "cold": False,
                "convolutions": [asdict(conv) for conv in entry.convolutions],
                "elements": dict(entry.elements),
                "ends": entry.ends,
                "base": entry.base,
                "wall_ns": [[[round(t)] for t in visits] for visits in entry.recording.wall],
                "cpu_ns": [[[round(t)] for t in visits] for visits in entry.recording.cpu],
            }
            for entry in result.entries
        ],
    }
    path = tmp_path / "result.json"
    path.write_text(json.dumps(data))
    found = find_target(str(path))
    assert found == fit_target(parse_result(data, "x"))
    assert found.costs.direct == pytest.approx(TARGETS["x86-avx512"].costs.direct, rel=0.01)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("network", "tolerance"),
    [("resnet18_imagenet", 0.05), ("resnet50_imagenet", 0.05), ("cifar", 0.15)],
)
def test_latency_of_compressed_networks(network, tolerance, tmp_path, real_target):
    """Ratios of whole networks as promised, on a quiet machine, without fitting on them.

    The median of the variants counts: one of them may be off for what the A/A control shows.
    """
    if network == "cifar":
        path = SHARED / "models" / "akamaster_cifar10_resnet56.onnx"
        if not path.exists():
            pytest.skip("../shared is absent")
    else:
        pytest.importorskip("torch")
        from models.builders import export

        path = tmp_path / "model.onnx"
        export(network, path, folded=True)
    models = list(variants(load(path), 8))
    signature = models[0].signature.inputs
    feed = next(iter(sane_feeds(models[0], 1).batches(signature, 1))).feed
    found = paired_latency(models, feed, time_limit_s=120)
    seconds = [predicted_seconds(real_target, model) for model in models]
    errors = [
        seconds[0] / other / timing.ratio.value - 1
        for other, timing in zip(seconds[1:], found.models[1:], strict=True)
    ]
    assert np.median(np.abs(errors)) <= tolerance, errors


@pytest.fixture(scope="module")
def real_target():
    return calibrate()
