"""Loops as functional codebases have them, before and after: at most 4 lines differ, with cold and warm starts.

`InnerLoop`, `cg_hypergradient` and the signatures ``loss(params, hparams)`` are as those of hypertorch.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad

from adaptive_bilevel import BiSLS, policies
from adaptive_bilevel.hypergradient import implicit
from tests.hosts.problem import T_VAL, X_VAL, Problem, T, X

STEPS = 40


def train_loss(params: Sequence[Tensor], hparams: Sequence[Tensor]) -> Tensor:
    return ((X @ params[0] + params[1] - T) ** 2).mean() + (hparams[0].sigmoid() * params[0] ** 2).sum()


def val_loss(params: Sequence[Tensor], hparams: Sequence[Tensor]) -> Tensor:
    return ((X_VAL @ params[0] + params[1] - T_VAL) ** 2).mean()


def gd_map(params: Sequence[Tensor], hparams: Sequence[Tensor]) -> list[Tensor]:
    slopes = torch.autograd.grad(train_loss(params, hparams), list(params), create_graph=True)
    return [p - 0.1 * s for p, s in zip(params, slopes, strict=True)]


def inner_loop(params: Sequence[Tensor], hparams: Sequence[Tensor]) -> list[Tensor]:
    """Return a new list of new tensors."""
    for _ in range(20):
        params = [p.detach() for p in gd_map([p.detach().requires_grad_() for p in params], hparams)]
    return list(params)


def cg_hypergradient(params: Sequence[Tensor], hparams: Sequence[Tensor]) -> None:
    """Set .grad of the hyperparameters."""
    y = [p.detach().requires_grad_() for p in params]
    h = implicit(lambda: val_loss(y, hparams), lambda: train_loss(y, hparams), hparams, y)
    for t, g in zip(hparams, h, strict=True):
        t.grad = g


def params_of_zeros() -> list[Tensor]:
    return [torch.zeros(20), torch.zeros(())]


def hyper() -> list[Tensor]:
    return [torch.full((20,), -4.0, requires_grad=True)]


def listed_before(warm: bool) -> Any:
    hparams, params = hyper(), params_of_zeros()
    outer = torch.optim.Adam(hparams, lr=0.1)
    for _ in range(STEPS):
        params = inner_loop(params if warm else params_of_zeros(), hparams)
        outer.zero_grad()
        cg_hypergradient(params, hparams)
        outer.step()
    return val_loss(params, hparams)


def listed_after(warm: bool) -> Any:
    hparams, params = hyper(), params_of_zeros()
    outer = BiSLS(hparams, direction="adam")
    for _ in range(STEPS):
        params = inner_loop(params if warm else params_of_zeros(), hparams)
        outer.zero_grad()
        cg_hypergradient(params, hparams)
        outer.step(lambda y: val_loss(y, hparams), lower=(params, lambda y: train_loss(y, hparams)))
        params = outer.answer
    return val_loss(params, hparams)


def named_losses(model: Any, decay: Tensor) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    def g(params: Any) -> Tensor:
        residual = functional_call(model, params, X)[:, 0] - T
        return residual.square().mean() + (decay.sigmoid() * params["weight"] ** 2).sum()

    def f(params: Any) -> Tensor:
        return (functional_call(model, params, X_VAL)[:, 0] - T_VAL).square().mean()

    return f, g


def trained(g: Any, params: Any) -> Any:
    for _ in range(20):
        slopes = grad(g)(params)
        params = {name: p - 0.1 * slopes[name] for name, p in params.items()}
    return {name: p.detach() for name, p in params.items()}


def named_before(warm: bool) -> Any:
    model, decay = Problem().model, hyper()[0]
    f, g = named_losses(model, decay)
    outer = torch.optim.Adam([decay], lr=0.1)
    start = params = dict(model.named_parameters())
    for _ in range(STEPS):
        params = trained(g, params if warm else start)
        y = {name: p.requires_grad_() for name, p in params.items()}
        (decay.grad,) = implicit(partial(f, y), partial(g, y), [decay], y)
        outer.step()
    return f(params)


def named_after(warm: bool) -> Any:
    model, decay = Problem().model, hyper()[0]
    f, g = named_losses(model, decay)
    outer = BiSLS([decay], direction="adam", hypergradient=implicit)
    start = params = dict(model.named_parameters())
    for _ in range(STEPS):
        params = trained(g, params if warm else start)
        outer.step(f, lower=(params, g))
        params = outer.answer
    return f(params)


def adapted(meta: Any, model: Any) -> Any:
    """Return what a few differentiable steps make of learned starting points."""
    for _ in range(3):
        loss = (functional_call(model, meta, X)[:, 0] - T).square().mean()
        slopes = torch.autograd.grad(loss, tuple(meta.values()), create_graph=True)
        meta = {name: p - 0.05 * s for (name, p), s in zip(meta.items(), slopes, strict=True)}
    return meta


def maml_before(warm: bool) -> Any:
    model = Problem().model
    meta = dict(model.named_parameters())
    outer = torch.optim.Adam(meta.values(), lr=0.01)

    def meta_loss() -> Tensor:
        return (functional_call(model, adapted(meta, model), X_VAL)[:, 0] - T_VAL).square().mean()

    for _ in range(STEPS):
        outer.zero_grad()
        meta_loss().backward()
        outer.step()
    return meta_loss()


def maml_after(warm: bool) -> Any:
    model = Problem().model
    meta = dict(model.named_parameters())
    outer = BiSLS(meta.values(), direction="adam", hypergradient="direct")

    def meta_loss() -> Tensor:
        return (functional_call(model, adapted(meta, model), X_VAL)[:, 0] - T_VAL).square().mean()

    for _ in range(STEPS):
        outer.step(meta_loss)
    return meta_loss()


LOOPS: dict[str, tuple[Any, Any]] = {
    "lists": (listed_before, listed_after),
    "dicts": (named_before, named_after),
    "maml": (maml_before, maml_after),
}


def changed(before: Any, after: Any) -> int:
    """Return how many lines of the one are not, or not so, in the other."""
    one, other = (inspect.getsource(f).splitlines()[1:] for f in (before, after))
    blocks = difflib.SequenceMatcher(None, one, other, autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for kind, i1, i2, j1, j2 in blocks if kind != "equal")


@pytest.mark.parametrize("name", LOOPS)
def test_few_lines_change(name: str) -> None:
    assert 0 < changed(*LOOPS[name]) <= 4


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("name", LOOPS)
def test_ends_no_higher_than_before(name: str, warm: bool) -> None:
    before, after = LOOPS[name]
    assert after(warm).item() <= 1.001 * before(warm).item()


def test_the_lower_step_is_a_function_too() -> None:
    """A policy steps plain tensors: two lines, and no step size."""
    hparams, params = hyper(), params_of_zeros()
    policy = policies.SLS()
    state = policy.init()
    for _ in range(200):
        loss, slopes = train_loss(params, hparams), grad(train_loss)(params, hparams)

        def at(step: float, params: Any = params, slopes: Any = slopes) -> list[Tensor]:
            return [p - step * s for p, s in zip(params, slopes, strict=True)]

        slope = float(sum((s.detach() ** 2).sum() for s in slopes))
        record, state = policy.step(
            state, loss=loss.item(), slope=slope, trial=lambda a, at=at: train_loss(at(a), hparams).item()
        )
        params = [p.detach() for p in at(float(record.step_size))]
    assert sum(float((s.detach() ** 2).sum()) for s in grad(train_loss)(params, hparams)) < 1e-10
