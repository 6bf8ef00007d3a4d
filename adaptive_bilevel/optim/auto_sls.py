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
    """Line search while samples agree, and averaged steps of an estimated length afterwards: the default lower rule.

    The rule has two phases:

    * **Samples agree**: the next samples confirm at least half of the decreases of the searches. Each step is that of
      `SLS`.
    * **Samples disagree** (minibatches): the step is lr decay(k), without a search, along the mean of the gradients m
      (for Adam along A^{-1} m). Below an upper optimizer of this package, the length is searched for, up to
      lr decay(k), as by `SLSB`: longer steps overfit the lower loss before x has moved. The parameters hold a mean of
      the iterates. Gradients are evaluated at another point, which the optimizer stores between steps; ``step`` returns
      the loss at that point. See `adaptive_bilevel.optim.averaging`.

    `adaptive_bilevel.policies.AutoSLS` has the formulas. The first phase costs one evaluation more than `SLS` at the
    first step, and with direction="adam" at each step. The second phase costs two evaluations a step, one of them with
    gradients, and the trials of a search; one more where the loss is above all before. A step without a search is at
    most 1 / w times the longest one before. One that ends far off is taken back, with a warning.

    Args:
        params: Parameters or groups.
        lr: The first trial, and gamma_b,0 > 0 in the bound lr decay(k). If None, both are estimated. The first step is
            then the longest one that does not raise the sample's loss. With decay="inverse_sqrt" and "inverse_cbrt",
            the bound is estimated again at each later step (`adaptive_bilevel.policies.distance`).
        decay: "constant", "inverse_sqrt", "inverse_cbrt", "inverse" or a callable k -> factor.
        c: Armijo constant, in (0, 1).
        shrink: w, the factor from a rejected trial to the next one, in (0, 1).
        grow: eta >= 1, the factor of reset="grow".
        reset: How a search begins: "initial" (lr), "keep" (the last step) or "grow" (eta times the last step).
        slack: delta >= 0, the increase of the loss that a trial may have.
        lower_bound: A lower bound of the loss, or None if there is none.
        max_trials: Number of trials after which a search fails. If None, it fails at 1e-12 of its first trial.
        direction: "sgd", "adam", or a `Direction`.
        betas: Adam's decay constants. With direction="sgd", the mean of the gradients uses the default of the first.
        eps: Adam's eps, outside the root.
        max_skips: `NonFiniteError` is raised after so many non-finite losses or gradients in a row.

    Raises:
        OptionError: An option is out of range. It is also a ValueError.

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
