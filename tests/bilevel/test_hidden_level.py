"""A direct loss that depends on tensors which other code trains: said once, where the loss rises."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import BiSLS
from adaptive_bilevel.hypergradient import implicit

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
    assert "has risen from 4.01 to" in message and "on 1 tensor(s)" in message
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


def test_a_fresh_leaf_beside_a_trained_one_does_not_hide_it() -> None:
    model = trained()
    assert len(messages(lambda k: model(k) * torch.ones((), requires_grad=True))) == 1


@pytest.mark.parametrize("kind", ["complex", "sparse", "jagged"])
def test_leaves_that_have_no_norm_are_left_out(kind: str) -> None:
    x = torch.ones(3, requires_grad=True)
    outer = BiSLS([x], hypergradient="direct")
    if kind == "complex":
        other: Tensor = torch.ones(3, dtype=torch.complex128, requires_grad=True)
    elif kind == "sparse":
        other = torch.eye(3).to_sparse().requires_grad_()
    else:
        other = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged, requires_grad=True)

    def loss() -> Tensor:
        if kind == "complex":
            return x.square().sum() + other.abs().sum()
        if kind == "sparse":
            return torch.sparse.mm(other, x.unsqueeze(1)).square().sum()
        return x.square().sum() + other.values().sum()

    before = float(x.detach().square().sum())
    outer.step(loss)
    assert float(x.detach().square().sum()) < before


def test_a_lower_level_that_is_given_later_is_not_hidden() -> None:
    """A warning would be an error here, and in the next test."""
    x, y = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    outer = BiSLS([x], hypergradient="direct")
    outer.step(lambda: x.square().sum() + y.square().sum())
    inner = torch.optim.SGD([y], lr=0.1)
    outer.bind(inner)
    for k in range(STEPS):
        with torch.no_grad():
            y.add_(1.0)
        outer.step(lambda k=k: (y - x).square().sum() + k, lambda: (y - x).square().sum(), hypergradient=implicit)


def test_a_state_that_is_loaded_begins_anew() -> None:
    """The second loss is a hundred times the first one, but falls."""
    x, y = torch.ones(3, requires_grad=True), torch.ones((), requires_grad=True)
    outer = BiSLS([x], hypergradient="direct")
    for level in (1.0, 100.0):
        for _ in range(STEPS):
            with torch.no_grad():
                y.mul_(0.99)
            outer.step(lambda level=level: x.square().sum() + level * y)
        outer.load_state_dict(outer.state_dict())
