"""JSON that nobody vouches for: every read says which file and key are wrong, and how."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from onnxcomp.errors import ParameterError

_MOST_BYTES = 64 * 2**20
_SHOWN = 60  # characters of a wrong value in a message
_Record = TypeVar("_Record")


def read_json(path: Path) -> object:
    """Return what a JSON file holds.

    Raises:
        ParameterError: It cannot be read, is larger than 64 MiB or no JSON.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ParameterError(f"'{path}' cannot be read: {error.strerror}") from error
    if len(content) > _MOST_BYTES:
        raise ParameterError(f"'{path}' is larger than {_MOST_BYTES // 2**20} MiB")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ParameterError(f"'{path}' is no JSON file: {error}") from error


class Fields:
    """A JSON object that nobody vouches for; every read says what is wrong with it.

    Args:
        data: What should be an object.
        source: File that it comes from.
        where: Its place in the file, "" for all of it.

    Raises:
        ParameterError: It is no object.
    """

    def __init__(self, data: object, source: str, where: str = "") -> None:
        self._source, self._where = source, where
        if not isinstance(data, dict):
            wanted = f"'{where}' to be a JSON object" if where else "a JSON object"
            raise ParameterError(f"{source}: wanted {wanted}; found {_shown(data)}")
        self._data: dict[str, Any] = data
        self._read: set[str] = set()

    def error(self, key: str, wanted: str, found: object) -> ParameterError:
        """Return the error that names file, key, what is allowed and what is there."""
        return ParameterError(
            f"{self._source}: '{self._path(key)}' must be {wanted}; found {_shown(found)}"
        )

    def get(self, key: str) -> Any:
        """Return a value that must be there."""
        if key not in self._data:
            raise ParameterError(f"{self._source}: '{self._path(key)}' is missing")
        self._read.add(key)
        return self._data[key]

    def has(self, key: str) -> bool:
        """Tell whether there is a value."""
        return key in self._data

    def names(self) -> tuple[str, ...]:
        """Return all keys, in order."""
        return tuple(self._data)

    def text(self, key: str) -> str:
        """Return a string that is not empty."""
        value = self.get(key)
        if not isinstance(value, str) or not value:
            raise self.error(key, "a string", value)
        return value

    def whole(self, key: str, *, least: int = 1) -> int:
        """Return a whole number."""
        value = self.get(key)
        if type(value) is not int or value < least:
            raise self.error(key, f"a whole number, at least {least}", value)
        return value

    def wholes(self, key: str) -> tuple[int, ...]:
        """Return a list of whole numbers above 0."""
        values = self.get(key)
        if not isinstance(values, list) or any(type(v) is not int or v < 1 for v in values):
            raise self.error(key, "a list of whole numbers above 0", values)
        return tuple(values)

    def number(self, key: str) -> float:
        """Return a finite number, at least 0."""
        value = self.get(key)
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise self.error(key, "a finite number, at least 0", value)
        return float(value)

    def numbers(self) -> dict[str, float]:
        """Return all values, which must be numbers."""
        return {key: self.number(key) for key in self._data}

    def record(self, kind: type[_Record]) -> _Record:
        """Return all values not read yet as a flat dataclass of strings and numbers."""
        readers: dict[object, Callable[[str], Any]] = {
            str: self.text,
            int: self.whole,
            float: self.number,
        }
        hints = get_type_hints(kind)
        values = {name: readers[hint](name) for name, hint in hints.items()}
        self.check_nothing_left()
        return kind(**values)

    def within(self, key: str) -> Fields:
        """Return an object in this one."""
        return Fields(self.get(key), self._source, self._path(key))

    def each(self, key: str) -> list[Fields]:
        """Return the objects of a list."""
        values = self.get(key)
        if not isinstance(values, list):
            raise self.error(key, "a list", values)
        path = self._path(key)
        return [Fields(v, self._source, f"{path}[{i}]") for i, v in enumerate(values)]

    def check_header(self, kind: str, version: int) -> None:
        """Refuse other kinds of files, and versions that are not known."""
        if self.get("kind") != kind:
            raise self.error("kind", f"'{kind}'", self.get("kind"))
        if self.get("schema_version") != version:
            raise self.error(
                "schema_version",
                f"{version}, the only one that this version of onnxcomp reads",
                self.get("schema_version"),
            )

    def check_nothing_left(self) -> None:
        """Refuse keys that nobody read."""
        for key in self._data:
            if key not in self._read:
                raise ParameterError(f"{self._source}: '{self._path(key)}' is not known")

    def _path(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
