"""What a group has in common stays one initializer, whatever is done to the model."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcomp import load
from onnxcomp.analysis import Analysis
from onnxcomp.loading import write_model
from onnxcomp.model import Model
from onnxcomp.numerics.joint_svd import JOINT_FORMS
from onnxcomp.passes import PASSES
from onnxcomp.passes.base import run_exact
from onnxcomp.passes.fold_batchnorm import FoldBatchnorm
from onnxcomp.passes.make_biases_explicit import MakeBiasesExplicit
from onnxcomp.passes.working import finish, prepare, working_model
from onnxcomp.report.inspection import inspect_model
from onnxcomp.runtime import Session
from tests.analysis.channel_law import analyse, draw, free_groups, obeys
from tests.passes.exact_checks import TOLERANCE, drift
from tests.passes.joint_cases import (
    PAIRS,
    Made,
    common_readers,
    made,
    members_of,
    real_facts,
    whole_groups,
)

BOTH = [pair for pair in PAIRS if pair[1].endswith("_both")]
EXACT = [name for name, kind in PASSES.items() if kind.exact]
Edit = Callable[[Model], Model]
EDITS: dict[str, Edit] = {
    "a proto and back": lambda model: Model.from_proto(model.to_proto()),
    "nothing": lambda model: model.edit().seal(by="test"),
    "prepare": lambda model: prepare(model)[0],
    "finish": finish,
    "both": lambda model: finish(prepare(model)[0]),
    "working model": lambda model: working_model(prepare(model)[0], None, seed=0),
}
EDITS |= {
    name: lambda model, kind=PASSES[name]: run_exact(kind(), Analysis(model))[0]
    for name in EXACT
}


@cache
def unshared(case: str, form: str) -> Model:
    """The model with a copy of what is common for every reader."""
    model = made(case, form).model
    draft = model.edit()
    for name in common_readers(model):
        for use in model.readers[name][1:]:
            copy = draft.add_weight(name, np.array(model.weights[name]))
            draft.set_input(use.node.id, use.index, copy)
    return draft.seal(by="test")


def stored(model: Model) -> int:
    """Bytes of all initializers."""
    return sum(array.nbytes for array in model.weights.values())


def expected(case: str, form: str) -> list[int]:
    """Readers of the common initializers that a form should have, over all groups."""
    each = {"first": 1, "last": 1, "both": 2, "outer": 2}[JOINT_FORMS[form].shares]
    found = made(case, form)
    sizes = [len(members_of(found.facts, option)) for option in found.joints]
    return sorted(each * sizes)


@pytest.mark.parametrize(("case", "form"), PAIRS)
def test_a_group_has_one_common_initializer(case, form):
    small = made(case, form).model
    assert sorted(common_readers(small).values()) == expected(case, form)
    assert set(common_readers(unshared(case, form)).values()) == {1}
    initializers = [tensor.name for tensor in small.to_proto().graph.initializer]
    assert len(initializers) == len(set(initializers))


@pytest.mark.parametrize(("case", "form"), BOTH)
def test_joined_kernels_have_a_concat_each(case, form):
    found = made(case, form)
    concats = [node for node in found.model.nodes if node.op == "Concat"]
    assert len(concats) == 2 * len(found.forms)
    assert all(len(found.model.readers[node.id]) == 1 for node in concats)


@pytest.mark.parametrize(
    ("case", "form", "edit"),
    [
        (*pair, edit)
        for pair in PAIRS
        for edit in EDITS
        if edit == "both" or pair[0] in ("residual bn", "gemm transposed", "matmul")
    ],
)
def test_sharing_survives(case, form, edit):
    """The file does not grow, but for explicit biases, and computes the same."""
    found = made(case, form)
    small = found.model
    after = EDITS[edit](small)
    assert common_readers(after) == common_readers(small)
    assert drift(small, after, found.feed) <= TOLERANCE
    if edit in ("make_biases_explicit", "working model"):
        assert stored(finish(after)) <= stored(small)
    else:
        assert after.file_bytes <= small.file_bytes


def test_the_checks_see_what_is_not_shared():
    """Copies are larger, and merging them is the way back."""
    for form in JOINT_FORMS:
        small, copies = made("residual", form).model, unshared("residual", form)
        saved = sum(
            (readers - 1) * small.weights[name].nbytes
            for name, readers in common_readers(small).items()
        )
        assert copies.file_bytes - small.file_bytes >= saved
        assert Analysis(copies).cost.weight_bytes - Analysis(small).cost.weight_bytes == saved
        merged = EDITS["merge_initializers"](copies)
        assert common_readers(merged) == common_readers(small)
        assert stored(merged) == stored(small)


def test_parts_that_nothing_else_reads_are_joined_in_the_file():
    """There a whole kernel is smaller than its parts and a Concat."""
    for form in ("spatial_both", "output_basis_both", "input_basis_both"):
        copies = unshared("residual", form)
        folded = EDITS["fold_constants"](copies)
        assert "Concat" not in [node.op for node in folded.nodes]
        assert folded.file_bytes < copies.file_bytes


@pytest.mark.parametrize("external", [False, True], ids=["one file", "external data"])
@pytest.mark.parametrize("form", JOINT_FORMS)
def test_files_hold_what_is_common_once(form, external, tmp_path):
    found = made("residual bn", form)
    small, path = found.model, tmp_path / "model.onnx"
    threshold = 0 if external else 2**31
    weights = small.weights
    write_model(
        small.to_proto(external=True), path, external=weights, external_threshold=threshold
    )
    assert Path(f"{path}.data").exists() is external
    loaded = load(path)
    assert loaded.digest == small.digest
    assert common_readers(loaded) == common_readers(small)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size == loaded.file_bytes
    assert size - small.file_bytes < 0.2 * sum(a.nbytes for a in weights.values())
    names = [tensor.name for tensor in onnx.load(path).graph.initializer]
    assert sorted(names) == sorted(weights)
    (wanted,), (y,) = (Session(m).run(found.feed).values() for m in (small, loaded))
    np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize(("case", "form"), PAIRS)
def test_channels_of_factorised_layers_can_go(case, form):
    """Removed as everywhere else: what is common loses them for all its readers at once."""
    found = made(case, form)
    channels = analyse(found.model, found.feed)
    free = free_groups(channels)
    if JOINT_FORMS[form].shares == "both":  # whose kernels are computed
        layers = set(found.forms)
        assert layers.isdisjoint(n for name in free for n in channels.group(name).producers)
    else:
        assert free
    removed = draw(channels, free, seed=0)
    narrow = obeys(found.model, channels, removed, [found.feed]) if free else found.model
    assert common_readers(narrow) == common_readers(found.model)
    if free and JOINT_FORMS[form].shares != "both":
        sizes = [
            [m.weights[name].size for name in common_readers(m)] for m in (found.model, narrow)
        ]
        assert any(less < size for size, less in zip(*sizes, strict=True))


@pytest.mark.parametrize("form", ["spatial_last", "output_basis_last", "tucker2_outer"])
def test_batchnorm_is_not_folded_into_what_is_common(form):
    """It stays, with its reason, behind a last factor that others read."""
    found = made("residual bn", form)
    result, proposal = run_exact(FoldBatchnorm(), Analysis(found.model))
    kept = [node for node in result.nodes if node.op == "BatchNormalization"]
    assert {node.input(0) for node in kept} == set(found.forms)
    refused = [r for r in proposal.refusals if r.where in {node.id for node in kept}]
    assert len(refused) == len(kept)
    assert all("shared by" in refusal.reason for refusal in refused)


def test_batchnorm_is_folded_behind_a_common_first_factor():
    for form in ("spatial_first", "output_basis_first", "input_basis_first"):
        found = made("residual bn", form)
        result = finish(found.model)
        assert "BatchNormalization" not in [node.op for node in result.nodes]
        assert common_readers(result) == common_readers(found.model)


def test_making_biases_explicit_leaves_weights_alone():
    for case, form in PAIRS:
        small = made(case, form).model
        after = run_exact(MakeBiasesExplicit(), Analysis(small))[0]
        assert all(after.weights[name] is array for name, array in small.weights.items())


@pytest.mark.parametrize("form", JOINT_FORMS)
def test_reports_count_common_bytes_once(form):
    found = made("residual", form)
    small = found.model
    report = inspect_model(small, Analysis(small, found.facts.samples))
    floats = [a for a in small.weights.values() if a.dtype.kind == "f"]
    assert report.cost.params == sum(a.size for a in floats)
    assert report.cost.weight_bytes == sum(a.nbytes for a in floats)
    assert sum(layer.params for layer in report.layers) == report.cost.params
    readers = {tensor.name: len(tensor.readers) for tensor in report.shared}
    assert readers.items() >= common_readers(small).items()
    assert abs(report.file_bytes - len(small.to_proto().SerializeToString())) < 500
    copies = unshared("residual", form)
    assert inspect_model(copies, Analysis(copies)).cost.params > report.cost.params


@pytest.mark.parametrize("form", JOINT_FORMS)
def test_layers_of_a_group_are_not_taken_for_others(form):
    """A second run finds nothing to share where weights are common or computed."""
    found = made("residual", form)
    facts = Analysis(found.model, found.facts.samples)
    weights = {
        facts.linears[n].weight for nodes in whole_groups(facts).values() for n in nodes
    }
    assert weights.isdisjoint(common_readers(found.model))


@pytest.mark.parametrize("form", ["output_basis_first", "output_basis_both"])
def test_a_real_model_keeps_its_sharing(form, tmp_path):
    found = Made.of(real_facts("mlperftiny_ad01_autoencoder"), form)
    result = finish(prepare(found.model)[0])
    result.save(tmp_path / "model.onnx")
    loaded = load(tmp_path / "model.onnx")
    assert set(common_readers(loaded).values()) == {6}
    assert common_readers(loaded) == common_readers(found.model)
    assert drift(found.model, loaded, found.feed) <= TOLERANCE
