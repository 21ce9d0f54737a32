"""Every exception that onnxcomp raises on purpose, and the exit code it ends with.

OnnxcompError                      exit
├── ParameterError (ValueError)      2   an argument or a flag is outside what it allows
├── DataError                        2   samples, labels or preprocessing cannot be used
├── InvalidModelError                2   the file is broken or breaks a safety limit
├── UnsupportedModelError            3   the model is sound, but onnxcomp cannot work on it
├── SealError                        1   an edit would have broken the graph
├── ExecutionError                   4   onnxruntime cannot load or run the model
├── ValidationError                  4   a result failed the validation ladder
└── LimitError                       5   a limit or a gate was not met
"""

from collections.abc import Iterable


class OnnxcompError(Exception):
    """Base of all errors raised on purpose; the message says what, where and what to do."""

    exit_code = 1


class ParameterError(OnnxcompError, ValueError):
    """A parameter is outside what it allows."""

    exit_code = 2

    @classmethod
    def of(cls, owner: str, name: str, allowed: str, got: object) -> "ParameterError":
        """Return the error in the one wording used for all parameters."""
        return cls(f"{owner}: '{name}' must be {allowed}; got {got!r}")

    @classmethod
    def choice(
        cls, owner: str, name: str, allowed: Iterable[str], got: object
    ) -> "ParameterError":
        """Return the error for a value outside a fixed set."""
        return cls.of(owner, name, "one of " + ", ".join(sorted(allowed)), got)


class DataError(OnnxcompError):
    """Samples, labels or a preprocessing file cannot be used."""

    exit_code = 2


class InvalidModelError(OnnxcompError):
    """The model file is broken, truncated, or breaks a safety limit."""

    exit_code = 2


class UnsupportedModelError(OnnxcompError):
    """The model is sound, but holds what onnxcomp does not work on."""

    exit_code = 3


class SealError(OnnxcompError):
    """An edit would have broken the graph; the draft was thrown away."""


class ExecutionError(OnnxcompError):
    """Onnxruntime cannot load or run the model."""

    exit_code = 4


class ValidationError(OnnxcompError):
    """A result failed the validation ladder."""

    exit_code = 4


class LimitError(OnnxcompError):
    """A limit or a gate was not met."""

    exit_code = 5
