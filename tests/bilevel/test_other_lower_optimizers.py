"""BiSLS above lower optimizers of others: it is told the closure, y is not predicted, and the upper loss sees y."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import BiSLS
from adaptive_bilevel.hypergradient import assign, implicit


class TwoPoints(torch.optim.SGD):
    """The interface of schedule-free optimizers: gradients at y in train(), the mean of the iterates in eval()."""

    def __init__(self, params: list[Tensor], lr: float) -> None:
        super().__init__(params, lr=lr)
        self.training, self.taken = True, 0
        self.means = [p.detach().clone() for p in params]

    def step(self, closure: Any = None) -> Any:
        if not self.training:
            raise RuntimeError("not in train mode")
        super().step(closure)
        self.taken += 1
        for mean, p in zip(self.means, self.param_groups[0]["params"], strict=True):
            mean.lerp_(p.detach(), max(1.0 / self.taken, 0.2))

    def _swap(self, training: bool) -> None:
        if self.training != training:
            for i, p in enumerate(self.param_groups[0]["params"]):
                self.means[i], p.data = p.data, self.means[i]
            self.training = training

    def train(self) -> None:
        self._swap(True)

    def eval(self) -> None:
        self._swap(False)


MAKERS = {
    "amsgrad": lambda y: torch.optim.Adam([y], lr=0.2, amsgrad=True),
    "two points": lambda y: TwoPoints([y], lr=0.5),
}


@pytest.mark.parametrize("name", MAKERS)
def test_bisls_above_another_lower_optimizer(name: str) -> None:
    """f = (y - 1)^2 / 2 with y*(x) = x: x goes to 1, and each call is counted."""
    x, y = (torch.nn.Parameter(torch.tensor([v], dtype=torch.float64)) for v in (-1.0, 0.0))
    inner: Any = MAKERS[name](y)
    outer: Any = BiSLS([x], lower=inner)

    def lower() -> Tensor:
        return 0.5 * (y - x).square().sum()

    seen: list[float] = []
    calls = 0

    def upper() -> Tensor:
        seen.append(float(y.detach()))
        return 0.5 * (y - 1.0).square().sum()

    for _ in range(40):
        for _ in range(50):
            inner.zero_grad()
            lower().backward()
            inner.step()
        if name == "two points":
            inner.eval()  # the hypergradient and the upper step are about the mean
        rest = y.detach().clone()
        assign([x], implicit(upper, lower, [x], [y]))
        seen.clear()
        outer.step(upper, lower)
        calls += len(seen)
        assert seen[0] == float(rest)
        if name == "two points":
            inner.train()
    assert outer.evaluations.upper.gradients + outer.evaluations.upper.values == calls
    assert outer.evaluations.lower.hvps + outer.evaluations.lower.jvps > 0
    assert float(0.5 * (x.detach() - 1.0).square()) < 0.02
