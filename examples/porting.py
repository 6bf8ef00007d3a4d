"""What the patterns of docs/porting.md cost and reach, against Adam with three learning rates on the same loop.

``python examples/porting.py`` takes half a minute on one core. One problem (a weight decay for each of 20 features, and
weights of 400 samples with 40 % wrong labels), three ways to the hypergradient:

* warm: tensors that the inner loop returns, going on from the last ones; the hypergradient is implicit.
* unrolled: the upper loss is differentiated through 30 steps from zero.
* penalty: F2SA's, two lower loops of 10 steps each, no product with a Hessian.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from adaptive_bilevel import BiSLS
from adaptive_bilevel.hypergradient import implicit

RATES = (0.01, 0.1, 1.0)


class Run(NamedTuple):
    """One iteration of a loop, and the loss it is judged by."""

    step: Callable[[], Any]
    judge: Callable[[], float]


def ridge() -> tuple[Tensor, Callable[[Any, Tensor], Tensor], Callable[[Any], Tensor]]:
    torch.manual_seed(0)
    X, X_val = torch.randn(60, 20), torch.randn(60, 20)
    t, t_val = X[:, :5].sum(1) + torch.randn(60), X_val[:, :5].sum(1) + torch.randn(60)

    def train_loss(y: Any, x: Tensor) -> Tensor:
        return ((X @ y[0] + y[1] - t) ** 2).mean() + (5.0 * x.sigmoid() * y[0] ** 2).sum()

    def val_loss(y: Any) -> Tensor:
        return ((X_val @ y[0] + y[1] - t_val) ** 2).mean()

    return torch.full((20,), -3.0, requires_grad=True), train_loss, val_loss


def descended(train_loss: Any, y: Any, x: Tensor, steps: int, create_graph: bool) -> list[Tensor]:
    for _ in range(steps):
        y = [p if create_graph and p.requires_grad else p.detach().requires_grad_() for p in y]
        slopes = torch.autograd.grad(train_loss(y, x), y, create_graph=create_graph)
        y = [p - 0.05 * s for p, s in zip(y, slopes, strict=True)]
    return y


def zeros() -> list[Tensor]:
    return [torch.zeros(20), torch.zeros(())]


def warm(rate: float | None) -> Run:
    x, train_loss, val_loss = ridge()
    outer: Any = BiSLS([x], direction="adam", hypergradient=implicit)
    if rate is not None:
        outer = torch.optim.Adam([x], lr=rate)
    y = zeros()

    def step() -> None:
        nonlocal y
        y = [p.detach().requires_grad_() for p in descended(train_loss, y, x, 30, False)]
        if rate is None:
            outer.step(val_loss, lower=(y, lambda y: train_loss(y, x)))
            y = outer.answer
        else:
            (x.grad,) = implicit(lambda: val_loss(y), lambda: train_loss(y, x), [x], y)
            outer.step()

    return Run(step, lambda: float(val_loss(descended(train_loss, zeros(), x, 500, False)).detach()))


def unrolled(rate: float | None) -> Run:
    x, train_loss, val_loss = ridge()
    outer: Any = BiSLS([x], direction="adam", hypergradient="direct")
    if rate is not None:
        outer = torch.optim.Adam([x], lr=rate)

    def upper() -> Tensor:
        return val_loss(descended(train_loss, zeros(), x, 30, True))

    def step() -> None:
        if rate is None:
            outer.step(upper)
        else:
            outer.zero_grad()
            upper().backward()
            outer.step()

    return Run(step, lambda: float(upper().detach()))


def penalty(rate: float | None) -> Run:
    torch.manual_seed(0)
    truth, X, X_val = torch.randn(100, 10), torch.randn(400, 100), torch.randn(200, 100)
    wrong = torch.rand(400) < 0.4
    t = torch.where(wrong, torch.randint(0, 10, (400,)), (X @ truth).argmax(1))
    t_val, weight = (X_val @ truth).argmax(1), 10.0
    x = torch.zeros(400, requires_grad=True)
    y, z = (torch.zeros(100, 10, requires_grad=True) for _ in range(2))

    def g(x: Tensor, w: Tensor) -> Tensor:
        return (x.sigmoid() * cross_entropy(X @ w, t, reduction="none")).mean() + 1e-3 * (w**2).sum()

    def f(w: Tensor) -> Tensor:
        return cross_entropy(X_val @ w, t_val)

    lower = {"y": torch.optim.SGD([y], lr=2.0 / weight), "z": torch.optim.SGD([z], lr=2.0)}
    outer: Any = BiSLS([x], direction="adam", hypergradient="direct")
    if rate is not None:
        outer = torch.optim.Adam([x], lr=rate)

    def upper() -> Tensor:
        return f(y) + weight * (g(x, y) - g(x, z))

    def descend(name: str, loss: Callable[[], Tensor]) -> None:
        lower[name].zero_grad()
        loss().backward()
        lower[name].step()

    def step() -> None:
        held = x.detach()
        for _ in range(10):
            descend("y", lambda: f(y) + weight * g(held, y))
            descend("z", lambda: g(held, z))
        if rate is None:
            outer.step(upper)
        else:
            outer.zero_grad()
            upper().backward(inputs=[x])
            outer.step()

    def judge() -> float:
        held = x.detach()
        for _ in range(300):
            descend("z", lambda: g(held, z))
        return float(f(z).detach())

    return Run(step, judge)


PATTERNS: dict[str, Callable[[float | None], Run]] = {"warm": warm, "unrolled": unrolled, "penalty": penalty}


def measured(pattern: str, rate: float | None, iterations: int) -> tuple[float, float]:
    """Return the loss at the end, and milliseconds of CPU per iteration."""
    run = PATTERNS[pattern](rate)
    began = time.process_time()
    for _ in range(iterations):
        run.step()
    cost = 1e3 * (time.process_time() - began) / iterations
    return run.judge(), cost


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=60)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = {}
    names = [*(f"Adam {rate:g}" for rate in RATES), "BiSLS-Adam"]
    print(" " * 10 + "".join(f"{name:>18}" for name in names) + f"{'CPU ratio':>11}")
    for pattern in PATTERNS:
        cells = [measured(pattern, rate, arguments.iterations) for rate in (*RATES, None)]
        ratio = cells[-1][1] / min(cost for _, cost in cells[:-1])
        found[pattern] = cells
        row = "".join(f"{f'{loss:.3f} ({cost:.1f} ms)':>18}" for loss, cost in cells)
        print(f"{pattern:10}{row}{ratio:11.2f}")
    return found


if __name__ == "__main__":
    main()
