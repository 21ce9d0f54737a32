"""Recipes: the settings of a run as YAML, written next to every result and read back.

A flag beats the recipe, the recipe beats the default.  Under `provenance` a recipe says what
it was made from and with; that part is not read back.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import platform
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from onnxcomp.bench import describe_machine
from onnxcomp.errors import ParameterError
from onnxcomp.report.text import clean
from onnxcomp.search.settings import Limits, Settings

SCHEMA_VERSION = 1
_PACKAGES = ("onnxcomp", "onnx", "onnxruntime", "onnx-graphsurgeon", "numpy", "scipy")
_MAX_BYTES = 64 * 1024
_UNITS = {
    "": 1.0,
    "b": 1.0,
    "%": 0.01,
    **{prefix: 1000.0**power for power, prefix in enumerate("kmgt", start=1)},
    **{prefix + "b": 1000.0**power for power, prefix in enumerate("kmgt", start=1)},
    **{prefix + "ib": 1024.0**power for power, prefix in enumerate("kmgt", start=1)},
}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_QUANTITY = re.compile(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z%]*)")


def parse_quantity(text: str) -> float:
    """Return a number with an optional unit: "0.5", "50%", "20M", "1.5MB", "1MiB".

    Raises:
        ParameterError: It is no positive number, has another unit, or is above 100 %.
    """
    match = _QUANTITY.fullmatch(text.strip())
    unit = "" if match is None else match[2].lower()
    if match is not None and unit in _UNITS:
        try:
            value = float(match[1]) * _UNITS[unit]
        except ValueError:
            value = 0.0
        if 0 < value < math.inf and not (unit == "%" and value > 1):
            return value
    raise ParameterError(
        f"'{text}' is no positive number with one of the units % (at most 100 %), k, M, G, "
        "B, kB, MB, GB, KiB, MiB, GiB"
    )


def parse_duration(text: str) -> float:
    """Return a time with its unit in seconds: "90s", "10m", "1h", "4ms", "800us".

    Raises:
        ParameterError: It is no positive number with one of these units.
    """
    match = _QUANTITY.fullmatch(text.strip())
    if match is not None and match[2].lower() in _SECONDS:
        with suppress(ValueError):
            value = float(match[1]) * _SECONDS[match[2].lower()]
            if 0 < value < math.inf:
                return value
    units = ", ".join(_SECONDS)
    raise ParameterError(f"'{text}' is no positive number with one of the units {units}")


def parse_latency(text: str) -> float:
    """Return a share of the original's time ("0.6", "60%"), or microseconds ("4ms").

    Raises:
        ParameterError: It is neither.
    """
    with suppress(ParameterError):
        microseconds = 1e6 * parse_duration(text)
        if microseconds > 1:  # less would read as a share
            return microseconds
    try:
        value = parse_quantity(text)
    except ParameterError:
        value = math.inf
    if value > 1:
        raise ParameterError(
            f"'{text}' is neither a share of the original's time (0.6, 60%) nor a time with "
            f"one of the units {', '.join(_SECONDS)}"
        )
    return value


@dataclass(frozen=True)
class Recipe:
    """What a recipe file asks for.

    Attributes:
        where: The file, for messages.
        settings: Fields of `Settings` that it sets.
        metric: The metric it names, or None.
    """

    where: str = "recipe"
    settings: Mapping[str, Any] = field(default_factory=dict)
    metric: str | None = None


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe.

    Raises:
        ParameterError: The file cannot be read, is no YAML mapping, or has an unknown key or
            a value of the wrong type; names the file and the key.
    """
    where = str(path)
    content = _read(Path(path), where)
    version = content.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise ParameterError(
            f"{where}: 'schema_version' must be {SCHEMA_VERSION}; got {version!r}"
        )
    content.pop("provenance", None)
    metric = content.pop("metric", None)
    if not isinstance(metric, str | None):
        raise ParameterError.of(where, "metric", "a name", metric)
    known = get_type_hints(Settings)
    found = {}
    for key, value in content.items():
        if key not in known:
            allowed = ("schema_version", "metric", "provenance", *known)
            raise ParameterError(
                f"{where}: unknown key {key!r}; known are {', '.join(sorted(allowed))}"
            )
        found[key] = _converted(where, key, value, known[key])
    return Recipe(where, found, metric)


def resolve(recipe: Recipe, flags: Mapping[str, Any]) -> Settings:
    """Return the settings of a run: flags over the recipe over defaults.

    Args:
        recipe: The recipe; an empty one where there is none.
        flags: Fields of `Settings` set by flags of the same names; None where a flag is not
            given.  Of `limits`, a flag replaces its own only.

    Raises:
        ParameterError: A value is outside what it allows; names the flag or the file.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    for owner, values in ((recipe.where, recipe.settings), (None, given)):
        for key, value in values.items():
            _check(owner or ("limits" if key == "limits" else f"--{key}"), key, value)
    merged = {**recipe.settings, **given}
    if "limits" in recipe.settings and "limits" in given:
        own = {f.name: getattr(given["limits"], f.name) for f in fields(Limits)}
        changes = {key: value for key, value in own.items() if value is not None}
        merged["limits"] = replace(recipe.settings["limits"], **changes)
    return Settings(**merged)


def dump_recipe(
    settings: Settings, *, metric: str | None = None, provenance: Mapping[str, Any]
) -> str:
    """Return settings as YAML that `load_recipe` reads back to the same ones.

    Args:
        settings: The resolved settings.
        metric: Name of the metric.
        provenance: What the result was made from and with; see `provenance`.
    """
    limits = {f.name: getattr(settings.limits, f.name) for f in fields(settings.limits)}
    content: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
    content["limits"] = {key: value for key, value in limits.items() if value is not None}
    for item in fields(settings):
        value = getattr(settings, item.name)
        if item.name != "limits":
            content[item.name] = list(value) if isinstance(value, tuple) else value
    content["metric"] = metric
    content["provenance"] = dict(provenance)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def provenance(files: Mapping[str, Path | None]) -> dict[str, Any]:
    """Return what a result is made from and with, as plain YAML values.

    Args:
        files: Input files by their role; folders are named without a digest.
    """
    made: dict[str, Any] = {}
    for role, path in files.items():
        if path is None:
            continue
        made[role] = {"path": clean(path)}
        if path.is_file():
            with path.open("rb") as stream:
                made[role]["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    machine = describe_machine()
    processor = {"cpu": clean(machine.cpu), "architecture": machine.architecture}
    return {**made, "versions": versions, "machine": processor}


def _read(path: Path, where: str) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ParameterError(f"{where}: a recipe has at most {_MAX_BYTES} bytes")
        content = yaml.safe_load(data)
    except OSError as error:
        raise ParameterError(f"{where}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, ParameterError):
            raise
        reason = " ".join(str(error).split())
        raise ParameterError(f"{where}: is no sound YAML: {reason}") from error
    if not isinstance(content, dict):
        raise ParameterError(f"{where}: must be a mapping of settings; got {content!r:.40}")
    return content


def _check(owner: str, key: str, value: Any) -> None:
    """Try one field alone, so that the message can say where it came from."""
    try:
        replace(Settings(), **{key: value})
    except ParameterError as error:
        raise ParameterError(f"{owner}: {str(error).partition(': ')[2]}") from error


def _converted(where: str, key: str, value: Any, kind: Any) -> Any:
    """Return a YAML value as the type that a field of `Settings` has."""
    if kind is Limits:
        return _limits(where, value)
    allowed, convert = _KINDS[kind]
    try:
        return convert(value)
    except (ParameterError, TypeError, ValueError) as error:
        raise ParameterError.of(where, key, allowed, value) from error


def _limits(where: str, value: Any) -> Limits:
    if not isinstance(value, Mapping):
        raise ParameterError.of(where, "limits", "a mapping", value)
    known = [f.name for f in fields(Limits)]
    for key in value:
        if key not in known:
            raise ParameterError(
                f"{where}: unknown key {key!r} in 'limits'; known are {', '.join(known)}"
            )
    given = {key: item for key, item in value.items() if item is not None}
    numbers = {
        key: _converted(where, f"limits.{key}", item, key if key in _KINDS else float)
        for key, item in given.items()
    }
    try:
        return Limits(**numbers)
    except ParameterError as error:
        raise ParameterError(f"{where}: {error}") from error


def _text(value: Any) -> str:
    if isinstance(value, bool):  # YAML 1.1 reads a bare `off` as false
        return "on" if value else "off"
    if not isinstance(value, str | int):
        raise TypeError
    return str(value)


def _optional_text(value: Any) -> str | None:
    return None if value is None else _text(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


def _optional_whole(value: Any) -> int | None:
    return None if value is None else _whole(value)


def _number(value: Any) -> float:
    if isinstance(value, str):
        return parse_quantity(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    return float(value)


def _latency(value: Any) -> float:
    return parse_latency(value) if isinstance(value, str) else _number(value)


def _optional_duration(value: Any) -> float | None:
    if isinstance(value, str):
        return parse_duration(value)
    return None if value is None else _number(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError
    return tuple(value)


_KINDS: Mapping[Any, tuple[str, Callable[[Any], Any]]] = {
    str: ("a text", _text),
    str | None: ("a text", _optional_text),
    int: ("a whole number", _whole),
    int | None: ("a whole number", _optional_whole),
    float: ("a number, with a unit or without", _number),
    float | None: ("seconds, or a time with its unit (10m)", _optional_duration),
    "latency": ("a share, microseconds, or a time with its unit (4ms)", _latency),
    bool: ("true or false", _flag),
    tuple[str, ...]: ("a list of names", _names),
}
