"""An upper step leaves no trace but its own, whatever happens in a closure."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive_bilevel import SLS, BiSLS, BiSPS, OneStepBiSLS
from adaptive_bilevel.errors import NonFiniteError
from adaptive_bilevel.policies import Outcome
from tests.bilevel.helpers import Traced, everything, prepared
from tests.optim.helpers import plain
from tests.problems import b2

pytestmark = pytest.mark.filterwarnings("ignore:.*no trial step gave", "ignore:.*slope is negative")


class Levels:
    """An embedding with dropout and batch norm above a head with the same."""

    def __init__(self, outer_class: Any = BiSLS, inner_class: Any = SLS, **options: Any) -> None:
        torch.manual_seed(5)
        self.body: Any = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3))
        self.head: Any = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 1))
        self.data = torch.randn(2, 12, 4)
        self.target = torch.randn(2, 12, 1)
        self.tensors = [*self.body.parameters(), *self.head.parameters()]
        self.inner = inner_class(self.head.parameters(), 0.1)
        self.outer = outer_class(self.body.parameters(), 100.0, lower=self.inner, **options)
        self.masks: list[Any] = []
        self.head[2].register_forward_hook(lambda module, args, out: self.masks.append((out != 0).tolist()))

    def loss(self, part: int) -> Tensor:
        out = self.head(self.body(self.data[part]))
        return (out - self.target[part]).square().mean() + 1e-2 * sum(p.square().sum() for p in self.head.parameters())

    def lower(self) -> Tensor:
        return self.loss(0)

    def upper(self) -> Tensor:
        return self.loss(1)

    def promise(self) -> None:
        with torch.random.fork_rng():
            for module in (self.body, self.head):
                module.eval()
            grads = torch.autograd.grad(self.upper(), list(self.body.parameters()))
            for module in (self.body, self.head):
                module.train()
        for p, g in zip(self.body.parameters(), grads, strict=True):
            p.grad = g
        for p in self.head.parameters():
            p.grad = torch.ones_like(p)

    def everything(self) -> Any:
        return everything(self.tensors, self.inner, self.outer, modules=[self.body, self.head])

    def effects(self) -> Any:
        buffers = [dict(module.named_buffers()) for module in (self.body, self.head)]
        return plain([buffers, torch.get_rng_state(), [p.grad for p in self.tensors]])


CASES: dict[str, dict[str, Any]] = {
    "tangent": {},
    "adam": {"direction": "adam"},
    "step": {"outer_class": OneStepBiSLS, "response_steps": 2},
    "bisps": {"outer_class": BiSPS},
}

every_case = pytest.mark.parametrize("case", CASES)


@every_case
@pytest.mark.parametrize("given", [False, True])
def test_side_effects_are_those_of_one_upper_evaluation(case: str, given: bool) -> None:
    levels = Levels(**CASES[case])
    for _ in range(3):
        levels.inner.step(levels.lower)
        levels.promise()
        state = torch.get_rng_state()
        buffers = plain([levels.body.state_dict(), levels.head.state_dict()])
        saved = [{k: v.clone() for k, v in m.state_dict().items()} for m in (levels.body, levels.head)]
        levels.upper()
        expected = levels.effects()
        torch.set_rng_state(state)
        for module, old in zip((levels.body, levels.head), saved, strict=True):
            module.load_state_dict(old)
        assert plain([levels.body.state_dict(), levels.head.state_dict()]) == buffers
        if given and case != "bisps":
            levels.outer.step(levels.upper, levels.lower)
        else:
            levels.outer.step(levels.upper)
        assert levels.effects() == expected
    if case != "bisps":
        assert levels.outer.evaluations.upper.values >= 3


@pytest.mark.parametrize("case", ["tangent", "adam", "step"])
def test_closures_are_replayed_with_their_masks(case: str) -> None:
    levels = Levels(**CASES[case])
    levels.inner.step(levels.lower)
    drawn = levels.masks[0]
    levels.promise()
    levels.masks.clear()
    which: list[str] = []

    def upper() -> Tensor:
        which.append("upper")
        return levels.upper()

    def lower() -> Tensor:
        which.append("lower")
        return levels.lower()

    levels.inner.sample = levels.inner.sample._replace(closure=lower)
    levels.outer.step(upper)
    uppers = [m for m, w in zip(levels.masks, which, strict=True) if w == "upper"]
    lowers = [m for m, w in zip(levels.masks, which, strict=True) if w == "lower"]
    assert len(uppers) > 1
    assert lowers
    assert all(m == uppers[0] for m in uppers)
    assert all(m == drawn for m in lowers)
    assert uppers[0] != drawn
    assert levels.inner.sample.closure is lower


class Broken(Exception):
    pass


def counted(case: str) -> tuple[int, int]:
    """How often a step calls the closures."""
    levels = ready(case)
    upper, lower = Traced(levels.upper), Traced(levels.lower)
    step(levels, case, upper, lower)
    return upper.calls, lower.calls


def ready(case: str) -> Levels:
    levels = Levels(**CASES[case])
    for _ in range(2):
        levels.inner.step(levels.lower)
        levels.promise()
        levels.outer.step(levels.upper)
    levels.inner.step(levels.lower)
    levels.promise()
    return levels


def step(levels: Levels, case: str, upper: Any, lower: Any) -> None:
    if case == "bisps":
        levels.outer.step(upper)
    else:
        levels.outer.step(upper, lower)


@every_case
@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
def test_exceptions_at_every_call(case: str, error: type[BaseException]) -> None:
    counts = counted(case)
    assert case == "bisps" or min(counts) >= 2
    levels = ready(case)
    before, record = levels.everything(), levels.outer.record
    for level, count in enumerate(counts):
        for index in range(count):
            closures = [Traced(levels.upper), Traced(levels.lower)]
            closures[level].at, closures[level].fault = index, error()
            with pytest.raises(error):
                step(levels, case, *closures)
            assert levels.everything() == before
            assert levels.outer.record is record
    step(levels, case, levels.upper, levels.lower)
    fresh = ready(case)
    step(fresh, case, fresh.upper, fresh.lower)
    assert levels.everything() == fresh.everything()


@every_case
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_at_every_call(case: str, value: float) -> None:
    counts = counted(case)
    for level, count in enumerate(counts):
        for index in range(count):
            levels = ready(case)
            before = levels.everything()
            closures = [Traced(levels.upper), Traced(levels.lower)]
            closures[level].at, closures[level].fault = index, value
            step(levels, case, *closures)
            record = levels.outer.record
            assert all(bool(p.isfinite().all()) for p in levels.tensors)
            redirected = level == 1 and record.slope_ratio < 0  # the lower loss is differentiated once more
            if (level, index) == (0, 0) or (level == 1 and index == 0 and case != "step"):
                assert record.outcome == Outcome.non_finite
                assert levels.everything() == before
            elif redirected and record.outcome == Outcome.non_finite:
                assert levels.everything() == before
            else:
                assert record.outcome in (Outcome.accepted, Outcome.at_bound, Outcome.search_failed)
                assert not record.moved or math.isfinite(record.value)


@every_case
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_hypergradient_that_is_not_finite(case: str, value: float) -> None:
    levels = ready(case)
    assert levels.body[0].weight.grad is not None
    levels.body[0].weight.grad[0, 0] = value
    before = levels.everything()
    levels.outer.step(levels.upper)
    assert levels.outer.record.outcome == Outcome.non_finite
    assert levels.everything() == before


@pytest.mark.parametrize("cls", [BiSLS, BiSPS])
def test_too_many_skips(cls: Any) -> None:
    point = b2().instance()
    outer = cls([point.x], 1.0, lower=torch.optim.SGD([point.y], lr=0.1), max_skips=3)
    point.x.grad = torch.full_like(point.x, math.nan)
    before = everything([point.x, point.y], outer)
    for _ in range(2):
        outer.step(point.upper)
    with pytest.raises(NonFiniteError, match=r"3 steps in a row.*max_skips=3") as caught:
        outer.step(point.upper)
    assert isinstance(caught.value, RuntimeError)
    assert everything([point.x, point.y], outer) == before


def test_a_projection_that_raises_leaves_no_trace() -> None:
    point, inner, _ = prepared()
    calls: list[int] = []
    fail = [0]

    def project(tensors: Any) -> None:
        calls.append(1)
        tensors[0].clamp_(-1, 1)
        if len(calls) == fail[0]:
            raise Broken

    outer: Any = BiSLS([point.x], 1.0, lower=inner, project=project)
    inner.step(point.lower)
    point.x.grad = torch.ones_like(point.x)
    before = everything([point.x, point.y], inner, outer)
    for fail[0] in range(1, 4):
        calls.clear()
        with pytest.raises(Broken):
            outer.step(point.upper)
        assert everything([point.x, point.y], inner, outer) == before
