"""AutoSLS as an optimizer."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from .. import policies
from ..policies.schedule import Decay
from .direction import Direction
from .line_search import LineSearch
from .options import Conduct

__all__ = ["AutoSLS"]


class AutoSLS(LineSearch):
    """Stochastic line search where samples agree, averaged steps of a found length where they do not: the default.

    As long as the loss of the next sample begins where that of the last one ended, up to half of the decreases so far,
    each step is that of `SLS`. From then on (minibatches) the step is lr decay(k) without a search, along the mean of
    the gradients (for Adam A^{-1} m, as ever), and the parameters hold a mean of the iterates, see
    `adaptive_bilevel.optim.averaging`: gradients are taken at a point ahead of it, which is the optimizer's own, also
    between steps. The loss that a step returns is the one there. See `adaptive_bilevel.policies.AutoSLS` for the rule.
    It costs an evaluation more than `SLS` at its first step, with direction="adam" at each step as long as samples
    agree; later two evaluations a step, one of them with gradients.

    Args:
        params: Parameters or groups.
        lr: The first trial, and gamma_b,0 > 0 of the bound lr decay(k). Left out, both are found: the longest first
            step that does not raise the sample's loss, and under "inverse_sqrt" and "inverse_cbrt" the bound is
            estimated anew at each step after that (`adaptive_bilevel.policies.distance`).
        decay: "constant", "inverse_sqrt", "inverse_cbrt", "inverse" or a callable k -> factor.
        c: Armijo constant, in (0, 1).
        shrink: w, factor between two trials, in (0, 1).
        grow: eta >= 1 of reset="grow".
        reset: "initial", "keep" or "grow".
        slack: delta >= 0, an allowed increase.
        lower_bound: Any lower bound of the loss; None if there is none.
        max_trials: Trials before a search has failed; None: until 1e-12 of the first trial.
        direction: "sgd" or "adam".
        betas: Adam's decay constants. The mean of plain gradients has the first one's default.
        eps: Adam's eps, outside the root.
        max_skips: So many non-finite losses or gradients in a row raise `NonFiniteError`.

    Raises:
        OptionError: An option is out of range (also a ValueError).

    >>> import torch
    >>> x = torch.nn.Parameter(torch.tensor([3.0, 2.0]))
    >>> optimizer = AutoSLS([x])
    >>> for _ in range(60):
    ...     loss = optimizer.step(lambda: (x**2 * torch.tensor([1.0, 10.0])).sum())
    >>> bool(loss < 1e-6)
    True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | None = None,
        *,
        decay: Decay = "inverse_cbrt",
        c: float = 0.1,
        shrink: float = 0.5,
        grow: float = 1.2,
        reset: str = "grow",
        slack: float = 0.0,
        lower_bound: float | None = 0.0,
        max_trials: int | None = None,
        direction: str | Direction = "sgd",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_skips: int = 100,
    ) -> None:
        rule = policies.AutoSLS(
            decay=decay,
            c=c,
            shrink=shrink,
            grow=grow,
            reset=reset,
            slack=slack,
            lower_bound=lower_bound,
            max_trials=max_trials,
        )
        conduct = Conduct(owner=type(self).__name__, direction=direction, betas=betas, eps=eps, max_skips=max_skips)
        super().__init__(params, lr, rule, conduct)
