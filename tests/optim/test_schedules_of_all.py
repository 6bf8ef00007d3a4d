"""A schedule is a factor, on every class: where it has fallen to next to nothing, next to nothing moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

from adaptive_bilevel import SLS, BiSLS, BiSPS, OneStepBiSLS
from adaptive_bilevel.hypergradient import assign, implicit
from tests.optim.helpers import CLASSES

pytestmark = pytest.mark.filterwarnings(
    "ignore:OneStepBiSLS.*no trial step",  # as its searched function may
    "ignore:.*stands still",  # as it is told to
)

SMALL, HALF, STEPS = 1e-8, 6, 12


def fallen(k: int) -> float:
    return 1.0 if k < HALF else SMALL


def cosine(o: Any) -> Any:
    return lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=SMALL * o.param_groups[0]["lr"])


def one_cycle(o: Any) -> Any:
    lr = o.param_groups[0]["lr"]
    return lr_scheduler.OneCycleLR(
        o, lr, total_steps=STEPS + 1, pct_start=0.1, cycle_momentum=False, final_div_factor=1e8
    )


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, fallen),
    "steps": lambda o: lr_scheduler.MultiStepLR(o, [HALF], gamma=SMALL),
    "cosine": cosine,
    "one cycle": one_cycle,
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=1e-3, patience=1, threshold=1e9, min_lr=0.0, eps=0.0),
    "warm-up": lambda o: lr_scheduler.LinearLR(o, SMALL, total_iters=10**9),
}


def lengths(cls: Any, lr: float | None, scheduler: Callable[[Any], Any]) -> list[float]:
    """Return how far each step moves."""
    x = torch.tensor([3.0, -2.0, 1.5], dtype=torch.float64, requires_grad=True)
    y = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    upper = cls in (BiSLS, BiSPS, OneStepBiSLS)
    inner = SLS([y])
    optimizer: Any = cls([x], lr, **({"lower": inner} if upper else {}))
    schedule, weights, moved = scheduler(optimizer), torch.tensor([1.0, 0.3, 0.05], dtype=torch.float64), []

    def g() -> Tensor:
        return 0.5 * ((y - x) ** 2).sum()

    def f() -> Tensor:
        return 0.5 * (weights * ((y if upper else x) + 1.0) ** 2).sum()

    for k in range(STEPS + 1):
        if upper:
            for _ in range(20):
                inner.step(g)
            assign([x], implicit(f, g, [x], [y]))
        before = x.detach().clone()
        loss = optimizer.step(f)
        moved.append(float((x.detach() - before).norm()))
        if k < STEPS:
            schedule.step(*([float(loss)] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else []))
    return moved


@pytest.mark.parametrize("cls", [*(info.cls for info in CLASSES), BiSLS, BiSPS, OneStepBiSLS], ids=lambda c: c.__name__)
@pytest.mark.parametrize("lr", [0.3, None])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_next_to_nothing_moves(cls: Any, lr: float | None, name: str) -> None:
    moved = lengths(cls, lr, SCHEDULERS[name])
    whole = lengths(cls, lr, lambda o: lr_scheduler.LambdaLR(o, lambda k: 1.0))
    assert moved[-1 if name != "warm-up" else 0] < 1e-3 * max(whole)
