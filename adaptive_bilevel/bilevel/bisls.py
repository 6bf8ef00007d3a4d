"""BiSLS: a line search at the upper level of a bilevel problem, for code that computes hypergradients."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import TYPE_CHECKING, Any, final

from torch.optim.optimizer import ParamsT

from ..errors import OptionError
from ..hypergradient import Lanczos, LinearSolver
from ..hypergradient.products import refuse_products
from ..hypergradient.shared_basis import expect
from ..hypergradient.solution import described
from ..optim.direction import Direction
from ..optim.options import Conduct, refuse_unused_moments
from ..optim.projection import Projection, as_projection
from ..optim.search_path import SearchPath
from ..policies import SLS, SLSB, GuardedSLS, validation
from .context import Point
from .lower import Lower
from .model_check import check_of
from .momentum import momentum_of
from .options import RoleOptions, SearchOptions
from .pace import pace_of
from .prediction import prediction_of
from .response import Tangent
from .roles import ModelCheck, Momentum, Pace, Prediction, Response
from .search import Limits
from .searching import Roles, SearchingOptimizer
from .source import Source

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["BiSLS", "UpperSearch"]


class UpperSearch(SearchingOptimizer):
    """An upper search whose options name its roles. Abstract base class of `BiSLS` and the optimizers of hosts."""

    options: RoleOptions

    @property
    @abc.abstractmethod
    def solver(self) -> LinearSolver:
        """P of the tangent."""

    def _follow(self, level: Lower) -> None:
        """Set the lower level. Its hypergradients share their products with the next upper step."""
        refuse_products("BiSLS", self.options.products, (*self._parameters(), *level.tensors()))
        super()._follow(level)
        self._expect_products()

    def _restored(self) -> None:
        super()._restored()
        self._expect_products()

    def _expect_products(self) -> None:
        if isinstance(self.solver, Lanczos) and isinstance(self.options.response, str):
            expect(self.lower.tensors())
            self._handover.expect(self.lower.tensors())

    def _shared_options(self) -> dict[str, Any]:
        return {**super()._shared_options(), "solver": described(self.solver)}

    def _make_roles(self) -> None:
        chosen = self.options
        self.roles = Roles(
            response=Tangent(self.solver, chosen.products) if isinstance(chosen.response, str) else chosen.response,
            check=check_of(chosen.curvature),
            pace=pace_of(chosen.pace, certified=chosen.momentum is False),
            momentum=momentum_of(self._mixing()),
            prediction=prediction_of(chosen.carry, self.solver),
            diagnosis=self.diagnosis,
        )

    def _mixing(self) -> Any:
        return _mixing(self.conduct.direction, self.options.momentum)

    def _refuse_unused(self) -> None:
        if not isinstance(self.conduct.direction, str) and self.options.momentum is True:
            raise OptionError(
                f"BiSLS(momentum=True, direction={self.conduct.direction!r}): a direction of yours steps along what it "
                "proposes; leave momentum out, or give a Momentum"
            )
        unused = ("betas", "eps") if self._mixing() is False else ("eps",)
        refuse_unused_moments("BiSLS", self.conduct, unused)

    def _limits(self, point: Point, path: SearchPath) -> Limits:
        """Return limits under which no step is excluded that could pass: the slope is that of phi."""
        bound, scale = self._bound()
        most = self.policy.max_step if isinstance(self.policy, SLS) else None
        return Limits(
            policy=point.scale.policy(self.policy),
            state=point.scale.state,
            bound=bound,
            scale=scale,
            most=math.inf if most is None else most,
            rounding=point.rounding,
        )


@final
class BiSLS(UpperSearch):
    """BiSLS: a line search at the upper level, for code that already computes hypergradients.

    ``.grad`` of the upper parameters holds the hypergradient h when ``step(upper_closure)`` is called. The search
    accepts a step a if phi(a) <= f(x, y) - c a s + slack. Here d is h, or A^{-1} h in Adam's metric A, and
    phi(a) = f(x - a d, y + a w) follows the lower solution along its tangent: w = P C^T d, s = <f_x, d> - <f_y, w>.
    C is grad^2_xy g, and P approximates the inverse of grad^2_yy g.

    Args:
        params: Upper parameters or groups.
        lr: The first trial of the first search, > 0. If it passes, the search goes on with longer ones while they pass.
            If None, it is (f - lower_bound)/(c s), which no step that passes exceeds. It then also caps later searches.
        lower: The optimizer of the lower level (any torch optimizer), a list of them (several children, a meta-batch of
            tasks), a `Lower`, or None. None is for an f that does not depend on a lower variable, and for a lower level
            that each ``step`` is given.
        hypergradient: Source of h: None (``.grad``), `adaptive_bilevel.hypergradient.implicit` or another function of
            its first four arguments, `Implicit(solver)`, or "direct" (the gradient of the upper loss, whose closure
            runs the inner loop). See `adaptive_bilevel.bilevel.source`.
        direction: "sgd", "adam" (the search is along A^{-1} h, the step along A^{-1} m, in the metric of
            `adaptive_bilevel.optim.direction.AdamMetric`), or a `Direction`.
        momentum: How much of the mean of the hypergradients the step contains. The search is along the last
            hypergradient. "auto": as much as predicts the next hypergradient; without a lower level, and where the
            losses show that f is one function of x, the direction of L-BFGS is searched and stepped along
            (`adaptive_bilevel.bilevel.secant`). True: the mean. False: nothing, so that the search certifies every
            step, and F cannot rise if y and the hypergradient are exact. Or a `Momentum`. A `Direction` has its own
            momentum. See `adaptive_bilevel.bilevel.momentum`.
        response: How y answers to a move of x: "tangent", or a `Response`. See `adaptive_bilevel.bilevel.response`.
        solver: P of the tangent, `Lanczos()` by default. With the same `Lanczos` in `implicit`, both share their
            products; with another hypergradient, P is used in k / 2 steps (`adaptive_bilevel.bilevel.kept_inverse`).
            `Identity` and a random draw do not estimate their error; `CG` replaces them if d descends along its
            tangent.
        carry: Whether y moves to y + a w. "auto": it moves by the share of that which earlier moves were worth
            (`adaptive_bilevel.bilevel.share`); with `Neumann`, it stays. True, False, or a `Prediction`.
        curvature: Tolerance of the check of the tangent. A step is rejected if the smooth part of the change of the
            lower gradient exceeds curvature * (a ||C^T d|| + ||grad_y g||), or if it exceeds curvature * a ||C^T d||
            and x alone does not have the effect that the tangent assumes. With `Lanczos` and `CG`, it passes if f,
            corrected for that change, still decreases enough. The tolerance grows if a sample supports a part of x only
            (`adaptive_bilevel.bilevel.sample_support`). inf: no check. Or a `ModelCheck`. See
            `adaptive_bilevel.bilevel.model_check`.
        project: Convex set for x: `Box`, `Ball`, `Simplex` or a callable. A start outside of the set is projected
            first. Parameters that do not move (frozen, without a .grad, lr of 0) stay as they are.
        pace: When to search. "every": in each step. "auto": in each step where a search shares the products of the
            hypergradient (`Lanczos`) or momentum=False, else as rarely as the lengths that searches find agree. A step
            in between has the last length or a shorter one, evaluates f once, and is undone if f then disagrees. Or a
            `Pace`. See `adaptive_bilevel.bilevel.pace`.
        search: The policy of the search, in place of the options c to max_trials: `policies.GuardedSLS` (the default),
            `policies.SLS` (without the guard) or `policies.SLSB`.
        **options: Options of `policies.GuardedSLS`: c (in (0, 1); .1 by default, .5 for "sgd" with momentum=False),
            shrink, grow (1/shrink until a trial has been rejected), reset, slack, lower_bound, max_step, max_trials.
            Also products, how products with the lower Hessian are computed: "autograd", "difference" (of two gradients
            each, for losses without second derivatives) or "auto" (by differences if autograd has none, with one
            warning). Also betas and eps (Adam's constants; betas[0] is the decay of all means) and max_skips.

    Raises:
        OptionError: An option is out of range, or does not apply. It is also a ValueError.
        TensorError: Upper and lower parameters share a tensor, or one is sparse or complex.

    >>> import torch
    >>> from adaptive_bilevel import SLS
    >>> from adaptive_bilevel.hypergradient import assign, implicit
    >>> x, y = torch.tensor([4.0], requires_grad=True), torch.tensor([0.0], requires_grad=True)
    >>> f = lambda: ((y - 1) ** 2 / 2 + x**2 / 20).sum()
    >>> g = lambda: (y**2 - x * y).sum()  # y*(x) = x / 2
    >>> inner = SLS([y], lower_bound=-10.0)
    >>> outer = BiSLS([x], lower=inner)
    >>> for _ in range(10):
    ...     for _ in range(3):
    ...         _ = inner.step(g)
    ...     assign([x], implicit(f, g, [x], [y]))
    ...     _ = outer.step(f)
    >>> round(x.item(), 2)  # 10 / 7
    1.43
    """

    _kept = (*SearchingOptimizer._kept, "_solver")

    def __init__(
        self,
        params: ParamsT,
        lr: float | None = None,
        *,
        lower: Any = None,
        hypergradient: Source = None,
        direction: str | Direction = "sgd",
        momentum: str | bool | Momentum = "auto",
        response: str | Response = "tangent",
        solver: LinearSolver | None = None,
        carry: str | bool | Prediction = "auto",
        curvature: float | ModelCheck = 0.5,
        project: Projection | None = None,
        pace: str | Pace = "every",
        search: SLS | SLSB | None = None,
        **options: Unpack[SearchOptions],
    ) -> None:
        products = options.pop("products", "auto")
        rule, conduct = _records(direction, momentum, search, options)
        roles = RoleOptions(
            owner="BiSLS",
            momentum=momentum,
            carry=carry,
            curvature=curvature,
            response=response,
            pace=pace,
            products=products,
        )
        self._solver = _checked_solver(solver, response)
        self.project = as_projection("BiSLS", project)
        super().__init__(params, lr, rule, conduct, options=roles)
        self.hypergradient = hypergradient
        self.bind(lower)

    @property
    def solver(self) -> LinearSolver:
        """P of the tangent."""
        return self._solver

    @solver.setter
    def solver(self, solver: LinearSolver) -> None:
        self._solver = _checked_solver(solver, self.options.response)
        self._make_roles()


def _records(
    direction: str | Direction, momentum: Any, search: SLS | SLSB | None, options: SearchOptions
) -> tuple[SLS | SLSB, Conduct]:
    """Return the search policy and the conduct that the options describe."""
    given: dict[str, Any] = dict(options)
    for name in given:
        if name not in SearchOptions.__annotations__:
            raise TypeError(f"BiSLS.__init__() got an unexpected keyword argument {name!r}")
    common = {name: given.pop(name) for name in ("betas", "eps", "max_skips") if name in given}
    conduct = Conduct(owner="BiSLS", direction=direction, **common)
    if search is not None:
        if given:
            raise OptionError(f"BiSLS(search={search!r}, {next(iter(given))}=...): the policy has options of its own")
        if not isinstance(search, (SLS, SLSB)):
            raise OptionError(
                f"BiSLS(search={search!r}): search must be policies.GuardedSLS(...), policies.SLS(...) or "
                "policies.SLSB(...)"
            )
        found: Any = {"start" if isinstance(search, SLS) else "bound": None}
        return dataclasses.replace(search, **found), conduct
    if given.get("c") is None:
        plain = getattr(direction, "kind", direction) == "sgd" and _mixing(direction, momentum) is False
        given["c"] = 0.5 if plain else 0.1
    validation.finite("BiSLS", "lower_bound", given.get("lower_bound", 0.0), optional=True)
    return GuardedSLS(**given), conduct


def _checked_solver(solver: LinearSolver | None, response: str | Response) -> LinearSolver:
    """Return the solver, `Lanczos` by default."""
    if solver is None:
        return Lanczos()
    if isinstance(solver, type) or not callable(getattr(solver, "solve", None)):
        raise OptionError(
            f"BiSLS(solver={solver!r}): solver must be Lanczos(...), CG(...), Neumann(...) or Identity(...)"
        )
    if not isinstance(response, str):
        raise OptionError(f"BiSLS(solver={solver!r}, response={response!r}): a response of yours has its own inverse")
    return solver


def _mixing(direction: str | Direction, momentum: Any) -> Any:
    """Return the momentum in force; a user's `Direction` has its own."""
    return False if momentum == "auto" and not isinstance(direction, str) else momentum
