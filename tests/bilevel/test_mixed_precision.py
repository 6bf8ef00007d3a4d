"""Short dtypes, autocast, GradScaler and torch.compile around both levels: as in float32, or refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive_bilevel import SLS, SLSB, SPSB, AutoSLS, BiSLS, BiSPS, OneStepBiSLS, SPSMax
from adaptive_bilevel.errors import AdaptiveBilevelWarning, ClosureError, OptionError, SolverError
from adaptive_bilevel.hypergradient import CG, Identity, Lanczos, Neumann, assign, implicit, implicit_with_info

FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


class Problem:
    """A feature map x above a small network y, in dtypes of their own, or cast by autocast."""

    def __init__(self, above: torch.dtype = FULL, below: torch.dtype = FULL, cast: torch.dtype | None = None) -> None:
        torch.manual_seed(0)
        self.outer = nn.Linear(4, 4, dtype=FULL).to(above)
        self.inner = nn.Sequential(nn.Linear(4, 8, dtype=FULL), nn.Tanh(), nn.Linear(8, 1, dtype=FULL)).to(below)
        self.x, self.y = list(self.outer.parameters()), list(self.inner.parameters())
        self.features = torch.randn(32, 4, dtype=FULL)
        self.target = self.features.sum(1, keepdim=True).sin()
        self.above, self.below, self.cast = above, below, cast

    def fit(self, part: slice) -> Tensor:
        features = self.features[part]
        with nullcontext() if self.cast is None else torch.autocast("cpu", self.cast):
            if self.cast is None:
                out = self.inner(self.outer(features.to(self.above)).to(self.below))
            else:
                out = self.inner(self.outer(features))
        return (out.float() - self.target[part]).square().mean()

    def lower(self) -> Tensor:
        return self.fit(slice(16)) + 0.01 * torch.stack([p.float().square().sum() for p in self.y]).sum()

    def upper(self) -> Tensor:
        return self.fit(slice(16, 32))


DTYPES = {
    "float32": (FULL, FULL, None),
    "autocast bf16": (FULL, FULL, BRAIN),
    "autocast fp16": (FULL, FULL, HALF),
    "fp16 below": (FULL, HALF, None),
    "bf16 below": (FULL, BRAIN, None),
    "fp16 above": (HALF, FULL, None),
    "fp16": (HALF, HALF, None),
    "bf16": (BRAIN, BRAIN, None),
}

Made = Callable[[Problem], tuple[Any, Any]]
RULES: dict[str, tuple[Made, Any]] = {
    "BiSPS": (lambda p: ((inner := SPSB(p.y)), BiSPS(p.x, lower=inner)), Lanczos(5)),
    "BiSLS": (lambda p: ((inner := SLS(p.y)), BiSLS(p.x, lower=inner, solver=Lanczos(5))), Lanczos(5)),
    "BiSLS Adam": (lambda p: ((inner := SLSB(p.y)), BiSLS(p.x, lower=inner, direction="adam")), Lanczos()),
    "BiSLS CG": (lambda p: ((inner := AutoSLS(p.y)), BiSLS(p.x, lower=inner, solver=CG(5))), CG(5)),
    "BiSLS Neumann": (lambda p: ((inner := SLS(p.y)), BiSLS(p.x, lower=inner, solver=Neumann(5))), Neumann(5)),
    "BiSLS Identity": (lambda p: ((inner := SLS(p.y)), BiSLS(p.x, lower=inner, solver=Identity(0.1))), Identity(0.1)),
    "OneStepBiSLS": (lambda p: ((inner := SLS(p.y)), OneStepBiSLS(p.x, lower=inner)), Lanczos(5)),
}


def trained(
    problem: Problem, make: Made, solver: Any, products: str = "auto", wrap: Callable[..., Any] = lambda f, _: f
) -> float:
    """Return the upper loss after ten iterations."""
    inner, outer = make(problem)
    if isinstance(outer, BiSLS):
        outer.set_record("options", type(outer.options)(**{**vars(outer.options), "products": products}))
    for _ in range(8):
        for _ in range(2):
            inner.step(wrap(problem.lower, inner))
        assign(problem.x, implicit(problem.upper, problem.lower, problem.x, problem.y, solver, products=products))
        outer.step(wrap(problem.upper, outer))
        assert outer.record.slope is None or outer.record.slope < float("inf")
    return float(problem.upper().detach())


@pytest.mark.filterwarnings("ignore:.*no trial step gave", "ignore:.*curvature", "ignore:.*Neumann")
@pytest.mark.parametrize("rule", RULES)
def test_as_in_float32(rule: str) -> None:
    ends = {name: trained(Problem(*dtypes), *RULES[rule]) for name, dtypes in DTYPES.items()}
    start = float(Problem().upper().detach())
    assert ends["float32"] < 0.75 * start
    for name, end in ends.items():
        assert end < ends["float32"] + 0.2 * start, (name, ends)


def test_products_by_differences_under_autocast() -> None:
    """They are of the loss in float32: in bfloat16 a difference would be rounding, and wrong by a third here."""
    found = []
    for cast, products in ((None, "autograd"), (BRAIN, "difference"), (HALF, "difference")):
        p = Problem(cast=cast)
        for around in (False, True):
            with torch.autocast("cpu", BRAIN) if around and cast else nullcontext(), warnings.catch_warnings():
                warnings.simplefilter("error", AdaptiveBilevelWarning)
                (h, *_), info = implicit_with_info(p.upper, p.lower, p.x, p.y, Lanczos(20), products=products)
            assert not info.error > 0.01
            found.append(h)
            assert torch.is_autocast_enabled("cpu") is False
    for h in found[2:]:
        assert float((h - found[0]).norm() / found[0].norm()) < 0.05  # what f_y in bfloat16 leaves


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
def test_products_by_differences_of_short_tensors(dtype: torch.dtype) -> None:
    p = Problem(below=dtype)
    with pytest.raises(SolverError, match=r"too few digits for a difference.*autocast"):
        implicit(p.upper, p.lower, p.x, p.y, products="difference")


def test_saved_means_of_short_parameters_keep_their_digits() -> None:
    """A loaded run goes on bit for bit, and means whose squares leave float16 do not vanish."""
    ends = []
    for resumed in (False, True):
        x = torch.full((3,), 1e-3, dtype=HALF, requires_grad=True)
        optimizer = SLS([x], direction="adam", lower_bound=None, lr=0.1)
        for k in range(6):
            if resumed and k == 3:
                state = optimizer.state_dict()
                optimizer = SLS([x], direction="adam", lower_bound=None, lr=0.1)
                optimizer.load_state_dict(state)
            optimizer.step(lambda: (x.float() - 1e-2).square().sum() * 1e-3)
            assert optimizer.record is not None and optimizer.record.moved
        assert optimizer.state[x]["direction"]["exp_avg_sq"].dtype == FULL
        ends.append(x.tolist())
    assert ends[0] == ends[1]


# ------------------------------------------------------------------------------------------ GradScaler


def with_scaler(form: str, scaler: Any) -> Callable[..., Any]:
    def wrap(loss: Callable[[], Tensor], optimizer: Any) -> Callable[[], Any]:
        def closure() -> Any:
            value = loss()
            scaled = scaler.scale(value)
            if form != "returned" and scaled.requires_grad:
                scaled.backward()
                if form == "unscaled":
                    scaler.unscale_(optimizer)
            return {"returned": scaled, "backward": value, "unscaled": value, "both": scaled}.get(form, scaled.item())

        return closure

    return wrap


@pytest.mark.filterwarnings("ignore:.*no trial step gave")
@pytest.mark.parametrize("rule", ["BiSPS", "BiSLS", "BiSLS Adam", "OneStepBiSLS"])
def test_a_backward_of_a_scaled_loss(rule: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain = trained(Problem(), *RULES[rule])
    assert trained(Problem(), *RULES[rule], wrap=with_scaler("backward", scaler)) == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("form", ["returned", "both", "number", "unscaled"])
@pytest.mark.parametrize("level", ["lower", "upper"])
@pytest.mark.parametrize("rule", ["BiSPS", "BiSLS", "OneStepBiSLS"])
def test_a_scaled_loss_is_refused(rule: str, level: str, form: str) -> None:
    if (rule, level, form) == ("BiSPS", "upper", "unscaled"):
        return  # it takes the loss alone, without a backward
    p, scaler = Problem(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    inner, outer = RULES[rule][0](p)
    inner.step(p.lower)
    assign(p.x, implicit(p.upper, p.lower, p.x, p.y))
    before = [t.detach().clone() for t in (*p.x, *p.y)]
    wrap = with_scaler(form, scaler)
    with pytest.raises(ClosureError, match="GradScaler"):
        inner.step(wrap(p.lower, inner)) if level == "lower" else outer.step(wrap(p.upper, outer))
    assert all(torch.equal(a, b) for a, b in zip(before, (*p.x, *p.y), strict=True))


def test_a_scaler_that_is_off_or_steps_itself() -> None:
    off, one = torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu", init_scale=1.0)
    plain = trained(Problem(), *RULES["BiSLS"])
    for form in ("returned", "both"):
        assert trained(Problem(), *RULES["BiSLS"], wrap=with_scaler(form, off)) == plain
    assert trained(Problem(), *RULES["BiSLS"], wrap=with_scaler("number", one)) == plain
    ends = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        p = Problem()
        optimizer = SPSB(p.y, 0.3)
        for _ in range(3):
            optimizer.zero_grad()
            loss = p.lower()
            if scaler is None:
                loss.backward()
                optimizer.step(loss=loss)
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer, loss=loss)
                scaler.update()
        ends.append(float(p.lower().detach()))
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)


# ------------------------------------------------------------------------------------------ torch.compile


def polyak_steps(make: Any, form: str, wrap: Callable[[Any], Any]) -> tuple[float, float, int]:
    torch.compiler.reset()
    p, seen = Problem(), []
    optimizer = make(p.y)
    optimizer.register_step_post_hook(lambda *_: seen.append(1))

    def around() -> None:
        loss = p.lower()
        loss.backward()
        optimizer.step(loss=loss)

    step = wrap(around if form == "a function around it" else optimizer.step)
    for _ in range(3):
        optimizer.zero_grad()
        if form == "a function around it":
            step()
        elif form == "closure":
            p.lower().backward()  # for BiSPS, whose closure only returns the loss
            step(p.lower)
        else:
            loss = p.lower()
            loss.backward()
            step(loss=loss)
    return float(p.lower().detach()), optimizer.record.step_size, len(seen)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at that of the loss
@pytest.mark.parametrize("form", ["closure", "loss", "a function around it"])
@pytest.mark.parametrize(
    "make", [SPSB, partial(SPSB, direction="adam"), SPSMax, BiSPS], ids=["SPSB", "SPSB Adam", "SPSMax", "BiSPS"]
)
def test_a_compiled_polyak_step_is_as_without(make: Any, form: str) -> None:
    """It is taken outside of compiled code."""
    found = polyak_steps(make, form, lambda step: torch.compile(step, backend="eager"))
    assert found == polyak_steps(make, form, lambda step: step)
    assert found[1] > 0.0 and found[2] == 3


@pytest.mark.parametrize("rule", [SLS, SLSB, AutoSLS, BiSLS])
def test_a_compiled_search_is_refused(rule: Any) -> None:
    torch.compiler.reset()
    x = torch.ones(2, requires_grad=True)
    optimizer = rule([x])
    x.grad = 2.0 * x.detach()

    def loss() -> Tensor:
        return x.square().sum()

    def step(closure: Callable[[], Tensor]) -> Tensor:
        found: Tensor = optimizer.step(closure)
        return found

    for compiled in (torch.compile(optimizer.step, backend="eager"), torch.compile(step, backend="eager")):
        with pytest.raises(OptionError, match=r"compiled by torch.compile.*Compile the model"):
            compiled(loss)
    torch.compiler.reset()
    with pytest.raises((torch._dynamo.exc.Unsupported, OptionError), match="Compile the model"):
        torch.compile(step, backend="eager", fullgraph=True)(loss)
    assert x.tolist() == [1.0, 1.0]
    torch.compiler.disable(optimizer.step)(torch.compile(loss, backend="eager"))
    assert x.tolist() != [1.0, 1.0]
