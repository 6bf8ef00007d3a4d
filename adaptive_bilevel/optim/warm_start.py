"""Where a step begins: at a prediction that the level above has moved to, or at the point before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor

from ..evaluation.vectors import dot
from .state import RoleState, read_states, write_states

__all__ = ["WarmStart"]

_ENTRY = "warm_start"


@final
class WarmStart:
    """The point before a prediction. It is an entry of the state: per parameter "point", and shared "at".

    "at" is ||y||^2 at the prediction: it tells whether somebody has moved the parameters since, in whichever way
    (versions of tensors do not count changes through ``.data``).
    """

    def __init__(self) -> None:
        self._offered = False

    def restored(self, state: Any, params: Sequence[Tensor]) -> None:
        """Look whether a state that was loaded holds an offer."""
        self._offered = any(_ENTRY in state.get(p, {}) for p in params)

    def offer(self, state: Any, params: Sequence[Tensor], points: Sequence[Tensor]) -> None:
        """Keep the point before the prediction, which is where the parameters are."""
        after = RoleState({"at": _fingerprint(params)}, [{"point": point} for point in points])
        write_states(state, {_ENTRY: after}, params)
        self._offered = True

    def point(self, state: Any, params: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the point before the prediction; None if there is none, or if the parameters were moved since."""
        if not self._offered:
            return None
        kept = read_states(state, {_ENTRY: RoleState()}, params)[_ENTRY]
        if kept.shared.get("at") != _fingerprint(params):
            self.drop(state, params)
            return None
        return [own["point"] if own else p.detach().clone() for p, own in zip(params, kept.each, strict=True)]

    def drop(self, state: Any, params: Sequence[Tensor]) -> None:
        """Forget the offer."""
        if not self._offered:
            return
        for p in params:
            if _ENTRY in state.get(p, {}):
                state[p] = {name: value for name, value in state[p].items() if name != _ENTRY}
        state.pop(_ENTRY, None)
        self._offered = False


def _fingerprint(params: Sequence[Tensor]) -> float:
    detached = [p.detach() for p in params]
    return dot(detached, detached)
