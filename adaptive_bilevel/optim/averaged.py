"""A search under `AutoSLS`: what it does beside the search once samples have disagreed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import warn
from ..evaluation import foreach
from ..evaluation.attempts import Attempts
from ..evaluation.closures import Differentiated
from ..evaluation.guard import Closure, Guard, RandomState
from ..evaluation.objective import Objective
from ..evaluation.reductions import on_host
from ..policies import AutoSLS, SearchState, State
from .averaging import Average, MeanGradient, settle
from .base import AdaptiveOptimizer
from .direction import Direction
from .place import Place

__all__ = ["AveragedSearch"]

_LOST = (
    "{}: the loss after the last step is {:.4g}, and {:.4g} at the mean of the iterates before it, so the step was too "
    "long. The run goes on from that mean with shorter steps. If this comes again, use a rule that searches for each "
    "step: SLSB, or BiSLS(..., hypergradient='direct') for an upper loss"
)


class AveragedSearch(AdaptiveOptimizer):
    """What searches do beside the search. Under all rules but `AutoSLS`, and while its samples agree: nothing.

    Afterwards the parameters hold a mean of the iterates, see `adaptive_bilevel.optim.averaging`, and plain steps are
    along the mean of the gradients.
    """

    def _prepare(self) -> None:
        super()._prepare()
        self._average: Average | None = None
        self._resting: list[Tensor] | None = None
        self._moved = self._anew = False
        self._lost: tuple[float, float] | None = None

    def _agree(self, state: State) -> bool:
        return isinstance(self.policy, AutoSLS) and self.policy.agrees(state)

    def _disagree(self, state: State) -> bool:
        return isinstance(self.policy, AutoSLS) and not self.policy.agrees(state)

    def _direction(self) -> Direction:
        direction = super()._direction()
        if self.conduct.direction == "sgd" and self._disagree(self._rule_state()):
            return MeanGradient(self.param_groups[0]["betas"][0])
        return direction

    def _evaluate(
        self, guard: Guard, closure: Closure, params: list[Tensor], random: RandomState | None = None
    ) -> Differentiated:
        """Return loss and gradients at the iterate, which is ahead of the parameters; see `AdaptiveOptimizer`."""
        self._average = self._resting = self._lost = None
        disagree = self._disagree(self._rule_state())
        place = Place.read(self.state) if self._agree(self._rule_state()) else Place()
        self._moved = place.left(params)
        self._anew = self._moved and not place.moved
        average = Average.read(self.state, params) if disagree else None
        if average is None:
            return super()._evaluate(guard, closure, params, random)
        known = closure.evaluated(params) if isinstance(closure, Objective) else None
        self._own_counts.values += known is None
        rests = Attempts().value(lambda: guard.value(closure)) if known is None else known.loss
        resting = [p.detach().clone() for p in params]
        guard.copy()
        foreach.add_(params, average.ahead)
        guard.rebase()
        found = super()._evaluate(guard, closure, params, guard.entry)
        at_rest, ahead = on_host(rests, found.loss)
        back = self._taken_back(guard, closure, params, average, resting, ahead)
        if back is not None:
            return back
        self._average, self._resting = average.compared(at_rest - ahead), resting
        return found

    def _taken_back(
        self, guard: Guard, closure: Closure, params: list[Tensor], average: Average, resting: list[Tensor], here: float
    ) -> Differentiated | None:
        """Return loss and gradients at the mean before the last iterate, if that is lost; None: it stays."""
        assert isinstance(self.policy, AutoSLS)
        state = self._rule_state()
        if not self.policy.is_high(state, here):
            return None
        iterate = [p.detach().clone() for p in params]
        foreach.copy_(params, average.without_last(resting))
        guard.mark()
        before = float(Attempts().value(lambda: guard.value(closure, guard.entry)))
        self._own_counts.values += 1
        if not self.policy.lost(state, here, before):
            foreach.copy_(params, iterate)
            guard.recall()
            return None
        guard.rebase()
        self._lost, self._resting = (here, before), resting
        return super()._evaluate(guard, closure, params, guard.entry)

    def _reached(self) -> State:
        """Return the policy's state, after a return or a start from elsewhere as these leave it."""
        state = self._rule_state()
        if not isinstance(self.policy, AutoSLS):
            return state
        if self._lost is not None:
            return self.policy.returned(state)
        if self._anew:
            return self.policy.shifted(state, math.nan)
        return state

    def upper_moved(self) -> None:
        """Evaluate the last sample again, if the next one could be taken to disagree because x has moved."""
        if self.sample is None or not isinstance(self.policy, AutoSLS):
            return
        state, sample = self._rule_state(), self.sample
        if not self.policy.could_disagree(state):
            self._save_rule_state(self.policy.displaced(state, None))
            return
        with torch.no_grad(), Guard(self._parameters(), self._workspace) as guard:
            value = Attempts().value(lambda: guard.value(sample.closure, sample.random))
        self._own_counts.values += 1
        self._save_rule_state(self.policy.displaced(state, float(value) - state.expected))

    def displaced(self) -> None:
        """Take note of where a level above has moved the parameters."""
        if self._agree(self._rule_state()) and Place.read(self.state).at is not None:
            Place.keep(self.state, self._parameters(), self._moved)

    def _stay(self, params: list[Tensor]) -> None:
        """Put the parameters back to the mean: the step has moved nothing."""
        if self._resting is not None:
            foreach.copy_(params, self._resting)

    def _look(self, state: State, value: Callable[[], Any]) -> State:
        """Return the state with the loss after a step that was not along the searched direction."""
        if not (isinstance(self.policy, AutoSLS) and self.policy.agrees(state)):
            return state
        self._own_counts.values += 1
        after: SearchState = self.policy.observed(state, float(Attempts().value(value)))
        return after

    def _settle(self, params: list[Tensor], start: list[Tensor], state: State) -> None:
        """Leave the mean in the parameters, which are at the new iterate."""
        if self._lost is not None:
            warn(_LOST.format(type(self).__name__, *self._lost))
        if self._disagree(state):
            settle(self.state, params, start, self._average)
        elif self._agree(state):
            Place.keep(self.state, params, self._moved)
