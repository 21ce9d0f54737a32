"""A scan of protobuf's wire format that bounds a file before the protobuf library parses it.

The parser trusts length prefixes and recurses into nested messages, and a few bytes of the
file may become many in memory. The scan knows the schema, so it descends into messages and
skips the payloads of tensors; it is iterative and allocates nothing that grows with the file.

References:
    Protocol Buffers encoding, https://protobuf.dev/programming-guides/encoding
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import onnx

from onnxcomp.errors import InvalidModelError
from onnxcomp.loading.limits import LoadLimits

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FREE_TEXT = frozenset({"doc_string", "value"})


@dataclass(frozen=True, slots=True)
class _Field:
    """What the scan has to know about one field of a message."""

    name: str
    message: str | None
    is_text: bool
    is_varint: bool


@lru_cache(maxsize=1)
def _schema() -> Mapping[str, Mapping[int, _Field]]:
    """Return the fields of every message that a ModelProto can hold, by message name."""
    schema: dict[str, dict[int, _Field]] = {}
    pending: list[Any] = [onnx.ModelProto.DESCRIPTOR]
    while pending:
        message = pending.pop()
        if message.full_name in schema:
            continue
        fields = schema[message.full_name] = {}
        for field in message.fields:
            nested = field.message_type
            fields[field.number] = _Field(
                name=field.name,
                message=nested.full_name if nested is not None else None,
                is_text=field.type == field.TYPE_STRING,
                is_varint=field.cpp_type
                in (field.CPPTYPE_INT32, field.CPPTYPE_INT64, field.CPPTYPE_UINT64),
            )
            if nested is not None:
                pending.append(nested)
    return schema


def _varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    """Return a variable-length integer of at most 64 bits and the position behind it."""
    value = shift = 0
    while position < end and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise InvalidModelError(f"not a readable ONNX file: broken integer at byte {position}")


def _check_text(data: bytes, start: int, end: int, field: _Field, limits: LoadLimits) -> None:
    if field.name not in _FREE_TEXT and end - start > limits.name_bytes:
        raise InvalidModelError(
            f"'{field.name}' at byte {start} is {end - start} bytes long; "
            f"at most {limits.name_bytes} are allowed"
        )
    try:
        data[start:end].decode()
    except UnicodeDecodeError as error:
        raise InvalidModelError(f"'{field.name}' at byte {start} is not UTF-8 text") from error


class _Budget:
    """Counts what grows in memory and refuses a file that spends too much of it."""

    def __init__(self, limits: LoadLimits) -> None:
        self._limits = limits
        self._fields = self._nodes = self._varint_bytes = 0

    def field(self) -> None:
        self._fields += 1
        if self._fields > self._limits.fields:
            raise InvalidModelError(f"more than {self._limits.fields} protobuf fields")

    def message(self, name: str, depth: int) -> None:
        if depth > self._limits.message_depth:
            raise InvalidModelError(
                f"messages are nested more than {self._limits.message_depth} deep"
            )
        self._nodes += name == "onnx.NodeProto"
        if self._nodes > self._limits.nodes:
            raise InvalidModelError(f"more than {self._limits.nodes} nodes")

    def varints(self, field: _Field, length: int) -> None:
        self._varint_bytes += length
        # An integer takes at most 10 bytes on the wire.
        if field.name == "dims" and length > 10 * self._limits.rank:
            raise InvalidModelError(f"a tensor has more than {self._limits.rank} dimensions")
        if self._varint_bytes > self._limits.varint_bytes:
            raise InvalidModelError(
                f"more than {self._limits.varint_bytes} bytes of integer lists; "
                "store tensors as raw data"
            )


def check_wire_format(data: bytes, limits: LoadLimits) -> None:
    """Refuse bytes that are not the wire format of a ModelProto of bearable size.

    Args:
        data: The whole model file.
        limits: Bounds on fields, nesting, nodes, names and integer lists.

    Raises:
        InvalidModelError: A length reaches past its message, a name is not text or too long,
            or a limit is broken.
    """
    schema, budget = _schema(), _Budget(limits)
    position, ends, messages = 0, [len(data)], [schema["onnx.ModelProto"]]
    while ends:
        end = ends[-1]
        if position == end:
            ends.pop()
            messages.pop()
            continue
        budget.field()
        key, position = _varint(data, position, end)
        wire_type, field = key & 7, messages[-1].get(key >> 3)
        if wire_type == _VARINT:
            _, position = _varint(data, position, end)
            continue
        if wire_type == _LENGTH:
            length, position = _varint(data, position, end)
        elif wire_type in (_FIXED64, _FIXED32):
            length = 8 if wire_type == _FIXED64 else 4
        else:
            raise InvalidModelError(
                f"not an ONNX file: wire type {wire_type} at byte {position}"
            )
        if length > end - position:
            raise InvalidModelError(
                f"truncated or broken file: a field at byte {position} claims {length} "
                f"bytes, {end - position} follow"
            )
        if field is not None and wire_type == _LENGTH:
            if field.message is not None:
                budget.message(field.message, len(ends))
                ends.append(position + length)
                messages.append(schema[field.message])
                continue
            if field.is_text:
                _check_text(data, position, position + length, field, limits)
            elif field.is_varint:
                budget.varints(field, length)
        position += length
