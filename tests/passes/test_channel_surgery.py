"""Removing channels edits weights in place, forks them on purpose, and refuses the rest."""

import numpy as np
import pytest

from onnxcomp.errors import ParameterError
from onnxcomp.model import Model
from onnxcomp.passes.channel_surgery import parameters_after, remove
from tests.analysis.channel_cases import CASES
from tests.analysis.channel_graphs import Graph, feeds
from tests.analysis.channel_law import analyse, draw, free_groups, obeys, removed_from


def _removed(name: str, removed: dict[str, list[int]]) -> tuple[Model, Model]:
    model = CASES[name][0]()
    return model, removed_from(model, analyse(model, feeds(model)[0]), removed)


def test_only_the_listed_channels_vanish() -> None:
    model, small = _removed("residual", {"conv2_0": [1, 3]})
    (make, bias), (read,) = ("w2", "w3"), ("w4",)
    np.testing.assert_array_equal(small.weights[make], model.weights[make][[0, 2, 4]])
    np.testing.assert_array_equal(small.weights[bias], model.weights[bias][[0, 2, 4]])
    np.testing.assert_array_equal(small.weights[read], model.weights[read][:, [0, 2, 4]])
    same = set(model.weights) - {make, bias, read}
    assert all(small.weights[name] is model.weights[name] for name in same)


def test_nothing_to_remove_returns_the_model_itself() -> None:
    model = CASES["chain"][0]()
    channels = analyse(model, feeds(model)[0])
    draft = model.edit()
    remove(draft, channels, {"conv0_0": []})
    assert draft.seal(by="test").digest == model.digest
    assert parameters_after(channels, {}) == sum(w.size for w in model.weights.values())


def test_a_bias_shared_by_groups_that_part_is_forked_once() -> None:
    model, small = _removed("shared_in_different_parts", {"conv0_0": [0, 5]})
    shared = [use.node.id for use in model.readers["w0"]]
    assert len(shared) == 2
    assert [use.node.id for use in small.readers["w0"]] == ["conv4_0"]
    fork = small.producers["conv0_0"].input(2)
    np.testing.assert_array_equal(small.weights[fork], model.weights["w0"][1:5])


def test_a_bias_shared_by_groups_that_shrink_alike_stays_shared() -> None:
    model, small = _removed("shared_in_different_parts", {"conv0_0": [2], "conv4_0": [2]})
    assert len(small.weights) == len(model.weights)
    assert len(small.readers["w0"]) == 2
    assert small.weights["w0"].shape == (5,)


def test_a_shared_weight_stays_one_tensor() -> None:
    model, small = _removed("shared_through_identity", {"conv1_0": [0]})
    assert small.weights["w0"].shape == (3, 3, 3, 3)
    assert len(small.weights) == len(model.weights)


def test_a_shared_target_is_forked_and_a_lone_one_edited() -> None:
    _, small = _removed("target_shared_by_two", {"conv0_0": [0]})
    np.testing.assert_array_equal(small.weights["i0"], [0, 6, 16])
    target = small.producers["reshape1_0"].input(1)
    assert target != "i0"
    np.testing.assert_array_equal(small.weights[target], [0, 5, 16])
    _, small = _removed("group_norm", {"conv0_0": [0]})
    assert small.producers["reshape1_0"].input(1) == "i2"
    np.testing.assert_array_equal(small.weights["i2"], [0, 3, -1])


def test_an_implicit_split_gets_sizes() -> None:
    _, small = _removed("splits", {"conv0_0": [1]})
    split = small.producers["split1_0"]
    np.testing.assert_array_equal(small.weights[split.input(1)], [2, 2, 2])
    assert "num_outputs" not in split.attrs
    _, small = _removed("implicit_split_by_attribute", {"conv0_0": [1]})
    assert small.producers["split1_0"].attrs["split"] == (3, 4)


def test_groups_of_a_depthwise_convolution_follow() -> None:
    _, small = _removed("depthwise", {"conv0_0": [0, 1]})
    nodes = [node for node in small.nodes if node.op == "Conv"]
    assert [node.attrs.get("group", 1) for node in nodes] == [1, 4, 4, 1]
    _, small = _removed("grouped_many", {"conv0_0": [3]})
    assert small.producers["conv1_0"].attrs["group"] == 3


@pytest.mark.parametrize(
    "name", ["reshape_to_mixed_target", "splits", "slices", "old_attributes"]
)
def test_channels_can_be_removed_again(name: str) -> None:
    model = CASES[name][0]()
    for seed in range(2):
        channels = analyse(model, feeds(model)[0])
        group = max(free_groups(channels), key=lambda n: channels.group(n).size)
        model = obeys(model, channels, {group: [seed]}, feeds(model))


def test_other_values_of_the_draft_are_kept() -> None:
    model = CASES["chain"][0]()
    channels = analyse(model, feeds(model)[0])
    draft = model.edit()
    doubled = model.weights["w0"] * 2
    draft.set_weight("w0", doubled)
    remove(draft, channels, {"conv0_0": [7]})
    np.testing.assert_array_equal(draft.seal(by="test").weights["w0"], doubled[:7])


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ({"nothing": [0]}, "there is no channel group 'nothing'"),
        ({"conv0_0": list(range(8))}, "one must be left"),
        ({"conv0_0": [8]}, "channels 0 to 7"),
        ({"conv0_0": [-1]}, "channels 0 to 7"),
        ({"conv0_0": [1, 1]}, "removed once"),
        ({"conv4_0": [0]}, "must stay: it is the graph output"),
    ],
)
def test_what_cannot_be_removed_is_refused(
    removed: dict[str, list[int]], message: str
) -> None:
    model = CASES["chain"][0]()
    channels = analyse(model, feeds(model)[0])
    with pytest.raises(ParameterError, match=message):
        remove(model.edit(), channels, removed)
    with pytest.raises(ParameterError, match=message):
        parameters_after(channels, removed)


def test_a_draft_with_other_shapes_is_refused() -> None:
    model = CASES["chain"][0]()
    channels = analyse(model, feeds(model)[0])
    draft = model.edit()
    draft.set_weight("w0", model.weights["w0"][:4])
    with pytest.raises(ParameterError, match="before changing shapes"):
        remove(draft, channels, {"conv0_0": [0]})


def test_declared_shapes_behind_changed_numbers_are_renewed() -> None:
    g = Graph(3, 4, 4)
    x = g.op("Pad", g.conv("x", 3, 6), g.ints(0, 1, 0, 0, 0, 2, 0, 0))
    model = g.model(g.op("Gemm", g.mean(x), g.w(9, 2)))
    channels = analyse(model, feeds(model)[0])
    small = obeys(model, channels, {"pad1_0": [1]}, feeds(model))
    info = next(v for v in small.skeleton.graph.value_info if v.name == "pad1_0")
    assert info.type.tensor_type.shape.dim[1].dim_value == 8


def test_every_case_predicts_its_parameters() -> None:
    for make, _ in CASES.values():
        model = make()
        channels = analyse(model, feeds(model)[0])
        removed = draw(channels, free_groups(channels), 3)
        small = removed_from(model, channels, removed)
        found = sum(w.size for w in small.weights.values() if w.dtype.kind == "f")
        assert found == parameters_after(channels, removed)
        assert found != parameters_after(channels, {})
