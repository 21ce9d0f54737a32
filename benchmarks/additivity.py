"""Whether measured losses add up: predicted against measured output error of random plans.

One table of losses is measured on ResNet-56 with all ranks and widths free.  For every plan
the losses are disturbed by lognormal factors and the allocator chooses at a random limit on
MACs: that gives plans which a search might have made, spread over layers and forms.  The
undisturbed table then predicts their error, the walk makes their models, and the error is
measured on training images that nothing was fitted on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

import onnxcomp
from benchmarks import data, figures
from benchmarks.baselines import whole_space
from benchmarks.cases import file_of
from benchmarks.common import (
    Job,
    Options,
    Outcome,
    Table,
    percent,
    run_jobs,
    shared_folder,
)
from onnxcomp.analysis import Analysis
from onnxcomp.analysis.outputs import raw_outputs
from onnxcomp.model import Model, extract
from onnxcomp.passes.working import prepare, working_model
from onnxcomp.runtime import Session
from onnxcomp.search.allocation import Allocator
from onnxcomp.search.loss_meter import LossMeter
from onnxcomp.search.losses import Losses
from onnxcomp.search.outputs import OutputError
from onnxcomp.search.settings import Limits
from onnxcomp.search.space import Plan, Space
from onnxcomp.search.walk import Walk

MODEL, QUICK_MODEL = "akamaster_cifar10_resnet56", "akamaster_cifar10_resnet20"
PLANS, QUICK_PLANS = 50, 3
IMAGES, QUICK_IMAGES = 512, 64  # to fit on, and as many others to measure on
SHARES = (0.4, 0.8)  # of the MACs, between which the limits lie
GOAL_RANK, GOAL_RATIO = 0.9, 2.0
_SPREAD = 1.0  # standard deviation of the logarithm of the disturbing factors
_SOLVER_SECONDS = 20.0  # for each programme of a plan, which need not be the best
_MEASURED_SAMPLES = 128
_BATCH = 32


def run(options: Options) -> Outcome:
    """Run the benchmark and draw `additivity.png` beside the results."""
    shared_folder()
    figures.require_matplotlib()
    model = QUICK_MODEL if options.quick else MODEL
    images = QUICK_IMAGES if options.quick else IMAGES
    count = QUICK_PLANS if options.quick else PLANS
    file = options.work / f"{model}-{images}.npz"
    data.ensure_part(model, "fit", file, 2 * images, options.seed)
    jobs = [
        Job(
            "benchmarks.additivity:measure",
            {
                "model": model,
                "data": str(file),
                "plans": list(range(first, count, options.threads)),
                "seed": options.seed,
            },
        )
        for first in range(options.threads)
    ]
    rows: list[dict[str, Any]] = []
    for answer in run_jobs(jobs, workers=options.threads, kept=options.work / "answers"):
        if isinstance(answer, Exception):
            raise answer
        rows += answer.value
    rows.sort(key=lambda row: row["plan"])
    _draw(rows, options.out / "additivity.png")
    return Outcome(rows, (_table(rows),), _notes(rows, model, images))


def measure(*, model: str, data: str, plans: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """Predict and measure the error of random plans; runs in a child.

    Args:
        model: Its name, or a file.
        data: Samples, an `.npz` file: half to fit on, half to measure on.
        plans: Numbers of the plans; a plan depends on its number and the seed alone.
        seed: Seed of all draws.
    """
    network = onnxcomp.load(file_of(model))
    inputs = network.signature.inputs
    samples = onnxcomp.load_samples(data, inputs)
    order = np.random.default_rng(seed).permutation(samples.count)
    fitted, held = np.array_split(order, 2)
    fit, others = samples.take(np.sort(fitted)), samples.take(np.sort(held))
    facts = Analysis(working_model(prepare(network)[0], fit, seed=seed), fit, seed=seed)
    space = whole_space(facts)
    feeds = [batch.feed for batch in fit.batches(inputs, _BATCH)]
    common: dict[str, Any] = {"seed": seed, "threads": 1, "progress": _silent}
    measured = -(-min(_MEASURED_SAMPLES, fit.count) // _BATCH)
    losses = LossMeter(space, feeds, measured=measured, **common).run()
    error = _Error(facts, others)
    rows = []
    for number in plans:
        rng = np.random.default_rng([seed, number])
        limit = rng.uniform(*SHARES)
        disturbed = Allocator(space, _disturbed(losses, rng), time_limit_s=_SOLVER_SECONDS)
        # every second plan leaves the residual trunks whole
        plan = disturbed.choose(Limits(macs=limit * facts.cost.macs), rough=number % 2 == 0)
        made = Walk(space, plan, losses, feeds, **common).run().model
        rows.append(
            {
                "plan": number,
                "macs": plan.cost.macs / facts.cost.macs,
                "widths": len(plan.widths),
                "forms": len(plan.forms),
                "predicted": predicted_loss(space, losses, plan),
                "measured": error.of(made),
            }
        )
    return rows


def predicted_loss(space: Space, losses: Losses, plan: Plan) -> float:
    """Return what a table of losses says of a plan, as the allocator adds it up."""
    total = sum(losses.widths[name][width] for name, width in plan.widths.items())
    for node, option in plan.forms.items():
        linear = space.facts.linears[node]
        inputs = space.input_side(linear).width(plan.widths) / linear.in_channels
        outputs = space.output_side(linear).width(plan.widths) / linear.out_channels
        total += losses.forms[option] * inputs * outputs
    return float(total)


def _disturbed(losses: Losses, rng: np.random.Generator) -> Losses:
    """Return losses times lognormal factors, one per form of a node and one per group."""
    sites = dict.fromkeys((option.target, option.form) for option in losses.forms)
    factors = {site: rng.lognormal(0.0, _SPREAD) for site in (*sites, *losses.widths)}
    forms = {o: lost * factors[o.target, o.form] for o, lost in losses.forms.items()}
    widths = {
        name: {width: lost * factors[name] for width, lost in each.items()}
        for name, each in losses.widths.items()
    }
    return Losses(forms, widths, losses.orders, losses.refusals)


class _Error:
    """The error of raw outputs on samples, relative to the original's variance."""

    def __init__(self, facts: Analysis, samples: onnxcomp.Samples) -> None:
        inputs = facts.model.signature.inputs
        self._feeds = [batch.feed for batch in samples.batches(inputs, _BATCH)]
        self._names = raw_outputs(facts.model, facts.tensors)
        self._reference = OutputError(self._outputs(facts.model))

    def of(self, model: Model) -> float:
        """Return the error of a model."""
        return self._reference.of(self._outputs(model))

    def _outputs(self, model: Model) -> list[dict[str, Any]]:
        session = Session(extract(model, (), self._names))
        return [
            session.run({name: feed[name] for name in session.input_names})
            for feed in self._feeds
        ]


def _draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figures.scatter(
        [row["predicted"] for row in rows],
        [row["measured"] for row in rows],
        path,
        labels=("predicted output error", "measured output error"),
        factor=GOAL_RATIO,
    )


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    cells = [
        (
            str(row["plan"]),
            percent(row["macs"]),
            str(row["widths"]),
            str(row["forms"]),
            f"{row['predicted']:.4f}",
            f"{row['measured']:.4f}",
            f"{row['predicted'] / row['measured']:.2f}",
        )
        for row in rows
    ]
    columns = ("plan", "MACs", "widths", "forms", "predicted", "measured", "ratio")
    return Table("Output error relative to the outputs' variance", columns, cells)


def _notes(rows: Sequence[dict[str, Any]], model: str, images: int) -> list[str]:
    predicted, measured = ([row[k] for row in rows] for k in ("predicted", "measured"))
    rank = float(spearmanr(predicted, measured).statistic)
    ratios = np.divide(predicted, measured)
    inside = int(np.sum((ratios >= 1 / GOAL_RATIO) & (ratios <= GOAL_RATIO)))
    return [
        f"{model}, {images} training images to fit on, {images} others to measure on",
        f"Spearman {rank:.3f} (goal {GOAL_RANK}: {'met' if rank >= GOAL_RANK else 'missed'})",
        f"predicted over measured: {ratios.min():.2f} to {ratios.max():.2f}, median "
        f"{np.median(ratios):.2f}; within {1 / GOAL_RATIO:g} to {GOAL_RATIO:g} (the goal): "
        f"{inside} of {len(rows)}",
    ]


def _silent(label: str, share: float) -> None:
    """Report no progress."""
