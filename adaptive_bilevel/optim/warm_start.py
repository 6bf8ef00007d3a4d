"""Where a step begins: between a prediction that the level above has moved to and the point before it.

The level above has moved y by p, how it expects the solution to answer. Of that, the next step keeps the share

    gamma = clip(-S / (2 Q), 0, 1),    S = sum of s,    Q = sum of q,

the minimizer of the mean of g(y) + gamma s + gamma^2 q. Each earlier prediction has a parabola, on the first sample
after it. The terms are in units of |s| + |q|, and both sums decay. One sample alone would not do. A minibatch's tangent
says how y answers if the batch were the whole problem, and the whole answers by the batch's part of it; what one fresh
sample says of p is noise. Where y follows by itself, or p leads nowhere, gamma is near 0, and on full batches with a
tangent that holds near 1.

The parabola of this p is that through loss and gradient at y + gamma p, which the step takes anyway, and the loss at y
or y + p, whichever is farther. So it costs a value. It counts for the next prediction; for the first one, the gradient
is taken at y, and at y + gamma p again.

Measured (``examples/benchmarks/NOTES.md``), against a choice between y and y + p on each sample: f on minibatches below
networks .36 -> .27, .33 -> .17, .43 -> .21 (label noise, two models, and meta-weights; BiSLS-Adam).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, final

from torch import Tensor

from ..evaluation.closures import Differentiated
from ..evaluation.vectors import fingerprint, unmoved
from .state import RoleState, read_states, write_states

__all__ = ["Parabola", "Share", "Start", "WarmStart", "farther_end"]

_ENTRY, _SHARE = "warm_start", "predicted_share"
_MEMORY = 0.9
"""Decay of the two sums, that of the mean of hypergradients."""


class Start(NamedTuple):
    """Where a step begins, evaluated.

    Attributes:
        found: Loss and gradients there.
        kept: gamma; 1 where nothing was predicted.
        stayed: g(y), the loss at the point before the prediction; nan where nothing was predicted.
    """

    found: Differentiated
    kept: float = 1.0
    stayed: float = math.nan


class Parabola(NamedTuple):
    """g(y) + gamma s + gamma^2 q along a prediction p.

    Attributes:
        stayed: g(y).
        slope: s.
        bend: q. Infinite where the loss is not finite along p, and nan where it is not at y.
    """

    stayed: float
    slope: float
    bend: float

    @classmethod
    def through(cls, share: float, here: float, along: float, there: float) -> Parabola:
        """Return the one through loss and slope at a share, and the loss at the farther end.

        Args:
            share: gamma.
            here: g(y + gamma p).
            along: <grad g(y + gamma p), p>.
            there: g at y + `farther_end(gamma)` p.
        """
        end = farther_end(share)
        distance = end - share
        bend = (there - here - along * distance) / distance**2
        slope = along - 2.0 * bend * share
        stayed = there if end == 0.0 else here - share * (slope + share * bend) if share > 0.0 else here
        if math.isfinite(bend):
            return cls(stayed, slope, bend)
        at_start = share == 0.0 and not (math.isfinite(here) and math.isfinite(along))
        return cls(stayed, math.nan, math.nan if at_start else math.inf)


def farther_end(share: float) -> float:
    """Return 0 for y, or 1 for y + p, whichever is farther from y + share p."""
    return 0.0 if share >= 0.5 else 1.0


class Share(NamedTuple):
    """How much of a prediction is kept, from the predictions so far.

    Attributes:
        slope: S.
        bend: Q.
    """

    slope: float = 0.0
    bend: float = 0.0

    @property
    def known(self) -> bool:
        """Whether a prediction has shown anything; gamma is 0 otherwise."""
        return self != Share()

    @property
    def value(self) -> float:
        """gamma, in [0, 1]."""
        if self.bend <= 0.0:
            return float(self.slope < 0.0)
        return min(max(-0.5 * self.slope / self.bend, 0.0), 1.0)

    def after(self, parabola: Parabola) -> Share:
        """Return the share with the parabola of a further prediction in it."""
        _, slope, bend = parabola
        if math.isnan(bend):
            return self
        if math.isinf(bend):
            slope, bend = 0.0, 1.0
        size = abs(slope) + abs(bend)
        if size == 0.0:
            return self
        return Share(_MEMORY * self.slope + slope / size, _MEMORY * self.bend + bend / size)


@final
class WarmStart:
    """The point before a prediction. It is an entry of the state: per parameter "point", and shared "at".

    "at" is ||y||^2 at the prediction: it tells whether other code has moved the parameters since, in whichever way
    (versions of tensors do not count changes through ``.data``).
    """

    def __init__(self) -> None:
        self._offered = False
        self._seen: Share | None = None

    def restored(self, state: Any, params: Sequence[Tensor]) -> None:
        """Look whether a state that was loaded holds an offer."""
        self._offered = any(_ENTRY in state.get(p, {}) for p in params)

    def offer(self, state: Any, params: Sequence[Tensor], points: Sequence[Tensor]) -> None:
        """Keep the point before the prediction, which is where the parameters are."""
        after = RoleState({"at": fingerprint(params)}, [{"point": point} for point in points])
        write_states(state, {_ENTRY: after}, params)
        self._offered = True

    def point(self, state: Any, params: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the point before the prediction; None if there is none, or if the parameters were moved since."""
        if not self._offered:
            return None
        kept = read_states(state, {_ENTRY: RoleState()}, params)[_ENTRY]
        self._seen = None
        if not unmoved(kept.shared.get("at"), params):
            self.drop(state, params)
            return None
        pairs = zip(params, kept.each, strict=True)  # what was frozen meanwhile stays where it is
        return [own["point"] if own and p.requires_grad else p.detach().clone() for p, own in pairs]

    def share(self, state: Any) -> Share:
        """Return the share that the predictions so far have shown."""
        return Share(**state.get(_SHARE, {}))

    def look(self, state: Any, parabola: Parabola) -> float:
        """Return the share with a prediction's parabola in it; `drop` ends the step that shows it, and saves it."""
        self._seen = self.share(state).after(parabola)
        return self._seen.value

    def drop(self, state: Any, params: Sequence[Tensor]) -> None:
        """Forget the offer, and keep what was seen of it."""
        if not self._offered:
            return
        if self._seen is not None:
            state[_SHARE] = self._seen._asdict()
            self._seen = None
        for p in params:
            if _ENTRY in state.get(p, {}):
                state[p] = {name: value for name, value in state[p].items() if name != _ENTRY}
        state.pop(_ENTRY, None)
        self._offered = False
