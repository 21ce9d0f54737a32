"""Top-1 against MACs on CIFAR-10, after training: ours, onnxsim's pruning, plain SVD.

Ours runs with all ranks and widths free, as the x axis is MACs.  onnxsim prunes uniformly at
several sparsities, with both of its rankings.  Plain SVD turns every convolution into a k x k
one to r channels and a 1 x 1 one, from the weights alone, r the same share of every rank.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import data
from benchmarks.common import (
    ChildError,
    Options,
    Outcome,
    SkippedError,
    Table,
    model_path,
    percent,
    run_child,
    shared_folder,
)

MODELS = ("akamaster_cifar10_resnet20", "akamaster_cifar10_resnet56")
SHARES = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5)
METHODS = {
    "ours": "onnxcomp",
    "svd": "plain SVD of each layer",
    "wanda": "onnxsim, activations",
    "l2": "onnxsim, weights",
}
STYLES = {"ours": ("C0", "o"), "svd": ("C1", "s"), "wanda": ("C2", "^"), "l2": ("C3", "v")}


def run(options: Options) -> Outcome:
    """Run the benchmark and draw `accuracy_curve.png` beside the results."""
    shared_folder()
    for package in ("onnxsim", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise SkippedError(f"{package} is absent: install it")
    models = MODELS[:1] if options.quick else MODELS
    rows = [row for model in models for row in _network(model, options)]
    options.out.mkdir(parents=True, exist_ok=True)
    draw(rows, options.out / "accuracy_curve.png")
    cells = [
        (
            _short(row["model"]),
            METHODS.get(row["method"], "original"),
            percent(row["share"]),
            percent(row["top1"], 2),
        )
        for row in rows
    ]
    failed = [
        f"{r['model']} {r['method']} {r['asked']}: {r['error']}" for r in rows if "error" in r
    ]
    return Outcome(
        rows, (Table("Top-1 by MACs", ("network", "method", "MACs", "top-1"), cells),), failed
    )


def _network(model: str, options: Options) -> list[dict[str, Any]]:
    folder = str(options.work)
    limit = 64 if options.quick else None
    run_child(
        "benchmarks.data:write", model=model, folder=folder, seed=options.seed, limit=limit
    )
    fit, new = (str(data.sample_file(folder, model, part)) for part in ("fit", "new"))
    shares = SHARES[::3] if options.quick else SHARES
    sparsities = SPARSITIES[::3] if options.quick else SPARSITIES
    asked = [(method, s) for method in ("ours", "svd") for s in shares]
    asked += [(method, s) for method in ("wanda", "l2") for s in sparsities]
    rows, made = [], []
    for method, amount in asked:
        out = str(options.work / f"{model}-{method}-{amount}.onnx")
        row: dict[str, Any] = {"model": model, "method": method, "asked": amount}
        try:
            _make(method, amount, model, fit, out, options)
            row["macs"] = run_child("benchmarks.cases:cost", file=out, data=new).value["macs"]
            made.append((row, out))
        except ChildError as error:
            row |= {"error": str(error), "share": None, "top1": None}
        rows.append(row)
    files = [out for _, out in made]
    judged = run_child("benchmarks.cases:judge", model=model, files=files, data=new).value
    whole = run_child("benchmarks.cases:cost", file=str(model_path(model)), data=new).value[
        "macs"
    ]
    for (row, _), seen in zip(made, judged[1:], strict=True):
        row |= {**seen, "share": row["macs"] / whole}
    original = {"model": model, "method": "original", "macs": whole, "share": 1.0, **judged[0]}
    return [original, *rows]


def _make(
    method: str, amount: float, model: str, fit: str, out: str, options: Options
) -> None:
    if method == "ours":
        run_child(
            "benchmarks.cases:compress",
            cores=options.threads,
            model=model,
            data=fit,
            out=out,
            macs=amount,
            grid="off",
            seed=options.seed,
            threads=options.threads,
        )
    elif method == "svd":
        run_child("benchmarks.accuracy_curve:plain_svd", model=model, out=out, share=amount)
    else:
        run_child(
            "benchmarks.peers:prune",
            model=model,
            data=fit,
            out=out,
            sparsity=amount,
            ranking=method,
        )


def plain_svd(*, model: str, out: str, share: float) -> float:
    """Factorise all convolutions at one share of their ranks; return that share."""
    import onnxcomp
    from onnxcomp.analysis import Analysis
    from onnxcomp.passes.base import Option
    from onnxcomp.passes.factorize import Factorize, chain

    original = onnxcomp.load(model_path(model))
    facts = Analysis(original)
    convolutions = [linear for linear in facts.linears.values() if linear.node.op == "Conv"]

    def choose(rank_share: float) -> tuple[dict[str, int], int]:
        """Return ranks by node where they save MACs, and the MACs of the whole model."""
        ranks, macs = {}, facts.cost.macs
        for linear in convolutions:
            full = min(linear.out_channels, linear.in_channels * linear.spatial)
            rank = max(round(rank_share * full), 1)
            shape = (linear.out_channels, linear.in_channels)
            saved = linear.convolution.macs - sum(
                step.macs for step in chain(linear, "output_basis", rank, *shape)
            )
            if saved > 0:
                ranks[linear.id], macs = rank, macs - saved
        return ranks, macs

    candidates = [step / 400 for step in range(400, 0, -1)]
    rank_share = next(s for s in candidates if choose(s)[1] <= share * facts.cost.macs)
    pass_, draft, chosen = Factorize(step=1), original.edit(), {}
    for node, rank in choose(rank_share)[0].items():
        linear = facts.linears[node]
        option = Option(pass_.name, node, "output_basis", (rank,))
        chosen[option], _ = pass_.fit(
            option, linear.kernel(original.weights[linear.weight]), None
        )
    pass_.apply(draft, facts, chosen)
    draft.seal(by=pass_.name).save(out)
    return rank_share


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw top-1 against MACs, one panel per network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = pyplot.subplots(
        1, len(models), figsize=(4.6 * len(models), 3.6), sharey=True, squeeze=False, dpi=160
    )
    for panel, model in zip(panels[0], models, strict=True):
        own = [row for row in rows if row["model"] == model and row["top1"] is not None]
        original = next(row for row in own if row["method"] == "original")
        panel.axhline(100 * original["top1"], color="0.6", linewidth=1, linestyle="--")
        panel.annotate(
            f"original {100 * original['top1']:.2f} %",
            (30, 100 * original["top1"] + 1.2),
            color="0.4",
            fontsize=8,
        )
        for method, label in METHODS.items():
            points = sorted((r["share"], r["top1"]) for r in own if r["method"] == method)
            colour, marker = STYLES[method]
            x, y = ([100 * value for value in axis] for axis in zip(*points, strict=True))
            panel.plot(x, y, color=colour, marker=marker, markersize=4, label=label)
        panel.set_title(_short(model).replace("resnet", "ResNet-"), fontsize=10)
        panel.set_xlabel("MACs, % of the original")
        panel.grid(color="0.92")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("CIFAR-10 top-1, %")
    panels[0, 0].set_ylim(0, 100)
    panels[0, -1].legend(frameon=False, fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _short(model: str) -> str:
    return model.removeprefix("akamaster_cifar10_")
