"""Rows against plain twins of their recursions, most of them on samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import methods
from tests.methods.helpers import EXACT, run
from tests.problems import b2

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
