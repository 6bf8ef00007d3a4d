"""Products with the second derivatives of the lower loss against dense derivatives, and their memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from adaptive_bilevel.hypergradient import CG, Lanczos, LowerCurvature, SolverStatus, implicit, implicit_with_info
from tests.hypergradient.helpers import small_model


@pytest.mark.parametrize("moves", [False, True])
def test_products_equal_dense_derivatives(moves: bool):
    x, y, loss = small_model()
    sizes = [t.numel() for t in (*x, *y)]

    def flat(z):
        parts = [p.reshape(t.shape) for p, t in zip(z.split(sizes), (*x, *y), strict=True)]
        return loss(parts[:3], parts[3:])

    z = torch.cat([t.detach().reshape(-1) for t in (*x, *y)])
    dense, dx = torch.func.jacrev(torch.func.grad(flat))(z), sum(sizes[:3])
    H, C = dense[dx:, dx:], dense[:dx, dx:]
    v, d = [torch.randn_like(t) for t in y], [torch.randn_like(t) for t in x]

    def cat(tensors):
        return torch.cat([t.reshape(-1) for t in tensors])

    curvature = LowerCurvature(loss(x, y), x, y, moves=moves)
    close = torch.testing.assert_close
    close(cat(curvature.gradient), torch.func.grad(flat)(z)[dx:])
    for _ in range(2):  # the graph survives its use
        close(cat(curvature.hvp(v)), H @ cat(v))
        close(cat(curvature.cross_vjp(v)), C @ cat(v))
        close(cat(curvature.cross_jvp(d)), C.T @ cat(d))
    assert (curvature.gradients, curvature.hvps, curvature.jvps) == (1 if moves else 2, 2, 4)
    for product, like in ((curvature.hvp(v), y), (curvature.cross_vjp(v), x), (curvature.cross_jvp(d), y)):
        assert [t.shape for t in product] == [t.shape for t in like]
        assert not any(t.requires_grad for t in product)


def test_lower_loss_that_is_linear_has_no_curvature():
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    for moves in (False, True):
        curvature = LowerCurvature(3 * y.sum() + x.sum(), [x], [y], moves=moves)
        for product in (curvature.hvp([y]), curvature.cross_vjp([y]), curvature.cross_jvp([x])):
            assert torch.equal(product[0], torch.zeros(2))
    for solver in (CG(), Lanczos()):
        with pytest.warns(match="has no path|no curvature in y") as heard:
            _, info = implicit_with_info(lambda: y.sum(), lambda: y.sum(), [x], [y], solver)
        assert any("no curvature in y" in str(w.message) for w in heard)
        assert info.solution.status is SolverStatus.flat and torch.equal(info.solution.tensors[0], torch.zeros(2))


def test_memory_goes_with_the_object():
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            kept = t.detach() * 1.0
            ctx.save_for_backward(t)
            ctx.kept = kept
            probes.append(weakref.ref(kept))
            return kept.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    probes: list = []
    gc.disable()  # reference counts have to do it
    try:
        implicit(lambda: y.sum(), lambda: (Probe.apply(x * y) ** 2).sum(), [x], [y])
        assert probes and all(probe() is None for probe in probes)
    finally:
        gc.enable()
