"""Operators that training chose, with their weights, written into the model they are for.

A plan is kept in one `.npz` file.  Its entry `plan` is JSON as text: the operators and, for
every kernel and weight, the entry that holds it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.linear import Linear
from onnxcomp.draft import Draft
from onnxcomp.errors import DataError, ParameterError
from onnxcomp.json_fields import Fields
from onnxcomp.loading.writing import replacing
from onnxcomp.model import Array, Model
from onnxcomp.numerics.svd import FORMS
from onnxcomp.passes import NODE_PASSES
from onnxcomp.passes.base import Arrays, Option
from onnxcomp.passes.chains import reason_to_stay
from onnxcomp.passes.factorize import Factorize, full_rank
from onnxcomp.passes.substitute_operators import (
    FITTED,
    TRAINED,
    SubstituteOperators,
    legal_sizes,
)
from onnxcomp.passes.working import finish, prepare, working_model
from onnxcomp.sample_files import read_npz
from onnxcomp.samples import MAX_BYTES

_KIND = "onnxcomp operator plan"
_VERSION = 1
_FORMS: Mapping[str, tuple[str, ...]] = {
    Factorize.name: tuple(FORMS),
    SubstituteOperators.name: (*FITTED, *TRAINED),
}


@dataclass(frozen=True, eq=False)
class OperatorPlan:
    """Operators and trained weights of one model.

    Attributes:
        options: The operator of every convolution that does not stay as it was, by node.
        arrays: Their kernels by node, as `apply` of the option's pass takes them.
        weights: All other weights that changed, by their names in the `working_graph`.
    """

    options: Mapping[str, Option]
    arrays: Mapping[str, Arrays]
    weights: Mapping[str, Array]

    def save(self, path: str | Path) -> None:
        """Write the plan atomically; `load_plan` reads it back.

        Raises:
            ParameterError: The file cannot be written.
        """
        stored: dict[str, Array] = {}

        def entries(arrays: Arrays) -> dict[str, str]:
            names = {}
            for key, array in arrays.items():
                names[key] = f"array{len(stored)}"
                # numpy has no file format for bfloat16
                stored[names[key]] = array.astype("f4") if array.dtype.kind == "V" else array
            return names

        operators = [
            {
                "node": node,
                "method": option.method,
                "form": option.form,
                "size": list(option.size),
                "kernels": entries(self.arrays[node]),
            }
            for node, option in self.options.items()
        ]
        content = {"kind": _KIND, "schema_version": _VERSION}
        content |= {"operators": operators, "weights": entries(self.weights)}
        text = json.dumps(content, indent=1).encode()
        with replacing(path) as stream:
            np.savez(stream, allow_pickle=False, plan=np.frombuffer(text, np.uint8), **stored)


def load_plan(path: str | Path) -> OperatorPlan:
    """Read a plan that `save` wrote.

    Raises:
        DataError: It is no sound `.npz` file, or has no plan in it.
        ParameterError: The plan is wrong; names the key.
    """
    stored, source = read_npz(Path(path), max_bytes=MAX_BYTES), str(path)
    text = stored.get("plan")
    if text is None or text.dtype != np.uint8:
        raise DataError(f"{source}: has no entry 'plan', so it is no plan of operators")
    try:
        fields = Fields(json.loads(text.tobytes()), source)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ParameterError):
            raise
        raise DataError(f"{source}: its entry 'plan' is no JSON: {error}") from error
    fields.check_header(_KIND, _VERSION)
    options: dict[str, Option] = {}
    arrays: dict[str, Arrays] = {}
    for item in fields.each("operators"):
        option = _option(item)
        if option.target in options:
            raise item.error("node", "named once", option.target)
        options[option.target] = option
        arrays[option.target] = _entries(item.within("kernels"), stored)
        item.check_nothing_left()
    weights = _entries(fields.within("weights"), stored)
    fields.check_nothing_left()
    return OperatorPlan(options, arrays, weights)


def _option(fields: Fields) -> Option:
    method, form = fields.text("method"), fields.text("form")
    for key, value, known in (
        ("method", method, tuple(_FORMS)),
        ("form", form, _FORMS.get(method, ())),
    ):
        if value not in known:
            raise fields.error(key, "one of " + ", ".join(sorted(known)), value)
    return Option(method, fields.text("node"), form, fields.wholes("size"))


def _entries(fields: Fields, stored: Arrays) -> dict[str, Array]:
    """Return the arrays that the values of an object name."""
    found = {}
    for key in fields.names():
        name = fields.text(key)
        array = stored.get(name)
        if array is None or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise fields.error(key, "an entry of the file with finite floats", name)
        found[key] = array
    return found


def working_graph(model: Model) -> Model:
    """Return a model with BatchNorm folded and private, explicit biases."""
    return working_model(prepare(model)[0], None, seed=0)


def replay(model: Model, plan: OperatorPlan) -> Model:
    """Return a model with the operators and weights of a plan; needs no samples.

    Args:
        model: The original that the plan was made for.
        plan: The plan.

    Raises:
        ParameterError: The plan is for another model.
    """
    return written_into(Analysis(working_graph(model)), plan)


def written_into(facts: Analysis, plan: OperatorPlan) -> Model:
    """Do what `replay` does, on the analysis of a `working_graph`."""
    draft, old = facts.model.edit(), facts.model.weights
    for name, array in plan.weights.items():
        if name not in old or old[name].shape != array.shape:
            raise ParameterError(f"replay: the model has no weight '{name}' {array.shape}")
        draft.set_weight(name, array)
    for node, option in plan.options.items():
        _check(facts, option, plan.arrays[node])
    write_options(draft, facts, {o: plan.arrays[node] for node, o in plan.options.items()})
    return finish(draft.seal(by="replay"))


def write_options(draft: Draft, facts: Analysis, chosen: Mapping[Option, Arrays]) -> None:
    """Write options of single nodes into a draft, each by its own pass."""
    for method, pass_ in NODE_PASSES.items():
        mine = {option: arrays for option, arrays in chosen.items() if option.method == method}
        pass_.apply(draft, facts, mine)


def _check(facts: Analysis, option: Option, arrays: Arrays) -> None:
    """Refuse an option that its node cannot become, and kernels of other shapes."""
    linear = facts.linears.get(option.target)
    if linear is None or not _possible(facts, linear, option):
        raise ParameterError(f"replay: the model has no convolution that can become {option}")
    kernel = linear.kernel(facts.model.weights[linear.weight])
    if option.form in TRAINED:
        wanted = SubstituteOperators().start(option, kernel, None)
    else:
        wanted, _ = NODE_PASSES[option.method].fit(option, kernel, None)
    if {n: a.shape for n, a in arrays.items()} != {n: a.shape for n, a in wanted.items()}:
        raise ParameterError(f"replay: the kernels of {option} do not fit the model")


def _possible(facts: Analysis, linear: Linear, option: Option) -> bool:
    if linear.node.op != "Conv" or reason_to_stay(facts, linear):
        return False
    if option.method == SubstituteOperators.name:
        return option.size in legal_sizes(option.form, linear)
    return len(option.size) == 1 and 0 < option.size[0] < full_rank(linear, option.form)
