"""Labs of networks whose layers repeat, with measured losses of common factors."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np

from onnxcomp.analysis.moments import collect_moments
from onnxcomp.deadline import Deadline
from onnxcomp.loading import load
from onnxcomp.model import Array
from onnxcomp.numerics.joint_svd import JOINT_FORMS
from onnxcomp.passes.base import Option
from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.factorize_jointly import FactorizeJointly
from onnxcomp.passes.remove_channels import RemoveChannels
from onnxcomp.samples import Samples
from onnxcomp.search.losses import Losses
from onnxcomp.search.refits import like_bias
from onnxcomp.search.sharing import JointLosses, Sharing
from onnxcomp.search.space import Plan
from onnxcomp.search.store import Store
from onnxcomp.search.twins import Twins
from tests.passes.joint_cases import CASES, NAME
from tests.search.lab import COMMON, SEED, Lab

DIGITS = Path(__file__).parents[2] / "models" / "digits"
JOINT = partial(FactorizeJointly, slower=True)
NO_END = Deadline(None)


def sharing(lab: Lab, **options: object) -> Sharing:
    return Sharing(lab.space, lab.batches, **{**COMMON, **options})


def measured(lab: Lab, **options: object) -> JointLosses:
    return sharing(lab, **options).measure(len(lab.batches), Store(None), NO_END)


@cache
def repeated(case: str) -> tuple[Lab, Losses]:
    """The lab of a case with joint options only, and their losses."""
    lab = Lab.of(CASES[case](), step=2, kinds=(JOINT,))
    return lab, Losses({}, {}, {}, (), measured(lab))


@cache
def mixed(case: str) -> tuple[Lab, Losses]:
    """The lab of a case with all methods, and their losses."""
    step = 4 if "residual" in case or case == "transposed" else 2
    lab = Lab.of(CASES[case](), step=step, kinds=(RemoveChannels, Factorize, JOINT))
    return lab, replace(lab.losses(), joint=measured(lab))


@cache
def digits() -> tuple[Lab, JointLosses]:
    """A trained network of three equal blocks on 64 images, with a few options."""
    model = load(DIGITS / "digits.onnx")
    with np.load(DIGITS / "samples.npz") as file:
        samples = Samples({"input": file["input"][:64]})
    forms = ("spatial_first", "output_basis_last", "input_basis_first", "tucker2_outer")
    kind = partial(JOINT, forms)
    lab = Lab.of(model, samples=samples, size=32, step=16, kinds=(kind,))
    return lab, measured(lab)


def members_of(lab: Lab, option: Option) -> tuple[str, ...]:
    return lab.space.joint_groups[option.target].members


def predicted(lab: Lab, losses: JointLosses, option: Option) -> float | None:
    """Loss of an option at all its nodes; None where one of them has none."""
    keys = [(node, option) for node in members_of(lab, option)]
    return sum(losses.losses[k] for k in keys) if losses.losses.keys() >= set(keys) else None


def plan_of(lab: Lab, *options: Option, widths: Mapping[str, int] | None = None) -> Plan:
    """The plan of some joint options."""
    forms = {node: option for option in options for node in members_of(lab, option)}
    return lab.lone_plan(widths or {}, forms)


def lone_error(lab: Lab, losses: JointLosses, option: Option) -> float:
    """Error of the outputs with one option in place, solved on the original's moments."""
    plan, weights = plan_of(lab, option), dict[str, Array]()
    joint = sharing(lab).solve(plan, losses.weights, {})[option]
    twins = Twins(lab.space.facts, lab.batches, weights=None, threads=1)
    for position, linear in enumerate(lab.space.facts.linears.values()):
        if linear.id not in plan.forms:
            continue
        twins.advance(linear)
        rng = np.random.default_rng([SEED, position])
        (metric,) = collect_moments(linear, twins.inputs(linear), twins.targets(linear), rng)
        kernel = joint.dense(members_of(lab, option).index(linear.id))
        bias = metric.bias(kernel.reshape(len(kernel), -1))
        shape = linear.kernel(lab.model.weights[linear.weight]).shape
        weights[linear.weight] = linear.stored(kernel.reshape(shape))
        weights[linear.bias] = like_bias(bias, lab.model.weights[linear.bias])
    return lab.error(weights)


def readers(lab: Lab, plan: Plan) -> list[int]:
    """Readers that the common initializers of a plan should have."""
    joint = {o for o in plan.forms.values() if o.method == NAME}
    parts = {"first": 1, "last": 1, "both": 2, "outer": 2}
    return sorted(
        len(members_of(lab, option))
        for option in joint
        for _ in range(parts[JOINT_FORMS[option.form].shares])
    )
