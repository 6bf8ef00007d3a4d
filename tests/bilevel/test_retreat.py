"""A loss that leaves all of its recent values: both levels go back, to the bit, and the next step is shorter."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.bilevel.lower import LowerLevel
from adaptive_bilevel.hypergradient import implicit
from adaptive_bilevel.policies import Outcome
from loop import Run as Recorded
from runs import Job, Method
from tests.bilevel.test_kept_steps import Run

LEFT = "left the minimum"


def run_of(steps: int, **options: Any) -> Run:
    """A run with a search in every step, whose y stays where the lower steps put it, and whose f falls."""
    run = Run(pace="every", carry=False, **options)
    run.step(count=steps)
    assert set(run.outcomes) == {Outcome.accepted}
    return run


def tensors(run: Run) -> list[Tensor]:
    return [run.x.detach().clone(), run.y.detach().clone()]


def losses(run: Run) -> list[float]:
    known: list[float] = run.outer.state["retreat"]["losses"]
    return known


class Elsewhere:
    """The upper loss, which is as high as `value` wherever x is not as it was `at` a point."""

    def __init__(self, run: Run, value: float, at: list[Tensor]) -> None:
        self.run, self.value, self.at = run, value, at
        self.offset: Tensor | None = None

    def __call__(self) -> Tensor:
        loss = self.run.upper()
        if torch.equal(self.run.x.detach(), self.at[0]):
            return loss
        if self.offset is None:
            self.offset = self.value - loss.detach()
        return loss + self.offset


def after_steps(count: int, **options: Any) -> tuple[Run, list[Tensor]]:
    """A run in which f has fallen in each step, and the point to go back to."""
    run, points, chosen, age = Run(pace="every", carry=False, **options), list[list[Tensor]](), list[int](), 0
    for k in range(count):
        run.prepare()
        points.append(tensors(run))
        run.outer.step(run.upper)
        assert run.outer.record is not None and run.outer.record.outcome == Outcome.accepted
        age += 1
        if 2 * age >= min(k, 16):
            chosen, age = [*chosen[-1:], k], 0
    return run, points[chosen[-1 if 2 * age >= min(count, 16) else 0]]


@pytest.mark.parametrize("direction", ["sgd", "adam"])
def test_both_levels_go_back_and_the_next_step_is_shorter(direction: str) -> None:
    run, point = after_steps(9, direction=direction)
    length = run.outer.state["policy"]["previous"]
    with pytest.warns(UserWarning, match=LEFT):
        assert run.step(Elsewhere(run, 3.0 * losses(run)[0], point)) == Outcome.returned
    assert all(map(torch.equal, tensors(run), point))
    record = run.outer.record
    assert record is not None and record.step_size == 0.0 and record.trials == 0 and not record.moved
    assert run.step() == Outcome.accepted
    assert run.outer.record is not None and 0.0 < run.outer.record.step_size < length


@pytest.mark.parametrize(
    ("steps", "value"),
    [
        (9, lambda known: known[0]),  # within the spread
        (4, lambda known: known[0] + 3.0 * (known[0] - known[-1])),  # four values: their spread counts four times
        (30, lambda known: known[-1] + 2.0 * (known[-16] - known[-1])),  # less than half of the fall
    ],
    ids=["within the spread", "few values", "little of the fall"],
)
def test_what_is_not_much_is_not_taken_back(steps: int, value: Any) -> None:
    run, point = after_steps(steps)
    assert run.step(Elsewhere(run, value(losses(run)), point)) == Outcome.accepted


def test_losses_on_the_way_to_where_it_goes_back_from_do_not_count() -> None:
    run, point = after_steps(9)
    known = losses(run)
    assert run.step(Elsewhere(run, known[0], point)) == Outcome.accepted
    assert losses(run) == [*known, known[0]]
    with pytest.warns(UserWarning, match=LEFT):
        assert run.step(Elsewhere(run, 3.0 * known[0], point)) == Outcome.returned
    assert losses(run) == [value for value in known if value <= known[4]]  # that of the point


def leave(run: Run, point: list[Tensor], parts: list[float]) -> int:
    """Take steps at whose start f has risen from its last value by these parts of its fall; return the last outcome."""
    known, first = losses(run)[-1], run.outer.state["retreat"]["first"]
    return [run.step(Elsewhere(run, known + part * (first - known), point)) for part in parts][-1]


def test_a_first_high_value_must_be_twice_as_far() -> None:
    for before, outcome in ([], Outcome.accepted), ([0.1], Outcome.returned):
        run, point = after_steps(4)
        high, low = max(losses(run)), min(losses(run))
        apart = 4.0 * (high - low)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", f".*{LEFT}", UserWarning)
            for part in [*before, 0.5]:
                last = run.step(Elsewhere(run, high + (1.0 + part) * apart, point))
        assert last == outcome


def test_a_rise_in_small_steps_is_taken_back() -> None:
    run, point = after_steps(30)
    recent = list(losses(run))
    assert leave(run, point, [0.1, 0.2, 0.3]) == Outcome.accepted
    assert losses(run) == recent
    with pytest.warns(UserWarning, match=LEFT):
        assert leave(run, point, [0.45]) == Outcome.returned  # half of the decrease of the logarithm
    assert all(map(torch.equal, tensors(run), point))


def test_values_aside_count_when_f_is_back_or_stays() -> None:
    run, point = after_steps(30)
    recent = list(losses(run))
    assert leave(run, point, [0.2, 0.0]) == Outcome.accepted
    aside, back = losses(run)[-2:]
    assert losses(run) == [*recent, aside, back][-16:] and aside > max(recent) >= back
    run, point = after_steps(30)
    assert leave(run, point, [0.3] * 16) == Outcome.accepted
    assert min(losses(run)) > max(recent) and len(losses(run)) == 16


def test_a_far_rise_is_taken_back_from_the_fifth_step_on() -> None:
    run, point = after_steps(4)
    with pytest.warns(UserWarning, match=LEFT):
        assert run.step(Elsewhere(run, 1e6, point)) == Outcome.returned
    assert all(map(torch.equal, tensors(run), point))


def test_without_a_lower_level_nothing_is_said_of_one() -> None:
    x, scale = torch.ones(2, requires_grad=True), torch.tensor([1.0, 10.0])
    outer, points = BiSLS([x], hypergradient="direct"), list[Tensor]()
    for _ in range(6):
        points.append(x.detach().clone())
        outer.step(lambda: (scale * x.square()).sum())
    with pytest.warns(UserWarning, match="this sample is unusual. x went back") as caught:
        outer.step(lambda: 1e3 * (x - points[2]).square().sum())
    assert "lower" not in str(caught[0].message)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_lower_variable_that_is_not_finite_goes_back_if_the_loss_is_finite_there(value: float) -> None:
    run, point = after_steps(2)
    with torch.no_grad():
        run.y[0] = value
    at_fault = copy.deepcopy(run)
    with pytest.warns(UserWarning, match=LEFT):
        run.outer.step(run.upper)
    assert run.outer.record is not None and run.outer.record.outcome == Outcome.returned
    assert all(map(torch.equal, tensors(run), point))
    at_fault.outer.step(lambda: at_fault.upper() * value)  # as it is at the point
    assert at_fault.outer.record is not None and at_fault.outer.record.outcome == Outcome.non_finite


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("direction", ["sgd", "adam"])
def test_gradient_descent_below_survives_what_x_makes_too_steep(direction: str, momentum: float) -> None:
    """Weight decays grow, and with them the curvature, until lr is too long for it: f was infinite or above 1e3."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 20, generator=generator, dtype=torch.float64)
    b = a[:, 0] + torch.randn(40, generator=generator, dtype=torch.float64)
    c = torch.randn(40, 20, generator=generator, dtype=torch.float64)
    x = torch.full((20,), -2.0, dtype=torch.float64, requires_grad=True)
    y = torch.zeros(20, dtype=torch.float64, requires_grad=True)

    def upper() -> Tensor:
        return ((c @ y - c[:, 0]) ** 2).mean()

    def lower() -> Tensor:
        return ((a @ y - b) ** 2).mean() + (x.exp() * y**2).sum()

    inner = torch.optim.SGD([y], lr=0.1, momentum=momentum)
    outer = BiSLS([x], lower=inner, direction=direction)
    values = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".*{LEFT}", UserWarning)
        for _ in range(40):
            for _ in range(20):
                inner.zero_grad()
                lower().backward()
                inner.step()
            (x.grad,) = implicit(upper, lower, [x], [y])
            values.append(float(outer.step(upper, lower)))
    assert upper().item() < values[0]
    assert bool(x.isfinite().all()) and bool(y.isfinite().all())


@pytest.mark.parametrize(("make", "left"), [(torch.optim.SGD, 0), (torch.optim.Adagrad, 1)])
def test_a_stock_optimizer_forgets_velocities_and_what_is_not_finite(make: Any, left: int) -> None:
    y, z = (torch.ones(1, requires_grad=True) for _ in range(2))
    optimizer = make([y, z], lr=0.1, **({"momentum": 0.9} if make is torch.optim.SGD else {}))
    for p, g in ((y, math.nan), (z, 1.0)):
        p.grad = torch.full_like(p, g)
    optimizer.step()
    LowerLevel([optimizer]).restart()
    assert [p is z for p in optimizer.state] == [True] * left


def test_losses_that_have_changed_are_no_reason() -> None:
    run = run_of(12)
    values = run.outer.evaluations.upper.values
    assert run.step(lambda: run.upper() + 1e3) == Outcome.accepted
    assert run.outer.record is not None
    assert run.outer.evaluations.upper.values == values + 1 + run.outer.record.trials  # one at the point


def test_a_move_of_entries_without_a_hypergradient_is_no_reason() -> None:
    run, point = after_steps(9)
    run.prepare()
    assert run.x.grad is not None
    largest = (run.x.detach() - point[0]).abs().argmax()
    run.x.grad[largest] = 0.0
    run.outer.step(Elsewhere(run, 1e6, point))
    assert run.outer.record is not None and run.outer.record.outcome == Outcome.accepted


def test_what_somebody_else_has_moved_does_not_go_back() -> None:
    run, point = after_steps(9)
    with torch.no_grad():
        run.x += 1e-3
    upper = Elsewhere(run, 1e6, point)
    assert run.step(upper, count=2) == Outcome.accepted  # nor does the next step
    assert Outcome.returned not in run.outcomes


@pytest.mark.parametrize("changed", ["loaded", "another model", "another optimizer"])
def test_a_new_start_has_no_point(changed: str) -> None:
    run, point = after_steps(9)
    if changed == "loaded":
        run.outer.load_state_dict(run.outer.state_dict())
    elif changed == "another model":
        run.y = run.y.detach().clone().requires_grad_()
    if changed != "loaded":
        run.inner = SLS([run.y])
        run.outer.bind(run.inner)
    upper = Elsewhere(run, 1e6, point)
    if changed != "another optimizer":
        assert run.step(upper) == Outcome.accepted
        return
    with pytest.warns(UserWarning, match=LEFT):
        assert run.step(upper) == Outcome.returned


def test_other_tensors_do_not_go_back() -> None:
    """A group may be given other tensors, of another size."""
    x = torch.tensor([3.0], requires_grad=True)
    outer = BiSLS([x], hypergradient="direct", momentum=False)
    for _ in range(9):
        outer.step(lambda: (x**2).sum())
    z = torch.tensor([3.0, 3.0], requires_grad=True)
    outer.param_groups[0]["params"] = [z]
    outer.step(lambda: (z**2).sum() + 1e3)
    assert outer.record is not None and outer.record.moved


def test_an_interrupt_at_the_point_leaves_everything_as_it_was() -> None:
    run, point = after_steps(9)
    upper = Elsewhere(run, 1e6, point)
    run.prepare()
    before, state = tensors(run), copy.deepcopy(run.outer.state_dict())

    def interrupted() -> Tensor:
        if torch.equal(run.x.detach(), point[0]):
            raise KeyboardInterrupt
        return upper()

    with pytest.raises(KeyboardInterrupt):
        run.outer.step(interrupted)
    assert all(map(torch.equal, tensors(run), before))
    assert str(run.outer.state_dict()) == str(state)


@pytest.mark.parametrize("seed", [2, 7])
def test_a_meta_weight_net_keeps_its_network(seed: int) -> None:
    """All weights vanish, y goes to 0 within a lower loop, and no hypergradient leads back: f was 2.30."""
    torch.set_default_dtype(torch.float32)  # as the benchmark; the fixture restores it
    job = Job("meta-weight", {"iterations": 40}, Method("bisls-sgd", {}), seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".*{LEFT}", UserWarning)  # rounding of the machine decides whether it leaves
        state: Recorded = list(job.start(None)[2])[-1]
    assert state.evaluations[-1]["loss"] < 0.5
