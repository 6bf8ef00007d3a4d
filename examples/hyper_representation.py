"""Learn a representation of handwritten digits without choosing a step size.

Upper level: an embedding network, judged on validation images. Lower level: a ridge regression on the embedding, fitted
to training images. The hypergradient comes from the implicit function theorem by conjugate gradients, as in any bilevel
code. The same loop runs with torch's Adam at four learning rates and with BiSLS-Adam, to which no number is given.

    python examples/hyper_representation.py                 # scikit-learn's digits, about a minute
    python examples/hyper_representation.py --data DIR      # MNIST from a folder
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from tqdm import tqdm

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.hypergradient import assign, implicit

LOWER_STEPS, BATCH, RIDGE = 10, 128, 1e-3
EVALUATE_EVERY = 5
TOP = 0.6  # of the picture; a head of zeros has the loss 0.5

Batch = tuple[Tensor, Tensor]
MakeOuter = Callable[[list[nn.Parameter], torch.optim.Optimizer], torch.optim.Optimizer]

METHODS: dict[str, MakeOuter] = {
    "Adam, lr 1e-4": lambda params, inner: torch.optim.Adam(params, lr=1e-4),
    "Adam, lr 1e-3": lambda params, inner: torch.optim.Adam(params, lr=1e-3),
    "Adam, lr 1e-2": lambda params, inner: torch.optim.Adam(params, lr=1e-2),
    "Adam, lr 1e-1": lambda params, inner: torch.optim.Adam(params, lr=1e-1),
    "BiSLS-Adam": lambda params, inner: BiSLS(params, lower=inner, direction="adam"),
}


@dataclass
class Data:
    name: str
    train: Batch
    validation: Batch
    test: Batch


@dataclass
class History:
    """What a run leaves for the table and the picture."""

    iterations: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    step_sizes: list[float] = field(default_factory=list)
    accuracy: float = 0.0
    forward_passes: int = 0

    @property
    def final(self) -> float:
        """The last validation losses' median: with minibatches the very last one is a draw."""
        return median(self.losses[-3:])

    def first_below(self, target: float) -> int | None:
        """The first evaluation at or below the target."""
        return next((i for i, loss in enumerate(self.losses) if loss <= target), None)


def train(make_outer: MakeOuter, data: Data, iterations: int, seed: int, show: Callable[[int, float], None]) -> History:
    """One run: plain PyTorch, where the two optimizers are the only thing that differs between methods."""
    torch.manual_seed(seed)
    pixels = data.train[0].shape[1]
    embed = nn.Sequential(nn.Linear(pixels, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
    head = torch.zeros(32 + 1, 10, requires_grad=True)
    history = History()

    def predict(images: Tensor) -> Tensor:
        features = embed(images)
        return torch.cat([features, torch.ones(len(images), 1)], dim=1) @ head

    def upper_loss(batch: Batch) -> Tensor:
        history.forward_passes += 1
        images, labels = batch
        return (predict(images) - one_hot(labels, 10)).square().sum() / (2 * len(images))

    def lower_loss(batch: Batch) -> Tensor:
        return upper_loss(batch) + RIDGE / 2 * head.square().sum()

    weights = list(embed.parameters())
    inner = SLS([head])
    outer: Any = make_outer(weights, inner)  # torch annotates closures that return a float
    spent = 0.0
    for iteration in range(1, iterations + 1):
        started = time.perf_counter()
        batch, val = draw(data.train), draw(data.validation)

        for _ in range(LOWER_STEPS):
            inner.step(lambda: lower_loss(batch))
        hypergradient = implicit(lambda: upper_loss(val), lambda: lower_loss(batch), upper=weights, lower=[head])
        assign(weights, hypergradient)  # into .grad
        outer.step(lambda: upper_loss(val))

        spent += time.perf_counter() - started
        group = outer.param_groups[0]
        history.step_sizes.append(float(group.get("step_size", group["lr"])))
        if iteration % EVALUATE_EVERY == 0:
            with torch.no_grad():
                images, labels = data.validation
                loss = (predict(images) - one_hot(labels, 10)).square().sum() / (2 * len(images))
            history.iterations.append(iteration)
            history.losses.append(float(loss))
            history.seconds.append(spent)
            show(iteration, float(loss))

    with torch.no_grad():
        images, labels = data.test
        history.accuracy = float((predict(images).argmax(1) == labels).float().mean())
    return history


def draw(part: Batch) -> Batch:
    """A minibatch, drawn with replacement."""
    index = torch.randint(len(part[0]), (BATCH,))
    return part[0][index], part[1][index]


def load(folder: str | None) -> Data:
    """Three parts of the images: for the lower level, for the upper level, for the accuracy in the table."""
    sys.path.append(str(Path(__file__).parent / "benchmarks"))  # the benchmarks' reader
    from data import images

    content = images(folder)
    x, y = content.x.flatten(1), content.y
    n = min(len(x) // 2, 10_000)
    test = content.test_x.flatten(1)[:2000], content.test_y[:2000]
    return Data(content.name, (x[:n], y[:n]), (x[n : 2 * n], y[n : 2 * n]), test)


@contextmanager
def progress(name: str, iterations: int) -> Iterator[Callable[[int, float], None]]:
    """Shows where a run is: a bar on a terminal, and a line at the end anywhere."""
    with tqdm(total=iterations, desc=f"{name:<14}", leave=False, disable=None) as bar:

        def show(iteration: int, loss: float) -> None:
            bar.update(iteration - bar.n)
            bar.set_postfix_str(f"validation loss {loss:.4f}", refresh=False)
            if iteration == iterations:
                tqdm.write(f"{name:<14}  iteration {iteration:>4}/{iterations}   validation loss {loss:8.4f}")

        yield show


def table(histories: dict[str, History], target: float) -> str:
    """One line per method."""
    head = f"{'method':<14} {'val. loss':>10} {'accuracy':>9} {'iterations':>11} {'seconds':>8} {'forward passes':>15}"
    lines = ["", f"{'':<14} {'':>10} {'':>9} {'to reach ' + format(target, '.4f'):>20}", head, "-" * len(head)]
    for name, run in histories.items():
        hit = run.first_below(target)
        reached = ("never", "-") if hit is None else (str(run.iterations[hit]), f"{run.seconds[hit]:.1f}")
        result = f"{name:<14} {run.final:>10.4f} {run.accuracy:>9.1%}"
        lines.append(f"{result} {reached[0]:>11} {reached[1]:>8} {run.forward_passes:>15}")
    return "\n".join(lines)


def draw_figure(histories: dict[str, History], title: str, path: Path) -> None:
    """Validation losses on the left; on the right the step sizes that BiSLS found, among the four that were fixed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fixed = [name for name in histories if name.startswith("Adam")]
    shades = plt.get_cmap("Blues")(torch.linspace(0.4, 0.95, len(fixed)).tolist())
    colors = {**dict(zip(fixed, shades, strict=True)), "BiSLS-Adam": "tab:red"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, run in histories.items():
        width = 2.2 if name not in fixed else 1.4
        label = name if min(run.losses) < TOP and run.final < TOP else f"{name} (ends at {run.final:.2g})"
        left.plot(run.iterations, run.losses, color=colors[name], lw=width, label=label)
        if name in fixed:
            right.axhline(run.step_sizes[0], color=colors[name], lw=width, ls="--")
            right.annotate(name, (1.01, run.step_sizes[0]), xycoords=right.get_yaxis_transform(), color=colors[name])
        else:
            moved = [(k, step) for k, step in enumerate(run.step_sizes, 1) if step > 0]
            right.plot(*zip(*moved, strict=True), color=colors[name], lw=width)
    bottom = min(run.final for run in histories.values() if math.isfinite(run.final)) / 1.3
    left.set(yscale="log", ylim=(bottom, TOP), xlabel="upper iteration", ylabel="validation loss", title=title)
    left.legend(frameon=False, fontsize=8, loc="lower left")
    right.set(yscale="log", xlabel="upper iteration", ylabel="upper step size", title="step sizes: fixed, and found")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="a folder with MNIST (npz or idx files) in place of the digits")
    parser.add_argument("--iterations", type=int, default=250, help="upper iterations of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="where the picture goes")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)  # the matrices are small
    data = load(options.data)
    print(
        f"{data.name}: {len(data.train[0])} training, {len(data.validation[0])} validation, {len(data.test[0])} test\n"
    )
    histories = {}
    for name, make_outer in METHODS.items():
        with progress(name, options.iterations) as show:
            histories[name] = train(make_outer, data, options.iterations, options.seed, show)
    target = 1.05 * min(run.final for name, run in histories.items() if name.startswith("Adam"))
    print(table(histories, target))
    print("\nThe target is 1.05 times what the best fixed learning rate reached; only BiSLS-Adam was given no number.")
    draw_figure(histories, f"hyper-representation, {data.name}", options.output)
    print(f"Picture: {options.output}")


if __name__ == "__main__":
    main()
