"""Ctrl-C at any line of a step: the process stays usable. ``python -m tests.interrupts 500`` tries 500 random lines.

A `KeyboardInterrupt` is raised at a random line of the package inside a step, by ``sys.settrace``. Afterwards all must
be as before the step or as after it (an interrupt may come when all is done): the parameters, all of them alike, and
``.grad``, buffers and random state, each. Torch's ``backward`` and ``zero_grad`` must work, and the run must go on.
"""

from __future__ import annotations

import collections
import random
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaptive_bilevel import SLS, SLSB, SPSB, AutoSLS, BiSLS, BiSPS, DecSPS, SPSMax
from adaptive_bilevel.bilevel import OneStepBiSLS
from adaptive_bilevel.evaluation import interception
from adaptive_bilevel.hypergradient import assign, implicit

LOWER = [SLS, SLSB, AutoSLS, SPSMax, SPSB, DecSPS]
UPPER = [BiSLS, OneStepBiSLS, BiSPS]
CLASSES: list[Any] = [*LOWER, *UPPER, implicit]


class Run(NamedTuple):
    """A step that can be interrupted.

    Attributes:
        step: Takes it.
        tensors: What it may move, and buffers.
        leaves: Those with a ``.grad``.
        moved: The number of parameters, which come first in `seen`.
    """

    step: Callable[[], Any]
    tensors: list[Tensor]
    leaves: list[Tensor]
    moved: int


def make(cls: Any) -> Run:
    """Return a step of a class on a network with BatchNorm and dropout, after two steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 1)).double()
    data, target = torch.randn(8, 3).double(), torch.randn(8, 1).double()
    x = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    weights = list(model.parameters())

    def lower() -> Tensor:
        penalty = (x.exp() * (weights[0] ** 2).sum(1)).sum()
        return (model(data) - target).square().mean() + 0.1 * penalty

    def upper() -> Tensor:
        return (model(data) - target.flip(0)).square().mean() + 0.01 * (x**2).sum()

    inner = (cls if cls in LOWER else SLS)(weights)
    if cls in LOWER:
        step: Callable[[], Any] = lambda: inner.step(lower)  # noqa: E731
    elif cls is implicit:
        step = lambda: implicit(upper, lower, [x], weights)  # noqa: E731
    else:
        outer = cls([x], lower=inner)
        step = lambda: outer.step(upper)  # noqa: E731
        inner.step(lower)
        assign([x], implicit(upper, lower, [x], weights))
    for _ in range(2):
        inner.step(lower)
        if cls not in LOWER:
            step()
    for p in weights:
        p.grad = torch.full_like(p, 7.0)
    return Run(step, [x.detach(), *(p.detach() for p in weights), *model.buffers()], [x, *weights], 1 + len(weights))


def seen(run: Run) -> list[Any]:
    """Return copies of all that a step may touch."""
    grads = [None if p.grad is None else p.grad.clone() for p in run.leaves]
    return [*(t.clone() for t in run.tensors), torch.get_rng_state(), *grads]


def same(left: list[Any], right: list[Any]) -> bool:
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(left, right, strict=True))


class Interrupting:
    """Raises at the n-th line traced; without n, it counts lines."""

    def __init__(self, at: int | None) -> None:
        self.at, self.lines, self.where = at, 0, ""

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith("adaptive_bilevel"):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                self.where = f"{name}:{frame.f_lineno}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


def traced(run: Run, at: int | None) -> Interrupting:
    """Run a step, interrupted."""
    tracer = Interrupting(at)
    outer = sys.gettrace()
    sys.settrace(tracer)
    try:
        run.step()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(outer)
    return tracer


def faults(cls: Any, at: int, after: list[Any]) -> tuple[str, list[str]]:
    """Interrupt a step of a class at a line, and return where, and what is wrong then.

    Args:
        cls: The class.
        at: The line's number.
        after: What `seen` returns after a step that is not interrupted.
    """
    backward = torch.autograd.backward
    run = make(cls)
    before = seen(run)
    where = traced(run, at).where
    now, found = seen(run), list[str]()
    moved = run.moved
    if not (same(now[:moved], before[:moved]) or same(now[:moved], after[:moved])):
        found.append("parameters are neither as before nor as after")
    others = zip(now[moved:], before[moved:], after[moved:], strict=True)
    if not all(same([n], [b]) or same([n], [a]) for n, b, a in others):
        found.append("buffers, random state or .grad are neither as before nor as after")
    if torch.autograd.backward is not backward:
        found.append("torch.autograd.backward is patched")
        torch.autograd.backward = backward
    if interception._here.recorder is not None:
        found.append("a recorder is left")
    if not torch.is_grad_enabled():
        found.append("gradients are off")
        torch.set_grad_enabled(True)
    p = torch.ones(2, requires_grad=True)
    (p**2).sum().backward()
    if p.grad is None or not torch.equal(p.grad, torch.full((2,), 2.0)):
        found.append("backward is broken")
    optimizer = torch.optim.SGD([p], 0.1)
    optimizer.zero_grad()
    if p.grad is not None:
        found.append("zero_grad is broken")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.step()
    return where, found


def survey(count: int, seed: int = 0) -> tuple[int, dict[str, int]]:
    """Return how many random interrupts were made, and the faults, with how often."""
    draws, found, made = random.Random(seed), collections.Counter[str](), 0
    names: dict[Any, str] = {cls: cls.__name__ for cls in CLASSES}
    known: dict[Any, tuple[int, list[Any]]] = {}
    for i in range(count):
        cls = CLASSES[i % len(CLASSES)]
        if cls not in known:
            run = make(cls)
            lines = traced(run, None).lines
            known[cls] = lines, seen(run)
        lines, after = known[cls]
        where, wrong = faults(cls, draws.randint(1, lines), after)
        made += bool(where)
        for fault in wrong:
            found[f"{names[cls]} at {where}: {fault}"] += 1
    return made, dict(found)


if __name__ == "__main__":
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    interrupts, wrong = survey(number)
    for text, times in sorted(wrong.items()):
        print(f"{times} x {text}")
    print(f"{interrupts} interrupts of {len(CLASSES)} kinds of steps, {sum(wrong.values())} faults")
