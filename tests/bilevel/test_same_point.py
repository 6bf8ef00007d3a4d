"""A step takes over f_x, f_y and the graph of grad_y g from the hypergradient at its point; the iterates stay."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.bilevel import model_check
from adaptive_bilevel.hypergradient import Implicit, Lanczos, assign, implicit
from adaptive_bilevel.hypergradient.same_point import Handover
from live import live_bytes

K = 4


class Task:
    """A weighted regression by a small network. `upper_noise` and `lower_noise` say how the losses change."""

    def __init__(
        self, upper_noise: str = "none", lower_noise: str = "none", dtype: torch.dtype = torch.float64
    ) -> None:
        torch.manual_seed(0)
        self.noise = {"upper": upper_noise, "lower": lower_noise}
        self.data, self.target = torch.randn(24, 5).to(dtype), torch.randn(24, 1).to(dtype)
        norm = nn.BatchNorm1d(6) if "norm" in (upper_noise, lower_noise) else nn.Identity()
        self.net = nn.Sequential(nn.Linear(5, 6), norm, nn.Tanh(), nn.Linear(6, 1)).to(dtype)
        self.drop, self.calls, self.rng = nn.Dropout(0.4), itertools.count(), torch.Generator().manual_seed(0)
        self.x = torch.zeros(16, dtype=dtype, requires_grad=True)
        self.y = list(self.net.parameters())

    def rows(self, level: str, first: int, last: int) -> Tensor:
        """Return the rows of a batch; an iterator gives another one in each call."""
        if self.noise[level] == "iterator":
            return torch.randint(first, last, (6,), generator=self.rng)
        return torch.arange(first, last)

    def outputs(self, level: str, rows: Tensor) -> Tensor:
        inputs = self.data[rows]
        return (self.net(self.drop(inputs) if self.noise[level] == "dropout" else inputs) - self.target[rows])[:, 0]

    def upper(self) -> Tensor:
        return self.outputs("upper", self.rows("upper", 16, 24)).square().mean() + 1e-3 * self.x.square().sum()

    def lower(self) -> Tensor:
        rows = self.rows("lower", 0, 16)
        return (self.x[rows].sigmoid() * self.outputs("lower", rows).square()).mean()

    def everything(self) -> list[Tensor]:
        return [t.detach().clone() for t in (self.x, *self.y, *self.net.buffers(), torch.get_rng_state())]


Between = Callable[[Task], Any]


def run(
    task: Task, steps: int = 5, between: Between = lambda task: None, products: str = "auto", **options: Any
) -> tuple[list[dict[str, int]], Any]:
    """Return what each step has counted, and the optimizer."""
    inner = SLS(task.y)
    outer = BiSLS([task.x], lower=inner, **{"solver": Lanczos(K), **options})
    found = []
    for _ in range(steps):
        for _ in range(3):
            inner.step(task.lower)
        before = counted(outer)
        assign([task.x], implicit(task.upper, task.lower, [task.x], task.y, Lanczos(K), products=products))
        between(task)
        outer.step(task.upper)
        assert outer.record is not None
        after = counted(outer)
        after["upper values"] -= outer.record.trials
        found.append({name: after[name] - before[name] for name in after})
    return found, outer


def counted(outer: BiSLS) -> dict[str, int]:
    counts = outer.evaluations
    return {
        f"{level} {kind}": number
        for level, of in (("upper", counts.upper), ("lower", counts.lower))
        for kind, number in vars(of).items()
    }


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what lets nothing be taken over any more."""

    def separate() -> None:
        monkeypatch.setattr(Handover, "leave", lambda *parts: None)

    return separate


# In a step: (values, gradients) of f beside trials, and of g beside the model check.
TAKEN, BELOW, OWN = (1, 0), (0, 0), (0, 1)


@pytest.mark.parametrize(
    ("upper_noise", "lower_noise", "upper", "lower"),
    [
        ("none", "none", TAKEN, BELOW),
        ("none", "dropout", TAKEN, BELOW),  # the step evaluates g under the same random numbers
        ("dropout", "none", OWN, OWN),  # f has another mask in each call, and no graph of g is kept beside its own
        ("dropout", "dropout", OWN, OWN),
        ("none", "norm", TAKEN, BELOW),
        ("norm", "norm", TAKEN, BELOW),
        ("iterator", "none", OWN, OWN),
        ("none", "iterator", TAKEN, OWN),
        ("iterator", "iterator", OWN, OWN),
    ],
)
@pytest.mark.filterwarnings("ignore::adaptive_bilevel.errors.AdaptiveBilevelWarning")  # iterators
def test_the_counts_and_the_way(
    upper_noise: str, lower_noise: str, upper: tuple[int, int], lower: tuple[int, int], apart: Callable[[], None]
) -> None:
    task = Task(upper_noise, lower_noise)
    found, _ = run(task)
    apart()
    other = Task(upper_noise, lower_noise)
    expected, _ = run(other)
    assert all(torch.equal(a, b) for a, b in zip(task.everything(), other.everything(), strict=True))
    assert found[0] == expected[0]  # the first step compares
    for now, before in zip(found[1:], expected[1:], strict=True):
        for level, (values, gradients) in (("upper", upper), ("lower", lower)):
            once = int(level == "lower" and lower_noise == "dropout")  # checks that fail there ask for the value
            assert values <= now[f"{level} values"] - before[f"{level} values"] <= values + once
            assert now[f"{level} gradients"] - before[f"{level} gradients"] == gradients - 1
        assert [now[f"lower {kind}"] for kind in ("hvps", "jvps")] == [
            before[f"lower {kind}"] for kind in ("hvps", "jvps")
        ]
    if upper_noise == lower_noise == "none":
        assert found[1] == {
            "upper values": 1, "upper gradients": 0, "upper hvps": 0, "upper jvps": 0,
            "lower values": 0, "lower gradients": found[1]["lower gradients"], "lower hvps": 1, "lower jvps": 1,
        }  # fmt: skip


def other_rows(task: Task) -> None:
    task.data[16:] = task.data[16:].flip(1)


def other_lower_rows(task: Task) -> None:
    task.data[:16] = task.data[:16].flip(1)


def written(level: str) -> Between:
    def write(task: Task) -> None:
        with torch.no_grad():
            (task.x if level == "x" else task.y[0]).mul_(1.0)  # the same values: not to be told by a loss

    return write


def moved(task: Task) -> None:
    task.y[0].data += 1e-3


def nothing(task: Task) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "upper", "lower"),
    [
        (nothing, "ttt", "ttt"),
        (other_rows, "...", "..."),
        (other_lower_rows, ".tt", "..."),  # the check of the third step fails, and it begins again
        (written("x"), "...", "..."),
        (written("y"), "...", "..."),
        (moved, "...", "..."),
    ],
)
@pytest.mark.filterwarnings("ignore::adaptive_bilevel.errors.AdaptiveBilevelWarning")
def test_what_changes_between_the_calls_is_noticed(
    change: Between, upper: str, lower: str, apart: Callable[[], None]
) -> None:
    """A step that has taken over before evaluates its own gradients, and so does the next one."""

    def between(task: Task) -> None:
        if next(task.calls) in (2, 3):
            change(task)

    task = Task()
    found, _ = run(task, 6, between)
    apart()
    other = Task()
    expected, _ = run(other, 6, between)
    assert all(torch.equal(a, b) for a, b in zip(task.everything(), other.everything(), strict=True))
    for level, stays in (("upper", upper), ("lower", lower)):
        taken = [a[f"{level} gradients"] < b[f"{level} gradients"] for a, b in zip(found, expected, strict=True)]
        # After two misses, the fifth step compares.
        assert taken == [False, True, *(letter == "t" for letter in stays), True]


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"solver": Lanczos(K + 1)}, torch.float64),
        ({"products": "difference"}, torch.float64),
        ({"products": "autograd"}, torch.float64),
        ({"carry": False, "direction": "adam"}, torch.float32),
        ({"momentum": False}, torch.float32),
    ],
)
def test_options(settings: dict[str, Any], dtype: torch.dtype, apart: Callable[[], None]) -> None:
    task, other = Task(dtype=dtype), None
    run(task, 4, **settings)
    apart()
    other = Task(dtype=dtype)
    run(other, 4, **settings)
    assert all(torch.equal(a, b) for a, b in zip(task.everything(), other.everything(), strict=True))


def test_a_loss_of_few_digits_tells_no_samples_apart() -> None:
    task = Task(dtype=torch.float32)
    upper = task.upper
    task.upper = lambda: upper().bfloat16()  # type: ignore[method-assign]
    found, _ = run(task)
    assert [step["upper gradients"] for step in found] == [1] * 5


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options by which every model check fails at first, and no change is harmless."""
    monkeypatch.setattr(model_check, "_harmless", lambda *_: False)
    return {"curvature": 1e-9}


@pytest.mark.parametrize("level", ["upper", "lower"])
def test_a_loss_with_another_rounding_without_a_graph_costs_one_value(
    level: str, apart: Callable[[], None], strict: dict[str, Any]
) -> None:
    """A model check that fails asks for the value of g."""
    task, plain = Task(), Task()
    for each in (task, plain):
        closure = getattr(each, level)
        rounded = lambda closure=closure: closure() * (1.0 if torch.is_grad_enabled() else 1.0 + 1e-15)  # noqa: E731
        setattr(each, level, rounded)
    options = strict if level == "lower" else {}
    found, _ = run(task, 8, **options)
    apart()
    expected, _ = run(plain, 8, **options)
    assert [step[f"{level} gradients"] for step in found[3:]] == [step[f"{level} gradients"] for step in expected[3:]]
    assert sum(step[f"{level} values"] for step in found) == 1
    assert all(torch.equal(a, b) for a, b in zip(task.everything(), plain.everything(), strict=True))


def test_a_check_that_fails_evaluates_the_lower_loss_once_more(strict: dict[str, Any]) -> None:
    task, plain = Task(), Task()
    found, _ = run(task, **strict)
    expected, _ = run(plain)
    assert [step["lower values"] for step in found] == [0, 1, 1, 1, 1]
    assert [step["lower values"] for step in expected] == [0] * 5


def test_a_step_that_calls_the_estimator_itself() -> None:
    tasks, counts = (Task(), Task()), []
    run(tasks[0])
    inner = SLS(tasks[1].y)
    outer = BiSLS([tasks[1].x], lower=inner, solver=Lanczos(K), hypergradient=Implicit(Lanczos(K)))
    for _ in range(5):
        for _ in range(3):
            inner.step(tasks[1].lower)
        before = counted(outer)
        outer.step(tasks[1].upper)
        counts.append({name: number - before[name] for name, number in counted(outer).items()})
    assert all(torch.equal(a, b) for a, b in zip(tasks[0].everything(), tasks[1].everything(), strict=True))
    assert [step["upper gradients"] for step in counts] == [2, 1, 1, 1, 1]


def test_nothing_is_left_after_a_step_nor_without_the_optimizer() -> None:
    task = Task()
    _, outer = run(task)
    tensor, left = weakref.ref(task.y[0]), outer._handover
    assert left._upper is None and left._lower is None
    implicit(task.upper, task.lower, [task.x], task.y, Lanczos(K))
    assert left._lower is not None and left._lower.curvature is not None
    del task, outer, left
    gc.collect()
    assert tensor() is None


def test_the_peak_is_as_it_was(apart: Callable[[], None]) -> None:
    """The graph is there earlier, when there is less beside it."""
    size, peaks, gradients = 30_000, [], []

    def iterate() -> None:
        for _ in range(6):
            inner.step(lower)
            assign([x], implicit(upper, lower, [x], [y], Lanczos(K)))
            outer.step(upper)

    for separate in (lambda: None, apart):
        separate()
        torch.manual_seed(0)
        x, y = (torch.zeros(size, requires_grad=True) for _ in range(2))
        rows = torch.randn(3, 2, size) / size**0.5

        def upper() -> Tensor:
            return ((rows[2] @ y - 1.0) ** 2).sum() + 0.05 * x.dot(x)

        def lower() -> Tensor:
            return ((rows[1] @ y + rows[0] @ x - 0.5) ** 2).sum() + 0.05 * y.dot(y)

        inner = SLS([y])
        outer = BiSLS([x], lower=inner, solver=Lanczos(K))
        peaks.append(max(live_bytes(iterate)))
        gradients.append(outer.evaluations.upper.gradients)
    assert gradients == [1, 6] and peaks[0] <= peaks[1]
