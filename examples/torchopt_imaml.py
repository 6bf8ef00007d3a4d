"""Few-shot classification by implicit MAML on TorchOpt, with its learning rates and without.

    python examples/torchopt_imaml.py --data DIR --figure out.png    # Omniglot (omniglot_small.npz)
    python examples/torchopt_imaml.py                                # digits of scikit-learn: seconds, no folder needed

x are the weights of a small convolutional network, y the weights adapted to one task, min_y CE(y; support) +
reg/2 |y - x|^2, starting from x (Rajeswaran et al., 2019, arXiv 1909.04630, the example of TorchOpt's repository). The
upper loss is the mean cross-entropy on the queries of a few tasks, all new in each iteration: a meta-batch of lower
problems is one upper step. What changes in TorchOpt code (see `InnerNet` and `train`, which do both):

     class InnerNet(torchopt.nn.ImplicitMetaGradientModule, linear_solve=solve_cg(maxiter=5, atol=0)):
         def __init__(self, meta_net, ...):
    +        self.lower = LowerStep(self, AutoSLS)

         def solve(self, x, y):
             params = tuple(self.parameters())
    -        optimizer = torchopt.SGD(params, lr=1e-1)
    +        step = self.lower.attach()
             for _ in range(inner_steps):
    -            loss = self.objective(x, y)
    -            optimizer.zero_grad(); loss.backward(inputs=params); optimizer.step()
    +            step(lambda: self.objective(x, y))

    -meta = torchopt.Adam(net.parameters(), lr=1e-3)
    +meta = UpperStep(net.parameters(), lower=[n.lower for n in inner_nets], carry=False)
     for tasks in ...:
         for inner_net, task in zip(inner_nets, tasks):
             inner_net.reset_parameters()
             inner_net.solve(*task.support)
    -    meta.zero_grad(); query_loss(inner_nets, tasks).backward(); meta.step()
    +    meta.step(lambda: query_loss(inner_nets, tasks))

carry=False, since each task starts from x anew.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchopt
from torch import Tensor, nn
from torch.nn import functional as F

from adaptive_bilevel import AutoSLS
from adaptive_bilevel_torchopt import LowerStep, UpperStep

warnings.filterwarnings("ignore", message=".*functorch.*", category=FutureWarning)  # TorchOpt's, at every call

WAYS, SHOTS, QUERIES = 5, 5, 5
TASKS, INNER_STEPS, REG = 4, 5, 2.0
TEST_TASKS, EVALUATE_EVERY = 40, 15
FIRST_TRIALS = (None, 1e-2, 1.0, 1e2)
ADAM = (1e-4, 1e-3, 1e-2, 1e-1)
SEARCHED = "Adam above AutoSLS"


class Task(NamedTuple):
    """Images and labels of one task."""

    support: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]


def draw_task(characters: Tensor, generator: torch.Generator) -> Task:
    """Some characters, and of each some drawings to learn from and some to be asked about."""
    chosen = characters[torch.randperm(len(characters), generator=generator)[:WAYS]]
    chosen = chosen[:, torch.randperm(chosen.shape[1], generator=generator)[: SHOTS + QUERIES]]
    images = lambda part: part.reshape(-1, 1, *part.shape[2:])  # noqa: E731
    labels = lambda count: torch.arange(WAYS).repeat_interleave(count)  # noqa: E731
    support, query = chosen[:, :SHOTS], chosen[:, SHOTS:]
    return Task((images(support), labels(SHOTS)), (images(query), labels(QUERIES)))


def network(size: int) -> nn.Module:
    """Two convolutions with the batch's own statistics, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16, track_running_stats=False), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32, track_running_stats=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * ((size + 3) // 4) ** 2, WAYS),
    )  # fmt: skip


class InnerNet(torchopt.nn.ImplicitMetaGradientModule, linear_solve=torchopt.linear_solve.solve_cg(maxiter=5, atol=0)):
    """One task's lower problem: TorchOpt's own loop with a fixed step, or ours."""

    def __init__(self, meta_net: nn.Module, size: int, automatic: bool) -> None:
        super().__init__()
        self.meta_net = meta_net
        self.net = network(size)
        self.lower = LowerStep(self, AutoSLS) if automatic else None

    def reset_parameters(self) -> None:
        with torch.no_grad():
            for p, x in zip(self.parameters(), self.meta_parameters(), strict=True):
                p.detach_().copy_(x)
                p.requires_grad_()

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(self.parameters(), self.meta_parameters(), strict=True)
        return F.cross_entropy(self.net(x), y) + REG / 2 * sum((p - q).square().sum() for p, q in pairs)

    def solve(self, x: Tensor, y: Tensor) -> None:
        if self.lower is not None:
            step = self.lower.attach()
            for _ in range(INNER_STEPS):
                step(lambda: self.objective(x, y))
            return
        params = tuple(self.parameters())
        optimizer = torchopt.SGD(params, lr=1e-1)
        with torch.enable_grad():
            for _ in range(INNER_STEPS):
                loss = self.objective(x, y)
                optimizer.zero_grad()
                loss.backward(inputs=params)
                optimizer.step()


@dataclass
class History:
    """What one run did."""

    name: str
    seed: int
    iterations: list[int] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    failed: int = 0
    seconds: float = 0.0

    @property
    def final(self) -> float:
        return self.accuracies[-1]


def accuracy(net: nn.Module, size: int, automatic: bool, characters: Tensor) -> float:
    """Query accuracy on test tasks, the same ones for all runs, after adaptation as in training."""
    generator = torch.Generator().manual_seed(12345)
    inner = InnerNet(net, size, automatic)  # one of its own: evaluation teaches the training nothing
    right = 0.0
    for _ in range(TEST_TASKS):
        task = draw_task(characters, generator)
        inner.reset_parameters()
        with torch.no_grad():
            inner.solve(*task.support)
            right += float((inner.net(task.query[0]).argmax(1) == task.query[1]).float().mean())
    return right / TEST_TASKS


def train(kind: str, lr: float | None, seed: int, data: tuple[Tensor, Tensor], iterations: int) -> History:
    """One run of "Adam" (the lower loop as in TorchOpt's example), "Adam above AutoSLS" or "BiSLS-SGD"."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    size, automatic, searched = data[0].shape[-1], kind.startswith("BiSLS"), kind != "Adam"
    net = network(size).train()
    inner_nets = [InnerNet(net, size, searched) for _ in range(TASKS)]
    meta: Any
    if automatic:
        lowers = [n.lower for n in inner_nets if n.lower is not None]
        meta = UpperStep(net.parameters(), lr=lr, lower=lowers, carry=False)
    else:
        assert lr is not None, "Adam has no step of its own"
        meta = torchopt.Adam(net.parameters(), lr=lr)
    history = History(f"{kind} {'none' if lr is None else f'{lr:g}'}", seed)
    for iteration in range(1, iterations + 1):
        started = time.perf_counter()
        tasks = [draw_task(data[0], generator) for _ in inner_nets]
        for inner_net, task in zip(inner_nets, tasks, strict=True):
            inner_net.reset_parameters()
            inner_net.solve(*task.support)

        def query_loss() -> Tensor:
            losses = [
                F.cross_entropy(n.net(task.query[0]), task.query[1]) for n, task in zip(inner_nets, tasks, strict=True)
            ]
            return torch.stack(losses).mean()

        if automatic:
            meta.step(query_loss)
            history.steps.append(float(meta.record.step_size))
            history.failed += meta.record.outcome.name == "search_failed"
        else:
            meta.zero_grad()
            query_loss().backward()
            meta.step()
        history.seconds += time.perf_counter() - started
        if iteration % EVALUATE_EVERY == 0 or iteration == iterations:
            history.iterations.append(iteration)
            history.accuracies.append(accuracy(net, size, searched, data[1]))
    return history


def characters(folder: str | None) -> tuple[Tensor, Tensor]:
    """Drawings of training and of test characters, (characters, drawings, height, width)."""
    sys.path.append(str(Path(__file__).parent / "benchmarks"))  # the benchmarks' reader
    from data import characters as read

    train_part, test_part = read(folder)
    return train_part, test_part


def mean_and_error(values: list[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def by_name(histories: list[History]) -> dict[str, list[History]]:
    grouped: dict[str, list[History]] = {}
    for h in histories:
        grouped.setdefault(h.name, []).append(h)
    return grouped


def table(histories: list[History]) -> str:
    """Query accuracy, mean and standard error over the seeds."""
    lines = [f"{'method':<22}{'accuracy':>10}{'+-':>8}{'failed searches':>18}{'seconds':>10}"]
    for name, runs in by_name(histories).items():
        mean, error = mean_and_error([h.final for h in runs])
        failed = sum(h.failed for h in runs) if name.startswith("BiSLS") else ""
        lines.append(f"{name:<22}{mean:>10.3f}{error:>8.3f}{failed:>18}{sum(h.seconds for h in runs):>10.1f}")
    return "\n".join(lines)


def draw(histories: list[History], title: str, path: Path) -> None:
    """Accuracy over the iterations, and at the end over first trials and learning rates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grouped = by_name(histories)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    shades: dict[str, Any] = {}
    for palette, chosen in (("Greens", True), ("Blues", False)):
        fixed = [n for n in grouped if n.startswith("Adam") and n.startswith(SEARCHED) is chosen]
        shades |= zip(fixed, plt.get_cmap(palette)(torch.linspace(0.4, 0.95, len(fixed)).tolist()), strict=True)
    for name, runs in grouped.items():
        means = [statistics.fmean(values) for values in zip(*(h.accuracies for h in runs), strict=True)]
        ours, none = name.startswith("BiSLS"), name.endswith("none")
        label = "BiSLS-SGD, no number" if none else None if ours else name
        color = "tab:red" if ours else shades[name]
        left.plot(
            runs[0].iterations, means, color=color, lw=2.2 if none else 1.3, label=label, alpha=1 if none else 0.8
        )
    for kind, color in (("Adam", "tab:blue"), (SEARCHED, "tab:green"), ("BiSLS-SGD", "tab:red")):
        points = [
            (float(name.split()[-1]), runs)
            for name, runs in grouped.items()
            if name.rpartition(" ")[0] == kind and not name.endswith("none")
        ]
        if not points:
            continue
        values = [mean_and_error([h.final for h in runs]) for _, runs in points]
        label = f"{kind}, {'first trial' if kind.startswith('BiSLS') else 'learning rate'}"
        right.errorbar(
            [lr for lr, _ in points],
            [m for m, _ in values],
            [e for _, e in values],
            color=color,
            marker="o",
            label=label,
        )
    if "BiSLS-SGD none" in grouped:
        mean, error = mean_and_error([h.final for h in grouped["BiSLS-SGD none"]])
        right.axhspan(mean - error, mean + error, color="tab:red", alpha=0.15)
        right.axhline(mean, color="tab:red", ls="--", label="BiSLS-SGD, no number")
    left.set(xlabel="upper iteration", ylabel="query accuracy on new characters", title=title)
    right.set(xscale="log", xlabel="learning rate or first trial", title="at the end (bars: standard error)")
    left.set_ylim(bottom=0.0)  # room for the legends
    for axes, columns in ((left, 2), (right, 1)):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="lower left", ncols=columns)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def number(text: str) -> float | None:
    return None if text == "none" else float(text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", help="folder with omniglot_small.npz (else the environment's, else digits)")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--first-trials", type=number, nargs="*", default=list(FIRST_TRIALS))
    parser.add_argument("--adam", type=float, nargs="*", default=list(ADAM), help="Adam's learning rates")
    parser.add_argument(
        "--adam-above-sls", type=float, nargs="*", default=[1e-3], help="the same, lower steps searched"
    )
    parser.add_argument("--figure", type=Path, help="PNG file")
    parser.add_argument("--output", type=Path, help="JSON file of all runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = characters(options.data)
    histories = []
    plan = (("BiSLS-SGD", options.first_trials), ("Adam", options.adam), (SEARCHED, options.adam_above_sls))
    for kind, rates in plan:
        for lr in rates:
            for seed in options.seeds:
                histories.append(train(kind, lr, seed, data, options.iterations))
                h = histories[-1]
                print(f"{h.name:<22} seed {seed}: query accuracy {h.final:.3f} in {h.seconds:.0f} s", flush=True)
    print("\n" + table(histories))
    title = f"iMAML, {WAYS} ways, {SHOTS} shots, {TASKS} tasks an iteration"
    if options.figure:
        draw(histories, title, options.figure)
        print(f"\n{options.figure}")
    if options.output:
        command = "python examples/torchopt_imaml.py " + shlex.join(
            arguments if arguments is not None else sys.argv[1:]
        )
        rows = [{**asdict(h), "final": h.final} for h in histories]
        options.output.write_text(
            json.dumps({"command": command.replace(str(options.data), "DIR"), "runs": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
