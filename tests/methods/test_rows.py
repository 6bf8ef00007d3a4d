"""What the rows are: their cost, their fixed points, plain twins of their recursions, and what they refuse."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import SLS, BiSLS, OneStepBiSLS, methods, policies
from adaptive_bilevel.errors import AdaptiveBilevelError, OptionError
from adaptive_bilevel.hypergradient import CG, Amortised, Exact, Implicit, Neumann, Unroll, ValueFunction
from adaptive_bilevel.methods import rows
from tests.bilevel.helpers import iterate
from tests.methods.test_golden import Drawn
from tests.problems import Problem, b2, random_qb, ridge_hpo

EXACT = Implicit(Exact())
T, R, Q = 4, 3, 5
SUM = Implicit(Neumann(Q, 0.2))


def problem_of(problem: Problem) -> methods.BilevelProblem:
    return methods.BilevelProblem(
        upper_loss=lambda x, y, _: problem.f(x, y), lower_loss=lambda x, y, _: problem.g(x, y)
    )


def run(name: str, problem: Problem, iterations: int, **options: Any) -> list[methods.IterationRecord]:
    x, y = options.pop("x", problem.x0), options.pop("y", problem.y0)
    return list(methods.run(name, problem_of(problem), x, y, iterations=iterations, **options))


def optimum(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """(x*, y*, v*) of a quadratic."""
    zero = problem.dF(torch.zeros_like(problem.x0))
    columns = [problem.dF(e) - zero for e in torch.eye(problem.x0.numel())]
    x = torch.linalg.solve(torch.stack(columns, dim=1), -zero)
    y = problem.ystar(x)
    return x, y, torch.linalg.solve(problem.hessian(x, y), torch.func.grad(problem.f, argnums=1)(x, y))


# ---------------------------------------------------------------------------------------------- cost

# name: options, (values of f, gradients of f, values of g, gradients of g, HVPs, JVPs); d_x = 2, d_y = 3
LOOP: dict[str, Any] = {"lower_steps": T}
COSTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "ba": (LOOP, (0, 1, 0, T, 3, 1)),
    "bsa": ({**LOOP, "solver": "drawn"}, (0, 1, 0, T, 2, 1)),
    "aid-bio": ({**LOOP, "solver": CG(2, 0.0, warm_start=True)}, (0, 1, 0, T, 3, 1)),  # +1 product: v_0 != 0
    "stocbio": ({**LOOP, "estimator": SUM}, (0, 1, 0, T, Q, 1)),
    "alset": ({"solver": "drawn"}, (0, 1, 0, 1, 2, 1)),
    "ttsa": ({"solver": "drawn"}, (0, 1, 0, 1, 2, 1)),
    "stable": ({"estimator": EXACT}, (0, 1, 0, 1, 2 * 3, 2)),  # H^{-1} twice, one JVP in each direction
    "sustain": ({"estimator": SUM}, (0, 2, 0, 2, 2 * Q, 2)),
    "mrbo": ({"estimator": SUM}, (0, 2, 0, 2, 2 * Q, 2)),
    "vrbo": ({**LOOP, "estimator": SUM}, (0, 2, 0, 2 * T, 2 * Q, 2)),
    "fsla": ({}, (0, 2, 0, 1, 1, 2)),
    "soba": ({}, (0, 1, 0, 1, 1, 1)),
    "saba": ({}, (0, 1, 0, 1, 1, 1)),
    "srba": ({}, (0, 2, 0, 2, 2, 2)),
    "amigo": ({**LOOP, "auxiliary_steps": R}, (0, 1, 0, T, R, 1)),
    "pzobo": (LOOP, (0, 1, 0, (5 + 1) * T, 0, 0)),
    "hozog": (LOOP, (5 + 1, 0, 0, (5 + 1) * T, 0, 0)),
    "unroll": (LOOP, (0, 1, 0, T, T, T)),
    "unroll-forward": (LOOP, (0, 1, 0, T, 2 * T, 2 * T)),
    "unroll-truncated": ({**LOOP, "estimator": Unroll(last=2)}, (0, 1, 0, T, 2, 2)),
    "darts": ({}, (0, 1, 0, 3 + 1, 0, 0)),
    "s-tfbo": ({}, (0, 1, 0, 1, 1, 1)),
    "d-tfbo": ({"until": "", **LOOP, "auxiliary_steps": R}, (0, 1, 0, T, R, 1)),
    "bisps": (
        {**LOOP, "estimator": SUM, "lower_step": policies.SPSB(lower_bound=-100.0, bound=0.1)},
        (0, 1, 0, T, Q, 1),
    ),
    "f2sa": (LOOP, (0, T + 1, 0, 2 * T + 2, 0, 0)),
    "pgdo": (LOOP, (0, 1, 0, T + 2, 0, 0)),
    "bome": (LOOP, (0, 1, 0, T + 2, 0, 0)),
    "primal-dual": (LOOP, (0, 1, 0, T + 2, 0, 0)),
}


def counts(evaluations: Any) -> tuple[int, ...]:
    upper, lower = evaluations.upper, evaluations.lower
    assert upper.hvps == upper.jvps == 0
    return upper.values, upper.gradients, lower.values, lower.gradients, lower.hvps, lower.jvps


@pytest.mark.parametrize("name", COSTS)
def test_cost_of_an_iteration(name: str) -> None:
    options, expected = COSTS[name]
    if options.get("solver") == "drawn":
        options = {**options, "solver": Drawn(2, 2, 2)}
    records = run(name, b2(), 3, **options)
    assert counts(records[-1].evaluations) == expected
    whole = [sum(column) for column in zip(*(counts(r.evaluations) for r in records), strict=True)]
    assert counts(records[-1].total) == tuple(whole)


def test_cost_of_d_tfbo_with_its_stop() -> None:
    """P + 1 gradients and Q + 1 products: the last ones see that it is time to stop."""
    for record in run("d-tfbo", b2(), 5):
        P, steps = (len(record.records[name]) for name in "yv")
        assert counts(record.evaluations) == (0, 1, 0, P + 1, steps + 1, 1)


@pytest.mark.filterwarnings("ignore:.*no trial step gave sufficient decrease")
@pytest.mark.parametrize(("baseline", "more"), [("paper", 0), ("matched", 1)])
def test_cost_of_bisls_in_paper_mode(baseline: str, more: int) -> None:
    """T (1 g + r f), the hypergradient, then a lower gradient and an f per trial (and once more for the baseline)."""
    search: dict[str, Any] = {"decay": "constant", "lower_bound": None, "shrink": 0.6}
    records = run(
        "bisls-sgd",
        b2(),
        4,
        estimator=SUM,
        response="step",
        baseline=baseline,
        lower_steps=T,
        lower_step=policies.SLSB(bound=1.0, **search),
        upper_step=policies.SLSB(bound=1.0, c=0.1, **search),
    )
    for record in records:
        lower, (upper,) = sum(r.trials for r in record.records["y"]), record.records["x"]
        expected = (upper.trials + more, 1, lower, T + upper.trials + more, Q, 1)
        assert counts(record.evaluations) == expected


def test_cost_of_bisls_along_the_tangent() -> None:
    """One value of f per trial; a lower graph, one JVP and the solve for w; one lower gradient per certificate."""
    solver = CG(2, 0.0)
    lower_step = policies.SLS(start=10.0, lower_bound=None)
    for record in run("bisls-sgd", random_qb(1), 5, solver=solver, lower_steps=T, carry=False, lower_step=lower_step):
        lower, (upper,) = sum(r.trials for r in record.records["y"]), record.records["x"]
        certified = record.evaluations.lower.gradients - T - 1
        assert 1 <= certified <= upper.trials
        assert counts(record.evaluations) == (upper.trials, 1, lower, T + 1 + certified, 2 * 2, 2)


# ---------------------------------------------------------------------------------------------- fixed points

STATIONARY = [
    *("ba", "aid-bio", "sustain", "mrbo", "vrbo", "stable", "fsla", "soba", "saba", "srba", "amigo", "s-tfbo", "d-tfbo")
]


@pytest.mark.parametrize("name", STATIONARY)
def test_the_solution_is_a_fixed_point(name: str) -> None:
    x, y, v = optimum(b2())
    options: dict[str, Any] = {"v": v} if "v" in rows.ROWS[name].variables else {"estimator": EXACT}
    for record in run(name, b2(), 5, x=x, y=y, **options):
        assert float((record.x - x).norm() + (record.y - y).norm()) < 1e-13


@pytest.mark.parametrize(("multiplier", "bound"), [(10.0, 0.1), (100.0, 0.012), (1000.0, 0.0012)])
def test_the_value_function_moves_it_by_one_over_lambda(multiplier: float, bound: float) -> None:
    x, y, _ = optimum(b2())
    rule = methods.Growth(initial=multiplier, increment=0.0)
    step = 0.4 / multiplier / 4.0
    options: dict[str, Any] = {"lower_step": step, "auxiliary_step": 0.2, "upper_step": 1e-9}
    *_, record = run("f2sa", b2(), 1, x=x, y=y, lower_steps=400, multiplier=rule, **options)
    assert bound / 4 < float(record.hypergradient.norm()) < bound
    assert not torch.equal(record.x, x)


def test_the_error_of_stable_contracts_as_if_x_stood_still() -> None:
    problem, b = b2(), 0.2
    H = problem.hessian(problem.x0, problem.y0)
    error = problem.y0 - problem.ystar(problem.x0)
    for record in run("stable", problem, 6, lower_step=b, upper_step=0.05):
        error = error - b * H @ error
        assert torch.allclose(record.y - problem.ystar(record.x), error, atol=1e-12)


def test_bome_without_a_gap_does_not_divide_by_zero() -> None:
    problem = b2()
    solution = problem.ystar(problem.x0)
    record, *_ = run("bome", problem, 1, y=solution)
    assert math.isfinite(record.multiplier)


# ---------------------------------------------------------------------------------------------- plain twins on samples

SUMMANDS = 3


class FiniteSum:
    """f_i and g_j quadratic; the batch is the index. Gradients by hand."""

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(7)
        M = torch.randn(SUMMANDS, 3, 3, generator=rng)
        self.H = M @ M.mT / 3 + torch.eye(3)
        self.C, self.b = torch.randn(SUMMANDS, 2, 3, generator=rng), torch.randn(SUMMANDS, 3, generator=rng)
        self.p, self.q = torch.randn(SUMMANDS, 3, generator=rng), torch.randn(SUMMANDS, 2, generator=rng)
        self.x0, self.y0 = torch.randn(2, generator=rng), torch.randn(3, generator=rng)
        self.problem = methods.BilevelProblem(self.f, self.g)

    def f(self, x: Tensor, y: Tensor, i: Any) -> Tensor:
        return torch.stack([(0.5 * y @ y + self.p[k] @ y + 0.5 * x @ x + self.q[k] @ x) for k in listed(i)]).mean()

    def g(self, x: Tensor, y: Tensor, j: Any) -> Tensor:
        return torch.stack([0.5 * y @ self.H[k] @ y + x @ self.C[k] @ y + self.b[k] @ y for k in listed(j)]).mean()

    def fields(self, x: Tensor, y: Tensor, v: Tensor, i: Any, j: Any) -> dict[str, Tensor]:
        H, C, b = (t[listed(j)].mean(0) for t in (self.H, self.C, self.b))
        p, q = (t[listed(i)].mean(0) for t in (self.p, self.q))
        return {"y": H @ y + C.T @ x + b, "v": H @ v - (y + p), "x": x + q - C @ v}

    def exact(self, x: Tensor, y: Tensor, i: Any, j: Any) -> Tensor:
        H, p = self.H[listed(j)].mean(0), self.p[listed(i)].mean(0)
        return self.fields(x, y, torch.linalg.solve(H, y + p), i, j)["x"]


def listed(index: Any) -> list[int]:
    return list(range(SUMMANDS)) if index == "all" else [int(index)]


class Drawing:
    """A fixed stream of pairs that knows all data."""

    full = methods.Pair("all", "all")
    pairs = ((0, 1), (2, 0), (1, 1), (0, 2), (2, 2), (1, 0), (0, 0))

    def __iter__(self) -> Iterator[methods.Pair]:
        for i, j in self.pairs:
            yield methods.Pair(i, j, i, j)


def records_of(name: str, data: FiniteSum, iterations: int = 7, **options: Any) -> list[methods.IterationRecord]:
    return list(methods.run(name, data.problem, data.x0, data.y0, iterations=iterations, batches=Drawing(), **options))


def test_twin_of_sustain() -> None:
    data, a, b, w = FiniteSum(), 0.1, 0.2, 0.7
    storm = methods.Storm(w)
    records = records_of(
        "sustain", data, estimator=EXACT, upper_step=a, lower_step=b, upper_direction=storm, lower_direction=storm
    )
    x, y, zero = data.x0, data.y0, torch.zeros(3)
    x_old, y_old, d_x, d_y = x, y, x, y
    for k, ((i, j), record) in enumerate(zip(Drawing.pairs, records, strict=True)):
        g_y, h = data.fields(x, y, zero, i, j)["y"], data.exact(x, y, i, j)
        if k == 0:
            d_y, d_x = g_y, h
        else:
            d_y = g_y + w * (d_y - data.fields(x_old, y_old, zero, i, j)["y"])
            d_x = h + w * (d_x - data.exact(x_old, y_old, i, j))
        x_old, y_old = x, y
        x, y = x - a * d_x, y - b * d_y
        assert torch.allclose(record.x, x, atol=1e-10) and torch.allclose(record.y, y, atol=1e-10)


def test_twin_of_fsla() -> None:
    data, a, b, w = FiniteSum(), 0.1, 0.2, 0.6
    records = records_of("fsla", data, upper_step=a, lower_step=b, upper_direction=methods.Storm(w))
    x, y, v = data.x0, data.y0, torch.zeros(3)
    d, old = x, (x, y, v)
    for k, ((i, j), record) in enumerate(zip(Drawing.pairs, records, strict=True)):
        y = y - b * data.fields(x, y, v, i, j)["y"]
        v = v - b * data.fields(x, y, v, i, j)["v"]
        h = data.fields(x, y, v, i, j)["x"]
        d = h if k == 0 else h + w * (d - data.fields(*old, i, j)["x"])
        old = x, y, v
        x = x - a * d
        assert torch.allclose(record.x, x, atol=1e-10) and torch.allclose(record.y, y, atol=1e-10)


def test_twin_of_srba() -> None:
    data, a, b, period = FiniteSum(), 0.1, 0.2, 3
    spider = methods.Spider(period)
    records = records_of("srba", data, upper_step=a, lower_step=b, upper_direction=spider, lower_direction=spider)
    x, y, v = data.x0, data.y0, torch.zeros(3)
    d, old = {"x": x, "y": y, "v": v}, (x, y, v)
    for k, ((i, j), record) in enumerate(zip(Drawing.pairs, records, strict=True)):
        if k % period == 0:
            d = data.fields(x, y, v, "all", "all")
        else:
            here, there = data.fields(x, y, v, i, j), data.fields(*old, i, j)
            d = {name: here[name] + d[name] - there[name] for name in here}
        old = x, y, v
        x, y, v = x - a * d["x"], y - b * d["y"], v - b * d["v"]
        assert torch.allclose(record.x, x, atol=1e-10) and torch.allclose(record.y, y, atol=1e-10)


def test_twin_of_saba() -> None:
    data, a, b = FiniteSum(), 0.1, 0.2
    records = records_of("saba", data, upper_step=a, lower_step=b)
    x, y, v = data.x0, data.y0, torch.zeros(3)
    tables: dict[str, dict[int, Tensor]] = {}

    def corrected(name: str, key: int, part: Tensor) -> Tensor:
        table = tables.setdefault(name, {})
        out = part if key not in table else part - table[key] + torch.stack(list(table.values())).mean(0)
        table[key] = part
        return out

    for (i, j), record in zip(Drawing.pairs, records, strict=True):
        H, C, bb = data.H[j], data.C[j], data.b[j]
        d_y = corrected("y", j, H @ y + C.T @ x + bb)
        d_v = corrected("v upper", i, -(y + data.p[i])) + corrected("v lower", j, H @ v)
        d_x = corrected("x upper", i, x + data.q[i]) + corrected("x lower", j, -C @ v)
        x, y, v = x - a * d_x, y - b * d_y, v - b * d_v
        assert torch.allclose(record.x, x, atol=1e-10) and torch.allclose(record.y, y, atol=1e-10)


def test_twin_of_vrbo() -> None:
    data, a, b, period, steps = FiniteSum(), 0.1, 0.2, 2, 3
    spider = methods.Spider(period)
    options: dict[str, Any] = {"upper_direction": spider, "lower_direction": spider, "lower_steps": steps}
    records = records_of("vrbo", data, estimator=EXACT, upper_step=a, lower_step=b, **options)
    x, y, zero = data.x0, data.y0, torch.zeros(3)
    d_x, d_y, old_x, old_y = x, y, (x, y), (x, y)
    for k, ((i, j), record) in enumerate(zip(Drawing.pairs, records, strict=True)):
        begin = k % period == 0
        d_x = data.exact(x, y, "all", "all") if begin else data.exact(x, y, i, j) + d_x - data.exact(*old_x, i, j)
        old_x, x = (x, y), x - a * d_x
        for t in range(steps):
            if begin and t == 0:
                d_y = data.fields(x, y, zero, "all", "all")["y"]
            else:
                d_y = data.fields(x, y, zero, i, j)["y"] + d_y - data.fields(*old_y, zero, i, j)["y"]
            old_y, y = (x, y), y - b * d_y
        assert torch.allclose(record.x, x, atol=1e-10) and torch.allclose(record.y, y, atol=1e-10)


def test_twin_of_primal_dual() -> None:
    """The lecture's (29) with the smoothed value function (26)."""
    problem, a, b, steps = b2(), 0.05, 0.2, 3
    ridge, slack, ascent = 0.1, 0.01, 0.5
    records = run(
        "primal-dual",
        problem,
        5,
        upper_step=a,
        lower_step=b,
        lower_steps=steps,
        lower_copy=methods.SecondLower(ridge),
        multiplier=methods.Ascent(step=ascent, ridge=ridge, slack=slack, initial=1.0),
    )
    x, y, z, lam = problem.x0, problem.y0, problem.y0, 1.0
    g = lambda y, x: problem.g(x, y) + 0.5 * ridge * y @ y  # noqa: E731
    for record in records:
        for _ in range(steps):
            z = z - b * torch.func.grad(g)(z, x)
        fx, fy = torch.func.grad(problem.f, argnums=(0, 1))(x, y)
        gx, gy = torch.func.grad(problem.g, argnums=(0, 1))(x, y)
        gap = float(problem.g(x, y) - (g(z, x) + slack))
        assert record.multiplier == pytest.approx(lam)
        x, y = x - a * (fx + lam * (gx - torch.func.grad(problem.g)(x, z))), y - a * (fy + lam * gy)
        lam = max(lam + ascent * gap, 0.0)
        assert torch.allclose(record.x, x, atol=1e-10) and torch.allclose(record.y, y, atol=1e-10)


# ---------------------------------------------------------------------------------------------- adaptive steps


@pytest.mark.filterwarnings("ignore:.*no trial step gave sufficient decrease")
@pytest.mark.parametrize("response", ["tangent", "step"])
@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("start", [None, 3.0])
def test_bisls_is_the_optimizer_of_the_same_name(direction: str, response: str, start: float | None) -> None:
    """Bit for bit, the choice about the carried y included."""
    problem, steps, solver = random_qb(4), 2, CG(8, 0.01)
    point = problem.instance()
    inner = SLS([point.y], 10.0, lower_bound=None)
    outer: Any = BiSLS([point.x], start, c=0.3, lower=inner, direction=direction, solver=solver)
    if response == "step":
        outer = OneStepBiSLS([point.x], start, c=0.3, lower=inner, direction=direction)
    records = run(
        f"bisls-{direction}",
        problem,
        12,
        solver=solver,
        response=response,
        lower_steps=steps,
        lower_step=policies.SLS(start=10.0, lower_bound=None),
        upper_step=policies.SLS(start=start, c=0.3),
    )
    for record in records:
        expected = iterate(inner, outer, point, steps, solver)
        (upper,) = record.records["x"]
        assert upper[:6] == expected[:6]
        assert torch.equal(record.x, point.x.detach())


def finite(records: list[methods.IterationRecord]) -> bool:
    return all(bool(torch.isfinite(t).all()) for r in records for t in (r.x, r.y))


RULES: dict[str, Any] = {
    "SLS": policies.SLS(),
    "SLSB": policies.SLSB(bound=1.0),
    "SPSMax": policies.SPSMax(bound=1.0),
    "SPSB": policies.SPSB(),
    "DecSPS": policies.DecSPS(bound=1.0),
    "Envelope": policies.Envelope(bound=1.0, floor=1e-3),
    "GradientNorm": policies.GradientNorm(initial=10.0),
    "Constant": policies.Constant(bound=0.01, decay="inverse_sqrt"),
}
POLYAK = ("SPSMax", "SPSB", "DecSPS", "Envelope")
SEARCHES = ("SLS", "SLSB")


def allowed(name: str, level: str, rule: str) -> bool:
    """What the mathematics allows, said once more in the words of the issue."""
    row = rows.ROWS[name]
    if rule not in (*POLYAK, *SEARCHES):
        return True
    direction = row.upper_direction if level == "upper" or (row.joint and level == "y") else row.lower_direction
    if isinstance(direction, (methods.Storm, methods.Spider, methods.Saga)):
        return False
    if level == "upper" and row.joint:
        return False
    return not (level == "upper" and isinstance(row.estimator, ValueFunction))


@pytest.mark.filterwarnings("ignore:.*sufficient decrease", "ignore:.*slope", "ignore:.*descend", "ignore:.*disagree")
@pytest.mark.parametrize("level", ["upper", "lower"])
@pytest.mark.parametrize("name", methods.names())
def test_every_row_with_every_rule(name: str, level: str) -> None:
    problem = ridge_hpo()
    for rule, policy in RULES.items():
        options: dict[str, Any] = {f"{level}_step": policy}
        if rows.ROWS[name].lower_steps > 1 and not rows.ROWS[name].until:
            options["lower_steps"] = 2
        if allowed(name, level, rule):
            assert finite(run(name, problem, 2, **options)), rule
        else:
            with pytest.raises(OptionError, match=rf"methods\.run\('{name}'\), step of "):
                run(name, problem, 3, **options)


@pytest.mark.parametrize("row", ["ba", "stocbio", "soba", "amigo", "unroll-truncated", "d-tfbo"])
def test_adaptive_steps_make_progress(row: str) -> None:
    problem = ridge_hpo()
    options = {"upper_step": policies.SLS(), "lower_step": policies.SLS(), "lower_steps": 5}
    if "v" in rows.ROWS[row].variables:
        options["auxiliary_step"] = policies.SLS(start=1.0, lower_bound=None)
    if row == "stocbio":
        options["solver"] = Neumann(20, 0.2)
    *_, last = run(row, problem, 15, **options)
    assert problem.F(last.x) < 0.75 * problem.F(problem.x0)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("stocbio", {"lower_step": policies.SPSB(lower_bound=None)}, "needs a lower bound"),
    ("stocbio", {"upper_step": policies.SPSB(lower_bound=None)}, "needs a lower bound"),
    ("soba", {"auxiliary_step": policies.SPSB()}, "no known lower bound"),
    ("sustain", {"upper_step": policies.SLS()}, "Armijo's condition may fail"),
    ("sustain", {"lower_step": policies.SPSB()}, "Polyak's ratio"),
    ("saba", {"upper_step": policies.SLS()}, "no gradient of the sampled loss"),
    ("bome", {"upper_step": policies.SLS()}, "one joint direction"),
    ("f2sa", {"upper_step": policies.SPSB()}, "no known lower bound"),
    ("f2sa", {"upper_step": policies.SLS(start=1.0)}, "certifies nothing"),
    ("bisls-sgd", {"upper_direction": methods.Momentum()}, "knows the directions"),
    ("stocbio", {"upper_direction": methods.Saga()}, "sum over samples"),
    ("unroll", {"lower_direction": methods.Adam()}, "plain lower steps"),
    ("unroll", {"order": "x,y"}, "before x"),
    ("unroll", {"upper_direction": methods.Storm()}, "second point"),
    ("soba", {"order": "y,x"}, "uses v"),
    ("f2sa", {"multiplier": None}, "lambda"),
    ("soba", {"correction": "tangent"}, "correction"),
    ("stocbio", {"order": "y,x,y"}, "nothing twice"),
    ("stocbio", {"order": "yw"}, "name groups"),
    ("stocbio", {"order": "y,,x"}, "nothing twice"),
    ("stocbio", {"lower_steps": 0}, "lower_steps"),
    ("stocbio", {"lower_steps": 1.5}, "lower_steps"),
    ("stocbio", {"upper_step": -1.0}, "bound"),
    ("stocbio", {"upper_step": "0.1"}, "upper_step"),
    ("stocbio", {"upper_step": SLS}, "upper_step"),
    ("stocbio", {"upper_step": policies.SLS}, "upper_step"),
    ("stocbio", {"learning_rate": 0.1}, "no such option"),
    ("stocbio", {"project": "box"}, "project"),
    ("stocbio", {"solver": "cg"}, "solver"),
    ("stocbio", {"clock": "seconds"}, "clock"),
    ("stocbio", {"estimator": "cg"}, "estimator"),
    ("stocbio", {"estimator": Implicit}, "estimator"),
    ("stocbio", {"upper_direction": "adam"}, "upper_direction"),
    ("stocbio", {"lower_direction": methods.Adam}, "lower_direction"),
    ("stocbio", {"response": "one"}, "response"),
    ("bisls-sgd", {"response": "step", "curvature": 9.0}, r"curvature=9.0, response='step'.*leave"),
    ("bisls-sgd", {"response": "step", "carry": "auto"}, r"carry='auto', response='step'.*leave"),
    ("bisls-sgd", {"response": "step", "momentum": "auto"}, r"momentum='auto', response='step'.*True or False"),
    (
        "bisls-sgd",
        {"response": "step", "solver": CG(3), "estimator": Amortised(), "order": "yvx"},
        r"solver=CG\(.*leave",
    ),
    ("bisls-sgd", {"response": "step", "upper_step": policies.SLS(max_step=1.0)}, r"max_step=1.0.*leave"),
    ("bisls-sgd", {"response_steps": 1}, r"response_steps=1, response='tangent'.*leave"),
    ("bisls-adam", {"baseline": "paper"}, r"baseline='paper', response='tangent'.*leave"),
    ("bisls-sgd", {"response": "step", "baseline": "none"}, "baseline"),
    ("bisls-sgd", {"order": "yx", "carry": True}, r"carry=True, order='yx'.*order='y,x'"),
    ("stocbio", {"response": "step"}, r"response='step'.*not searched.*SLS"),
    ("stocbio", {"curvature": 0.5}, r"curvature=0.5.*not searched.*SLS"),
    ("bisps", {"carry": False}, r"carry=False.*not searched.*SLS"),
    ("soba", {"momentum": True}, r"momentum=True.*not searched.*SLS"),
    ("stocbio", {"baseline": "matched"}, r"baseline='matched'.*not searched.*SLS"),
    ("stocbio", {"lower": methods.LowerLoss}, "lower"),
    ("stocbio", {"start": {"x": "first"}}, "start"),
    ("soba", {"solver": CG()}, "solves nothing"),
    ("f2sa", {"multiplier": 3.0}, "multiplier"),
    ("d-tfbo", {"tolerance": 0.0}, "tolerance"),
    ("stable", {"correction": "inside"}, "correction"),
]


@pytest.mark.parametrize(("name", "options", "reason"), REFUSED, ids=str)
def test_refusals_say_why(name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(AdaptiveBilevelError, match=reason) as caught:
        run(name, b2(), 2, **options)
    assert isinstance(caught.value, ValueError)


def test_a_polyak_step_takes_the_bound_of_the_sample() -> None:
    problem = b2()
    records = run(
        "stocbio",
        problem,
        5,
        lower_step=policies.SPSMax(bound=10.0, lower_bound=None),
        lower_bound=lambda x, _: float(problem.g(x, problem.ystar(x))),
    )
    assert finite(records)


def test_slsb_at_the_upper_level_decays() -> None:
    problem, bound = random_qb(2), 0.02
    options = {"lower_step": policies.SLS(start=1.0, lower_bound=None), "upper_step": policies.SLSB(bound=bound)}
    for record in run("bisls-sgd", problem, 6, **options):
        assert 0.0 < record.steps.upper <= bound * (record.iteration + 1) ** -0.5 + 1e-15


# ---------------------------------------------------------------------------------------------- projection, lists

SETS: dict[str, Any] = {"box": methods.Box(-0.3, 0.4), "ball": methods.Ball(0.7), "simplex": methods.Simplex(1.0)}


@pytest.mark.parametrize("name", ["ttsa", "stable", "soba", "bome", "bisls-sgd", "bisps", "s-tfbo"])
@pytest.mark.parametrize("kind", [*SETS, "callable"])
def test_x_stays_in_the_set(kind: str, name: str) -> None:
    problem = ridge_hpo()
    project = SETS.get(kind, lambda tensors: [t.clamp_(-0.3, 0.4) for t in tensors])
    for record in run(name, problem, 4, project=project, x=10 * problem.x0):
        projected = record.x.clone()
        project([projected])
        assert torch.allclose(projected, record.x, atol=1e-14)


def test_names_and_descriptions(capsys: pytest.CaptureFixture[str]) -> None:
    listed = methods.names()
    expected = (
        "ba bsa aid-bio stocbio alset ttsa stable sustain mrbo vrbo fsla soba saba srba amigo pzobo hozog unroll "
        "unroll-forward unroll-truncated darts s-tfbo d-tfbo bisps bisls-sgd bisls-adam f2sa pgdo bome primal-dual"
    )
    assert set(listed) == set(expected.split())
    lines = str(listed).splitlines()
    assert len(lines) == len(listed)
    for name, line in zip(listed, lines, strict=True):
        assert line.startswith(name) and rows.ROWS[name].source in line
        text = methods.describe(name)
        assert capsys.readouterr().out.strip() == text.strip()
        for word in (rows.ROWS[name].summary, "estimator", "g: ", "assumes", "iteration"):
            assert word in text
    with pytest.raises(OptionError, match="did you mean stocbio"):
        methods.describe("stocBiO")


def test_a_row_is_short_and_has_no_loop() -> None:
    """At most 15 lines, all of them a composition."""
    lengths = {}
    for family in pathlib.Path(rows.__file__).parent.glob("*.py"):
        source = family.read_text().splitlines()
        for start in (i for i, line in enumerate(source) if line == "    Row("):
            lengths[source[start + 1]] = source[start:].index("    ),") - 1
        if family.name != "__init__.py":
            assert not any(line.lstrip().startswith(("for ", "while ")) for line in source)
    assert len(lengths) == len(methods.names())
    assert max(lengths.values()) <= 15, lengths
