"""Lower levels of functional code: tensors that the inner loop returns anew, and losses that take them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from adaptive_bilevel import BiSLS, BiSPS, OneStepBiSLS
from adaptive_bilevel.errors import ClosureError, LowerLevelError, OptionError, TensorError
from adaptive_bilevel.hypergradient import Implicit, assign, implicit
from tests.bilevel.helpers import everything

X, X_VAL = torch.randn(2, 30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TRUE = torch.tensor([1.0, -2.0, 0.5, 0.0, 0.0, 0.0], dtype=torch.float64)
T, T_VAL = X @ TRUE + 0.5 * X[:, 5] ** 2, X_VAL @ TRUE
STEP = 0.1


class Pair(NamedTuple):
    w: Tensor
    b: Tensor


def training(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return ((X @ w + b - T) ** 2).mean() + (x.sigmoid() * w**2).sum()


def validation(w: Tensor, b: Tensor) -> Tensor:
    return ((X_VAL @ w + b - T_VAL) ** 2).mean()


def start() -> list[Tensor]:
    return [torch.zeros(6), torch.zeros(())]


# How y is arranged, and where its two tensors are.
FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Any]]] = {
    "list": (lambda w, b: [w, b], lambda y: y),
    "tuple": (lambda w, b: (w, b), lambda y: y),
    "dict": (lambda w, b: {"w": w, "b": b}, lambda y: y.values()),
    "named tuple": (Pair, lambda y: (y.w, y.b)),
    "nested": (lambda w, b: {"layers": [{"w": w}, b]}, lambda y: (y["layers"][0]["w"], y["layers"][1])),
}
CLASSES: dict[str, Any] = {
    "sgd": BiSLS,
    "adam": partial(BiSLS, direction="adam"),
    "step": partial(OneStepBiSLS, lr=10.0),
    "polyak": BiSPS,
}


def descend(x: Tensor, w: Tensor, b: Tensor) -> list[Tensor]:
    """Return y after some steps of gradient descent: plain tensors without a graph."""
    for _ in range(5):
        with torch.enable_grad():
            w, b = w.detach().requires_grad_(), b.detach().requires_grad_()
            slopes = torch.autograd.grad(training(x, w, b), (w, b))
        w, b = (p.detach() - STEP * s for p, s in zip((w, b), slopes, strict=True))
    return [w, b]


def with_parameters(cls: Any, warm: bool, iterations: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return where x and y are after each iteration of a loop over parameters that are written in place."""
    x, y = torch.zeros(6, requires_grad=True), [t.requires_grad_() for t in start()]
    inner = torch.optim.SGD(y, lr=STEP)
    outer = cls([x], lower=inner)
    xs, ys = [], []
    for _ in range(iterations):
        if not warm:
            with torch.no_grad():
                for p, t in zip(y, start(), strict=True):
                    p.copy_(t)
        for _ in range(5):
            inner.zero_grad()
            training(x, *y).backward(inputs=y)
            inner.step()
        assign([x], implicit(lambda: validation(*y), lambda: training(x, *y), [x], y))
        outer.step(lambda: validation(*y), lambda: training(x, *y))
        xs.append(x.detach().clone())
        ys.append(torch.cat([p.detach().flatten() for p in y]))
    return xs, ys


def functional(cls: Any, warm: bool, iterations: int, form: str) -> tuple[list[Tensor], list[Tensor]]:
    """The same with tensors."""
    x = torch.zeros(6, requires_grad=True)
    arrange, parts = FORMS[form]
    outer = cls([x], hypergradient=implicit)
    y = arrange(*start())
    extra = (STEP,) if isinstance(outer, OneStepBiSLS) else ()
    xs, ys = [], []
    for _ in range(iterations):
        y = arrange(*descend(x, *parts(y if warm else arrange(*start()))))
        outer.step(lambda y: validation(*parts(y)), lower=(y, lambda y: training(x, *parts(y)), *extra))
        y = outer.answer
        xs.append(x.detach().clone())
        ys.append(torch.cat([p.detach().flatten() for p in parts(y)]))
    return xs, ys


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("form", FORMS)
def test_tensors_and_parameters_in_place_go_the_same_way(form: str, name: str, warm: bool) -> None:
    expected_x, expected_y = with_parameters(CLASSES[name], warm, 8)
    xs, ys = functional(CLASSES[name], warm, 8, form)
    assert not torch.equal(xs[0], xs[-1])
    for one, other in zip(expected_x, xs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for one, other in zip(expected_y, ys, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_one_tensor_is_a_variable_too() -> None:
    x = torch.tensor([4.0], requires_grad=True)
    outer = BiSLS([x], hypergradient=implicit)
    for _ in range(20):  # y*(x) = x / 2, F = (x / 2 - 1)^2 / 2 + x^2 / 20
        outer.step(lambda y: ((y - 1) ** 2 / 2 + x**2 / 20).sum(), lower=(x / 2, lambda y: (y**2 - x * y).sum()))
    assert x.item() == pytest.approx(10 / 7, abs=1e-6)
    assert outer.answer.shape == (1,)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda t: t.detach().clone(),
    "leaf": lambda t: t.detach().clone().requires_grad_(),
    "graph": lambda t: t.detach().clone().requires_grad_() * 1.0,
    "view": lambda t: torch.stack([t, t])[0].detach(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_tensors_are_only_read(kind: str) -> None:
    """And a graph that they are in can still be differentiated."""
    x = torch.zeros(6, requires_grad=True)
    y = [KINDS[kind](t) for t in descend(x, *start())]
    before = [(t.detach().clone(), t.requires_grad, t._version) for t in y]
    outer = BiSLS([x], hypergradient=implicit)
    outer.step(lambda y: validation(*y), lower=(y, lambda y: training(x, *y)))
    assert outer.record is not None and outer.record.moved
    for t, (value, requires_grad, version) in zip(y, before, strict=True):
        assert torch.equal(t, value) and (t.requires_grad, t._version) == (requires_grad, version)
    assert not any(torch.equal(t, a) for t, a in zip(y, outer.answer, strict=True))
    if kind == "graph":
        validation(*y).backward()


def test_gradients_that_the_loop_left_are_used() -> None:
    """A loop that is differentiable leaves .grad by a backward through it, as always."""
    x = torch.zeros(6, requires_grad=True)
    outer, losses = BiSLS([x]), []
    for _ in range(10):
        w, b = (t.requires_grad_() for t in start())
        for _ in range(30):
            slopes = torch.autograd.grad(training(x, w, b), (w, b), create_graph=True)
            w, b = (p - STEP * s for p, s in zip((w, b), slopes, strict=True))
        outer.zero_grad()
        validation(w, b).backward()
        held = x.grad
        losses.append(float(outer.step(lambda y: validation(*y), lower=((w, b), lambda y: training(x, *y)))))
        assert x.grad is held
    assert losses[-1] < losses[0] and losses == sorted(losses, reverse=True)


def test_a_meta_batch_is_a_list_of_pairs() -> None:
    """It goes as with one optimizer for each task."""
    targets = [T, T + X[:, 3], T - X[:, 1]]

    def g(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return ((X @ w - t) ** 2).mean() + ((w - x) ** 2).sum()  # iMAML: x is where tasks are pulled to

    def f(ws: Any) -> Tensor:
        return torch.stack([((X_VAL @ w - X_VAL @ TRUE) ** 2).mean() for w in ws]).mean()

    reached = []
    for as_tensors in (True, False):
        x = torch.zeros(6, requires_grad=True)
        ws = [torch.zeros(6, requires_grad=not as_tensors) for _ in targets]
        closures = [partial(lambda t, w: g(x, w, t), t) for t in targets]
        if as_tensors:
            outer = BiSLS([x], hypergradient=implicit)
            for _ in range(4):
                outer.step(f, lower=list(zip(ws, closures, strict=True)))
                ws = outer.answer
        else:
            outer = BiSLS([x], lower=[torch.optim.SGD([w], lr=1.0) for w in ws], hypergradient=implicit)
            for _ in range(4):
                outer.step(lambda: f(ws), [partial(c, w) for c, w in zip(closures, ws, strict=True)])
        reached.append(torch.stack([x.detach(), *(w.detach() for w in ws)]))
    assert reached[0][0].norm() > 0.1
    torch.testing.assert_close(*reached, rtol=1e-12, atol=1e-12)


def net() -> Any:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))


def test_functional_calls_draw_and_count_as_the_module_does() -> None:
    reached: list[Any] = []
    for as_tensors in (True, False):
        model = net().double()
        x = torch.full((30,), 0.5, requires_grad=True)  # weights of samples

        def lower(run: Any, x: Tensor = x) -> Tensor:
            return (x.sigmoid() * (run(X)[:, 0] - T) ** 2).mean() + 0.1 * run(X)[:, 0].square().mean()

        def upper(run: Any) -> Tensor:
            return ((run(X_VAL)[:, 0] - T_VAL) ** 2).mean()

        def of(params: Any, model: Any = model) -> Any:
            return partial(functional_call, model, params)

        torch.manual_seed(5)
        for _ in range(3):
            if as_tensors:
                outer = BiSLS([x], hypergradient=Implicit())
                y = dict(model.named_parameters())
                outer.step(lambda y: upper(lambda X: of(y)(X)), lower=(y, lambda y: lower(lambda X: of(y)(X))))
            else:
                outer = BiSLS([x], lower=torch.optim.SGD(model.parameters(), 0.1), carry=False)
                assign([x], implicit(lambda: upper(model), lambda: lower(model), [x], model.parameters()))
                outer.step(lambda: upper(model), lambda: lower(model))
        reached.append((x.detach(), model[1].running_mean.clone(), model[1].num_batches_tracked, torch.get_rng_state()))
    for one, other in zip(*reached, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_run_goes_on_from_its_state() -> None:
    cls = partial(BiSLS, direction="adam", hypergradient=implicit)
    x = torch.zeros(6, requires_grad=True)
    outer, y = cls([x]), start()

    def iterate(outer: Any, x: Tensor, y: Any) -> Any:
        outer.step(lambda y: validation(*y), lower=(descend(x, *y), lambda y: training(x, *y)))
        return [t.detach() for t in outer.answer]

    for _ in range(3):
        y = iterate(outer, x, y)
    twin = x.detach().clone().requires_grad_()
    resumed = cls([twin])
    resumed.load_state_dict(copy.deepcopy(outer.state_dict()))
    copied, copied_x = copy.deepcopy((outer, x))
    assert torch.equal(iterate(outer, x, y)[0], iterate(resumed, twin, y)[0])
    iterate(copied, copied_x, y)
    assert torch.equal(x, twin) and torch.equal(x, copied_x)


def f_of(y: Any) -> Tensor:
    return validation(*y)


class Wrong(NamedTuple):
    error: type[Exception]
    says: str
    upper: Any
    lower: Any


HELD = descend(TRUE * 0.0, TRUE * 0.0, TRUE[0] * 0.0)
HELD_LEAVES = [t.detach().requires_grad_() for t in HELD]


def wrong(x: Tensor, inner: Any) -> dict[str, Wrong]:
    def g(y: Any) -> Tensor:
        return training(x, *y)

    return {
        "no path of g": Wrong(LowerLevelError, "lower loss has no path", f_of, (HELD, lambda y: g(HELD_LEAVES))),
        "no path of f": Wrong(LowerLevelError, "upper loss has no path", lambda y: f_of(HELD_LEAVES), (HELD, g)),
        "f takes nothing": Wrong(ClosureError, "outer.step.lambda y", lambda: f_of(HELD_LEAVES), (HELD, g)),
        "g takes nothing": Wrong(ClosureError, "outer.step.lambda y", f_of, (HELD, lambda: g(HELD_LEAVES))),
        "other shapes": Wrong(LowerLevelError, "outer.bind.None", f_of, ([torch.zeros(6), torch.zeros(1)], g)),
        "other places": Wrong(LowerLevelError, "outer.bind.None", f_of, (HELD[::-1], g)),
        "no pair": Wrong(OptionError, "must be .tensors, loss.", f_of, HELD),
        "swapped": Wrong(OptionError, "must be .tensors, loss.", f_of, (g, HELD)),
        "two losses": Wrong(TensorError, "must hold tensors", f_of, (g, g)),
        "an optimizer": Wrong(OptionError, "given once", f_of, inner),
        "an index": Wrong(TensorError, "int64", f_of, ([HELD[0], torch.zeros((), dtype=torch.int64)], g)),
        "x in y": Wrong(TensorError, "share", f_of, ([x, HELD[1]], g)),
        "none any more": Wrong(LowerLevelError, "pass it again", f_of, None),
        "raises": Wrong(ZeroDivisionError, "division", f_of, (HELD, lambda y: 1 / 0)),
    }


@pytest.mark.parametrize("case", wrong(TRUE, None))
def test_wrong_use_is_refused_and_leaves_no_trace(case: str) -> None:
    x = torch.zeros(6, requires_grad=True)
    inner = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    outer = BiSLS([x], hypergradient=implicit, direction="adam")
    outer.step(f_of, lower=(HELD, lambda y: training(x, *y)))
    before, answer = everything([x], outer), outer.answer
    given = wrong(x, inner)[case]
    with pytest.raises(given.error, match=given.says):
        outer.step(given.upper, lower=given.lower)
    assert everything([x], outer) == before and outer.answer[0] is answer[0]
    if case.startswith("other"):
        outer.bind(None)
    outer.step(f_of, lower=(HELD, lambda y: training(x, *y)))


def test_losses_that_are_the_variable_and_lists_of_parameters() -> None:
    x, y = torch.tensor(4.0, requires_grad=True), torch.tensor(2.0)
    outer = BiSLS([x], hypergradient=implicit, lower_bound=None)
    outer.step(lambda y: y, lower=(y, lambda y: y**2 - x * y))
    assert x.item() < 4.0 and not outer.answer.requires_grad
    x = torch.zeros(6, requires_grad=True)
    parameters = nn.ParameterList(HELD)
    outer = BiSLS([x], hypergradient=implicit)
    outer.step(f_of, lower=(parameters, lambda y: training(x, *y)))
    assert all(t.requires_grad and t.grad is None for t in outer.answer)


def test_the_papers_search_asks_for_a_step_size() -> None:
    x = torch.zeros(6, requires_grad=True)
    with pytest.raises(LowerLevelError, match=r"lower=\(tensors, loss, step_size\)"):
        OneStepBiSLS([x], hypergradient=implicit).step(f_of, lower=(HELD, lambda y: training(x, *y)))


def test_a_lower_level_is_given_in_one_place() -> None:
    x, y = torch.zeros(6, requires_grad=True), [t.requires_grad_() for t in start()]
    outer = BiSLS([x], lower=torch.optim.SGD(y, lr=STEP), hypergradient=implicit)
    with pytest.raises(OptionError, match="bound to a lower level already"):
        outer.step(f_of, lower=(HELD, lambda y: training(x, *y)))
    with pytest.raises(LowerLevelError, match="moved in place"):
        _ = outer.answer
    free = BiSLS([x], hypergradient=implicit)
    with pytest.raises(ClosureError, match="two lower losses"):
        free.step(f_of, lambda: training(x, *y), lower=(HELD, lambda y: training(x, *y)))
