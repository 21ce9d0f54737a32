"""Small graphs whose layers repeat, and joint factors for them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import onnx
import pytest

from onnxcomp.analysis import Analysis
from onnxcomp.model import Array, Model
from onnxcomp.numerics.joint_svd import JOINT_FORMS, Joint, Member
from onnxcomp.passes.base import Option
from onnxcomp.passes.chains import to_plane
from onnxcomp.passes.factorize_jointly import FactorizeJointly, arrays_of
from onnxcomp.passes.working import prepare, working_model
from tests.analysis.channel_graphs import Graph
from tests.graphs import SHARED, sane_feeds

SIZE = 12  # channels of the layers that repeat
NAME = FactorizeJointly.name
ALL = FactorizeJointly()


def _block(
    g: Graph, x: str, inputs: int, *, stride: int = 1, bn: bool = False, dilation: int = 1
) -> str:
    """A residual block of two 3x3 convolutions, the first of which may halve the extent."""
    spread = {"dilations": [dilation] * 2, "pads": [dilation] * 4}
    t = g.op("Conv", x, g.w(SIZE, inputs, 3, 3), g.w(SIZE), strides=[stride] * 2, **spread)
    t = g.op("Relu", g.bn(t, SIZE) if bn else t)
    t = g.op("Conv", t, g.w(SIZE, SIZE, 3, 3), g.w(SIZE), **spread)
    t = g.bn(t, SIZE) if bn else t
    if inputs != SIZE or stride > 1:
        x = g.conv(x, inputs, SIZE, kernel=1, strides=[stride] * 2)
        x = g.bn(x, SIZE) if bn else x
    return g.op("Relu", g.op("Add", t, x))


def residual(*, blocks: int = 4, bn: bool = False, dilation: int = 1) -> Model:
    """Equal residual blocks, of which the first has a stride and fewer inputs."""
    g = Graph(3, 8, 8)
    t, inputs, stride = g.op("Relu", g.conv("x", 3, 6)), 6, 2
    for _ in range(blocks):
        t = _block(g, t, inputs, stride=stride, bn=bn, dilation=dilation)
        inputs, stride = SIZE, 1
    return g.model(g.op("Gemm", g.mean(t), g.w(SIZE, 5), g.w(5)))


def stages() -> Model:
    """Two stages of blocks; the first block of the second has fewer inputs."""
    g = Graph(3, 8, 8)
    t = g.op("Relu", g.conv("x", 3, 6))
    t = g.op("Relu", g.op("Add", g.conv(t, 6, 6), t))
    t = _block(g, t, 6, stride=2, bn=True)
    for _ in range(3):
        t = _block(g, t, SIZE, bn=True)
    return g.model(g.op("Gemm", g.mean(t), g.w(SIZE, 5), g.w(5)))


def gemms(*, rows: int = 0, opset: int = 17) -> Model:
    g = Graph(16, opset=opset)
    t = "x"
    for _ in range(3):
        t = g.op("Relu", g.op("Gemm", t, g.w(16, 16), g.w(16), transB=rows))
    return g.model(g.op("Gemm", t, g.w(16, 5), g.w(5)))


def matmuls() -> Model:
    g = Graph(4, 16)
    t = "x"
    for _ in range(3):
        t = g.op("Relu", g.op("Add", g.op("MatMul", t, g.w(16, 16)), g.w(16)))
    return g.model(g.op("MatMul", t, g.w(16, 5)))


def transposed() -> Model:
    g = Graph(8, 5, 5)
    t = g.op("Relu", g.conv("x", 8, SIZE))
    for _ in range(2):
        attrs = {"strides": [2, 2], "pads": [1] * 4, "output_padding": [1, 1]}
        t = g.op("ConvTranspose", t, g.w(SIZE, SIZE, 3, 3), g.w(SIZE), **attrs)
        t = g.op("Relu", t)
    return g.model(g.conv(t, SIZE, 3))


def one_dimension() -> Model:
    g = Graph(8, 20)
    t = g.op("Relu", g.op("Conv", "x", g.w(SIZE, 8, 5), g.w(SIZE), strides=[2]))
    for _ in range(3):
        t = g.op("Relu", g.op("Conv", t, g.w(SIZE, SIZE, 3), g.w(SIZE), pads=[1, 1]))
    return g.model(t)


def uneven() -> Model:
    """Kernels and padding that differ in their two directions, and strides that differ."""
    g = Graph(SIZE, 9, 10)
    t = "x"
    for strides in ([1, 2], [1, 1], [2, 1]):
        attrs = {"pads": [1, 0, 0, 1], "strides": strides}
        t = g.op("Relu", g.op("Conv", t, g.w(SIZE, SIZE, 3, 2), g.w(SIZE), **attrs))
    return g.model(t)


CASES: Mapping[str, Callable[[], Model]] = {
    "residual": residual,
    "residual bn": lambda: residual(bn=True),
    "residual dilated": lambda: residual(blocks=3, dilation=2),
    "gemm": gemms,
    "gemm transposed": lambda: gemms(rows=1),
    "gemm opset 10": lambda: gemms(rows=1, opset=10),
    "matmul": matmuls,
    "transposed": transposed,
    "one dimension": one_dimension,
    "uneven": uneven,
}
WINDOWS = ("residual", "residual bn", "residual dilated", "transposed", "uneven")
FLAT = ("gemm", "gemm transposed", "gemm opset 10", "matmul")
# A case and a form that its layers can take: flat layers have one arrangement, and kernels
# along one axis do not separate.
PAIRS = [
    (case, form)
    for case in CASES
    for form, kind in JOINT_FORMS.items()
    if kind.base == "output_basis"
    or case in WINDOWS
    or (case == "one dimension" and kind.base != "spatial")
]


@cache
def facts_of(case: str) -> Analysis:
    model = CASES[case]()
    return Analysis(model, sane_feeds(model, 4))


def whole_groups(facts: Analysis) -> dict[str, tuple[str, ...]]:
    """Names and members of the groups that are not halves of others."""
    groups = FactorizeJointly().groups(facts).values()
    return {g.name: g.members for g in groups if g.name == g.repetition}


def one_of_every_group(facts: Analysis, form: str) -> list[Option]:
    """An option of middle rank for every group that has one; groups do not overlap."""
    options = FactorizeJointly(step=1).propose(facts).options
    ranked = [
        [o for o in options if (o.target, o.form) == (name, form)]
        for name in whole_groups(facts)
    ]
    return [each[len(each) // 2] for each in ranked if each]


def members_of(
    facts: Analysis, option: Option, pass_: FactorizeJointly = ALL
) -> tuple[str, ...]:
    return pass_.groups(facts)[option.target].members


def solved(facts: Analysis, option: Option, pass_: FactorizeJointly = ALL) -> Joint:
    """Factors of the weights alone, after one round."""
    linears = [facts.linears[node] for node in members_of(facts, option, pass_)]
    weights = facts.model.weights
    members = [Member(to_plane(n.kernel(weights[n.weight]))) for n in linears]
    return pass_.fit(option, members, rounds=1)


def applied(
    facts: Analysis, joints: Mapping[Option, Joint], pass_: FactorizeJointly = ALL
) -> Model:
    arrays = {o: arrays_of(joint, members_of(facts, o, pass_)) for o, joint in joints.items()}
    draft = facts.model.edit()
    pass_.apply(draft, facts, arrays)
    return draft.seal(by="test")


def reconstructed(
    facts: Analysis, joints: Mapping[Option, Joint], pass_: FactorizeJointly = ALL
) -> Model:
    """The model with the dense kernels of joint factors as its weights."""
    draft = facts.model.edit()
    for option, joint in joints.items():
        for index, node in enumerate(members_of(facts, option, pass_)):
            linear = facts.linears[node]
            shape = (linear.out_channels, linear.in_channels, *linear.kernel_shape)
            draft.set_weight(linear.weight, linear.stored(joint.dense(index).reshape(shape)))
    return draft.seal(by="test")


def common_readers(model: Model) -> dict[str, int]:
    """Common initializers with the number of their readers."""
    return {n: len(model.readers[n]) for n in model.weights if n.endswith("_common")}


def feed_of(facts: Analysis) -> dict[str, Array]:
    """Four samples."""
    return next(facts.samples.batches(facts.model.signature.inputs, 4)).feed


@dataclass(frozen=True)
class Made:
    """A model with one option of every group applied, and what it was made from."""

    facts: Analysis
    joints: Mapping[Option, Joint]
    model: Model

    @classmethod
    def of(cls, facts: Analysis, form: str) -> "Made":
        joints = {option: solved(facts, option) for option in one_of_every_group(facts, form)}
        assert joints
        return cls(facts, joints, applied(facts, joints))

    @property
    def forms(self) -> dict[str, Option]:
        """The option of every node that has one."""
        return {n: o for o in self.joints for n in members_of(self.facts, o)}

    @property
    def feed(self) -> dict[str, Array]:
        return feed_of(self.facts)


@cache
def made(case: str, form: str) -> Made:
    return Made.of(facts_of(case), form)


def wrong_joint(joint: Joint) -> Joint:
    """The same with the private factors of the first two members swapped."""
    first, second, *rest = joint.private
    return Joint(joint.form, joint.shared, (second, first, *rest))


@cache
def real_facts(name: str) -> Analysis:
    """The working model of a real one."""
    path = SHARED / "models" / f"{name}.onnx"
    if not path.exists():
        pytest.skip("../shared is absent")
    model = working_model(prepare(Model.from_proto(onnx.load(path)))[0], None, seed=0)
    return Analysis(model, sane_feeds(model, 4))
