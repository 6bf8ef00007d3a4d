"""Closures that are no function of the parameters: said once, and no step of rounding size is taken for one."""

from __future__ import annotations

import functools
import itertools
import random
import warnings
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from adaptive_bilevel import SLS, SLSB, AutoSLS, BiSLS
from adaptive_bilevel.bilevel import OneStepBiSLS
from adaptive_bilevel.hypergradient import assign, implicit
from adaptive_bilevel.policies import Outcome

CHANGES, STAYS = "at the same point", "same to the bit"
LOWER = [SLS, SLSB, AutoSLS]


def said(run: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught]


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(300, 8, generator=g)
    return A, torch.sign(A @ torch.randn(8, generator=g) + torch.randn(300, generator=g))


def logistic(w: Tensor, A: Tensor, t: Tensor) -> Tensor:
    return torch.nn.functional.softplus(-t * (A @ w)).mean()


def noisy(kind: str, w: Tensor) -> Any:
    """Return a closure of a loss that changes from call to call in one of several ways; "torch" does not in a trial."""
    A, t = data()
    batches = itertools.cycle(torch.arange(300).reshape(60, 5))
    own, python, numbers = torch.Generator().manual_seed(0), random.Random(0), numpy.random.default_rng(0)
    draws: dict[str, Any] = {
        "iterator": lambda: next(batches),
        "generator": lambda: torch.randint(300, (5,), generator=own),
        "numpy": lambda: torch.from_numpy(numbers.integers(0, 300, 5)),
        "python": lambda: torch.tensor(python.choices(range(300), k=5)),
        "torch": lambda: torch.randint(300, (5,)),
    }

    def closure() -> Tensor:
        rows = draws[kind]()
        return logistic(w, A[rows], t[rows])

    return closure


@pytest.mark.parametrize("make", LOWER, ids=lambda c: c.__name__)
@pytest.mark.parametrize("kind", ["iterator", "generator", "numpy", "python", "torch"])
def test_a_closure_that_changes_is_named_once(make: Any, kind: str) -> None:
    if make is AutoSLS:
        pytest.skip("takes what changes for samples that disagree, and then searches nothing")
    torch.manual_seed(0)
    w = torch.zeros(8, requires_grad=True)
    optimizer, closure = make([w]), noisy(kind, w)
    heard = said(lambda: [optimizer.step(closure) for _ in range(60)])
    assert sum(CHANGES in text for text in heard) == (kind != "torch")


@pytest.mark.parametrize("make", [BiSLS, OneStepBiSLS], ids=lambda c: c.__name__)
@pytest.mark.parametrize("kind", ["iterator", "numpy", "torch"])
def test_an_upper_closure_that_changes_is_named_once(make: Any, kind: str) -> None:
    torch.manual_seed(0)
    A, t = data(1)
    x, w = torch.zeros(8, requires_grad=True), torch.zeros(8, requires_grad=True)

    def lower() -> Tensor:
        return logistic(w, A, t) + (x.exp() * w**2).sum() / 10

    inner, upper = SLS([w]), noisy(kind, w)
    outer = make([x], lower=inner)

    def run() -> None:
        for _ in range(40):
            inner.step(lower)
            assign([x], implicit(upper, lower, [x], [w]))
            outer.step(upper)

    assert sum(CHANGES in text for text in said(run)) == (kind != "torch")


@pytest.mark.parametrize("make", LOWER, ids=lambda c: c.__name__)
def test_a_wrong_gradient_is_not_taken_for_a_change(make: Any) -> None:
    """A failed search looks at the closure once, and finds nothing: what is said is what was said before."""
    w = torch.tensor([3.0, 2.0], dtype=torch.float64, requires_grad=True)
    optimizer = make([w], 1.0)

    def rising() -> Tensor:
        return 2.0 * (w.detach() ** 2).sum() - (w**2).sum()

    heard = said(lambda: [optimizer.step(rising) for _ in range(12)])
    assert heard and not any(CHANGES in text or STAYS in text for text in heard)
    counts = optimizer.evaluations.lower
    assert counts.values == 12 * optimizer.record.trials + 2  # a look after the 1st and the 10th


@pytest.mark.filterwarnings("ignore:AutoSLS. the loss after the last step")
@pytest.mark.parametrize("make", LOWER, ids=lambda c: c.__name__)
def test_a_look_leaves_no_trace(make: Any) -> None:
    """A search that looks and then steps is, to the bit, one that does not look."""
    paths = []
    for looks in (True, False):
        torch.manual_seed(0)
        w = torch.full((4,), 2.0, dtype=torch.float64, requires_grad=True)
        optimizer = make([w], 1.0)
        optimizer._closure_checks.due = functools.partial(bool, looks)

        def closure(w: Tensor = w) -> Tensor:
            return (torch.nn.functional.dropout(w**4, 0.3) * torch.tensor([1.0, 2.0, 30.0, 400.0])).sum()

        paths.append([(optimizer.step(closure).item(), w.detach().clone()) for _ in range(30)])
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(*paths, strict=True))


# ---------------------------------------------------------------- a value that does not follow


@pytest.mark.parametrize("make", LOWER, ids=lambda c: c.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_computed_before_is_said_and_nothing_moves(make: Any, dtype: torch.dtype) -> None:
    w = torch.tensor([3.0, 2.0], dtype=dtype, requires_grad=True)
    optimizer, start = make([w]), w.detach().clone()

    def run() -> None:
        for _ in range(4):
            loss = (w**2).sum() + 1.0
            optimizer.step(functools.partial(torch.clone, loss))  # its value is that of before
            assert optimizer.record.outcome == Outcome.search_failed and torch.equal(w, start)

    heard = said(run)
    assert sum(STAYS in text for text in heard) == 1
    assert optimizer.record.trials <= 3  # it is known by then: no 40 trials for nothing


@pytest.mark.parametrize("copy", ["detached", "unrolled"])
def test_an_upper_loss_computed_before(copy: str) -> None:
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    outer = BiSLS([x])

    def run() -> None:
        for _ in range(4):
            y = torch.ones(3, dtype=torch.float64, requires_grad=True)
            for _ in range(2):
                y = y - 0.2 * torch.autograd.grad(((y - x) ** 2).sum(), y, create_graph=True)[0]
            x.grad = torch.autograd.grad(((y - 3) ** 2).sum(), x, retain_graph=True)[0]
            last = y.detach() if copy == "detached" else y
            outer.step(functools.partial(lambda a, b: ((a - 3) ** 2).sum() + 0 * ((b - 3) ** 2).sum(), last, y))

    try:
        heard = said(run)
    except Exception as error:
        heard = [str(error)]
        assert type(error).__module__.startswith("adaptive_bilevel")
    assert any(STAYS in text or "does not depend" in text for text in heard) and not x.any()


def test_one_trial_across_a_valley_is_no_such_case() -> None:
    """x to -x has the same value to the bit, and the next trial does not."""
    w = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    optimizer = SLS([w], lr=1.0)
    assert said(lambda: [optimizer.step(lambda: (w**2).sum()) for _ in range(3)]) == []
    assert w.abs().item() < 1.0


def test_a_plateau_that_ends_is_searched_to_its_end() -> None:
    """The first trials of a saturated loss are of one value, but shorter ones are not: the search finds them."""
    w = torch.tensor([1e3], requires_grad=True)
    optimizer = SLS([w], lower_bound=0.0)
    assert said(lambda: optimizer.step(lambda: (w**2 / (1 + w**2)).sum())) == []
    assert optimizer.record is not None and optimizer.record.moved
