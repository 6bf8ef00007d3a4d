"""Where a step begins: between a prediction that the level above has moved to and the point before it.

The level above has moved y by p, how it expects the solution to answer. Of that, the next step keeps the share

    gamma = clip(-S / (2 Q), 0, 1),    S = sum of s,    Q = sum of q,

s = <grad g(y), p> and q = g(y + p) - g(y) - s, each on the first sample after a prediction: the minimizer of the mean
of g(y) + gamma s + gamma^2 q along p. The terms are in units of |s| + |q|, and both sums decay. One sample alone would
not do. A minibatch's tangent says how y answers if the batch were the whole problem, and the whole answers by the
batch's part of it; what one fresh sample says of p is noise. Where y follows by itself, or p leads nowhere, gamma is
near 0, and on full batches with a tangent that holds near 1. It costs a value, and a gradient where gamma is not 0.

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

__all__ = ["Share", "Start", "WarmStart"]

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


class Share(NamedTuple):
    """How much of a prediction is kept, from the predictions so far.

    Attributes:
        slope: S.
        bend: Q.
    """

    slope: float = 0.0
    bend: float = 0.0

    @property
    def value(self) -> float:
        """gamma, in [0, 1]."""
        if self.bend <= 0.0:
            return float(self.slope < 0.0)
        return min(max(-0.5 * self.slope / self.bend, 0.0), 1.0)

    def after(self, slope: float, stayed: float, moved: float) -> Share:
        """Return the share with a further prediction p in it.

        Args:
            slope: <grad g(y), p>.
            stayed: g(y).
            moved: g(y + p). One that is not finite counts as a bend without a slope.
        """
        if not (math.isfinite(slope) and math.isfinite(stayed)):
            return self
        bend = moved - stayed - slope
        if not math.isfinite(bend):
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

    def look(self, state: Any, slope: float, stayed: float, moved: float) -> float:
        """Return the share of the prediction to keep; `drop` ends the step that it was looked at for, and saves it.

        Args:
            state: The optimizer's.
            slope: <grad g(y), p>.
            stayed: g(y).
            moved: g(y + p).
        """
        self._seen = Share(**state.get(_SHARE, {})).after(slope, stayed, moved)
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
