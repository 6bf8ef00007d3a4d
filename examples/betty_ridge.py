"""Ridge regression with one regularizer per feature in Betty's engine: how far from the minimum are ten data sets?

    python examples/betty_ridge.py --seeds 0 1 2 3 4 5 6 7 8 9

y are the weights of a ridge regression on training data, x the logarithms of its regularizers, one for each feature:

    lower   min_y  |A y - b|^2 / (2 n)  +  sum_j exp(x_j) y_j^2 / 2
    upper   min_x  |A' y - b'|^2 / (2 n)   on validation data

The lower problem has a closed form, so F(x) = f(x, y*(x)) and its minimum are known. Half of the features are noise:
F is smallest at some x_j near infinity, or minus infinity, and flat on the way there. The table has F - F* after 60
upper steps of 10 lower ones, the lower loss on all 60 samples or on 16; for torch.optim.SGD with a grid of learning
rates at both levels, and for BiSLS and AutoSLS with no number.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import betty
import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from torch import Tensor, nn

from adaptive_bilevel.errors import AdaptiveBilevelWarning
from adaptive_bilevel_betty import AutoSLS, BiSLS, bind

UPPER_STEPS, LOWER_STEPS = 60, 10
UPPER_RATES, LOWER_RATES = (1.0, 3.0, 10.0, 30.0, 100.0), (0.03, 0.1, 0.3)
BATCHES = (None, 16)

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


class Data:
    """Training and validation samples; half of the true weights are zero."""

    def __init__(self, seed: int = 0, n: int = 60, m: int = 60, d: int = 8, noise: float = 0.5) -> None:
        rng = torch.Generator().manual_seed(seed)
        shapes = ((n, d), (m, d), (d,), (n,), (m,))
        self.A, self.Av, w, e, ev = (torch.randn(*s, generator=rng, dtype=torch.float64) for s in shapes)
        w = w * (torch.arange(d) < d // 2)
        self.b, self.bv = self.A @ w + noise * e, self.Av @ w + noise * ev
        self.d = d

    def solve(self, x: Tensor) -> Tensor:
        """y*(x)."""
        H = self.A.T @ self.A / len(self.b) + torch.diag(x.exp())
        return torch.linalg.solve(H, self.A.T @ self.b / len(self.b))

    def F(self, x: Tensor) -> Tensor:
        """f(x, y*(x))."""
        return 0.5 * (self.Av @ self.solve(x) - self.bv).square().mean()

    def minimum(self) -> float:
        """F*, by a second-order method on the closed form."""
        x = torch.zeros(self.d, dtype=torch.float64, requires_grad=True)
        lbfgs = torch.optim.LBFGS([x], max_iter=2000, line_search_fn="strong_wolfe", tolerance_change=0.0)

        def closure() -> Tensor:
            lbfgs.zero_grad()
            value = self.F(x)
            value.backward()
            return value

        lbfgs.step(closure)
        return float(self.F(x.detach()))


class Batches:
    """Endless batches of rows, drawn without replacement within one."""

    def __init__(self, A: Tensor, b: Tensor, size: int) -> None:
        self.A, self.b, self.size, self.draws = A, b, size, torch.Generator().manual_seed(1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            rows = torch.randperm(len(self.b), generator=self.draws)[: self.size]
            yield self.A[rows], self.b[rows]


class Vector(nn.Module):
    """A vector, from 0."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.value


class Validate(ImplicitProblem):
    """The upper problem."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        A, b = batch
        return 0.5 * (A @ self.inner() - b).square().mean()


class Fit(ImplicitProblem):
    """The lower problem."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        A, b = batch
        y = self.module()
        return 0.5 * (A @ y - b).square().mean() + 0.5 * (self.outer().exp() * y.square()).sum()


def gap(seed: int, upper: MakeOptimizer, lower: MakeOptimizer, batch: int | None = None) -> float:
    """F - F* at the end of one run."""
    data = Data(seed)
    x, y = Vector(data.d), Vector(data.d)
    top = Validate("outer", Config(), module=x, optimizer=upper(x.parameters()), train_data_loader=[(data.Av, data.bv)])
    low = Fit(
        "inner",
        Config(type="adaptive_cg", unroll_steps=LOWER_STEPS),
        module=y,
        optimizer=lower(y.parameters()),
        train_data_loader=[(data.A, data.b)] if batch is None else Batches(data.A, data.b, batch),
    )
    engine = Engine(
        config=EngineConfig(train_iters=UPPER_STEPS * LOWER_STEPS),
        problems=[top, low],
        dependencies={"u2l": {top: [low]}, "l2u": {low: [top]}},
    )
    bind(engine)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=AdaptiveBilevelWarning)
        engine.run()
    return float(data.F(top.module.value.detach())) - data.minimum()


def plan() -> list[tuple[str, MakeOptimizer, MakeOptimizer]]:
    """The rows: name, upper and lower optimizer."""
    fixed = [
        (f"SGD {upper:g} / {lower:g}", partial(torch.optim.SGD, lr=upper), partial(torch.optim.SGD, lr=lower))
        for upper, lower in itertools.product(UPPER_RATES, LOWER_RATES)
    ]
    return [
        *fixed,
        ("BiSLS", BiSLS, AutoSLS),
        ("BiSLS, momentum=False", partial(BiSLS, momentum=False), AutoSLS),
        ("BiSLS, direction='adam'", partial(BiSLS, direction="adam"), AutoSLS),
    ]


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("betty").disabled = True  # it prints each problem

    rows: list[dict[str, Any]] = []
    for batch in BATCHES:
        title = f"F - F*, {'full batch' if batch is None else f'batches of {batch}'}"
        print(f"{title:26} {'median':>8} {'worst':>8}")
        for name, upper, lower in plan():
            gaps = [gap(seed, upper, lower, batch) for seed in options.seeds]
            known = sorted(g if math.isfinite(g) else math.inf for g in gaps)
            print(f"{name:26} {median(known):8.1e} {known[-1]:8.1e}", flush=True)
            short = [float(f"{g:.3g}") if math.isfinite(g) else None for g in gaps]  # JSON has no NaN
            rows.append({"name": name, "batch": batch, "gaps": short})
    if options.output:
        command = shlex.join(["python", "examples/betty_ridge.py", *(arguments or sys.argv[1:])])
        content = {"command": command, "betty": betty.__version__, "torch": torch.__version__, "seeds": options.seeds}
        options.output.write_text(json.dumps({**content, "rows": rows}) + "\n")
    return rows


if __name__ == "__main__":
    main()
