"""Closures of the implicit hypergradient: called once, no trace left, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adaptive_bilevel.errors import ClosureError, TensorError
from adaptive_bilevel.hypergradient import Identity, Neumann, implicit
from tests import problems
from tests.hypergradient.helpers import EXACT, Drawn


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_is_left_behind(backward):
    at = problems.b2().instance()
    at.x.grad, kept = torch.full_like(at.x, 7.0), torch.full_like(at.x, 7.0)
    held = at.x.grad
    values, state = (at.x.detach().clone(), at.y.detach().clone()), torch.get_rng_state()

    def with_backward(closure):
        def call():
            for t in (at.x, at.y):
                t.grad = None
            loss = closure()
            loss.backward()
            return loss

        return call if backward else closure

    h = implicit(with_backward(at.upper), with_backward(at.lower), [at.x], [at.y], EXACT)
    assert at.x.grad is held and torch.equal(held, kept) and at.y.grad is None
    assert torch.equal(at.x, values[0]) and torch.equal(at.y, values[1])
    assert torch.equal(state, torch.get_rng_state())
    assert not h[0].requires_grad
    torch.testing.assert_close(h[0], problems.b2().hypergradient(*values))


def test_each_closure_is_called_once():
    calls = {"upper": 0, "lower": 0}
    at = problems.b2().instance()

    def counted(name, closure):
        def call():
            calls[name] += 1
            return closure()

        return call

    upper, lower = counted("upper", at.upper), counted("lower", at.lower)
    for solver in (EXACT, Neumann(4, 0.2), Identity()):
        implicit(upper, lower, [at.x], [at.y], solver)
    assert calls == {"upper": 3, "lower": 3}
    implicit(upper, lower, [at.x], [at.y], Drawn(5, 0.2, 4))
    assert calls == {"upper": 4, "lower": 8}  # four factors and C


def test_random_neumann_takes_independent_samples():
    """With one-sample Hessians h_i, the product of factors is (1 - e h_1)(1 - e h_2), not a power of one of them."""
    x, y = torch.tensor([1.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    batches = iter([1.0, 3.0, 2.0])

    def lower():
        h = next(batches)
        return (0.5 * h * y**2 - h * x * y).sum()

    (h,) = implicit(lambda: y.sum(), lower, [x], [y], Drawn(3, 0.1, 2))
    v = 3 * 0.1 * (1 - 0.1 * 1.0) * (1 - 0.1 * 3.0)
    torch.testing.assert_close(h, torch.tensor([2.0 * v]))


def test_batch_norm_and_dropout_see_one_evaluation():
    torch.manual_seed(0)
    first, norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
    net = nn.Sequential(first, norm, nn.Dropout(0.5), nn.Linear(4, 1))
    x = torch.zeros((), requires_grad=True)
    data = torch.randn(16, 3)

    def lower():
        return net(data).square().mean() + x.exp() * sum(p.square().sum() for p in net.parameters())

    implicit(lambda: first.weight.sum(), lower, [x], net.parameters())
    assert norm.num_batches_tracked == 1


def test_an_exception_leaves_everything_as_it_was():
    at = problems.b2().instance()
    at.x.grad = held = torch.ones_like(at.x)
    state = torch.get_rng_state()

    def broken():
        torch.rand(1)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        implicit(at.upper, broken, [at.x], [at.y])
    assert at.x.grad is held and torch.equal(state, torch.get_rng_state())


def test_works_under_no_grad():
    at = problems.b2().instance()
    with torch.no_grad():
        (h,) = implicit(at.upper, at.lower, [at.x], [at.y], EXACT)
    torch.testing.assert_close(h, problems.b2().hypergradient(at.x.detach(), at.y.detach()))


# ---------------------------------------------------------------------------------------------------------- wrong use


X, Y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)


def good():
    return (X * Y).sum() + Y.square().sum()


@pytest.mark.parametrize(
    ("closure", "words"),
    [
        (None, "not callable"),
        (lambda: 1.0, "1.0"),
        (lambda: None, "None"),
        (lambda: X * Y, r"shape \(2,\)"),
        (lambda: good().detach(), "without"),
        (lambda: torch.ones(3, requires_grad=True).sum(), "depends on no tensor"),
    ],
)
@pytest.mark.parametrize("which", ["upper_closure", "lower_closure"])
def test_wrong_closures(closure, words, which):
    closures = {"upper_closure": good, "lower_closure": good, which: closure}
    with pytest.raises(ClosureError, match=words) as caught:
        implicit(**closures, upper=[X], lower=[Y])
    assert which in str(caught.value)
    assert isinstance(caught.value, TypeError)


def test_a_loss_that_was_differentiated_inside():
    def closure():
        loss = (X * Y).square().sum()
        torch.autograd.grad(loss, [Y])
        return loss

    with pytest.raises(ClosureError, match="freed the graph"):
        implicit(good, closure, [X], [Y])


@pytest.mark.parametrize(
    ("upper", "lower", "words"),
    [
        ([], [Y], r"upper=\[\]"),
        ([X], [], r"lower=\[\]"),
        ([X], [X], r"lower\[0\] is the same tensor as upper\[0\]"),
        ([X, X], [Y], r"upper\[1\] is the same tensor as upper\[0\]"),
        ([torch.ones(2)], [Y], "No tensor of upper requires a gradient"),
        ([X], [torch.ones(2)], "No tensor of lower requires a gradient"),
        ([X, torch.ones(2).to_sparse()], [Y], r"upper\[1\] has layout torch.sparse_coo"),
        ([X], [torch.ones(2, dtype=torch.complex128, requires_grad=True)], r"lower\[0\] has dtype torch.complex128"),
        ([X, torch.ones(2, dtype=torch.int64)], [Y], r"upper\[1\] has dtype torch.int64"),
        ([X, "weight"], [Y], "upper must hold tensors only, got str"),
        (3, [Y], "upper must hold tensors only, got int"),
    ],
)
def test_wrong_tensors(upper, lower, words):
    with pytest.raises(TensorError, match=words):
        implicit(good, good, upper, lower)
