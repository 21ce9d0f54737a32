"""What a run is asked for: limits, methods, target, and everything that decides its result."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real

import numpy as np
import numpy.typing as npt

from onnxcomp.analysis.target import find_target
from onnxcomp.errors import ParameterError
from onnxcomp.kit_script import usable_cores
from onnxcomp.passes.compress_collaboratively import CompressCollaboratively
from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.factorize_jointly import FactorizeJointly
from onnxcomp.passes.remove_channels import RemoveChannels
from onnxcomp.passes.share_weights import ShareWeights
from onnxcomp.passes.substitute_operators import SubstituteOperators

Row = npt.NDArray[np.float64]
EMITTED = ("onnx", "codebook", "onnxc")
_DEVICES = ("cpu", "cuda")
METHODS = (
    RemoveChannels.name,
    Factorize.name,
    FactorizeJointly.name,
    SubstituteOperators.name,
    ShareWeights.name,
)
"""The lossy passes that share one search; `compress_collaboratively` plans alone."""

_COSTS = {"macs": "multiply-accumulates", "params": "parameters", "size": "bytes"}
_MOST_THREADS = 8  # of a search; more were never measured
_LEAST_COST = 1000  # of what is no share; no network asks for less, but a slip does


@dataclass(frozen=True)
class Limits:
    """What the result may cost at most; costs at most 1 are shares of the original.

    Attributes:
        macs: Multiply-accumulates per sample.
        params: Parameters.
        size: Bytes of the written file.
        latency: Microseconds of a run at batch 1, or at the declared batch; or a share of the
            original's time.
        drop: Points of the metric, in absolute terms (0.01 is one point of top-1); below 1
            where the metric counts classes.
        drift: Relative L2 change of any output.
    """

    macs: float | None = None
    params: float | None = None
    size: float | None = None
    latency: float | None = None
    drop: float | None = None
    drift: float | None = None

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if value is not None and not (_is_number(value) and 0 < value < math.inf):
                raise ParameterError.of("Limits", limit.name, "a number above 0", value)

    def check_costs(self) -> None:
        """Check that no limit on a cost is neither a share nor a number that networks have.

        Raises:
            ParameterError: One is above 1 and below 1000.
        """
        for name, unit in _COSTS.items():
            value = getattr(self, name)
            if value is not None and 1 < value < _LEAST_COST:
                raise ParameterError(
                    f"Limits: '{name}' of {value:g} is neither a share of the original, which "
                    f"is at most 1 (0.5, 50%), nor a sensible number of {unit}, which is at "
                    f"least {_LEAST_COST} (1.5M)"
                )

    def check_share(self) -> None:
        """Check a limit on the drop of a metric whose points are shares of the samples.

        Raises:
            ParameterError: All that there is to lose may be lost.
        """
        if self.drop is not None and self.drop >= 1:
            raise ParameterError(
                "Limits: 'drop' must be below 1 where the metric counts classes: "
                f"{self.drop:g} means {100 * self.drop:g} points; {self.drop:g}% is "
                f"{self.drop / 100:g}"
            )

    def absolute(self, macs: int, params: int, size: int) -> Limits:
        """Return the limits on MACs, parameters and bytes in units of the original's."""

        def units(value: float | None, whole: int) -> float | None:
            if value is None or value > 1:
                return value
            return value * whole or None  # a share of nothing is no limit

        return replace(
            self,
            macs=units(self.macs, macs),
            params=units(self.params, params),
            size=units(self.size, size),
        )

    @property
    def row(self) -> Row:
        """The limits in the order macs, params, size; infinite where there is none."""
        values = (self.macs, self.params, self.size)
        return np.array([np.inf if v is None else float(v) for v in values])

    @property
    def judged(self) -> bool:
        """Whether a candidate's outputs decide, not its costs alone."""
        return self.drop is not None or self.drift is not None

    @property
    def without_judgement(self) -> Limits:
        """The limits on costs."""
        return replace(self, drop=None, drift=None)

    def judged_at(self, share: float) -> Limits:
        """Return the limits with a share of those on drop and drift."""
        drop, drift = (None if v is None else share * v for v in (self.drop, self.drift))
        return replace(self, drop=drop, drift=drift)


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run; written next to the result as its recipe.

    Attributes:
        limits: What the result may cost.
        methods: Names of lossy passes to use.
        target: Built-in profile of the CPU.
        grid: "auto", "off", or a number whose multiples widths and ranks must be.
        exclude: Regular expression; nodes whose name or output matches stay as they are.
        patience: Factor of the least predicted loss up to which, on the target's grid, the
            plan of least predicted time is preferred; 1 asks for the least loss.
        data_aware: Solve in the metric of the samples; otherwise from the weights alone.
        seed: Seed of the split, of sampled positions and of random inputs.
        threads: Intra-op threads that the model is to run with: those of every latency.
        search_threads: Threads of all other sessions, and of torch; None = every core that
            this process may use, eight at most.  NumPy has one: idle threads of BLAS spin,
            which slows small problems tenfold where other work is on the cores.
        memory: Bytes that activations of the fitting samples may take.
        solver_seconds: Time limit of the knapsack.
        time_limit: Seconds after which the best so far is returned.  Further plans are tried
            until then, or until two dozen attempts in a row were no better; None keeps the
            first plan that uses up the limits.
        tune: Let the result learn from the original, in half of the time limit or five
            minutes; needs samples and torch.
        device: Where it learns: "cpu" or "cuda".
        emit: Form of the written file: "onnx", "onnxc" (packed; a limit on the size counts
            that file, and weights take few values for it) or "codebook" (plain ONNX with
            indices of a byte or half of one for weights).
        latency: Whether to measure latency.
        force: Keep a result that is larger or slower than the input.
    """

    limits: Limits = field(default_factory=Limits)
    methods: tuple[str, ...] = METHODS
    target: str = "x86-avx512"
    grid: str = "auto"
    exclude: str | None = None
    patience: float = 1.5
    data_aware: bool = True
    seed: int = 0
    threads: int = 1
    search_threads: int | None = None
    memory: float = 1e9
    solver_seconds: float = 20.0
    time_limit: float | None = None
    tune: bool = False
    device: str = "cpu"
    emit: str = "onnx"
    latency: bool = True
    force: bool = False

    def __post_init__(self) -> None:
        known = (*METHODS, CompressCollaboratively.name)
        for method in self.methods:
            if method not in known:
                raise ParameterError.choice("Settings", "methods", known, method)
        if CompressCollaboratively.name in self.methods:
            self._check_collaboration()
        self.limits.check_costs()
        if not isinstance(self.grid, str) or (
            self.grid not in ("auto", "off")
            and not (self.grid.isdigit() and int(self.grid) > 0)
        ):
            allowed = "'auto', 'off' or a number as text"
            raise ParameterError.of("Settings", "grid", allowed, self.grid)
        for name, choices in (("emit", EMITTED), ("device", _DEVICES)):
            if getattr(self, name) not in choices:
                raise ParameterError.choice("Settings", name, choices, getattr(self, name))
        self._check_numbers()
        find_target(self.target)
        try:
            re.compile(self.exclude or "")
        except re.error as error:
            raise ParameterError.of(
                "Settings", "exclude", f"a regular expression ({error})", self.exclude
            ) from error

    @property
    def cores(self) -> int:
        """Threads of sessions whose latency is not measured, and of torch."""
        return self.search_threads or min(usable_cores(), _MOST_THREADS)

    @property
    def shares(self) -> bool:
        """Whether weights take few values, for the form of the written file."""
        packed = self.emit == "onnxc" and self.limits.size is not None
        return ShareWeights.name in self.methods and (packed or self.emit == "codebook")

    def _check_numbers(self) -> None:
        """Check that numbers are such, and large enough."""
        for name, least in (("threads", 1), ("search_threads", 1), ("seed", 0)):
            value = getattr(self, name)
            free = name == "search_threads" and value is None
            if not free and not (_is_number(value, Integral) and value >= least):
                allowed = f"a whole number, at least {least}"
                raise ParameterError.of("Settings", name, allowed, value)
        if not (_is_number(self.patience) and self.patience >= 1):
            raise ParameterError.of("Settings", "patience", "at least 1", self.patience)
        for name, unit in (("memory", "bytes"), ("solver_seconds", "s"), ("time_limit", "s")):
            value = getattr(self, name)
            unlimited = name == "time_limit" and value is None
            if not unlimited and not (_is_number(value) and value > 0):
                raise ParameterError.of("Settings", name, f"above 0 {unit}", value)

    def _check_collaboration(self) -> None:
        """Check what a method that plans the whole network by itself leaves open."""
        name = CompressCollaboratively.name
        if len(self.methods) > 1:
            raise ParameterError.of("Settings", "methods", f"{name} alone", self.methods)
        if self.limits.judged:
            raise ParameterError(
                f"Settings: {name} plans by costs; give a limit on MACs, parameters, size or "
                "latency instead of drop or drift"
            )

    @property
    def step(self) -> int | None:
        """Step of widths and ranks; None for the target's grid."""
        return (
            {"auto": None, "off": 1}.get(self.grid)
            if not self.grid.isdigit()
            else int(self.grid)
        )


def _is_number(value: object, kind: type = Real) -> bool:
    """Whether a value is a number, of Python or NumPy; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)
