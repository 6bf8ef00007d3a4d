"""What cannot be bound is refused at bind time, with cause and remedy, and nothing is bound then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from betty.configs import Config
from betty.problems import IterativeProblem, Problem
from torch import nn

from adaptive_bilevel.errors import AdaptiveBilevelError, ClosureError, OptionError, TensorError
from adaptive_bilevel_betty import SLS, SLSB, SPSB, BiSLS, BiSPS, SPSMax, bind
from adaptive_bilevel_betty.optimizers import UNBOUND
from tests.betty.problems import OLD, Level, Ridge, Variable, engine, only_new, only_old, sgd


def levels(outer: Any = BiSLS, inner: Any = SLS, **config: Any) -> tuple[Level, Level]:
    return Ridge().levels(outer, inner, **config)


def shared_module() -> Any:
    top, low = levels()
    low._start = top._start
    return engine(low, top)


def shared_parameter() -> Any:
    top, low = levels()
    both = nn.Module()
    both.own, both.other = nn.Parameter(torch.zeros(8)), top._start.value
    low._start = both
    return engine(low, top)


def children_that_share() -> Any:
    top, low = levels()
    second = Level("second", low._loss, low._start, SLS, unroll_steps=10)
    return engine(low, second, top, edges=[(low, top), (second, top)])


def frozen(which: str) -> Callable[[], Any]:
    def make() -> Any:
        top, low = levels()
        (top if which == "outer" else low)._start.requires_grad_(False)
        return engine(low, top)

    return make


def without_loss(which: str) -> Callable[[], Any]:
    def make() -> Any:
        class NoLoss(Level):
            training_step = Problem.training_step

        top, low = levels()
        lost = NoLoss(which, print, Variable(torch.zeros(8)), BiSLS if which == "outer" else SLS)
        return engine(low, lost) if which == "outer" else engine(lost, top)

    return make


class Unrolled(IterativeProblem):
    """An iterative problem; that of Betty cannot initialise with an optimizer of torch 2, so it is not made to."""

    def __init__(self, optimizer: Any) -> None:
        self._made = optimizer
        super().__init__(name="inner", config=Config())

    def initialize(self, *args: Any) -> None:
        self.module = Variable(torch.zeros(8))
        self.optimizer = self._made(self.module.parameters())

    def training_step(self, batch: Any) -> Any:
        return self.module().sum()


def iterative(inner: Any) -> Callable[[], Any]:
    def make() -> Any:
        return engine(Unrolled(inner), levels()[0])

    return make


def clipped(rule: Any, level: str = "inner") -> Callable[[], Any]:
    def make() -> Any:
        top, low = levels(inner=rule) if level == "inner" else levels(outer=rule)
        (low if level == "inner" else top).gradient_clipping = 1.0
        return engine(low, top)

    return make


def searched_above() -> Any:
    return engine(*reversed(levels(outer=SLS)))


def no_torch_optimizer() -> Any:
    top, low = levels(inner=sgd(0.1))
    made = engine(low, top)
    low.optimizer = object()
    return made


def strategy(name: str, outer: Any = BiSLS, inner: Any = SLS, **given: Any) -> Callable[[], Any]:
    def make() -> Any:
        made = engine(*reversed(levels(outer, inner, **given)))
        made.config.strategy = name
        return made

    return make


def scaled(which: str) -> Callable[[], Any]:
    def make() -> Any:
        top, low = levels()
        made = engine(low, top)
        (top if which == "outer" else low).scaler = torch.amp.GradScaler("cpu")
        return made

    return make


REFUSED: list[tuple[str, Callable[[], Any], type[AdaptiveBilevelError], type[Exception], str, str]] = [
    ("iterative", iterative(SLS), OptionError, ValueError, "no ImplicitProblem", "ImplicitProblem"),
    ("iterative below", iterative(sgd(0.1)), OptionError, ValueError, "no ImplicitProblem", "stock optimizer"),
    ("clipped SPSB", clipped(SPSB), OptionError, ValueError, "gradient_clipping=1.0|divides", "SLS"),
    ("clipped SPSMax", clipped(SPSMax), OptionError, ValueError, "divides by", "SLS"),
    ("clipped BiSPS", clipped(BiSPS, "outer"), OptionError, ValueError, "divides by", "BiSLS"),
    ("shared module", shared_module, TensorError, TypeError, "share the parameter 'value'", "own module"),
    ("shared parameter", shared_parameter, TensorError, TypeError, "share the parameter", "own module"),
    ("children that share", children_that_share, TensorError, TypeError, "share the parameter", "own module"),
    ("frozen outer", frozen("outer"), TensorError, TypeError, "frozen", "dependencies"),
    ("frozen inner", frozen("inner"), TensorError, TypeError, "frozen", "dependencies"),
    ("no loss above", without_loss("outer"), ClosureError, TypeError, "no training_step", "define training_step"),
    ("no loss below", without_loss("inner"), ClosureError, TypeError, "no training_step", "define training_step"),
    ("SLS above", searched_above, OptionError, ValueError, "hypergradient", "BiSLS"),
    ("no torch optimizer", no_torch_optimizer, OptionError, ValueError, "no torch optimizer", "configure_optimizer"),
    ("fp16 above", scaled("outer"), OptionError, ValueError, "GradScaler", "bf16"),
    ("fp16 below", scaled("inner"), OptionError, ValueError, "GradScaler", "bf16"),
    *(
        (name, strategy(name), OptionError, ValueError, name, "distributed")
        for name in ("zero", "fsdp", "accelerate")
    ),
    (
        "stock zero adaptive_cg",
        strategy("zero", sgd(0.1), sgd(0.1), type="adaptive_cg"),
        OptionError,
        ValueError,
        "own part",
        "darts",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "error", "builtin", "cause", "remedy"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_refused(make: Any, error: Any, builtin: Any, cause: str, remedy: str) -> None:
    made = make()
    with pytest.raises(error, match=cause) as raised:
        bind(made)
    assert isinstance(raised.value, builtin)
    assert remedy in str(raised.value)
    for problem in made.problems:
        assert not hasattr(problem, "in_trial")
        assert "get_loss" not in vars(problem)
        assert getattr(problem.optimizer, "host", UNBOUND) is UNBOUND


@only_old
def test_roll_back_of_the_old_release() -> None:
    with pytest.raises(OptionError, match=r"caches by reference.*0\.2\.1"):
        bind(engine(*reversed(levels()), roll_back=True))


@only_new
def test_roll_back_of_the_new_release() -> None:
    bind(engine(*reversed(levels()), roll_back=True))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.filterwarnings("ignore:.*no trial step gave")
def test_a_part_that_nobody_moves_may_be_shared(frozen: bool) -> None:
    features, x = nn.Linear(8, 8).requires_grad_(not frozen), torch.ones(1, 8)
    modules = [nn.Sequential(features, nn.Linear(8, 8)) for _ in range(2)]
    top, low = levels()
    for level, module in zip((top, low), modules, strict=True):
        level._start = module
        level.trainable_parameters = lambda head=module[1]: list(head.parameters())
        level._optimizer = lambda params, rule=level._optimizer, head=module[1]: rule(head.parameters())
    low._loss = lambda p, b: (p.module(x) - p.outer(x)).square().mean()
    top._loss = lambda p, b: (p.inner(x) - 1.0).square().mean()
    bind(engine(low, top, steps=100)).run()
    assert top.losses[-1] < 0.1 * top.losses[0]


@pytest.mark.parametrize("rule", [SLS, SLSB])
def test_searches_may_be_clipped(rule: Any) -> None:
    top, low = levels(inner=rule, gradient_clipping=0.01)
    top.gradient_clipping = 0.01
    made = bind(engine(low, top, steps=300))
    made.run()
    toy = Ridge()
    assert float(toy.F(top.value)) - toy.minimum() < 0.1 * (float(toy.F(torch.zeros(8))) - toy.minimum())


def test_what_is_not_involved_may_be_as_it_likes() -> None:
    """Stock problems with clipping, or that nobody of ours looks ahead into."""
    top, low = levels(outer=sgd(0.1), inner=sgd(0.1), gradient_clipping=1.0)
    bind(engine(low, top, steps=10)).run()


@pytest.mark.parametrize("wrong", [None, 3, [], "engine", torch.optim.SGD([torch.ones(1, requires_grad=True)], 0.1)])
def test_what_is_no_engine(wrong: Any) -> None:
    with pytest.raises(OptionError, match="engine = Engine"):
        bind(wrong)


@pytest.mark.parametrize("wrong", [3, "cg", object()])
def test_what_is_no_solver(wrong: Any) -> None:
    with pytest.raises(OptionError, match="solver"):
        bind(engine(*reversed(levels())), solver=wrong)


def test_the_releases_are_told_apart() -> None:
    import betty

    assert betty.__version__.startswith("0.1.") == OLD
