"""A regularizer per feature for ridge or logistic regression: TorchOpt's implicit differentiation, no learning rate.

    python examples/torchopt_hpo.py                  # a table: learning rates over decades, and none
    python examples/torchopt_hpo.py --loss logistic --figure out.png

y are the weights of a regression on training data, x the logarithms of its regularizers, one for each feature:

    lower   min_y  mean l(X y, t)  +  sum_j exp(x_j) y_j^2 / 2
    upper   min_x  mean l(X' y, t')   on validation data

with l(z, t) = (z - t)^2 / 2, or the cross-entropy of sigmoid(z). y*(x) is known, in closed form (ridge) or by Newton's
method (logistic), so the table shows how far F(x) = f(x, y*(x)) is from its minimum. What changes in TorchOpt code (see
`Regression` and `train`, which do both):

     def __init__(self, x, ...):
    +    self.lower = LowerStep(self, AutoSLS)

     def solve(self):
         params = tuple(self.parameters())
    -    optimizer = torchopt.SGD(params, lr=0.1)
    +    step = self.lower.attach()
         for _ in range(T):
    -        loss = self.objective()
    -        optimizer.zero_grad(); loss.backward(inputs=params); optimizer.step()
    +        step(lambda: self.objective())

    -meta = torchopt.Adam([x], lr=1e-3)
    +meta = UpperStep([x], lower=inner.lower, direction="adam")
     inner.solve()
    -loss = inner.validation_loss()
    -meta.zero_grad(); loss.backward(); meta.step()
    +meta.step(lambda: inner.validation_loss())
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchopt
from torch import Tensor

from adaptive_bilevel import AutoSLS
from adaptive_bilevel_torchopt import LowerStep, UpperStep

warnings.filterwarnings("ignore", message=".*functorch.*", category=FutureWarning)  # TorchOpt's, at every call

FEATURES, SAMPLES = 8, 60
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    # name: l(z, t), and the prediction m(z); dl/dz = m(z) - t
    "ridge": (lambda z, t: (z - t).square().mean() / 2, lambda z: z),
    "logistic": (torch.nn.functional.binary_cross_entropy_with_logits, torch.sigmoid),
}
LOWER_STEPS, ITERATIONS = 10, 60
LOWER_LR = 0.1  # of the fixed loop
FIRST_TRIALS = (None, 1.0, 1e1, 1e2, 1e3, 1e4)
FIXED = {"SGD": (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3), "Adam": (1e-3, 1e-2, 1e-1, 1.0, 1e1)}


@dataclass(frozen=True)
class Data:
    """Training and validation data; half of the true weights are zero."""

    X: Tensor
    t: Tensor
    X_val: Tensor
    t_val: Tensor
    kind: str

    @classmethod
    def draw(cls, kind: str, seed: int = 0) -> Data:
        rng = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
        weights = normal(FEATURES)
        weights[FEATURES // 2 :] = 0.0
        X = normal(SAMPLES, FEATURES)
        t = X @ weights + normal(SAMPLES)
        X_val = normal(SAMPLES, FEATURES)
        t_val = X_val @ weights + normal(SAMPLES)
        if kind == "logistic":
            t, t_val = (t > 0).double(), (t_val > 0).double()
        return cls(X, t, X_val, t_val, kind)

    def loss(self, X: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return LOSSES[self.kind][0](X @ y, t)

    def upper_loss(self, y: Tensor) -> Tensor:
        return self.loss(self.X_val, self.t_val, y)

    def lower_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.X, self.t, y) + (x.exp() * y.square()).sum() / 2

    def hessian(self, x: Tensor, y: Tensor) -> Tensor:
        """That of the lower loss in y."""
        m = LOSSES[self.kind][1](self.X @ y)
        variance = m * (1 - m) if self.kind == "logistic" else torch.ones_like(m)
        return self.X.T @ (variance[:, None] * self.X) / SAMPLES + torch.diag(x.exp())

    def solution(self, x: Tensor) -> Tensor:
        """y*(x), by Newton's method to machine precision; for ridge, its first step is exact."""
        y = torch.zeros(FEATURES, dtype=torch.float64)
        for _ in range(50):
            residual = LOSSES[self.kind][1](self.X @ y) - self.t
            gradient = self.X.T @ residual / SAMPLES + x.exp() * y
            step = torch.linalg.solve(self.hessian(x, y), gradient)
            y = y - step
            if not step.norm() > 1e-14 * y.norm():
                break
        return y

    def hypergradient(self, x: Tensor) -> Tensor:
        """dF/dx = -exp(x) y* v with the lower Hessian H v = f_y, in closed form at y*(x)."""
        y = self.solution(x)
        residual = LOSSES[self.kind][1](self.X_val @ y) - self.t_val
        return -x.exp() * y * torch.linalg.solve(self.hessian(x, y), self.X_val.T @ residual / SAMPLES)

    def F(self, x: Tensor) -> float:
        return float(self.upper_loss(self.solution(x.detach())))

    def minimum(self) -> float:
        """The minimum of F, by a quasi-Newton method on the closed form."""
        x = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([x], max_iter=2000, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def closure() -> float:
            x.grad = self.hypergradient(x.detach())
            return self.F(x)

        optimizer.step(closure)
        return self.F(x)


class Regression(torchopt.nn.ImplicitMetaGradientModule, linear_solve=torchopt.linear_solve.solve_cg()):
    """The lower problem: TorchOpt's own loop with a fixed step, or ours."""

    def __init__(self, x: Tensor, data: Data, automatic: bool) -> None:
        super().__init__()
        self.x, self.data = x, data
        self.y = torch.nn.Parameter(torch.zeros(FEATURES, dtype=torch.float64))
        self.lower = LowerStep(self, AutoSLS) if automatic else None

    def objective(self) -> Tensor:
        return self.data.lower_loss(self.x, self.y)

    def validation_loss(self) -> Tensor:
        return self.data.upper_loss(self.y)

    def solve(self) -> None:
        if self.lower is not None:
            step = self.lower.attach()
            for _ in range(LOWER_STEPS):
                step(lambda: self.objective())
            return
        params = tuple(self.parameters())
        for p in params:
            p.detach_().requires_grad_()  # a warm start: the parameters are attached to the graph of the last solve
        optimizer = torchopt.SGD(params, lr=LOWER_LR)
        with torch.enable_grad():
            for _ in range(LOWER_STEPS):
                loss = self.objective()
                optimizer.zero_grad()
                loss.backward(inputs=params)
                optimizer.step()


@dataclass
class History:
    """What one run did: F - F* after each iteration, steps, and searches that failed."""

    name: str
    gaps: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    failed: int = 0

    @property
    def final(self) -> float:
        return self.gaps[-1]


def train(data: Data, minimum: float, name: str, make: Callable[[Any, Tensor], Any], iterations: int) -> History:
    """One run; `make` gives the upper optimizer for a module."""
    x = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
    history = History(name, [data.F(x) - minimum])
    automatic = name.startswith("BiSLS")
    inner = Regression(x, data, automatic)
    meta = make(inner, x)
    for _ in range(iterations):
        inner.solve()
        if automatic:
            meta.step(lambda: inner.validation_loss())
            history.steps.append(float(meta.record.step_size))
            history.failed += meta.record.outcome.name == "search_failed"
        else:
            loss = inner.validation_loss()
            meta.zero_grad()
            loss.backward()
            meta.step()
        gap = data.F(x) - minimum if bool(x.isfinite().all()) else math.nan
        history.gaps.append(gap)
        if not math.isfinite(gap):
            break
    return history


def run(kind: str, seed: int = 0, iterations: int = ITERATIONS) -> list[History]:
    """All runs on one data set."""
    data = Data.draw(kind, seed)
    minimum = data.minimum()
    histories = []
    for direction in ("sgd", "adam"):
        for lr in FIRST_TRIALS:
            make = lambda inner, x, lr=lr: UpperStep([x], lr=lr, lower=inner.lower, direction=direction)  # noqa: E731
            name = f"BiSLS-{'Adam' if direction == 'adam' else 'SGD'} {'none' if lr is None else f'{lr:g}'}"
            histories.append(train(data, minimum, name, make, iterations))
    for name, rates in FIXED.items():
        for lr in rates:
            make = lambda inner, x, lr=lr: getattr(torchopt, name)([x], lr=lr)  # noqa: E731
            histories.append(train(data, minimum, f"{name} {lr:g}", make, iterations))
    return histories


def table(histories: list[History]) -> str:
    lines = [
        f"F - F* at the start: {histories[0].gaps[0]:.3f}",
        "",
        f"{'method':<20}{'F - F*':>10}{'failed searches':>18}",
    ]
    for h in histories:
        gap = "diverged" if not math.isfinite(h.final) or h.final > 10 * h.gaps[0] else f"{h.final:.5f}"
        lines.append(f"{h.name:<20}{gap:>10}{h.failed if h.name.startswith('BiSLS') else '':>18}")
    return "\n".join(lines)


def draw(kind: str, histories: list[History], path: Path) -> None:
    """F - F* over the iterations: fixed rates, and none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for panel, name in zip(axes, FIXED, strict=True):
        fixed = [h for h in histories if h.name.startswith(name + " ")]
        shades = plt.get_cmap("Blues")(torch.linspace(0.4, 0.95, len(fixed)).tolist())
        for h, shade in zip(fixed, shades, strict=True):
            label = h.name if math.isfinite(h.final) and h.final < 10 else f"{h.name} (diverges)"
            panel.plot(h.gaps, color=shade, lw=1.4, label=label)
        ours = [h for h in histories if h.name.startswith(f"BiSLS-{name} ")]
        for h in ours:
            none = h.name.endswith("none")
            label = "no number" if none else f"first trials {FIRST_TRIALS[1]:g} to {FIRST_TRIALS[-1]:g}"
            panel.plot(h.gaps, color="tab:red", lw=2.2 if none else 0.9, alpha=1.0 if none else 0.6,
                       label=f"BiSLS-{name}, {label}" if none or h is ours[-1] else None)  # fmt: skip
        title = f"{kind}, {name}: fixed rates, and BiSLS-{name}"
        panel.set(yscale="log", ylim=(3e-6, 2), xlabel="upper iteration", title=title)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8, loc="lower left", ncols=2)
    axes[0].set_ylabel("F(x) - F*")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--loss", choices=LOSSES, default="ridge")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--figure", type=Path, help="PNG file")
    parser.add_argument("--output", type=Path, help="JSON file of all runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    histories = run(options.loss, options.seed, options.iterations)
    print(table(histories))
    if options.figure:
        draw(options.loss, histories, options.figure)
        print(f"\n{options.figure}")
    if options.output:
        command = "python examples/torchopt_hpo.py " + shlex.join(arguments if arguments is not None else sys.argv[1:])
        rows = [{**asdict(h), "final": h.final} for h in histories]
        options.output.write_text(json.dumps({"command": command, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
