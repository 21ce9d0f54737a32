"""The fields of a packed file's head: bytes, and integers of variable length (LEB128)."""

from __future__ import annotations

from onnxcomp.errors import InvalidModelError

_MAX_BYTES = 9  # of an integer: 63 bits


class FieldWriter:
    """Collects fields."""

    def __init__(self) -> None:
        self.data = bytearray()

    def raw(self, data: bytes) -> None:
        """Write bytes whose length the reader knows."""
        self.data += data

    def number(self, value: int) -> None:
        """Write an integer >= 0."""
        while value > 0x7F:
            self.data.append(value & 0x7F | 0x80)
            value >>= 7
        self.data.append(value)

    def signed(self, value: int) -> None:
        """Write an integer."""
        self.number(value << 1 if value >= 0 else ~value << 1 | 1)


class FieldReader:
    """Reads what a `FieldWriter` wrote, and trusts none of it.

    Every method raises InvalidModelError where the data end early or a value is not allowed.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def raw(self, length: int) -> bytes:
        """Read so many bytes."""
        end = self._position + length
        if length > len(self._data) - self._position:
            raise InvalidModelError(f"the head ends early: {length} bytes are missing")
        data, self._position = self._data[self._position : end], end
        return data

    def number(self, most: int) -> int:
        """Read an integer from 0 to `most`."""
        value = 0
        for shift in range(0, 7 * _MAX_BYTES, 7):
            byte = self.raw(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value > most:
                    raise InvalidModelError(f"a field of the head is {value}, above {most}")
                return value
        raise InvalidModelError("an integer in the head is too long")

    def signed(self, most: int) -> int:
        """Read an integer from -`most` to `most`."""
        value = self.number(2 * most)
        return ~(value >> 1) if value & 1 else value >> 1

    def end(self) -> None:
        """Refuse data that go on."""
        if self._position != len(self._data):
            raise InvalidModelError("the head goes on behind its last field")
