"""Regularizers of a logistic regression, one for each feature, by Betty's engine with no learning rate.

    python examples/betty_logistic_hpo.py                         # a table: fixed learning rates, and none
    python examples/betty_logistic_hpo.py --seeds 0 1 2 3 4 --grid --figure out.png --output out.json

The problem is that of Betty's own example: 500 training samples with 20 features choose the weights y, 500 validation
samples the regularizers x >= 0. The settings are its defaults: 100 lower steps, started from 0 each time, and three
iterations of Betty's ``cg``. What changes (see `problems`, which does both):

    +from adaptive_bilevel_betty import AutoSLS, BiSLS, bind
     class Parent(ImplicitProblem):
         def configure_optimizer(self):
    -        return torch.optim.SGD(self.module.parameters(), lr=1, momentum=0.9)
    +        return BiSLS(self.module.parameters(), direction="adam")
     class Child(ImplicitProblem):
         def configure_optimizer(self):
    -        return torch.optim.SGD(self.module.parameters(), lr=0.1)
    +        return AutoSLS(self.module.parameters())
     engine = Engine(...)
    +bind(engine)

Adam's metric is for the regularizers that reach 0: in those, F bends far more than in the others, and along the plain
hypergradient (``--direction sgd``) it is they that say how long a step can be. Betty's ``cg`` is not the conjugate
gradient method, so BiSLS warns that the hypergradient and its solver disagree (not shown here), and takes its own where
Betty's does not descend. ``--type adaptive_cg`` is the right one.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shlex
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import betty
import numpy as np
import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from adaptive_bilevel.errors import AdaptiveBilevelWarning
from adaptive_bilevel_betty import AutoSLS, BiSLS, bind

SAMPLES, FEATURES, LOWER_STEPS = 1000, 20, 100
FIRST_TRIALS = [(upper, lower) for upper in (1.0, 1e1, 1e2, 1e3) for lower in (0.1, 1.0, 1e1, 1e2)]
FIXED = [(1.0, 0.1), (0.01, 0.01), (100.0, 10.0)]

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


class Weights(nn.Module):
    """The weights of the regression, or the regularizers."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((FEATURES,), start))

    def forward(self) -> Tensor:
        return self.w


class Parent(ImplicitProblem):
    """The validation loss, a function of the regularizers through the child's solution."""

    make_optimizer: MakeOptimizer

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, t = batch
        return binary_cross_entropy_with_logits(x @ self.inner(), t)

    def configure_optimizer(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.module.parameters())

    def param_callback(self, params: Any = None) -> None:  # Betty 0.1 passes the parameters
        for p in self.trainable_parameters():
            p.data.clamp_(min=1e-8)


class Child(ImplicitProblem):
    """The regularized training loss, minimized from 0 each time."""

    make_optimizer: MakeOptimizer

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, t = batch
        y = self.module()
        return binary_cross_entropy_with_logits(x @ y, t) + 0.5 * (self.outer() * y.square()).sum()

    def configure_optimizer(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.module.parameters())

    def on_inner_loop_start(self) -> None:
        self.module.w.data.zero_()


@dataclass
class Run:
    """One run: the rule at each level, and the upper loss before each upper step."""

    method: str
    upper: float | None
    lower: float | None
    seed: int
    losses: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    failed: str = ""

    @property
    def name(self) -> str:
        numbers = "no number" if self.upper is None else f"{self.upper:g} / {self.lower:g}"
        return f"{self.method}, {numbers}"

    def at(self, step: int) -> float:
        """The upper loss at an upper step; NaN if the run did not come so far."""
        return self.losses[step - 1] if len(self.losses) >= step else math.nan


def data(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and validation samples, as Betty's example draws them."""
    np.random.seed(seed)
    truth = np.random.randn(FEATURES)
    x = np.random.randn(SAMPLES, FEATURES)
    t = (x @ truth + 0.1 * np.random.randn(SAMPLES) > 0).astype(float)
    parts = train_test_split(x, t, test_size=0.5)
    x_train, x_val, t_train, t_val = (torch.from_numpy(part).float() for part in parts)
    return (x_train, t_train), (x_val, t_val)


def problems(upper: MakeOptimizer, lower: MakeOptimizer, seed: int, kind: str, iterations: int) -> Engine:
    """Betty's engine with the two problems."""
    train, validation = data(seed)
    parent = Parent("outer", Config(retain_graph=True), module=Weights(1.0), train_data_loader=[validation])
    child = Child(
        "inner",
        Config(type=kind, cg_iterations=3, unroll_steps=LOWER_STEPS),
        module=Weights(0.0),
        train_data_loader=[train],
    )
    parent.make_optimizer, child.make_optimizer = upper, lower
    dependencies = {"u2l": {parent: [child]}, "l2u": {child: [parent]}}
    config = EngineConfig(train_iters=LOWER_STEPS * iterations)
    return Engine(config=config, problems=[parent, child], dependencies=dependencies)


def train(run: Run, kind: str, iterations: int, direction: str) -> Run:
    """Run Betty's engine, and fill in what happens at each upper step."""
    ours = run.method.startswith("BiSLS")
    upper_lr, lower_lr = run.upper, run.lower
    upper: MakeOptimizer
    lower: MakeOptimizer
    if ours:
        upper, lower = (lambda p: BiSLS(p, upper_lr, direction=direction)), (lambda p: AutoSLS(p, lower_lr))
    else:
        assert upper_lr is not None and lower_lr is not None, f"{run.method}: SGD has no step of its own"
        upper = lambda p: torch.optim.SGD(p, lr=upper_lr, momentum=0.9)  # noqa: E731
        lower = lambda p: torch.optim.SGD(p, lr=lower_lr)  # noqa: E731
    torch.manual_seed(run.seed)
    engine = problems(upper, lower, run.seed, kind, iterations)
    if ours or kind == "adaptive_cg":
        bind(engine)
    parent = engine.outer
    get_loss = parent.get_loss

    def watched(batch: Any) -> Any:
        loss, report = get_loss(batch)
        run.losses.append(float(report["loss"]))
        return loss, report

    parent.get_loss = watched
    step = parent.optimizer.step

    def noted() -> None:
        step()
        group = parent.optimizer.param_groups[0]
        run.steps.append(float(group.get("step_size", group["lr"])))

    parent.optimizer.step = noted
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=AdaptiveBilevelWarning)
        try:
            engine.run()
        except ArithmeticError as error:
            run.failed = str(error)
    return run


def draw_figure(runs: list[Run], path: Path) -> None:
    """Upper losses of all runs on the left; on the right the steps that were found, among those that were fixed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    first = runs[0].seed
    for run in (run for run in runs if run.seed == first):
        none = run.upper is None
        ours = run.method.startswith("BiSLS")
        color, width = ("tab:red", 2.4) if none else ("tab:orange", 0.7) if ours else ("tab:blue", 1.5)
        label = None if ours and not none else run.name if math.isfinite(run.at(10)) else f"{run.name} (not finite)"
        style: dict[str, Any] = {"color": color, "lw": width, "zorder": 3 if none else 2}
        steps = range(1, 1 + len(run.losses))
        left.plot(steps, run.losses, label=label, ls="-" if ours or run.upper == 1 else ":", **style)
        if ours:
            right.plot(range(1, 1 + len(run.steps)), run.steps, **style)
    for method in {run.method for run in runs if run.method.startswith("BiSLS") and run.upper}:
        left.plot([], [], color="tab:orange", lw=0.7, label=f"{method}, 16 pairs of first trials")
    left.set(xlabel="upper step", ylabel="validation loss", title=f"Betty {betty.__version__}, seed {first}")
    left.set_ylim(0.0, 0.72)
    left.legend(frameon=False, fontsize=8, loc=(0.47, 0.56))
    right.set(yscale="log", xlabel="upper step", ylabel="upper step size", title="step sizes of BiSLS")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def short(numbers: list[float]) -> list[float | None]:
    """Six digits of each; JSON has no NaN."""
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in numbers]


def main(arguments: list[str] | None = None) -> list[Run]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--iterations", type=int, default=31, help="upper steps")
    parser.add_argument("--type", default="cg", help="Betty's hypergradient type: cg, neumann, darts or adaptive_cg")
    parser.add_argument("--direction", choices=["adam", "sgd"], default="adam", help="that of BiSLS")
    parser.add_argument("--few", action="store_true", help="only the example's own learning rates, and none")
    parser.add_argument("--grid", action="store_true", help="also run 16 pairs of first trials")
    parser.add_argument("--figure", type=Path, help="PNG file")
    parser.add_argument("--output", type=Path, help="JSON file of all runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("betty").disabled = True  # it prints each problem

    print(f"Betty {betty.__version__}, type {options.type!r}: validation loss at upper step")
    print(f"{'':34} {'seed':>4} {'1':>7} {'10':>7} {'30':>7}")
    ours = f"BiSLS-{'Adam' if options.direction == 'adam' else 'SGD'} + AutoSLS"
    runs = []
    for seed in options.seeds:
        fixed = FIXED[:1] if options.few else FIXED
        plan = [Run("SGD", upper, lower, seed) for upper, lower in fixed] + [Run(ours, None, None, seed)]
        if options.grid:
            plan += [Run(ours, upper, lower, seed) for upper, lower in FIRST_TRIALS]
        for run in plan:
            runs.append(train(run, options.type, options.iterations, options.direction))
            print(f"{run.name:34} {seed:>4} " + " ".join(f"{run.at(k):7.3f}" for k in (1, 10, 30)), flush=True)
    if options.figure:
        draw_figure(runs, options.figure)
    if options.output:
        command = shlex.join(["python", "examples/betty_logistic_hpo.py", *(arguments or sys.argv[1:])])
        content = {"command": command, "betty": betty.__version__, "torch": torch.__version__}
        rows = [{**asdict(run), "losses": short(run.losses), "steps": short(run.steps)} for run in runs]
        options.output.write_text(json.dumps({**content, "runs": rows}) + "\n")
    return runs


if __name__ == "__main__":
    main()
