"""What project= takes and is given: callables that work in place, groups, tensors that stay, empty ones, numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaptive_bilevel import BiSLS
from adaptive_bilevel.errors import OptionError, TensorError
from adaptive_bilevel.optim.projection import Ball, Simplex
from tests.bilevel.helpers import STAYING, clamp
from tests.problems import vector

pytestmark = pytest.mark.filterwarnings("ignore:.*no trial step gave", "ignore:.*slope is negative")


@pytest.mark.parametrize(
    "wrong",
    [lambda tensors: [t.clamp(0, 1) for t in tensors], lambda tensors: tensors[0].clamp(0, 1)],
    ids=["list", "tensor"],
)
def test_a_projection_that_returns_instead(wrong: Any) -> None:
    x = torch.tensor([2.0], requires_grad=True)
    outer = BiSLS([x], 1.0, project=wrong)
    x.grad = torch.ones(1)
    with pytest.raises(OptionError, match=r"project=.*in place, e\.g\."):
        outer.step(lambda: x.square().sum())
    assert x.item() == 2.0


@pytest.mark.parametrize(
    "right",
    [
        lambda tensors: [t.clamp_(0, 1) for t in tensors],
        lambda tensors: tensors[0].clamp_(0, 1),
        lambda tensors: torch._foreach_clamp_max_(tensors, 1.0),
    ],
    ids=["list", "tensor", "foreach"],
)
def test_projections_that_work_in_place(right: Any) -> None:
    x = torch.tensor([1.0], requires_grad=True)
    outer: Any = BiSLS([x], 1.0, project=right)
    x.grad = -torch.ones(1)
    outer.step(lambda: (x - 3).square().sum())
    assert x.item() == 1.0
    x.grad = torch.ones(1)
    outer.step(lambda: x.square().sum())
    assert 0.0 <= x.item() < 1.0


@pytest.mark.parametrize("project", [Simplex(), clamp])
@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("rate", [0.0, 1e-6])
def test_projected_groups_keep_the_ratio_of_their_rates(project: Any, direction: str, rate: float) -> None:
    x, z = vector([0.9, 0.1]).requires_grad_(), vector([0.3, 0.7] if isinstance(project, Simplex) else [0.1, 0.2])
    z.requires_grad_()
    before = z.detach().clone()
    groups = [{"params": [x], "lr": 1.0}, {"params": [z], "lr": rate}]
    outer: Any = BiSLS(groups, 1.0, lower=None, project=project, direction=direction)
    loss = lambda: 10.0 * ((x + 3.0).square().sum() + (z[0] + 2.0 - z[1]).square())  # noqa: E731
    loss().backward()
    outer.step(loss)
    assert float((z.detach() - before).abs().max()) <= 1e-3 * rate / 1e-6


@pytest.mark.parametrize("how", ["frozen", "no gradient", "lr of 0"])
@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("kind", STAYING)
def test_parameters_that_do_not_move_are_not_projected(kind: str, direction: str, how: str) -> None:
    """They are a part of the set all the same: what a ball leaves to the others is what they leave of its radius."""
    x, still = vector([0.2, 0.1]).requires_grad_(), vector([0.6, 2.0] if kind != "ball" else [0.6, 0.0])
    still.requires_grad_(how != "frozen")
    before = still.detach().clone()
    groups = [{"params": [x], "lr": 1.0}, {"params": [still], "lr": 0.0 if how == "lr of 0" else 1.0}]
    outer: Any = BiSLS(groups, 1.0, lower=None, project=STAYING[kind], direction=direction)
    loss = lambda: (x - vector([3.0, 4.0])).square().sum()  # noqa: E731
    for _ in range(30):
        x.grad, still.grad = torch.autograd.grad(loss(), x)[0], torch.ones(2) if how == "lr of 0" else None
        outer.step(loss)
    assert torch.equal(still, before)
    expected = {"box": [0.25, 0.25], "callable": [0.25, 0.25], "ball": [0.48, 0.64], "simplex": [0.0, 1.0]}[kind]
    assert torch.allclose(x.detach(), vector(expected), atol=1e-6)


def test_a_ball_that_is_full_without_the_moving_ones() -> None:
    x, still = vector([0.5, 0.5]).requires_grad_(), vector([3.0])
    outer: Any = BiSLS([x, still], 1.0, lower=None, project=Ball(2.0))
    x.grad = vector([1.0, 1.0])
    outer.step(lambda: (x - 3.0).square().sum())
    assert torch.equal(x, vector([0.0, 0.0]))
    assert torch.equal(still, vector([3.0]))


def test_a_ball_of_any_size_with_some_that_stay() -> None:
    x, still = vector([0.5, 0.5]).requires_grad_(), vector([3.0])
    outer: Any = BiSLS([x, still], 1.0, lower=None, project=Ball(1e200))
    for _ in range(3):
        x.grad = 2.0 * (x.detach() - 3.0)
        outer.step(lambda: (x - 3.0).square().sum())
    assert torch.allclose(x.detach(), vector([3.0, 3.0]))


def test_a_callable_that_fails_leaves_all_as_it_was() -> None:
    def project(tensors: Any) -> None:
        for t in tensors:
            t.fill_(7.0)
        raise ValueError("no")

    x, still = vector([0.5, 0.5]).requires_grad_(), vector([3.0])
    outer: Any = BiSLS([x, still], 1.0, lower=None, project=project)
    x.grad = vector([1.0, 1.0])
    with pytest.raises(ValueError, match="no"):
        outer.step(lambda: x.square().sum())
    assert torch.equal(x, vector([0.5, 0.5]))
    assert torch.equal(still, vector([3.0]))


def test_a_simplex_of_numbers() -> None:
    x, z = vector([0.5, 0.7]).requires_grad_(), torch.tensor(0.3, requires_grad=True)
    outer: Any = BiSLS([x, z], 1.0, lower=None, project=Simplex())
    x.grad, z.grad = torch.ones(2), torch.ones(())
    with pytest.raises(TensorError, match=r"shape \(\).*last dimension.*torch\.zeros\(3\)"):
        outer.step(lambda: x.square().sum() + z)
    assert torch.equal(x, vector([0.5, 0.7]))
    assert z.item() == pytest.approx(0.3)


@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("kind", STAYING)
def test_empty_tensors_among_others(kind: str, direction: str) -> None:
    x, none = vector([0.2, 0.1]).requires_grad_(), torch.zeros(0, requires_grad=True)
    outer: Any = BiSLS([none, x], lower=None, project=STAYING[kind], direction=direction)
    for _ in range(10):
        x.grad, none.grad = 2.0 * (x.detach() - 0.2), torch.zeros(0)
        outer.step(lambda: (x - 0.2).square().sum() + none.sum())
    assert torch.allclose(x.detach(), vector([0.5, 0.5] if kind == "simplex" else [0.2, 0.2]), atol=1e-3)
