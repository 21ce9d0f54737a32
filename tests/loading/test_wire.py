"""The scan of the wire format before the parser."""

from contextlib import suppress

import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.helper import make_node, make_tensor

from onnxcomp.errors import InvalidModelError
from onnxcomp.loading.limits import LoadLimits
from onnxcomp.loading.wire import check_wire_format
from tests.corpus import build
from tests.corpus.build import weight
from tests.loading.graphs import refused


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_what_passes_the_scan_stays_small_when_parsed(data):
    try:
        check_wire_format(data, LoadLimits())
    except InvalidModelError:
        return
    parsed = onnx.ModelProto()
    with suppress(DecodeError):
        parsed.ParseFromString(data)
    assert parsed.ByteSize() <= 2 * len(data)


def test_sound_files_pass_and_each_of_their_truncations_does_not():
    data = build.conv()()
    check_wire_format(data, LoadLimits())
    passed = 0
    for length in range(len(data)):
        try:
            check_wire_format(data[:length], LoadLimits())
        except InvalidModelError:
            continue
        passed += 1
    # Only a cut between two fields of the model itself looks complete.
    fields = len(onnx.ModelProto.FromString(data).ListFields())
    assert passed == fields


@pytest.mark.parametrize("data", [b"\x0b", b"\x0c", b"\x08" + b"\xff" * 11, b"\x08"])
def test_groups_and_broken_integers_are_refused(data):
    with pytest.raises(InvalidModelError, match="ONNX file"):
        check_wire_format(data, LoadLimits())


def test_recursive_types_are_bounded(read):
    model = build.model(build.graph([make_node("Relu", ["x"], ["y"])]))
    inner = model.graph.value_info.add(name="deep").type
    for _ in range(40):
        inner = inner.sequence_type.elem_type
    inner.tensor_type.elem_type = 1
    refused(read, model, "nested more than 64")


def test_text_that_is_not_utf8_is_refused(read):
    data = build.matmul(weight(16, 16)).replace(b"MatMul", b"Mat\xffMu")
    refused(read, data, "UTF-8")


@pytest.mark.parametrize(
    ("limit", "value", "says"),
    [
        ("fields", 10, "protobuf fields"),
        ("message_depth", 2, "nested"),
        ("name_bytes", 0, "bytes long"),
        ("nodes", 0, "nodes"),
        ("varint_bytes", 1, "integer lists"),
        ("rank", 1, "dimensions"),
        ("elements", 255, "elements"),
    ],
)
def test_each_limit_bites(limit, value, says, read):
    model = onnx.ModelProto.FromString(build.matmul(weight(16, 16)))
    model.graph.initializer.append(make_tensor("i", onnx.TensorProto.INT64, [2], [1, 2]))
    assert read(model)
    with pytest.raises(InvalidModelError, match=says):
        read(model, **{limit: value})
