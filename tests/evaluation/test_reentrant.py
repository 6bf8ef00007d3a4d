"""Reentrant checkpoints, whose graph does not show which tensors are in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adaptive_bilevel import SLS, BiSPS
from tests.optim.helpers import OptimizerInfo, every_class, plain

_DATA = torch.randn(8, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class _Low(nn.Module):
    """A linear layer with a correction of low rank, of which that alone is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4).double().requires_grad_(False)
        self.down, self.up = nn.Linear(4, 2, bias=False).double(), nn.Linear(2, 4, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out.tanh()


def _parts(seed: int) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    return _Low(), nn.Linear(4, 1).double()


@every_class
@pytest.mark.parametrize("backwards", [0, 1, 2])
@pytest.mark.parametrize("twice", [False, True])
def test_the_gradient_is_that_without_a_checkpoint(info: OptimizerInfo, backwards: int, twice: bool) -> None:
    """Also of tensors that are used both inside and outside of it."""
    reached = []
    for reentrant in (False, True):
        body, head = _parts(0)
        inputs = _DATA.clone().requires_grad_()
        inputs.grad = held = torch.ones_like(inputs)
        params = [p for p in (*body.parameters(), *head.parameters()) if p.requires_grad]
        optimizer = info.make(params, None)

        def closure(body: Any = body, head: Any = head, inputs: Tensor = inputs, reentrant: bool = reentrant) -> Any:
            def loss_of(part: Tensor) -> Any:
                found = checkpoint(body, part, use_reentrant=True) if reentrant else body(part)
                found = found + body(part.detach()) if twice else found
                return head(found).square().mean()

            if backwards < 2:
                loss = loss_of(inputs)
                if backwards:
                    loss.backward()
                return loss
            total = 0.0
            for part in inputs.chunk(2):
                loss = 0.5 * loss_of(part)
                loss.backward()
                total += loss.item()
            return total

        for _ in range(3):
            optimizer.step(closure)
        assert inputs.grad is held and bool((held == 1.0).all())
        reached.append([p.detach() for p in params])
    torch.testing.assert_close(reached[0], reached[1])


def test_the_hypergradient_of_the_level_above_stays() -> None:
    x = torch.ones(4, dtype=torch.float64, requires_grad=True)
    body, head = _parts(1)
    inner: Any = SLS([p for p in (*body.parameters(), *head.parameters()) if p.requires_grad])
    outer = BiSPS([x], lower=inner)
    x.grad = torch.full_like(x, 0.5)
    before = plain([p for p in body.parameters() if p.requires_grad])
    inner.step(lambda: head(checkpoint(body, _DATA * x, use_reentrant=True)).square().mean() + x.square().sum())
    assert torch.equal(x.grad, torch.full_like(x, 0.5))
    assert plain([p for p in body.parameters() if p.requires_grad]) != before
    outer.step(lambda: x.square().sum())
