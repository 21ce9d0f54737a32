"""`compress` under limits on bytes, with common factors."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onnxcomp import load
from onnxcomp.analysis import Analysis
from onnxcomp.model import Model
from onnxcomp.numerics.joint_svd import JOINT_FORMS
from onnxcomp.passes.factorize_jointly import FactorizeJointly
from onnxcomp.search.run import Result, compress
from onnxcomp.search.settings import Limits, Settings
from onnxcomp.search.sharing import Sharing
from onnxcomp.search.space import Space
from onnxcomp.search.walk import Walk
from tests.graphs import SHARED
from tests.passes.joint_cases import CASES, NAME, common_readers
from tests.search.joint_lab import readers
from tests.search.lab import Lab
from tests.search.searching import inputs, maps
from tests.search.test_adaptation import real_pictures

QUICK = Settings(latency=False, grid="2", methods=(NAME,))


def run(
    case: str, settings: Settings = QUICK, *, data: bool = True, **options: object
) -> Result:
    model = CASES[case]()
    limits = options.pop("limits", Limits(size=0.75))
    given = inputs(model, 24) if data else None
    return compress(model, given, limits=limits, settings=settings, **options)


def check_file(result: Result, model: Model, size: float, folder: Path) -> None:
    """The limit holds in the file, whose groups share."""
    assert result.met, result.report.notes
    assert result.report.ladder.passed
    path = folder / "small.onnx"
    result.model.save(path)
    assert path.stat().st_size <= size * model.file_bytes
    loaded = load(path)
    assert loaded.digest == result.model.digest
    wanted = readers(Lab(result.search.space, []), result.plan)
    assert sorted(common_readers(loaded).values()) == wanted


def check(result: Result, model: Model, size: float = 0.75) -> set[str]:
    """The limit is met by common factors only, and told; return the forms."""
    assert result.met, result.report.notes
    assert result.report.ladder.passed
    assert result.model.file_bytes <= size * model.file_bytes
    assert not result.plan.empty
    assert {option.method for option in result.plan.forms.values()} == {NAME}
    wanted = readers(Lab(result.search.space, []), result.plan)
    assert sorted(common_readers(result.model).values()) == wanted
    for node, option in result.plan.forms.items():
        (action,) = [a for a in result.report.actions if a.where == node]
        assert f"{option.form} of rank " in action.what
        assert "in common with" in action.what
    return {option.form for option in result.plan.forms.values()}


@pytest.mark.parametrize(
    ("case", "data_aware", "size"),
    [
        ("residual", True, 0.75),
        ("residual bn", True, 0.75),
        ("gemm", True, 0.85),
        ("transposed", True, 0.75),
        ("uneven", True, 0.75),
        ("residual", False, 0.75),
        ("residual bn", False, 0.75),
    ],
)
def test_limits_on_the_size_are_met_and_files_share(case, data_aware, size, tmp_path):
    result = run(case, replace(QUICK, data_aware=data_aware), limits=Limits(size=size))
    assert check(result, CASES[case](), size)
    check_file(result, CASES[case](), size, tmp_path)


def test_without_samples_only_first_factors_are_shared():
    """Others would not go back to the scale in front of the adapted BatchNorm."""
    result = run("residual bn", data=False)
    assert check(result, CASES["residual bn"]()) <= {f for f in JOINT_FORMS if "_first" in f}
    forms = {o.form for each in result.search.space.joint.values() for o in each}
    assert forms == {form for form in JOINT_FORMS if form.endswith("_first")}
    assert any("stand for real inputs" in note for note in result.report.notes)
    free = run("residual", data=False)  # without BatchNorm there is nothing to adapt
    forms = {o.form for each in free.search.space.joint.values() for o in each}
    assert {"spatial_both", "input_basis_last"} <= forms


def test_limits_on_time_and_macs_do_not_ask_for_common_factors():
    result = run("residual", limits=Limits(macs=0.9))
    assert not result.search.space.joint
    both = run("residual", limits=Limits(macs=0.95, params=0.8))
    assert both.search.space.joint
    assert Analysis(both.model).cost.params <= 0.8 * Analysis(CASES["residual"]()).cost.params


def test_excluded_layers_take_no_part():
    groups = FactorizeJointly().groups(Analysis(CASES["residual"]()))
    members = groups["stage0.conv1.12x12x3x3"].members
    model = CASES["residual"]()
    result = run(
        "residual", replace(QUICK, exclude=f"^{members[0]}$"), limits=Limits(size=0.9)
    )
    joint = result.search.space.joint
    assert "stage0.conv1.12x12x3x3" not in joint
    assert "stage0.conv1.12x12x3x3 1-2" not in joint
    assert "stage0.conv1.12x12x3x3 3-4" in joint
    reasons = {r.where: r.reason for r in result.report.refusals}
    assert "excluded by" in reasons["stage0.conv1.12x12x3x3"]
    assert members[0] not in result.plan.forms
    kept = model.weights[model.producers[members[0]].input(1)]
    found = result.model.weights[result.model.producers[members[0]].input(1)]
    np.testing.assert_array_equal(found, kept)


def test_a_run_that_goes_on_gives_the_same_file(tmp_path, monkeypatch):
    """Losses of common factors are kept, too, also for another limit."""
    first = run("residual bn", resume=tmp_path / "state")
    undisturbed = run("residual bn")
    assert first.model.digest == undisturbed.model.digest
    assert first.plan == undisturbed.plan
    with monkeypatch.context() as patch:
        patch.setattr(Sharing, "_measure", None)
        patch.setattr(Walk, "run", None)
        again = run("residual bn", resume=tmp_path / "state")
        assert again.model.digest == first.model.digest
        with pytest.raises(TypeError):
            run("residual bn", replace(QUICK, seed=1), resume=tmp_path / "state")
    monkeypatch.setattr(Sharing, "_measure", None)
    other = run("residual bn", resume=tmp_path / "state", limits=Limits(size=0.85))
    monkeypatch.undo()
    assert other.model.digest == run("residual bn", limits=Limits(size=0.85)).model.digest


def test_a_second_run_keeps_what_is_shared():
    """Common weights are not touched again, and nothing is unfolded by preparing."""
    for case in ("residual bn", "uneven"):
        result = run(case)
        again = compress(
            Model.from_proto(result.model.to_proto()),
            inputs(result.model, 24),
            limits=Limits(size=result.model.file_bytes),
            settings=QUICK,
        )
        assert again.plan.empty
        assert common_readers(again.model) == common_readers(result.model)
        assert again.model.file_bytes <= result.model.file_bytes


def test_all_methods_together():
    model = CASES["residual bn"]()
    settings = replace(QUICK, grid="4", methods=("remove_channels", "factorize", NAME))
    limits = Limits(size=0.6, macs=0.8)
    result = run("residual bn", settings, limits=limits)
    assert result.met
    assert result.report.ladder.passed
    assert result.model.file_bytes <= 0.6 * model.file_bytes
    assert Analysis(result.model).cost.macs <= 0.8 * Analysis(model).cost.macs


def test_files_that_miss_the_limit_by_little_are_made_again(monkeypatch):
    """By less than their size was mistaken: the same plan is not enough a second time."""
    true = Space.file_bytes
    monkeypatch.setattr(Space, "file_bytes", lambda *args: true(*args) - 600)
    missed = 0
    for share in np.linspace(0.5, 0.6, 15):
        tried = maps().pursue(Limits(size=share))
        limit = share * maps().model.file_bytes
        assert tried.outcome.met
        assert tried.outcome.candidate.model.file_bytes <= limit
        missed += 0 < tried.kept[0].file_bytes - limit < 300
    assert missed


@pytest.mark.heavy
@pytest.mark.parametrize("share", [0.7, 0.45])
def test_a_residual_network(share, tmp_path):
    """All methods on ResNet-20: never worse than without common factors."""
    path = SHARED / "models" / "akamaster_cifar10_resnet20.onnx"
    if not path.exists():
        pytest.skip("../shared is absent")
    model, x = load(path), real_pictures(160)
    settings = Settings(latency=False, methods=("remove_channels", "factorize", NAME))
    result = compress(model, x, limits=Limits(size=share), settings=settings)
    check_file(result, model, share, tmp_path)
    without = replace(settings, methods=("remove_channels", "factorize"))
    other = compress(model, x, limits=Limits(size=share), settings=without)
    assert result.plan.loss <= 1.01 * other.plan.loss
