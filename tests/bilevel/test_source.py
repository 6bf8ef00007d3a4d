"""Hypergradients that are given to a step, or computed in it, in the place of those in .grad."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive_bilevel import SLS, BiSLS, BiSPS, OneStepBiSLS
from adaptive_bilevel.errors import ClosureError, HypergradientError, LowerLevelError, OptionError
from adaptive_bilevel.hypergradient import CG, Implicit, Unroll, assign, implicit
from tests.bilevel.helpers import everything

CLASSES: dict[str, Any] = {"BiSLS": BiSLS, "BiSLS-Adam": partial(BiSLS, direction="adam"), "BiSPS": BiSPS}
CLASSES["OneStepBiSLS"] = OneStepBiSLS

Loss = Callable[[], Tensor]


def problem(dropout: float = 0.0) -> tuple[Tensor, Any, Loss, Loss]:
    """Return x, a model, f and g; with dropout, both draw random numbers."""
    torch.manual_seed(1)
    X, X_val = torch.randn(2, 25, 4)
    t, t_val = X.sum(1), X_val.sum(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Dropout(dropout), nn.Linear(3, 1))
    x = torch.full((4,), -2.0, requires_grad=True)

    def lower() -> Tensor:
        return ((model(X)[:, 0] - t) ** 2).mean() + sum(((p**2).sum() for p in model.parameters()), x.exp().sum()) * (
            x.exp().mean()
        )

    def upper() -> Tensor:
        return ((model(X_val)[:, 0] - t_val) ** 2).mean()

    return x, model, upper, lower


SOURCES: dict[str, tuple[Any, Any]] = {
    "implicit": (implicit, {}),
    "partial": (partial(implicit, solver=CG(4)), {"solver": CG(4)}),
    "Implicit": (Implicit(CG(4)), {"solver": CG(4)}),
    "Implicit()": (Implicit(), {}),
}


def run(cls: Any, dropout: float, iterate: Callable[..., None], **options: Any) -> Any:
    x, model, upper, lower = problem(dropout)
    inner = SLS(model.parameters())
    outer = cls([x], lower=inner, **options)
    for _ in range(5):
        for _ in range(3):
            inner.step(lower)
        iterate(outer, x, model, upper, lower)
    return outer, [x.detach(), *(p.detach() for p in model.parameters()), torch.get_rng_state()]


@pytest.mark.filterwarnings("ignore::adaptive_bilevel.errors.AdaptiveBilevelWarning")  # few lower steps, and CG
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", CLASSES)
def test_a_step_alone_is_a_whole_iteration(name: str, source: str, dropout: float) -> None:
    """It goes, to the bit, where the two calls go, whether the estimator is an option of the class or of the step."""
    option, settings = SOURCES[source]

    def two_calls(outer: Any, x: Tensor, model: Any, upper: Loss, lower: Loss) -> None:
        assign([x], implicit(upper, lower, [x], model.parameters(), **settings))
        outer.step(upper)

    expected, reached = run(CLASSES[name], dropout, two_calls)
    for outer, found in (
        run(CLASSES[name], dropout, lambda outer, x, model, upper, lower: outer.step(upper), hypergradient=option),
        run(CLASSES[name], dropout, lambda outer, x, model, upper, lower: outer.step(upper, hypergradient=option)),
        run(CLASSES[name], dropout, lambda o, x, m, upper, g: o.step(closure=upper), hypergradient=option),
    ):
        assert all(torch.equal(a, b) for a, b in zip(reached, found, strict=True))
        assert outer.param_groups[0]["params"][0].grad is None
        assert outer.evaluations.upper.values == expected.evaluations.upper.values
    if source.startswith("Implicit"):  # what others take is not seen
        assert outer.evaluations.upper.gradients == expected.evaluations.upper.gradients + 5
        assert outer.evaluations.lower.hvps > expected.evaluations.lower.hvps


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("kind", ["tuple", "graph", "double"])
def test_tensors_in_the_place_of_grad(kind: str, name: str) -> None:
    def assigned(outer: Any, x: Tensor, model: Any, upper: Loss, lower: Loss) -> None:
        assign([x], implicit(upper, lower, [x], model.parameters()))
        outer.step(upper)

    def given(outer: Any, x: Tensor, model: Any, upper: Loss, lower: Loss) -> None:
        (h,) = implicit(upper, lower, [x], model.parameters())
        changed = {"tuple": h, "graph": h * torch.ones(4, requires_grad=True), "double": h.double()}[kind]
        x.grad = torch.full_like(x, 9.0)  # what is there does not count
        outer.step(upper, hypergradient=changed if kind == "double" else (changed,))
        assert torch.equal(x.grad, torch.full_like(x, 9.0))

    _, reached = run(CLASSES[name], 0.0, assigned)
    _, found = run(CLASSES[name], 0.0, given)
    assert all(torch.equal(a, b) for a, b in zip(reached, found, strict=True))


@pytest.mark.parametrize("name", CLASSES)
def test_frozen_tensors_and_those_without_a_hypergradient_stay(name: str) -> None:
    x = [torch.ones(2, requires_grad=True), torch.ones(2), torch.ones(2, requires_grad=True)]
    y = torch.zeros(2, requires_grad=True)
    inner = SLS([y])

    def lower() -> Tensor:
        return ((y - x[0] - x[1] - x[2]) ** 2).sum()

    def upper() -> Tensor:
        return (y**2).sum()

    inner.step(lower)
    outer = CLASSES[name](x, lower=inner)
    h = [2.0 * y.detach(), 2.0 * y.detach(), None]
    outer.step(upper, hypergradient=h)
    assert not torch.equal(x[0], torch.ones(2)) and torch.equal(x[1], torch.ones(2)) and torch.equal(x[2], x[1])
    before = everything([*x, y], inner, outer)
    with pytest.raises(HypergradientError, match="Call requires_grad_"):
        outer.step(upper, hypergradient=[None, h[1], None])
    assert everything([*x, y], inner, outer) == before


def test_several_lower_optimizers_and_closures_of_ones_own() -> None:
    def go(call: Callable[..., None], **options: Any) -> Tensor:
        x = torch.tensor([1.0, -1.0], requires_grad=True)
        ys = [torch.zeros(2, requires_grad=True) for _ in range(3)]
        inners = [torch.optim.SGD([y], lr=0.1) for y in ys]
        closures = [lambda y=y, k=k: ((y - (k + 1) * x) ** 2).sum() + (y**4).sum() for k, y in enumerate(ys)]
        outer = BiSLS([x], lower=inners, **options)
        for _ in range(3):
            for inner, closure in zip(inners, closures, strict=True):
                inner.step(lambda closure=closure: closure().backward())
            call(outer, x, ys, closures)
        return x.detach()

    def upper(ys: Any) -> Any:
        return lambda: torch.stack([((y - 0.3) ** 2).sum() for y in ys]).sum()

    def total(closures: Any) -> Any:
        return lambda: torch.stack([c() for c in closures]).sum()

    def two_calls(outer: Any, x: Tensor, ys: Any, closures: Any) -> None:
        assign([x], implicit(upper(ys), total(closures), [x], ys))
        outer.step(upper(ys), closures)

    def one_call(outer: Any, x: Tensor, ys: Any, closures: Any) -> None:
        outer.step(upper(ys), closures)

    assert torch.equal(go(two_calls), go(one_call, hypergradient=implicit))


def h_of(*args: Any) -> Any:
    return [torch.ones(4)]


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("implicit", "must be hypergradient.implicit"),
        (Implicit, "must be hypergradient.implicit"),
        (Unroll(), "run in adaptive_bilevel.methods"),
        (3, "must be hypergradient.implicit"),
        (nn.Linear(1, 1), "must be hypergradient.implicit"),
    ],
)
def test_an_option_that_gives_no_hypergradient_is_refused(option: Any, says: str) -> None:
    x, _model, _upper, _lower = problem()
    for cls in CLASSES.values():
        with pytest.raises(OptionError, match=says):
            cls([x], hypergradient=option)
    outer = BiSLS([x])
    with pytest.raises(OptionError, match=says):
        outer.hypergradient = option


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "shape": ([torch.ones(3)], HypergradientError, r"\[\(3,\)\].*\[\(4,\)\].*assign"),
    "number": ([torch.ones(4), torch.ones(4)], HypergradientError, "one tensor for each parameter"),
    "nothing": ([None], HypergradientError, "none moves"),
    "shape that is returned": (lambda *args: [torch.ones(1)], HypergradientError, "one tensor for each parameter"),
    "raises": (lambda *args: 1 / 0, ZeroDivisionError, "division"),
    "no graph": (lambda f, g, x, y: implicit(lambda: 1.0, g, x, y), ClosureError, "upper_closure"),
    "draws and raises": (lambda *args: [torch.randn(7)], HypergradientError, "one tensor for each"),
    "an option of none": ("reverse", OptionError, "must be"),
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("case", WRONG)
def test_a_hypergradient_that_does_not_fit_leaves_no_trace(case: str, name: str) -> None:
    x, model, upper, lower = problem(0.3)
    inner = SLS(model.parameters())
    outer = CLASSES[name]([x], lower=inner)
    inner.step(lower)
    outer.step(upper, hypergradient=implicit)
    inner.step(lower)
    given, error, says = WRONG[case]
    before = everything([x, *model.parameters()], inner, outer, modules=[model])
    with pytest.raises(error, match=says):
        outer.step(upper, hypergradient=given)
    assert everything([x, *model.parameters()], inner, outer, modules=[model]) == before


def test_an_estimator_needs_a_lower_level() -> None:
    x, _, _upper, _ = problem()
    with pytest.raises(LowerLevelError, match=r"lower=\(tensors, loss\)"):
        BiSLS([x], hypergradient=implicit).step(lambda: (x**2).sum())
    with pytest.raises(HypergradientError, match="hypergradient= to the step or to the constructor"):
        BiSLS([x]).step(lambda: (x**2).sum())


def test_copies_and_pickles_have_the_option() -> None:
    x, *_ = problem()
    for option in (partial(implicit, solver=CG(3)), Implicit(CG(3)), "direct", None):
        outer = BiSLS([x], hypergradient=option)
        for twin in (copy.deepcopy(outer), pickle.loads(pickle.dumps(outer))):
            assert type(twin.hypergradient) is type(option)
        assert "hypergradient" not in outer.defaults
