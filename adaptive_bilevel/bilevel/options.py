"""Options of the upper searches, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from ..errors import OptionError
from ..hypergradient.products import PRODUCTS
from ..optim.options import is_role
from ..policies import validation
from .roles import ModelCheck, Momentum, Pace, Prediction, Response

__all__ = ["OneStepOptions", "RoleOptions", "SearchOptions"]

BASELINES = ("paper", "matched")


class SearchOptions(TypedDict, total=False):
    """Options of an upper search: ``products``, see `BiSLS`, and those of `adaptive_bilevel.SLS`, see there."""

    c: float | None
    shrink: float
    grow: float
    reset: str
    slack: float
    lower_bound: float | None
    max_step: float | None
    max_trials: int | None
    betas: tuple[float, float]
    eps: float
    max_skips: int
    products: str


@dataclass(frozen=True, kw_only=True)
class RoleOptions:
    """Names, numbers or objects for the roles of `BiSLS`; see there.

    Raises:
        OptionError: One is neither.
    """

    owner: str = field(repr=False, compare=False, metadata={"option": False})
    momentum: str | bool | Momentum = "auto"
    carry: str | bool | Prediction = "auto"
    curvature: float | ModelCheck = 0.5
    response: str | Response = "tangent"
    pace: str | Pace = "every"
    products: str = "auto"

    def __post_init__(self) -> None:
        """Validate the options."""
        for name in ("momentum", "carry"):
            value = getattr(self, name)
            if not (isinstance(value, bool) or value == "auto" or is_role(value)):
                raise OptionError(f"{self.owner}({name}={value!r}): {name} must be 'auto', True or False")
        if not is_role(self.curvature):
            validation.positive(self.owner, "curvature", self.curvature)
        if not is_role(self.response):
            validation.choice(self.owner, "response", self.response, ("tangent",))
        if not is_role(self.pace):
            validation.choice(self.owner, "pace", self.pace, ("auto", "every"))
        elif self.momentum is False:
            raise OptionError(
                f"{self.owner}(momentum=False, pace={self.pace!r}): momentum=False has a search certify every "
                "step; leave one of the two out"
            )
        validation.choice(self.owner, "products", self.products, PRODUCTS)
        validation.make_plain(self)


@dataclass(frozen=True, kw_only=True)
class OneStepOptions:
    """Options of `OneStepBiSLS`; see there.

    Raises:
        OptionError: One is out of range.
    """

    owner: str = field(repr=False, compare=False, metadata={"option": False})
    momentum: bool | None = None
    lower_bound: float | None = 0.0
    baseline: str = "paper"
    response_steps: int = 1

    def __post_init__(self) -> None:
        """Validate the options."""
        if not (self.momentum is None or isinstance(self.momentum, bool)):
            raise OptionError(f"{self.owner}(momentum={self.momentum!r}): momentum must be True, False or None")
        validation.finite(self.owner, "lower_bound", self.lower_bound, optional=True)
        validation.choice(self.owner, "baseline", self.baseline, BASELINES)
        validation.count(self.owner, "response_steps", self.response_steps)
        validation.make_plain(self)
