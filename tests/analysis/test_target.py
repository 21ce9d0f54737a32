"""The grid, and the cliffs that the latency model must know."""

import json
import pickle
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcomp.analysis.target import (
    ELEMENT_NS,
    TARGETS,
    Calibration,
    Convolution,
    Costs,
    Target,
    find_target,
    work_terms,
)
from onnxcomp.errors import ParameterError

AVX512 = TARGETS["x86-avx512"]
CONV = Convolution(64, 64, 9, 56 * 56, 56 * 56)


def pruned(width: int) -> float:
    """Predicted speedup of the 3 x 3 layer of 64 channels at 56 x 56 when it is narrowed."""
    return AVX512.seconds(CONV) / AVX512.seconds(
        replace(CONV, in_channels=width, out_channels=width)
    )


def test_grids():
    assert AVX512.sizes(64) == (4, 8, 12, 16, 32, 48)
    assert AVX512.sizes(17) == (4, 8, 12, 16)
    assert AVX512.sizes(4) == ()
    assert TARGETS["x86-avx2"].sizes(24) == (4, 8, 16)
    assert TARGETS["arm64"].sizes(12) == (4, 8)


@given(st.integers(1, 3000), st.sampled_from(sorted(TARGETS)))
def test_sizes_are_on_the_grid(total, name):
    target = TARGETS[name]
    sizes = target.sizes(total)
    assert list(sizes) == sorted(set(sizes))
    for size in sizes:
        assert 0 < size < total
        assert size % 4 == 0
        assert size in target.small or size % target.block == 0


@given(st.integers(1, 3000), st.integers(1, 40))
def test_sizes_of_a_step(total, step):
    sizes = AVX512.sizes(total, step=step)
    assert list(sizes) == sorted(set(sizes))
    assert all(0 < s < total and s % step == 0 for s in sizes)
    assert len(sizes) <= 15
    assert bool(sizes) or total <= 16 * step


def test_cliffs():
    """Measured speedups: 61 channels 0.78, 56 channels 1.00, 48 channels 1.77, 32 3.89."""
    assert pruned(61) < 0.95
    assert pruned(56) == pytest.approx(1.0, abs=0.05)
    assert 1.5 < pruned(48) < 2.0
    assert 3.2 < pruned(32) < 4.3
    assert pruned(31) < pruned(32)
    assert pruned(33) < pruned(32)


def test_forms():
    """Measured at 64 channels: 1x1 -> 3x3 of rank 32 1.79; of rank 60 it is no gain."""

    def first(rank: int) -> float:
        chain = [
            replace(CONV, out_channels=rank, kernel=1),
            replace(CONV, in_channels=rank),
        ]
        return AVX512.seconds(CONV) / AVX512.chain_seconds(chain)

    assert 1.4 < first(32) < 2.0
    assert first(60) < 1.0
    assert first(30) < first(32)


def test_depthwise_off_the_grid_falls_back():
    good = Convolution(64, 64, 9, 3136, 3136, groups=64)
    bad = Convolution(61, 61, 9, 3136, 3136, groups=61)
    assert AVX512.seconds(bad) > AVX512.seconds(good)


def test_macs_and_weights():
    assert CONV.macs == 56 * 56 * 64 * 64 * 9
    assert replace(CONV, groups=8).weights == CONV.weights // 8
    up = Convolution(8, 4, 16, out_positions=400, in_positions=100, op="ConvTranspose")
    assert up.macs == 100 * 8 * 4 * 16


# Microseconds of single layers, from chains on the machine of the profile x86-avx512.
MEASURED = (
    (Convolution(64, 64, 9, 3136, 3136), 1702),
    (Convolution(64, 256, 1, 3136, 3136), 770),
    (Convolution(512, 512, 9, 49, 49), 2975),
    (Convolution(16, 16, 9, 1024, 1024), 47.1),
    (Convolution(80, 80, 9, 196, 196), 230),
    (Convolution(64, 64, 9, 3136, 3136, groups=4), 547),
    (Convolution(12, 12, 1, 1024, 1024), 23.9),
    (Convolution(6, 6, 1, 1024, 1024), 11.1),
    (Convolution(12, 64, 1, 64, 64), 7.2),
    (Convolution(3, 64, 49, 12544, 50176), 1672),
    (Convolution(61, 61, 9, 784, 784), 639),
    (Convolution(30, 30, 9, 784, 784, groups=30), 55.2),
    (Convolution(384, 384, 1, 49, 49, op="MatMul"), 173),
    (Convolution(2048, 2048, 1, 1, 1, op="Gemm"), 1149),
    (Convolution(16, 16, 1, 1, 1), 0.69),
    # depthwise layers as in YOLOX-nano and MobileNet
    (Convolution(48, 48, 9, 10816, 10816, groups=48), 254),
    (Convolution(192, 192, 9, 784, 784, groups=192), 49.5),
    (Convolution(384, 384, 9, 196, 196, groups=384), 31.8),
    (Convolution(96, 96, 25, 784, 784, groups=96), 48.3),
)
TOLERANCE = 0.3  # relative; what the left-out chains of a calibration show for 90 % of them


def off(target: Target) -> list[Convolution]:
    """Measured layers that a target predicts wrongly."""
    return [
        conv for conv, us in MEASURED if abs(1e6 * target.seconds(conv) / us - 1) > TOLERANCE
    ]


def test_predictions_are_what_was_measured():
    """All but the smallest convolution with 12 input channels, whose rows cost even more."""
    assert set(off(AVX512)) <= {Convolution(12, 64, 1, 64, 64)}


@pytest.mark.parametrize("name", [field.name for field in fields(Costs)])
def test_wrong_coefficients_show(name):
    factor = 10 if name in ("activation", "spill", "rows") else 3  # of which little is made
    found = off(replace(AVX512, costs=replace(AVX512.costs, **{name: 0.0})))
    found += off(
        replace(
            AVX512, costs=replace(AVX512.costs, **{name: factor * getattr(AVX512.costs, name)})
        )
    )
    assert set(found) - {Convolution(12, 64, 1, 64, 64)}


def test_the_old_model_was_blind_for_depthwise_layers():
    """Without a term for depthwise kernels four such layers are off by more than 30 %."""
    blind = replace(AVX512, costs=replace(AVX512.costs, depthwise=0.0, spill=0.0))
    wrong = [conv for conv in off(blind) if conv.groups == conv.in_channels]
    assert len(wrong) >= 4


@pytest.mark.parametrize("channels", range(4, 16))
def test_less_than_a_block_runs_in_the_direct_kernel(channels):
    """Also where it is no multiple of four: 13 channels take 37 us, 12 take 26, 8 take 16."""
    terms = work_terms(Convolution(channels, channels, 1, 1024, 1024), 16)
    assert terms["direct"] > 0
    assert "fallback" not in terms
    assert terms["reorder"] == 4 * 1024 * channels


def test_images_are_not_reordered():
    assert "reorder" not in work_terms(Convolution(3, 16, 9, 1024, 1024), 16)
    assert "reorder" in work_terms(Convolution(4, 16, 9, 1024, 1024), 16)


@given(
    st.integers(1, 600),
    st.integers(1, 600),
    st.sampled_from((1, 3, 9, 25)),
    st.integers(1, 12_000),
    st.sampled_from(("Conv", "ConvTranspose", "Gemm", "MatMul")),
    st.booleans(),
    st.sampled_from(sorted(TARGETS)),
)
def test_every_convolution_takes_time(c, m, kernel, positions, op, depthwise, name):
    groups = c if depthwise and op == "Conv" else 1
    conv = Convolution(c, c if groups > 1 else m, kernel, positions, positions, groups, op)
    terms = work_terms(conv, TARGETS[name].block)
    assert terms.keys() <= {field.name for field in fields(Costs)}
    assert min(terms.values()) >= 0
    assert TARGETS[name].seconds(conv) > 0


def test_measured_shapes_beat_the_formula():
    target = replace(AVX512, table=((CONV, 0.25),))
    assert target.seconds(CONV) == 0.25
    assert target.chain_seconds([CONV, CONV]) == 0.5
    other = replace(CONV, out_channels=48)
    assert target.seconds(other) == AVX512.seconds(other)


def test_elements():
    assert AVX512.element_seconds("Elu", 1000) == pytest.approx(1e-6 * ELEMENT_NS["Elu"])
    assert AVX512.element_seconds("Relu", 1000) == 0.0
    own = replace(AVX512, element_ns=(("Elu", 7.0),))
    assert own.element_seconds("Elu", 1e9) == pytest.approx(7.0)


def calibrated() -> Target:
    found = Calibration("some cpu", "x86_64", "1.31.1", 2, 90, 0.06, 0.25)
    return replace(AVX512, name="mine", table=((CONV, 1.5e-3),), calibration=found)


def test_targets_survive_json_and_pickle(tmp_path):
    for target in (*TARGETS.values(), calibrated()):
        path = tmp_path / "target.json"
        path.write_text(json.dumps(target.to_json()))
        assert find_target(str(path)) == target
        assert hash(find_target(str(path))) == hash(target)
        assert pickle.loads(pickle.dumps(target)) == target


def _drop(data):
    del data["costs"]["direct"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema_version=2), "'schema_version' must be 1, the only one"),
        (
            lambda d: d.update(kind="recipe"),
            "'kind' must be 'onnxcomp-target' or 'onnxcomp-kit-result'",
        ),
        (lambda d: d.update(block=0), "'block' must be a whole number, at least 1; found 0"),
        (lambda d: d.update(block=True), "'block' must be a whole number"),
        (lambda d: d.update(small=[4, 16]), "'small' must be ascending and below the block"),
        (lambda d: d.update(small=["4"]), "'small' must be a list of whole numbers"),
        (lambda d: d.update(name=""), "'name' must be a string; found ''"),
        (_drop, "'costs.direct' is missing"),
        (lambda d: d["costs"].update(direct=-1.0), "'costs.direct' must be a finite number"),
        (lambda d: d["costs"].update(direct=float("inf")), "'costs.direct' must be a finite"),
        (lambda d: d["costs"].update(warp=1.0), "'costs.warp' is not known"),
        (lambda d: d["costs"].update(activation=0, node=0), "'costs' must be above 0 in"),
        (lambda d: d["element_ns"].update(Elu="much"), "'element_ns.Elu' must be a finite"),
        (lambda d: d["table"][0].update(seconds=0), r"'table\[0\].seconds' must be above 0"),
        (lambda d: d["table"][0].update(groups=7), r"'table\[0\].groups' must be a divisor"),
        (lambda d: d["table"][0].update(op="Conv2D"), r"'table\[0\].op' must be one of Conv"),
        (lambda d: d["table"].append(3), r"wanted 'table\[1\]' to be a JSON object"),
        (lambda d: d.update(table={}), "'table' must be a list; found {}"),
        (lambda d: d.update(calibration=0), "wanted 'calibration' to be a JSON object"),
        (lambda d: d.update(threads=1), "'threads' is not known"),
    ],
)
def test_wrong_files_are_refused(change, message, tmp_path):
    data = calibrated().to_json()
    change(data)
    path = tmp_path / "target.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ParameterError, match=message) as caught:
        find_target(str(path))
    assert str(path) in str(caught.value)


def test_errors(tmp_path):
    with pytest.raises(ParameterError, match="x86-avx512, or a file of"):
        find_target("toaster")
    with pytest.raises(ParameterError, match="step"):
        AVX512.sizes(64, step=0)
    with pytest.raises(ParameterError, match=r"absent.json' cannot be read"):
        find_target(str(tmp_path / "absent.json"))
    broken = tmp_path / "broken.json"
    for content in (b"{", b"[" * 100_000, b"\xff\xfe\x00"):
        broken.write_bytes(content)
        with pytest.raises(ParameterError, match=r"broken.json' is no JSON file"):
            find_target(str(broken))
    broken.write_text("[]")
    with pytest.raises(ParameterError, match="wanted a JSON object; found"):
        find_target(str(broken))
