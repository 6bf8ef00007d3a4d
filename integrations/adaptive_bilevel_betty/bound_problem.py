"""The place of an optimizer in the engine's graph: its problem, those that it looks ahead into, its projection."""

from __future__ import annotations

import contextlib
import graphlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from adaptive_bilevel.errors import LowerLevelError
from adaptive_bilevel.hypergradient import LinearSolver

from ._host import Problem, call_param_callback, process_gradient
from .replay import Replay

__all__ = ["Seat", "edges", "lookahead"]


def edges(problem: Problem) -> dict[Problem, list[Problem]]:
    """Return whom each problem that this one looks ahead into answers to, lowest first.

    A path of Betty's, [me, p_n, ..., p_1, me], is the chain along which it differentiates: p_1 answers to me, p_2 to
    p_1, and so on. The result maps p_1 to [me, ...], p_2 to [p_1, ...]; with several paths, in an order that fits all.
    """
    answers: dict[Problem, list[Problem]] = {}
    for path in problem.paths:
        for lower, upper in zip(path[-2:0:-1], path[:1:-1], strict=True):
            known = answers.setdefault(lower, [])
            if upper not in known:
                known.append(upper)
    within = {lower: [upper for upper in uppers if upper in answers] for lower, uppers in answers.items()}
    return {lower: answers[lower] for lower in graphlib.TopologicalSorter(within).static_order()}


def lookahead(problem: Problem) -> list[Problem]:
    """Return the problems whose solutions answer to this one's parameters, lowest first."""
    return list(edges(problem))


class Seat:
    """What a bound optimizer, or a hypergradient type, knows of its problem.

    Args:
        replay: The problem's evaluations.
        solver: Returns P of the hypergradient type "adaptive_cg" for this problem.
        rolled_back: Whether the engine takes back what a lower problem does, so that nothing can be carried.
    """

    def __init__(self, replay: Replay, solver: Callable[[], LinearSolver], rolled_back: bool) -> None:
        self.replay = replay
        self.problem: Problem = replay.problem
        self._solver = solver
        self.rolled_back = rolled_back
        self.solution: Sequence[Tensor] | None = None
        self._projects: bool | None = None

    @property
    def solver(self) -> LinearSolver:
        """P of the hypergradient type "adaptive_cg" for this problem, as it is now."""
        return self._solver()

    def below(self) -> list[Seat]:
        """Return the seats of the problems looked ahead into, lowest first."""
        return [seat_of(problem) for problem in lookahead(self.problem)]

    # ------------------------------------------------------------------------------------------ projection

    @property
    def projects(self) -> bool:
        """Whether the problem has a param_callback that is a projection: applied twice, it is as applied once.

        Anything else (a decay, say) belongs to the step that is taken, and has no place in a trial.
        """
        if self._projects is None:
            # Also away from here: at 0, a decay does nothing either.
            known = callable(getattr(self.problem, "param_callback", None))
            self._projects = known and self._leaves_others_alone(
                lambda: all(self._is_idempotent(away) for away in (0.0, 1.0, -1.0))
            )
        return self._projects

    def _leaves_others_alone(self, probe: Callable[[], bool]) -> bool:
        """Return the answer of a probe, False if it changed another problem's parameters; they are as before."""
        own = {id(p) for p in self._params()}
        listed = {id(p): p.detach() for problem in self.replay.problems for p in problem.module.parameters()}
        others = [p for name, p in listed.items() if name not in own]
        saved = [p.clone() for p in others]
        try:
            answer = probe()
            return answer and all(torch.equal(p, q) for p, q in zip(others, saved, strict=True))
        finally:
            for p, q in zip(others, saved, strict=True):
                p.copy_(q)

    def _is_idempotent(self, away: float) -> bool:
        """Return whether a second call changes nothing, from parameters that are so far away from the present ones."""
        with self.projected(away):
            once = [p.detach().clone() for p in self._params()]
            self._call()
            return all(_same(p.detach(), q) for p, q in zip(self._params(), once, strict=True))

    @contextlib.contextmanager
    def projected(self, away: float = 0.0) -> Iterator[None]:
        """Have the parameters (or others, so far away) projected inside, and as they were outside."""
        saved = [p.detach().clone() for p in self._params()]
        try:
            with torch.no_grad():
                if away != 0.0:
                    torch._foreach_add_([p.detach() for p in self._params()], away)
            self._call()
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_([p.detach() for p in self._params()], saved)

    def project(self, tensors: Sequence[Tensor]) -> None:
        """Project tensors that stand for the optimizer's parameters, in order: the parameters themselves, or copies."""
        params = [p for group in self.problem.optimizer.param_groups for p in group["params"]]
        saved = [p.detach().clone() for p in params]
        with torch.no_grad():
            try:
                torch._foreach_copy_([p.detach() for p in params], [t.detach() for t in tensors])
                self._call()
                projected = [p.detach().clone() for p in params]
            finally:
                torch._foreach_copy_([p.detach() for p in params], saved)
            torch._foreach_copy_([t.detach() for t in tensors], projected)

    def processed(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return gradients as Betty would step on them: after grad_callback and clipping."""
        held = [p.grad for p in params]
        try:
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            process_gradient(self.problem)
            return [None if p.grad is None else p.grad.detach() for p in params]
        finally:
            for p, g in zip(params, held, strict=True):
                p.grad = g

    def _call(self) -> None:
        for problem in self.replay.problems:
            problem.in_trial = True
        try:
            call_param_callback(self.problem)
        finally:
            for problem in self.replay.problems:
                problem.in_trial = False

    def _params(self) -> list[Tensor]:
        found: list[Tensor] = list(self.problem.module.parameters())
        return found


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether tensors are equal up to the rounding of a projection, which involves all of their entries."""
    rounding = 64.0 * torch.finfo(one.dtype).eps
    return bool(torch.isclose(one, other, rtol=rounding, atol=rounding * float(other.abs().max())).all())


_ATTRIBUTE = "_adaptive_seat"


def seat_of(problem: Problem) -> Seat:
    """Return the seat of a bound problem.

    Raises:
        LowerLevelError: It is not bound.
    """
    seat = getattr(problem, _ATTRIBUTE, None)
    if seat is None:
        raise LowerLevelError(
            f"problem {problem.name!r} is not bound: add  bind(engine)  after engine = Engine(...), with this problem "
            "among the engine's problems"
        )
    assert isinstance(seat, Seat)
    return seat


def seat_if_any(problem: Problem) -> Seat | None:
    """Return the seat of a problem, None before bind."""
    return getattr(problem, _ATTRIBUTE, None)


def take_seat(seat: Seat) -> None:
    """Remember the seat at its problem."""
    setattr(seat.problem, _ATTRIBUTE, seat)
