"""AutoSLS as an optimizer."""

from __future__ import annotations

from .. import policies
from .line_search import BoundedLineSearch

__all__ = ["AutoSLS"]


class AutoSLS(BoundedLineSearch):
    """Stochastic line search, bounded as by `SLSB` as long as samples disagree and as `SLS` else: for the lower level.

    Samples disagree while the losses of the run so far have fallen by less than the steps have promised, each on its
    own sample: sum_j (f_j(x_j) - f_{j+1}(x_{j+1})) < c sum_j gamma_j n_j, which cannot be where all samples are one
    function. See `adaptive_bilevel.policies.AutoSLS` for the rule. It costs an evaluation more than `SLS`, once.

    Args:
        params: Parameters or groups.
        lr: The first trial, and gamma_b,0 > 0 of the bound lr decay(k). Left out, both are found: the longest first
            step that does not raise the sample's loss, and under "inverse_sqrt" the bound is estimated anew at each
            step after that (`adaptive_bilevel.policies.distance`).
        decay: "constant", "inverse_sqrt", "inverse" or a callable k -> factor.
        c: Armijo constant, in (0, 1).
        shrink: w, factor between two trials, in (0, 1).
        grow: eta >= 1 of reset="grow".
        reset: "initial", "keep" or "grow".
        slack: delta >= 0, an allowed increase.
        lower_bound: Any lower bound of the loss; None if there is none (then give lr).
        max_trials: Trials before a search has failed; None: until 1e-12 of the first trial.
        direction: "sgd" or "adam".
        betas: Adam's decay constants.
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

    _rule = policies.AutoSLS
