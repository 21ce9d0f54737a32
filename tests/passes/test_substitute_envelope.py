"""What replacing every 3 x 3 convolution but the first saves, for the networks of the spec."""

from functools import cache

import pytest

pytest.importorskip("torch", reason="the builders need PyTorch")

import onnxcomp
from models.builders import export
from onnxcomp.analysis import Analysis
from onnxcomp.analysis.linear import Linear
from onnxcomp.passes.base import Option
from onnxcomp.passes.substitute_operators import SubstituteOperators, chain

# Change of parameters and MACs in per cent, of convolutions and Gemm; spec/operator-
# substitution.md section 1.
ROWS = {
    "resnet20a_cifar10": {
        ("grouped", 2): (-50, -50),
        ("grouped", 4): (-75, -74),
        ("grouped", 8): (-87, -87),
        ("pointwise", 1): (-88, -88),
        ("separable", 1): (-86, -84),
        ("separable_twice",): (-74, -70),
        ("skip",): (-91, -93),
    },
    "resnet56a_cifar10": {
        ("grouped", 2): (-50, -50),
        ("grouped", 4): (-75, -75),
        ("grouped", 8): (-87, -87),
        ("pointwise", 1): (-89, -89),
        ("separable", 1): (-87, -85),
        ("separable_twice",): (-74, -70),
        ("skip",): (-97, -98),
    },
    "resnet110a_cifar10": {
        ("grouped", 2): (-50, -50),
        ("grouped", 4): (-75, -75),
        ("grouped", 8): (-87, -87),
        ("pointwise", 1): (-89, -89),
        ("separable", 1): (-87, -85),
        ("separable_twice",): (-74, -70),
        ("skip",): (-99, -99),
    },
}
WHOLE = {  # millions
    "resnet20a_cifar10": (0.268, 40.6),
    "resnet56a_cifar10": (0.849, 125.5),
    "resnet110a_cifar10": (1.720, 252.9),
}
CASES = [(name, *row) for name, rows in ROWS.items() for row in rows.items()]


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """By name, made when it is asked for."""

    @cache
    def make(name: str) -> Analysis:
        path = tmp_path_factory.mktemp(name) / "model.onnx"
        export(name, path, folded=True)
        return Analysis(onnxcomp.load(path))

    return make


def saved(facts: Analysis, form: str, size: tuple[int, ...]) -> tuple[float, float]:
    """Change of parameters and MACs in per cent, where the form is legal."""
    pass_ = SubstituteOperators((form,), step=1)
    legal = {(o.target, o.size): o for o in pass_.propose(facts).options}
    stem, *_ = facts.linears
    before, after = [0, 0], [0, 0]
    for linear in facts.linears.values():
        whole = [linear.convolution]
        option = legal.get((linear.id, size))
        steps = whole if option is None or linear.id == stem else made(linear, option)
        for total, convolutions in ((before, whole), (after, steps)):
            total[0] += sum(c.weights for c in convolutions)
            total[1] += sum(c.macs for c in convolutions)
    return tuple(100 * (a / b - 1) for a, b in zip(after, before, strict=True))


def made(linear: Linear, option: Option) -> list:
    return chain(linear, option, linear.out_channels, linear.in_channels)


@pytest.mark.parametrize(("name", "row", "wanted"), CASES)
def test_envelope(name, row, wanted, facts):
    """To a whole per cent, as the table has it."""
    form, *size = row
    assert saved(facts(name), form, tuple(size)) == pytest.approx(wanted, abs=0.55)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_networks(name, facts):
    convolutions = [linear.convolution for linear in facts(name).linears.values()]
    found = [sum(c.weights for c in convolutions), sum(c.macs for c in convolutions)]
    assert [n / 1e6 for n in found] == pytest.approx(WHOLE[name], rel=2e-3)


def test_the_table_bites(facts):
    wrong = saved(facts("resnet20a_cifar10"), "separable", (2,))
    assert wrong != pytest.approx(ROWS["resnet20a_cifar10"]["separable", 1], abs=0.55)
