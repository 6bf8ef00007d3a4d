"""Learn which training labels to trust: a meta-weight-net in Betty's engine, with no learning rate.

    python examples/betty_reweighting.py                               # scikit-learn's digits
    python examples/betty_reweighting.py --data DIR --figure out.png   # MNIST from a folder

Of the training labels 40 % are drawn at random. The lower problem fits a softmax regression to them, each sample
weighted by a small network of its loss (Shu et al., 2019, arXiv 1902.07379); the upper problem trains that network on a
few clean samples. What changes in the code for Betty (see `Weigh`, `Classify` and `train`, which do both):

    +from adaptive_bilevel_betty import AutoSLS, BiSLS, bind
     class Weigh(ImplicitProblem):
         def configure_optimizer(self):
    -        return torch.optim.Adam(self.module.parameters(), lr=1e-3)
    +        return BiSLS(self.module.parameters(), direction="adam")
     class Classify(ImplicitProblem):
         def configure_optimizer(self):
    -        return torch.optim.SGD(self.module.parameters(), lr=0.1)
    +        return AutoSLS(self.module.parameters())
     engine = Engine(...)
    +bind(engine)

The weights are taken from the loss without its graph, so they must stay while a step is searched, or the searched
function is not the one that was differentiated: hence the two lines with ``in_trial`` in `Classify.training_step`.

The samples disagree: as long as wrong labels have weight, no classifier fits them all. AutoSLS detects that. Rows
without weights show what the noise does. Accuracies are on clean test samples.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import betty
import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adaptive_bilevel.errors import AdaptiveBilevelWarning
from adaptive_bilevel_betty import AutoSLS, BiSLS, bind

NOISE, BATCH, LOWER_STEPS, EVALUATE_EVERY = 0.4, 100, 5, 10
WEIGHT_DECAY = 1e-3  # in the lower loss
FIXED = [(None, 0.1), (1e-3, 0.01), (1e-3, 0.1), (1e-3, 1.0), (1e-5, 0.1)]  # Adam above, SGD below

Batch = tuple[Tensor, Tensor]
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


class Draws:
    """Endless minibatches, drawn with replacement."""

    def __init__(self, x: Tensor, y: Tensor, seed: int) -> None:
        self.x, self.y, self.generator = x, y, torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            index = torch.randint(len(self.x), (BATCH,), generator=self.generator)
            yield self.x[index], self.y[index]


@dataclass
class Data:
    """Noisy samples with the truth about them, a few clean ones, and those for tests."""

    name: str
    noisy: Batch
    wrong: Tensor
    clean: Batch
    test: Batch


class Weigh(ImplicitProblem):
    """The upper problem: the loss on clean samples."""

    make_optimizer: MakeOptimizer

    def training_step(self, batch: Batch) -> Tensor:
        x, y = batch
        return cross_entropy(self.inner(x), y)

    def configure_optimizer(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.module.parameters())


class Classify(ImplicitProblem):
    """The lower problem: the loss on noisy samples, weighted."""

    make_optimizer: MakeOptimizer

    def training_step(self, batch: Batch) -> Tensor:
        x, y = batch
        losses = cross_entropy(self.module(x), y, reduction="none")
        if not getattr(self, "in_trial", False):
            self.seen = losses.detach()  # while a step is searched, the samples keep the weights that they had
        weights = self.outer(self.seen[:, None])[:, 0]
        decay = sum(p.square().sum() for p in self.module.parameters())
        return (weights * losses).mean() + WEIGHT_DECAY / 2 * decay

    def configure_optimizer(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.module.parameters())


@dataclass
class Run:
    """One run."""

    method: str
    upper: float | None = None
    lower: float | None = None
    seed: int = 0
    iterations: list[int] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    trusted: float = 0.0  # mean weight of the right labels
    mistrusted: float = 0.0  # of the wrong ones
    curve: list[float] = field(default_factory=list)  # weight over loss, at LOSSES

    @property
    def name(self) -> str:
        if self.method == "no weights":
            return f"no weights, SGD {self.lower:g}" if self.lower else "no weights, AutoSLS"
        return f"Adam {self.upper:g} / SGD {self.lower:g}" if self.lower else self.method

    @property
    def final(self) -> float:
        """The last accuracies' median."""
        return median(self.accuracies[-5:])


LOSSES = torch.linspace(0.0, 6.0, 61)


def load(folder: str | None, seed: int) -> Data:
    """Draw the parts, and wrong labels."""
    sys.path.append(str(Path(__file__).parent / "benchmarks"))  # the benchmarks' reader
    from data import images

    content = images(folder)
    x, y = content.x.flatten(1), content.y
    test = content.test_x.flatten(1)[:2000], content.test_y[:2000]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    clean, noisy = order[:100], order[100:2100]
    random = torch.randint(10, (len(noisy),), generator=generator)
    labels = torch.where(torch.rand(len(noisy), generator=generator) < NOISE, random, y[noisy])
    return Data(content.name, (x[noisy], labels), labels != y[noisy], (x[clean], y[clean]), test)


def train(run: Run, data: Data, iterations: int, kind: str) -> Run:
    """Run Betty's engine."""
    torch.manual_seed(run.seed)
    pixels = data.noisy[0].shape[1]
    classifier = nn.Linear(pixels, 10)
    weigher = nn.Sequential(nn.Linear(1, 50), nn.ReLU(), nn.Linear(50, 1), nn.Sigmoid())
    ours = run.lower is None
    upper = Weigh("outer", Config(), module=weigher, train_data_loader=[data.clean])
    lower = Classify(
        "inner",
        Config(type=kind, unroll_steps=LOWER_STEPS),
        module=classifier,
        train_data_loader=Draws(*data.noisy, seed=run.seed),
    )
    weighted = run.method != "no weights"
    lower_lr, upper_lr = run.lower, run.upper if weighted else 0.0
    lower.make_optimizer = AutoSLS if lower_lr is None else (lambda p: torch.optim.SGD(p, lr=lower_lr))
    if ours and weighted:
        upper.make_optimizer = lambda p: BiSLS(p, direction="adam")
    else:
        assert upper_lr is not None, f"{run.method}: Adam has no step of its own"
        upper.make_optimizer = lambda p: torch.optim.Adam(p, lr=upper_lr)
    if not weighted:  # all weights 1/2, and the upper problem moves nothing
        for p in weigher.parameters():
            p.data.zero_()
    engine = Engine(
        config=EngineConfig(train_iters=LOWER_STEPS * EVALUATE_EVERY),
        problems=[upper, lower],
        dependencies={"u2l": {upper: [lower]}, "l2u": {lower: [upper]}},
    )
    if ours or kind == "adaptive_cg":
        bind(engine)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=AdaptiveBilevelWarning)
        for iteration in range(EVALUATE_EVERY, iterations + 1, EVALUATE_EVERY):
            engine.run()
            with torch.no_grad():
                x, y = data.test
                run.accuracies.append(float((classifier(x).argmax(1) == y).float().mean()))
            run.iterations.append(iteration)
    with torch.no_grad():
        x, y = data.noisy
        weights = weigher(cross_entropy(classifier(x), y, reduction="none")[:, None])[:, 0]
        run.trusted, run.mistrusted = float(weights[~data.wrong].mean()), float(weights[data.wrong].mean())
        run.curve = weigher(LOSSES[:, None])[:, 0].tolist()
    return run


def draw_figure(runs: list[Run], title: str, path: Path) -> None:
    """Test accuracies on the left; on the right, what weight is given to which loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    shown = [run for run in runs if run.seed == runs[0].seed]
    stock = [run for run in shown if run.method == "Adam / SGD"]
    blues = plt.get_cmap("Blues")(torch.linspace(0.35, 0.95, len(stock)).tolist())
    colors = {id(run): color for run, color in zip(stock, blues, strict=True)}
    for run in shown:
        color: Any = colors.get(id(run), "tab:red" if run.method.startswith("BiSLS") else "0.5")
        style = "--" if run.method == "no weights" and run.lower else "-"
        width = 2.2 if run.method.startswith("BiSLS") else 1.2
        left.plot(run.iterations, run.accuracies, color=color, lw=width, ls=style, label=run.name)
        if run.method != "no weights":
            right.plot(LOSSES.tolist(), run.curve, color=color, lw=width, label=run.name)
    best = max(max(run.accuracies) for run in shown)
    left.set(xlabel="upper step", ylabel="test accuracy", title=title, ylim=(best - 0.45, best + 0.02))
    left.legend(framealpha=0.9, edgecolor="none", fontsize=8, loc="lower right")
    right.set(xlabel="loss of a sample", ylabel="weight", title="what the network learned", ylim=(0.0, 1.0))
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[Run]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with MNIST (else the environment's, else scikit-learn's digits)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--iterations", type=int, default=200, help="upper steps")
    parser.add_argument("--type", default="adaptive_cg", help="hypergradient type, such as Betty's darts")
    parser.add_argument("--figure", type=Path, help="PNG file")
    parser.add_argument("--output", type=Path, help="JSON file of all runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("betty").disabled = True  # it prints each problem

    runs = []
    for seed in options.seeds:
        data = load(options.data, seed)
        if seed == options.seeds[0]:
            print(f"Betty {betty.__version__}, {data.name}, {float(data.wrong.float().mean()):.0%} of the labels wrong")
            print(f"{'':32} {'seed':>4} {'accuracy':>9} {'best':>6}   weight of right, wrong labels")
        plan = [Run("no weights" if up is None else "Adam / SGD", up, low, seed) for up, low in FIXED]
        plan += [Run("no weights", seed=seed), Run("BiSLS + AutoSLS, no number", seed=seed)]
        for run in plan:
            runs.append(train(run, data, options.iterations, options.type))
            accuracy = f"{run.final:9.1%} {max(run.accuracies):6.1%}"
            print(f"{run.name:32} {seed:>4} {accuracy}   {run.trusted:.2f}, {run.mistrusted:.2f}", flush=True)
    if options.figure:
        title = f"{data.name}, {NOISE:.0%} of the labels drawn at random"
        draw_figure(runs, title, options.figure)
    if options.output:
        given = ["DIR" if word == options.data else word for word in (arguments or sys.argv[1:])]
        command = shlex.join(["python", "examples/betty_reweighting.py", *given])
        content = {"command": command, "betty": betty.__version__, "torch": torch.__version__, "data": data.name}
        rows = [{**asdict(run), "curve": [round(w, 3) for w in run.curve]} for run in runs]
        for row in rows:
            row["accuracies"] = [round(a, 4) for a in row["accuracies"]]
        options.output.write_text(json.dumps({**content, "runs": rows}) + "\n")
    return runs


if __name__ == "__main__":
    main()
