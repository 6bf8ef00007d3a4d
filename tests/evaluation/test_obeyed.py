"""A closure is obeyed: what it leaves in ``.grad`` is stepped along, and the slope along it is that of its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive_bilevel import SLS, BiSLS, BiSPS
from adaptive_bilevel.hypergradient import assign, implicit
from tests.optim.helpers import OptimizerInfo, every_class, leaf, plain, quadratic


def _centralized(x: Tensor) -> None:
    assert x.grad is not None
    x.grad.sub_(x.grad.mean())


def _clipped_by_norm(x: Tensor) -> None:
    nn.utils.clip_grad_norm_([x], 0.5)


def _clipped_by_value(x: Tensor) -> None:
    nn.utils.clip_grad_value_([x], 7.0)


def _through_data(x: Tensor) -> None:
    assert x.grad is not None
    x.grad.data.mul_(torch.tensor([2.0, 0.5], dtype=x.dtype))


def _replaced(x: Tensor) -> None:
    assert x.grad is not None
    x.grad = torch.sign(x.grad)


_CHANGES: list[Callable[[Tensor], None]] = [_centralized, _clipped_by_norm, _clipped_by_value, _through_data, _replaced]


@every_class
@pytest.mark.parametrize("change", _CHANGES)
@pytest.mark.parametrize("parts", [1, 3])
def test_the_step_is_along_what_the_closure_leaves(
    info: OptimizerInfo, change: Callable[[Tensor], None], parts: int
) -> None:
    x = leaf()
    optimizer = info.make([x], None)
    seen: list[Tensor] = []

    def closure() -> Any:
        optimizer.zero_grad()
        total = 0.0
        for _ in range(parts):
            loss = quadratic(x) / parts
            loss.backward()
            total += loss.item()
        change(x)
        assert x.grad is not None
        seen.append(x.grad.clone())
        return total if parts > 1 else loss

    for _ in range(3):
        before, first = x.detach().clone(), len(seen)
        (own,) = torch.autograd.grad(quadratic(before.requires_grad_()), before)
        optimizer.step(closure)
        record, along = optimizer.record, seen[first]
        assert record.moved
        torch.testing.assert_close(x.detach(), before.detach() - record.step_size * along)
        assert float(record.slope) == pytest.approx(float((own * along).sum()))
    assert x.grad is None


@every_class
def test_what_is_changed_between_two_backwards_stays_changed(info: OptimizerInfo) -> None:
    """As of one micro-batch whose gradient is clipped before the next one is added."""
    x = leaf()
    optimizer = info.make([x], None)

    def closure() -> float:
        (0.5 * quadratic(x)).backward()
        assert x.grad is not None
        x.grad[1] = 0.0
        (0.5 * quadratic(x)).backward()
        return quadratic(x).item()

    before = x.detach().clone()
    optimizer.step(closure)
    own = torch.autograd.grad(quadratic(before.requires_grad_()), before)[0]
    along = own * torch.tensor([1.0, 0.5])
    assert float(optimizer.record.slope) == pytest.approx(float((own * along).sum()))
    torch.testing.assert_close(x.detach(), before.detach() - optimizer.record.step_size * along)


@every_class
def test_entries_without_a_gradient_stand_still(info: OptimizerInfo) -> None:
    x, z = leaf(), leaf()
    optimizer = info.make([x, z], None)

    def closure() -> Any:
        loss = quadratic(x) + quadratic(z)
        loss.backward()
        z.grad = None
        return loss

    optimizer.step(closure)
    assert torch.equal(z, leaf()) and not torch.equal(x, leaf())


@every_class
def test_a_direction_that_climbs_is_not_taken(info: OptimizerInfo) -> None:
    x = leaf()
    optimizer = info.make([x], 0.1)

    def closure() -> Any:
        loss = quadratic(x)
        loss.backward()
        assert x.grad is not None
        x.grad.neg_()
        return loss

    with pytest.warns(match="does not descend"):
        optimizer.step(closure)
    assert torch.equal(x, leaf())


@every_class
def test_a_scaled_loss_that_is_unscaled_and_clipped(info: OptimizerInfo) -> None:
    points = []
    for scale in (1.0, 1024.0):
        x = leaf()
        optimizer = info.make([x], None)

        def closure(x: Any = x, scale: float = scale) -> Any:
            loss = quadratic(x)
            (loss * scale).backward()
            x.grad /= scale
            nn.utils.clip_grad_norm_([x], 2.0)
            return loss

        for _ in range(3):
            optimizer.step(closure)
        points.append(x.detach())
    torch.testing.assert_close(*points)


def test_what_a_trial_finds_in_grad_is_a_copy() -> None:
    """A closure may write there whatever it likes: the step is along what it left at the point itself."""
    points = []
    for factor in (1.0, 0.0):
        x = leaf()
        optimizer, calls = SLS([x], 1e3), [0]

        def closure(x: Any = x, factor: float = factor, calls: Any = calls) -> Any:
            loss = quadratic(x)
            loss.backward()
            assert x.grad.abs().sum() > 0
            if calls[0]:
                x.grad.mul_(factor)
            calls[0] += 1
            return loss

        optimizer.step(closure)
        assert optimizer.record is not None and optimizer.record.trials > 2
        points.append(x.detach())
    assert torch.equal(*points)


@pytest.mark.parametrize("cls", [BiSLS, BiSPS])
def test_closures_of_both_levels_may_look_at_gradients(cls: Any) -> None:
    reached = []
    for looks in (False, True):
        x, y = leaf(), leaf()
        inner = SLS([y])
        outer = cls([x], lower=inner)

        def g(x: Any = x, y: Any = y) -> Any:
            return (y - x).square().sum() + quadratic(y)

        def f(x: Any = x, y: Any = y) -> Any:
            return (y - 1.0).square().sum() + 0.1 * x.square().sum()

        def read(loss: Any, tensor: Any, looks: bool = looks) -> Any:
            if looks:
                loss.backward()
                assert tensor.grad.norm() >= 0.0
            return loss

        for _ in range(3):
            for _ in range(3):
                inner.step(lambda g=g, read=read, y=y: read(g(), y))  # type: ignore[misc]
            assign([x], implicit(f, g, [x], [y]))
            outer.step(lambda f=f, read=read, x=x: read(f(), x))
        reached.append(plain([x, y]))
    assert reached[0] == reached[1]
