"""Unrolled loops: the upper loss is a function of x alone, and its closure runs the inner loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from adaptive_bilevel import BiSLS, BiSPS
from adaptive_bilevel.errors import HypergradientError, LowerLevelError, OptionError
from adaptive_bilevel.hypergradient import assign
from tests.bilevel.helpers import Traced, everything

CLASSES: dict[str, Any] = {"sgd": BiSLS, "adam": partial(BiSLS, direction="adam"), "polyak": BiSPS}

X, X_VAL = torch.randn(2, 30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T, T_VAL = (A @ torch.arange(6.0, dtype=torch.float64) for A in (X, X_VAL))


def inner_loop(w: Tensor, rates: Tensor, steps: int = 8) -> Tensor:
    """Gradient descent with a rate for each entry, differentiable."""
    for _ in range(steps):
        (slope,) = torch.autograd.grad(((X @ w - T) ** 2).mean(), w, create_graph=True)
        w = w - rates * slope
    return w


def learned_rates(x: Tensor) -> Tensor:
    """The validation loss after a loop from zero, with learned logarithms of the rates."""
    w = inner_loop(torch.zeros(6, requires_grad=True), x.exp())
    return ((X_VAL @ w - T_VAL) ** 2).mean()


def learned_start(x: Tensor) -> Tensor:
    """The same where the start is learned."""
    return ((X_VAL @ inner_loop(x * 1.0, torch.tensor(0.05), 3) - T_VAL) ** 2).mean()


LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[], Tensor]]] = {
    "learned rates": (learned_rates, lambda: torch.full((6,), -4.0)),
    "a learned start": (learned_start, lambda: torch.zeros(6)),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", CLASSES)
def test_a_step_alone_goes_where_a_backward_and_a_step_go(name: str, loss: str) -> None:
    """To the bit; and for one evaluation less."""
    f, start = LOSSES[loss]
    reached, counts = [], []
    for alone in (True, False):
        x = start().requires_grad_()
        outer = CLASSES[name]([x], **({"hypergradient": "direct"} if alone else {}))
        first = f(x).item()
        for _ in range(10):
            if not alone:
                outer.zero_grad()
                f(x).backward()
            outer.step(lambda: f(x))
        assert alone is (x.grad is None)
        assert f(x).item() < 0.5 * first
        reached.append(x.detach())
        counts.append(outer.evaluations.upper)
    torch.testing.assert_close(*reached, rtol=1e-12, atol=1e-12)
    if name == "polyak":
        assert counts[0].values == 0 and counts[0].gradients == counts[1].values == 10
    else:
        # Those that the steps made; the user's backwards are not in it. A kept step alone needs the gradient, too.
        own, given = ({**vars(c), "values": c.values + c.gradients, "gradients": 0} for c in counts)
        assert own == given


@pytest.mark.parametrize("momentum", [False, "auto"])
def test_every_certified_step_descends(momentum: Any) -> None:
    """F is what is searched, so that without momentum it cannot rise."""
    x = torch.full((6,), -4.0, requires_grad=True)
    outer = BiSLS([x], hypergradient="direct", momentum=momentum)
    losses = [float(outer.step(lambda: learned_rates(x))) for _ in range(25)]
    assert losses[-1] < 0.05 * losses[0]
    if momentum is False:
        assert losses == sorted(losses, reverse=True)


def test_maml_learns_a_start_that_adapts_in_one_step() -> None:
    """Sinusoids of one frequency: meta-batches differ, and the batch is drawn outside of the closure."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 1))
    outer = BiSLS(model.parameters(), direction="adam", hypergradient="direct")

    def tasks(n: int) -> list[tuple[Tensor, ...]]:
        found = []
        for _ in range(n):
            phase, inputs = 3.0 * torch.rand(()), 4.0 * torch.rand(2, 10, 1) - 2.0
            found.append((*inputs, *torch.sin(inputs + phase)))
        return found

    def adapted_loss(batch: Any) -> Tensor:
        losses = []
        for support, query, t, t_query in batch:
            params: dict[str, Tensor] = dict(model.named_parameters())
            loss = ((functional_call(model, params, support) - t) ** 2).mean()
            slopes = torch.autograd.grad(loss, tuple(params.values()), create_graph=True)
            params = {name: p - 0.3 * s for (name, p), s in zip(params.items(), slopes, strict=True)}
            losses.append(((functional_call(model, params, query) - t_query) ** 2).mean())
        return torch.stack(losses).mean()

    test = tasks(40)
    before = adapted_loss(test).item()
    for _ in range(60):
        batch = tasks(8)
        outer.step(lambda batch=batch: adapted_loss(batch))
    assert adapted_loss(test).item() < 0.2 * before


def test_truncated_loops_go_on_from_where_they_are() -> None:
    x, w = torch.full((6,), -4.0, requires_grad=True), torch.zeros(6)
    outer, losses = BiSLS([x], hypergradient="direct"), []
    for _ in range(15):
        start = w

        def loss(start: Tensor = start) -> Tensor:
            end = inner_loop(start.detach().requires_grad_(), x.exp(), 2)
            return ((X_VAL @ end - T_VAL) ** 2).mean()

        losses.append(float(outer.step(loss)))
        w = inner_loop(start.requires_grad_(), x.exp(), 2).detach()
    assert losses[-1] < 0.02 * losses[0]


def test_what_the_closure_leaves_in_grad_is_obeyed() -> None:
    """A closure that calls backward and clips, as with torch's optimizers."""
    reached = []
    for clips in (True, False):
        x = torch.full((6,), -4.0, requires_grad=True)
        outer = BiSLS([x], hypergradient="direct")

        def closure(x: Tensor = x, clips: bool = clips) -> Any:
            loss = learned_rates(x)
            loss.backward()
            if clips and x.grad is not None:
                x.grad[3:] = 0.0
            return loss

        outer.step(closure)
        reached.append(x.detach())
    assert torch.equal(reached[0][3:], torch.full((3,), -4.0)) and not torch.equal(reached[1][3:], reached[0][3:])


def test_dropout_in_the_loop_is_repeated_in_trials() -> None:
    x, seen = torch.full((6,), -4.0, requires_grad=True), []

    def loss() -> Tensor:
        mask = torch.rand(6)
        seen.append(mask)
        return learned_rates(x * (mask > 0.1))

    outer = BiSLS([x], hypergradient="direct")
    for k in range(3):
        torch.manual_seed(k)
        seen.clear()
        outer.step(loss)
        assert len(seen) > 1 and all(torch.equal(mask, seen[0]) for mask in seen)
        torch.manual_seed(k)
        torch.rand(6)
        state = torch.get_rng_state()
        torch.manual_seed(k)
        outer.step(loss)
        assert torch.equal(torch.get_rng_state(), state)  # as after one evaluation


def test_a_run_goes_on_from_its_state() -> None:
    x = torch.full((6,), -4.0, requires_grad=True)
    cls = partial(BiSLS, direction="adam", hypergradient="direct")
    outer = cls([x])
    for _ in range(3):
        outer.step(lambda: learned_rates(x))
    twin = x.detach().clone().requires_grad_()
    resumed = cls([twin])
    resumed.load_state_dict(copy.deepcopy(outer.state_dict()))
    for _ in range(3):
        outer.step(lambda: learned_rates(x))
        resumed.step(lambda: learned_rates(twin))
    assert torch.equal(x, twin)


def test_a_start_outside_of_the_set_is_evaluated_inside() -> None:
    x = torch.full((6,), 0.0, requires_grad=True)
    outer = BiSLS([x], hypergradient="direct", project=lambda tensors: [t.clamp_(-6.0, -3.0) for t in tensors])
    inside = learned_rates(torch.full((6,), -3.0)).item()
    assert float(outer.step(lambda: learned_rates(x))) == pytest.approx(inside, rel=1e-12)
    assert outer.evaluations.upper.gradients == 2
    outer.step(lambda: learned_rates(x))
    assert outer.evaluations.upper.gradients == 3 and bool((x <= -3.0).all())


def without_a_path(x: Tensor, how: str) -> Any:
    """Return a closure whose loop was run without what it needs."""
    if how == "no_grad":

        def loss() -> Tensor:
            with torch.no_grad():
                w = torch.zeros(6)
                for _ in range(3):
                    w = w - x.exp() * (X.T @ (X @ w - T)) / 15
            return ((X_VAL @ w - T_VAL) ** 2).mean()

        return loss
    if how == "no create_graph":

        def loss() -> Tensor:
            w = torch.zeros(6, requires_grad=True)
            for _ in range(3):
                (slope,) = torch.autograd.grad(((X @ w - T) ** 2).mean(), w)
                w = (w - x.exp().detach() * slope).detach().requires_grad_()
            return ((X_VAL @ w - T_VAL) ** 2).mean()

        return loss
    value = learned_rates(x).detach()
    return lambda: value


@pytest.mark.parametrize("how", ["no_grad", "no create_graph", "before"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_loop_without_a_path_to_x_is_refused(name: str, how: str) -> None:
    x = torch.full((6,), -4.0, requires_grad=True)
    outer = CLASSES[name]([x], hypergradient="direct")
    outer.step(lambda: learned_rates(x))
    before = everything([x], outer)
    with pytest.raises(HypergradientError, match=r"def upper_loss\(\):"):
        outer.step(without_a_path(x, how))
    assert everything([x], outer) == before
    if name != "polyak":
        plain = BiSLS([x])
        assign([x], [torch.ones(6)])
        if how == "no create_graph":
            with pytest.raises(LowerLevelError, match="hypergradient='direct'"):
                plain.step(without_a_path(x, how))


def test_an_unrolled_loss_has_no_lower_level() -> None:
    x, y = torch.zeros(6, requires_grad=True), torch.zeros(6, requires_grad=True)
    outer = BiSLS([x], lower=torch.optim.SGD([y], lr=0.1), hypergradient="direct")
    with pytest.raises(OptionError, match="leave lower= out"):
        outer.step(lambda: learned_rates(x))


def test_trials_are_forwards_where_the_loop_allows_it() -> None:
    """A loop of torch.func runs without gradients in trials; one of autograd.grad is evaluated with them."""

    def with_func(x: Tensor) -> Tensor:
        w = torch.zeros(6)
        for _ in range(8):
            w = w - x.exp() * torch.func.grad(lambda w: ((X @ w - T) ** 2).mean())(w)
        return ((X_VAL @ w - T_VAL) ** 2).mean()

    graphs, reached = {}, []
    for name, f in (("func", with_func), ("autograd", learned_rates)):
        x = torch.full((6,), -4.0, requires_grad=True)
        traced = Traced(partial(f, x))
        outer = BiSLS([x], hypergradient="direct")
        for _ in range(2):
            traced.graphs.clear()
            outer.step(traced)
        graphs[name] = traced.graphs
        reached.append(x.detach())
    assert graphs["func"] == [True] + [False] * (len(graphs["func"]) - 1)
    assert all(graphs["autograd"])
    torch.testing.assert_close(*reached, rtol=1e-10, atol=1e-10)


def test_a_loop_that_hides_why_it_needs_gradients_gets_them() -> None:
    """As learn2learn's MAML: its adapt prints torch's error, and fails at what is then missing."""
    x = torch.ones(3, requires_grad=True)

    def loss() -> Tensor:
        try:
            (slope,) = torch.autograd.grad((x**2).sum(), [x], create_graph=True)
        except RuntimeError:
            pass
        return ((x - 0.1 * slope) ** 2).sum()

    outer = BiSLS([x], hypergradient="direct")
    losses = [float(outer.step(loss)) for _ in range(5)]
    assert losses[-1] < 1e-3 * losses[0]


@pytest.mark.parametrize("error", [KeyError, AttributeError])
def test_an_error_of_a_trial_that_gradients_do_not_help_is_raised(error: type[Exception]) -> None:
    x, calls = torch.ones(3, requires_grad=True), 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise error("in a trial")
        return (x**2).sum()

    with pytest.raises(error, match="in a trial"):
        BiSLS([x], hypergradient="direct").step(loss)
    assert torch.equal(x, torch.ones(3))


@pytest.mark.parametrize("seed", [4, 6])
def test_kinks_inside_of_the_loop_do_not_cut_the_steps(seed: int) -> None:
    """Eight points, from which a ReLU network learns in ten steps of 3: f jumps wherever a sample crosses a kink.

    Steps that were rejected for jumps shrank to 1e-9 and below in both runs.
    """
    random = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=random, dtype=torch.float64)
    points = draw(400, 8)
    labels = (points[:, 0] * points[:, 1] > 0.0).long()
    start = [draw(8, 32) / 8**0.5, torch.zeros(32), draw(32, 2) / 32**0.5]
    x = draw(8, 8).requires_grad_()

    def loss(w: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(torch.relu(x @ w[0] + w[1]) @ w[2], y)

    def trained(x: Tensor) -> list[Tensor]:
        w = [p.clone().requires_grad_() for p in start]
        for _ in range(10):
            slopes = torch.autograd.grad(loss(w, x, torch.arange(8) % 2), w, create_graph=True)
            w = [p - 3.0 * slope for p, slope in zip(w, slopes, strict=True)]
        return w

    outer, steps = BiSLS([x], direction="adam", hypergradient="direct"), list[float]()
    for _ in range(60):
        rows = torch.randint(400, (64,), generator=random)
        outer.step(lambda rows=rows: loss(trained(x), points[rows], labels[rows]))
        assert outer.record is not None
        steps.append(outer.record.step_size)
    assert min(steps) > 1e-5
