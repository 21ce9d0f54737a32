"""The phases of `compress` one by one, on small models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from onnxcomp.analysis import Analysis
from onnxcomp.analysis.cost import Cost
from onnxcomp.analysis.target import TARGETS
from onnxcomp.model import Array, Model
from onnxcomp.passes.base import Option, Pass
from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.remove_channels import RemoveChannels
from onnxcomp.passes.working import prepare, working_model
from onnxcomp.runtime import Session
from onnxcomp.samples import Samples
from onnxcomp.search.loss_meter import LossMeter
from onnxcomp.search.losses import Losses
from onnxcomp.search.outputs import OutputMeter
from onnxcomp.search.space import Plan, Space, fits
from onnxcomp.search.walk import Walk
from tests.graphs import sane_feeds
from tests.search.cases import CASES

SEED = 0
COMMON = {"seed": SEED, "threads": 1, "progress": lambda *_: None}


@dataclass
class Lab:
    """A working model with its search space and fitting batches.

    Attributes:
        space: Widths that are multiples of `step`, and forms at such ranks.
        batches: Feeds.
    """

    space: Space
    batches: list[dict[str, Array]]

    @classmethod
    def of(
        cls,
        model: Model,
        *,
        count: int = 24,
        size: int = 8,
        step: int = 2,
        kinds: Sequence[type[Pass]] = (RemoveChannels, Factorize),
        samples: Samples | None = None,
        **options: object,
    ) -> "Lab":
        samples = samples or sane_feeds(model, count)
        work = working_model(prepare(model)[0], samples, seed=SEED)
        facts = Analysis(work, samples, seed=SEED)
        target = TARGETS["x86-avx512"]
        proposals = [kind(target=target, step=step).propose(facts) for kind in kinds]
        space = Space(facts, proposals, target, **options)
        batches = [b.feed for b in samples.batches(model.signature.inputs, size)]
        return cls(space, batches)

    @property
    def model(self) -> Model:
        return self.space.facts.model

    def meter(self, **options: object) -> LossMeter:
        return LossMeter(
            self.space,
            self.batches,
            **{**COMMON, "measured": len(self.batches), **options},
        )

    def losses(self) -> Losses:
        return self.meter().run()

    def error(self, weights: Mapping[str, Array]) -> float:
        """Error of the raw outputs with some weights of the working model replaced."""
        tensors = self.space.facts.tensors
        return OutputMeter(self.model, tensors, self.batches, threads=1).of(weights)

    def plan(self, losses: Losses, rng: np.random.Generator) -> Plan:
        """A random plan over all groups and nodes."""
        widths, forms = {}, {}
        for name in losses.orders:
            if rng.random() < 0.7:
                widths[name] = int(rng.choice(self.space.widths[name]))
        for node, linear in self.space.facts.linears.items():
            c = self.space.input_side(linear).width(widths)
            m = self.space.output_side(linear).width(widths)
            options = [o for o in losses.forms if o.target == node and fits(linear, o, m, c)]
            if options and rng.random() < 0.6:
                forms[node] = options[rng.integers(len(options))]
        return self.lone_plan(widths, forms)

    def lone_plan(
        self, widths: Mapping[str, int], forms: Mapping[str, Option] | None = None
    ) -> Plan:
        forms = forms or {}
        cost, seconds = self.space.cost(widths, forms), self.space.seconds(widths, forms)
        return Plan(widths, forms, 0.0, cost, seconds)

    def walk(self, plan: Plan, losses: Losses, **options: object) -> Walk:
        return Walk(self.space, plan, losses, self.batches, **{**COMMON, **options})

    def outputs(self, model: Model) -> dict[str, Array]:
        """All outputs on all batches, unoptimised."""
        session = Session(model, optimize=False)
        runs = [session.run(feed) for feed in self.batches]
        return {name: np.concatenate([np.ravel(r[name]) for r in runs]) for name in runs[0]}


@cache
def known(name: str) -> tuple[Lab, Losses]:
    """The lab of a case at multiples of 4, with its losses; measured once for all tests."""
    lab = Lab.of(CASES[name](), step=4)
    return lab, lab.losses()


def measured_cost(model: Model, lab: Lab) -> Cost:
    return Analysis(model, lab.space.facts.samples, seed=SEED).cost


def distance(found: dict[str, Array], wanted: dict[str, Array]) -> float:
    """Largest relative L2 distance of any output."""
    assert found.keys() == wanted.keys()
    worst = 0.0
    for name, array in wanted.items():
        gap = np.linalg.norm(found[name].astype(np.float64) - array.astype(np.float64))
        worst = max(worst, float(gap / max(np.linalg.norm(array.astype(np.float64)), 1e-30)))
    return worst
