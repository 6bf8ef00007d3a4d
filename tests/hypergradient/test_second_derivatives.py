"""Lower losses without second derivatives, or with wrong ones: an error that names the ways out, or a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.errors import AdaptiveBilevelWarning, SolverError
from adaptive_bilevel.hypergradient import check, implicit, implicit_with_info
from adaptive_bilevel.hypergradient.second_derivatives import custom_functions


class Right(torch.autograd.Function):
    """sin, with a backward of torch's operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


class Detached(Right):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].detach().cos()


class Once(Right):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


class NumPy(Right):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.from_numpy((g * ctx.saved_tensors[0].cos()).detach().numpy())


def attention(y: Tensor) -> Tensor:
    q = y.float().reshape(1, 1, 1, 4).expand(1, 1, 3, 4) * torch.arange(1.0, 4.0)[:, None]
    return nn.functional.scaled_dot_product_attention(q, q, q)[0, 0, 0].to(y)


WITHOUT: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": attention,
    "reentrant": lambda y: checkpoint(torch.sin, y, use_reentrant=True),
    "compiled": torch.compile(torch.sin, backend="aot_eager"),
}


def problem(operation: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Any, Any]:
    x = torch.tensor([0.1, 0.4, -0.2, 0.3], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0.5, 1.4, 0.3, -0.7], dtype=torch.float64, requires_grad=True)
    return x, y, lambda: ((operation(y) * x.exp() - 0.2) ** 2).sum() + (y**2).sum(), lambda: ((y - 1) ** 2).sum()


def heard(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if issubclass(w.category, AdaptiveBilevelWarning)]


@pytest.mark.parametrize("name", WITHOUT)
@pytest.mark.parametrize("where", ["implicit", "check", "BiSLS"])
def test_torch_s_error_becomes_one_with_ways_out(name: str, where: str) -> None:
    x, y, lower, upper = problem(WITHOUT[name])
    inner = SLS([y])
    inner.step(lower)
    point = x.detach().clone(), y.detach().clone(), torch.get_rng_state()
    x.grad = torch.ones_like(x)
    runs = {
        "implicit": lambda: implicit(upper, lower, [x], [y], products="autograd"),
        "check": lambda: check(upper, lower, [x], [y], products="autograd"),
        "BiSLS": lambda: BiSLS([x], lower=inner, products="autograd").step(upper),
    }
    with pytest.raises(SolverError, match=r"differentiated twice.*SDPBackend.MATH.*use_reentrant=False.*DARTS"):
        runs[where]()
    assert torch.equal(x, point[0]) and torch.equal(y, point[1]) and torch.equal(torch.get_rng_state(), point[2])


def test_the_way_out_of_attention_is_one() -> None:
    def slow(y: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return attention(y)

    x, y, lower, upper = problem(slow)
    assert implicit(upper, lower, [x], [y])[0].all()


@pytest.mark.parametrize("function", [Detached, Once, NumPy], ids=lambda f: f.__name__)
def test_half_a_hypergradient_is_said_once(function: Any) -> None:
    x, y, lower, upper = problem(function.apply)
    before = torch.get_rng_state()
    said = heard(lambda: implicit(upper, lower, [x], [y], products="autograd"))
    assert sum(f"backward of {function.__name__}" in text for text in said) == 1
    assert not any(
        "backward of" in text for text in heard(lambda: implicit(upper, lower, [x], [y], products="autograd"))
    )
    assert torch.equal(torch.get_rng_state(), before) and x.grad is None and y.grad is None


@pytest.mark.parametrize("function", [Detached, Once, NumPy], ids=lambda f: f.__name__)
def test_half_a_hypergradient_is_made_whole(function: Any) -> None:
    """By differences, from then on: also in the step above."""
    (x, y, lower, upper), (z, w, right, above) = problem(function.apply), problem(torch.sin)
    inner, torch_s = SLS([y]), SLS([w])
    outer, known = BiSLS([x], lower=inner), BiSLS([z], lower=torch_s)
    inner.step(lower), torch_s.step(right)
    found: list[Any] = []
    said = heard(lambda: found.extend(implicit_with_info(upper, lower, [x], [y])))
    assert sum(f"backward of {function.__name__}" in t and "from now on" in t for t in said) == 1
    (h,), info = found
    torch.testing.assert_close(h, implicit(above, right, [z], [w])[0], rtol=1e-5, atol=1e-6)
    assert info.error < 1e-4
    x.grad = z.grad = h
    outer.step(upper), known.step(above)
    torch.testing.assert_close(x, z, rtol=1e-5, atol=1e-6)


def test_a_right_function_is_not_accused_and_leaves_no_trace() -> None:
    calls = [0]

    def run(operation: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, int]:
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(4).double()
        x, y, lower, upper = problem(operation)

        def noisy() -> Tensor:
            calls[0] += 1
            mask = torch.nn.functional.dropout(torch.ones(4, dtype=torch.float64), 0.3)
            return lower() + (norm(torch.outer(mask, y)) ** 2).mean()

        y_version, graph = y._version, (y * x).sum()
        (h,) = implicit(upper, noisy, [x], [y])
        graph.backward()
        assert y._version == y_version and norm.num_batches_tracked == 1
        return h, torch.rand(1), calls[0]

    *right, many = run(Right.apply)
    *plain, more = run(torch.sin)
    assert many == 5 and more == 6
    for a, b in zip(right, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_a_function_whose_part_is_not_needed_is_not_accused() -> None:
    """Only first derivatives of an operation on x are needed."""
    x, y, _, upper = problem(torch.sin)
    assert heard(lambda: implicit(upper, lambda: ((y - Once.apply(x)) ** 2).sum(), [x], [y])) == []


def test_a_closure_that_changes_is_not_accused() -> None:
    x, y, lower, upper = problem(Right.apply)
    scales = iter(range(1, 100))
    assert heard(lambda: implicit_with_info(upper, lambda: lower() * next(scales), [x], [y])) == []


def test_names_in_a_graph() -> None:
    y = torch.ones(3, requires_grad=True)
    assert custom_functions((Once.apply(y) + Right.apply(y.exp())).sum()) == ["Once", "Right"]
    assert custom_functions(y.exp().sum()) == []


def test_check_measures_without_second_derivatives() -> None:
    reports = []
    for operation, products in ((WITHOUT["reentrant"], "difference"), (torch.sin, "autograd")):
        x, y, lower, upper = problem(operation)
        reports.append(check(upper, lower, [x], [y], gradient=[torch.ones_like(x)], products=products))
    for one, other in zip(*(report.directions for report in reports), strict=True):
        assert one.measured == pytest.approx(other.measured, abs=1e-8)
