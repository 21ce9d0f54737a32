"""Common factors of repeated layers on ResNet-56: parameters against accuracy, no training.

Every form, with factors of its own for each layer or with common ones, is applied to all
repeated layers of the residual blocks at one share of its full ranks, chosen so that the whole
network has its parameters divided by a given factor.  Each is solved twice: from the weights
alone, and in the metric of 512 unlabelled training images with the walk's refits.  Then
`compress --max-size` is run with all methods and without the joint ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxcomp
from benchmarks import data
from benchmarks.cases import compress, file_of
from benchmarks.common import (
    ChildError,
    Job,
    Options,
    Outcome,
    Table,
    interval,
    percent,
    run_child,
    run_jobs,
    shared_folder,
)
from onnxcomp.analysis import Analysis
from onnxcomp.analysis.stream import Feeds
from onnxcomp.analysis.target import TARGETS
from onnxcomp.deadline import Deadline
from onnxcomp.numerics.joint_svd import JOINT_FORMS
from onnxcomp.numerics.svd import FORMS, tucker_ranks
from onnxcomp.passes.base import Option
from onnxcomp.passes.chains import kernel_shape4
from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.factorize_jointly import FactorizeJointly
from onnxcomp.passes.working import finish, prepare, working_model
from onnxcomp.search.losses import Losses
from onnxcomp.search.sharing import JointLosses, Sharing
from onnxcomp.search.space import Plan, Space
from onnxcomp.search.store import Store
from onnxcomp.search.walk import Walk

MODEL, QUICK_MODEL = "akamaster_cifar10_resnet56", "akamaster_cifar10_resnet20"
DETECTOR = "kazuhito00_yolox_nano"
OWN = ("spatial", "output_basis")
PAPER = {
    "spatial": "SVD",
    "spatial_first": "LJSVD",
    "spatial_last": "RJSVD",
    "spatial_both": "Bi-JSVD",
    "tucker2_outer": "common outer factors",
}
FACTORS = (1.5, 2.0, 3.0, 5.0)
SIZES = {MODEL: (0.25,), DETECTOR: (0.5,), QUICK_MODEL: (0.5,)}
IMAGES, QUICK_IMAGES = 512, 64
_BATCH = 32
_CURVE_BATCHES = 2
_SHARES = 400  # steps in which the share of the full ranks is chosen
_TIMEOUT_S = 3600.0


def run(options: Options) -> Outcome:
    """Run the benchmark."""
    shared_folder()
    model = QUICK_MODEL if options.quick else MODEL
    fit, new = str(options.work / "fit.npz"), str(options.work / "new.npz")
    count = QUICK_IMAGES if options.quick else IMAGES
    data.ensure_part(model, "fit", fit, count, options.seed)
    data.ensure_part(model, "new", new, 500 if options.quick else None, options.seed)
    forms = (*OWN, *JOINT_FORMS)[:: 4 if options.quick else 1]
    factors = FACTORS[1:2] if options.quick else FACTORS
    known = {"model": model, "data": fit, "seed": options.seed}
    probe = Job("benchmarks.joint:sensitivities", known)
    (probed,) = run_jobs([probe], workers=1, kept=options.work / "answers")
    if isinstance(probed, ChildError):
        raise probed
    jobs = [
        Job(
            "benchmarks.joint:solve",
            {
                **known,
                "form": form,
                "files": {f: _file(options.work, form, aware, f) for f in factors},
                "aware": aware,
                "weights": probed.value if aware else dict.fromkeys(probed.value, 1.0),
            },
            timeout_s=_TIMEOUT_S,
        )
        for aware in (True, False)
        for form in forms
    ]
    answers = run_jobs(jobs, workers=options.threads, kept=options.work / "answers")
    rows: list[dict[str, Any]] = []
    for job, answer in zip(jobs, answers, strict=True):
        head = {key: job.arguments[key] for key in ("form", "aware")}
        if isinstance(answer, ChildError):
            rows.append(head | {"error": str(answer)})
        else:
            rows += [head | row for row in answer.value]
    made = [row for row in rows if "file" in row]
    files = [row["file"] for row in made]
    judged = run_child("benchmarks.cases:judge", model=model, files=files, data=new).value
    for row, seen in zip(made, judged[1:], strict=True):
        row |= {"top1": seen["top1"], "relative_l2": seen["relative_l2"]}
    sizes = _sizes(options)
    top1 = judged[0]["top1"]
    return Outcome([*rows, *sizes], (_table(rows, top1, factors), _size_table(sizes)))


def _file(folder: Path, form: str, aware: bool, factor: float) -> str:
    return str(folder / f"{form}-{'data' if aware else 'weights'}-{factor:g}.onnx")


def sensitivities(*, model: str, data: str, seed: int) -> dict[str, float]:
    """Return the loss per squared error of every repeated layer; runs in a child."""
    space, feeds = _space(model, data, seed)
    sharing = Sharing(space, feeds, seed=seed, threads=1, progress=_silent)
    found = sharing.measure(_CURVE_BATCHES, Store(None), Deadline(None)).weights
    members = [node for group in space.joint_groups.values() for node in group.members]
    return {node: found.get(node, 1.0) for node in members}


def _space(model: str, data: str, seed: int) -> tuple[Space, list[Feeds]]:
    network = onnxcomp.load(file_of(model))
    inputs = network.signature.inputs
    samples = onnxcomp.load_samples(data, inputs)
    work = working_model(prepare(network)[0], samples, seed=seed)
    facts, target = Analysis(work, samples, seed=seed), TARGETS["x86-avx512"]
    pass_ = FactorizeJointly(("output_basis_last",), target=target, step=1, slower=True)
    feeds: list[Feeds] = [batch.feed for batch in samples.batches(inputs, _BATCH)]
    return Space(facts, [pass_.propose(facts)], target), feeds


def solve(
    *,
    model: str,
    data: str,
    form: str,
    files: dict[str, str],
    aware: bool,
    weights: dict[str, float],
    seed: int,
) -> list[dict[str, Any]]:
    """Write a model for every compression factor; runs in a child."""
    space, feeds = _space(model, data, seed)
    common: dict[str, Any] = {"seed": seed, "threads": 1, "progress": _silent}
    losses = Losses({}, {}, {}, joint=JointLosses({}, weights))
    rows = []
    for factor, file in files.items():
        share, plan = _at_factor(space, form, float(factor))
        walk = Walk(space, plan, losses, feeds, data_aware=aware, **common)
        made = finish(walk.run().model)
        made.save(file)
        row = {"factor": float(factor), "share": share, "file": file}
        row |= {"params": plan.cost.params, "macs": plan.cost.macs}
        rows.append(row | {"file_bytes": made.file_bytes, "loss": plan.loss})
    return rows


def _at_factor(space: Space, form: str, factor: float) -> tuple[float, Plan]:
    """Return the largest share of the full ranks that divides the parameters by a factor."""
    whole = space.facts.cost.params
    for step in range(_SHARES, 0, -1):
        plan = _plan(space, form, step / _SHARES)
        if plan.cost.params * factor <= whole:
            return step / _SHARES, plan
    raise ValueError(f"{form} cannot divide the parameters by {factor:g}")


def _plan(space: Space, form: str, share: float) -> Plan:
    """Return a plan that gives all layers of residual blocks the same share of full ranks."""
    facts, forms = space.facts, dict[str, Option]()
    own = (
        form
        if form in OWN
        else "output_basis"
        if form == "tucker2_outer"
        else JOINT_FORMS[form].base
    )
    paths = [node for block in facts.blocks for node in block.path]
    for node in dict.fromkeys(paths):
        linear = facts.linears[node]
        shape = kernel_shape4(linear, linear.out_channels, linear.in_channels)
        rank = max(round(share * FORMS[own].max_rank(shape)), 1)
        if rank < FORMS[own].max_rank(shape):
            forms[node] = Option(Factorize.name, node, own, (rank,))
    for group in space.joint_groups.values() if form in JOINT_FORMS else ():
        if group.name == group.repetition:
            linear = facts.linears[group.members[0]]
            shape = kernel_shape4(linear, linear.out_channels, linear.in_channels)
            most = JOINT_FORMS[form].max_rank(shape)
            rank = max(round(share * most), 2)
            sizes: tuple[int, ...] = (rank,)
            if JOINT_FORMS[form].shares == "both":
                sizes = (rank - rank // 2, rank // 2)
            elif JOINT_FORMS[form].shares == "outer":
                sizes = tucker_ranks(rank, shape[1], shape[0])
            option = Option(FactorizeJointly.name, group.name, form, sizes)
            forms |= dict.fromkeys(group.members, option)
    return Plan({}, forms, 0.0, space.cost({}, forms), space.seconds({}, forms))


def _sizes(options: Options) -> list[dict[str, Any]]:
    """Compress to sizes with all methods and without the joint ones."""
    models = (QUICK_MODEL,) if options.quick else (MODEL, DETECTOR)
    without = ["remove_channels", "factorize"]
    cases = [
        (model, size, methods)
        for model in models
        for size in SIZES[model]
        for methods in (without, [*without, FactorizeJointly.name])
    ]
    jobs, files = [], []
    for model, size, methods in cases:
        fit = str(data.sample_file(options.work, model, "fit"))
        count = QUICK_IMAGES if options.quick else IMAGES
        known = model in (MODEL, QUICK_MODEL)
        data.ensure_part(model, "fit", fit, count if known else None, options.seed)
        out = str(options.work / f"{model}-{size:g}-{len(methods)}.onnx")
        files.append(out)
        arguments = {"model": model, "data": fit, "out": out, "size": size, "methods": methods}
        jobs.append(Job("benchmarks.joint:to_size", arguments, timeout_s=_TIMEOUT_S))
    rows: list[dict[str, Any]] = []
    answers = run_jobs(jobs, workers=options.threads, kept=options.work / "sizes")
    for (model, size, methods), file, answer in zip(cases, files, answers, strict=True):
        row = {"model": model, "size": size, "joint": FactorizeJointly.name in methods}
        if isinstance(answer, ChildError):
            rows.append(row | {"error": str(answer)})
        else:
            rows.append(row | answer.value | {"result_file": file})
    for model in models:
        made = [row for row in rows if row["model"] == model and "result_file" in row]
        new = str(data.sample_file(options.work, model, "new"))
        data.ensure_part(model, "new", new, 500 if options.quick else None, options.seed)
        names = [row["result_file"] for row in made]
        seen = run_child("benchmarks.cases:judge", model=model, files=names, data=new).value
        timed = run_child(
            "benchmarks.cases:latency",
            models=[str(file_of(model)), *names],
            data=new,
            seconds=5.0 if options.quick else 60.0,
        ).value
        for row, judged, timing in zip(made, seen[1:], timed[1:-1], strict=True):
            top1 = judged["top1"]
            row["lost"] = None if top1 is None else seen[0]["top1"] - top1
            row |= {"relative_l2": judged["relative_l2"], "ratio": timing["ratio"]}
    return rows


def to_size(
    *, model: str, data: str, out: str, size: float, methods: Sequence[str]
) -> dict[str, Any]:
    """Compress to a size and say which forms were chosen; runs in a child."""
    found = compress(model=model, data=data, out=out, size=size, methods=tuple(methods))
    forms = ", ".join(f"{n} {kind}" for kind, n in sorted(found["kinds"].items()))
    share = found["result"]["file_bytes"] / found["original"]["file_bytes"]
    return found | {"file_share": share, "forms": forms}


def _table(rows: Sequence[dict[str, Any]], top1: float, factors: Sequence[float]) -> Table:
    heads = [f"{factor:g}x {kind}" for factor in factors for kind in ("weights", "data")]
    lines = []
    for form in dict.fromkeys(row["form"] for row in rows):
        cells = [form, PAPER.get(form, "")]
        for factor in factors:
            for aware in (False, True):
                found = [
                    r
                    for r in rows
                    if (r["form"], r["aware"], r.get("factor")) == (form, aware, factor)
                ]
                cells.append(percent(found[0]["top1"]) if found else "-")
        lines.append(tuple(cells))
    title = f"Top-1 by parameters divided by; the original has {percent(top1)}"
    return Table(title, ("form", "paper", *heads), lines)


def _size_table(rows: Sequence[dict[str, Any]]) -> Table:
    lines = [
        (
            row["model"],
            percent(row["size"], 0),
            "yes" if row["joint"] else "no",
            row.get("error", "") or percent(row["file_share"]),
            "-" if row.get("lost") is None else f"{100 * row['lost']:.2f}",
            f"{row['relative_l2']:.3f}" if "relative_l2" in row else "-",
            interval(row.get("ratio")),
            row.get("forms", ""),
        )
        for row in rows
    ]
    heads = ("model", "limit", "joint", "file", "points lost", "drift", "speedup", "forms")
    return Table("`--max-size` with and without common factors", heads, lines)


def _silent(label: str, share: float) -> None:
    pass
