"""The bias of the Neumann hypergradient against its number of terms, beside the bound, and the random form's spread.

    python examples/benchmarks/neumann_bias.py [--data DIR] [--results DIR]

Regularisation selection (logistic, a penalty per feature) in float64 at y = y*(x), with scale 1/L, where mu and L are
the extreme eigenvalues of the lower Hessian. The sum of N terms leaves (I - H/L)^N of the inverse, so its error falls
by 1 - mu/L a term at least: exponential decay, as Fan et al. (2023) state below their eq. (17). The random form has
that mean, and a spread that grows with N.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib import pyplot
from torch import Tensor

import data
from adaptive_bilevel.hypergradient import CG, Neumann, implicit
from report import write
from runs import provenance
from tasks import regularisation
from tasks.base import minimizer

TERMS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
DRAWS = 50


def prepared(folder: str | None, penalty: float) -> regularisation.Regularisation:
    """The task in float64, with all penalties exp(`penalty`) and the lower problem solved."""
    task = regularisation.create(0, folder)
    for part in ("train", "validation"):
        setattr(task, part, tuple(tensor.double() for tensor in getattr(task, part)))
    task.upper = [torch.full_like(task.upper[0], penalty, dtype=torch.float64).requires_grad_()]
    solution = minimizer(lambda z: task.penalised(task.train, task.upper[0].detach(), z), task.lower[0], 5000)
    task.lower = [solution.requires_grad_()]
    return task


def hypergradient(task: regularisation.Regularisation, solver: CG | Neumann) -> Tensor:
    upper, lower = (lambda: task.upper_loss(task.validation)), (lambda: task.lower_loss(task.train))
    return implicit(upper, lower, task.upper, task.lower, solver=solver)[0]


def eigenvalues(task: regularisation.Regularisation) -> Tensor:
    """Those of the lower Hessian."""
    flat = task.lower[0].detach()[:, 0]
    hessian = torch.func.hessian(lambda y: task.penalised(task.train, task.upper[0].detach(), y[:, None]))(flat)
    return torch.linalg.eigvalsh(hessian)


def measure(folder: str | None, penalty: float) -> list[dict[str, float]]:
    task = prepared(folder, penalty)
    spectrum = eigenvalues(task)
    mu, scale = float(spectrum[0]), 1 / float(spectrum[-1])
    exact = hypergradient(task, CG(max_iterations=10_000, tolerance=1e-13))
    rows = []
    for terms in TERMS:
        error = hypergradient(task, Neumann(steps=terms - 1, scale=scale)) - exact
        row = {"penalty": penalty, "terms": terms, "error": float(error.norm() / exact.norm()),
               "bound": (1 - mu * scale) ** terms}  # fmt: skip
        if terms <= 200:
            generator = torch.Generator().manual_seed(0)
            drawn = [
                hypergradient(task, Neumann(steps=terms, scale=scale, random=True, generator=generator)) - exact
                for _ in range(DRAWS)
            ]
            row["random, one draw"] = math.sqrt(sum(float(d.square().sum()) for d in drawn) / DRAWS) / float(
                exact.norm()
            )
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the data sets (else the environment's, else a stand-in)")
    parser.add_argument("--results", type=Path, default=Path("benchmark-runs"), help="folder of the figure")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = data.folder(options.data)
    given = None if folder is None else str(folder)
    rows, canvas, axes = [], *pyplot.subplots(1, 2, figsize=(9, 3.6))
    for place, penalty in zip(axes, (-2.0, -5.0), strict=True):
        found = measure(given, penalty)
        rows += found
        for key, style in (("error", "o-"), ("bound", "k--"), ("random, one draw", "x:")):
            points = [(row["terms"], max(row[key], 1e-16)) for row in found if key in row]
            place.plot(*zip(*points, strict=True), style, label=key)
        place.set(xscale="log", yscale="log", ylim=(1e-15, 1e2), xlabel="terms N",
                  title=f"all penalties exp({penalty:g})", ylabel="relative error of the hypergradient")  # fmt: skip
        place.grid(alpha=0.25)
        place.legend(fontsize=8)
    canvas.tight_layout()
    options.results.mkdir(parents=True, exist_ok=True)
    canvas.savefig(options.results / "neumann_bias.png", dpi=85)
    pyplot.close(canvas)
    command = "python examples/benchmarks/neumann_bias.py --data DIR --results RESULTS"
    source = "real" if folder else "stand-in"
    write(options.results / "neumann_bias.json", {"command": command, "data": source, **provenance(), "rows": rows})
    for row in rows:
        print("  ".join(f"{key} {value:.3g}" for key, value in row.items()))


if __name__ == "__main__":
    main()
