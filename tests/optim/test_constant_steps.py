"""With a constant step the optimizers are those of torch: Adam to rounding, SGD bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import SLS, SPSMax
from tests.optim.helpers import batches, closure_of, leaf, net, plain, quadratic


def adam_problem(x: Tensor) -> Tensor:
    return quadratic(x - 0.3) + torch.sin(3 * x).sum() + 10.0


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9), (0.5, 0.0)])
def test_a_constant_step_along_adam_is_torch_adam(betas: tuple[float, float]) -> None:
    x, y = leaf(), leaf()
    ours = SPSMax([x], 0.05, floor=0.05, direction="adam", betas=betas)
    theirs = torch.optim.Adam([y], lr=0.05, betas=betas)
    for k in range(50):
        before, gradient = x.detach().clone(), torch.autograd.grad(adam_problem(x), x)[0]
        ours.step(lambda: adam_problem(x))
        theirs.zero_grad()
        adam_problem(y).backward()
        theirs.step()
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)
        if k == 0:
            torch.testing.assert_close(x.detach(), before - 0.05 * gradient / (gradient.abs() + 1e-8))


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("kind", ["polyak", "search"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_constant_step_is_torch_sgd_bitwise(foreach: bool, kind: str, dtype: torch.dtype) -> None:
    models = [net(dropout=0.0).to(dtype) for _ in range(2)]
    data = [(x.to(dtype), t) for x, t in batches(10)]
    groups: Any = [
        [{"params": [*m.first.parameters()]}, {"params": [*m.norm.parameters(), *m.second.parameters()]}]
        for m in models
    ]
    for g in groups:
        g[1]["lr"] = 0.025
    ours: Any
    if kind == "polyak":
        ours = SPSMax(groups[0], 0.1, floor=0.1)
    else:
        ours = SLS(groups[0], 0.1, reset="initial", slack=1e9, lower_bound=None)
    theirs = torch.optim.SGD(groups[1], lr=0.1, foreach=foreach)
    for batch in data:
        ours.step(closure_of(models[0], batch))
        theirs.zero_grad()
        closure_of(models[1], batch)().backward()
        theirs.step()
        assert plain(models[0].state_dict()) == plain(models[1].state_dict())
    if kind == "search":
        assert ours.evaluations.lower.values == len(data)
