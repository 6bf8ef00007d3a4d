"""Kinds of quiet mistakes x hosts: each is said, and a run without one is told nothing."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import adaptive_bilevel as core
from adaptive_bilevel.errors import AdaptiveBilevelError, AdaptiveBilevelWarning
from adaptive_bilevel.hypergradient import assign, implicit

KINDS: dict[str, str] = {"none": "", "lower changes": "at the same point", "upper changes": "at the same point"}
KINDS |= {"clamped": "project=|param_callback", "no path": "does not depend|no path|absent"}


class Losses:
    """Ridge losses with one of the mistakes in them."""

    def __init__(self, kind: str) -> None:
        g = torch.Generator().manual_seed(0)
        draws = torch.rand(97, generator=g).mul(4.0).exp().tolist()
        self.kind, self.noise = kind, itertools.cycle(draws)
        self.A, self.V = (torch.randn(20, 3, dtype=torch.float64, generator=g) for _ in range(2))

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.detach().clone() if self.kind == "no path" else x
        noise = next(self.noise) if self.kind == "lower changes" else 1.0
        return noise * (((self.A @ y - 1) ** 2).mean() + (x.exp() * y**2).sum())

    def upper(self, y: Tensor) -> Tensor:
        noise = next(self.noise) if self.kind == "upper changes" else 1.0
        return noise * ((self.V @ y - 2) ** 2).mean()


def moved(kind: str, x: Tensor) -> None:
    if kind == "clamped":
        x.data.div_(1.0 + x.data.norm())


def in_core(kind: str, rule: str) -> None:
    losses = Losses(kind)
    x, y = (torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inner = core.SLS([y])
    outer = getattr(core, rule)([x], lower=inner)
    for _ in range(60):
        for _ in range(3):
            inner.step(lambda: losses.lower(x, y))
        assign([x], implicit(lambda: losses.upper(y), lambda: losses.lower(x, y), [x], [y]))
        outer.step(lambda: losses.upper(y))
        moved(kind, x)


def in_torchopt(kind: str, rule: str) -> None:
    pytest.importorskip("torchopt")
    from adaptive_bilevel_torchopt import LowerStep, UpperStep
    from tests.torchopt.modules import Base

    losses = Losses(kind)

    class Module(Base):
        def __init__(self, x: Tensor) -> None:
            super().__init__()
            self.x, self.y = x, torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
            self.lower = LowerStep(self, core.SLS)

        def objective(self) -> Tensor:
            return losses.lower(self.x, self.y)

        def solve(self) -> Any:
            step = self.lower.attach()
            for _ in range(3):
                step(self.objective)
            return self

    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    module = Module(x)
    outer = UpperStep([x], getattr(core, rule), lower=module.lower)
    for _ in range(60):
        module.solve()
        outer.step(lambda: losses.upper(module.y))
        moved(kind, x)


def in_betty(kind: str, rule: str) -> None:
    pytest.importorskip("betty")
    import adaptive_bilevel_betty as hosted
    from tests.betty.problems import Level, Variable, engine

    losses = Losses(kind)
    zeros = torch.zeros(3, dtype=torch.float64)
    top = Level("outer", lambda p, b: losses.upper(p.inner()), Variable(zeros.clone()), getattr(hosted, rule))
    low = Level("inner", lambda p, b: losses.lower(p.outer(), p.module()), Variable(zeros.clone()), hosted.SLS)
    low.config.unroll_steps, low.config.type = 3, "adaptive_cg"
    made = hosted.bind(engine(low, top, steps=180))
    if kind == "clamped":
        step = top.optimizer.step

        def clamping() -> Any:
            loss = step()
            moved(kind, top.value)
            return loss

        top.optimizer.step = clamping
    made.run()


HOSTS: dict[str, Callable[[str, str], None]] = {"core": in_core, "torchopt": in_torchopt, "betty": in_betty}


@pytest.mark.parametrize("rule", ["BiSLS", "OneStepBiSLS"])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("kind", KINDS)
def test_said(kind: str, host: str, rule: str) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            HOSTS[host](kind, rule)
            text = ""
        except AdaptiveBilevelError as error:
            text = str(error)
    said = "\n".join([text, *(str(w.message) for w in caught if issubclass(w.category, AdaptiveBilevelWarning))])
    if kind != "none":
        assert re.search(KINDS[kind], said), said
    else:
        assert not any(re.search(words, said) for words in KINDS.values() if words), said
