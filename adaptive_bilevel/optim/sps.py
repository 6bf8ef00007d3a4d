"""SPS_max, DecSPS and SPSB as optimizers."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from .. import policies
from ..policies.scalars import Scalar
from ..policies.schedule import Decay
from .direction import Direction
from .options import Conduct
from .polyak import PolyakOptimizer

__all__ = ["SPSB", "DecSPS", "SPSMax"]


class SPSMax(PolyakOptimizer):
    """SPS_max: step_k = min{(f_i - lower_bound) / (c ||grad f_i||^2), lr}, eq. (5).

    Args:
        params: Parameters or groups.
        lr: gamma_b > 0, the bound. Left out, it is found: at the first step, the longest one that does not raise the
            sample's loss; under "inverse_sqrt" estimated anew at each step after that
            (`adaptive_bilevel.policies.distance`).
        c: c > 0; 1 in the experiments, 1/2 in the theorems.
        lower_bound: l, any lower bound of the loss, e.g. 0 for cross-entropy; None: to be given at each step.
        decay: Schedule of the bound, "constant", "inverse_sqrt", "inverse" or a callable k -> factor.
        floor: No step is shorter (unless the bound is), eqs. (9) and (10).
        floor_decay: Schedule of the floor.
        direction: "sgd", or "adam" (slope in Adam's metric).
        betas: Adam's decay constants.
        eps: Adam's eps, outside the root.
        max_skips: So many non-finite losses or gradients in a row raise `NonFiniteError`.

    Raises:
        OptionError: An option is out of range (also a ValueError).

    >>> import torch
    >>> x = torch.nn.Parameter(torch.tensor([3.0, 2.0]))
    >>> optimizer = SPSMax([x], lr=1.0)
    >>> float(optimizer.step(lambda: 0.5 * (x**2).sum()))
    6.5
    >>> optimizer.param_groups[0]["step_size"]
    0.5
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | None = None,
        *,
        c: float = 1.0,
        lower_bound: float | None = 0.0,
        decay: Decay = "constant",
        floor: float = 0.0,
        floor_decay: Decay = "constant",
        direction: str | Direction = "sgd",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_skips: int = 100,
    ) -> None:
        rule = policies.SPSMax(c=c, lower_bound=lower_bound, decay=decay, floor=floor, floor_decay=floor_decay)
        conduct = Conduct(owner=type(self).__name__, direction=direction, betas=betas, eps=eps, max_skips=max_skips)
        super().__init__(params, lr, rule, conduct)


class SPSB(PolyakOptimizer):
    """SPSB: step_k = min{(f_i - lower_bound) / (c ||grad f_i||^2), lr decay(k)}, eq. (7).

    Options as in `SPSMax`; the bound decays as 1/sqrt(k+1) ("inverse" for strongly convex problems).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | None = None,
        *,
        c: float = 1.0,
        lower_bound: float | None = 0.0,
        decay: Decay = "inverse_sqrt",
        floor: float = 0.0,
        floor_decay: Decay = "constant",
        direction: str | Direction = "sgd",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_skips: int = 100,
    ) -> None:
        rule = policies.SPSB(c=c, lower_bound=lower_bound, decay=decay, floor=floor, floor_decay=floor_decay)
        conduct = Conduct(owner=type(self).__name__, direction=direction, betas=betas, eps=eps, max_skips=max_skips)
        super().__init__(params, lr, rule, conduct)


class DecSPS(PolyakOptimizer):
    """DecSPS: step_k = (1/c_k) min{(f_i - lower_bound) / ||grad f_i||^2, c_{k-1} step_{k-1}}, eq. (6).

    c_k = c sqrt(k+1), so the step never grows.

    Args:
        params: Parameters or groups.
        lr: gamma_b,0 > 0, the first bound. Left out, it is found at the first step.
        c: c > 0.
        lower_bound: l, any lower bound of the loss; None: to be given at each step.
        direction: "sgd" or "adam".
        betas: Adam's decay constants.
        eps: Adam's eps, outside the root.
        max_skips: So many non-finite losses or gradients in a row raise `NonFiniteError`.

    Raises:
        OptionError: An option is out of range (also a ValueError).
    """

    _absent = (*PolyakOptimizer._absent, "decay")

    def __init__(
        self,
        params: ParamsT,
        lr: float | None = None,
        *,
        c: float = 1.0,
        lower_bound: float | None = 0.0,
        direction: str | Direction = "sgd",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_skips: int = 100,
    ) -> None:
        rule = policies.DecSPS(c=c, lower_bound=lower_bound)
        conduct = Conduct(owner=type(self).__name__, direction=direction, betas=betas, eps=eps, max_skips=max_skips)
        super().__init__(params, lr, rule, conduct)

    def _rule_state(self) -> policies.State:
        # c_{k-1} step_{k-1} bounds the next step, so it follows lr: a scheduler scales it.
        state, reference = super()._rule_state(), self._saved("lr", 0.0)
        return state._replace(product=state.product * (self._reference_lr() / reference)) if reference else state

    def _save_rule_state(self, state: policies.State, **more: Scalar) -> None:
        super()._save_rule_state(state, lr=self._reference_lr(), **more)
