"""Wrong use of BiSLS and BiSPS: a typed error that is also the builtin one, that names the remedy, and no trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import SLS, SPSB, BiSLS, BiSPS, OneStepBiSLS
from adaptive_bilevel.errors import (
    AdaptiveBilevelError,
    ClosureError,
    HypergradientError,
    LowerLevelError,
    OptionError,
    TensorError,
)
from adaptive_bilevel.hypergradient import CG
from adaptive_bilevel.optim.projection import Box, Simplex
from tests.bilevel.helpers import everything
from tests.problems import b1y, b2

pytestmark = pytest.mark.filterwarnings("ignore:.*no trial step gave sufficient decrease")

WRONG: list[tuple[type[Any], dict[str, Any]]] = [
    *((cls, {"lr": v}) for cls in (BiSLS, BiSPS) for v in (0.0, -1.0, math.nan, "1", True)),
    (BiSLS, {"lr": math.inf}),
    *((cls, {"c": v}) for cls in (BiSLS, BiSPS) for v in (0.0, -0.1, math.nan, "c")),
    (BiSLS, {"c": 1.0}),
    *((BiSLS, {"shrink": v}) for v in (0.0, 1.0, -1.0, None)),
    *((BiSLS, {"grow": v}) for v in (0.9, math.inf, "2")),
    (BiSLS, {"reset": "3"}),
    *((BiSLS, {"slack": v}) for v in (-1.0, math.inf)),
    *((cls, {"lower_bound": v}) for cls in (BiSLS, BiSPS) for v in (math.nan, -math.inf, "0")),
    (OneStepBiSLS, {"lower_bound": "0"}),
    *((BiSLS, {"max_step": v}) for v in (0.0, -1.0, math.nan)),
    *((BiSLS, {"max_trials": v}) for v in (0, 1.5, True)),
    (OneStepBiSLS, {"baseline": "papers"}),
    *((OneStepBiSLS, {"response_steps": v}) for v in (0, 1.0)),
    *((OneStepBiSLS, {"momentum": v}) for v in ("auto", 1)),
    *((BiSLS, {"pace": v}) for v in ("keep", None)),
    *((cls, {"direction": v}) for cls in (BiSLS, BiSPS) for v in ("Adam", None)),
    (BiSLS, {"response": "tangents"}),
    *((BiSLS, {"carry": v}) for v in ("always", 1, 0, None, 2)),
    *((BiSLS, {"curvature": v}) for v in (0.0, -1.0, math.nan, None)),
    *((BiSLS, {"solver": v}) for v in ("cg", CG, 3)),
    *((BiSLS, {"project": v}) for v in ((0.0, 1.0), "box", Box)),
    *((cls, {"betas": v}) for cls in (BiSLS, BiSPS) for v in ((0.9,), (1.0, 0.9), 0.9, ("a", "b"))),
    *((cls, {"eps": v}) for cls in (BiSLS, BiSPS) for v in (-1e-8, math.nan)),
    *((cls, {"max_skips": v}) for cls in (BiSLS, BiSPS) for v in (0, 1.5)),
    *((BiSPS, {"lr_min": v}) for v in (-1.0, math.nan, math.inf, None)),
    *((BiSPS, {"decay": v}) for v in ("sqrt", None)),
    *((cls, {"lower": v}) for cls in (BiSLS, BiSPS) for v in ("sgd", 3, [1])),
]


@pytest.mark.parametrize(("cls", "options"), WRONG, ids=lambda v: v.__name__ if isinstance(v, type) else str(v))
def test_a_wrong_option_is_named_with_its_value(cls: type[Any], options: dict[str, Any]) -> None:
    name, value = list(options.items())[-1]
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(OptionError, match=rf"{name}=") as caught:
        cls([x], **options)
    assert isinstance(caught.value, ValueError)
    if name != "lower":
        assert repr(value) in str(caught.value)
    assert " must " in str(caught.value)


def test_an_automatic_bound_of_polyak_steps_needs_a_lower_bound() -> None:
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(OptionError, match=r"lr=None, lower_bound=None.*give one"):
        BiSPS([x], lower_bound=None)


@pytest.mark.parametrize("cls", [BiSLS, BiSPS])
def test_an_unknown_keyword(cls: Any) -> None:
    with pytest.raises(TypeError, match="nesterov"):
        cls([torch.ones(1, requires_grad=True)], nesterov=True)


@pytest.mark.parametrize("arguments", [(1.0, 1.0), (2.0, 1.0), ("a", 1.0), (math.nan, 1.0), (torch.zeros(2), 1.0)])
def test_a_wrong_box(arguments: Any) -> None:
    with pytest.raises(OptionError, match=r"Box\(low=.*must"):
        Box(*arguments)


@pytest.mark.parametrize("total", [0.0, -1.0, math.nan, math.inf, "1"])
def test_a_wrong_simplex(total: Any) -> None:
    with pytest.raises(OptionError, match=r"Simplex\(total=.*must"):
        Simplex(total)


# ------------------------------------------------------------------------------------------------ tensors


@pytest.mark.parametrize("cls", [BiSLS, BiSPS])
@pytest.mark.parametrize("place", ["constructor", "bind", "upper group", "lower group", "list"])
def test_levels_may_not_share_a_tensor(cls: Any, place: str) -> None:
    x, y, z = (torch.full((2,), v, requires_grad=True) for v in (1.0, 2.0, 3.0))
    with pytest.raises(TensorError, match=r"share tensors of shapes \[\(2,\)\].*own parameters only") as caught:
        if place == "constructor":
            cls([x, y], lower=SLS([y]))
        elif place == "list":
            cls([x, y], lower=[torch.optim.SGD([z]), SLS([y])])
        elif place == "bind":
            cls([x, y]).bind(torch.optim.SGD([y], lr=0.1))
        elif place == "upper group":
            cls([x], lower=SLS([y])).add_param_group({"params": [y]})
        else:
            inner = SLS([y])
            outer = cls([x], lower=inner)
            inner.step(lambda: (y**2).sum())
            inner.add_param_group({"params": [x]})
            x.grad = x.detach().clone()
            outer.step(lambda: ((x - y) ** 2).sum())
    assert isinstance(caught.value, TypeError)


def test_a_refused_group_is_not_kept() -> None:
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    outer = BiSLS([x], lower=SLS([y]))
    with pytest.raises(TensorError):
        outer.add_param_group({"params": [y]})
    assert len(outer.param_groups) == 1


@pytest.mark.parametrize("cls", [BiSLS, BiSPS])
@pytest.mark.parametrize("level", ["upper", "lower"])
@pytest.mark.parametrize("kind", ["complex", "sparse"])
def test_complex_and_sparse_parameters(cls: Any, level: str, kind: str) -> None:
    good = torch.ones(2, requires_grad=True)
    bad = torch.ones(2, dtype=torch.complex128, requires_grad=True)
    if kind == "sparse":
        bad = torch.eye(2).to_sparse().requires_grad_()
    with pytest.raises(TensorError, match=rf"{kind}.*dense real") as caught:
        if level == "upper":
            cls([bad])
        else:
            cls([good], lower=torch.optim.SGD([bad], lr=0.1))
    assert isinstance(caught.value, TypeError)


def test_a_sparse_hypergradient() -> None:
    x = torch.ones(2, requires_grad=True)
    for outer in (BiSLS([x]), BiSPS([x])):
        x.grad = torch.ones(2).to_sparse()
        with pytest.raises(TensorError, match="gradient of shape"):
            outer.step(lambda: (x**2).sum())
        x.grad = None


# ------------------------------------------------------------------------------------------------ calls


def levels(outer_class: Any, inner_class: Any = SLS, *, steps: int = 1, problem: Any = b2, **options: Any) -> Any:
    """Both optimizers before an upper step that would be right."""
    x, y, upper, lower = problem().instance()
    inner = inner_class([y], 0.1, lower_bound=None) if inner_class is SLS else inner_class([y], 0.1)
    outer = outer_class([x], 1.0, lower=inner, **options)
    for _ in range(steps):
        inner.step(lower) if inner_class in (SLS, SPSB) else inner.step()
    x.grad = torch.ones_like(x)
    return x, y, upper, lower, inner, outer


CALLS: dict[str, tuple[type[Any], type[Exception], type[Exception], str, dict[str, Any], Callable[..., Any]]] = {}


def call(
    name: str, error: type[Exception], builtin: type[Exception], match: str, cls: Any = BiSLS, **options: Any
) -> Any:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        CALLS[name] = (cls, error, builtin, match, options, function)
        return function

    return register


for cls in (BiSLS, BiSPS):
    n = cls.__name__

    @call(f"{n} no hypergradient", HypergradientError, RuntimeError, r"\.grad of all 1 .*hypergradient", cls)
    def _(x: Tensor, upper: Any, lower: Any, outer: Any) -> None:
        x.grad = None
        outer.step(upper)

    @call(f"{n} no closure", ClosureError, TypeError, r"closure=None.*returns it", cls)
    def _(x: Tensor, upper: Any, lower: Any, outer: Any) -> None:
        outer.step()

    @call(f"{n} a closure that is None", ClosureError, TypeError, r"closure=None.*returns it", cls)
    def _(x: Tensor, upper: Any, lower: Any, outer: Any) -> None:
        outer.step(None)

    @call(f"{n} a loss in the closure's place", ClosureError, TypeError, r"needs a closure", cls)
    def _(x: Tensor, upper: Any, lower: Any, outer: Any) -> None:
        outer.step(upper())

    @call(f"{n} upper vector", ClosureError, TypeError, r"shape \(2,\).*one real number", cls)
    def _(x: Tensor, upper: Any, lower: Any, outer: Any) -> None:
        outer.step(lambda: x * upper())

    @call(f"{n} upper None", ClosureError, TypeError, r"None", cls)
    def _(x: Tensor, upper: Any, lower: Any, outer: Any) -> None:
        outer.step(lambda: None)

    @call(f"{n} upper complex", ClosureError, TypeError, r"complex", cls)
    def _(x: Tensor, upper: Any, lower: Any, outer: Any) -> None:
        outer.step(lambda: upper() * 1j)


@call("upper detached", ClosureError, TypeError, "attached")
def _(x: Tensor, upper: Any, lower: Any, outer: Any) -> None:
    outer.step(lambda: upper().detach())


@call("upper item", ClosureError, TypeError, "attached")
def _(x: Tensor, upper: Any, lower: Any, outer: Any) -> None:
    outer.step(lambda: upper().item())


for wrong, value in {
    "vector": lambda y, loss: y * loss,
    "detached": lambda y, loss: loss.detach(),
    "item": lambda y, loss: loss.item(),
    "None": lambda y, loss: None,
    "complex": lambda y, loss: loss * 1j,
}.items():
    for search in (BiSLS, OneStepBiSLS):

        @call(f"lower {wrong} {search.__name__}", ClosureError, TypeError, "the closure returned", search)
        def _(x: Tensor, upper: Any, lower: Any, outer: Any, value: Any = value) -> None:
            y = outer.lower.tensors()[0]
            outer.step(upper, lambda: value(y, lower()))


@call("too many lower closures", LowerLevelError, RuntimeError, "2 closures for 1 lower optimizers: pass one for each")
def _(x: Tensor, upper: Any, lower: Any, outer: Any) -> None:
    outer.step(upper, [lower, lower])


@call("no lower closures", LowerLevelError, RuntimeError, "0 closures for 1 lower optimizers: pass one for each")
def _(x: Tensor, upper: Any, lower: Any, outer: Any) -> None:
    outer.step(upper, [])


@call("a lower loss for a closure", ClosureError, TypeError, "lower_closure")
def _(x: Tensor, upper: Any, lower: Any, outer: Any) -> None:
    outer.step(upper, lower())


@call("BiSPS closure and loss", ClosureError, TypeError, "give one of the two", BiSPS)
def _(x: Tensor, upper: Any, lower: Any, outer: Any) -> None:
    outer.step(upper, loss=1.0)


@call("BiSPS loss of two numbers", ClosureError, TypeError, "loss=.*one real number", BiSPS)
def _(x: Tensor, upper: Any, lower: Any, outer: Any) -> None:
    outer.step(loss=torch.ones(2))


@call("BiSPS loss word", ClosureError, TypeError, "loss=.*one real number", BiSPS)
def _(x: Tensor, upper: Any, lower: Any, outer: Any) -> None:
    outer.step(loss="1")


@call("BiSPS lower bound", OptionError, ValueError, "lower_bound='0'", BiSPS)
def _(x: Tensor, upper: Any, lower: Any, outer: Any) -> None:
    outer.step(upper, lower_bound="0")


def test_bisps_without_any_lower_bound() -> None:
    x, y, upper, _, inner, outer = levels(BiSPS, lower_bound=None)
    before = everything([x, y], inner, outer)
    with pytest.raises(OptionError, match=r"lower_bound=None.*give one"):
        outer.step(upper)
    assert everything([x, y], inner, outer) == before
    outer.step(upper, lower_bound=0.0)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("direction", ["sgd", "adam"])
def test_a_wrong_call_leaves_no_trace(name: str, direction: str) -> None:
    cls, error, builtin, match, options, do = CALLS[name]
    x, y, upper, lower, inner, outer = levels(cls, direction=direction, **options)
    outer.step(upper)
    record = outer.record
    before = everything([x, y], inner, outer)
    grad = x.grad
    with pytest.raises(error, match=match) as caught:
        do(x, upper, lower, outer)
    assert isinstance(caught.value, builtin)
    assert isinstance(caught.value, AdaptiveBilevelError)
    if "no hypergradient" in name:
        x.grad = grad
    assert everything([x, y], inner, outer) == before
    assert outer.record is record
    outer.step(upper)


# ------------------------------------------------------------------------------------------------ lower level


@pytest.mark.parametrize("cls", [BiSLS, OneStepBiSLS])
def test_a_lower_optimizer_that_has_not_stepped(cls: Any) -> None:
    x, y, upper, lower, inner, outer = levels(cls, steps=0)
    before = everything([x, y], inner, outer)
    with pytest.raises(LowerLevelError, match=r"SLS has no sample.*take lower steps") as caught:
        outer.step(upper)
    assert isinstance(caught.value, RuntimeError)
    assert everything([x, y], inner, outer) == before
    outer.step(upper, lower)


@pytest.mark.parametrize("cls", [BiSLS, OneStepBiSLS])
@pytest.mark.parametrize("stock", [torch.optim.SGD, torch.optim.Adam])
def test_a_stock_lower_optimizer_without_closure(cls: Any, stock: Any) -> None:
    x, y, upper, lower, inner, outer = levels(cls, stock)
    before = everything([x, y], inner, outer)
    with pytest.raises(LowerLevelError, match=rf"{stock.__name__} has no sample.*lower_closure="):
        outer.step(upper)
    assert everything([x, y], inner, outer) == before
    outer.step(upper, lower)


def test_lower_missing_where_f_depends_on_y_only() -> None:
    x, y, upper, _ = b1y().instance()
    outer = BiSLS([x], 1.0)
    x.grad = torch.ones_like(x)
    before = everything([x, y], outer)
    with pytest.raises(LowerLevelError, match=r"lower=None.*pass lower="):
        outer.step(upper)
    assert everything([x, y], outer) == before


def test_the_paper_s_search_needs_the_lower_level_when_it_steps() -> None:
    """Not before: a host rebuilds optimizers from their defaults, and binds the lower level then."""
    x, y, upper, lower = b2().instance()
    outer = OneStepBiSLS([x], 1.0)
    x.grad = torch.ones_like(x)
    before = everything([x, y], outer)
    with pytest.raises(LowerLevelError, match=r"OneStepBiSLS\(lower=None\).*pass lower="):
        outer.step(upper)
    assert everything([x, y], outer) == before
    outer.bind(torch.optim.SGD([y], lr=0.1))
    outer.step(upper, lower)
