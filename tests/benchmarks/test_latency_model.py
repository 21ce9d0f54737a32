"""The latency benchmark: predictions follow the plans, errors are counted against goals."""

import pytest

from benchmarks import latency_model
from benchmarks.common import DIGITS, TARGET
from onnxcomp import load
from onnxcomp.errors import ParameterError


def test_variants_are_written_with_their_predictions(tmp_path):
    variants = [("widths", 0.5, 4), ("all widths", 0.5, 4), ("spatial", 0.25, 8)]
    made = latency_model.make(
        model=DIGITS, stem=str(tmp_path / "digits"), variants=variants, targets=[TARGET]
    )
    for row in made:
        assert load(row["file"]).nodes
        assert 0 < row["macs"] < 1
    inner, every, _ = made
    assert every["macs"] < inner["macs"]
    assert every["predicted"][TARGET] > inner["predicted"][TARGET] > 1


def test_a_variant_that_changes_nothing_is_refused(tmp_path):
    with pytest.raises(ParameterError, match="smaller share"):
        latency_model.make(
            model=DIGITS,
            stem=str(tmp_path / "digits"),
            variants=[("spatial", 0.5, 8)],
            targets=[TARGET],
        )


def test_there_are_enough_variants():
    networks = (*latency_model.IMAGENET, *latency_model.CIFAR)
    count = sum(len(latency_model._variants(name, quick=False)) for name in networks)
    assert count >= latency_model.MIN_VARIANTS


def test_errors_are_counted_against_their_goals():
    rows = [
        {"network": network, "error": {TARGET: error}}
        for network, error in [
            ("resnet18_imagenet", 0.04),
            ("resnet18_imagenet", -0.06),
            ("akamaster_cifar10_resnet20", -0.06),
        ]
    ]
    table = latency_model._errors(rows, [TARGET])
    assert [row[-1] for row in table.rows] == ["1 of 2", "1 of 1"]
    assert table.rows[0][4] == "6.0 %"


def test_only_answer_is_returned_or_raised():
    with pytest.raises(ValueError, match="wrong"):
        latency_model._only([ValueError("wrong")])
