"""Which rule for the lower level: the searches and Polyak's rule with no number, and grids and peers, on single levels.

    python examples/benchmarks/lower_rules.py [--data DIR] [--output FILE] [--quick]

An MLP 64-64-64-10 on digits with batches of 32, with true labels and with 40 % of them drawn at random; logistic
regression with wrong labels on batches of 8 and with none on batches of 64; ridge regression, softmax regression and a
network on full batches; with a data folder, w8a and a9a on batches of 100. Figures are medians over the seeds of the
final training loss (less the least one, for the regressions that have one) and of the test accuracy where there is one.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import statistics
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

import data
from adaptive_bilevel import SLS, SLSB, SPSB, AutoSLS
from adaptive_bilevel.errors import AdaptiveBilevelWarning
from methods import PEERS, Unavailable, plain_step, single_peer

Make = Callable[[list[Tensor]], Callable[[Callable[[], Tensor]], Any]]
"""Takes the parameters, and returns a step from a closure."""

DIRECTIONS = ("sgd", "adam")
LEARNING_RATES = (1e-4, 1e-3, 1e-2, 1e-1)
PARTS = ("ordered", "shuffled")
"""How digits are parted: by writer, in the order they come in (1,300 and 497), or shuffled (1,500 and 297)."""

KINDS = ("ridge", "softmax", "network")


def ours(rule: type[Any], direction: str, params: list[Tensor]) -> Callable[[Callable[[], Tensor]], Any]:
    return plain_step(rule(params, direction=direction), params)


def adam(lr: float, params: list[Tensor]) -> Callable[[Callable[[], Tensor]], Any]:
    return plain_step(torch.optim.Adam(params, lr=lr), params)


def other(name: str, params: list[Tensor]) -> Callable[[Callable[[], Tensor]], Any]:
    _, step = single_peer(*PEERS[name], params)
    return lambda closure: step(closure, closure)


METHODS: dict[str, Make] = {
    **{f"{rule.__name__}, {d}": partial(ours, rule, d) for d in DIRECTIONS for rule in (SLS, SLSB, SPSB, AutoSLS)},
    **{f"Adam {lr:g}": partial(adam, lr) for lr in LEARNING_RATES},
    **{name: partial(other, name) for name in ("prodigy", "momo-adam")},
}


def digits(parts: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if parts == "shuffled":
        content = data.images(None)
        return content.x.flatten(1), content.y, content.test_x.flatten(1), content.test_y
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = torch.from_numpy(bunch.data).float() / 16, torch.from_numpy(bunch.target).long()
    return x[:1300], y[:1300], x[1300:], y[1300:]


def mlp(make: Make, seed: int, parts: str, noise: float, epochs: int) -> tuple[float, ...]:
    x, y, test_x, test_y = digits(parts)
    random = torch.Generator().manual_seed(seed)
    drawn = torch.rand(len(y), generator=random) < noise
    y = torch.where(drawn, torch.randint(10, (len(y),), generator=random), y)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def loss(rows: Tensor) -> Tensor:
        return cross_entropy(model(x[rows]), y[rows])

    step = make(list(model.parameters()))
    for _ in range(epochs):
        for batch in torch.randperm(len(y), generator=random).split(32):
            step(partial(loss, batch))
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).double().mean()
        return float(cross_entropy(model(x), y)), float(accuracy)


def logistic(make: Make, seed: int, size: int, noise: float, epochs: int) -> tuple[float, ...]:
    """Of 500 points in 20 features with scales from 1 to .1; above the least loss, which is 0 without wrong labels."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(500, 20, generator=random) * torch.logspace(0, -1, 20)
    y = torch.sign(x @ torch.randn(20, generator=random))
    y[torch.rand(500, generator=random) < noise] *= -1
    w = torch.zeros(20, requires_grad=True)

    def loss(rows: Tensor | slice = slice(None)) -> Tensor:
        return softplus(-y[rows] * (x[rows] @ w)).mean()

    def now() -> float:
        return float(loss().detach())

    least = 0.0
    if noise:
        solver = torch.optim.LBFGS([w], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-7)

        def closure() -> Tensor:
            solver.zero_grad()
            value = loss()
            value.backward()
            return value

        solver.step(closure)
        least = now()
        w.data.zero_()
    step = make([w])
    for _ in range(epochs * 500 // size):
        drawn = torch.randint(500, (size,), generator=random)
        step(partial(loss, drawn))
    return (now() - least,)


def full_batch(make: Make, seed: int, kind: str, steps: int) -> tuple[float, ...]:
    """A lower problem with a small penalty, whose sample is always the same."""
    x, y, _, _ = digits("shuffled")
    torch.manual_seed(seed)
    hidden = [nn.Linear(64, 64), nn.ReLU()] if kind == "network" else []
    model = nn.Sequential(*hidden, nn.Linear(64, 1 if kind == "ridge" else 10))
    params: list[Tensor] = list(model.parameters())

    def loss() -> Tensor:
        penalty = 1e-3 * torch.stack([p.square().sum() for p in params]).sum()
        if kind == "ridge":
            return 0.5 * (model(x)[:, 0] - y / 9).square().mean() + penalty
        return cross_entropy(model(x), y) + penalty

    step = make(params)
    for _ in range(steps):
        step(loss)
    return (float(loss().detach()),)


def rows(make: Make, seed: int, name: str, folder: str | None, epochs: int) -> tuple[float, ...]:
    (x, y), _ = data.classification(name, folder)
    random, w = torch.Generator().manual_seed(seed), torch.zeros(x.shape[1], requires_grad=True)

    def loss(rows: Tensor | slice) -> Tensor:
        return softplus(-y[rows] * (x[rows] @ w)).mean()

    step = make([w])
    for _ in range(epochs):
        for batch in torch.randperm(len(y), generator=random).split(100):
            step(partial(loss, batch))
    return (float(loss(slice(None)).detach()),)


def problems(folder: str | None, quick: bool) -> dict[str, Callable[[Make, int], tuple[float, ...]]]:
    epochs, steps = (1, 5) if quick else (10, 100)
    sets = ("w8a", "a9a") if folder else ()
    return {
        **{
            f"MLP, {parts} digits, {noise:.0%} noise": partial(mlp, parts=parts, noise=noise, epochs=epochs)
            for parts in PARTS
            for noise in (0.0, 0.4)
        },
        "logistic, batch 8, 30% noise": partial(logistic, size=8, noise=0.3, epochs=3 * epochs),
        "logistic, batch 64, separable": partial(logistic, size=64, noise=0.0, epochs=25 * epochs),
        **{f"full batch, {kind}": partial(full_batch, kind=kind, steps=steps) for kind in KINDS},
        **{f"{name}, batch 100": partial(rows, name=name, folder=folder, epochs=5) for name in sets},
    }


def measure(folder: str | None, seeds: Sequence[int], quick: bool) -> dict[str, dict[str, list[float]]]:
    table: dict[str, dict[str, list[float]]] = {}
    for problem, train in problems(folder, quick).items():
        row = table[problem] = {}
        for name, make in METHODS.items():
            try:
                results = [train(make, seed) for seed in seeds]
            except Unavailable as reason:
                print(f"skipped: {reason}", flush=True)
                continue
            row[name] = [float(f"{statistics.median(column):.4g}") for column in zip(*results, strict=True)]
            print(f"{problem:<32}{name:<16}" + "".join(f"{figure:>12.4g}" for figure in row[name]), flush=True)
    return table


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the data sets (else the environment's, else none)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="an epoch: does it run?")
    default = Path(__file__).parent / "results" / "lower_rules.json"
    parser.add_argument("--output", type=Path, default=default, help="JSON file of the results")
    arguments = parser.parse_args(given)
    torch.set_num_threads(1)
    folder = data.folder(arguments.data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdaptiveBilevelWarning)
        table = measure(None if folder is None else str(folder), arguments.seeds, arguments.quick)
    words = ["python", "examples/benchmarks/lower_rules.py", *["--data", "DIR"] * bool(folder)]
    words += ["--quick"] * arguments.quick + ["--seeds", *map(str, arguments.seeds)]
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    content = {"command": shlex.join(words), **versions, "problems": table}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1)
    text = re.sub(r"\[\s+([^]]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)  # figures on one line
    arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    main()
