"""Steps whose length is kept: what they cost, how long they are, what undoes them, and what makes a search due."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import SLS, BiSLS, OneStepBiSLS
from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.hypergradient import Lanczos, assign, implicit
from adaptive_bilevel.policies import SLS as Rule
from adaptive_bilevel.policies import SLSB, GuardedSLS, Outcome
from tests.bilevel.helpers import EXACT, everything

WEIGHTS = torch.tensor([1.0, 0.3, 0.05], dtype=torch.float64)


class Run:
    """f = sum w (y - 1)^2 / 2 + .01 |x|^2 + 1, y* = x / 2, on full batches; `noise` moves the target of each step.

    Attributes:
        outcomes: Of the upper steps.
    """

    def __init__(self, noise: float = 0.0, optimizer: Any = BiSLS, **options: Any) -> None:
        self.x = torch.tensor([4.0, -3.0, 8.0], dtype=torch.float64, requires_grad=True)
        self.y = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        self.inner = SLS([self.y])
        options = {"solver": EXACT, "pace": "auto", **options} if optimizer is BiSLS else options
        self.outer = optimizer([self.x], lower=self.inner, **options)
        self.noise, self.rng = noise, torch.Generator().manual_seed(0)
        self.outcomes: list[int] = []
        self.target = torch.ones(3, dtype=torch.float64)

    def lower(self) -> Tensor:
        return (self.y - 0.5 * self.x).square().sum()

    def upper(self) -> Tensor:
        return 0.5 * (WEIGHTS * (self.y - self.target).square()).sum() + 0.01 * self.x.square().sum() + 1.0

    def prepare(self) -> None:
        """Do all of an iteration but the upper step."""
        if self.noise:
            self.target = 1.0 + self.noise * torch.randn(3, dtype=torch.float64, generator=self.rng)
        for _ in range(3):
            self.inner.step(self.lower)
        assign([self.x], implicit(self.upper, self.lower, [self.x], [self.y], solver=EXACT))

    def step(self, upper: Callable[[], Any] | None = None, count: int = 1) -> int:
        for _ in range(count):
            self.prepare()
            self.outer.step(upper or self.upper)
            assert self.outer.record is not None
            self.outcomes.append(int(self.outer.record.outcome))
        return self.outcomes[-1]

    def until_kept(self, upper: Callable[[], Any] | None = None) -> None:
        """Take steps until one is kept, with another one to come."""
        while not (self.outcomes and self.outcomes[-1] == Outcome.kept and self.state["since"] + 2 < self.state["gap"]):
            self.step(upper)
            assert len(self.outcomes) < 60

    @property
    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.outer.state["pace"]
        return found


def test_a_kept_step_takes_one_value_and_is_no_longer_than_the_certified_one() -> None:
    run, certified = Run(), math.nan
    for _ in range(40):
        run.prepare()
        upper, lower = (vars(counts).copy() for counts in (run.outer.evaluations.upper, run.outer.evaluations.lower))
        slope = 0.0 if run.x.grad is None else float(run.x.grad.square().sum())
        run.outer.step(run.upper)
        record = run.outer.record
        assert record is not None
        run.outcomes.append(int(record.outcome))
        length = record.step_size * slope**0.5
        if record.outcome != Outcome.kept:
            certified = length if record.moved else certified
            continue
        assert record.trials == 0 and length <= certified * (1.0 + 1e-12)
        assert record.slope == pytest.approx(slope)
        assert vars(run.outer.evaluations.lower) == lower
        assert vars(run.outer.evaluations.upper) == {**upper, "values": upper["values"] + 1}
    assert run.outcomes.count(Outcome.kept) > 20
    assert run.upper().item() < 1.0841


@pytest.mark.parametrize(
    "options",
    [{"pace": "every"}, {"momentum": False}, {"optimizer": OneStepBiSLS}],
    ids=["every", "certified", "paper"],
)
def test_every_step_is_searched(options: dict[str, Any]) -> None:
    run = Run(**options)
    run.step(count=20)
    assert Outcome.kept not in run.outcomes
    assert "gap" not in run.outer.state.get("pace", {})


def test_momentum_that_certifies_every_step_goes_with_no_pace() -> None:
    class Own:
        keeps = True

        def init(self) -> Any: ...
        def due(self, context: Any, state: Any) -> Any: ...
        def propose(self, context: Any, state: Any) -> Any: ...
        def regrets(self, context: Any, state: Any) -> Any: ...
        def commit(self, context: Any, record: Any, state: Any) -> Any: ...

    with pytest.raises(OptionError, match="momentum=False"):
        Run(momentum=False, pace=Own())
    with pytest.raises(OptionError, match="pace"):
        Run(pace="rarely")
    with pytest.raises(TypeError, match="pace"):
        Run(optimizer=OneStepBiSLS, pace="auto")


def test_where_samples_disagree_every_step_is_searched() -> None:
    run = Run(noise=3.0)
    run.step(count=40)
    assert Outcome.kept not in run.outcomes[10:]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])
def test_a_kept_step_that_was_bad_is_undone(value: float) -> None:
    """x and y are as before that step, to the bit; the next step is searched."""
    run, before = Run(), [torch.zeros(3)] * 2
    while not (run.outcomes and run.outcomes[-1] == Outcome.kept):
        run.prepare()
        before = [t.detach().clone() for t in (run.x, run.y)]
        run.outer.step(run.upper)
        assert run.outer.record is not None
        run.outcomes.append(int(run.outer.record.outcome))
    after = [t.detach().clone() for t in (run.x, run.y)]
    assert run.step(lambda: run.upper() * value) == Outcome.undone
    for now, then, moved in zip((run.x, run.y), before, after, strict=True):
        assert torch.equal(now.detach(), then) and not torch.equal(moved, then)
    record = run.outer.record
    assert record is not None and record.step_size == 0.0 and record.trials == 0
    assert run.step() == Outcome.accepted
    assert run.outer.record is not None and run.outer.record.trials > 0


def test_after_a_step_that_was_undone_a_search_is_made_even_at_rounding() -> None:
    """At a solution: steps promise rounding and are kept. One of them is undone, since f has risen."""
    run = Run()
    run.step(count=60)
    for k in range(20):
        run.step()
        if run.outcomes[-1] == Outcome.kept and run.step(lambda: run.upper() + 1.0) == Outcome.undone:
            break
        assert k < 19
    assert run.step() != Outcome.kept


def test_a_searched_step_is_not_undone() -> None:
    run = Run()
    while not (run.outcomes and run.outcomes[-1] == Outcome.accepted):
        run.step()
    before = run.x.detach().clone()
    assert run.step(lambda: run.upper() * math.nan) == Outcome.non_finite
    assert torch.equal(run.x.detach(), before)


def test_along_a_hypergradient_of_the_wrong_sign_every_step_is_searched() -> None:
    """The search goes along another path, and what it finds there says nothing of a step along h."""
    run = Run()
    prepare = run.prepare

    def turned() -> None:
        prepare()
        assert run.x.grad is not None
        run.x.grad.neg_()

    run.prepare = turned  # type: ignore[method-assign]
    run.step(count=15)
    assert set(run.outcomes) == {Outcome.accepted}
    assert run.upper().item() < 1.1


@pytest.mark.parametrize(("after_kept", "due"), [(1.0, False), (0.26, False), (0.24, True), (-1.0, True)])
def test_where_f_falls_later_than_kept_steps_a_search_is_due(after_kept: float, due: bool) -> None:
    """A quarter of the falls after searched steps is asked for, for the same promise."""
    run = Run()
    run.until_kept()
    falls = [after_kept * 0.8, 0.8, after_kept * 0.8]
    run.outer.state["pace"].update(falls=falls, promises=[1e-3, 4e-3, 2e-3], kept=[True, False, True])
    assert (run.step() != Outcome.kept) == due


@pytest.mark.parametrize("part", [1.0, 0.1])
def test_a_scheduled_step_promises_the_part_that_is_taken(part: float) -> None:
    """Else f would seem to fall by too little, as where samples disagree."""
    run = Run()
    schedule = torch.optim.lr_scheduler.LambdaLR(run.outer, lambda k: part if k else 1.0)
    for _ in range(40):
        run.step()
        schedule.step()
    assert run.outcomes.count(Outcome.kept) > 20


def test_what_somebody_else_has_moved_is_not_undone() -> None:
    run = Run()
    run.until_kept()
    with torch.no_grad():
        run.x += 1.0
    before = run.x.detach().clone()
    assert run.step(lambda: run.upper() * math.nan) == Outcome.non_finite
    assert torch.equal(run.x.detach(), before)


def other_closure(run: Run) -> Any:
    return lambda: run.upper() * 1.0


def longer_batch(run: Run) -> Any:
    return closure_of(run, torch.zeros(3))


def closure_of(run: Run, batch: Tensor) -> Any:
    return lambda: run.upper() + 0.0 * batch.sum()


def steeper(run: Run) -> Any:
    run.outer.state["pace"]["promised"] = 1e-9


def above(run: Run) -> Any:
    run.outer.state["pace"]["losses"] = [0.0]
    run.outer.state["pace"]["at"] = -1.0  # so the step before is not undone


def jump(run: Run) -> Any:
    run.outer.param_groups[0]["lr"] *= 0.1


def forget(run: Run) -> Any:
    saved = run.outer.state_dict()
    del saved["param_groups"][0]["shared_state"]["pace"]
    run.outer.load_state_dict(saved)


def larger_variable(run: Run) -> Any:
    more = torch.ones(2, dtype=torch.float64, requires_grad=True)
    run.outer.add_param_group({"params": [more]})
    more.grad = torch.ones_like(more)
    return lambda: run.upper() + more.sum() + 10.0


def fewer_entries(run: Run) -> Any:
    assert run.x.grad is not None
    run.state["entries"] = 9.0


@pytest.mark.parametrize(
    "change", [other_closure, longer_batch, steeper, above, jump, forget, larger_variable, fewer_entries]
)
def test_a_search_is_due(change: Callable[[Run], Any]) -> None:
    def ready() -> Run:
        run = Run()
        run.until_kept(closure_of(run, torch.zeros(2)) if change is longer_batch else None)
        return run

    run, usual = ready(), ready()
    same = closure_of(usual, torch.zeros(2)) if change is longer_batch else None
    assert usual.step(same) == Outcome.kept
    run.prepare()
    run.outer.step(change(run) or run.upper)
    assert run.outer.record is not None
    assert run.outer.record.outcome != Outcome.kept and run.outer.record.trials > 0


@pytest.mark.parametrize("direction", ["sgd", "adam"])
def test_a_run_that_is_resumed_between_two_searches_goes_on_to_the_bit(direction: str) -> None:
    run, other = Run(direction=direction), Run(direction=direction)
    run.step(count=3)
    run.until_kept()
    saved = io.BytesIO()
    torch.save([o.state_dict() for o in (run.inner, run.outer)], saved)
    saved.seek(0)
    for optimizer, state in zip((other.inner, other.outer), torch.load(saved, weights_only=True), strict=True):
        optimizer.load_state_dict(state)
    with torch.no_grad():
        other.x.copy_(run.x)
        other.y.copy_(run.y)
    for each in (run, other):
        each.step(count=12)
        each.step(closure_of(each, torch.tensor(math.nan)))  # also what undoes a kept step is saved
    assert run.outcomes[-13:] == other.outcomes
    tensors = ([each.x, each.y] for each in (run, other))
    first, second = (everything(t, r.inner, r.outer) for t, r in zip(tensors, (run, other), strict=True))
    assert first == second


@pytest.mark.parametrize("search", [Rule(), GuardedSLS(), SLSB(bound=1.0)], ids=lambda rule: type(rule).__name__)
def test_no_kept_step_is_above_a_bound(search: Any) -> None:
    """Every step counts for the schedule of a bound, kept or not."""
    run, moved = Run(search=search), 0
    for _ in range(30):
        run.step()
        record = run.outer.record
        assert record is not None and record.step_size <= record.bound * (1.0 + 1e-12)
        moved += record.moved
        assert run.outer.state["policy"]["count"] == moved
    assert Outcome.kept in run.outcomes
    assert run.upper().item() < 2.0


@pytest.mark.parametrize("shared", [True, False])
def test_every_step_is_searched_where_the_hypergradient_has_left_its_inverse(shared: bool) -> None:
    """With the same Lanczos in both; a hypergradient by another solver leaves nothing."""
    run = Run(solver=Lanczos())

    def prepare() -> None:
        for _ in range(3):
            run.inner.step(run.lower)
        solver = Lanczos() if shared else EXACT
        assign([run.x], implicit(run.upper, run.lower, [run.x], [run.y], solver=solver))

    run.prepare = prepare  # type: ignore[method-assign]
    run.step(count=25)
    assert (Outcome.kept in run.outcomes) != shared


def test_a_scaled_hypergradient_is_searched_along_like_the_whole() -> None:
    """Codebases hand on a thousandth of it, say: what it promises by itself is lost in the rounding of f."""
    ends = []
    for factor in (1.0, 1e-12):
        run = Run(pace="every", momentum=False, carry=False)
        for _ in range(12):
            run.prepare()
            assert run.x.grad is not None
            run.x.grad.mul_(factor)
            run.outer.step(run.upper)
            assert run.outer.record is not None and run.outer.record.outcome == Outcome.accepted
        ends.append(run.upper().item())
    assert ends[1] == pytest.approx(ends[0], rel=1e-6)
