"""What the gates count is what replacing every 3 x 3 convolution but the first saves."""

from functools import cache

import pytest

pytest.importorskip("torch", reason="the bridge needs PyTorch")

import torch

import onnxcomp
from models.builders import export
from onnxcomp.analysis import Analysis
from onnxcomp.analysis.probe import random_inputs
from onnxcomp.analysis.target import TARGETS
from onnxcomp.bridge.branches import Branch, find_branches
from onnxcomp.bridge.selection import Choice, Supernet
from onnxcomp.passes.operator_plan import working_graph
from onnxcomp.passes.substitute_operators import SubstituteOperators
from tests.passes.test_substitute_envelope import ROWS

HEAVY = "resnet110a_cifar10"
COSTS = ("params", "macs")
NETWORKS = [n if n != HEAVY else pytest.param(n, marks=pytest.mark.heavy) for n in ROWS]


@pytest.fixture(scope="module")
def branches(tmp_path_factory):
    """By name, made when they are asked for: the analysis, and the branches by node."""

    @cache
    def make(name: str) -> tuple[Analysis, dict[str, list[Branch]]]:
        path = tmp_path_factory.mktemp(name) / "model.onnx"
        export(name, path, folded=True)
        model = onnxcomp.load(path)
        samples = random_inputs(model, 2, seed=0)
        facts = Analysis(working_graph(model), samples)
        forms = tuple(dict.fromkeys(form for form, *_ in ROWS[name]))
        target = TARGETS["x86-avx512"]
        found = find_branches(facts, samples, [SubstituteOperators(forms, step=1)], target)
        return facts, found

    return make


def saved(made: tuple[Analysis, dict[str, list[Branch]]], cost: str, *row: object) -> float:
    """Change in per cent where the cheapest operator is open everywhere but in the first.

    Each convolution chooses between itself and what the row names, where that is legal.
    """
    facts, found = made
    stem, choices = next(iter(facts.linears)), {}
    for node, branches in found.items():
        kinds = [(b.option.form, *b.option.size) if b.option else None for b in branches]
        both = [b for b, kind in zip(branches, kinds, strict=True) if kind in (None, row)]
        choices[node] = Choice(both if node != stem else branches[:1], cost, "identity")
        with torch.no_grad():
            choices[node].alpha.fill_(0.0)  # the first of equal entries is open
    return -100 * Supernet(facts.model, choices).saved().item()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_cheapest_operator_everywhere(name, branches):
    """To a whole per cent, as the table has it."""
    for row, wanted in ROWS[name].items():
        found = [saved(branches(name), cost, *row) for cost in COSTS]
        assert found == pytest.approx(wanted, abs=0.55), row


def test_the_table_bites(branches):
    name = "resnet20a_cifar10"
    wrong = saved(branches(name), "macs", "separable", 2)
    assert wrong != pytest.approx(ROWS[name]["separable", 1][1], abs=0.55)
