"""The paper's upper search: one more lower step per trial (Fan et al., 2023, Algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import policies
from ..errors import LowerLevelError
from ..optim.direction import Direction
from ..optim.options import Conduct
from ..optim.projection import Projection, as_projection
from ..optim.search_path import SearchPath
from ..optim.slope_rounding import most_ratio
from ..optim.state import RoleState
from ..policies import armijo_ceiling
from ..policies.schedule import Decay
from .context import Change, Place, Point, Redirect
from .lower import LowerProblem
from .model_check import NoCheck
from .momentum import momentum_of
from .options import OneStepOptions
from .pace import Always
from .prediction import Never
from .roles import ResponseModel
from .search import Limits
from .searching import Roles, SearchingOptimizer
from .source import Source

__all__ = ["OneMoreStep", "OneStepBiSLS", "OneStepSearch"]


@final
class SteppedModel:
    """y(a) = y - beta grad_y g(x - a d, y), `steps` times.

    Its slope is taken to be <h, d>, with h the user's hypergradient.

    Args:
        point: Where the step begins.
        path: The path.
        problems: The lower problems, with the last lower step beta of each.
        steps: Number of lower steps.
    """

    comparable = False
    offsets: Sequence[Tensor] | None = None

    def __init__(self, point: Point, path: SearchPath, problems: Sequence[LowerProblem], steps: int) -> None:
        self._guard, self._lower, self._counts = point.guard, point.lower, point.counts.lower
        self._problems, self._steps = problems, steps
        self.path, self.slope, self.slope_ratio = path, path.promised, 1.0

    def close(self) -> None:
        """Do nothing."""

    def answer(self, step: float) -> None:
        """Take the lower steps at the present x."""
        for _ in range(self._steps):
            gradients = [self._guard.gradient(p.closure, self._lower, p.random)[1] for p in self._problems]
            self._counts.gradients += 1
            for problem, grads in zip(self._problems, gradients, strict=True):
                for p, g in zip(self._lower, grads, strict=True):
                    if g is not None:
                        p.add_(g, alpha=-problem.step_size)

    def changes(self) -> list[Change]:
        """Return nothing to compare."""
        return []

    def confirm(self, place: Place) -> None:
        """Do nothing."""

    def effects(self) -> list[Change]:
        """Return nothing to compare."""
        return []

    def correction(self) -> float | None:
        """Return None."""
        return None


@final
class OneMoreStep:
    """The response of `OneStepBiSLS`.

    The slope of the searched function is not that of the hypergradient. Every trial can fail, and an accepted step can
    raise F. It is for comparison only.

    Args:
        steps: Number of lower steps in each trial.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def init(self) -> RoleState:
        """Return an empty state."""
        return RoleState()

    def propose(self, point: Point, path: SearchPath, redirect: Redirect, state: RoleState) -> ResponseModel:
        """Return the model of y along the path.

        Raises:
            LowerLevelError: There is no lower level to step.
        """
        problems = point.problems()
        if not problems:
            raise LowerLevelError(
                "OneStepBiSLS(lower=None): the trial takes lower steps; pass lower= the lower optimizer"
            )
        if any(math.isnan(problem.step_size) for problem in problems):
            raise LowerLevelError(
                "OneStepBiSLS.step(lower=(tensors, loss)): the trial takes lower steps, so give the length of the last "
                "one, too: lower=(tensors, loss, step_size)"
            )
        return SteppedModel(point, path, problems, self._steps)

    def commit(self, point: Point, model: ResponseModel, state: RoleState) -> RoleState:
        """Return nothing new."""
        return RoleState()


class OneStepSearch(SearchingOptimizer):
    """The step of `OneStepBiSLS`. Abstract base class of it and of the optimizers of hosts."""

    options: OneStepOptions

    def _make_roles(self) -> None:
        self.roles = Roles(
            response=OneMoreStep(self.options.response_steps),
            check=NoCheck(),
            pace=Always(),
            momentum=momentum_of(self._mixing()),
            prediction=Never(),
            diagnosis=self.diagnosis,
        )

    def _mixing(self) -> bool:
        direction, momentum = self.conduct.direction, self.options.momentum
        return direction == "adam" if momentum is None or not isinstance(direction, str) else momentum

    def _limits(self, point: Point, path: SearchPath) -> Limits:
        """Return the bound in force; one that was not given is found at the first step."""
        state, scale = point.scale.state, 1.0
        bound: float | None = point.lr
        if self.param_groups[0]["automatic"]:
            low, scale = self.options.lower_bound, point.lr
            if state.found == 0.0 and low is not None:
                most = most_ratio(point.value, path.promised, path.gradient.tensors, path.along)
                ceiling = float(armijo_ceiling(point.value, path.promised, low, self.rule.c, most))
                state = state._replace(found=ceiling if math.isfinite(ceiling) else 0.0)
            bound = scale * state.found or None  # None: found by trials
        return Limits(self.policy, state, bound, scale, math.inf, 0.0, baseline=self.options.baseline == "matched")


@final
class OneStepBiSLS(OneStepSearch):
    """The upper search of Fan et al. (2023), Algorithm 2: one more lower step per trial, eq. (14).

    The search accepts a step a if f(x - a d, y(a)) <= f(x, y) - c a <h, d> + slack. Here y(a) is y after one more lower
    step at x - a d, with the last step size of the lower optimizer. The searched function does not have the slope of
    the hypergradient; this rule is for comparisons with the paper. Otherwise, use `BiSLS`.

    Args:
        params: Upper parameters or groups.
        lr: The bound alpha_b,0 > 0 of all trials. If None, it is (f - lower_bound)/(c <h, d>) at the first step.
        lower: The optimizer of the lower level (any torch optimizer), or a list of them. Functional code gives
            (tensors, loss, step_size) to each ``step``, with the step size of its inner loop.
        hypergradient: As in `BiSLS`.
        direction: "sgd", "adam" (the search is along A^{-1} h, the step along A^{-1} m), or a `Direction`.
        momentum: Whether the step is along the mean of the hypergradients. By default, for "adam" only, as in the
            paper.
        baseline: "paper" compares with f(x, y), "matched" with f(x, y(0)).
        response_steps: Number of lower steps in each trial.
        project: Convex set for x, as in `BiSLS`.
        decay: Schedule of the bound: "constant", "inverse_sqrt", "inverse", or a callable k -> factor.
        c: Armijo constant, in (0, 1).
        shrink: w, the factor from a rejected trial to the next one, in (0, 1).
        grow: eta >= 1, the factor of reset="grow".
        reset: How a search begins: "initial" (lr), "keep" (the last step) or "grow" (eta times the last step). These
            are options 1, 2 and 3 of Algorithm 3.
        slack: delta >= 0, the increase of f that a trial may have.
        lower_bound: A lower bound of f, or None if there is none.
        max_trials: Number of trials after which a search fails. If None, it fails at 1e-12 of its first trial.
        betas: Adam's decay constants.
        eps: Adam's eps, outside the root.
        max_skips: `NonFiniteError` is raised after so many non-finite losses or gradients in a row.

    Raises:
        OptionError: An option is out of range, or does not apply. It is also a ValueError.
        TensorError: Upper and lower parameters share a tensor, or one is sparse or complex.

    >>> import torch
    >>> from adaptive_bilevel import SLS, OneStepBiSLS
    >>> x, y = torch.tensor([4.0], requires_grad=True), torch.tensor([0.0], requires_grad=True)
    >>> inner = SLS([y])
    >>> outer = OneStepBiSLS([x], lower=inner)
    >>> for _ in range(15):
    ...     _ = inner.step(lambda: ((y - x / 2) ** 2).sum())
    ...     x.grad = (y.detach() - 1) / 2 + x.detach() / 10  # f_x - C H^{-1} f_y
    ...     loss = outer.step(lambda: ((y - 1) ** 2 / 2 + x**2 / 20).sum())
    >>> round(x.item(), 1)
    1.4
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | None = None,
        *,
        lower: Any = None,
        hypergradient: Source = None,
        direction: str | Direction = "sgd",
        momentum: bool | None = None,
        baseline: str = "paper",
        response_steps: int = 1,
        project: Projection | None = None,
        decay: Decay = "constant",
        c: float = 0.1,
        shrink: float = 0.5,
        grow: float = 1.2,
        reset: str = "grow",
        slack: float = 0.0,
        lower_bound: float | None = 0.0,
        max_trials: int | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_skips: int = 100,
    ) -> None:
        owner = "OneStepBiSLS"
        # The searched function has not the slope of the hypergradient, so no step can be excluded beforehand.
        rule = policies.SLSB(
            decay=decay,
            c=c,
            shrink=shrink,
            grow=grow,
            reset=reset,
            slack=slack,
            lower_bound=None,
            max_trials=max_trials,
        )
        conduct = Conduct(owner=owner, direction=direction, betas=betas, eps=eps, max_skips=max_skips)
        options = OneStepOptions(
            owner=owner,
            momentum=momentum,
            lower_bound=lower_bound,
            baseline=baseline,
            response_steps=response_steps,
        )
        self.project = as_projection(owner, project)
        super().__init__(params, lr, rule, conduct, options=options)
        self.hypergradient = hypergradient
        self.bind(lower)
