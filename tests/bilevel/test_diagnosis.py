"""What limits a run: a slope that is far from what the hypergradient promised is reported once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import pytest
import torch
from torch.nn.functional import cross_entropy

from adaptive_bilevel import SLS, SLSB, BiSLS
from adaptive_bilevel.bilevel import Taken
from adaptive_bilevel.bilevel.diagnosis import Diagnoses, SlopeDiagnosis, SolveDiagnosis
from adaptive_bilevel.hypergradient import CG, HessianReport, Lanczos, Neumann, SolverStatus, assign, implicit
from adaptive_bilevel.optim.state import RoleState, advanced
from adaptive_bilevel.policies import Outcome, Record


def messages(ratios: Sequence[float], comparable: bool = True) -> list[int]:
    """The steps in which there is a message."""
    role, found = SlopeDiagnosis(), []
    state = role.init()
    for k, ratio in enumerate(ratios):
        taken = Taken(Record(1.0, 1.0, 1.0, Outcome.accepted, slope_ratio=ratio), comparable, CG())
        text = role.propose(taken, state)
        state = advanced(state, role.commit(taken, text, state))
        found += [k] * len(text)
        assert all("disagree" in line and "hypergradient.check" in line for line in text)
    return found


@pytest.mark.parametrize("far", [-1.0, 0.49, 2.01, 1e9])
def test_twenty_steps_in_a_row(far: float) -> None:
    assert messages([far] * 60) == [19]
    assert messages([far] * 19 + [1.0] + [far] * 19) == []
    assert messages([far] * 10 + [math.nan] * 5 + [far] * 10) == [24]


@pytest.mark.parametrize("near", [0.5, 1.0, 2.0])
def test_near(near: float) -> None:
    assert messages([near] * 40) == []


def test_an_inverse_that_does_not_know_its_error_says_nothing() -> None:
    assert messages([-1.0] * 40, comparable=False) == []


def solved(statuses: Sequence[SolverStatus]) -> list[int]:
    """The steps in which a solver is reported."""
    role, found = Diagnoses((SlopeDiagnosis(), SolveDiagnosis())), []
    state = role.init()
    for k, status in enumerate(statuses):
        taken = Taken(Record(1.0, 1.0, 1.0, Outcome.accepted), True, CG(), HessianReport(status, 2.0))
        text = role.propose(taken, state)
        state = advanced(state, role.commit(taken, text, state))
        found += [k] * len(text)
        assert all("positive definite" in line and "Lanczos" in line for line in text)
    return found


def test_a_solver_that_is_no_inverse_is_reported_once() -> None:
    bad, good = SolverStatus.negative_curvature, SolverStatus.converged
    assert solved([bad] * 40) == [9]
    assert solved([bad] * 9 + [good] * 9 + [bad] * 9) == []
    assert solved([bad, bad, good] * 20) == [25]
    assert solved([SolverStatus.vanishing_curvature] * 40) == [9]
    assert solved([SolverStatus.indefinite] * 40) == solved([SolverStatus.singular] * 40) == []


def test_a_lower_loss_without_curvature_is_reported_with_another_remedy() -> None:
    role = SolveDiagnosis()
    taken = Taken(Record(1.0, 1.0, 1.0, Outcome.accepted), True, Lanczos(), HessianReport(SolverStatus.flat, 1.0))
    [text] = role.propose(taken, RoleState({"unsolved": 9}))
    assert "no curvature in y" in text and "lower=" in text and "solver= out" not in text


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("solver", [CG(), Lanczos(), Neumann(10)], ids=str)
def test_samples_with_fewer_rows_than_columns(solver: CG | Lanczos | Neumann, rows: int) -> None:
    """Least squares on minibatches, of which no batch has an invertible Hessian: x moves, and F falls."""
    rng = torch.Generator().manual_seed(0)
    A, w, V = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((2048, 100), (100,), (512, 100)))
    noise, E = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((2048,), (100, 5)))
    target, solution = A @ w + noise, torch.linalg.lstsq(A, A @ w + noise).solution
    x = torch.full((5,), 2.0, dtype=torch.float64, requires_grad=True)
    y = torch.zeros(100, dtype=torch.float64, requires_grad=True)
    inner = SLSB([y])
    outer = BiSLS([x], lower=inner, solver=solver)

    def gap() -> float:
        move = torch.linalg.solve(A.T @ A / 2048, 0.1 * E @ x.detach())
        return float((V @ (solution + move - w)).square().mean())

    first = gap()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(60):
            for _ in range(10):
                b = torch.randint(2048, (rows,), generator=rng)
                lower = lambda b=b: (A[b] @ y - target[b]).square().mean() / 2 - x @ (0.1 * E.T @ y)  # noqa: E731
                inner.step(lower)
            u = torch.randint(512, (64,), generator=rng)
            upper = lambda u=u: (V[u] @ (y - w)).square().mean() / 2  # noqa: E731
            assign([x], implicit(upper, lower, [x], [y], solver))
            outer.step(upper)
    said, hessian = [str(w.message) for w in caught], outer.hessian
    assert hessian is not None and gap() < 0.2 * first, (first, gap(), said[:2])
    if isinstance(solver, Lanczos):
        assert hessian.status is SolverStatus.singular and not caught
        assert hessian.smallest < 1e-2 * hessian.largest and hessian.negative < 1e-6
    elif isinstance(solver, CG):
        assert hessian.status is SolverStatus.vanishing_curvature
        assert any("singular" in text for text in said)


@pytest.mark.parametrize("solver", [CG(5), Lanczos(5)])
def test_a_network_below(solver: CG | Lanczos) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    data, labels = torch.randn(40, 4, dtype=torch.float64), torch.randint(3, (40,))
    x = torch.zeros(20, dtype=torch.float64, requires_grad=True)

    def lower() -> torch.Tensor:
        return (x.sigmoid() * cross_entropy(net(data[:20]), labels[:20], reduction="none")).mean()

    def upper() -> torch.Tensor:
        return cross_entropy(net(data[20:]), labels[20:])

    inner = SLS(net.parameters())
    outer = BiSLS([x], lower=inner, solver=solver)
    assert outer.hessian is None
    indefinite = list[HessianReport]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(40):
            inner.step(lower)
            assign([x], implicit(upper, lower, [x], list(net.parameters()), solver))
            outer.step(upper)
            if outer.hessian is not None and outer.hessian.status is SolverStatus.indefinite:
                indefinite.append(outer.hessian)
    said = [str(w.message) for w in caught if "positive definite" in str(w.message)]
    assert outer.hessian is not None
    if isinstance(solver, Lanczos):
        assert not caught and len(indefinite) > 10
        assert all(h.smallest < 0.0 < h.largest and 0.0 < h.negative < 1.0 for h in indefinite)
    else:
        assert math.isnan(outer.hessian.smallest) and len(said) == 1
        assert any("implicit" not in str(w.message) and "curvature" in str(w.message) for w in caught)
