"""A direct loss that depends on tensors which other code trains: said once, where the loss rises."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import BiSLS

SAID = "other code changes between the steps"
STEPS = 16


def messages(model: Callable[[int], Tensor], losses: Callable[[int], float] = lambda k: 1.0 + k) -> list[str]:
    """What is said in steps on |x|^2 + y l_k, y being what the model returns for the k-th step."""
    x = torch.ones(3, requires_grad=True)
    outer = BiSLS([x], hypergradient="direct")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(STEPS):
            y = model(k)
            outer.step(lambda y=y, k=k: x.square().sum() + (y * losses(k)).sum())
    return [str(w.message) for w in caught if SAID in str(w.message)]


def trained() -> Callable[[int], Tensor]:
    y = torch.ones((), requires_grad=True)

    def model(k: int) -> Tensor:
        with torch.no_grad():
            y.mul_(1.01)
        return y

    return model


def test_a_trained_model_under_a_rising_loss_is_named_once_with_the_lines_to_write() -> None:
    (message,) = messages(trained())
    assert "has risen from 4.01 to" in message and "on 1 tensors" in message
    assert "BiSLS(x, lower=inner_optimizer, hypergradient=implicit)" in message


def staying() -> Callable[[int], Tensor]:
    y = torch.ones((), requires_grad=True)
    return lambda k: y


def test_a_change_through_data_counts() -> None:
    y = torch.ones((), requires_grad=True)

    def model(k: int) -> Tensor:
        y.data = y.data * 1.01
        return y

    assert len(messages(model)) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_named_at_once(value: float) -> None:
    (message,) = messages(trained(), lambda k: 1.0 if k < 2 else value)
    assert "is not finite" in message


@pytest.mark.parametrize(
    ("model", "losses"),
    [
        (staying(), lambda k: 1.0 + k),
        (lambda k: torch.full((), 1.0 + k, requires_grad=True), lambda k: 1.0 + k),
        (lambda k: torch.full((), 1.0 + k), lambda k: 1.0 + k),
        (trained(), lambda k: 1.0 / (1.0 + k)),
    ],
    ids=["a model that stays", "a model made anew", "a constant", "a loss that falls"],
)
def test_what_is_no_lower_level_or_does_no_harm(model: Callable[[int], Tensor], losses: Callable[[int], float]) -> None:
    assert not messages(model, losses)


def test_a_virtual_step_depends_on_the_parameters_that_it_starts_from() -> None:
    x, y = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    outer = BiSLS([x], hypergradient="direct")

    def virtual() -> Tensor:
        (gradient,) = torch.autograd.grad((x.exp() * y.square()).sum(), y, create_graph=True)
        return (y - 0.1 * gradient).square().sum() + y.square().sum()

    with pytest.warns(UserWarning, match=SAID):
        for _ in range(STEPS):
            outer.step(virtual)
            with torch.no_grad():
                y.mul_(1.5)  # whatever else trains it
