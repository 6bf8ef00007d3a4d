"""BiSLS: a line search at the upper level of a bilevel problem, for code that computes hypergradients."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import TYPE_CHECKING, Any, final

from torch.optim.optimizer import ParamsT

from ..errors import OptionError
from ..hypergradient import Lanczos, LinearSolver
from ..hypergradient.shared_basis import expect
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
    """An upper search with roles that its options name. Abstract: `BiSLS`, and a host's optimizers derive from it."""

    options: RoleOptions

    @property
    @abc.abstractmethod
    def solver(self) -> LinearSolver:
        """P of the tangent."""

    def _follow(self, level: Lower) -> None:
        """Take a lower level, whose hypergradients leave their inverse for the next step from now on."""
        super()._follow(level)
        if isinstance(self.solver, Lanczos) and isinstance(self.options.response, str):
            expect(self.lower.tensors())

    def _make_roles(self) -> None:
        chosen = self.options
        self.roles = Roles(
            response=Tangent(self.solver, chosen.products) if isinstance(chosen.response, str) else chosen.response,
            check=check_of(chosen.curvature),
            pace=pace_of(chosen.pace, certified=chosen.momentum is False),
            momentum=momentum_of(self._mixing()),
            prediction=prediction_of(chosen.carry),
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

    `.grad` of the upper parameters holds the hypergradient h when ``step(upper_closure)`` is called. The step searches
    the largest tried a with phi(a) <= f(x, y) - c a s (+ slack), along d = h or Adam's A^{-1} h, where phi(a) =
    f(x - a d, y + a w) follows the lower solution along its tangent: w = P C^T d, s = <f_x, d> - <f_y, w>.

    Args:
        params: Upper parameters or groups.
        lr: The first trial of the first search, > 0. Left out: (f - lower_bound)/(c s), the longest step that could
            pass; it caps every later search too.
        lower: The optimizer of the lower level (any torch optimizer), a list of them (several children, a meta-batch of
            tasks), a `Lower`, or None if f does not depend on a lower variable, or each step is given one.
        hypergradient: Where h comes from: None (``.grad``), `adaptive_bilevel.hypergradient.implicit` or another
            function of its first four arguments, `Implicit(solver)`, or "direct": the gradient of the upper loss
            itself, whose closure runs the inner loop. See `adaptive_bilevel.bilevel.source`.
        direction: "sgd", "adam" (BiSLS-Adam: search along A^{-1} h, step along A^{-1} m), or a `Direction`.
        momentum: Whether the step is along the mean of the hypergradients (searched is always along the last one).
            "auto": as far as that mean predicts the next one. False: every step is one that the search has certified,
            so that F cannot rise where y and the hypergradient are exact. Or a `Momentum`. A direction of the user's
            has a momentum of its own. See `adaptive_bilevel.bilevel.momentum`.
        response: How y answers: "tangent", or a `Response`. See `adaptive_bilevel.bilevel.response`.
        solver: P of the tangent; give the one that the hypergradient uses. For `Identity` and a random draw, which do
            not know how far they are from the inverse, P is `CG` instead where d descends along its tangent.
        carry: Whether y moves along to y + a w. "auto": it does, and the next lower step keeps the share of that which
            is best along it on the mean of the samples so far (`adaptive_bilevel.optim.warm_start`; lower optimizers of
            this package; for others False). Or a `Prediction`.
        curvature: A step is also rejected if the lower gradient changed (smoothly) by more than
            curvature * (a ||C^T d|| + ||grad_y g||), which it does where the tangent does not hold; with `Lanczos`
            and `CG`, unless f corrected for that change passes the test of decrease too. Where a sample supports a
            part of x only, it counts for less (`adaptive_bilevel.bilevel.sample_support`). inf: no such test. Or a
            `ModelCheck`. See
            `adaptive_bilevel.bilevel.model_check`.
        project: Convex set for x: `Box`, `Ball`, `Simplex` or a callable. A start outside of it is projected first, the
            search stays in it, and parameters that do not move (frozen, without a .grad, lr of 0) stay as they are.
        pace: Whether a search is due. "auto": as rarely as the lengths that searches find agree; a step in between has
            the last length or a shorter one, takes one value of f, and is undone if f then says so (with
            momentum=False, every step is searched). "every": in every step. Or a `Pace`. See
            `adaptive_bilevel.bilevel.pace`.
        search: A policy, `policies.GuardedSLS`, `policies.SLS` (without that guard) or `policies.SLSB`, in the place of
            the options c to max_trials.
        **options: Of the search, `policies.GuardedSLS`: c (Armijo constant, in (0, 1); left out: .1; .5 for "sgd" with
            momentum=False), shrink, grow (until a trial has been rejected, 1/shrink), reset, slack, lower_bound,
            max_step, max_trials; products: how those with the lower Hessian are taken, "autograd", "difference" (of two
            gradients each, for losses without second derivatives) or "auto" (by differences where autograd has none,
            which is said once); and betas, eps (Adam's constants; betas[0] also is the decay of all means), max_skips.

    Raises:
        OptionError: An option is out of range, or does not apply (also a ValueError).
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
        pace: str | Pace = "auto",
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
    """Return the momentum in force; a direction of the user's brings its own."""
    return False if momentum == "auto" and not isinstance(direction, str) else momentum
